"""The page of `interp explain` at 30 layers × 9 heads × 64 tokens, beside its plotly figures.

    python -m benchmarks.explain_page [--limit SECONDS]

A random model of the default model's shape is explained, so that nothing compresses well. Ready is the
time of the last change to the document after navigation, in headless Chromium with the network blocked,
the median of several visits; the peer is the same report's plotly figures on one page, as reports
without a page of their own show them (one pattern instead of 270).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.page import row, visit
from circuits.explain import explain
from interp.figures.figure_page import figure_page
from interp.models.model import Model
from interp.report import Report

N_LAYERS, N_HEADS, N_TOKENS, VISITS = 30, 9, 64, 5
CHOICES = """(() => {
  const cells = [...document.querySelectorAll('#head-map button')].slice(0, 100);
  return cells.map((cell) => {
    const start = performance.now();
    cell.click();
    document.getElementById('pattern').getBoundingClientRect();
    return performance.now() - start;
  });
})()"""
PRUNINGS = """(() => {
  const slider = document.getElementById('flow-least');
  return Array.from({ length: 50 }, (_, k) => {
    const start = performance.now();
    slider.value = 2 * k;
    slider.dispatchEvent(new Event('input'));
    document.getElementById('flow-canvas').getContext('2d').getImageData(0, 0, 1, 1);
    return performance.now() - start;
  });
})()"""


def random_report() -> Report:
    """A report on a random model with wide weights: patterns far from uniform, no structure."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 8 * N_HEADS,
        "intermediate_size": 48,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": 3,
        "vocab_size": 97,
        "max_position_embeddings": N_TOKENS,
    }
    module = LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    ids = np.random.default_rng(0).integers(0, 97, N_TOKENS).tolist()
    return explain(Model(module, id="random"), ids, answer=3, instead=4, mass=0.95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a page may take")
    options = parser.parse_args()
    if not shutil.which("chromium") or not shutil.which("node"):
        sys.exit("needs chromium and node on the PATH, and `npm ci --prefix tests/browser`")
    report = random_report()
    start = time.perf_counter()
    text = report.to_html()
    made = time.perf_counter() - start
    rows = [row(f"explain, {len(report.tables['flow'])} edges", text, options.limit)]
    rows.append(row("its plotly figures", figure_page(report), options.limit))
    visits = [visit(text, options.limit, [["ready"]], {}) for _ in range(VISITS)]
    ready = [seen["results"][0] for seen in visits if seen and not seen["errors"]]
    seen = visit(text, options.limit, [["ready"], ["eval", CHOICES], ["eval", PRUNINGS]], {})
    assert seen is not None and not seen["errors"], seen
    _, choices, prunings = seen["results"]
    print(f"\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for found in rows:
        print(f"| {' | '.join(str(value) for value in found.values())} |")
    print(
        f"\nmade in {made:.2f} s; drawn {np.median(ready):.0f} ms after navigation (median of {len(ready)}); "
        f"choosing a head takes {np.median(choices):.1f} ms, moving the slider {np.median(prunings):.1f} ms"
    )


if __name__ == "__main__":
    main()
