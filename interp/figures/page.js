// The page of `interp heads`: unpacks the report in #data and draws it. Text of the report enters
// the document as text nodes only, so no token can become markup. What is said of one head, and the
// small tools, are in head_claims.js; both are one script in the page.

const PAGE_ROWS = 20;
const LETTER_PX = 7; // narrower than this, a cell's segment shows its colour only
const VALUE_PX = 27;

let at, patterns;
const state = {
  head: -1, prompt: 0, query: 0, key: 0, hideFirst: false,
  colour: "roles", passes: () => true, sort: ["confidence", -1], page: 0,
};

const nameOf = (i) => `L${columns.layer[i]}H${columns.head[i]}`;

// --- filter

const COMPARE = {
  __proto__: null,
  "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b,
  "=": (a, b) => a === b, "!=": (a, b) => a !== b,
};
const ALIASES = { __proto__: null, roles: "role", label: "role", labels: "role", ablation: "ablation_effect" };

const pairs = (text) => Array.from(`_${text}_`, (c, k) => c + `_${text}_`.charAt(k + 1));

function unknown(what, got, names, listed = names) {
  // the nearest name shares most pairs of letters
  const own = pairs(got);
  const likeness = (name) => (2 * own.filter((pair) => pairs(name).includes(pair)).length) / (own.length + pairs(name).length);
  const near = names.reduce((a, b) => (likeness(b) > likeness(a) ? b : a));
  const hint = likeness(near) > 0.5 ? `; did you mean “${near}”?` : ".";
  return new Error(`No ${what} “${got}”${hint} Known: ${listed.join(", ")}.`);
}

function comparison(name, operator, value) {
  const column = ALIASES[name] ?? name;
  if (column === "role") {
    if (operator !== "=" && operator !== "!=") throw new Error("A role takes = or !=, as in role=induction.");
    const names = [...Object.keys(roles), "none"];
    value = value.toLowerCase();
    if (!names.includes(value)) throw unknown("role", value, names);
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
  if (value === "" || Number.isNaN(wanted)) throw new Error(`${name} takes a number, as in ${name}>0.4, not “${value}”.`);
  return (i) => known(values[i]) && COMPARE[operator](values[i], wanted);
}

function parseFilter(text) {
  // or := and ("or" and)*;  and := one ("and"? one)*;  one := "not" one | "(" or ")" | L18H6 | column op value
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
    if (token === undefined) throw new Error("The filter ends too early.");
    if (token.toLowerCase() === "not") { const inner = one(); return (i) => !inner(i); }
    if (token === "(") {
      const inner = either();
      if (tokens[k++] !== ")") throw new Error("A bracket is not closed.");
      return inner;
    }
    if (/^l\d+h\d+$/i.test(token)) return (i) => nameOf(i).toLowerCase() === token.toLowerCase();
    const operator = tokens[k] === "==" ? "=" : tokens[k];
    if (!/^[a-z_]\w*$/i.test(token) || !(operator in COMPARE)) {
      throw new Error(`“${token}” is not a comparison. Try induction>0.4, role=broad, layer>=17 and head<3, or L18H6.`);
    }
    const value = tokens[k + 1];
    if (value === undefined) throw new Error(`After “${token}${operator}” a value is missing.`);
    k += 2;
    return comparison(token.toLowerCase(), operator, value.replace(/^"|"$/g, ""));
  }
  const result = tokens.length ? either() : () => true;
  if (k < tokens.length) throw new Error(`Unexpected “${tokens[k]}”.`);
  return result;
}

function applyFilter() {
  const text = $("filter").value, message = $("filter-message");
  message.className = "";
  $("filter").removeAttribute("aria-invalid");
  try {
    state.passes = parseFilter(text);
    message.textContent = text.trim() && `${heads.filter(state.passes).length} of ${heads.length} heads`;
  } catch (error) {
    message.textContent = error.message;
    message.className = "bad";
    $("filter").setAttribute("aria-invalid", "true");
    return;
  }
  for (const i of heads) cells[i].classList.toggle("out", !state.passes(i));
  drawPlot();
  for (const chip of $("legend").querySelectorAll("button")) chip.ariaPressed = chip.dataset.filter === text;
  state.page = 0;
  drawTable();
}

