// What the script of every page begins with: elements, and the data that travel in #data.

const $ = (id) => document.getElementById(id);

function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function isDark() {
  const forced = document.documentElement.style.colorScheme;
  return forced ? forced === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

let themeChanged = () => {};

function setDark(dark) {
  document.documentElement.style.colorScheme = dark ? "dark" : "light";
  themeChanged();
}

// a notebook tells whether it is dark (frame.js), perhaps before the data are unpacked
addEventListener("message", (event) => {
  if (event.source === parent && typeof event.data?.dark === "boolean") setDark(event.data.dark);
});

// the button #theme goes to the other theme; `changed` draws again what has colours of its own
function themeButton(changed = () => {}) {
  const button = $("theme");
  const name = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`);
  };
  themeChanged = () => { name(); changed(); };
  button.addEventListener("click", () => setDark(!isDark()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => themeChanged());
  name();
}

// the JSON in #data, and the bytes behind it
async function unpacked() {
  const text = atob($("data").textContent.trim());
  const packed = new Uint8Array(text.length);
  for (let k = 0; k < text.length; k++) packed[k] = text.charCodeAt(k);
  const buffer = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  $("data").remove();
  return {
    document: JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length))),
    bytes: new Uint8Array(buffer, 4 + length),
  };
}
