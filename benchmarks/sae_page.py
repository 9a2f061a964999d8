"""The page of an SAE with 10,000 features: its bytes, when it is ready, its nodes, and what a choice costs.

    python -m benchmarks.sae_page [--features N] [--limit SECONDS]

A made-up report of the shape of a real one (9 heads, 8 contexts a feature of 25 tokens, 8 tokens raised
and lowered, 262,144 tokens of text in windows of 128), beside the same report at a tenth of its features.
Ready is the time of the last change to the document after navigation, in headless Chromium with the
network blocked, the median of several visits.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time

import numpy as np
import pandas as pd

from benchmarks.page import row, visit
from interp.report import Report

VISITS = 3
CHOICES = """(() => {
  const grid = document.getElementById('grid');
  return Array.from({ length: 100 }, () => {
    const start = performance.now();
    grid.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowDown' }));
    document.getElementById('card-body').getBoundingClientRect();
    return performance.now() - start;
  });
})()"""
SEARCHES = """(() => {
  const search = document.getElementById('search');
  return ['w', 'w1', 'w12', 'w123', 'h3', '77', 'w9', ''].map((text) => {
    const start = performance.now();
    search.value = text;
    search.dispatchEvent(new Event('input'));
    document.getElementById('grid').getBoundingClientRect();
    return performance.now() - start;
  });
})()"""
SCROLLS = """new Promise((resolve) => {
  const grid = document.getElementById('grid'), times = [];
  const go = (k) => {
    if (k === 40) return resolve(times);
    grid.scrollTop = (grid.scrollHeight * (k + 1)) / 41;
    const start = performance.now();
    requestAnimationFrame(() => requestAnimationFrame(() => { times.push(performance.now() - start); go(k + 1); }));
  };
  go(0);
})"""
NODES = "document.querySelectorAll('*').length"


def made_up(
    n: int = 10_000,
    *,
    n_heads: int = 9,
    contexts: int = 8,
    around: int = 12,
    words: int = 8,
    vocabulary: int = 20_000,
    windows: int = 2048,
    tokens: list[str] | None = None,
    seed: int = 0,
) -> Report:
    """A "sae_features" report with the columns and arrays of a real one; nothing in it was measured."""
    rng = np.random.default_rng(seed)
    shown, size = 2 * around + 1, 128
    density = np.minimum(10 ** rng.normal(-2.6, 0.7, n), 1)
    density[rng.random(n) < 0.02] = 0
    alive = density > 0
    largest = np.where(alive, rng.gamma(4, 2, n), np.nan)
    exponent = np.where(alive, np.frexp(np.nan_to_num(largest))[1], -100)
    of = np.repeat(np.flatnonzero(alive), contexts)
    rank = np.tile(np.arange(contexts), int(alive.sum()))
    start = rng.integers(0, windows, len(of)) * size + rng.integers(0, size - shown, len(of))
    near = rng.gamma(1, 0.2, (len(of), shown)) * (rng.random((len(of), shown)) < 0.1)
    value = largest[of] * 0.98**rank
    near = np.minimum(near, 1) * value[:, None]
    near[:, around] = value
    rise = np.where((of % 100 == 0) & (rank < 4), rng.normal(0.05, 0.1, len(of)), np.nan)
    heads = rng.dirichlet(np.full(n_heads, 0.3), n)
    words_of = {name: rng.integers(0, vocabulary, (n, words)) for name in ("up", "down")}
    logits = -np.sort(-rng.gamma(2, 0.3, (n, words)), axis=1)
    text = (rng.zipf(1.3, windows * size) % vocabulary).astype(np.int32)
    texts = tokens or [f" w{k}" for k in range(vocabulary)]
    texts = [texts[k % len(texts)] for k in range(vocabulary)]
    counts = rng.multinomial(200, np.full(32, 1 / 32), n) * alive[:, None]
    effect = pd.Series(rise).groupby(of).mean().reindex(range(n)).to_numpy()
    table = pd.DataFrame(
        {
            "feature": np.arange(n),
            "density": density,
            "fired": (density * windows * size).astype(int),
            "mean": largest / 3,
            "max": largest,
            "dense": density > 0.1,
            "top_token": "",
            "up": "",
            "down": "",
            "head": heads.argmax(1),
            "head_share": heads.max(1),
            "ablation_effect": effect,
            "ablation_at_peak": effect / 2,
        }
    )
    lines = pd.DataFrame(
        {
            "feature": of,
            "rank": rank,
            "activation": value,
            "document": start // (20 * size),
            "token": start % (20 * size) + around,
            "window": start // size,
            "position": start % size + around + 1,
            "length": shown,
            "peak": around,
            "start": start,
            "ablation_effect": rise,
            "ablation_at_peak": rise / 2,
        }
    )
    edges = np.linspace(-6, 0, 25)
    spread, _ = np.histogram(np.log10(density[alive]), edges)
    histogram = pd.DataFrame({"from": edges[:-1], "to": edges[1:], "latents": spread})
    never = pd.DataFrame({"from": [-99.0], "to": [-99.0], "latents": [int((~alive).sum())]})
    steps = np.arange(1, 257)
    curve = pd.DataFrame(
        {"rows": 4096 * steps, "fvu": 0.3 + 0.6 * np.exp(-steps / 30), "l0": 32.0, "dead": 0.01}
    )
    overview = {"rows": 39_000, "l0": 31.9, "fvu": 0.29, "explained_variance": 0.71, "cosine": 0.86,
                "norm_ratio": 0.9, "dead": 0.02, "dense": 0.01}  # fmt: skip
    loss = pd.DataFrame({"condition": ["clean", "sae", "zero", "mean"],
                         "loss": [3.4975, 3.499, 3.5413, 3.53]})  # fmt: skip
    loss["increase"] = loss["loss"] - loss["loss"][0]
    loss["recovered_vs_zero"] = [np.nan, 0.96, np.nan, np.nan]
    loss["recovered_vs_mean"] = [np.nan, 0.95, np.nan, np.nan]
    token_table = pd.DataFrame({"token_id": np.arange(vocabulary)})
    token_table["text"] = pd.Series(texts, dtype=object)  # an Arrow string holds no lone surrogate
    tables = {
        "sae_features": table,
        "contexts": lines,
        "overview": pd.DataFrame([overview]),
        "histogram": pd.concat([never, histogram], ignore_index=True),
        "tokens": token_table,
        "loss": loss,
        "curve": curve,
    }
    arrays = {
        "histogram": counts.astype(np.int32),
        "histogram_exponent": exponent.astype(np.int16),
        "context_activations": near.astype(np.float32),
        "text_ids": text,
        "text_document": (np.arange(len(text)) // (20 * size)).astype(np.int32),
        "text_token": (np.arange(len(text)) % (20 * size)).astype(np.int32),
        "heads": heads.astype(np.float32),
        "up_ids": words_of["up"].astype(np.int32),
        "up_logits": logits.astype(np.float32),
        "down_ids": words_of["down"].astype(np.int32),
        "down_logits": -logits.astype(np.float32),
    }
    meta = {
        "model": {"id": "made up", "n_layers": 30, "n_heads": n_heads, "sha256": "0" * 64},
        "sae": {"site": "z.12", "activation": "topk", "k": 32, "d_sae": n, "heads": n_heads},
        "text": {"name": "made up", "licence": None}, "ablated_contexts": 4, "seed": seed,
        "distinct": "document", "notes": ["A made-up report."], "schema_version": 1,
    }  # fmt: skip
    return Report("sae_features", tables, arrays, meta)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=10_000)
    parser.add_argument("--limit", type=float, default=40.0, help="seconds a page may take")
    options = parser.parse_args()
    if not shutil.which("chromium") or not shutil.which("node"):
        sys.exit("needs chromium and node on the PATH, and `npm ci --prefix tests/browser`")
    rows, seconds, text = [], 0.0, ""
    for n in (options.features // 10, options.features):
        report = made_up(n)
        start = time.perf_counter()
        text = report.to_html()
        seconds = time.perf_counter() - start
        rows.append(row(f"{n:,} features", text, options.limit))
    visits = [visit(text, options.limit, [["ready"]], {}) for _ in range(VISITS)]
    ready = [seen["results"][0] for seen in visits if seen and not seen["errors"]]
    steps = [["ready"], ["eval", CHOICES], ["eval", SEARCHES], ["eval", SCROLLS], ["eval", NODES]]
    seen = visit(text, options.limit, steps, {})
    assert seen is not None and not seen["errors"], seen
    _, choices, searches, scrolls, nodes = seen["results"]
    print(f"\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for found in rows:
        print(f"| {' | '.join(str(value) for value in found.values())} |")
    print(
        f"\nmade in {seconds:.2f} s; drawn {np.median(ready):.0f} ms after navigation (median of "
        f"{len(ready)}); a feature's card takes {np.median(choices):.1f} ms, a search with its sort "
        f"{np.median(searches):.1f} ms (longest {max(searches):.0f}), two frames after a jump in the "
        f"list {np.median(scrolls):.0f} ms; {nodes} nodes after all that"
    )


if __name__ == "__main__":
    main()