// --- map of heads

const cells = [];

function buildGrid() {
  const [nLayers, nHeads] = report.shape;
  const grid = $("grid");
  grid.setAttribute("aria-rowcount", nLayers + 1);
  grid.setAttribute("aria-colcount", nHeads + 1);
  document.documentElement.style.setProperty("--rows", nLayers);
  document.documentElement.style.setProperty("--cols", nHeads);
  const every = Math.ceil(nHeads / 16);
  const numbers = Array.from({ length: nHeads }, (_, h) => el("div", { role: "columnheader", ariaLabel: `head ${h}`, className: h % every ? "quiet" : "" }, String(h)));
  grid.append(el("div", { role: "row", className: "row axis" }, el("div", { role: "columnheader" }, "layer"), ...numbers));
  for (let l = 0; l < nLayers; l++) {
    const row = el("div", { role: "row", className: "row" }, el("div", { role: "rowheader", ariaLabel: `layer ${l}` }, String(l)));
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
  const under = (event) => event.target.closest(".cell")?.dataset.head;
  grid.addEventListener("click", (event) => {
    const head = under(event);
    if (head !== undefined) { select(Number(head)); cells[head].focus({ preventScroll: true }); }
  });
  grid.addEventListener("pointerover", (event) => {
    const head = under(event);
    if (head !== undefined) $("grid-readout").textContent = describe(Number(head));
  });
  grid.addEventListener("pointerleave", () => { $("grid-readout").textContent = describe(state.head); });
  grid.addEventListener("keydown", onGridKey);
}

// the head's row in the table; -1 where there is none, undefined outside the map
const headAt = (l, h) => (h < report.shape[1] && h >= 0 ? at[l * report.shape[1] + h] : undefined);

function onGridKey(event) {
  const [nLayers, nHeads] = report.shape;
  const layer = columns.layer[state.head], head = columns.head[state.head];
  const last = nHeads - 1, bottom = nLayers - 1;
  // where to start, and which way to the next head in the report
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
  let next = headAt(l, h);
  while (next === -1) next = headAt((l += dl), (h += dh));
  if (next >= 0) { select(next); cells[next].focus(); }
}

function describe(i) {
  const named = report.labels[i].map((name) => `${lowerFirst(roles[name].title)} ${number(get(name, i))}`);
  let text = `${nameOf(i)}: ${named.join(", ") || "no role"}`;
  if (state.colour !== "roles" && !report.labels[i].includes(state.colour)) text += `; ${lowerFirst(titleOf(state.colour))} ${known(get(state.colour, i)) ? number(get(state.colour, i)) : "not tested"}`;
  return text;
}

// one description of a cell serves the map on screen and in the PNG
function paint(i, width, scale) {
  if (state.colour === "roles") {
    const own = surestRoles(i);
    return own.map((name) => ({
      colour: roleColour(name, get(`${name}_confidence`, i) ?? get("confidence", i) ?? 1),
      text: width / own.length >= LETTER_PX ? roles[name].letter : "",
    }));
  }
  const value = get(state.colour, i);
  if (!known(value)) return [];
  if (state.colour === "cluster") return [{ colour: clusterColour(value), text: width >= LETTER_PX ? value : "" }];
  const text = scale[1] > 1 || scale[0] < 0 ? number(value, 1) : number(value).replace(/^0/, "");
  return [{ colour: scoreColour(value, scale), text: width < VALUE_PX || Math.abs(value) < 0.05 ? "" : text }];
}

const categorical = () => state.colour === "roles" || state.colour === "cluster";
const clusterColour = (letter) => mix(theme.panel, rgb(Object.values(PALETTE)[report.clusters.findIndex((c) => c.letter === letter)]), 0.85);

// what the legend lists where colours stand for kinds of heads
function kinds() {
  if (state.colour === "cluster") return report.clusters.map(({ letter, told }) => ({ column: "cluster", name: letter, letter, title: told, colour: clusterColour(letter) }));
  return Object.values(roles).map(({ name, letter, title }) => ({ column: "role", name, letter, title, colour: roleColour(name) }));
}

function drawGrid() {
  const width = cells[heads[0]]?.getBoundingClientRect().width || 20;
  const scale = categorical() ? null : extent(state.colour);
  for (const i of heads) {
    const parts = paint(i, width, scale);
    cells[i].replaceChildren(...parts.map(({ colour, text }) => {
      const part = painted(el("b"), colour);
      part.dataset.text = text;
      return part;
    }));
    cells[i].classList.toggle("none", !!scale && !parts.length);
    cells[i].ariaLabel = describe(i);
  }
  drawLegend(scale);
  $("grid-readout").textContent = describe(state.head);
}

function drawLegend(scale) {
  $("legend").className = scale ? "scale" : "chips";
  if (scale) return $("legend").replaceChildren(...scaleBar(scale, `${unitOf(state.colour)}; hatch: not tested`, number));
  const none = state.colour === "cluster" ? [] : [{ column: "role", name: "none", letter: "", title: "no role" }];
  const chips = [...kinds(), ...none].map(({ column, name, letter, title, colour }) => {
    const filter = `${column}=${name}`, count = heads.filter(comparison(column, "=", name)).length;
    const swatch = painted(el("b", {}, letter), colour);
    const chip = el("button", { type: "button", ariaPressed: $("filter").value === filter }, swatch, `${title} `, el("span", {}, String(count)));
    chip.dataset.filter = filter;
    chip.addEventListener("click", () => {
      $("filter").value = $("filter").value === filter ? "" : filter;
      applyFilter();
    });
    return chip;
  });
  return $("legend").replaceChildren(...chips);
}

function scaleBar([low, high], unit, show) {
  const stops = Array.from({ length: 17 }, (_, k) => css(scoreColour(low + ((high - low) * k) / 16, [low, high])));
  const bar = el("i");
  bar.style.backgroundImage = `linear-gradient(to right, ${stops})`;
  return [el("span", {}, show(low)), bar, el("span", {}, show(high)), el("span", {}, unit)];
}

// --- the card

function drawOv(i) {
  const entries = report.ov.heads[i] ?? [];
  const words = (list) => el("td", {}, ...list.flatMap(([code, score]) => [el("span", { className: "token", title: known(score) ? `score ${number(score)}` : "" }, readable(report.ov.words[code])), " "]));
  $("ov-rows").replaceChildren(...(entries.length
    ? entries.map(([direction, reads, writes]) => el("tr", {}, el("th", { scope: "row" }, String(direction + 1)), words(reads), el("td", { className: "arrow", ariaHidden: "true" }, "→"), words(writes)))
    : [el("tr", {}, el("td", { colSpan: 4 }, "No words in this report."))]));
}

// --- attention patterns

const tri = (n) => (n * (n + 1)) / 2;

function patternAt(prompt, i) {
  // byte(query, key) is 255·√A
  const n = report.prompts[prompt].tokens.length;
  const slot = columns.layer[i] * report.slots[1] + columns.head[i];
  const start = report.prompts[prompt].start + slot * (report.causal ? tri(n) : n * n);
  const inside = columns.layer[i] < report.slots[0] && columns.head[i] < report.slots[1];
  const byte = report.causal
    ? (q, k) => (k > q || !inside ? 0 : patterns[start + tri(q) + k])
    : (q, k) => (inside ? patterns[start + q * n + k] : 0);
  return { n, byte };
}

const tokenAt = (k) => `${k} ${readable(report.prompts[state.prompt].tokens[k])}`;
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
    for (let k = 0; k < n; k++) if (reachable(q, k) && shownKey(k)) image.data.set(shade(byte(q, k) / peak), 4 * (q * n + k));
  }
  context.putImageData(image, 0, 0);
  $("pattern-scale").replaceChildren(...scaleBar([0, peak / 255], `√ scale, middle ${number((peak / 510) ** 2)}`, (x) => number(x * x)));
  drawText(pattern, peak);
  if ($("links").open) drawLinks();
}

