// The page of `interp heads`: unpacks the report in #data and draws it. Text from the report only
// ever enters the document through textContent, so a token cannot become markup.

const $ = (id) => document.getElementById(id);

const PALETTE = {
  // Okabe and Ito's colours; the sink, often the commonest role, gets the quiet grey
  previous_token: "#56b4e9", fixed_offset: "#0072b2", current_token: "#cc79a7",
  first_token_sink: "#999999", duplicate_token: "#f0e442", induction: "#d55e00",
  recency: "#009e73", broad: "#e69f00",
};
const RAMPS = {
  light: ["#eef2f4", "#c5dfe4", "#7dbccb", "#3a8fb0", "#1f5c93", "#1c2a5c"],
  dark: ["#1d242d", "#1f3e5c", "#22668a", "#2f98a6", "#7ccfae", "#f0f8d8"],
  lightBelow: ["#eef2f4", "#f3cfae", "#dc9358", "#a85218", "#5e2a0a"],
  darkBelow: ["#1d242d", "#54331c", "#96561f", "#d98c3c", "#ffe0b0"],
};
const PAGE_ROWS = 20;
const LETTER_PX = 8; // narrower than this, a cell's segment shows its colour only
const VALUE_PX = 27;

let report, heads, columns, detectors, roles, at, patterns;
const state = {
  head: -1, prompt: 0, query: 0, key: 0, hideFirst: false,
  colour: "roles", passes: () => true, sort: ["confidence", -1], page: 0,
};

// ------------------------------------------------------------------ small tools

function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const known = (x) => x !== null && x !== undefined && x !== "";
const nameOf = (i) => `L${columns.layer[i]}H${columns.head[i]}`;
const get = (name, i) => columns[name]?.[i] ?? null;
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const lowerFirst = (text) => text.charAt(0).toLowerCase() + text.slice(1);
const plural = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;

function number(x, digits = 2) {
  return known(x) ? x.toFixed(digits).replace("-", "−") : "–";
}

function pValue(x) {
  if (!known(x)) return "–";
  return x < 0.001 ? "<.001" : x.toFixed(3).replace(/^0/, "");
}

function percent(weight) {
  return weight >= 0.0995 ? `${Math.round(weight * 100)} %` : `${(weight * 100).toFixed(1)} %`;
}

