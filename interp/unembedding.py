"""Residual vectors to logits in float32, whatever type the weights have."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from interp.models.calls import at_home
from interp.models.model import Model
from interp.models.weights import linear_map


class Unembedding:
    """Logits of residual vectors: the model's own final norm, soft-cap and scale, products in float32.

    A 16-bit unembedding ties or swaps the top tokens at one position in fifty, so 16-bit weights are
    widened once, here; the final norm runs as it is. Raises Refused where the model has no
    unembedding that was verified.

    >>> unembed = Unembedding(tiny_model())
    >>> unembed(torch.ones(3, 32)).shape
    torch.Size([3, 97])
    """

    @torch.no_grad()
    def __init__(self, model: Model):
        _ = model.W_U  # refused where logits are not linear in the normed residual
        self.model, spec = model, model.spec
        like = torch.zeros(1, spec.d_model, dtype=model.dtype, device=model.device)
        narrow = model.unembed(like).dtype in (torch.bfloat16, torch.float16)
        self._wide: tuple[Tensor, Tensor] | None = None
        if narrow:
            module = model.module.get_submodule(spec.unembedding or "")
            W, b = linear_map(module, spec.d_model, model.device)
            self._wide = W.float(), b.float()

    @torch.no_grad()
    def __call__(self, residual: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        residual = residual.to(self.model.dtype)
        if self._wide is None:
            return self.model.unembed(residual).float()
        spec = self.model.spec
        if spec.final_norm is not None:
            residual = at_home(self.model.module.get_submodule(spec.final_norm), residual)
        W, b = self._wide
        logits = torch.addmm(b, residual.float().flatten(0, -2), W).unflatten(
            0, residual.shape[:-1]
        )
        if spec.logit_softcap is not None:
            return torch.tanh(logits / spec.logit_softcap) * spec.logit_softcap
        return logits * spec.logit_scale
