"""Attention over blocks whose queries enter a product with positions too (Gemma 4's audio encoder), by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import softplus

from interp.models.model import Model
from interp.models.probe import probe_batch
from interp.run.edits import Edit

ROUNDING = 1e-5
"""A few float32 roundings, two blocks deep."""
N_HEADS, LEFT, CAP = 4, 5, 2.0
SITES = ["q", "k", "v", "scores", "pattern", "z"]


def module() -> Any:
    """Blocks of 4 positions; each sees itself and the three before it; scores are capped where they are not small."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.Gemma4AudioConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=N_HEADS,
            subsampling_conv_channels=[128, 8],
            attention_chunk_size=4,
            attention_context_left=LEFT,
            attention_logit_cap=CAP,
            output_proj_dims=32,
        )
        made: Any = transformers.Gemma4AudioModel(config).eval()
        assert sum(parameter.numel() for parameter in made.parameters()) < 100_000
        with torch.no_grad():
            for parameter in made.parameters():
                noise = 0.2 * torch.randn_like(parameter)
                parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return made


@cache
def model() -> Model:
    return Model(module(), id="gemma4 audio")


def captured(edits: list[Edit] | None = None) -> Any:
    return model().run(probe_batch(model().module), capture=SITES, edits=edits or []).cache


def off(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


def scores_by_hand(attention: Any, q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """cap·tanh((q·k + q·r)/cap), r of the distance; -inf where a query does not see."""
    n, d_head = q.shape[1], q.shape[-1]
    q = q * attention.q_scale * softplus(attention.per_dim_scale)
    # positions [1, LEFT, d_model] are of the distances LEFT - 1 … 0
    r = attention.relative_k_proj(positions)[0].unflatten(-1, (N_HEADS, d_head))
    distance = torch.arange(n)[:, None] - torch.arange(n)[None]
    sees = (distance >= 0) & (distance < LEFT - 1)
    of_pairs = r[(len(r) - 1 - distance).clamp(0, len(r) - 1)]
    content = torch.einsum("bihd,bjhd->bhij", q, k * attention.k_scale)
    scores = content + torch.einsum("bihd,ijhd->bhij", q, of_pairs)
    return (CAP * (scores / CAP).tanh()).masked_fill(~sees, -torch.inf)


@pytest.mark.parametrize("layer", [0, 1])
def test_scores_are_made_of_q_and_k_as_they_are_given(layer: int) -> None:
    assert not {*SITES, "attn_out"} & set(model().spec.refused)
    attention: Any = model().blocks[layer].self_attn
    positions: list[Tensor] = []
    handle = attention.relative_k_proj.register_forward_pre_hook(
        lambda _, args: positions.append(args[0])
    )
    try:
        cache = captured()
    finally:
        handle.remove()
    with torch.no_grad():
        wanted = scores_by_hand(
            attention, cache[f"q.{layer}"], cache[f"k.{layer}"], positions[0][:, -LEFT:]
        )
        pattern = wanted.softmax(-1)
    shown = cache[f"scores.{layer}"]
    sees = wanted > -torch.inf
    assert off(shown[sees], wanted[sees]) < ROUNDING
    assert off(cache[f"pattern.{layer}"], pattern) < ROUNDING
    assert (
        off(cache[f"z.{layer}"], torch.einsum("bhij,bjhd->bihd", pattern, cache[f"v.{layer}"]))
        < 1e-5
    )


@pytest.mark.parametrize("site", ["q", "k"])
def test_an_edit_changes_the_scores_of_its_head_and_position(site: str) -> None:
    clean = captured()
    edited = captured([Edit.zero(site, heads=[(1, 2)], positions=[3])])
    changed = (edited["scores.1"] != clean["scores.1"]).any(0)
    heads, queries, keys = (set(found.tolist()) for found in changed.nonzero().unbind(-1))
    assert heads == {2}
    assert (queries if site == "q" else keys) == {3}
    assert torch.equal(edited["scores.0"], clean["scores.0"])


def _reading_the_stream(attention: Any, x: Tensor, shifted: Tensor) -> Tensor:
    return shifted + x.mean()


def _of_another_head(attention: Any, x: Tensor, shifted: Tensor) -> Tensor:
    return shifted.roll(1, 1)


@pytest.mark.parametrize("change", [_reading_the_stream, _of_another_head])
def test_scores_that_read_something_else_have_no_q_and_k(
    change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream itself, or queries of another head."""
    other = module()
    kind: Any = type(other.layers[0].self_attn)
    forward, shift = kind.forward, kind._rel_shift

    def noted(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        self.__dict__["read"] = hidden_states
        return forward(self, hidden_states, **kwargs)

    monkeypatch.setattr(kind, "forward", noted)
    monkeypatch.setattr(kind, "_rel_shift", lambda self, x: change(self, self.read, shift(self, x)))
    refused = Model(other, id="other").spec.refused
    assert {"q", "k"} <= set(refused) and not {"v", "pattern", "z"} & set(refused)
