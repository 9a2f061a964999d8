"""A norm read by asking it is the norm that its weights say.

Tolerances: float32 rounding of a few operations. A gain read where epsilon still counts would be off by
half of epsilon: 5e-6 at 1e-5.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from circuits.stream import Norm
from interp.models.weights import FrozenNorm

WIDTH = 48
NORMS = {
    "RMSNorm": lambda eps: LlamaRMSNorm(WIDTH, eps=eps),
    "Gemma's 1 + weight": lambda eps: GemmaRMSNorm(WIDTH, eps=eps),
    "LayerNorm": lambda eps: nn.LayerNorm(WIDTH, eps=eps),
    "LayerNorm without weights": lambda eps: nn.LayerNorm(WIDTH, eps=eps, elementwise_affine=False),
}


def made(name: str, eps: float) -> tuple[nn.Module, Tensor, Tensor]:
    """(norm, gain, bias), the weights drawn at random."""
    generator = torch.Generator().manual_seed(0)
    norm = NORMS[name](eps)
    for parameter in norm.parameters():
        parameter.data = torch.randn(WIDTH, generator=generator)
    weight = getattr(norm, "weight", None)
    gain = torch.ones(WIDTH) if weight is None else weight.detach()
    bias = getattr(norm, "bias", None)
    bias = torch.zeros(WIDTH) if bias is None else bias.detach()
    return norm, gain + 1 if "Gemma" in name else gain, bias


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3])
@pytest.mark.parametrize("name", NORMS)
def test_gain_and_bias_are_the_norms_own(name: str, eps: float) -> None:
    norm, gain, bias = made(name, eps)
    found = FrozenNorm(norm, WIDTH)
    assert found.centred == isinstance(norm, nn.LayerNorm)
    # eps / 2c² with c = 128: 3e-8 at the largest epsilon
    torch.testing.assert_close(found.gain, gain, rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(found.bias, bias, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("name", NORMS)
def test_a_folded_norm_is_the_norm(name: str, size: float) -> None:
    """x/σ times the gain, wherever the gain is folded, and σ with epsilon in it."""
    eps = 1e-3
    norm, gain, _ = made(name, eps)
    generator = torch.Generator().manual_seed(1)
    x = size * torch.randn(5, WIDTH, generator=generator)
    W = torch.randn(WIDTH, 7, generator=generator)
    held = FrozenNorm(norm, WIDTH)
    centred = held.centre(x)
    sigma = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(held.scale(x), sigma, rtol=3e-6, atol=0)
    folded = (centred / held.scale(x)) @ (held.gain[:, None] * W) + held.bias @ W
    torch.testing.assert_close(folded, norm(x) @ W, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        held.pull_back(W[:, 0].expand(5, -1), at=x),
        held.centre(W[:, 0] * gain) / sigma,
        rtol=1e-5,
        atol=1e-6 / size,
    )


@torch.no_grad()
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3])
@pytest.mark.parametrize("name", NORMS)
def test_epsilon_is_found(name: str, eps: float) -> None:
    norm, gain, _ = made(name, eps)
    found = Norm.of(norm, WIDTH, torch.device("cpu"))
    # Asked at a mean square of 1e-6, float32 tells no smaller epsilon than its rounding of that.
    assert found.eps == pytest.approx(eps, rel=1e-4, abs=1e-11)
    torch.testing.assert_close(found.gain, gain, rtol=2e-7, atol=1e-6)
    for size in (1e-3, 1.0):
        x = size * torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(found(x), norm(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_is_no_norm_is_left_as_it_is() -> None:
    """A model whose final norm was taken out: the direction of a logit is the unembedding's own."""
    held, x = FrozenNorm(nn.Identity(), WIDTH), torch.randn(3, WIDTH) + 5
    assert not held.centred
    torch.testing.assert_close(held.pull_back(x.flip(1), at=x), x.flip(1))
