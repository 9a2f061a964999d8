"""What a device has, found by asking it."""

from __future__ import annotations

import torch


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
