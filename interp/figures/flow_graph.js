// The important-flow graph: tokens across, layers up, edges by how much of the chosen token passes them.

function flowGraph() {
  const { edges, heads, neurons, words } = data.flow, n = data.tokens.length, count = edges.kind.length;
  const layers = data.shape[0], canvas = $("flow-canvas"), box = $("flow-box"), slider = $("flow-least"), by = $("flow-by");
  const HEIGHT = { pre: 0, mid: 0.5, post: 1 }, left = 34, top = 34, foot = 78, right = 30;
  const dx = clamp((box.clientWidth - left - right - 4) / n, 12, 74), dy = clamp((innerHeight * 0.7 - top - foot) / layers, 15, 64);
  const width = Math.max(left + n * dx + right, 200), height = top + layers * dy + foot;
  const x = (position) => left + (position + 0.5) * dx;
  const y = (layer, stage) => top + (layers - layer - HEIGHT[stage]) * dy;
  const COLOURS = { attention: "--raise", mlp: "--lower" };
  const order = edges.through.map((_, i) => i);
  const paths = order.map(path);
  let chosen = null, least = 0;

  /** Points along an edge: straight, but off to the side where it would hide the residual stream. */
  function path(i) {
    const [x0, y0] = [x(edges.source[i]), y(edges.layer[i], edges.sourceStage[i])];
    const [x1, y1] = [x(edges.position[i]), y(edges.layer[i], edges.stage[i])];
    const same = edges.source[i] === edges.position[i] && !edges.kind[i].startsWith("residual");
    const bend = same ? (edges.kind[i] === "mlp" ? 1 : -1) * Math.min(dx * 0.32, 9) : 0;
    if (!bend) return [[x0, y0], [x1, y1]];
    return Array.from({ length: 9 }, (_, k) => { const t = k / 8; return [x0 + (x1 - x0) * t + bend * 4 * t * (1 - t), y0 + (y1 - y0) * t]; });
  }

  const strength = (i) => edges[by.value][i];
  const visible = (i) => strength(i) >= least;

  function draw() {
    const ratio = devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const brush = canvas.getContext("2d");
    brush.scale(ratio, ratio);
    brush.font = `11px ${css("--sans")}`;
    brush.fillStyle = paint("--muted");
    brush.strokeStyle = paint("--line");
    brush.textAlign = "right";
    brush.textBaseline = "middle";
    const every = Math.ceil(12 / dy);
    for (let layer = 0; layer < layers; layer++) {
      if (layer % every) continue;
      brush.fillText(layer, left - 8, top + (layers - layer - 0.5) * dy);
      brush.beginPath();
      brush.moveTo(left, y(layer, "pre"));
      brush.lineTo(left + n * dx, y(layer, "pre"));
      brush.lineWidth = 0.5;
      brush.stroke();
    }
    brush.font = `11px ${css("--mono")}`;
    for (let i = 0; i < n; i++) {
      brush.save();
      brush.translate(x(i) + 3, top + layers * dy + 9);
      brush.rotate(-Math.PI / 3.2);
      const text = dotted(data.tokens[i]);
      if (i === data.target.position) brush.fillStyle = paint("--fg");
      brush.fillText(text.length > 12 ? `${text.slice(0, 11)}…` : text, 0, 0);
      brush.restore();
    }
    const most = Math.max(...edges[by.value], 1e-12), drawn = order.filter(visible).sort((a, b) => strength(a) - strength(b));
    const paints = { residual: paint("--muted"), attention: paint(COLOURS.attention), mlp: paint(COLOURS.mlp) };
    for (const i of drawn) {
      const share = Math.max(0, 1 + Math.log10(strength(i) / most) / 3);
      stroke(brush, i, paints[edges.kind[i].replace("-mlp", "").replace("bias", "residual")], 0.6 + 4 * share, 0.18 + 0.82 * share);
    }
    if (chosen !== null && visible(chosen)) stroke(brush, chosen, paint("--fg"), 3.5, 1);
    const nodes = new Map();
    for (const i of drawn) {
      if (edges.kind[i].startsWith("residual") && edges.layer[i] > 0) continue; // only where something joins
      for (const [p, layer, stage] of [[edges.position[i], edges.layer[i], edges.stage[i]], [edges.source[i], edges.layer[i], edges.sourceStage[i]]]) nodes.set(`${x(p)},${y(layer, stage)}`, [x(p), y(layer, stage)]);
    }
    brush.globalAlpha = 1;
    brush.fillStyle = paint("--fg");
    for (const [cx, cy] of nodes.values()) { brush.beginPath(); brush.arc(cx, cy, clamp(dy / 9, 1.6, 3), 0, 7); brush.fill(); }
    const { answer, instead, position, value } = data.target;
    brush.font = `600 12px ${css("--mono")}`;
    const said = answer === undefined ? "" : `${dotted(answer)}${instead ? ` − ${dotted(instead)}` : ""}  ${number(value)} logits`;
    brush.textAlign = x(position) > width / 2 ? "right" : "left";
    brush.fillText(said, clamp(x(position) + (x(position) > width / 2 ? 40 : -10), 4, width - 4), top - 16);
    $("flow-count").textContent = `${drawn.length} of ${count} edges, ${by.value} at least ${short(least)}`;
  }

  function stroke(brush, i, colour, wide, alpha) {
    brush.globalAlpha = alpha;
    brush.strokeStyle = colour;
    brush.lineWidth = wide;
    brush.beginPath();
    paths[i].forEach(([px, py], k) => (k ? brush.lineTo(px, py) : brush.moveTo(px, py)));
    brush.stroke();
    brush.globalAlpha = 1;
  }

  function distance(i, px, py) {
    let best = Infinity;
    for (let k = 1; k < paths[i].length; k++) {
      const [ax, ay] = paths[i][k - 1], [bx, by_] = paths[i][k];
      const length = (bx - ax) ** 2 + (by_ - ay) ** 2 || 1;
      const t = clamp(((px - ax) * (bx - ax) + (py - ay) * (by_ - ay)) / length, 0, 1);
      best = Math.min(best, Math.hypot(px - ax - t * (bx - ax), py - ay - t * (by_ - ay)));
    }
    return best;
  }

  function nearest(px, py) {
    let best = null, least_ = 8;
    for (const i of order) {
      if (!visible(i)) continue;
      // The residual stream lies under all else at its position: others win a tie.
      const d = distance(i, px, py) + (edges.kind[i].startsWith("residual") ? 2 : 0);
      if (d < least_) [best, least_] = [i, d];
    }
    return best;
  }

  const title = (i) => {
    const kind = edges.kind[i], where = `layer ${edges.layer[i]}`;
    if (kind === "attention") return `${where}, attention: ${at(edges.source[i])} → ${at(edges.position[i])}`;
    return `${where}, ${{ mlp: "MLP", bias: "biases" }[kind] ?? "residual stream"} at ${at(edges.position[i])}`;
  };

  const tokens = (list) => (list ?? []).map(([word, logit]) => el("span", { className: "token", textContent: dotted(word), title: `${signed(logit)} logits` }));

  function table(names, rows) {
    return el("table", {}, el("thead", {}, el("tr", {}, ...names.map((name) => el("th", { scope: "col", textContent: name })))), el("tbody", {}, ...rows));
  }

  function show(i) {
    chosen = i;
    const parts = [el("h3", { textContent: title(i) })];
    const facts = [`${percent(edges.weight[i])} of what is added up there`, `${percent(edges.through[i])} of the explained token passes it`];
    const effect = edges.effect?.[i];
    if (known(effect)) facts.push(effect >= 0 ? `cutting it costs ${number(effect)} logits` : `cutting it adds ${number(-effect)} logits`);
    parts.push(el("p", { className: "muted", textContent: `${facts.join("; ")}.` }));
    const [layer, position, source] = [edges.layer[i], edges.position[i], edges.source[i]];
    if (edges.kind[i] === "attention") {
      const rows = heads.layer.map((_, k) => k).filter((k) => heads.layer[k] === layer && heads.position[k] === position && heads.source[k] === source);
      parts.push(table(["head", "share", "what it brings would say"], rows.map((k) => el("tr", {},
        el("td", {}, data.patterns ? headButton(layer, heads.head[k]) : headName(layer, heads.head[k])), el("td", { className: "n", textContent: percent(heads.weight[k]) }),
        el("td", {}, ...tokens(words[`h${layer}.${position}.${source}.${heads.head[k]}`]))))));
    } else if (edges.kind[i] === "mlp") {
      const rows = neurons.layer.map((_, k) => k).filter((k) => neurons.layer[k] === layer && neurons.position[k] === position);
      parts.push(rows.length
        ? table(["neuron", "active", "share", "what it writes would say"], rows.map((k) => el("tr", {},
          el("td", { textContent: neurons.neuron[k] }), el("td", { className: "n", textContent: number(neurons.activation[k], 1) }), el("td", { className: "n", textContent: percent(neurons.weight[k]) }),
          el("td", {}, ...tokens(words[`n${layer}.${position}.${neurons.neuron[k]}`])))))
        : el("p", { className: "muted", textContent: "Not taken apart: only the strongest MLP edges are, where the model shows neurons." }));
    }
    const into = order.filter((k) => edges.layer[k] === layer && edges.stage[k] === edges.stage[i] && edges.position[k] === position).sort((a, b) => edges.weight[b] - edges.weight[a]);
    parts.push(el("h3", { textContent: "All that was kept of this sum", className: "next" }), ...into.slice(0, 12).map(edgeButton));
    $("flow-panel").replaceChildren(...parts);
    draw();
  }

  function edgeButton(k) {
    const button = el("button", { type: "button", className: "edge", textContent: `${percent(edges.weight[k])}  ${edges.kind[k] === "attention" ? `from ${at(edges.source[k])}` : { mlp: "MLP", bias: "biases" }[edges.kind[k]] ?? "residual stream"}` });
    button.addEventListener("click", () => show(k));
    return button;
  }

  canvas.addEventListener("pointermove", (event) => {
    const i = nearest(event.offsetX, event.offsetY);
    $("flow-readout").textContent = i === null ? "" : `${title(i)}   ${percent(edges.weight[i])} of the sum, ${percent(edges.through[i])} of the route`;
  });
  canvas.addEventListener("click", (event) => {
    const i = nearest(event.offsetX, event.offsetY);
    if (i !== null) show(i);
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const ranked = order.filter(visible).sort((a, b) => strength(b) - strength(a));
    if (ranked.length) show(ranked[(ranked.indexOf(chosen) + step + ranked.length) % ranked.length]);
    $("live").textContent = $("flow-panel").textContent.slice(0, 200);
  });
  const prune = () => {
    const most = Math.max(...edges[by.value], 1e-12);
    least = Number(slider.value) ? most * 10 ** (-4 + (4 * Number(slider.value)) / 100) : 0;
    draw();
  };
  slider.addEventListener("input", prune);
  by.addEventListener("change", prune);
  redraws.push(draw);
  prune();
  const attention = order.filter((i) => edges.kind[i] === "attention" && edges.source[i] !== edges.position[i]);
  if (attention.length) show(attention.reduce((a, b) => (edges.through[b] > edges.through[a] ? b : a)));
  if (n * dx + left > box.clientWidth) box.scrollLeft = x(data.target.position);
  behind($("flow"), `Table: ${count} edges, the strongest first`, ["edge", "weight", "through", "effect, logits"], () =>
    order.toSorted((a, b) => edges.through[b] - edges.through[a]).map((i) => [title(i), edges.weight[i], edges.through[i], edges.effect?.[i] ?? null]));
}
