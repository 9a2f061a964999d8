"""Products of two low-rank factors compared without being formed: how alike, how changed, and what no basis changes.

W = L Rᵀ is [d_model d_model] and of rank d_head. ⟨L Rᵀ, L' R'ᵀ⟩ = Σ (Lᵀ L') ⊙ (Rᵀ R'): everything here costs
[d_head d_head] products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Circuit:
    """One kind of circuit of every head of a layer, W = left @ rightᵀ: [d_model d_model], never formed.

    left: [n_distances n_heads d_model d_head]; right: [n_heads d_model d_head]. W_OV has one "distance".
    """

    left: Float[Tensor, "n_distances n_heads d_model d_head"]
    right: Float[Tensor, "n_heads d_model d_head"]

    @property
    def shape(self) -> tuple[int, int]:
        """(n_heads, d_model)."""
        return self.right.shape[0], self.right.shape[1]

    def on_axes(self, order: Tensor, sign: Tensor) -> Circuit:
        """The same circuits in a residual stream whose axes are put in another order and turned."""
        return Circuit(
            self.left[:, :, order] * sign[:, None],
            self.right[:, order] * sign[:, None],
        )


def products(a: Circuit, b: Circuit) -> Float[Tensor, "heads_a heads_b"]:
    """⟨W_a, W_b⟩ = tr(W_aᵀ W_b) of every two heads, summed over distances: by [d_head d_head] products."""
    right = torch.einsum("amd,bme->abde", a.right, b.right)
    return sum(
        (
            (torch.einsum("amd,bme->abde", x, y) * right).sum((2, 3))
            for x, y in zip(a.left, b.left, strict=True)
        ),
        torch.zeros(()),
    )


def norms(a: Circuit) -> Float[Tensor, " heads"]:
    """‖W‖_F of every head, over all distances."""
    right = a.right.transpose(1, 2) @ a.right
    squares = ((a.left.transpose(-1, -2) @ a.left) * right).sum((0, 2, 3))
    return squares.clamp_min(0).sqrt()


def cosines(a: Circuit, b: Circuit) -> Float[Tensor, "heads_a heads_b"]:
    """⟨W_a, W_b⟩ / ‖W_a‖ ‖W_b‖ of every two heads; 0 where a head has no weights."""
    both = norms(a)[:, None] * norms(b)
    return torch.where(both > 0, products(a, b) / both.clamp_min(1e-30), 0.0)


def changes(a: Circuit, b: Circuit) -> Float[Tensor, " heads"]:
    """‖W_b − W_a‖_F / ‖W_a‖_F of heads in the same place, exactly 0 where nothing changed.

    W_b − W_a = (L_b − L_a) R_bᵀ + L_a (R_b − R_a)ᵀ, so small changes do not drown in rounding. A head without
    weights that gets some changed by infinity.
    """
    left_a, left_b, right_a, right_b = (
        x.double() for x in (a.left, b.left, a.right[None], b.right[None])
    )
    left = torch.cat([left_b - left_a, left_a], dim=-1)
    right = torch.cat([right_b, right_b - right_a], dim=-1)
    difference = norms(Circuit(left, right[0]))
    before = norms(Circuit(left_a, right_a[0]))
    return torch.where(difference == 0, 0.0, difference / before)


def invariants(circuit: Circuit) -> dict[str, Float[Tensor, " heads"]]:
    """Numbers of each head's W (at distance 0) that are the same in any basis and of no unit.

    rank: exp(entropy of s² / Σ s²) / d_head, s the singular values: 1 where all are alike. top: s₁² / Σ s².
    sign: Σ Re λ / Σ |λ| of the eigenvalues: 1 where what is read is written (or sought), −1 where its opposite
    is. symmetry: ‖(W + Wᵀ) / 2‖² / ‖W‖²: 1 where W is symmetric, 0 where antisymmetric.

    They do not say which directions a head reads; heads that do different things can share all of them.

    Source: eigenvalues of W_OV, Elhage et al. 2021; effective rank, Roy & Vetterli 2007.
    """
    left, right = circuit.left[0].double(), circuit.right.double()
    d_head = left.shape[-1]
    _, inner = torch.linalg.qr(left)
    _, outer = torch.linalg.qr(right)
    s = torch.linalg.svdvals(inner @ outer.transpose(-1, -2)).square()
    total = s.sum(-1)
    share = s / total[:, None].clamp_min(1e-300)
    entropy = -(share * share.clamp_min(1e-300).log()).sum(-1)
    core = right.transpose(-1, -2) @ left
    values = torch.linalg.eigvals(core)
    # tr(W W) = Σ λ²
    mirrored = (core @ core).diagonal(dim1=-2, dim2=-1).sum(-1)
    dead = total <= 0
    found = {
        "rank": entropy.exp() / d_head,
        "top": share[:, 0],
        "sign": values.real.sum(-1) / values.abs().sum(-1).clamp_min(1e-300),
        "symmetry": (1 + mirrored / total.clamp_min(1e-300)) / 2,
    }
    return {name: x.masked_fill(dead, float("nan")).float() for name, x in found.items()}