function fitPattern() {
  // whole pixels per token
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
  $("text").replaceChildren(el("em", {}, prefix ? `${readable(String(prefix))} … ` : ""), ...tokenNodes);
  fitPattern();
}

function strongestKey() {
  const { n, byte } = patternAt(state.prompt, state.head);
  let best = state.hideFirst && n > 1 && state.query ? 1 : 0;
  for (let k = best; k < n; k++) if (byte(state.query, k) > byte(state.query, best)) best = k;
  return best;
}

function drawText({ n, byte }, peak) {
  for (let k = 0; k < n; k++) {
    const node = tokenNodes[k], q = state.query;
    const blank = !reachable(q, k) || !shownKey(k);
    painted(node, blank ? null : shade(byte(q, k) / peak));
    node.className = k === q ? "query" : k === state.key ? "aim" : "";
  }
  $("pattern-readout").replaceChildren("query ", el("b", {}, tokenAt(state.query)), " → key ", el("b", {}, tokenAt(state.key)), ` ${percent((byte(state.query, state.key) / 255) ** 2)}`);
  Object.assign($("cross-query").style, { top: `${(100 * state.query) / n}%`, height: `${100 / n}%` });
  Object.assign($("cross-key").style, { left: `${(100 * state.key) / n}%`, width: `${100 / n}%` });
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
  const { n, byte } = patternAt(state.prompt, state.head);
  const links = [];
  for (let q = 0; q < n; q++) for (let k = 0; k < n; k++) if (shownKey(k) && reachable(q, k)) links.push([byte(q, k), q, k]);
  links.sort((a, b) => b[0] - a[0]);
  $("links-rows").replaceChildren(...links.slice(0, 12).map(([v, q, k]) => el("tr", {}, ...[tokenAt(q), tokenAt(k), percent((v / 255) ** 2)].map((text) => el("td", {}, text)))));
}

