"""Blocks with three norms: the sums that they norm are found, and resid_mid is what the MLP reads."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.architectures import runs
from benchmarks.tiny_configs import tiny_model
from interp.models.model import Model
from interp.models.recording import record
from interp.models.stack import layers_of
from interp.models.sums import Sums, candidates_of
from interp.models.thrice import norm_by_norm
from interp.run.batch import Batch
from interp.run.edits import Edit

IDS = torch.randint(10, 97, (2, 7), generator=torch.Generator().manual_seed(1))
WIDTH = 32
ROUNDING = 1e-5
"""A few float32 roundings of one block; another module or norm would be off by order one."""


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@cache
def xmod() -> Model:
    return Model(tiny_model("xmod", "XmodForMaskedLM", runs), id="xmod")


def test_an_adapter_behind_the_mlp_is_a_third_write_and_one_norm_stands_in_two_places() -> None:
    model = xmod()
    assert not set(model.spec.refused) - model.spec.absent
    sites = ["resid_pre", "attn_write", "resid_mid", "mlp_write", "resid_post"]
    at = model.run(IDS, capture=sites).cache
    with torch.no_grad():
        for layer, block in enumerate(model.spec.blocks):
            module: Any = model.module.get_submodule(block.name)
            attends, norm = module.attention.output.LayerNorm, module.output.LayerNorm
            adapter = module.output.adapter_modules["en_XX"]
            mid, mlp = at[f"resid_mid.{layer}"], at[f"mlp_write.{layer}"]
            wanted = attends(at[f"resid_pre.{layer}"] + at[f"attn_write.{layer}"])
            assert off(mid, wanted) < ROUNDING
            assert off(mlp, module.output.dense(module.intermediate(mid))) < ROUNDING
            late = norm(mid + mlp)
            assert off(at[f"resid_post.{layer}"], norm(late + adapter(late))) < ROUNDING


def test_an_edit_of_the_middle_is_what_the_mlp_reads() -> None:
    model = xmod()
    read: list[Tensor] = []
    of: Any = model.blocks[1]
    hook = of.intermediate.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    model.run(IDS, edits=[Edit.zero("resid_mid.1")])
    hook.remove()
    assert not read[0].any()


def test_attention_that_is_not_seen_stands_between_attention_and_mlp() -> None:
    """A decoder that attends to images by sampling them: its middle is behind the second norm."""
    module = tiny_model("deformable_detr", "DeformableDetrModel", runs)
    model = Model(module, id="deformable_detr")
    assert not set(model.spec.refused) - model.spec.absent
    for block in model.spec.blocks:
        assert len(block.firsts) == 1 and block.norm_mid and block.norm_post and not block.lates
        assert block.attn_write and block.mlp_write and len(block.others) == 1
        assert block.others[0] in block.before_mid and block.mlp_write not in block.before_mid


# --- the sums, on blocks made by hand -------------------------------------------------------------


class Block(nn.Module):
    """Three sums with a norm after each; `hidden`: something else is added that no module returns."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])
        self.decoy = nn.Linear(WIDTH, WIDTH)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](x + self.parts[0](x))
        x = self.norms[1](x + self.parts[1](x.sin()) + 0 * self.decoy(x))
        more = self.parts[2](x)
        return self.norms[1](x + more + more.sin() if self.hidden else x + more)


class Net(nn.Module):
    main_input_name = "input_ids"

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, WIDTH)
        self.layers = nn.ModuleList([Block(hidden), Block(hidden)])

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(last_hidden_state=x)


@torch.no_grad()
def found_in(hidden: bool) -> Sums | None:
    torch.manual_seed(0)
    seen = record(Net(hidden), Batch.of_ids(IDS))
    layer = layers_of(seen, "layers")[1]
    return norm_by_norm(layer, 0, candidates_of(layer.inside, layer.hidden(0).shape))


def test_three_sums_are_found_with_a_norm_that_is_called_twice() -> None:
    sums = found_in(hidden=False)
    assert sums is not None
    assert [c.modules[0] for c, _ in sums.writes] == [f"layers.1.parts.{i}" for i in range(3)]
    assert sums.firsts == ((1, "layers.1.norms.0"),) and sums.n_before_mid == 2
    assert sums.norm_mid == sums.norm_post == "layers.1.norms.1"
    assert [scale for _, scale in sums.writes] == pytest.approx([1, 1, 1])


def test_what_no_module_returns_is_not_explained() -> None:
    assert found_in(hidden=True) is None


def test_what_norms_of_sums_return_beside_their_scale_is_no_write() -> None:
    """I-BERT is BERT with modules that return a scale besides: two norms, each of the stream with a write."""
    model = Model(tiny_model("ibert", "IBertForMaskedLM", runs), id="ibert")
    assert set(model.spec.refused) == model.spec.absent == {"unembedding"}
    sites = ["resid_pre", "attn_write", "resid_mid", "mlp_write", "resid_post"]
    at = model.run(IDS, capture=sites).cache
    layers: Any = model.blocks
    with torch.no_grad():
        for layer, block in enumerate(layers):
            pre, attn, mid, mlp, post = (at[f"{site}.{layer}"] for site in sites)
            assert off(block.attention.output.LayerNorm(pre + attn)[0], mid) < ROUNDING
            assert off(block.output.LayerNorm(mid + mlp)[0], post) < ROUNDING
