"""How a layer makes attention weights of q · k: a softmax of scaled scores, fitted to captured ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.columns import Columns

HIDDEN = -1e30
"""Scores below this are masked out."""


@dataclass(frozen=True)
class Softmax:
    """How a layer makes weights of q · k: scale, soft-cap, mask [pos pos], a sink logit a head."""

    scale: float
    cap: float | None
    hidden: Bool[Tensor, "pos pos"]
    sinks: Float[Tensor, " n_heads"] | None

    def weights(
        self, products: Float[Tensor, "*variants n_heads queries keys"], rows: Columns, heads: slice
    ) -> Float[Tensor, "*variants n_heads queries keys"]:
        """Pattern of these query rows over all keys; may overwrite `products`."""
        scores = products.mul_(self.scale)
        if self.cap is not None:
            scores = torch.tanh(scores / self.cap) * self.cap
        scores = scores.masked_fill_(self.hidden[list(rows)], -torch.inf)
        if self.sinks is None:
            return scores.softmax(-1)
        sink = self.sinks[heads, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


def fitted(
    q: Tensor, k: Tensor, scores: Tensor, pattern: Tensor, cap: float | None, dtype: torch.dtype
) -> Softmax | None:
    """The Softmax that makes `pattern` of q and k [pos heads d_head]; None where none does."""
    groups = k.shape[1]
    grouped = q.unflatten(1, (groups, -1))
    products = torch.einsum("qhgd,khd->hgqk", grouped, k).flatten(0, 1)
    shown = scores > HIDDEN
    if not bool((shown == shown[:1]).all()):  # heads see different keys
        return None
    x, y = products[shown], scores[shown]
    for soft in (None, cap) if cap is not None else (None,):
        raw = y if soft is None else soft * torch.atanh((y / soft).clamp(-1 + 1e-7, 1 - 1e-7))
        scale = float((x * raw).sum() / (x * x).sum().clamp_min(1e-30))
        made = Softmax(scale, soft, ~shown[0], _sinks(scores, pattern, dtype))
        rows = tuple(range(len(q)))
        error = (made.weights(products.clone(), rows, slice(None)) - pattern).abs().max()
        # Weights are at most 1: a hundred float32 steps, four of the coarse 16-bit ones.
        if float(error) < max(1e-5, 4 * torch.finfo(dtype).eps):
            return made
    return None


def _sinks(
    scores: Float[Tensor, "h q k"], pattern: Float[Tensor, "h q k"], dtype: torch.dtype
) -> Tensor | None:
    """The logit that takes what is missing from a row's weights; None where nothing is missing."""
    missing = 1 - pattern.sum(-1)
    if float(missing.abs().max()) < max(1e-4, 4 * torch.finfo(dtype).eps):
        return None
    share, row = missing.max(-1)
    whole = scores.logsumexp(-1).gather(-1, row[:, None])[:, 0]
    return whole + torch.log(share / (1 - share))