function listenToPattern() {
  const box = $("pattern");
  const under = (event) => {
    const bounds = box.getBoundingClientRect(), n = tokenNodes.length;
    return [Math.floor(((event.clientY - bounds.top) / bounds.height) * n), Math.floor(((event.clientX - bounds.left) / bounds.width) * n)];
  };
  for (const type of ["pointermove", "pointerdown"]) box.addEventListener(type, (event) => point(...under(event)));
  box.addEventListener("keydown", (event) => {
    const step = event.shiftKey ? 5 : 1;
    const moves = { ArrowUp: [-step, 0], ArrowDown: [step, 0], ArrowLeft: [0, -step], ArrowRight: [0, step], Home: [0, -Infinity], End: [0, Infinity] };
    if (!(event.key in moves) || event.altKey || event.metaKey) return;
    event.preventDefault();
    const [down, right] = moves[event.key], query = state.query + down;
    point(query, clamp(state.key + right, 0, report.causal ? query : Infinity));
  });
  const pick = (event) => {
    const token = event.target.dataset?.token;
    if (token !== undefined) point(Number(token), null);
  };
  on("text", "pointerover", pick);
  on("text", "click", pick);
  on("prompt", "change", () => { choosePrompt(Number($("prompt").value)); drawPattern(); });
  on("hide-first", "change", () => { state.hideFirst = $("hide-first").checked; point(state.query, null); drawPattern(); });
  on("links", "toggle", () => { if ($("links").open) drawLinks(); });
}

// --- two scores of every head

const PLOT = { width: 460, height: 320, left: 46, right: 12, top: 12, bottom: 38 };

function axes() {
  return [["across", PLOT.left, PLOT.width - PLOT.right], ["up", PLOT.height - PLOT.bottom, PLOT.top]].map(([id, from, to]) => {
    const name = $(id).value, [low, high] = extent(name), unit = unitOf(name);
    const at = (i) => (known(get(name, i)) ? from + ((get(name, i) - low) / (high - low)) * (to - from) : NaN);
    return { at, low: number(low), high: number(high), title: titleOf(name) + (unit && `, ${unit}`) };
  });
}

