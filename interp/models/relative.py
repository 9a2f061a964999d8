"""How far two tensors are from each other relative to their size, and how far an identity may be off."""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_TOLERANCE = {
    torch.float64: 1e-9,  # depth × eps, with room for ill-conditioned random weights
    torch.float32: 2e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}


def relative_tolerance(dtype: torch.dtype) -> float:
    """How far an identity may be off in this dtype, relative to its size; as in bfloat16 where none is known."""
    return RELATIVE_TOLERANCE.get(dtype, RELATIVE_TOLERANCE[torch.bfloat16])


def relative_error(got: Tensor, wanted: Tensor) -> tuple[float, str]:
    """Largest error of a vector over its own largest entry, and a note if the shapes already differ.

    Each position is measured against itself: one position's massive activations hide no other's error.
    """
    if got.shape != wanted.shape:
        return float("inf"), f" (shapes {tuple(got.shape)} and {tuple(wanted.shape)})"
    got, wanted = got.cpu().double(), wanted.cpu().double()
    error = (got - wanted).abs().amax(-1)
    return float((error / wanted.abs().amax(-1).clamp_min(1e-6)).max()), ""
