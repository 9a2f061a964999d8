"""Attention modules in a list of their own, called in turns with blocks: each is of the block behind it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.architectures import runs
from benchmarks.tiny_configs import tiny_model
from interp.errors import Refused
from interp.models.model import Model
from interp.run.edits import Edit
from interp.sites import CROSS_SITES

TO_SOURCE = [site for site in CROSS_SITES if site.startswith("cross_")]
IDS = torch.randint(10, 97, (2, 9), generator=torch.Generator().manual_seed(1))


@cache
def blt() -> Model:
    """A model of bytes: patches of them are read by an attention before each block of the last decoder."""
    return Model(tiny_model("blt", "BltForCausalLM", runs), id="blt")


def close(a: Tensor, b: Tensor) -> bool:
    """Equal to the rounding of a few blocks in float32."""
    return float((a - b).abs().max()) < 1e-5 * float(b.abs().max())


def aside(model: Model, layer: int) -> nn.Module:
    """The attention that stands before a block."""
    return model.module.get_submodule(f"model.local_decoder.cross_attn_layers.{layer}")


def test_the_blocks_are_mapped_and_the_attention_is_of_the_block_behind_it() -> None:
    model = blt()
    assert model.spec.stack == "model.local_decoder.layers"
    assert not model.spec.refused
    for layer, block in enumerate(model.spec.blocks):
        assert block.cross is not None and block.ahead
        assert model.module.get_submodule(block.cross.attention) is aside(model, layer)
        # The attention adds the stream to what its heads write, and code outside adds that to the stream.
        assert abs(block.cross.carry - 2) < 1e-6 and block.cross.write is not None
        assert len(block.writes) == 2
    for site in TO_SOURCE:
        assert model.layers_with(site) == list(range(model.n_layers))
    with pytest.raises(Refused, match=r"reads 2 times what the one before it returned"):
        model.require_sum("this test")


@torch.no_grad()
def test_the_final_residual_is_what_the_model_begins_with_and_every_write() -> None:
    model = blt()
    begun: list[Tensor] = []
    hook = aside(model, 0).register_forward_pre_hook(
        lambda module, args, kwargs: begun.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    run = model.run(IDS, capture=["embed", "attn_write", "mlp_write", "cross_write", "resid_post"])
    hook.remove()
    total = begun[0].double()
    for layer in range(model.n_layers):
        total = 2 * total + run.cache[f"cross_write.{layer}"]
        if layer == 0:
            assert close(total, run.cache["embed"])
        total = total + run.cache[f"attn_write.{layer}"] + run.cache[f"mlp_write.{layer}"]
        assert close(total, run.cache[f"resid_post.{layer}"])


@torch.no_grad()
def test_heads_attend_to_patches_and_sum_to_what_is_written() -> None:
    model = blt()
    run = model.run(IDS, capture=TO_SOURCE)
    for layer in range(model.n_layers):
        q, k, v, z, scores, pattern, out = (
            run.cache[f"cross_{name}.{layer}"]
            for name in ("q", "k", "v", "z", "scores", "pattern", "out")
        )
        assert k.shape[1] != q.shape[1] == IDS.shape[1]
        assert close(torch.einsum("bhqk,bkhd->bqhd", pattern, v), z)
        assert close(scores.softmax(-1), pattern)
        seen = pattern > 0
        made = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        assert close(scores[seen], made[seen])
        assert close(torch.einsum("bphd,hdm->bpm", z, model.W_O(layer, cross=True)), out)


@pytest.mark.parametrize("layer", [0, 2])
@torch.no_grad()
def test_an_edit_of_a_head_before_a_block_is_that_head_changed(layer: int) -> None:
    model = blt()

    def zero(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        x[..., 16:32] = 0
        return (x,)

    hook = aside(model, layer).o_proj.register_forward_pre_hook(zero)  # type: ignore[union-attr, operator]
    wanted = model.module(IDS, use_cache=False).logits
    hook.remove()
    edits = [Edit.zero("cross_z", heads=[(layer, 1)])]
    clean = model.run(IDS, capture=["resid_pre"])
    again, same = model.replay(clean, [edits, []], lambda run: run.logits)
    assert again is not None and same is not None and clean.logits is not None
    assert close(model.run(IDS, edits=edits).logits, wanted) and close(again, wanted)
    assert close(same, clean.logits) and not close(wanted, clean.logits)


def test_gradients_reach_what_stands_before_the_first_block_of_frozen_weights() -> None:
    model = blt()
    weights = list(model.module.parameters())
    found = []
    for needed in (True, False):
        for weight in weights:
            weight.requires_grad_(needed)
        run = model.run(IDS, capture=["cross_z", "cross_k", "cross_pattern"], grad=True)
        target = run.logits[:, -1, 5].sum()
        found.append([run.gradients(target, f"{site}.0") for site in run.cache])
    for weight in weights:
        weight.requires_grad_(True)
    for gradient, frozen in zip(*found, strict=True):
        assert gradient.any() and close(frozen, gradient)


def test_what_is_no_sum_of_the_stream_and_that_attention_is_refused() -> None:
    module = tiny_model("blt", "BltForCausalLM", runs)
    changed: Any = module.get_submodule("model.local_decoder.cross_attn_layers.1")
    changed.register_forward_hook(lambda module, args, out: (out[0].tanh(), out[1]))
    model = Model(module, id="blt")
    assert set(model.spec.refused) == set(CROSS_SITES) and not model.spec.absent
    with pytest.raises(Refused, match=r"cross_attn_layers.1' stands between blocks"):
        model.run(IDS, capture=["cross_z"])
    with pytest.raises(Refused, match="between blocks"):
        model.require_sum("this test")


@torch.no_grad()
def test_sites_are_what_plain_hooks_see() -> None:
    model = blt()
    read: list[Tensor] = []
    of = model.blocks[1]
    hook = of.register_forward_pre_hook(lambda module, args: read.append(args[0].clone()))
    plain = model.module(IDS, use_cache=False).logits
    hook.remove()
    run = model.run(IDS, capture=["resid_pre", "resid_post"])
    assert torch.equal(run.cache["resid_pre.1"], read[0])
    assert not torch.equal(run.cache["resid_pre.1"], run.cache["resid_post.0"])
    last = run.cache[f"resid_post.{model.n_layers - 1}"]
    for logits in (run.logits, model.unembed(last)):
        assert float((logits - plain).abs().max()) < 1e-5 * float(plain.abs().max())


@torch.no_grad()
def test_an_edit_of_a_head_is_that_head_changed() -> None:
    model = blt()
    columns = slice(16, 32)

    def zero(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        x[..., columns] = 0
        return (x,)

    edited = model.run(IDS, edits=[Edit.zero("z", heads=[(2, 1)])]).logits
    W_O = model.module.get_submodule(model.spec.blocks[2].W_O or "")
    hook = W_O.register_forward_pre_hook(zero)  # type: ignore[arg-type]
    wanted = model.module(IDS, use_cache=False).logits
    hook.remove()
    assert float((edited - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    assert not torch.equal(edited, model.run(IDS).logits)


# --- what is added in place -------------------------------------------------------------------------


def test_what_code_outside_adds_in_place_is_no_part_of_what_a_block_returned() -> None:
    """Granite's encoder of speech adds to what its first block returned, in the tensor itself."""
    module = tiny_model("granite_speech_encoder", "GraniteSpeechCTCEncoder", runs)
    model = Model(module, id="granite")
    assert not set(model.spec.refused) - model.spec.absent and not model.spec.chained
    assert "layers.0" in model.spec.copies
    given = {"hidden_states": torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(5))}
    kept: list[Tensor] = []
    hook = module.get_submodule("layers.0").register_forward_hook(
        lambda _, args, out: kept.append(out.clone())
    )
    with torch.no_grad():
        plain = module(**given).last_hidden_state
    hook.remove()
    sites = ["resid_post", "resid_pre", "attn_write"]
    for with_grad in (False, True):
        with torch.set_grad_enabled(with_grad):
            run = model.run(given, capture=sites)
        torch.testing.assert_close(run.cache["resid_post.0"], kept[0])
        assert run.logits is not None
        torch.testing.assert_close(run.logits, plain)
        added = run.cache["resid_pre.1"] - run.cache["resid_post.0"]
        assert float(added.detach().abs().max()) > 0.1
        torch.testing.assert_close(run.cache["resid_pre.2"], run.cache["resid_post.1"])
    twice = [Edit.apply("resid_post.0", lambda x, seen: 2 * x)]
    assert torch.equal(
        model.run(given, capture=["resid_post.0"], edits=twice).cache["resid_post.0"],
        2 * run.cache["resid_post.0"],
    )
    clean = model.run(given, capture=["resid_pre"])
    (replayed,) = model.replay(clean, [twice], lambda run: run.logits)
    torch.testing.assert_close(replayed, model.run(given, edits=twice).logits)