function drawPlot() {
  const { width, height, left, right, top, bottom } = PLOT, x1 = width - right, y0 = height - bottom;
  const canvas = $("plot"), context = canvas.getContext("2d"), [x, y] = axes();
  canvas.width = width * devicePixelRatio;
  canvas.height = height * devicePixelRatio;
  context.scale(devicePixelRatio, devicePixelRatio);
  context.font = "11px system-ui, sans-serif";
  context.strokeStyle = context.fillStyle = theme.muted;
  context.strokeRect(left, top, x1 - left, y0 - top);
  const write = (text, at, baseline, align) => { context.textAlign = align; context.fillText(text, at, baseline); };
  write(x.low, left, y0 + 14, "center");
  write(x.high, x1, y0 + 14, "end");
  write(x.title, (left + x1) / 2, y0 + 30, "center");
  write(y.low, left - 4, y0, "end");
  write(y.high, left - 4, top + 8, "end");
  write(y.title, left + 6, top + 14, "start");
  for (const i of heads.toSorted((a, b) => (a === state.head) - (b === state.head))) {
    const plotted = [$("up").value, $("across").value].filter((name) => report.labels[i].includes(name));
    const [role] = [...plotted, ...surestRoles(i)], chosen = i === state.head;
    context.globalAlpha = state.passes(i) ? 0.85 : 0.12;
    const colour = state.colour === "cluster" ? clusterColour(get("cluster", i)) : role && roleColour(role);
    context.fillStyle = css(colour || mix(theme.panel, [128, 128, 128], 0.6));
    context.beginPath();
    context.arc(x.at(i), y.at(i), chosen ? 6 : 3.5, 0, 7);
    context.fill();
    context.strokeStyle = theme.text;
    if (chosen) context.stroke();
  }
}

function nearest(event) {
  const [x, y] = axes(), box = $("plot").getBoundingClientRect(), scale = PLOT.width / box.width;
  const away = (i) => Math.hypot(x.at(i) - (event.clientX - box.x) * scale, y.at(i) - (event.clientY - box.y) * scale) || Infinity;
  return heads.filter(state.passes).reduce((a, b) => (away(b) < away(a) ? b : a), heads[0]);
}

// --- choosing a head

function select(i) {
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
  if (!document.documentElement.dataset.ready) return;
  try { history.replaceState(null, "", `#${nameOf(i)}`); } catch { /* a sandboxed frame has no history */ }
}

function drawCard() {
  drawPlot();
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
  return (match && headAt(Number(match[1]), Number(match[2]))) ?? -1;
}

// --- table

function tableColumns() {
  const own = [["confidence", "Confidence"], ["ablation_effect", "Ablation, nats"], ...(report.clusters.length ? [["cluster", "Cluster"]] : []), ...detectors.map((d) => [d.name, d.title])];
  return [["layer", "Head"], ["role", "Roles"], ...own.filter(([name]) => columns[name])];
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
  for (const [name, title] of tableColumns()) {
    const text = name === "layer" || name === "role", button = el("button", { type: "button" }, title);
    const header = el("th", { scope: "col", className: text ? "" : "n" }, button);
    header.dataset.column = name;
    button.addEventListener("click", () => {
      state.sort = [name, state.sort[0] === name ? -state.sort[1] : text ? 1 : -1];
      state.page = 0;
      drawTable();
    });
    $("table-head").append(header);
  }
  on("table-rows", "click", (event) => {
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
    for (const [name] of wanted) {
      if (name === "layer") row.append(el("th", { scope: "row" }, el("button", { type: "button" }, nameOf(i))));
      else if (name === "role") row.append(el("td", {}, rolesText(i)));
      else row.append(el("td", { className: report.labels[i].includes(name) ? "n has" : "n" }, number(get(name, i))));
    }
    return row;
  }));
  $("count").textContent = `${all.length} of ${heads.length}`;
  $("page-number").textContent = `page ${state.page + 1} of ${pages}`;
  $("previous").disabled = state.page === 0;
  $("next").disabled = state.page === pages - 1;
}

