"""What each head and MLP gives to the logits and to later nodes, by contextual decomposition (`contextual`)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from circuits.contextual import Decomposition, Relevance, check_model, check_rules, kind_of
from circuits.heads.claims import INTERVAL, resampling
from circuits.measure import measure
from circuits.tasks import as_pairs, check_task
from interp.data.pairs import Pairs
from interp.errors import BadInput
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.progress import Progress
from interp.run.resume import Checkpoint


def search(found: Relevance) -> tuple[Float[np.ndarray, " n_nodes"], Int[np.ndarray, " n_nodes"]]:
    """For every node the largest threshold at which CD-T's search keeps it, in logits, and its target.

    The search goes backwards from the logits: with threshold τ a node is kept when what it gives to
    the logits, or to a node that is kept already, is at least τ in magnitude. A node's score is
    therefore that of its widest path, score(s) = max(|s → logits|, max_t min(score(t), |s → t|)).

    Returns: (scores [n_nodes]; the target of each node's widest path, n_nodes for the logits).
    """
    if found.sources != found.nodes:
        raise BadInput("the search needs every head and MLP as a source: leave sources out")
    strength = np.abs(found.to_nodes.sum(-1))
    scores = np.abs(found.to_logits.mean(1)).astype(np.float64)
    target = np.full(len(scores), len(scores))
    for node in reversed(range(len(scores))):  # nodes are in order of computation
        through = np.minimum(scores[node + 1 :], strength[node, node + 1 :])
        if len(through) and through.max() > scores[node]:
            scores[node], target[node] = through.max(), node + 1 + int(through.argmax())
    return scores, target


def check_options(
    *,
    task: Any = None,
    baseline: str = "corrupted",
    attention: str = "values",
    bias: str = "rest",
    sources: Sequence[str] | None = None,
    n: int = 32,
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if isinstance(task, (str, Path)):
        check_task(task)
    check_rules(baseline, attention, bias)
    if sources is not None and not list(sources):
        raise BadInput("no source: name at least one, such as '0.1', 'mlp.0' or 'embed'")
    if n < 1:
        raise BadInput(f"n={n}: give at least one pair")


@analysis(
    name="decompose",
    source="Hsu et al. 2024, contextual decomposition for transformers (CD-T)",
    example="interp decompose smollm2-135m ioi --n 8",
    figure="map",
    validate=check_options,
    takes="text",
)
@torch.no_grad()
def decompose(
    model: Model,
    task: Pairs | str,
    *,
    sources: Sequence[str] | None = None,
    positions: str | None = None,
    baseline: str = "corrupted",
    attention: str = "values",
    bias: str = "rest",
    n: int = 32,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """What each head and MLP gives to the logit difference and to every later node, in logits.

    Every activation is x = r + i, r from the source, i from all else. The source is i at its
    baseline, r the rest of it; norms keep σ(x), patterns stay as they are, an MLP passes on
    f(r + i) − f(i). Then logit_diff = d · r + d · i + biases, d the answer's direction with the final
    norm held.

    Where this differs from the paper: biases stay with i unless bias="shared"; an MLP is f as a
    whole, its gate included; a contribution to a later node is given in logits (times the gradient
    there) and by way of its pattern as well as of its values, where the paper compares norms of r
    and i and looks at values alone. Contributions hold every route from the source, so those of
    several sources overlap: they do not sum to the logit difference.

    Args:
        task: a shipped task ("ioi", "facts:language"), a file of pairs, or Pairs.
        sources: nodes such as 23.0, mlp.5 or embed; with a plus (23.0+23.3), a set taken as one. By
            default every head and every MLP.
        positions: a named position of the task: sources count there only.
        baseline: corrupted, mean or zero: what a source would be without what is relevant in it.
        attention: values (patterns stay) or all (patterns follow from the irrelevant part).
        bias: rest (biases belong to no source) or shared (split by |W r| : |W i|).
        n: pairs of a named task. seed: of the task and the bootstrap.
        checkpoint: folder for finished units. resume: go on from what is there.
        progress: show a progress bar; by default in a terminal or a notebook.

    Returns: a Report. Table "decompose", one row a source: contribution (logits, mean over pairs) with
        its 95 % interval (bootstrap over pairs), `strongest` (the later node it gives most to, if there is one) and
        `to_strongest` (logits); with all sources also `score`, the largest threshold at which the
        search from the logits backwards keeps the node. Arrays: to_logits [n_sources n], to_nodes
        [n_sources n_nodes 2] (pattern, value); meta["sources"] and meta["nodes"] name their axes.

    Raises:
        BadInput: unknown task, node, position or option. Refused: patterns or unembedding unseen.

    Source: Hsu, Zhou, Cherapanamjeri, Huang, Odisho, Carroll & Yu 2024, arXiv 2407.00886.

    >>> pairs = Pairs.of([[5, 6, 7], [8, 6, 7]], [[5, 9, 7], [8, 3, 7]], answers=[3, 4], wrong=[4, 3])
    >>> report = decompose(tiny_model(), pairs, progress=False)
    >>> len(report.table), report.arrays["to_nodes"].shape
    (10, (10, 10, 2))
    """
    started = time.perf_counter()
    check_options(baseline=baseline, attention=attention, bias=bias, sources=sources, n=n)
    check_model(model)
    pairs = as_pairs(model, task, n=n, seed=seed)
    options = {
        "task": pairs.name,
        "sources": None if sources is None else list(sources),
        "positions": positions,
        "baseline": baseline,
        "attention": attention,
        "bias": bias,
        "n": len(pairs),
    }
    meta = provenance(model, options=options, seed=seed)
    key = {"model": meta["model"], "options": options, "seed": seed, "pairs": pairs.digest}
    units = Checkpoint(checkpoint, key, resume=resume)
    told = measure(model, pairs)
    whole = Decomposition(model, pairs, baseline=baseline, attention=attention, bias=bias)
    chosen = whole.nodes if sources is None else tuple(sources)
    with Progress(progress) as bars:
        found = whole.relevance(
            chosen,
            positions=positions,
            units=units,
            progress=bars.stage("Decomposing", len(chosen)),
        )
    meta |= {
        "sources": list(found.sources),
        "nodes": list(found.nodes),
        "metric": {
            "name": told.metric,
            "unit": told.unit,
            "clean": float(told.clean.mean()),
            "corrupted": float(told.corrupted.mean()),
        },
        "held": {
            "norms": len(whole.frozen.held),
            "error": whole.frozen.error,
            "allowed": whole.frozen.allowed,
        },
        "notes": [*model.notes, *told.notes, *_notes(whole)],
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    arrays = {"to_logits": found.to_logits, "to_nodes": found.to_nodes}
    return Report("decompose", {"decompose": _table(found, seed)}, arrays, meta)


def _notes(whole: Decomposition) -> list[str]:
    if whole.frozen.held:
        return []
    return [
        "no norm's scale could be held (see held.error): contributions include the norms' response"
    ]


def _table(found: Relevance, seed: int) -> pd.DataFrame:
    """One row a source."""
    n = found.to_logits.shape[1]
    low, high = np.quantile(found.to_logits @ resampling(n, seed).T, INTERVAL, axis=1)
    onward = found.to_nodes.sum(-1)
    best = np.abs(onward).argmax(1)
    kinds, layers, heads = zip(*(kind_of(name) for name in found.sources), strict=True)
    table = pd.DataFrame(
        {
            "source": found.sources,
            "kind": kinds,
            "layer": layers,
            "head": heads,
            "contribution": found.to_logits.mean(1),
            "low": low,
            "high": high,
            "strongest": [found.nodes[i] if onward[row, i] else "" for row, i in enumerate(best)],
            "to_strongest": onward[np.arange(len(best)), best],
        }
    )
    if found.sources == found.nodes:
        table["score"], _ = search(found)
    order = np.argsort(-np.abs(found.to_logits.mean(1)), kind="stable")
    return table.iloc[order].reset_index(drop=True)
