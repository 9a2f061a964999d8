"""What attention edges of a flow graph are worth to a prediction, by cutting them.

A part of the residual stream can be large and yet be read by nothing: proximity does not see that, a cut
does. An edge is cut by setting its heads' attention from one position to another to zero, the rest of the
row as it was: exactly its part is gone from the sum, and everything after is computed anew.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.frozen import Frozen
from circuits.relevance import Target
from interp.devices import wide
from interp.direction import logit_direction
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.cache import Run
from interp.run.edits import Edit

PLACE = ["layer", "position", "source_position"]
"""What names an attention edge."""
UNREAD = 1e-3
"""An edge is read if cutting it changes the target by more than this share of the largest change."""


def strongest_edges(edges: pd.DataFrame, n: int | None) -> pd.DataFrame:
    """Places of the n attention edges (or all) that most of the chosen token passes, in order."""
    some = edges.loc[edges["kind"] == "attention"]
    some = some.sort_values(by="through", ascending=False, kind="stable").iloc[:n]
    return some.loc[:, PLACE].sort_values(by=PLACE)


@torch.no_grad()
def edge_effects(
    model: Model, batch: Batch, target: Target, heads: pd.DataFrame
) -> Float[np.ndarray, " edges"]:
    """What each attention edge is worth to the target, in logits: the target minus it without the edge.

    Other edges may stand in for a cut one, so effects do not add up. Nothing is held: a cut also changes
    the size that later norms divide by.

    Args:
        heads: rows layer, position, source_position, head (a FlowGraph's); an edge is the rows that
            share the first three.

    Returns: one number for each edge, ordered by (layer, position, source_position).
    """
    if not (variants := _cuts(heads)):
        return np.zeros(0)
    at = torch.tensor([target.position])
    clean = model.run(batch, capture=["resid_pre"], logits=at)
    assert clean.logits is not None
    whole = float(target.of(clean.logits[:, 0])[0])

    def value(run: Run) -> float:
        assert run.logits is not None
        return float(target.of(run.logits[:, 0])[0])

    return whole - np.array(model.replay(clean, variants, value, logits=at))


@torch.no_grad()
def held_effects(
    model: Model, batch: Batch, target: Target, heads: pd.DataFrame
) -> Float[np.ndarray, " edges"]:
    """The same with the scale of every norm held: what is lost with what the edge says.

    What nothing reads is then worth nothing, where a plain cut changes what later norms divide by.
    Where a model's norms cannot be held, this is the plain cut.

    Raises:
        Refused: no linear unembedding behind a norm.
    """
    if not (variants := _cuts(heads)):
        return np.zeros(0)
    frozen = Frozen(model, batch, patterns=False)
    final = frozen.run.cache[frozen.last][:, target.position]
    answer, instead = (
        None if token is None else torch.tensor([token])
        for token in (target.answer, target.instead)
    )
    assert answer is not None
    vector = logit_direction(model, final, answer, instead).vector

    def change(run: Run) -> float:
        lost = final - run.cache[frozen.last][:, target.position]
        return float((wide(lost.to(vector.device)) * vector).sum())

    return np.array(frozen.replay(variants, change, capture=[frozen.last]))


def unread_edges(model: Model, batch: Batch, target: Target, heads: pd.DataFrame) -> pd.DataFrame:
    """Places of the edges that nothing on the way to the target reads.

    An induction head's route ends at the token it copies; what the previous-token head wrote at the last
    position is as large a part of the stream there, and is unread.

    Args:
        heads: as for `edge_effects`.
    """
    effects = np.abs(held_effects(model, batch, target, heads))
    places = heads.loc[:, PLACE].drop_duplicates().sort_values(by=PLACE)
    return places.loc[effects <= UNREAD * effects.max(initial=0.0)]


def _cuts(heads: pd.DataFrame) -> list[list[Edit]]:
    """One list of edits an edge, ordered by place."""
    groups = heads.groupby(PLACE, sort=True)["head"]
    return [[_cut(*map(int, place), sorted(some))] for place, some in groups]  # type: ignore[misc]


def _cut(layer: int, query: int, key: int, heads: list[int]) -> Edit:
    def change(x: Tensor, seen: Any) -> Tensor:
        row = query - seen.start
        if not 0 <= row < x.shape[2] or key >= x.shape[3]:
            return x
        x = x.clone()
        x[:, heads, row, key] = 0
        return x

    return Edit.apply(f"pattern.{layer}", change)
