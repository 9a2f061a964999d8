"""Adam on one tensor, with a state that can be kept as arrays: an interrupted walk goes on as if it had not been."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def adam(parameter: Tensor, lr: float, kept: Mapping[str, np.ndarray]) -> torch.optim.Adam:
    """Adam for `parameter`, from where `kept` stopped, or from the start if it holds no moments."""
    optimiser = torch.optim.Adam([parameter], lr=lr)
    if MOMENTS[0] in kept:
        # torch counts steps on the CPU
        state = {name: torch.tensor(kept[name]) for name in MOMENTS}
        optimiser.state[parameter] = {
            name: value if name == "step" else value.to(parameter.device)
            for name, value in state.items()
        }
    return optimiser


def moments(optimiser: torch.optim.Adam, parameter: Tensor) -> dict[str, np.ndarray]:
    """The state to keep.

    >>> x = torch.ones(2, requires_grad=True)
    >>> first = adam(x, 0.1, {})
    >>> x.grad = torch.tensor([1.0, -1.0])
    >>> first.step()
    >>> [round(v, 2) for v in x.tolist()], float(moments(first, x)["step"])
    ([0.9, 1.1], 1.0)
    """
    return {name: optimiser.state[parameter][name].cpu().numpy() for name in MOMENTS}
