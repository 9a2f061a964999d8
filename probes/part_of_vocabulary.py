"""The loss of a training step: a KL over a part of the vocabulary, and which part that is."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from interp.models.calls import at_home
from interp.models.model import Model
from interp.models.weights import linear_map
from probes.lens_rows import CHUNK_ROWS

LIKELIEST = 16
"""Tokens of every row's final distribution that a step always looks at, where there is room."""


class PartOfVocabulary:
    """KL(p̂ ‖ q̂) over some tokens and its gradient, p̂ and q̂ the softmax of logits − log π.

    π is the chance with which a token was taken in, so Σ exp(l)/π estimates the whole partition
    function without bias; its logarithm, and with it the loss, is then a little too small (half the
    estimate's relative variance). Whatever is taken in, the loss is 0 where q = p and positive
    elsewhere, so it has the same minimum. With all tokens it is the exact KL.

    Args:
        tokens: ids taken in, or None for all. chance: π of each.
    """

    def __init__(self, model: Model, tokens: Tensor | None, chance: Tensor | None):
        spec = model.spec
        self.model, self.cap, self.scale = model, spec.logit_softcap, spec.logit_scale
        self.norm = None if spec.final_norm is None else model.module.get_submodule(spec.final_norm)
        module = model.module.get_submodule(spec.unembedding or "")
        W, b = linear_map(module, spec.d_model, model.device)
        self.W = (W.T if tokens is None else W.T[tokens.to(W.device)]).float()
        b = (b if tokens is None else b[tokens.to(b.device)]).float()
        self.b, self.correction = b, None if chance is None else -chance.log().to(b.device)

    def _logits(self, normed: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weighted logits, and d logit / d product where it is not `scale` everywhere."""
        logits = torch.addmm(self.b, normed.float(), self.W.T)
        if self.scale != 1.0:
            logits *= self.scale
        slope = None
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap)
            slope = 1 - logits.square()
            logits *= self.cap
        return logits if self.correction is None else logits + self.correction, slope

    @torch.no_grad()
    def target(self, final: Float[Tensor, "rows d_model"]) -> tuple[Tensor, Tensor]:
        """(p̂ [rows tokens], Σ p̂ log p̂ [rows]) of the final residuals."""
        final = final.to(self.model.dtype)
        logits, _ = self._logits(final if self.norm is None else at_home(self.norm, final))
        logp = logits.log_softmax(-1)
        p = logp.exp()
        return p, torch.linalg.vecdot(p, logp)

    def __call__(
        self, y: Float[Tensor, "rows d_model"], target: tuple[Tensor, Tensor]
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows d_model"]]:
        """(KL of each row, its gradient at y)."""
        leaf = y.detach().to(self.model.dtype).requires_grad_()
        with torch.enable_grad():
            normed = leaf if self.norm is None else at_home(self.norm, leaf)
        p, own = target
        with torch.no_grad():
            logits, slope = self._logits(normed.detach())
            lse = logits.logsumexp(-1)
            kl = own + lse - torch.linalg.vecdot(p, logits)
            g = logits.sub_(lse[:, None]).exp_().sub_(p)
            if slope is not None:
                g *= slope
            back = (g @ self.W) * self.scale
        if self.norm is None:
            return kl, back
        (grad,) = torch.autograd.grad(normed, leaf, back.to(normed.dtype))
        return kl, grad.float()


def part_for(
    model: Model,
    final: Float[Tensor, "rows d_model"],
    frequency: Float[Tensor, " d_vocab"],
    size: int,
    generator: torch.Generator,
) -> PartOfVocabulary:
    """About `size` tokens for a step (0: all): the likeliest of its rows for sure, the others by their weight.

    The others are taken in each on its own, with a chance in proportion to the mean of their
    `frequency` and of an even share.
    """
    d_vocab = len(frequency)
    if not 0 < size < d_vocab:
        return PartOfVocabulary(model, None, None)
    k = max(1, min(LIKELIEST, size // (2 * len(final))))
    likely = [
        model.unembed(x.to(model.dtype)).float().topk(k).indices.flatten().cpu()
        for x in final.split(CHUNK_ROWS)
    ]
    certain = torch.cat(likely).unique()
    weight = (frequency + 1 / d_vocab) / 2
    chance = (weight * max(1, size - len(certain))).clamp(max=1.0)
    chance[certain] = 1.0
    taken = torch.rand(d_vocab, generator=generator) < chance
    taken[certain] = True
    tokens = taken.nonzero()[:, 0]
    return PartOfVocabulary(model, tokens, chance[tokens])
