"""Blocks that rescale the residual stream, or start it anew, before they add to it."""

from typing import Any

import pytest
import torch
from torch import nn

from interp.errors import Refused
from interp.models.model import Model
from interp.models.restarted import restarts
from interp.run.edits import Edit
from tests.families import FAMILIES

IDS = torch.randint(10, 97, (2, 9), generator=torch.Generator().manual_seed(1))


def test_heads_of_a_stream_rescaled_by_numbers_have_writes_of_their_own() -> None:
    """Σ_h z_h W_O + b_O is the write, and what a head adds is what the middle moves by."""
    model = Model(FAMILIES["doge"](), None, "doge")
    assert any(block.rescales for block in model.spec.blocks)
    assert all(block.direct for block in model.spec.blocks)
    run = model.run(IDS, capture=["z", "attn_write", "resid_mid"])
    for layer, block in enumerate(model.spec.blocks):
        z, W_O = run.cache[f"z.{layer}"], model.W_O(layer)
        heads = torch.einsum("bphd,hdm->bphm", z, W_O) * block.attn_write.scale
        made = heads.sum(2) + model.b_O(layer) * block.attn_write.scale
        torch.testing.assert_close(made, run.cache[f"attn_write.{layer}"], rtol=1e-4, atol=1e-5)
    without = z.clone()
    without[:, :, 1] = 0
    edited = model.run(IDS, capture=["resid_mid"], edits=[Edit.patch(f"z.{layer}", without)])
    moved = run.cache[f"resid_mid.{layer}"] - edited.cache[f"resid_mid.{layer}"]
    torch.testing.assert_close(moved, heads[:, :, 1], rtol=1e-4, atol=1e-5)


def test_a_block_that_starts_the_stream_anew_returns_its_writes_alone() -> None:
    """Blocks 0 and 2 of four: resid_post = attn_write + mlp_write; the others add resid_pre."""
    model = Model(FAMILIES["inkling2"](), None, "inkling2")
    assert [restarts(block) for block in model.spec.blocks] == [True, False, True, False]
    sites = ["resid_pre", "resid_mid", "resid_post", "attn_write", "mlp_write"]
    run = model.run(IDS, capture=sites)
    for layer, block in enumerate(model.spec.blocks):
        pre, mid, post, attn, mlp = (run.cache[f"{name}.{layer}"] for name in sites)
        before = torch.zeros_like(pre) if restarts(block) else pre
        torch.testing.assert_close(mid, before + attn, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(post, mid + mlp, rtol=1e-5, atol=1e-5)
    with pytest.raises(Refused, match="starts the residual stream anew"):
        model.require_sum("a sum of writes")


def test_an_edited_middle_of_a_restarting_block_goes_on() -> None:
    """resid_mid set to another prompt's is what that block then adds its MLP's output to."""
    model = Model(FAMILIES["inkling2"](), None, "inkling2")
    other = model.run(IDS.flip(0), capture=["resid_mid"]).cache["resid_mid.2"]
    sites = ["resid_mid", "mlp_write", "resid_post"]
    run = model.run(IDS, capture=sites, edits=[Edit.patch("resid_mid.2", other)])
    mid, mlp, post = (run.cache[f"{name}.2"] for name in sites)
    assert torch.equal(mid, other)
    torch.testing.assert_close(post, mid + mlp, rtol=1e-5, atol=1e-5)


def test_logits_that_earlier_blocks_are_read_for_are_not_unembedded() -> None:
    model = Model(FAMILIES["inkling2"](), None, "inkling2")
    assert "unembedding" in model.spec.absent
    run = model.run(IDS, capture=["resid_post"])
    last = run.cache["resid_post.3"]
    ends = [Edit.patch("resid_post.3", last)]
    assert not torch.allclose(model.run(IDS.flip(0), edits=ends).logits, run.logits, atol=1e-3)
    with pytest.raises(Refused, match="what earlier blocks read or returned"):
        model.unembed(last)


class Carrying(nn.Module):
    """A part of a block that returns the stream and something of its own: no write."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out, *rest = self.inner(x, *args, **kwargs)
        return (x + 0.5 * out.flip(-1), *rest)


def test_a_stream_carried_inside_a_module_is_not_taken_for_a_restart() -> None:
    """Its parts sum to what the block returns, but grow with what it reads."""
    module: Any = FAMILIES["llama"]()
    for layer in module.model.layers:
        layer.self_attn = Carrying(layer.self_attn)
        layer.forward = _without_residual.__get__(layer)
    assert not any(restarts(block) for block in Model(module, None, "carrying").spec.blocks)


def _without_residual(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    mid = self.self_attn(hidden_states, **kwargs)[0]
    return mid + self.mlp(self.post_attention_layernorm(mid))