// --- export

function save(content, type, name) {
  const stem = String(report.meta.model?.id ?? "model").replace(/[^\w.-]+/g, "-").slice(-80);
  const link = el("a", { href: URL.createObjectURL(new Blob([content], { type })), download: `${stem}-${name}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function exportRows() {
  const row = (i) => Object.keys(columns).map((name) => [name, get(name, i)]);
  return sortedHeads().map((i) => Object.fromEntries([...row(i), ["labels", report.labels[i].join(",")]]));
}

function csv() {
  const field = (x) => (/[",\r\n]/.test(x ?? "") ? `"${x.replace(/"/g, '""')}"` : x ?? "");
  const lines = [[...Object.keys(columns), "labels"], ...exportRows().map((row) => Object.values(row))];
  return lines.map((line) => `${line.map(field).join(",")}\n`).join("");
}

const json = () => JSON.stringify({ ...report.meta, filter: $("filter").value, heads: exportRows() }, null, 1);

function png(width, height, title, subtitle, left) {
  const canvas = el("canvas", { width: 2 * width, height: 2 * height });
  const context = canvas.getContext("2d");
  context.scale(2, 2);
  context.fillStyle = css(theme.panel);
  context.fillRect(0, 0, width, height);
  context.textBaseline = "middle";
  const write = (text, x, y, colour = theme.muted, align = "center", font = "10px") => {
    Object.assign(context, { font: `${font} ${getComputedStyle(document.body).fontFamily}`, fillStyle: colour, textAlign: align });
    context.fillText(text, x, y);
  };
  write(`${report.meta.model?.id ?? ""} ${title}`, left, 16, theme.text, "left", "600 13px");
  write(subtitle, left, 33, theme.muted, "left", "11px");
  const box = (colour, ...rectangle) => { context.fillStyle = css(colour); context.fillRect(...rectangle); };
  return { canvas, context, write, box };
}

function mapPng() {
  const [nLayers, nHeads] = report.shape;
  const w = clamp(Math.floor(900 / nHeads), 14, 40), h = 18, left = 40, top = 62, bottom = top + nLayers * h + 16;
  const scale = categorical() ? null : extent(state.colour);
  const width = Math.max(left + nHeads * w + 16, 440), perLine = Math.floor((width - left) / 130);
  const entries = scale ? [] : kinds();
  const subtitle = scale ? `${titleOf(state.colour)} (${unitOf(state.colour)}), ${number(scale[0])} to ${number(scale[1])}` : "rows are layers, columns are heads";
  const { canvas, context, write, box } = png(width, bottom + Math.ceil(entries.length / perLine) * 18, "attention heads", subtitle, left);
  for (let x = 0; x < nHeads; x += Math.ceil(nHeads / 16)) write(String(x), left + (x + 0.5) * w, top - 8);
  for (let l = 0; l < nLayers; l++) {
    const y = top + l * h;
    write(String(l), left - 8, y + h / 2, theme.muted, "right");
    for (let x = 0; x < nHeads; x++) {
      const i = at[l * nHeads + x];
      box(mix(theme.panel, [136, 136, 136], i < 0 ? 0.3 : 0.1), left + x * w, y, w - 1, h - 1);
      if (i < 0) continue;
      context.globalAlpha = state.passes(i) ? 1 : 0.15;
      paint(i, w, scale).forEach(({ colour, text }, k, { length }) => {
        const part = (w - 1) / length;
        box(colour, left + x * w + k * part, y, part, h - 1);
        write(text, left + x * w + (k + 0.5) * part, y + h / 2, ink(colour));
      });
      context.globalAlpha = 1;
    }
  }
  entries.forEach(({ letter, title, colour }, k) => {
    const x = left + (k % perLine) * 130, y = bottom + Math.floor(k / perLine) * 18;
    box(colour, x, y - 7, 14, 14);
    write(letter, x + 7, y, ink(colour));
    if (state.colour === "roles") write(title, x + 20, y, theme.text, "left");
  });
  return canvas;
}

