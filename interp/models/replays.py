"""Replays of a clean run: many variants in one forward, each from the first block that it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from interp.errors import BadInput
from interp.models.offered import Offered
from interp.models.passes import Passes
from interp.models.plan import first_changed, planned
from interp.models.skipping import rows_are_known
from interp.run.batch import Batch
from interp.run.cache import Cache, Run
from interp.run.edits import Edit
from interp.sites import Site

T = TypeVar("T")

TOKENS_PER_FORWARD = 4096
"""How many tokens a replay puts into one forward, variants times prompts together."""


def replayed(
    passes: Passes,
    offered: Offered,
    run: Run,
    variants: Sequence[Sequence[Edit]],
    metric: Callable[[Run], T],
    *,
    logits: bool | Tensor,
    capture: Iterable[str | Site],
    progress: Callable[[int], None] | None,
    tokens_per_forward: int,
) -> list[T]:
    """`metric` of every variant of a clean run; arguments as in `Model.replay`."""
    starts = [first_changed(offered, variant) for variant in variants]
    results: list[Any] = [None] * len(variants)
    per_forward = max(1, tokens_per_forward // (run.batch.size * _length(run)))
    per_forward = 1 if offered.spec.together else per_forward
    order = sorted(range(len(variants)), key=lambda i: starts[i])
    for start in sorted(set(starts)):
        same = [i for i in order if starts[i] == start]
        at_once = per_forward if rows_are_known(run, start) else 1
        for chunk in (same[i : i + at_once] for i in range(0, len(same), at_once)):
            edits = _on_copies([variants[i] for i in chunk], run.batch.size)
            plan = planned(offered, capture, edits)
            stop_at = plan.last_layer + 1 if logits is False else None
            batch = run.batch.repeat(len(chunk))
            with passes.resumed(run, start, len(chunk)):
                joint = passes.forward(batch, plan, stop_at=stop_at, logits=logits, start=start)
            for place, i in enumerate(chunk):
                results[i] = metric(_part(joint, run.batch, len(chunk), place))
            if progress is not None:
                progress(len(chunk))
    return results


def _length(run: Run) -> int:
    layer = run.cache.layers("resid_pre")
    if not layer:
        raise BadInput('a replay starts from a clean run: model.run(batch, capture=["resid_pre"])')
    return run.cache[Site("resid_pre", layer[0])].shape[1]


def _on_copies(variants: Sequence[Sequence[Edit]], size: int) -> list[Edit]:
    """The edits of all variants, each variant's on its own copy of a batch of `size` rows."""
    return [
        edit.on_rows(slice(place * size, (place + 1) * size))
        for place, variant in enumerate(variants)
        for edit in variant
    ]


def _part(joint: Run, batch: Batch, n: int, place: int) -> Run:
    """One of n variants' part of a joint run, each of this batch; a row may have several rows of logits."""
    rows, cache = slice(place * batch.size, (place + 1) * batch.size), Cache()
    for name in joint.cache:
        for layer, value in joint.cache.by_layer(name).items():
            cache.put(name, layer, value[rows])
    logits = None if joint.logits is None else joint.logits.tensor_split(n)[place]
    return Run(batch, logits, cache)
