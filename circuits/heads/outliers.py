"""Who writes a massive activation: the embedding, every head, every MLP, up to where it is largest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution import Kept, Parts, rows_at, write_sites
from interp.models.model import Model
from interp.run.batch import Batch

PEAKS = 4
"""Massive entries that are taken apart: the largest of so many dimensions."""
WRITERS = 10
"""Writers of an entry that are told one by one."""

NEEDED = ("z", "attn_write", "mlp_write")

Place = tuple[Kept, Sequence[int]]
"""What was written to a row of each prompt of a batch, and which of the prompts have the entry there."""


def peaks(massive: pd.DataFrame) -> pd.DataFrame:
    """Of the table "massive", largest first, the first row of each of the largest dimensions."""
    return massive.drop_duplicates("dimension").head(PEAKS)


@torch.no_grad()
def writes_at(model: Model, batch: Batch, positions: Int[Tensor, " batch"]) -> Kept:
    """All that is written to one position of each prompt: one forward."""
    return rows_at(model, batch, positions, ["embed", *write_sites(model)])


@torch.no_grad()
def written_to(
    model: Model, places: Sequence[Place], layer: int, dimension: int
) -> tuple[Float[Tensor, "prompts parts"], list[dict[str, Any]]]:
    """What each part up to `layer` adds to one entry of the stream behind it, in units of the stream.

    The stream is a sum, so the parts add up to the entry. An MLP or a head that writes little itself may
    still be why another one writes much: this does not show that.

    Returns: values, and by part: writer ("embed", "head", "attn bias" or "mlp"), at (its layer), head.
    """
    heads = [(at, head) for at, head in model.spec.heads if at <= layer]
    parts: list[dict[str, Any]] = [{"writer": "embed", "at": -1, "head": -1}]
    parts += [{"writer": "head", "at": at, "head": head} for at, head in heads]
    for at in range(layer + 1):
        parts += [{"writer": kind, "at": at, "head": -1} for kind in ("attn bias", "mlp")]
    found = []
    for kept, rows in places:
        embed = kept["embed", 0]
        vector = torch.zeros(embed.shape, device=model.device)
        vector[:, dimension] = 1.0
        made = Parts(model, len(embed))
        for at in range(layer + 1):
            made.add_attention(at, kept, vector)
            made.add_mlp(at, kept, vector)
        columns = [embed[:, dimension].float().cpu()]
        columns += [made.heads[:, at, head] for at, head in heads]
        for at in range(layer + 1):
            columns += [made.attn_biases[:, at], made.mlps[:, at]]
        found.append(torch.stack(columns, dim=1)[list(rows)])
    return torch.cat(found), parts


def writers_table(
    values: Float[Tensor, "prompts parts"], parts: list[dict[str, Any]]
) -> pd.DataFrame:
    """The parts that add most, and the rest in one row; means over prompts, and shares of their sum."""
    table = pd.DataFrame(parts).assign(adds=values.mean(0).numpy())
    total = table["adds"].sum()
    table = table.sort_values("adds", key=abs, ascending=False, kind="stable")
    rest = {"writer": "the rest", "at": -1, "head": -1, "adds": table["adds"][WRITERS:].sum()}
    table = pd.concat([table.head(WRITERS), pd.DataFrame([rest])], ignore_index=True)
    return table.assign(share=table["adds"] / total)
