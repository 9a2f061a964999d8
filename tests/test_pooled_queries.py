"""Hiera: attention within units that lie across positions, of one layer that makes q, k and v, pooled at a stage."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.model import Model
from interp.models.pooling import Pooling
from interp.run.edits import Edit

PIXELS = {
    "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
}
ROUNDING = 1e-5
"""A few float32 roundings, four blocks deep."""
POOLED = 2
"""The layer whose queries are of four positions each; the others have one for each."""


@cache
def hiera() -> Any:
    torch.manual_seed(0)
    config = transformers.HieraConfig(
        image_size=[32, 32],
        patch_size=[7, 7],
        patch_stride=[4, 4],
        patch_padding=[3, 3],
        masked_unit_size=[4, 4],
        depths=[2, 2],
        num_heads=[2, 4],
        embed_dim=16,
        num_query_pool=1,
        masked_unit_attention=[True, False],
        drop_path_rate=0.0,
    )
    module: Any = transformers.HieraForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return Model(module, id="hiera")


def off(got: Any, wanted: Any) -> float:
    assert got.shape == wanted.shape
    return float(((got - wanted).abs().max() / wanted.abs().max()).detach())


@torch.no_grad()
def own_patterns() -> list[Tensor]:
    """What each attention module says that its weights are [batch heads units q k]."""
    model, found = hiera(), []

    def ask(module: Any, args: tuple, kwargs: dict, out: Any) -> None:
        found.append(type(module).forward(module, args[0], output_attentions=True)[1])

    hooks = [block.attn.register_forward_hook(ask, with_kwargs=True) for block in model.blocks]
    model.module(**PIXELS)
    for hook in hooks:
        hook.remove()
    return found


def test_patterns_are_the_models_own_between_positions() -> None:
    """Position p of the stream is token p // n_units of unit p % n_units."""
    model = hiera()
    assert model.n_layers == 4 and model.spec.attention_layers == [0, 1, 2, 3]
    run = model.run(PIXELS, capture=["pattern", "scores", "v", "z", "attn_out"])
    with torch.no_grad():
        assert torch.equal(run.logits, model.module(**PIXELS).logits)
    for layer, own in enumerate(own_patterns()):
        n_units, n_queries, n_keys = own.shape[2:]
        pattern = run.cache[f"pattern.{layer}"]
        assert pattern.shape[2:] == (n_queries * n_units, n_keys * n_units)
        assert (n_queries < n_keys) is (layer == POOLED)
        seen = pattern.unflatten(3, (n_keys, n_units)).unflatten(2, (n_queries, n_units))
        for query in range(n_units):
            for key in range(n_units):
                part = seen[:, :, :, query, :, key]
                if query == key:
                    assert off(part, own[:, :, query]) < ROUNDING
                else:
                    assert not part.any()
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, run.cache[f"v.{layer}"])
        assert off(z, run.cache[f"z.{layer}"]) < ROUNDING
        heads = torch.einsum("bphd,hdm->bpm", z, model.W_O(layer)) + model.b_O(layer)
        assert off(heads, run.cache[f"attn_out.{layer}"]) < ROUNDING


def test_an_empty_edit_changes_nothing() -> None:
    model = hiera()
    sites = ["pattern", "scores", "q", "k", "v", "z", "resid_post", "mlp_out"]
    same = [Edit.apply(site, lambda x, seen: x) for site in sites]
    assert torch.equal(model.run(PIXELS, edits=same).logits, model.run(PIXELS).logits)


@pytest.mark.parametrize("layer", [1, POOLED, 3])
@pytest.mark.parametrize("site", ["z", "q", "k", "v", "pattern"])
def test_an_edit_of_a_head_is_a_plain_hook_on_the_module(site: str, layer: int) -> None:
    model = hiera()
    attn, of = model.blocks[layer].attn, model.spec.blocks[layer]
    columns = slice(of.d_head, 2 * of.d_head)  # head 1

    def read(module: nn.Module, args: tuple) -> tuple[Tensor]:
        x = args[0].clone()
        x[..., columns] = 0
        return (x,)

    def returned(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        out = out.clone()
        start = "qkv".index(site) * attn.hidden_size_output + columns.start
        out[..., start : start + of.d_head] = 0
        return out

    hook = (
        attn.qkv.register_forward_hook(returned)
        if site in "qkv"
        else attn.proj.register_forward_pre_hook(read)
    )
    with torch.no_grad():
        wanted = model.module(**PIXELS).logits
    hook.remove()
    edit = Edit.zero(site, heads=[(layer, 1)])
    run = model.run(PIXELS, capture=["resid_pre"])
    (replayed,) = model.replay(run, [[edit]], lambda variant: variant.logits)
    for got in (model.run(PIXELS, edits=[edit]).logits, replayed):
        assert off(got, wanted) < ROUNDING < off(run.logits, wanted)


def test_gradients_are_those_of_small_changes() -> None:
    model = hiera()
    run = model.run(PIXELS, capture=["q", "k", "v", "z", "pattern"], grad=True)
    target = run.logits[:, 1].sum()
    for site in ("q.2", "k.2", "v.1", "z.2", "pattern.2", "pattern.3"):
        step = torch.randn(run.cache[site].shape, generator=torch.Generator().manual_seed(2))
        step = step * (run.cache[site] != 0)
        slope = float((run.gradients(target, site) * step).sum())
        near = [
            model.run(PIXELS, edits=[Edit.add(site, by * step)]).logits[:, 1].sum()
            for by in (-1e-2, 1e-2)
        ]
        assert float(near[1] - near[0]) / 2e-2 == pytest.approx(slope, rel=5e-2, abs=1e-3)


@torch.no_grad()
def test_queries_and_keys_make_the_scores() -> None:
    """Those that are pooled too: the largest of four, from what the module's layer returns."""
    model = hiera()
    run = model.run(PIXELS, capture=["q", "k", "v", "scores", "resid_pre"])
    for layer, block in enumerate(model.blocks):
        q, k, scores = (run.cache[f"{site}.{layer}"] for site in ("q", "k", "scores"))
        visible = scores.isfinite()
        wanted = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        assert bool(visible.any()) and off(scores[visible], wanted[visible]) < ROUNDING
        made: Any = block
        made = made.attn.qkv(made.layernorm_before(run.cache[f"resid_pre.{layer}"]))
        parts = made.unflatten(-1, (3, *k.shape[2:])).unbind(2)
        largest = parts[0].unflatten(1, (4, -1)).amax(1) if layer == POOLED else parts[0]
        assert off(q, largest) < ROUNDING and off(k, parts[1]) < ROUNDING
        assert off(run.cache[f"v.{layer}"], parts[2]) < ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, POOLED])
