// What a heads report says of one head: its roles, every score with interval and null, its ablation.
// The page of heads and the cards of a circuit's nodes draw it with this, into the same elements.

const on = (id, type, listener) => $(id).addEventListener(type, listener);

const PALETTE = { // begins with Okabe and Ito; the commonest role gets the grey
  previous_token: "#56b4e9", fixed_offset: "#0072b2", current_token: "#cc79a7",
  first_token_sink: "#999999", duplicate_token: "#f0e442", induction: "#d55e00",
  recency: "#009e73", broad: "#e69f00", delimiter: "#8c6bb1", rare_token: "#8a7a1c", later_sink: "#606060",
  retrieval: "#8b1020", episodic: "#e0208a", copying: "#22d3b6", suppression: "#2426a8", no_op: "#e3a8ff", switching: "#5cb81e",
  // of encoders and image models: never beside the role that has the same colour above
  next_token: "#d55e00", separator: "#009e73", cls: "#999999", cls_reads: "#8b1020",
  patch_offset: "#0072b2", patch_window: "#009e73", register: "#606060", patch_sink: "#d55e00",
};
const RAMPS = {
  light: ["#eef2f4", "#c5dfe4", "#7dbccb", "#3a8fb0", "#1f5c93", "#1c2a5c"],
  dark: ["#1d242d", "#1f3e5c", "#22668a", "#2f98a6", "#7ccfae", "#f0f8d8"],
  lightBelow: ["#eef2f4", "#f3cfae", "#dc9358", "#a85218", "#5e2a0a"],
  darkBelow: ["#1d242d", "#54331c", "#96561f", "#d98c3c", "#ffe0b0"],
};
let report, heads, columns, detectors, roles; // a heads report: scores by column, rows are heads

// --- small tools

const known = (x) => x !== null && x !== undefined && x !== "";
const get = (name, i) => columns[name]?.[i] ?? null;
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const lowerFirst = (text) => text.charAt(0).toLowerCase() + text.slice(1);

function number(x, digits = 2) {
  return typeof x === "string" ? x || "–" : known(x) ? x.toFixed(digits).replace("-", "−") : "–";
}

const pValue = (x) => (known(x) && x < 0.001 ? "<.001" : number(x, 3).replace(/^0/, ""));

const percent = (weight) => `${(weight * 100).toFixed(weight < 0.0995 ? 1 : 0)} %`;

function readable(token) {
  // what cannot be seen is written: spaces, controls, direction marks, half surrogates
  return token.replace(/ /g, "·").replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥")
    .replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Zs}\p{Cs}\p{Co}\p{Cn}\p{Variation_Selector}]/gu, (c) => `⟨${c.codePointAt(0).toString(16).toUpperCase()}⟩`) || "∅";
}

// --- start

// what the functions below look up, from `report`
function indexHeads() {
  columns = Object.assign(Object.create(null), report.columns);
  detectors = report.detectors;
  heads = columns.layer.map((_, i) => i);
  if (!report.labels.length) report.labels = heads.map(() => []);
  const spare = [...new Set(Object.values(PALETTE))].filter((colour) => !detectors.some((d) => PALETTE[d.name] === colour));
  roles = {};
  for (const d of detectors) {
    if (d.labels === false) continue;
    roles[d.name] = { ...d, colour: PALETTE[d.name] ?? spare.shift() ?? "#999999" };
  }
  for (const name of report.labels.flat()) roles[name] ??= { name, title: name, letter: report.letters[name], colour: "#999999" };
}

// --- colour

const rgb = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
const mix = (a, b, t) => a.map((x, k) => Math.round(x + (b[k] - x) * t));
const css = (c) => `rgb(${c.slice(0, 3)})`;

