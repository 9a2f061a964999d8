// All heads' patterns as small pictures on one canvas; the chosen one large, with its tokens.

function attentionGrid() {
  const { n, causal } = data.patterns, [layers, heads] = data.shape;
  const size = causal ? (n * (n + 1)) / 2 : n * n;
  const overview = $("overview"), large = $("pattern"), hide = $("attention-hide");
  const marked = new Map((data.writers?.rows ?? []).filter((row) => row.kind === "head").map((row) => [row.layer * heads + row.head, row.value]));
  const left = 26, top = 16, wide = Math.max(240, Math.min(innerWidth * 0.44, 620));
  const cell = Math.round(clamp((wide - left) / heads, 13, 46));
  const side = clamp(Math.floor(600 / n), 4, 30), margin = n * side > 900 ? 0 : 84;
  let chosen = data.startHead ?? 0, query = data.target.position, key = -1, lookup, unchosen;

  const root = (head, q, k) => {
    if (causal && k > q) return 0;
    return bytes[head * size + (causal ? (q * (q + 1)) / 2 + k : q * n + k)];
  };
  const seen = (head, q, k) => (k === 0 && hide.checked && q > 0 ? 0 : root(head, q, k));
  const weight = (head, q, k) => (root(head, q, k) / 255) ** 2;

  function strongest(head) {
    let most = 1;
    for (let q = 0; q < n; q++) for (let k = 0; k < (causal ? q + 1 : n); k++) most = Math.max(most, seen(head, q, k));
    return most;
  }

  /** The pattern of one head as pixels, edge × edge; where several weights share a pixel the largest shows. */
  function image(head, edge) {
    const out = new ImageData(edge, edge), pixels = new Uint32Array(out.data.buffer);
    const scale = hide.checked ? 255 / strongest(head) : 1;
    const bound = Array.from({ length: edge + 1 }, (_, y) => Math.floor((y * n) / edge));
    for (let y = 0; y < edge; y++) {
      const q0 = bound[y], q1 = Math.max(bound[y + 1], q0 + 1);
      for (let x = 0; x < edge; x++) {
        const k0 = bound[x], k1 = Math.max(bound[x + 1], k0 + 1);
        let most = 0;
        for (let q = q0; q < q1; q++) for (let k = k0; k < k1; k++) most = Math.max(most, seen(head, q, k));
        pixels[y * edge + x] = lookup[Math.min(255, Math.round(most * scale))];
      }
    }
    return out;
  }

  function context(canvas, width, height) {
    const ratio = devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const brush = canvas.getContext("2d");
    brush.scale(ratio, ratio);
    brush.imageSmoothingEnabled = false;
    return brush;
  }

  function put(brush, pixels, x, y, edge) {
    const sheet = new OffscreenCanvas(pixels.width, pixels.height);
    sheet.getContext("2d").putImageData(pixels, 0, 0);
    brush.drawImage(sheet, x, y, edge, edge);
  }

  function drawOverview() {
    const stops = ramp();
    $("attention-key").style.background = gradient(stops);
    lookup = Uint32Array.from({ length: 256 }, (_, i) => { const [r, g, b] = rgb(stops, i / 255); return (255 << 24) | (b << 16) | (g << 8) | r; });
    const brush = context(overview, left + heads * cell + 2, top + layers * cell + 2);
    brush.font = `10px ${css("--sans")}`;
    brush.fillStyle = paint("--muted");
    brush.textBaseline = "middle";
    brush.textAlign = "center";
    for (let head = 0; head < heads; head++) if (cell > 18 || head % 4 === 0) brush.fillText(head, left + (head + 0.5) * cell, top / 2);
    brush.textAlign = "right";
    const edge = Math.round((cell - 2) * (devicePixelRatio || 1));
    for (let layer = 0; layer < layers; layer++) {
      brush.fillText(layer, left - 6, top + (layer + 0.5) * cell);
      for (let head = 0; head < heads; head++) {
        const i = layer * heads + head;
        if (data.patterns.has[i]) put(brush, image(i, edge), left + head * cell + 1, top + layer * cell + 1, cell - 2);
      }
    }
    for (const [i, value] of marked) frame(brush, i, paint(value >= 0 ? "--raise" : "--lower"), 1.5);
    unchosen = new OffscreenCanvas(overview.width, overview.height);
    unchosen.getContext("2d").drawImage(overview, 0, 0);
  }

  function frameChosen() {
    const brush = overview.getContext("2d");
    brush.save();
    brush.setTransform(1, 0, 0, 1, 0, 0);
    brush.clearRect(0, 0, overview.width, overview.height);
    brush.drawImage(unchosen, 0, 0);
    brush.restore();
    frame(brush, chosen, paint("--fg"), 2.5);
  }

  function frame(brush, i, stroke, width) {
    brush.strokeStyle = stroke;
    brush.lineWidth = width;
    brush.strokeRect(left + (i % heads) * cell + 0.5, top + Math.floor(i / heads) * cell + 0.5, cell - 1, cell - 1);
  }

  function drawLarge() {
    const brush = context(large, margin + n * side + 2, margin + n * side + 2);
    put(brush, image(chosen, n), margin, 0, n * side);
    brush.strokeStyle = paint("--line");
    brush.strokeRect(margin + 0.5, 0.5, n * side - 1, n * side - 1);
    brush.font = `${clamp(side - 1, 8, 12)}px ${css("--mono")}`;
    brush.fillStyle = paint("--muted");
    brush.textBaseline = "middle";
    const every = Math.ceil(8 / side);
    const label = (i) => { const text = dotted(data.tokens[i]); return text.length > 11 ? `${text.slice(0, 10)}…` : text; };
    for (let i = 0; margin && i < n; i += every) {
      brush.textAlign = "right";
      brush.fillText(label(i), margin - 5, (i + 0.5) * side);
      brush.save();
      brush.translate(margin + (i + 0.5) * side, n * side + 5);
      brush.rotate(-Math.PI / 2);
      brush.fillText(label(i), 0, 0);
      brush.restore();
    }
    brush.strokeStyle = paint("--raise");
    brush.lineWidth = 1.5;
    brush.strokeRect(margin + 0.5, query * side + 0.5, n * side - 1, side);
    if (key >= 0) brush.strokeRect(margin + key * side + 0.5, query * side + 0.5, side, side);
  }

  const strip = textStrip($("attention-text"), (i) => { query = i; key = -1; tell(); drawLarge(); });

  function tell() {
    const layer = Math.floor(chosen / heads), head = chosen % heads;
    $("attention-title").textContent = headName(layer, head);
    const row = Array.from({ length: n }, (_, k) => weight(chosen, query, k));
    const drawn = hide.checked && query > 0 ? [0, ...row.slice(1)] : row;
    strip(drawn, Math.max(...drawn, 1e-9), false, "attention");
    const best = row.map((w, k) => [w, k]).sort((a, b) => b[0] - a[0]).slice(0, 3).map(([w, k]) => `${at(k)} ${percent(w)}`);
    $("attention-readout").replaceChildren(
      el("b", { textContent: key >= 0 ? `${at(query)} reads ${at(key)}: ${percent(row[key])}` : `${at(query)} reads ` }),
      key >= 0 ? `   most: ${best.join(", ")}` : best.join(", "),
    );
    const value = data.writers?.heads[chosen];
    $("attention-value").textContent = known(value) ? `writes ${signed(value)} logits` : "";
  }

  function choose(i, move) {
    chosen = i;
    frameChosen();
    drawLarge();
    tell();
    $("live").textContent = `${headName(Math.floor(i / heads), i % heads)}. ${$("attention-readout").textContent}`;
    if (!move) return;
    reveal();
    try { history.replaceState(null, "", `#${headName(Math.floor(i / heads), i % heads)}`); } catch { /* a sandboxed frame has no history */ }
  }

  function reveal() {
    const box = $("overview-box"), y = top + Math.floor(chosen / heads) * cell;
    if (y < box.scrollTop || y + cell > box.scrollTop + box.clientHeight) box.scrollTop = y - box.clientHeight / 2;
  }

  overview.addEventListener("pointerdown", (event) => {
    const head = Math.floor((event.offsetX - left) / cell), layer = Math.floor((event.offsetY - top) / cell);
    if (head >= 0 && head < heads && layer >= 0 && layer < layers) chooseHead(layer, head);
  });
  overview.addEventListener("pointermove", (event) => {
    const head = Math.floor((event.offsetX - left) / cell), layer = Math.floor((event.offsetY - top) / cell);
    overview.title = head >= 0 && head < heads && layer >= 0 && layer < layers ? headName(layer, head) : "";
  });
  const STEPS = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -heads, ArrowDown: heads };
  overview.addEventListener("keydown", (event) => {
    const next = chosen + (STEPS[event.key] ?? 0);
    if (!(event.key in STEPS) || next < 0 || next >= layers * heads) return;
    event.preventDefault();
    chooseHead(Math.floor(next / heads), next % heads);
  });
  const aim = (event) => {
    const k = Math.floor((event.offsetX - margin) / side), q = Math.floor(event.offsetY / side);
    if (k < 0 || q < 0 || k >= n || q >= n || (k === key && q === query)) return;
    [query, key] = [q, causal ? Math.min(k, q) : k];
    drawLarge();
    tell();
  };
  large.addEventListener("pointermove", aim);
  large.addEventListener("pointerdown", aim);
  large.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!moves) return;
    event.preventDefault();
    query = clamp(query + moves[0], 0, n - 1);
    key = clamp(key + moves[1], 0, causal ? query : n - 1);
    drawLarge();
    tell();
  });
  const redraw = () => { drawOverview(); choose(chosen, false); };
  hide.addEventListener("change", redraw);
  headListeners.push((layer, head) => { key = -1; choose(layer * heads + head, true); });
  redraws.push(redraw);
  redraw();
  reveal();
  behind($("attention"), "Table: the strongest links of this prompt, over all heads", ["head", "query", "key", "attention"], () => {
    const links = [];
    for (let i = 0; i < layers * heads; i++) {
      for (let q = 1; q < n; q++) for (let k = 1; k < (causal ? q : n); k++) {
        const w = weight(i, q, k);
        if (w > 0.3) links.push([headName(Math.floor(i / heads), i % heads), at(q), at(k), w]);
      }
    }
    return links.sort((a, b) => b[3] - a[3]);
  });
}
