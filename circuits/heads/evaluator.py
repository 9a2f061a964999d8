"""Evaluator heads: heads whose attention, as a long prompt ends, picks the tokens that matter in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from circuits.heads.detector import Detector
from circuits.heads.needle import NeedleRun, needle_runs
from circuits.heads.needle_decoding import (
    Pattern,
    batches,
    read_on,
    read_prompt,
    rows_shown,
    span_mass,
)
from interp.models.model import Model

ROWS, BEST = 16, 8
"""Last rows of a prompt that are averaged over, and heads taken of the best layer."""


def evidence_mass(
    model: Model, runs: Sequence[NeedleRun], *, rows: int = ROWS
) -> dict[str, Float[np.ndarray, "n n_layers n_heads"]]:
    """Attention of a prompt's last rows on its needle, and on a span of equal length elsewhere.

    score = mean over the last `rows` queries q of Σ_k∈needle A[q, k]. Only these rows are formed. It says what a
    head looks at before an answer begins, not that the answer comes of it.

    Args:
        runs: prompts with a needle (`circuits.heads.needle.needle_runs`): the pilot data.

    Returns: "score" and "null", attention mass from 0 to 1; NaN where a layer has no attention.

    Raises:
        Refused: a model without seen patterns or without a KV cache.
    """
    model.layers_with("pattern")
    shape = (len(runs), model.n_layers, model.spec.n_heads)
    out = {name: np.full(shape, np.nan) for name in ("score", "null")}
    for places in batches(runs):
        ids = torch.stack([runs[i].ids for i in places]).to(model.device)
        last = min(rows, ids.shape[1] - 1)

        def see(layer: int, pattern: Pattern, places=places, length=ids.shape[1]) -> None:
            mean = pattern.mean(2)
            gone = length - mean.shape[-1]  # keys that a sliding window has forgotten
            for row, i in zip(mean, places, strict=True):
                needle, width = runs[i].start - runs[i].lead, len(runs[i].whole)
                for name, at in (("score", needle), ("null", runs[i].control)):
                    out[name][i, layer, : len(row)] = span_mass(row, at - gone, width)

        with torch.no_grad():
            cache = read_prompt(model, ids[:, :-last])
            with rows_shown(model, see):
                read_on(model, ids[:, -last:], cache)
    return out


def evaluator_heads(
    score: Float[np.ndarray, "n_layers n_heads"], best: int = BEST
) -> list[tuple[int, int]]:
    """The `best` heads of the one layer whose best heads have the highest mean score, strongest first.

    >>> evaluator_heads(np.array([[0.9, 0.0, 0.1], [0.5, 0.6, 0.2]]), best=2)
    [(1, 1), (1, 0)]
    """
    filled = np.nan_to_num(score, nan=-1.0)
    order = np.argsort(-filled, axis=1, kind="stable")[:, :best]
    layer = int(np.take_along_axis(filled, order, 1).mean(1).argmax())
    return [(layer, int(head)) for head in order[layer] if filled[layer, head] >= 0]


def _observe(model: Model, n: int, seed: int) -> dict[str, np.ndarray]:
    return evidence_mass(model, needle_runs(model, n, seed=seed))


def _tables(seen: Mapping[str, np.ndarray]) -> dict[str, pd.DataFrame]:
    score, null = seen["score"].mean(0), seen["null"].mean(0)
    rows = [
        {"layer": layer, "head": head, "score": score[layer, head], "null": null[layer, head]}
        for layer, head in evaluator_heads(score)
    ]
    return {"evaluator_heads": pd.DataFrame(rows)}


EVALUATOR = Detector(
    name="evaluator",
    title="Evaluator",
    letter="E",
    description="Mean attention of a long prompt's last 16 tokens on the planted sentence that they ask "
    "for. Table evaluator_heads names the strongest heads of the best layer, which prompt compression "
    "would go by. Whether the model then answers is not asked.",
    source="Fei et al. 2025, Efficient Prompt Compression with Evaluator Heads (EHPC). Differs: own pilot "
    "prompts (needles of the retrieval detector); the number of rows and heads is from a second-hand account",
    reads=None,
    null="the same rows' attention to a span of the same length elsewhere in the haystack",
    threshold=None,
    margin=0.0,
    rank=23,
    observe=_observe,
    tables=_tables,
    slow=True,
    needs_text=True,
    causal_only=True,
)