def test_an_edit_of_one_query_changes_its_scores_alone(layer: int) -> None:
    model = hiera()
    run = model.run(PIXELS, capture=["q", "k", "scores"])
    new = run.cache[f"q.{layer}"].flip(1)
    edits = [Edit.patch("q", new, heads=[(layer, 1)], positions=[3])]
    edits += [Edit.scale("v", 2.0, heads=[(layer, 0)])]  # of the same layer's columns
    both = model.run(PIXELS, ["q", "k", "v", "scores"], edits)
    k, scores = run.cache[f"k.{layer}"][:, :, 1], run.cache[f"scores.{layer}"].clone()
    row = torch.einsum("bd,bkd->bk", new[:, 3, 1], k) / k.shape[-1] ** 0.5
    scores[:, 1, 3] = row.where(scores[:, 1, 3].isfinite(), scores[:, 1, 3])
    seen, got = scores.isfinite(), both.cache[f"scores.{layer}"]
    assert torch.equal(seen, got.isfinite()) and off(got[seen], scores[seen]) < ROUNDING
    assert off(got[seen], run.cache[f"scores.{layer}"][seen]) > 10 * ROUNDING
    v = model.run(PIXELS, [f"v.{layer}"]).cache[f"v.{layer}"]
    v[:, :, 0] *= 2
    assert torch.equal(both.cache[f"v.{layer}"], v)


def test_queries_that_are_not_the_largest_or_the_mean_are_refused(monkeypatch: Any) -> None:
    model, largest = hiera(), torch.Tensor.max

    def smallest(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return largest(x, *args, **kwargs) if x.ndim != 6 else x.min(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "max", smallest)
    other = Model(deepcopy(model.module), id="smallest")
    for site in ("q", "k"):
        with pytest.raises(Refused, match="through queries and keys alone"):
            other.run(PIXELS, capture=[site])
    assert other.layers_with("z") == [0, 1, POOLED, 3]


@torch.no_grad()
def test_what_begins_a_stage_is_pooled_and_what_is_written_adds_to_it() -> None:
    model = hiera()
    block: Any = model.blocks[POOLED]
    sites = ("resid_pre", "attn_write", "resid_mid", "mlp_write", "resid_post")
    of = {site: model.run(PIXELS, [f"{site}.{POOLED}"]).cache[f"{site}.{POOLED}"] for site in sites}
    (shortcut,) = model.spec.blocks[POOLED].others
    assert shortcut.pooling == Pooling("max", "across", (4,))
    begun = block.proj(block.layernorm_before(of["resid_pre"])).unflatten(1, (4, -1)).amax(1)
    assert off(begun + of["attn_write"], of["resid_mid"]) < ROUNDING
    assert off(of["resid_mid"] + of["mlp_write"], of["resid_post"]) < ROUNDING
    step = torch.randn(of["resid_mid"].shape, generator=torch.Generator().manual_seed(3))
    edited = model.run(PIXELS, ["resid_post"], [Edit.add(f"resid_mid.{POOLED}", step)])
    mid = of["resid_mid"] + step
    wanted = mid + block.mlp(block.layernorm_after(mid))
    assert off(edited.cache[f"resid_post.{POOLED}"], wanted) < ROUNDING


@torch.no_grad()
def test_writes_of_a_stage_sum_to_its_stream() -> None:
    model = hiera()
    run = model.run(PIXELS, capture=["resid_pre", "attn_write", "mlp_write", "resid_post"])
    total = run.cache["resid_pre.0"].double()
    for layer in (0, 1):
        total = total + run.cache[f"attn_write.{layer}"] + run.cache[f"mlp_write.{layer}"]
    assert off(total, run.cache["resid_post.1"]) < ROUNDING
