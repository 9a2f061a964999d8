"""All rows of a batch one after the other in one attention call, and each attended to in chunks: rows apart again."""

from __future__ import annotations

from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.errors import Refused

in_chunks: WeakSet[nn.Module] = WeakSet()
"""Attention modules that hold all rows in one and attend to a chunk at a time, as the probe finds."""


def rows_apart(
    x: Float[Tensor, "one heads all d"], size: int
) -> Float[Tensor, "batch heads pos d"]:
    """What lies in one, with its `size` rows apart: a view."""
    return x[0].unflatten(1, (size, -1)).transpose(0, 1)


def chunk_mask(ends: Int[Tensor, " end"], size: int, causal: bool) -> Tensor | None:
    """Which keys of its row a query sees, those of its own chunk [batch 1 pos pos]; None where a row is a chunk.

    `ends` are those of all chunks, and 0 before them.

    Raises:
        Refused: some chunk is of two rows.
    """
    length = int(ends[-1]) // size
    starts = torch.arange(size + 1, device=ends.device) * length
    if not torch.isin(starts, ends).all():
        raise Refused(
            f"attention goes from one row of the batch to another ({size} rows of {length} positions, and none "
            f"but positions {ends.tolist()} are ends): give the rows one by one"
        )
    if len(ends) == size + 1:
        return None
    chunk = torch.bucketize(torch.arange(size * length, device=ends.device), ends, right=True)
    chunk = chunk.unflatten(0, (size, length))
    same = (chunk[:, :, None] == chunk[:, None, :])[:, None]
    return same.tril() if causal else same