function readable(token) {
  // What cannot be seen is written: spaces, line ends, controls, direction marks, half surrogates
  return token
    .replace(/ /g, "·").replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥")
    .replace(/[\0-\x1f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/[\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u180b-\u180f\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff0-\ufffb]|\p{Cs}|\p{Co}|\p{Cn}/gu,
      (c) => `⟨${c.codePointAt(0).toString(16).toUpperCase()}⟩`) || "∅";
}

// ------------------------------------------------------------------ colour

const rgb = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
const mix = (a, b, t) => a.map((x, k) => Math.round(x + (b[k] - x) * t));
const css = (c) => `rgb(${c.join(" ")})`;

function ink(background) {
  const [r, g, b] = background.map((x) => (x / 255 <= 0.04045 ? x / 3294.6 : ((x / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

function makeRamp(stops) {
  const colours = stops.map(rgb);
  return Array.from({ length: 256 }, (_, v) => {
    const x = (v / 255) * (colours.length - 1);
    const k = Math.min(Math.floor(x), colours.length - 2);
    return mix(colours[k], colours[k + 1], x - k);
  });
}

const theme = { dark: false, ramp: [], below: [], panel: [255, 255, 255], text: "#000", muted: "#555" };

function readTheme() {
  const chosen = document.documentElement.style.colorScheme;
  theme.dark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  theme.ramp = makeRamp(theme.dark ? RAMPS.dark : RAMPS.light);
  theme.below = makeRamp(theme.dark ? RAMPS.darkBelow : RAMPS.lightBelow);
  const style = getComputedStyle(document.body);
  theme.panel = style.backgroundColor.match(/\d+/g).slice(0, 3).map(Number);
  theme.text = style.color;
  theme.muted = getComputedStyle($("grid-readout")).color;
  $("theme").textContent = theme.dark ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", `Switch to the ${theme.dark ? "light" : "dark"} theme`);
}

function roleColour(name, confidence = 1) {
  return mix(theme.panel, rgb(roles[name].colour), 0.3 + 0.7 * clamp(confidence, 0, 1));
}

function roleConfidence(name, i) {
  return get(`${name}_confidence`, i) ?? get("confidence", i) ?? 1;
}

function extent(name) {
  // The scale of a column over all heads; scores that live in 0..1 keep that scale
  const near = [name, `${name}_low`, `${name}_high`, `${name}_null`, name === "ablation_effect" ? "ablation_control" : ""];
  const values = near.flatMap((column) => columns[column] ?? []).filter(known);
  const effects = name === "ablation_effect" ? ["ablation_low", "ablation_high"].flatMap((c) => columns[c] ?? []).filter(known) : [];
  let low = 0, high = 0;
  for (const v of [...values, ...effects]) { low = Math.min(low, v); high = Math.max(high, v); }
  const detector = detectors.find((d) => d.name === name);
  const share = name === "confidence" || (detector && low >= -0.02 && high <= 1.02);
  return share ? [0, 1] : low === high ? [0, 1] : [low, high];
}

function scoreColour(value, [low, high]) {
  const reach = Math.max(-low, high);
  return (value < 0 ? theme.below : theme.ramp)[Math.round(clamp(Math.abs(value) / reach, 0, 1) * 255)];
}

// ------------------------------------------------------------------ filter

const COMPARE = {
  "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b,
  "=": (a, b) => a === b, "==": (a, b) => a === b, "!=": (a, b) => a !== b,
};
const ALIASES = { role: "role", roles: "role", label: "role", labels: "role", ablation: "ablation_effect" };

function distance(a, b) {
  let row = Array.from({ length: b.length + 1 }, (_, k) => k);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next[j] = Math.min(row[j] + 1, next[j - 1] + 1, row[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1));
    }
    row = next;
  }
  return row[b.length];
}

function unknown(what, got, names, listed) {
  const near = names.map((n) => [distance(got, n), n]).sort((a, b) => a[0] - b[0])[0];
  const hint = near && near[0] <= Math.max(2, got.length / 3) ? `; did you mean “${near[1]}”?` : ".";
  return new Error(`No ${what} “${got}”${hint} Known: ${listed.join(", ")}.`);
}

function comparison(name, operator, value) {
  const column = ALIASES[name] ?? name;
  if (column === "role") {
    if (operator !== "=" && operator !== "==" && operator !== "!=") throw new Error("A role is compared with = or !=, as in role=induction.");
    const names = [...Object.keys(roles), "none"];
    if (!names.includes(value)) throw unknown("role", value, names, names);
    const has = (i) => (value === "none" ? !report.labels[i].length : report.labels[i].includes(value));
    return operator === "!=" ? (i) => !has(i) : has;
  }
  const values = columns[column];
  if (!values) {
    const extra = /_(low|high|null|p|confidence)$/;
    const listed = ["role", ...Object.keys(columns).filter((c) => !extra.test(c)), "and a score's _low, _high, _null, _p, _confidence"];
    throw unknown("column", name, ["role", ...Object.keys(columns)], listed);
  }
  if (values.some((v) => typeof v === "string")) return (i) => known(values[i]) && COMPARE[operator](values[i].toLowerCase(), value.toLowerCase());
  const wanted = Number(value.replace("−", "-"));
  if (value === "" || Number.isNaN(wanted)) throw new Error(`${name} is compared with a number, as in ${name}>0.4, not with “${value}”.`);
  return (i) => known(values[i]) && COMPARE[operator](values[i], wanted);
}

function parseFilter(text) {
  // or := and ("or" and)*;  and := not ("and"? not)*;  not := "not" not | "(" or ")" | L18H6 | column op value
  const tokens = text.match(/"[^"]*"|[<>!=]=|[<>=()]|[^\s<>!=()"]+|\S/g) ?? [];
  let k = 0;
  const word = () => tokens[k]?.toLowerCase();
  function either() {
    const parts = [both()];
    while (word() === "or") { k++; parts.push(both()); }
    return (i) => parts.some((part) => part(i));
  }
  function both() {
    const parts = [one()];
    while (k < tokens.length && word() !== "or" && word() !== ")") {
      if (word() === "and") k++;
      parts.push(one());
    }
    return (i) => parts.every((part) => part(i));
  }
  function one() {
    const token = tokens[k++];
    if (token === undefined) throw new Error("The filter ends too early; a comparison such as induction>0.4 is missing.");
    if (token.toLowerCase() === "not") { const inner = one(); return (i) => !inner(i); }
    if (token === "(") {
      const inner = either();
      if (tokens[k++] !== ")") throw new Error("A bracket is not closed.");
      return inner;
    }
    if (/^l\d+h\d+$/i.test(token)) return (i) => nameOf(i).toLowerCase() === token.toLowerCase();
    const operator = tokens[k];
    if (!/^[a-z_]\w*$/i.test(token) || !(operator in COMPARE)) {
      throw new Error(`“${token}” is not a comparison. Write for instance induction>0.4, role=broad, layer>=17 and confidence>0.9, or L18H6.`);
    }
    const value = tokens[k + 1];
    if (value === undefined) throw new Error(`After “${token}${operator}” a value is missing.`);
    k += 2;
    return comparison(token.toLowerCase(), operator, value.replace(/^"|"$/g, ""));
  }
  if (!tokens.length) return () => true;
  const result = either();
  if (k < tokens.length) throw new Error(`Unexpected “${tokens[k]}”.`);
  return result;
}

function applyFilter() {
  const message = $("filter-message");
  try {
    state.passes = parseFilter($("filter").value);
    const shown = heads.filter(state.passes).length;
    message.textContent = $("filter").value.trim() ? `${shown} of ${plural(heads.length, "head")}` : "";
    message.className = "";
    $("filter").removeAttribute("aria-invalid");
  } catch (error) {
    message.textContent = error.message;
    message.className = "bad";
    $("filter").setAttribute("aria-invalid", "true");
    return;
  }
  for (const i of heads) cells[i].classList.toggle("out", !state.passes(i));
  for (const chip of $("legend").children) chip.setAttribute("aria-pressed", chip.dataset.filter === $("filter").value);
  state.page = 0;
  drawTable();
}

function setFilter(text) {
  $("filter").value = text;
  applyFilter();
}

// ------------------------------------------------------------------ map of heads

const cells = [];

function buildGrid() {
  const [nLayers, nHeads] = report.shape;
  const grid = $("grid");
  grid.setAttribute("aria-rowcount", nLayers + 1);
  grid.setAttribute("aria-colcount", nHeads + 1);
  for (const [property, value] of [["--rows", nLayers], ["--cols", nHeads]]) {
    document.documentElement.style.setProperty(property, value);
  }
  const every = Math.max(1, Math.ceil(nHeads / 16));
  const top = el("div", { role: "row", className: "row axis" }, el("div", { role: "columnheader", title: "layer" }, "layer"));
  for (let h = 0; h < nHeads; h++) {
    top.append(el("div", { role: "columnheader", "aria-label": `head ${h}` }, h % every ? "" : String(h)));
  }
  grid.append(top);
  for (let l = 0; l < nLayers; l++) {
    const row = el("div", { role: "row", className: "row" }, el("div", { role: "rowheader", "aria-label": `layer ${l}` }, String(l)));
    for (let h = 0; h < nHeads; h++) {
      const i = at[l * nHeads + h];
      const cell = el("div", { role: "gridcell" });
      if (i < 0) Object.assign(cell, { className: "hole", ariaLabel: `L${l}H${h}: not in this report` });
      else {
        Object.assign(cell, { className: "cell", tabIndex: -1, ariaSelected: "false" });
        cell.dataset.head = i;
        cells[i] = cell;
      }
      row.append(cell);
    }
    grid.append(row);
  }
  const headAt = (event) => event.target.closest?.(".cell")?.dataset.head;
  grid.addEventListener("click", (event) => {
    const head = headAt(event);
    if (head !== undefined) { select(Number(head)); cells[head].focus({ preventScroll: true }); }
  });
  grid.addEventListener("pointerover", (event) => {
    const head = headAt(event);
    if (head !== undefined) $("grid-readout").textContent = describe(Number(head));
  });
  grid.addEventListener("pointerleave", () => { $("grid-readout").textContent = describe(state.head); });
  grid.addEventListener("keydown", onGridKey);
}

function onGridKey(event) {
  const [nLayers, nHeads] = report.shape;
  const layer = columns.layer[state.head], head = columns.head[state.head];
  const last = nHeads - 1, bottom = nLayers - 1;
  // where to start and which way to look for the next head that is in the report
  const moves = {
    ArrowLeft: [layer, head - 1, 0, -1], ArrowRight: [layer, head + 1, 0, 1],
    ArrowUp: [layer - 1, head, -1, 0], ArrowDown: [layer + 1, head, 1, 0],
    Home: event.ctrlKey ? [0, 0, 0, 1] : [layer, 0, 0, 1],
    End: event.ctrlKey ? [bottom, last, 0, -1] : [layer, last, 0, -1],
    PageUp: [0, head, 1, 0], PageDown: [bottom, head, -1, 0],
  };
  if (!(event.key in moves) || event.altKey || event.metaKey) return;
  event.preventDefault();
  let [l, h, dl, dh] = moves[event.key];
  while (l >= 0 && l < nLayers && h >= 0 && h < nHeads && at[l * nHeads + h] < 0) { l += dl; h += dh; }
  const next = l >= 0 && l < nLayers && h >= 0 && h < nHeads ? at[l * nHeads + h] : -1;
  if (next >= 0) { select(next); cells[next].focus(); }
}

function describe(i) {
  const named = report.labels[i].filter((name) => roles[name]).map((name) => `${lowerFirst(roles[name].title)} ${number(get(name, i))}`);
  let text = `${nameOf(i)}: ${named.join(", ") || "no role"}`;
  if (state.colour !== "roles" && !report.labels[i].includes(state.colour)) {
    text += `; ${lowerFirst(titleOf(state.colour))} ${known(get(state.colour, i)) ? number(get(state.colour, i)) : state.colour === "ablation_effect" ? "not tested" : "–"}`;
  }
  return text;
}

const titleOf = (name) => roles[name]?.title ?? detectors.find((d) => d.name === name)?.title ?? { ablation_effect: "Ablation effect", confidence: "Confidence" }[name] ?? name;

function unitOf(name) {
  return name === "ablation_effect" ? "nats" : name === "confidence" ? "share of resamples" : detectors.find((d) => d.name === name)?.unit ?? "";
}

// One description of a cell's paint serves the map on screen and the map in the PNG
function paint(i, width, scale) {
  if (state.colour === "roles") {
    const own = report.labels[i].filter((name) => roles[name]);
    own.sort((a, b) => (get(b, i) ?? 0) - (get(a, i) ?? 0));
    return own.map((name) => {
      const colour = roleColour(name, roleConfidence(name, i));
      return { colour, text: width / own.length >= LETTER_PX ? roles[name].letter : "" };
    });
  }
  const value = get(state.colour, i);
  if (!known(value)) return [];
  const text = width < VALUE_PX ? "" : Math.abs(value) >= 9.95 ? number(value, 0) : scale[1] > 1.02 || scale[0] < 0 ? number(value, 1) : value >= 0.995 ? "1.0" : value.toFixed(2).slice(1);
  return [{ colour: scoreColour(value, scale), text }];
}

function drawGrid() {
  const width = cells[heads[0]]?.getBoundingClientRect().width || 20;
  const scale = state.colour === "roles" ? null : extent(state.colour);
  for (const i of heads) {
    const parts = paint(i, width, scale);
    cells[i].replaceChildren(...parts.map(({ colour, text }) => {
      const part = el("b", {}, text);
      part.style.background = css(colour);
      part.style.color = ink(colour);
      return part;
    }));
    cells[i].ariaLabel = describe(i);
  }
  drawLegend(scale);
  $("grid-readout").textContent = describe(state.head);
}

function drawLegend(scale) {
  const legend = $("legend");
  if (scale) {
    legend.className = "scale";
    legend.replaceChildren(...scaleBar(scale, unitOf(state.colour), false));
    return;
  }
  legend.className = "chips";
  const counts = (name) => heads.filter((i) => (name === "none" ? !report.labels[i].length : report.labels[i].includes(name))).length;
  const chip = (name, letter, title, colour) => {
    const swatch = el("b", {}, letter);
    if (colour) { swatch.style.background = css(colour); swatch.style.color = ink(colour); }
    const filter = `role=${name}`;
    const button = el("button", { type: "button", title: `show only ${filter}` }, swatch, `${title} `, el("span", {}, String(counts(name))));
    button.dataset.filter = filter;
    button.setAttribute("aria-pressed", $("filter").value === filter);
    button.addEventListener("click", () => setFilter($("filter").value === filter ? "" : filter));
    return button;
  };
  legend.replaceChildren(
    ...Object.values(roles).map((role) => chip(role.name, role.letter, role.title, roleColour(role.name))),
    chip("none", "", "no role", null),
  );
}

function scaleBar([low, high], unit, squareRoot) {
  const reach = Math.max(-low, high);
  const stops = Array.from({ length: 17 }, (_, k) => css(scoreColour(low + ((high - low) * k) / 16, [-reach, reach])));
  const bar = el("i");
  bar.style.backgroundImage = `linear-gradient(to right, ${stops.join(", ")})`;
  const end = (x) => (squareRoot ? number(x * x) : number(x, reach > 9.95 ? 0 : reach > 1.02 ? 1 : 2));
  const middle = squareRoot ? [el("span", {}, number(high * high / 4))] : low < 0 && high > 0 ? [] : [];
  return [el("span", {}, end(low)), bar, el("span", {}, end(high)), el("span", { className: "unit" }, unit), ...(squareRoot ? [el("span", { className: "unit" }, `middle ${middle[0].textContent}`)] : [])];
}

// ------------------------------------------------------------------ the card

const scoreRows = new Map();

function track() {
  const part = (className) => el("i", { className });
  const parts = { all: el("canvas", { height: 16, width: 200 }), ci: part("ci"), dot: part("dot"), nul: part("null"), thr: part("thr") };
  return { box: el("div", { className: "track", ariaHidden: "true" }, ...Object.values(parts)), ...parts };
}

function place(node, low, high, [from, to]) {
  node.hidden = !known(low) || !known(high);
  if (node.hidden) return;
  const x = (v) => clamp((v - from) / (to - from), 0, 1) * 100;
  node.style.left = `${x(low)}%`;
  if (high !== low) node.style.width = `${x(high) - x(low)}%`;
}

function drawAll(canvas, name, [low, high]) {
  // every head's score as a faint tick: where this head stands among the others
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = theme.text;
  context.globalAlpha = clamp(24 / heads.length, 0.05, 0.4);
  for (const i of heads) {
    const value = get(name, i);
    if (known(value)) context.fillRect(Math.round(clamp((value - low) / (high - low), 0, 1) * (canvas.width - 1)), 0, 1, canvas.height);
  }
}

function buildScores() {
  for (const d of detectors) {
    if (!columns[d.name]) continue;
    const mark = el("b", {}, d.letter);
    const bar = track();
    const cell = () => el("td", { className: "n" });
    const parts = { ...bar, mark, score: cell(), interval: cell(), nul_: cell(), p: cell(), scale: extent(d.name) };
    const title = el("th", { scope: "row", title: d.description ?? "" }, mark, d.title);
    parts.row = el("tr", {}, title, el("td", { title: `${d.unit ?? "score"}, ${number(parts.scale[0])} to ${number(parts.scale[1])}` }, bar.box), parts.score, parts.interval, parts.nul_, parts.p);
    if (d.unit === "logits") title.append(el("small", {}, " logits"));
    scoreRows.set(d.name, parts);
    $("scores-rows").append(parts.row);
  }
}

function drawScores(i) {
  for (const d of detectors) {
    const row = scoreRows.get(d.name);
    if (!row) continue;
    const [value, low, high, nul] = ["", "_low", "_high", "_null"].map((end) => get(d.name + end, i));
    const labelled = report.labels[i].includes(d.name);
    const colour = roles[d.name] ? roleColour(d.name) : null;
    row.row.className = labelled ? "has" : "";
    row.mark.style.background = labelled && colour ? css(colour) : "";
    row.mark.style.color = labelled && colour ? ink(colour) : "";
    row.box.style.setProperty("--mark", labelled && colour ? css(colour) : "");
    place(row.ci, low, high, row.scale);
    place(row.dot, value, value, row.scale);
    place(row.nul, nul, nul, row.scale);
    place(row.thr, d.threshold, d.threshold, row.scale);
    row.score.textContent = number(value);
    row.interval.textContent = known(low) && known(high) ? `${number(low)} – ${number(high)}` : "–";
    row.nul_.textContent = number(nul);
    row.p.textContent = pValue(get(`${d.name}_p`, i));
  }
}

function drawRoles(i) {
  const own = report.labels[i].filter((name) => roles[name]);
  const chips = own.map((name) => {
    const mark = el("b", {}, roles[name].letter);
    mark.style.background = css(roleColour(name));
    mark.style.color = ink(roleColour(name));
    const sure = get(`${name}_confidence`, i);
    return el("span", { className: "chip" }, mark, el("strong", {}, titleOf(name)), ` ${number(get(name, i))}`,
      el("small", {}, known(sure) ? `confidence ${number(sure)}` : ""));
  });
  $("card-roles").replaceChildren(...(chips.length ? chips : ["No role passes its test on these prompts."]));
}

const ablationBar = track();

function drawAblation(i) {
  const effect = get("ablation_effect", i), box = $("ablation");
  if (!known(effect)) {
    box.replaceChildren(el("p", {}, "Not tested."));
    return;
  }
  const [low, high, control] = ["ablation_low", "ablation_high", "ablation_control"].map((name) => get(name, i));
  const scale = extent("ablation_effect"), signed = (x) => (x > 0 ? "+" : "") + number(x);
  place(ablationBar.ci, low, high, scale);
  place(ablationBar.dot, effect, effect, scale);
  place(ablationBar.nul, control, control, scale);
  place(ablationBar.thr, null, null, scale);
  ablationBar.box.title = `${number(scale[0])} to ${number(scale[1])} nats`;
  const facts = [el("strong", {}, `${signed(effect)} nats`)];
  if (known(low) && known(high)) facts.push(` [${signed(low)}, ${signed(high)}]`);
  const metric = get("ablation_metric", i);
  if (known(metric)) facts.push(` ${metric}`);
  const compared = known(control) ? `Unlabelled heads of the same layers: ${signed(control)} nats on average.` : "No control was measured.";
  if (!ablationBar.box.parentNode || ablationBar.box.parentNode !== box) box.replaceChildren();
  box.replaceChildren(el("p", {}, ...facts), ablationBar.box, el("p", { className: "muted" }, compared));
}

function drawOv(i) {
  const entries = report.ov.heads[i] ?? [];
  const words = (list) => el("td", {}, ...list.flatMap(([code, score]) => [el("span", { className: "token", title: known(score) ? `score ${number(score)}` : "" }, readable(report.ov.words[code])), " "]));
  $("ov-rows").replaceChildren(...(entries.length
    ? entries.map(([direction, reads, writes]) => el("tr", {}, el("th", { scope: "row" }, String(direction + 1)), words(reads), el("td", { className: "arrow", ariaHidden: "true" }, "→"), words(writes)))
    : [el("tr", {}, el("td", { colSpan: 4 }, "No words in this report."))]));
}

// ------------------------------------------------------------------ attention patterns

const tri = (n) => (n * (n + 1)) / 2;

function patternAt(prompt, i) {
  // (query, key) -> byte of 255·√A, and the number of tokens
  const n = report.prompts[prompt].tokens.length;
  const slot = columns.layer[i] * report.slots[1] + columns.head[i];
  const size = report.causal ? tri(n) : n * n;
  const start = report.prompts[prompt].start + slot * size;
  const inside = columns.layer[i] < report.slots[0] && columns.head[i] < report.slots[1];
  const byte = report.causal
    ? (q, k) => (k > q || !inside ? 0 : patterns[start + tri(q) + k])
    : (q, k) => (inside ? patterns[start + q * n + k] : 0);
  return { n, byte, weight: (q, k) => (byte(q, k) / 255) ** 2 };
}

const shownKey = (k) => !(state.hideFirst && k === 0);
const reachable = (q, k) => !report.causal || k <= q;

function patternPeak({ n, byte }) {
  if (!state.hideFirst) return 255;
  let peak = 1;
  for (let q = 0; q < n; q++) for (let k = 1; k < n; k++) peak = Math.max(peak, byte(q, k));
  return peak;
}

function drawPattern() {
  if (!report.prompts.length) return;
  const pattern = patternAt(state.prompt, state.head), { n, byte } = pattern;
  const peak = patternPeak(pattern);
  const canvas = $("pattern-canvas");
  canvas.width = canvas.height = n;
  const context = canvas.getContext("2d");
  const image = context.createImageData(n, n);
  for (let q = 0; q < n; q++) {
    for (let k = 0; k < n; k++) {
      if (!reachable(q, k) || !shownKey(k)) continue;
      const [r, g, b] = theme.ramp[Math.round(Math.min(1, byte(q, k) / peak) * 255)];
      image.data.set([r, g, b, 255], 4 * (q * n + k));
    }
  }
  context.putImageData(image, 0, 0);
  $("pattern-scale").replaceChildren(...scaleBar([0, peak / 255], "weight, √ scale", true));
  drawText(pattern, peak);
  if ($("links").open) drawLinks();
}

function fitPattern() {
  // whole pixels per token, so that every row is equally tall
  if (!report.prompts.length) return;
  const n = report.prompts[state.prompt].tokens.length;
  const room = $("attention").clientWidth;
  const cap = Math.min(room, Math.max(220, innerHeight * 0.46));
  const side = n <= cap ? Math.floor(cap / n) * n : cap;
  $("pattern").style.width = $("pattern").style.height = `${side}px`;
}

let tokenNodes = [];

function choosePrompt(p) {
  state.prompt = p;
  const { tokens } = report.prompts[p];
  state.query = tokens.length - 1;
  state.key = strongestKey();
  tokenNodes = tokens.map((token, k) => {
    const node = el("span", {}, readable(token));
    node.dataset.token = k;
    return node;
  });
  const { prefix } = report.prompts[p];
  $("text").replaceChildren(...(typeof prefix === "string" && prefix ? [el("em", {}, `${readable(prefix)} … `)] : []), ...tokenNodes);
  fitPattern();
}

function strongestKey() {
  const { n, byte } = patternAt(state.prompt, state.head);
  let best = -1;
  for (let k = 0; k < n; k++) if (shownKey(k) && reachable(state.query, k) && (best < 0 || byte(state.query, k) > byte(state.query, best))) best = k;
  return Math.max(best, 0);
}

function drawText({ n, byte }, peak) {
  for (let k = 0; k < n; k++) {
    const node = tokenNodes[k], q = state.query;
    const blank = !reachable(q, k) || !shownKey(k);
    const colour = blank ? null : theme.ramp[Math.round(Math.min(1, byte(q, k) / peak) * 255)];
    node.style.background = colour ? css(colour) : "";
    node.style.color = colour ? ink(colour) : "";
    node.className = k === q ? "query" : k === state.key ? "key" : "";
  }
  const { tokens } = report.prompts[state.prompt];
  const weight = (byte(state.query, state.key) / 255) ** 2;
  const at_ = (k) => `${k} ${readable(tokens[k])}`;
  $("pattern-readout").replaceChildren("query ", el("b", {}, at_(state.query)), " → key ", el("b", {}, at_(state.key)), ` ${percent(weight)}`);
  for (const [id, start, property] of [["cross-query", state.query, "top"], ["cross-key", state.key, "left"]]) {
    const size = property === "top" ? "height" : "width";
    $(id).style[property] = `${(100 * start) / n}%`;
    $(id).style[size] = `${100 / n}%`;
  }
}

function point(query, key) {
  const pattern = patternAt(state.prompt, state.head);
  state.query = clamp(query, 0, pattern.n - 1);
  const first = state.hideFirst && pattern.n > 1 ? 1 : 0;
  state.key = key === null ? strongestKey() : clamp(key, first, pattern.n - 1);
  if (!reachable(state.query, state.key)) state.key = state.query;
  drawText(pattern, patternPeak(pattern));
}

function drawLinks() {
  const { n, weight } = patternAt(state.prompt, state.head);
  const { tokens } = report.prompts[state.prompt];
  const links = [];
  for (let q = 0; q < n; q++) for (let k = 0; k < n; k++) if (shownKey(k) && reachable(q, k)) links.push([weight(q, k), q, k]);
  links.sort((a, b) => b[0] - a[0]);
  $("links-rows").replaceChildren(...links.slice(0, 12).map(([w, q, k]) => el("tr", {}, el("td", {}, `${q} ${readable(tokens[q])}`), el("td", {}, `${k} ${readable(tokens[k])}`), el("td", {}, percent(w)))));
}

function listenToPattern() {
  const box = $("pattern");
  const under = (event) => {
    const bounds = box.getBoundingClientRect(), n = tokenNodes.length;
    return [Math.floor(((event.clientY - bounds.top) / bounds.height) * n), Math.floor(((event.clientX - bounds.left) / bounds.width) * n)];
  };
  box.addEventListener("pointermove", (event) => point(...under(event)));
  box.addEventListener("pointerdown", (event) => point(...under(event)));
  box.addEventListener("keydown", (event) => {
    const step = event.shiftKey ? 5 : 1;
    const moves = { ArrowUp: [-step, 0], ArrowDown: [step, 0], ArrowLeft: [0, -step], ArrowRight: [0, step], Home: [0, -Infinity], End: [0, Infinity] };
    if (!(event.key in moves) || event.altKey || event.metaKey) return;
    event.preventDefault();
    point(state.query + moves[event.key][0], clamp(state.key + moves[event.key][1], 0, report.causal ? state.query + moves[event.key][0] : Infinity));
  });
  const pick = (event) => {
    const token = event.target.dataset?.token;
    if (token !== undefined) point(Number(token), null);
  };
  $("text").addEventListener("pointerover", pick);
  $("text").addEventListener("click", pick);
  $("prompt").addEventListener("change", () => { choosePrompt(Number($("prompt").value)); drawPattern(); });
  $("hide-first").addEventListener("change", () => { state.hideFirst = $("hide-first").checked; point(state.query, null); drawPattern(); });
  $("links").addEventListener("toggle", () => { if ($("links").open) drawLinks(); });
}

// ------------------------------------------------------------------ choosing a head

function select(i, { write = true } = {}) {
  if (state.head >= 0) {
    cells[state.head].ariaSelected = "false";
    cells[state.head].tabIndex = -1;
  }
  state.head = i;
  cells[i].ariaSelected = "true";
  cells[i].tabIndex = 0;
  drawCard();
  $("grid-readout").textContent = $("live").textContent = describe(i);
  for (const row of $("table-rows").children) row.classList.toggle("chosen", Number(row.dataset.head) === i);
  if (!write) return;
  // a sandboxed frame has no history to write to
  try { history.replaceState(null, "", `#${nameOf(i)}`); } catch { /* the head is chosen all the same */ }
}

function drawCard() {
  const i = state.head, group = get("kv_group", i);
  $("card-title").textContent = nameOf(i);
  $("card-where").textContent = `layer ${columns.layer[i]}, head ${columns.head[i]}${known(group) ? `, key/value group ${group}` : ""}`;
  drawRoles(i);
  drawScores(i);
  drawAblation(i);
  drawOv(i);
  if (report.prompts.length) state.key = strongestKey();
  drawPattern();
}

function headInHash(hash) {
  const match = /^#L(\d+)H(\d+)$/i.exec(hash);
  if (!match) return -1;
  const [layer, head] = [Number(match[1]), Number(match[2])];
  return head < report.shape[1] && layer < report.shape[0] ? at[layer * report.shape[1] + head] : -1;
}

// ------------------------------------------------------------------ table

function tableColumns() {
  const scores = detectors.filter((d) => columns[d.name]).map((d) => ({ name: d.name, title: d.title }));
  const rest = [["confidence", "Confidence"], ["ablation_effect", "Ablation, nats"]].filter(([name]) => columns[name]).map(([name, title]) => ({ name, title }));
  return [{ name: "layer", title: "Head" }, { name: "role", title: "Roles" }, ...rest, ...scores];
}

const rolesText = (i) => report.labels[i].map((name) => lowerFirst(titleOf(name))).join(", ");

function sortedHeads() {
  const [name, direction] = state.sort;
  const value = name === "role" ? (i) => rolesText(i) || null : (i) => get(name, i);
  return heads.filter(state.passes).sort((a, b) => {
    const x = value(a), y = value(b);
    if (!known(x) || !known(y)) return known(y) - known(x) || a - b; // unknown values last, either way
    return x === y ? a - b : (x < y ? -1 : 1) * direction;
  });
}

function buildTable() {
  for (const column of tableColumns()) {
    const button = el("button", { type: "button" }, column.title);
    const header = el("th", { scope: "col", className: column.name === "layer" || column.name === "role" ? "" : "n" }, button);
    header.dataset.column = column.name;
    button.addEventListener("click", () => {
      const up = column.name === "layer" || column.name === "role" ? 1 : -1;
      state.sort = state.sort[0] === column.name ? [column.name, -state.sort[1]] : [column.name, up];
      state.page = 0;
      drawTable();
    });
    $("table-head").append(header);
  }
  $("table-rows").addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (!row) return;
    select(Number(row.dataset.head));
    if (event.target.closest("button")) $("card").scrollIntoView({ block: "nearest" });
  });
}