function patternPng() {
  const source = $("pattern-canvas"), left = 34, top = 54;
  const side = Math.max(1, Math.floor(640 / source.width)) * source.width;
  const subtitle = `${report.prompts[state.prompt].title ?? ""}; √ scale, 0 to ${$("pattern-scale").children[2].textContent}${state.hideFirst ? ", first token hidden" : ""}`;
  const { canvas, context, write } = png(Math.max(side, 420) + 60, side + top + 30, `${nameOf(state.head)}: ${rolesText(state.head) || "no role"}`, subtitle, left);
  context.imageSmoothingEnabled = false;
  context.drawImage(source, left, top, side, side);
  context.strokeStyle = theme.muted;
  context.strokeRect(left, top, side, side);
  write("key →", left + side / 2, top + side + 14);
  context.rotate(-Math.PI / 2);
  write("← query", -(top + side / 2), left - 14);
  return canvas;
}

// --- start

function index() {
  indexHeads();
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
  const name = ["ablation_effect", "confidence"].find((column) => columns[column]?.some(known));
  return heads.reduce((a, b) => ((get(name, b) ?? -Infinity) > (get(name, a) ?? -Infinity) ? b : a), 0);
}

function repaint() {
  readTheme();
  drawGrid();
  for (const [name, row] of scoreRows) drawAll(row.all, name, row.scale);
  drawAll(ablationBar.all, "ablation_effect", extent("ablation_effect"));
  drawCard();
}

function listen() {
  for (const axis of ["across", "up"]) on(axis, "change", drawPlot);
  on("plot", "click", (event) => select(nearest(event)));
  on("plot", "mousemove", (event) => { $("plot").title = describe(nearest(event)); });
  on("colour", "change", () => { state.colour = $("colour").value; drawGrid(); drawPlot(); });
  let waiting;
  on("filter", "input", () => { clearTimeout(waiting); waiting = setTimeout(applyFilter, 120); });
  on("filter", "change", applyFilter);
  on("previous", "click", () => { state.page--; drawTable(); });
  on("next", "click", () => { state.page++; drawTable(); });
  on("save-csv", "click", () => save(csv(), "text/csv", "heads.csv"));
  on("save-json", "click", () => save(json(), "application/json", "heads.json"));
  on("save-map", "click", () => mapPng().toBlob((blob) => save(blob, "image/png", "map.png")));
  on("save-pattern", "click", () => patternPng().toBlob((blob) => save(blob, "image/png", `${nameOf(state.head)}.png`)));
  themeButton(repaint);
  let resizing;
  addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(() => { fitPattern(); drawGrid(); }, 100); });
  const follow = (hash) => { if (headInHash(hash) >= 0) select(headInHash(hash)); };
  addEventListener("hashchange", () => follow(location.hash));
  // in a srcdoc frame a link to "#L1H2" would leave the page, so heads are chosen here
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#L"]');
    if (!link) return;
    event.preventDefault();
    follow(link.getAttribute("href"));
  });
}

async function start() {
  ({ document: report, bytes: patterns } = await unpacked());
  index();
  $("main").hidden = false;
  if (!heads.length) throw new Error("the report holds no heads");
  if (columns.ablation_effect?.some(known)) state.sort = ["ablation_effect", -1];
  const options = [["roles", "Role"], ...tableColumns().slice(2)];
  $("colour").append(...options.map(([value, title]) => el("option", { value }, title)));
  for (const [axis, k] of [["across", 0], ["up", 1]]) {
    $(axis).append(...detectors.filter((d) => columns[d.name]).map((d) => el("option", { value: d.name }, d.title)));
    $(axis).selectedIndex = Math.min(k * 2, $(axis).options.length - 1);
  }
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
  select(state.head);
  drawTable();
  listen();
  document.documentElement.dataset.ready = Math.round(performance.now());
}

start().catch((error) => {
  $("failure").hidden = false;
  $("failure").textContent = `This page could not be drawn: ${error.message}. It needs a browser from 2024 or later.`;
  console.error(error);
});
