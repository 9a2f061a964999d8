"""How near the closed-form lens is to the model on text it was not fitted on, beside the logit lens.

KL(final ‖ lens) of every layer, on the held-out documents of each kind that the lens was fitted on, and
on texts of other kinds: files, and English Wikipedia from the wheel of gensim 4.4.0. The lens is read
from the cache, or fitted first (minutes).

Run: python -m benchmarks.ridge_lens [--text FILE …] [--wikipedia WHEEL]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

import interp
from interp.affine_lens import cached_lens
from interp.data.texts import wikipedia_articles
from interp.ridge_lens import fit_ridge_lens, held_out_kl

CHARACTERS = 60_000
"""Of each text of another kind."""
BOUND, FREE_LAYERS = 0.35, 2
"""The share of the logit lens's KL that is aimed at, in all layers but the last ones."""


def other_texts(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    for file in options.text:
        yield file.name, file.read_text(encoding="utf-8", errors="replace")[:CHARACTERS]
    if options.wikipedia is not None:
        articles = [article[:3000] for article in wikipedia_articles(options.wikipedia)]
        yield "wikipedia", "\n\n".join(articles)[:CHARACTERS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--wikipedia", type=Path)
    options = parser.parse_args()
    model = interp.load(options.model)
    lens = cached_lens(model) or fit_ridge_lens(model)
    tables = [lens.held_out]
    for name, text in other_texts(options):
        tables.append(held_out_kl(model, lens, text).assign(text=name))
    rows = pd.concat(tables)
    rows["ratio"] = rows["kl_ridge"] / rows["kl_logit"]
    for name in ("kl_ridge", "kl_logit", "ratio"):
        print(f"{name}\n{rows.pivot(index='layer', columns='text', values=name).round(3)}\n")
    early = rows[rows["layer"] < model.n_layers - FREE_LAYERS]
    for kind, some in early.groupby("text"):
        worst = some.loc[some["ratio"].idxmax()]
        said = "at most" if worst["ratio"] <= BOUND else "ABOVE"
        print(f"{kind}: {worst['ratio']:.1%} at layer {worst['layer']}, {said} {BOUND:.0%}")


if __name__ == "__main__":
    main()
