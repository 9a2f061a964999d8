"""TextSpan: the few texts whose directions explain what a head of a CLIP writes.

Gandelsman, Efros & Steinhardt 2024, Interpreting CLIP's Image Representation via Text-Based Decomposition,
algorithm 1. They project texts on the first right-singular vectors of all contributions; ours on all that
the head's own contributions span.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

DRAWS = 4
"""Random turns that `by_chance` is a mean over."""
NEGLIGIBLE = 1e-9
"""Share of variance below which no text is chosen any more; rounding is far below it, in float64."""


@dataclass(frozen=True, eq=False)
class Span:
    """The texts that name what a head does, in order, and the variance they explain.

    Attributes:
        chosen: indices into the texts. explained: share of the variance after each of them.
        basis: their directions, each without those before it; unit vectors at right angles.
        rebuilt: the contributions projected on these directions, the mean kept.
    """

    chosen: list[int]
    explained: list[float]
    basis: Float[Tensor, "k d_embed"]
    rebuilt: Float[Tensor, "n d_embed"]


@torch.no_grad()
def text_span(
    contributions: Float[Tensor, "n d_embed"], texts: Float[Tensor, "n_texts d_embed"], k: int
) -> Span:
    """Greedy texts that explain most variance of a head's contributions (TextSpan, algorithm 1).

    Contributions are centred over images and texts are projected on the space that they span. Then, k
    times: the text r whose ⟨c, r⟩ has most variance over images is chosen, and its direction is taken
    out of all contributions and all texts. That a text is chosen does not show that the head means it:
    texts that were not offered may fit better.

    >>> found = text_span(torch.tensor([[0.0, 3], [0, -3], [1, 0], [-1, 0]]), torch.eye(2), 2)
    >>> found.chosen, [round(x, 3) for x in found.explained]
    ([1, 0], [0.9, 1.0])
    """
    centred, sizes, axes = _spectrum(contributions)
    chosen, explained, basis = _greedy(sizes, texts.double() @ axes.T, k)
    basis = basis @ axes
    rebuilt = contributions.double().mean(0) + centred @ basis.T @ basis
    return Span(chosen, explained, basis.to(contributions), rebuilt.to(contributions))


def by_chance(
    contributions: Float[Tensor, "n d_embed"],
    texts: Float[Tensor, "n_texts d_embed"],
    k: int,
    rng: torch.Generator,
) -> float:
    """Variance that greedy texts explain of the same contributions turned at random, mean over draws.

    Their spread and the choice among all texts stay; what is lost is which directions they have.
    """
    _, sizes, axes = _spectrum(contributions)
    found = []
    for _ in range(DRAWS if len(sizes) else 0):
        turned = torch.randn(axes.T.shape, generator=rng, dtype=torch.float64)
        explained = _greedy(sizes, texts.double() @ torch.linalg.qr(turned)[0], k)[1]
        found.append(explained[-1] if explained else 0.0)
    return float(np.mean(found)) if found else float("nan")


def _spectrum(contributions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Contributions less their mean, their singular values, and the axes they lie along [rank d_embed]."""
    centred = contributions.double() - contributions.double().mean(0)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    kept = sizes > NEGLIGIBLE * contributions.double().norm()
    return centred, sizes[kept], axes[kept]


def _greedy(sizes: Tensor, texts: Tensor, k: int) -> tuple[list[int], list[float], Tensor]:
    """Chosen texts, share explained after each, and their directions, in coordinates along the axes.

    The variance of ⟨c, r⟩ over images is ‖S r‖² there, so it costs the same for any number of images.
    """
    left, R, basis = torch.diag(sizes), texts, []
    chosen: list[int] = []
    explained: list[float] = []
    total, longest = float((sizes**2).sum()), float((texts**2).sum(1).max())
    while len(chosen) < k and total > 0:
        variance = ((left @ R.T) ** 2).sum(0)
        best = int(variance.argmax())
        if (
            float(variance[best]) <= NEGLIGIBLE * total * longest
        ):  # nothing is left, or no text fits
            break
        direction = R[best] / R[best].norm()
        left = left - (left @ direction)[:, None] * direction
        R = R - (R @ direction)[:, None] * direction
        chosen.append(best)
        explained.append(1 - float((left**2).sum()) / total)
        basis.append(direction)
    return chosen, explained, torch.stack(basis) if basis else texts.new_zeros(0, len(sizes))
