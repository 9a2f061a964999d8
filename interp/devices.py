"""What a device has, found by asking it; and the float type that sums are made in."""

from __future__ import annotations

import torch
from torch import Tensor


def float_type(device: torch.device) -> torch.dtype:
    """The widest float type of a device: float64, or float32 where it has none (Apple's MPS).

    For large tensors that stay where they are. A small one is taken to the CPU first, `x.cpu().double()`: MPS
    casts before it copies, so neither `x.double().cpu()` nor `x.to("cpu", torch.float64)` works there.

    >>> float_type(torch.device("cpu"))
    torch.float64
    """
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except TypeError:
        return torch.float32
    return torch.float64


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is where that is wider: what identities of models in float64 need.

    >>> [wide(torch.ones(1, dtype=dtype)).dtype for dtype in (torch.bfloat16, torch.float64)]
    [torch.float32, torch.float64]
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))
