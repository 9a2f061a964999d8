"""Models that make much of a rounding: verified with their own eager attention, and said so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from interp.models import attention
from interp.models.attention import implementation
from interp.models.calls import output_tensor
from interp.models.model import Model
from tests.families import FAMILIES

WIDTH, N_HEADS = 32, 4


def eager(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention as transformers' models have it, with its softmax in float32 also where they are in float64."""
    scores = q @ k.mT * scaling
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    pattern = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    return (pattern @ v).transpose(1, 2).contiguous(), pattern


class Attention(nn.Module):
    is_causal = True

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.get_submodule(name)(x).unflatten(-1, (N_HEADS, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        name = self.config._attn_implementation_internal
        attend: Any = AttentionInterface().get_interface(name, eager)
        z, _ = attend(self, q, k, v, None, scaling=q.shape[-1] ** -0.5)
        return self.o_proj(z.flatten(2))


class Block(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), Attention(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


class Chooser(nn.Module):
    """Adds to its logits a row of its own that the last bits of the stream choose."""

    def __init__(self, chooses: bool) -> None:
        super().__init__()
        self.config = PreTrainedConfig(vocab_size=97, max_position_embeddings=64)
        self.config._attn_implementation_internal = "sdpa"
        self.embed = nn.Embedding(97, WIDTH)
        self.blocks = nn.ModuleList(Block(self.config) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 97, bias=False)
        self.chosen, self.chooses = nn.Parameter(torch.randn(2, 97)), chooses

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if not self.chooses:
            return SimpleNamespace(logits=logits)
        # Near ties: bins of the stream a rounding of float32 wide, also of a softmax in float32 where all else is in
        # float64, and far wider than those of float64.
        bins = (x[..., 0] * 2**24).floor().long() % 2
        return SimpleNamespace(logits=logits + self.chosen[bins])


def chooser(chooses: bool = True, name: str = "sdpa") -> Chooser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Chooser(chooses).eval()
    module.config._attn_implementation_internal = name
    return module


IDS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(3))


def apart(module: nn.Module) -> float:
    made = []
    for name in ("eager", "sdpa"):
        with implementation(module, name), torch.no_grad():
            made.append(module(IDS).logits)
    return float((made[0] - made[1]).abs().max())


def test_a_choice_by_rounding_is_verified_with_eager_attention_and_said() -> None:
    module = chooser()
    assert apart(module) > 0.5
    model = Model(module)
    assert not {"q", "k", "v", "scores", "pattern", "z"} & set(model.spec.refused)
    check = next(check for check in model.spec.checks if check.name == "window")
    assert check.passed and "eager" in check.detail
    note = next(note for note in model.notes if "eager" in note)
    assert f"{model.spec.between_kernels:.1e}" in note and model.spec.between_kernels > 0.1
    with implementation(module, "eager"), torch.no_grad():
        wanted = module(IDS).logits
    torch.testing.assert_close(model.run(IDS, capture=["pattern"]).logits, wanted)


def other_order(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """The same attention, in an order of its own: it rounds as no other does."""
    order = torch.arange(v.shape[-2]).flip(0)
    scores = (q * scaling) @ k[..., order, :].mT
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool()[:, order], -torch.inf)
    pattern = torch.softmax(scores, -1)
    return (pattern @ v[..., order, :]).transpose(1, 2).contiguous(), pattern


def test_a_choice_by_rounding_that_no_own_attention_makes_is_verified_in_float64_and_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(globals(), "eager", other_order)
    module = chooser(name="eager")
    with torch.no_grad():
        own = module(IDS).logits
    model = Model(module)
    assert not {"q", "k", "v", "scores", "pattern", "z"} & set(model.spec.refused)
    check = next(check for check in model.spec.checks if check.name == "window")
    assert check.passed and "float64" in check.detail
    apart = float((model.run(IDS, capture=["pattern"]).logits - own).abs().max())
    assert model.spec.in_float64 > 0.1 and apart > 0.1
    assert any(f"{model.spec.in_float64:.1e}" in note and "float64" in note for note in model.notes)
    exact = Model(chooser(name="eager").double())
    assert not exact.notes and not exact.spec.in_float64


def test_loaded_with_eager_attention_it_needs_no_note() -> None:
    model = Model(chooser(name="eager"))
    assert (
        not model.notes and not model.spec.between_kernels and "pattern" not in model.spec.refused
    )


def test_a_model_that_passes_runs_no_forward_with_its_eager_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def called(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("its eager attention was run")

    module = chooser(chooses=False)
    assert apart(module) < 1e-5
    monkeypatch.setitem(globals(), "eager", called)
    assert not Model(module).notes


@pytest.mark.parametrize("chooses", [False, True])
def test_a_window_that_is_wrong_is_refused(chooses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._softmax
    monkeypatch.setattr(attention, "_softmax", lambda scores, sinks: right(1.01 * scores, sinks))
    model = Model(chooser(chooses))
    assert "equal the model's own" in model.spec.refused["pattern"] and not model.notes


def test_attentions_that_compute_different_things_are_not_taken_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The window is the eager attention to the last bit; what the model runs is another."""

    def sharper(*args: Any, scaling: float, **kwargs: Any) -> Any:
        return sdpa_attention_forward(*args, scaling=1.3 * scaling, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sharper)
    model = Model(chooser(chooses=False))
    assert "equal the model's own" in model.spec.refused["pattern"] and not model.notes


@pytest.mark.parametrize("name", ["gemma2", "splinter"])
def test_eager_attention_in_float64_is_seen_with_its_softmax_in_float32(name: str) -> None:
    """Transformers' eager attention has its softmax in float32 whatever the scores are in."""
    module = FAMILIES[name]().double()
    model, ids = Model(module), torch.arange(10, 20)[None]
    assert not set(model.spec.refused) - model.spec.absent
    with torch.no_grad():
        own = output_tensor(module(ids))
    for capture in ([], ["pattern"]):
        assert float((model.run(ids, capture=capture).logits - own).abs().max()) < 1e-14
