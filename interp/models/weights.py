"""Weights by the field's names, read from modules without changing or copying the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interp.errors import Refused


@torch.no_grad()
def linear_map(
    module: nn.Module, d_in: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """(W [d_in, d_out], b [d_out]) of any module that computes x @ W + b.

    `nn.Linear` keeps Wᵀ and GPT-2's Conv1D keeps W; any other module (quantised, with an adapter) is
    asked for its outputs on the identity.
    """
    weight = getattr(module, "weight", None)
    plain = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
    if plain and isinstance(weight, Tensor) and weight.is_floating_point():
        W = weight.T if isinstance(module, nn.Linear) else weight
        bias = getattr(module, "bias", None)
        return W, torch.zeros(W.shape[1], dtype=W.dtype, device=W.device) if bias is None else bias
    some = next(module.parameters(), torch.zeros(0))
    dtype = some.dtype if some.is_floating_point() else torch.float32
    zero = module(torch.zeros(1, d_in, dtype=dtype, device=device or some.device))
    eye = torch.eye(d_in, dtype=dtype, device=device or some.device)
    return module(eye) - zero, zero[0]


@torch.no_grad()
def norm_gain(norm: nn.Module, d_model: int) -> Tensor:
    """Gain g [d_model] of a norm: norm(x) = g · x̂ + b, x̂ the normalised x.

    Found by asking the norm, so Gemma's (1 + weight) needs no case of its own. Raises Refused where
    the module is not elementwise in this sense.
    """
    some = next(norm.parameters(), None)
    if some is None:
        return torch.ones(d_model)
    probe = torch.where(torch.arange(d_model, device=some.device) % 2 == 0, 1.0, -1.0).to(
        some.dtype
    )
    if d_model % 2:
        raise Refused(f"d_model = {d_model} is odd: the norm's gain is not read")
    # ±1 in equal numbers has mean 0 and mean square 1: both LayerNorm and RMSNorm leave it alone.
    plus, minus = norm(probe[None])[0], norm(-probe[None])[0]
    return (plus - minus) / 2 * probe