function ink(background) {
  const [r, g, b] = background.map((x) => (x / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

function makeRamp(stops) {
  const colours = stops.map(rgb);
  return Array.from({ length: 256 }, (_, v) => {
    const x = (v / 255) * (colours.length - 1);
    const k = Math.min(Math.floor(x), colours.length - 2);
    return [...mix(colours[k], colours[k + 1], x - k), 255];
  });
}

const theme = {};

function readTheme() {
  theme.dark = isDark();
  theme.ramp = makeRamp(theme.dark ? RAMPS.dark : RAMPS.light);
  theme.below = makeRamp(theme.dark ? RAMPS.darkBelow : RAMPS.lightBelow);
  const style = getComputedStyle(document.body);
  theme.panel = style.backgroundColor.match(/\d+/g).slice(0, 3).map(Number);
  theme.text = style.color;
  theme.muted = getComputedStyle(document.querySelector(".readout")).color;
}

const shade = (x) => theme.ramp[Math.round(clamp(x, 0, 1) * 255)];

function painted(node, colour) {
  node.style.background = colour ? css(colour) : "";
  node.style.color = colour ? ink(colour) : "";
  return node;
}

function roleColour(name, confidence = 1) {
  return mix(theme.panel, rgb(roles[name].colour), 0.3 + 0.7 * confidence);
}

function extent(name) {
  // the scale of a column: 0 to 1 where all its heads live there, else their range and zero
  const ends = name === "ablation_effect" ? ["ablation_low", "ablation_high", "ablation_control"] : [`${name}_low`, `${name}_high`, `${name}_null`];
  let low = 0, high = 0;
  for (const column of [name, ...ends]) {
    for (const v of columns[column] ?? []) if (known(v)) { low = Math.min(low, v); high = Math.max(high, v); }
  }
  const share = name !== "ablation_effect" && low > -0.05 && high < 1.05;
  return share || low === high ? [0, 1] : [low, high];
}

function scoreColour(value, [low, high]) {
  const reach = Math.max(-low, high);
  return (value < 0 ? theme.below : theme.ramp)[Math.round(clamp(Math.abs(value) / reach, 0, 1) * 255)];
}

// --- the card

const OTHERS = { ablation_effect: { title: "Ablation effect", unit: "nats" }, confidence: { title: "Confidence", unit: "share of resamples" }, cluster: { title: "Cluster" } };
const about = (name) => detectors.find((d) => d.name === name) ?? roles[name] ?? OTHERS[name] ?? {};
const titleOf = (name) => about(name).title ?? name;
const unitOf = (name) => about(name).unit ?? "";

const scoreRows = new Map();

function track(width) {
  const part = (className) => el("i", { className });
  const parts = { all: el("canvas", { height: 16, width }), ci: part("ci"), dot: part("dot"), nul: part("null"), thr: part("thr") };
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
  // every head's score as a faint tick
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = theme.text;
  context.globalAlpha = clamp(24 / heads.length, 0.012, 0.3);
  for (const i of heads) {
    const value = get(name, i);
    if (known(value)) context.fillRect(Math.round(clamp((value - low) / (high - low), 0, 1) * (canvas.width - 1)), 0, 1, canvas.height);
  }
}

function buildScores() {
  for (const d of detectors) {
    if (!columns[d.name]) continue;
    const mark = el("b", {}, d.letter);
    const bar = track(200);
    const cell = () => el("td", { className: "n" });
    const scale = extent(d.name), numbers = [cell(), cell(), cell(), cell()];
    const title = el("th", { scope: "row", title: d.description ?? "" }, mark, d.title, el("small", {}, d.unit === "logits" ? " logits" : ""));
    const row = el("tr", {}, title, el("td", { title: `${d.unit ?? "score"}, ${number(scale[0])} to ${number(scale[1])}` }, bar.box), ...numbers);
    scoreRows.set(d.name, { ...bar, mark, row, scale, numbers });
    $("scores-rows").append(row);
  }
}

function drawScores(i) {
  for (const d of detectors) {
    const row = scoreRows.get(d.name);
    if (!row) continue;
    const [value, low, high, nul] = ["", "_low", "_high", "_null"].map((end) => get(d.name + end, i));
    const labelled = report.labels[i].includes(d.name);
    const colour = labelled ? roleColour(d.name) : null;
    row.row.className = labelled ? "has" : "";
    painted(row.mark, colour);
    row.box.style.setProperty("--mark", colour ? css(colour) : "");
    place(row.ci, low, high, row.scale);
    place(row.dot, value, value, row.scale);
    place(row.nul, nul, nul, row.scale);
    place(row.thr, d.threshold, d.threshold, row.scale);
    const interval = known(low) && known(high) ? `${number(low)}\u2009–\u2009${number(high)}` : "–";
    [number(value), interval, number(nul), pValue(get(`${d.name}_p`, i))].forEach((text, k) => { row.numbers[k].textContent = text; });
  }
  const claim = (d) => (report.labels[i].includes(d.name) ? 1 + (get(`${d.name}_confidence`, i) ?? 0) : 0); // surest first
  $("scores-rows").append(...detectors.filter((d) => scoreRows.has(d.name)).sort((a, b) => claim(b) - claim(a)).map((d) => scoreRows.get(d.name).row));
}

const sureOf = (name, i) => get(`${name}_confidence`, i) ?? 0;
const surestRoles = (i) => report.labels[i].toSorted((a, b) => sureOf(b, i) - sureOf(a, i)); // scores have units of their own

function drawRoles(i) {
  const chips = surestRoles(i).map((name) => {
    const mark = painted(el("b", {}, roles[name].letter), roleColour(name)), sure = sureOf(name, i);
    return el("span", { className: "chip" }, mark, el("strong", {}, titleOf(name)), ` ${number(get(name, i))}`,
      el("small", {}, sure ? `confidence ${number(sure)}` : ""));
  });
  $("card-roles").replaceChildren(...(chips.length ? chips : ["No role passes its test on these prompts."]));
}

const ablationBar = track(500);

function drawAblation(i) {
  const effect = get("ablation_effect", i), bar = ablationBar;
  if (!known(effect)) return $("ablation").replaceChildren(el("p", {}, "Not tested."));
  const [low, high, control] = ["ablation_low", "ablation_high", "ablation_control"].map((name) => get(name, i));
  const scale = extent("ablation_effect"), signed = (x) => (x > 0 ? "+" : "") + number(x);
  place(bar.ci, low, high, scale);
  place(bar.dot, effect, effect, scale);
  place(bar.nul, control, control, scale);
  place(bar.thr, 0, 0, scale);
  const interval = known(low) && known(high) ? ` [${signed(low)}, ${signed(high)}] ` : " ";
  const compared = known(control) ? `Control heads of the same layers: ${signed(control)} nats on average (○).` : "No control was measured.";
  return $("ablation").replaceChildren(
    el("p", {}, el("strong", {}, `${signed(effect)} nats`), interval, get("ablation_metric", i) ?? ""), bar.box,
    el("p", { className: "ends" }, el("span", {}, signed(scale[0])), el("span", {}, compared), el("span", {}, signed(scale[1]))));
}
