"""Attention modules in a list of their own, called in turns with blocks: the blocks are mapped, and it is said."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from benchmarks.architectures import runs
from benchmarks.tiny_configs import tiny_model
from interp.errors import Refused
from interp.models.model import Model
from interp.run.edits import Edit
from interp.sites import CROSS_SITES

IDS = torch.randint(10, 97, (2, 9), generator=torch.Generator().manual_seed(1))


@cache
def blt() -> Model:
    """A model of bytes: patches of them are read by an attention before each block of the last decoder."""
    return Model(tiny_model("blt", "BltForCausalLM", runs), id="blt")


def test_the_blocks_are_mapped_and_the_attention_between_them_is_refused_not_absent() -> None:
    model = blt()
    assert model.spec.stack == "model.local_decoder.layers"
    assert set(model.spec.refused) == set(CROSS_SITES) and not model.spec.absent
    with pytest.raises(Refused, match=r"cross_attn_layers' stands between blocks"):
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

    def zero(module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
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