function drawTable() {
  const all = sortedHeads(), pages = Math.max(1, Math.ceil(all.length / PAGE_ROWS));
  state.page = clamp(state.page, 0, pages - 1);
  const shown = all.slice(state.page * PAGE_ROWS, (state.page + 1) * PAGE_ROWS);
  const wanted = tableColumns();
  for (const header of $("table-head").children) {
    if (header.dataset.column === state.sort[0]) header.setAttribute("aria-sort", state.sort[1] < 0 ? "descending" : "ascending");
    else header.removeAttribute("aria-sort");
  }
  $("table-rows").replaceChildren(...shown.map((i) => {
    const row = el("tr", { className: i === state.head ? "chosen" : "" });
    row.dataset.head = i;
    for (const { name } of wanted) {
      if (name === "layer") row.append(el("th", { scope: "row" }, el("button", { type: "button" }, nameOf(i))));
      else if (name === "role") row.append(el("td", {}, rolesText(i)));
      else row.append(el("td", { className: report.labels[i].includes(name) ? "n has" : "n" }, number(get(name, i))));
    }
    return row;
  }));
  $("count").textContent = all.length === heads.length ? plural(all.length, "head") : `${all.length} of ${plural(heads.length, "head")}`;
  $("page-number").textContent = `page ${state.page + 1} of ${pages}`;
  $("previous").disabled = state.page === 0;
  $("next").disabled = state.page === pages - 1;
}

