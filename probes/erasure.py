"""LEACE: the smallest change of a representation after which no linear probe can tell the classes apart.

The PyPI package `concept-erasure` (MIT, by the authors; it installs beside these dependencies and needs
torch alone) gives the same map when told not to shrink the covariance, as it does by default: the tests
compare with it. It is not required, because the map is one eigendecomposition and one SVD, the causal
check must work without a further installation, and both factors of the map are needed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from interp.errors import BadInput
from interp.run.edits import Edit, Positions
from interp.sites import Site, by_query

Vectors = TypeVar("Vectors", Tensor, np.ndarray)


@dataclass(frozen=True, eq=False)
class Eraser:
    """The affine map x' = x − (x − centre) @ read @ write, an oblique projection of rank `rank`.

    `read` are the directions in which the classes can be told apart: afterwards (x' − centre) @ read is
    zero. `write` is what is taken away along each of them; write @ read = 1.

    >>> rng = np.random.default_rng(0)
    >>> y = np.arange(100) % 2
    >>> x = rng.normal(size=(100, 5)) + 3 * y[:, None]
    >>> eraser = leace(x, y)
    >>> erased = eraser(x)
    >>> eraser.rank, bool(np.abs(erased[y == 1].mean(0) - erased[y == 0].mean(0)).max() < 1e-12)
    (1, True)
    """

    centre: Float[Tensor, " width"]
    read: Float[Tensor, "width rank"]
    write: Float[Tensor, "rank width"]

    @property
    def rank(self) -> int:
        """How many directions are taken away: at most the number of classes minus one."""
        return self.read.shape[1]

    def removed(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """What is taken away from each vector, (x − centre) @ read @ write, in at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        centre, read, write = (
            part.to(x.device, dtype) for part in (self.centre, self.read, self.write)
        )
        return (x.to(dtype) - centre) @ read @ write

    def __call__(self, x: Vectors) -> Vectors:
        """The vectors [... width] without what told the classes apart; same type as given."""
        given = torch.as_tensor(x)
        if given.shape[-1] != len(self.centre):
            raise BadInput(
                f"vectors of width {given.shape[-1]}: this eraser was made for width {len(self.centre)}"
            )
        erased = (given - self.removed(given)).to(given.dtype)
        return erased if isinstance(x, Tensor) else erased.numpy()  # type: ignore[return-value]

    def edit(
        self,
        site: str | Site,
        heads: Sequence[tuple[int, int]] | None = None,
        positions: Positions = None,
    ) -> Edit:
        """This erasure as an edit of a run, at a site with vectors of this width.

        >>> model = tiny_model()
        >>> ids = torch.arange(24).reshape(8, 3)
        >>> run = model.run(ids, capture=["resid_post.0"], logits=False)
        >>> eraser = leace(run.cache["resid_post.0"][:, -1], np.arange(8) % 2)
        >>> edit = eraser.edit("resid_post.0", positions=[2])
        >>> x = model.run(ids, capture=["resid_post.0"], edits=[edit]).cache["resid_post.0"][:, -1]
        >>> bool(((x - eraser.centre) @ eraser.read).abs().max() < 1e-4)
        True
        """
        if by_query(Site.parse(site).name):
            raise BadInput(
                f"site '{site}' holds attention weights, not vectors: nothing to erase there"
            )
        return Edit.apply(site, lambda x, seen: self(x), heads, positions)


def leace(
    x: Float[Tensor, "items width"] | Float[np.ndarray, "items width"],
    labels: Shaped[np.ndarray, " items"] | Sequence[str],
    *,
    shrinkage: float | None = 0.0,
) -> Eraser:
    """The least-squares smallest affine change of x after which no linear classifier beats a constant.

        x' = x − W⁺ P W (x − E[x]),   W = (Σ_xx^½)⁺,   P = projection on the columns of W Σ_xz

    with z the one-hot labels: Cov(x', z) = 0, and E‖x' − x‖² is the smallest that any affine map with
    this property has. It holds for the items it was fitted on. With few items for the width, W is badly
    known and what is read is noise of these items: shrink Σ_xx towards a multiple of the identity.
    Cov(x', z) = 0 holds for any shrinkage; 1 takes the differences of the class means away
    orthogonally, which is a larger change.

    It does not remove what a non-linear probe reads, nor what later layers compute again.

    Args:
        x: features. labels: one a item, of two or more classes.
        shrinkage: from 0 (exact LEACE) to 1 (orthogonal projection); None: as much as the items ask
            for (oracle-approximating shrinkage, OAS).

    Returns:
        An Eraser of rank at most the number of classes minus one; in float64.

    Raises:
        BadInput: not aligned, NaN, one class only, shrinkage out of range.

    Source: Belrose et al. 2023, "LEACE: Perfect linear concept erasure in closed form", theorem 4.3;
    Chen et al. 2010 for OAS.
    """
    x = torch.as_tensor(x).detach().cpu().double()
    if x.ndim != 2 or len(x) != len(labels):
        raise BadInput(
            f"features of shape {list(x.shape)} and {len(labels)} labels: give [items, width] and one "
            "label for every item"
        )
    if not bool(torch.isfinite(x).all()):
        raise BadInput("the features have NaN or infinite values: look at the site they came from")
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise BadInput(f"shrinkage={shrinkage}: give a number from 0 to 1, or None")
    classes, codes = np.unique(np.asarray(labels), return_inverse=True)
    if len(classes) < 2:
        raise BadInput("all labels are of one class: there is nothing to erase")
    z = torch.nn.functional.one_hot(torch.as_tensor(codes)).double()
    centre = x.mean(0)
    deviations = x - centre
    sigma = deviations.T @ deviations / len(x)
    values, vectors = torch.linalg.eigh(_shrunk(sigma, len(x), shrinkage))
    # Directions without variance hold nothing to erase; the bound is eigh's rounding.
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    root, vectors = values[kept].sqrt(), vectors[:, kept]
    whitened = (vectors.T @ deviations.T @ (z - z.mean(0)) / len(x)) / root[:, None]
    left, strength, _ = torch.linalg.svd(whitened, full_matrices=False)
    # Singular values are correlations: float32 features cannot show one below this.
    left = left[:, strength > 1e-8]
    return Eraser(centre, vectors @ (left / root[:, None]), (left * root[:, None]).T @ vectors.T)


def _shrunk(
    sigma: Float[Tensor, "width width"], n: int, shrinkage: float | None
) -> Float[Tensor, "width width"]:
    """(1 − ρ) Σ + ρ tr(Σ)/d · 1, with OAS's ρ where none is given."""
    d = len(sigma)
    level = sigma.trace() / d
    if shrinkage is None:
        spread = (sigma**2).mean()
        shrinkage = min(1.0, float((spread + level**2) / ((n + 1) * (spread - level**2 / d))))
    return (1 - shrinkage) * sigma + shrinkage * level * torch.eye(d, dtype=sigma.dtype)
