"""Positions of a batch of prompts: masks of them, and the columns that are computed in every prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

Columns = tuple[int, ...]
"""Positions that are computed, the same in every prompt."""


def columns_of(mask: Bool[Tensor, "n pos"]) -> Columns:
    """The positions that any prompt names."""
    return tuple(int(i) for i in mask.any(0).nonzero()[:, 0])


def as_mask(positions: Sequence[Tensor], n: int, length: int) -> Bool[Tensor, "n pos"]:
    """Positions, one a prompt each, as a mask; all of them where none is named."""
    if not positions:
        return torch.ones(n, length, dtype=torch.bool)
    mask = torch.zeros(n, length, dtype=torch.bool)
    for where in positions:
        mask[torch.arange(n), where] = True
    return mask