// ------------------------------------------------------------------ export

function save(blob, name) {
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

const fileStem = () => String(report.meta.model?.id ?? "model").replace(/[^\w.-]+/g, "-").replace(/^-+|-+$/g, "").slice(-80) || "model";

function exportRows() {
  return sortedHeads().map((i) => ({ ...Object.fromEntries(Object.keys(columns).map((name) => [name, get(name, i)])), labels: report.labels[i].join(",") }));
}

function saveCsv() {
  const names = [...Object.keys(columns), "labels"];
  const field = (x) => (!known(x) ? "" : /[",\r\n]/.test(String(x)) ? `"${String(x).replace(/"/g, '""')}"` : String(x));
  const lines = [names, ...exportRows().map((row) => names.map((name) => row[name]))].map((row) => row.map(field).join(","));
  save(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }), `${fileStem()}-heads.csv`);
}

function saveJson() {
  const text = JSON.stringify({ ...report.meta, filter: $("filter").value, heads: exportRows() }, null, 1);
  save(new Blob([text], { type: "application/json" }), `${fileStem()}-heads.json`);
}

function pngCanvas(width, height) {
  const canvas = el("canvas", { width: 2 * width, height: 2 * height });
  const context = canvas.getContext("2d");
  context.scale(2, 2);
  context.fillStyle = css(theme.panel);
  context.fillRect(0, 0, width, height);
  context.textBaseline = "middle";
  const write = (text, x, y, { size = 11, colour = theme.text, align = "left", bold = false } = {}) => {
    context.font = `${bold ? 600 : 400} ${size}px ${getComputedStyle(document.body).fontFamily}`;
    context.fillStyle = colour;
    context.textAlign = align;
    context.fillText(text, x, y);
  };
  return { canvas, context, write };
}

function mapPng() {
  const [nLayers, nHeads] = report.shape;
  const w = clamp(Math.floor(900 / nHeads), 14, 40), h = 18, left = 40, top = 56;
  const scale = state.colour === "roles" ? null : extent(state.colour);
  const width = Math.max(left + nHeads * w + 16, 420);
  const entries = scale ? [] : Object.values(roles);
  const perLine = Math.max(1, Math.floor((width - left) / 130));
  const { canvas, context, write } = pngCanvas(width, top + nLayers * h + 24 + Math.max(1, Math.ceil(entries.length / perLine)) * 18);
  write(String(report.meta.model?.id ?? ""), left, 16, { size: 13, bold: true });
  write(scale ? `${titleOf(state.colour)} (${unitOf(state.colour)}), ${number(scale[0])} to ${number(scale[1])}` : "Roles of attention heads; rows are layers, columns are heads", left, 33, { colour: theme.muted });
  for (let x = 0; x < nHeads; x += Math.ceil(nHeads / 16)) write(String(x), left + (x + 0.5) * w, top - 8, { size: 10, colour: theme.muted, align: "center" });
  for (let l = 0; l < nLayers; l++) {
    write(String(l), left - 8, top + (l + 0.5) * h, { size: 10, colour: theme.muted, align: "right" });
    for (let x = 0; x < nHeads; x++) {
      const i = at[l * nHeads + x];
      context.fillStyle = css(mix(theme.panel, rgb("#888888"), i < 0 ? 0.3 : 0.1));
      context.fillRect(left + x * w, top + l * h, w - 1, h - 1);
      if (i < 0) continue;
      context.globalAlpha = state.passes(i) ? 1 : 0.15;
      paint(i, w, scale).forEach(({ colour, text }, k, { length }) => {
        const part = (w - 1) / length;
        context.fillStyle = css(colour);
        context.fillRect(left + x * w + k * part, top + l * h, part, h - 1);
        write(text, left + x * w + (k + 0.5) * part, top + (l + 0.5) * h, { size: 10, colour: ink(colour), align: "center" });
      });
      context.globalAlpha = 1;
    }
  }
  entries.forEach((role, k) => {
    const x = left + (k % perLine) * 130, y = top + nLayers * h + 20 + Math.floor(k / perLine) * 18;
    const colour = roleColour(role.name);
    context.fillStyle = css(colour);
    context.fillRect(x, y - 7, 14, 14);
    write(role.letter, x + 7, y, { size: 10, colour: ink(colour), align: "center" });
    write(role.title, x + 20, y);
  });
  return canvas;
}

function patternPng() {
  const source = $("pattern-canvas"), { title } = report.prompts[state.prompt];
  const side = Math.max(1, Math.floor(640 / source.width)) * source.width, left = 34, top = 64;
  const { canvas, context, write } = pngCanvas(side + 60, side + top + 30);
  write(`${report.meta.model?.id ?? ""} ${nameOf(state.head)}: ${rolesText(state.head) || "no role"}`, left, 18, { size: 13, bold: true });
  write(`${title ?? ""}; weight on a √ scale, peak ${$("pattern-scale").children[2].textContent}${state.hideFirst ? ", first token hidden" : ""}`, left, 38, { colour: theme.muted });
  context.imageSmoothingEnabled = false;
  context.drawImage(source, left, top, side, side);
  context.strokeStyle = theme.muted;
  context.lineWidth = 0.5;
  context.strokeRect(left, top, side, side);
  write("key →", left + side / 2, top + side + 14, { colour: theme.muted, align: "center" });
  context.rotate(-Math.PI / 2);
  write("← query", -(top + side / 2), left - 14, { colour: theme.muted, align: "center" });
  return canvas;
}

const savePng = (canvas, name) => canvas.toBlob((blob) => save(blob, `${fileStem()}-${name}.png`), "image/png");

// ------------------------------------------------------------------ start

async function unpack() {
  const text = atob($("data").textContent.trim());
  const packed = new Uint8Array(text.length);
  for (let k = 0; k < text.length; k++) packed[k] = text.charCodeAt(k);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  report = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  patterns = new Uint8Array(buffer, 4 + length);
  $("data").remove();
}

function index() {
  columns = report.columns;
  detectors = report.detectors;
  heads = columns.layer.map((_, i) => i);
  if (!report.labels.length) report.labels = heads.map(() => []);
  const spare = Object.values(PALETTE).filter((colour) => !detectors.some((d) => PALETTE[d.name] === colour));
  roles = {};
  for (const d of detectors) {
    if (d.labels === false) continue;
    roles[d.name] = { ...d, colour: PALETTE[d.name] ?? spare.shift() ?? "#999999" };
  }
  for (const own of report.labels) for (const name of own) roles[name] ??= { name, title: name, letter: name[0].toUpperCase(), colour: spare.shift() ?? "#999999" };
  const [nLayers, nHeads] = report.shape;
  at = new Int32Array(nLayers * nHeads).fill(-1);
  for (const i of heads) at[columns.layer[i] * nHeads + columns.head[i]] = i;
  const slots = report.slots.length ? report.slots[0] * report.slots[1] : 0;
  let start = 0;
  for (const prompt of report.prompts) {
    prompt.start = start;
    start += slots * (report.causal ? tri(prompt.tokens.length) : prompt.tokens.length ** 2);
  }
}

function firstHead() {
  // the head whose ablation costs most; failing that the surest
  for (const name of ["ablation_effect", "confidence"]) {
    const some = heads.filter((i) => known(get(name, i)));
    if (some.length) return some.reduce((a, b) => (get(name, b) > get(name, a) ? b : a));
  }
  return 0;
}

function repaint() {
  readTheme();
  drawGrid();
  for (const [name, row] of scoreRows) drawAll(row.all, name, row.scale);
  drawAll(ablationBar.all, "ablation_effect", extent("ablation_effect"));
  drawCard();
}

function listen() {
  $("colour").addEventListener("change", () => { state.colour = $("colour").value; drawGrid(); });
  let waiting;
  $("filter").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(applyFilter, 120); });
  $("filter").addEventListener("change", applyFilter);
  $("previous").addEventListener("click", () => { state.page--; drawTable(); });
  $("next").addEventListener("click", () => { state.page++; drawTable(); });
  $("save-csv").addEventListener("click", saveCsv);
  $("save-json").addEventListener("click", saveJson);
  $("save-map").addEventListener("click", () => savePng(mapPng(), "map"));
  $("save-pattern").addEventListener("click", () => savePng(patternPng(), nameOf(state.head)));
  $("theme").addEventListener("click", () => {
    document.documentElement.style.colorScheme = theme.dark ? "light" : "dark";
    repaint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  let resizing;
  addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(() => { fitPattern(); drawGrid(); }, 100); });
  addEventListener("hashchange", () => {
    const head = headInHash(location.hash);
    if (head >= 0) select(head, { write: false });
  });
  // in a srcdoc frame a link to "#L1H2" would leave the page, so heads are chosen here
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.('a[href^="#L"]');
    if (!link) return;
    event.preventDefault();
    const head = headInHash(link.getAttribute("href"));
    if (head >= 0) select(head);
  });
}

async function start() {
  await unpack();
  index();
  $("main").hidden = false;
  if (!heads.length) throw new Error("the report holds no heads");
  const options = [["roles", "role"], ...detectors.filter((d) => columns[d.name]).map((d) => [d.name, `${lowerFirst(d.title)} score`])];
  if (columns.ablation_effect?.some(known)) { options.push(["ablation_effect", "ablation effect"]); state.sort = ["ablation_effect", -1]; }
  if (columns.confidence) options.push(["confidence", "confidence"]);
  $("colour").append(...options.map(([value, title]) => el("option", { value }, title)));
  $("prompt").append(...report.prompts.map((prompt, p) => el("option", { value: p }, prompt.title || `prompt ${p + 1}`)));
  const first = headInHash(location.hash);
  state.head = first >= 0 ? first : firstHead();
  $("attention").hidden = !report.prompts.length;
  $("card").classList.toggle("plain", !report.prompts.length);
  $("save-pattern").hidden = !report.prompts.length;
  buildGrid();
  buildScores();
  buildTable();
  if (report.prompts.length) choosePrompt(0);
  listenToPattern();
  repaint();
  select(state.head, { write: false });
  drawTable();
  listen();
  document.documentElement.dataset.ready = Math.round(performance.now());
}

start().catch((error) => {
  $("failure").hidden = false;
  $("failure").textContent = `This page could not be drawn: ${error.message}. It needs a browser from 2024 or later; the same numbers are in heads.csv beside it.`;
  console.error(error);
});
