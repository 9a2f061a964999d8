"""The report page beside BertViz and CircuitsVis on the same attention patterns.

    python benchmarks/page.py [--peer-scripts DIR] [--limit SECONDS]

Random causal patterns of 30 layers × 9 heads × 64 tokens (random, so that nothing compresses
well). Ours carries four such prompts, all scores and OV words; the peers carry one prompt, as they
show one. Ready is the time of the last change to the document after navigation, in headless
Chromium with the network blocked. BertViz loads three scripts from a CDN; `--peer-scripts` names a
folder in which `npm install requirejs@2.3.6 d3@5.7.0 jquery@2.2.4` was run, and those copies then
stand in for them (its second row). Peers that are not installed are left out with a message; to
have them: `pip install --no-deps bertviz circuitsvis` in a virtual environment of their own, with
torch, numpy, ipython, tqdm and importlib-metadata below 8.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from interp.figures import page  # noqa: E402
from tests.browser.synthetic import head_report  # noqa: E402

N_LAYERS, N_HEADS, N_TOKENS = 30, 9, 64

WATCH = """window.changed = 0;
new MutationObserver(() => { window.changed = performance.now(); })
  .observe(document, {subtree: true, childList: true, attributes: true, characterData: true});"""
SETTLED = """new Promise((resolve) => {
  const look = () => performance.now() - window.changed > 1500
    ? resolve([window.changed, document.querySelectorAll('*').length,
               document.querySelectorAll('svg, canvas, img').length])
    : setTimeout(look, 100);
  setTimeout(look, 1500);
})"""
SWITCHES = """(() => {
  const cells = [...document.querySelectorAll('.cell')].slice(0, 100);
  return cells.map((cell) => {
    const start = performance.now();
    cell.click();
    document.getElementById('card').getBoundingClientRect();
    return performance.now() - start;
  }).sort((a, b) => a - b);
})()"""


def visit(
    text: str, limit: float, steps: list[list[str]], serve: dict[str, str]
) -> dict[str, Any] | None:
    """What drive.mjs saw, or None when the page took longer than `limit` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(text, encoding="utf-8")
        job = {
            "url": path.as_uri(),
            "browser": shutil.which("chromium"),
            "steps": steps,
            "serve": serve,
            "init": WATCH,
            "timeout": limit * 1000,
        }
        node = subprocess.Popen(
            ["node", str(ROOT / "tests" / "browser" / "drive.mjs")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            out, _ = node.communicate(json.dumps(job), timeout=limit + 15)
        except subprocess.TimeoutExpired:
            node.terminate()  # playwright closes its browser on SIGTERM
            node.wait()
            return None
        return json.loads(out)


def row(name: str, text: str, limit: float, serve: dict[str, str] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"page": name, "MB": f"{len(text.encode()) / 1e6:.1f}"}
    seen = visit(text, limit, [["eval", SETTLED]], serve or {})
    if seen is None or not seen["results"]:
        return found | {"ready": f"over {limit:.0f} s", "nodes": "?", "opens offline": "?"}
    changed, nodes, drawings = seen["results"][0]
    missing = len(seen["requests"])
    opens = "yes" if not missing and not serve else "no (CDN)"
    return found | {
        "ready": f"{changed:.0f} ms" if drawings else "never",
        "nodes": f"{nodes:,}",
        "opens offline": opens,
    }


def ours() -> tuple[str, float]:
    report = head_report(N_LAYERS, N_HEADS, lengths=(N_TOKENS,) * 4, random_patterns=True)
    start = time.perf_counter()
    return page.head_page(report), time.perf_counter() - start


def peers(attention: np.ndarray, tokens: list[str]) -> dict[str, Callable[[], str]]:
    """Makers of the peers' pages, for the peers that are installed."""
    found: dict[str, Callable[[], str]] = {}
    try:
        import torch
        from bertviz import head_view, model_view  # pyright: ignore[reportMissingImports]

        layers = [torch.tensor(layer)[None] for layer in attention]
        for view in (head_view, model_view):
            found[f"BertViz {view.__name__}"] = lambda view=view: (
                # what a user saves: require.js, which head_view shows apart, and the page's html
                '<!doctype html><meta charset="utf-8"><script src="https://cdnjs.cloudflare.com/'
                'ajax/libs/require.js/2.3.6/require.min.js"></script>'
                + view(layers, tokens, html_action="return").data
            )
    except ImportError as error:
        print(f"BertViz left out: {error}")
    try:
        from circuitsvis.attention import attention_heads  # pyright: ignore[reportMissingImports]

        flat = attention.reshape(-1, N_TOKENS, N_TOKENS)
        found["CircuitsVis attention_heads"] = lambda: (
            '<!doctype html><meta charset="utf-8"><body>'
            + attention_heads(attention=flat, tokens=tokens).local_src  # not the CDN's copy
        )
    except ImportError as error:
        print(f"CircuitsVis left out: {error}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="The report page beside BertViz and CircuitsVis.")
    parser.add_argument("--peer-scripts", type=Path)
    parser.add_argument("--limit", type=float, default=90.0, help="seconds a page may take")
    options = parser.parse_args()
    if not shutil.which("chromium") or not shutil.which("node"):
        sys.exit("needs chromium and node on the PATH, and `npm ci --prefix tests/browser`")

    text, seconds = ours()
    rows = [row("ours, 4 prompts", text, options.limit)]
    seen = visit(text, options.limit, [["ready"], ["eval", SWITCHES]], {})
    assert seen is not None and not seen["errors"], seen
    ready, switches = seen["results"]

    rng = np.random.default_rng(0)
    raw = np.tril(rng.gamma(0.3, size=(N_LAYERS, N_HEADS, N_TOKENS, N_TOKENS)))
    attention = (raw / raw.sum(-1, keepdims=True)).astype(np.float32)
    for name, make in peers(attention, [f"t{k}" for k in range(N_TOKENS)]).items():
        peer = make()
        rows.append(row(name, peer, options.limit))
        if options.peer_scripts and "cdnjs" in peer:
            modules = options.peer_scripts / "node_modules"
            cdn = "https://cdnjs.cloudflare.com/ajax/libs/"
            serve = {
                f"{cdn}require.js": str(modules / "requirejs/require.js"),
                f"{cdn}d3": str(modules / "d3/dist/d3.min.js"),
                f"{cdn}jquery": str(modules / "jquery/dist/jquery.min.js"),
            }
            rows.append(row(f"{name}, local scripts", peer, options.limit, serve))

    print(f"\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for found in rows:
        print(f"| {' | '.join(str(value) for value in found.values())} |")
    print(
        f"\nours: made in {seconds:.2f} s; interactive after {ready:.0f} ms; a head switch with "
        f"layout takes {np.median(switches):.1f} ms (median of {len(switches)}), "
        f"{np.percentile(switches, 95):.1f} ms at the 95th percentile"
    )


if __name__ == "__main__":
    main()
