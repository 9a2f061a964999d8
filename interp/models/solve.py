"""Which values were added: the smallest set, with multipliers, that explains a sum up to its own rounding.

An addition rounds each entry to at most eps/2 of its size, so every entry of the sum has a bound of its
own, and entries where the stream is small say the most. A norm over all entries would not do: in 16 bits
the rounding of one massive activation is larger than everything that a block writes elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

MANY = 40
"""Of more candidates than this only pairs are tried, not triples."""
COARSE = 1e-4
"""From this eps on (16 bits), a small write may hide in the rounding of a large one: one more is tried."""
CLEARLY = 1.2
FITTED = 1e-13
"""Least squares round too: by this much at most of what they are fitted to."""
SLACK = 2.0
"""Room over the bound of plain additions: a multiplier is estimated, and its product is rounded too."""


def smallest_sum(
    pre: Tensor, post: Tensor, values: Sequence[Tensor], dtype: torch.dtype
) -> list[tuple[int, float]] | None:
    """(index, multiplier) of the fewest `values` with pre + Σ multiplier · value = post; None if none do.

        |post − pre − Σ s v|_i ≤ SLACK · eps · (|pre| + |post| + Σ |s v|)_i   for every entry i

    Multipliers are least squares with every entry in units of its bound; 1 is tried before the estimate.
    Of sets of one size a plain sum goes before one with multipliers, then the closest. One set more is
    tried where the smallest has multipliers, or where 16 bits may hide a small write behind a large one.
    `dtype` is what the additions were made in.

    >>> a, b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, -1.0, 2.0])
    >>> [(i, round(s, 6)) for i, s in smallest_sum(a, a + 0.25 * b, [a, b], torch.float32)]
    [(1, 0.25)]
    """
    if not values:
        return None
    eps = rounding(dtype)
    before, after = (x.double().reshape(-1) for x in (pre, post))
    target = after - before
    A = torch.stack([value.double().reshape(-1) for value in values], dim=1)
    A = torch.where(A.isfinite(), A, 0.0)
    size = before.abs() + after.abs()
    if not size.any():  # nothing on either side: nothing tells that anything was added
        return None
    # Entries that are 0 on both sides would weigh without end.
    floor = eps * float(size.max()) * eps + torch.finfo(torch.float64).tiny
    weight = 1 / (eps * size + floor)
    weighted, aim = A * weight[:, None], target * weight
    gram, right, total = weighted.T @ weighted, weighted.T @ aim, aim @ aim
    # What a set leaves over may be this large in the Gram matrix's own rounding, and in the bound.
    room = 1e-3 * float(total.sqrt()) + 10 * SLACK * len(aim) ** 0.5

    def fit(index: list[int]) -> Fit | None:
        scales = torch.linalg.lstsq(weighted[:, index], aim[:, None]).solution[:, 0]
        ones = torch.where((scales - 1).abs() < max(1e-4, 4 * eps), 1.0, scales)
        for tried in (ones, scales):
            parts = A[:, index] * tried
            off = off_by(before, after, parts.unbind(1), eps)
            if float(off.abs().max()) <= SLACK and float(tried.abs().min()) > 1e-6:
                return Fit(index, tried.tolist(), float(off.square().mean().sqrt()))
        return None

    best: Fit | None = None
    for count in (1, 2, 3) if len(values) <= MANY else (1, 2):
        sets = torch.tensor(list(combinations(range(len(values)), count)), dtype=torch.long)
        sets = sets.reshape(-1, count)
        sets = sets[(gram.diagonal()[sets] > 0).all(1)]
        system, wanted = gram[sets[:, :, None], sets[:, None, :]], right[sets]
        scales = torch.linalg.lstsq(system, wanted[..., None], driver="gelsd").solution[..., 0]
        left = total - 2 * (scales * wanted).sum(1)
        left = left + torch.einsum("ni,nij,nj->n", scales, system, scales)
        near = sets[left.clamp_min(0).sqrt() <= room].tolist()
        fits = [found for index in near if (found := fit(index)) is not None]
        closest = min(fits, key=lambda found: (not found.plain, found.error), default=None)
        if best is not None:
            return closest.pairs if closest is not None and closest.beats(best) else best.pairs
        if closest is not None and closest.plain and eps < COARSE:
            return closest.pairs
        best = closest
    return None if best is None else best.pairs


def rounding(dtype: torch.dtype) -> float:
    """eps of the dtype that additions were made in, no less than what fits in float64 are good to."""
    return max(torch.finfo(dtype).eps, FITTED)


def off_by(pre: Tensor, post: Tensor, parts: Sequence[Tensor], eps: float) -> Tensor:
    """|post − pre − Σ parts| of every entry, in units of eps · (|pre| + |post| + Σ |part|)."""
    size = pre.abs() + post.abs()
    floor = eps * float(size.max()) * eps + torch.finfo(torch.float64).tiny
    left, bound = post - pre, size
    for part in parts:
        left, bound = left - part, bound + part.abs()
    return left.abs() / (eps * bound + floor)


@dataclass(frozen=True)
class Fit:
    """A set that explains the sum; `error` is the root mean square of its entries' share of the bound."""

    index: list[int]
    scales: list[float]
    error: float

    @property
    def plain(self) -> bool:
        return all(scale == 1 for scale in self.scales)

    @property
    def pairs(self) -> list[tuple[int, float]]:
        return list(zip(self.index, self.scales, strict=True))

    def beats(self, smaller: Fit) -> bool:
        """Whether a set one larger is the truer one: plain where the other is not, or clearly closer."""
        if self.plain != smaller.plain:
            return self.plain
        return self.error < smaller.error / CLEARLY
