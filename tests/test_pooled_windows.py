"""SAM 2: queries pooled inside windows, at the start of a stage, against the block written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d, pad
from transformers.models.sam2 import modeling_sam2

from interp.errors import Refused
from interp.models.model import Model
from interp.models.pooling import Pooling
from interp.run.batch import Batch
from interp.run.edits import Edit
from interp.run.statistics import Expected
from interp.terminal import print_map

ROUNDING = 1e-5
"""A few float32 roundings, six blocks deep."""
POOLED = {2: 4, 4: 6}
"""Layers that pool, and the rows and columns of their windows: those of the second do not divide 8 × 8 positions."""
SITES = ("q", "k", "v", "scores", "pattern", "z")
Change = Callable[[str, Tensor], Tensor]


def images(side: int = 64, rows: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(side)
    return Batch({"pixel_values": torch.randn(rows, 3, side, side, generator=generator)})


def tower() -> Any:
    """Three stages of two blocks, on 16 × 16, 8 × 8 and 4 × 4 positions of images of 64 × 64."""
    torch.manual_seed(0)
    config = transformers.Sam2HieraDetConfig(
        hidden_size=16,
        num_attention_heads=2,
        image_size=[64, 64],
        embed_dim_per_stage=[16, 32, 48],
        num_attention_heads_per_stage=[2, 4, 4],
        blocks_per_stage=[2, 2, 2],
        window_size_per_stage=[4, 6, 4],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
        num_query_pool_stages=2,
    )
    module: Any = transformers.Sam2HieraDetModel(config).eval()
    assert sum(parameter.numel() for parameter in module.parameters()) < 200_000
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


@cache
def sam2() -> Model:
    return Model(tower(), id="sam2")


def off(got: Tensor | None, wanted: Tensor) -> float:
    assert got is not None and got.shape == wanted.shape
    return float(((got - wanted).abs().max() / wanted.abs().max()).detach())


def as_it_is(name: str, x: Tensor) -> Tensor:
    return x


def by_hand(block: Any, x: Tensor, side: int, change: Change = as_it_is) -> dict[str, Tensor]:
    """Sites of a block that pools, of its input [batch height width d]: attention over all pairs of positions.

    Keys that are padding stand behind the positions, in rows and columns.
    """
    n, n_heads = x.shape[1], block.attn.num_attention_heads
    normed = block.layer_norm1(x)
    more = -n % side
    whole = pad(normed, (0, 0, 0, more, 0, more))
    n_all = n + more
    qkv = block.attn.qkv(whole).unflatten(-1, (3, n_heads, -1)).permute(3, 0, 4, 1, 2, 5)
    q, k, v = qkv  # [batch heads height width d_head]
    q = max_pool2d(q.permute(0, 1, 4, 2, 3).flatten(0, 1), 2).unflatten(0, q.shape[:2])
    q = q.permute(0, 1, 3, 4, 2)
    inside = (torch.arange(n_all) < n)[:, None] & (torch.arange(n_all) < n)
    order = torch.cat([inside.flatten().nonzero()[:, 0], (~inside).flatten().nonzero()[:, 0]])
    k, v = (each.flatten(2, 3)[:, :, order].transpose(1, 2) for each in (k, v))
    q = q[:, :, : n // 2, : n // 2].flatten(2, 3).transpose(1, 2)
    q, k, v = (change(name, each) for name, each in (("q", q), ("k", k), ("v", v)))
    window = torch.arange(n_all) // side
    of_key = (window[:, None] * n_all + window).flatten()[order]
    window = torch.arange(n // 2) // (side // 2)
    of_query = (window[:, None] * n_all + window).flatten()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(of_query[:, None] != of_key[None], -torch.inf)
    scores = change("scores", scores)
    pattern = change("pattern", scores.softmax(-1))
    z = change("z", torch.einsum("bhqk,bkhd->bqhd", pattern, v))
    attn = block.attn.proj(z.flatten(2)).unflatten(1, (n // 2, n // 2))
    shortcut = max_pool2d(block.proj(normed).movedim(-1, 1), 2).movedim(1, -1)
    mid = shortcut + attn
    mlp = block.mlp(block.layer_norm2(mid))
    found = {"attn_write": attn, "resid_mid": mid, "mlp_write": mlp, "resid_post": mid + mlp}
    found = {name: each.flatten(1, 2) for name, each in found.items()}
    return found | {"q": q, "k": k, "v": v, "scores": scores, "pattern": pattern, "z": z}


def input_of(model: Model, layer: int, batch: Batch) -> Tensor:
    """What a block is given, of a plain forward."""
    kept: list[Tensor] = []
    hook = model.blocks[layer].register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    model.module(**batch.inputs)
    hook.remove()
    return kept[0]


@torch.no_grad()
def changed(model: Model, layer: int, batch: Batch, change: Change) -> Tensor:
    """What the model returns where this block is the one written out, with a change inside."""

    def instead(block: Any, args: tuple, out: Tensor) -> Tensor:
        return by_hand(block, args[0], POOLED[layer], change)["resid_post"].reshape(out.shape)

    hook = model.blocks[layer].register_forward_hook(instead)
    out = model.module(**batch.inputs)[0]
    hook.remove()
    return out


def test_the_map_is_whole() -> None:
    spec = sam2().spec
    assert not spec.refused and all(check.passed for check in spec.checks)
    assert [spec.blocks[layer].d_model for layer in POOLED] == [16, 32]
    for layer in POOLED:
        block = spec.blocks[layer]
        (shortcut,) = block.others
        assert shortcut.module == f"blocks.{layer}.proj"
        assert shortcut.pooling == Pooling("max", "squares", (2, 2))
        assert block.before_mid == (shortcut, block.attn_write)
    (reshaping,) = [check for check in spec.checks if check.name == "reshaping"]
    assert reshaping.detail == "writes alone make a stream of another shape (layers 2, 4)"


def test_inspecting_it_names_what_begins_a_stage(capsys: Any) -> None:
    print_map(sam2())
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    said = [row[1].strip() for row in rows if row[:1] == ["others"]]
    assert said == [
        "-",
        "proj, max over squares of 2 × 2",
        "-",
        "proj, max over squares of 2 × 2",
        "-",
    ]


@torch.no_grad()
@pytest.mark.parametrize("layer", POOLED)
def test_values_are_a_map_of_what_is_read_though_windows_are_padded(layer: int) -> None:
    model, batch = sam2(), images()
    run = model.run(batch, capture=[f"v.{layer}", f"resid_pre.{layer}"])
    norm: Any = model.blocks[layer].layer_norm1
    x = run.cache[f"resid_pre.{layer}"]
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    made = torch.einsum("bpm,hmd->bphd", x, model.W_V(layer))
    v = run.cache[f"v.{layer}"][:, : x.shape[1]]
    bias = (v - made)[:1, :1]
    assert off(made + bias, v) < ROUNDING


@torch.no_grad()
@pytest.mark.parametrize(("side", "rows"), [(64, 2), (96, 1), (32, 3)])
@pytest.mark.parametrize("layer", POOLED)
def test_sites_are_those_of_the_block_written_out(layer: int, side: int, rows: int) -> None:
    """Of 96 pixels a side windows of 6 × 6 divide the 12 × 12 positions, of 64 and 32 they are padded."""
    model, batch = sam2(), images(side, rows)
    x = input_of(model, layer, batch)
    wanted = by_hand(model.blocks[layer], x, POOLED[layer])
    run = model.run(batch, capture=[*wanted, "attn_out"])
    n_pos, n_out = x.shape[1] ** 2, x.shape[1] ** 2 // 4
    assert run.cache[f"pattern.{layer}"].shape[2] == n_out
    assert run.cache[f"pattern.{layer}"].shape[3] >= n_pos
    assert (run.cache[f"k.{layer}"].shape[1] > n_pos) is (x.shape[1] % POOLED[layer] > 0)
    for name, of in wanted.items():
        got = run.cache[f"{name}.{layer}"]
        if name in ("k", "v"):  # padding has an order of its own
            got, of = got[:, :n_pos], of[:, :n_pos]
        if name in ("scores", "pattern"):
            assert got.shape == of.shape
            assert torch.equal(got[..., :n_pos].isfinite(), of[..., :n_pos].isfinite())
            mass = got[..., n_pos:].exp().sum(-1), of[..., n_pos:].exp().sum(-1)
            assert torch.allclose(*mass, rtol=1e-3)
            seen = of[..., :n_pos].isfinite()
            got, of = got[..., :n_pos][seen], of[..., :n_pos][seen]
        assert off(got, of) < ROUNDING, name
    z = torch.einsum("bhqk,bkhd->bqhd", run.cache[f"pattern.{layer}"], run.cache[f"v.{layer}"])
    assert off(z, run.cache[f"z.{layer}"]) < ROUNDING
    heads = torch.einsum("bphd,hdm->bpm", z, model.W_O(layer)) + model.b_O(layer)
    assert off(heads, run.cache[f"attn_out.{layer}"]) < ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", POOLED)
def test_an_edit_at_one_position_is_that_of_the_block_written_out(layer: int, site: str) -> None:
    model, batch = sam2(), images()
    n_out = 8 if layer == 2 else 4
    place = n_out + 2  # the third of the second row, in which window it may be
    key = 2 * n_out * 2 + 5  # a key of the same window: the sixth of the third row

    def change(name: str, x: Tensor) -> Tensor:
        if name != site:
            return x
        x = x.clone()
        if name in ("scores", "pattern"):
            x[1, 1, place, key] += 0.5
            x[0, 0, place, key] *= 0.5
        else:
            x[1, key if name in ("k", "v") else place, 1] += 0.5
            x[0, key if name in ("k", "v") else place, 0] *= -1
        return x

    wanted = changed(model, layer, batch, change)
    edit = Edit.apply(f"{site}.{layer}", lambda x, seen: change(site, x))
    plain = model.run(batch, capture=["resid_pre"])
    (replayed,) = model.replay(plain, [[edit]], lambda variant: variant.logits)
    clean = changed(model, layer, batch, as_it_is).reshape(wanted.shape)
    assert off(wanted, clean) > 10 * ROUNDING
    for got in (model.run(batch, edits=[edit]).logits, replayed):
        assert got is not None
        assert off(got.reshape(wanted.shape), wanted) < ROUNDING


@torch.no_grad()
def test_a_replay_gives_stages_that_it_skips_to_whatever_reads_them() -> None:
    """The neck behind the blocks reads what every stage ends with; and of images that are no squares."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "embed_dim_per_stage": [16, 24, 32, 40],
        "num_attention_heads_per_stage": [2, 2, 4, 4],
        "blocks_per_stage": [1, 2, 2, 1],
        "window_size_per_stage": [4, 4, 6, 4],
    }
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=16,
        num_attention_heads=2,
        image_size=[64, 64],
        global_attention_blocks=[4],
        window_positional_embedding_background_size=[4, 4],
        **sizes,
    )
    config = transformers.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[40, 32, 24, 16],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=16,
    )
    module: Any = transformers.Sam2VisionModel(config).eval()
    model = Model(module, id="with neck")
    batch = {"pixel_values": torch.randn(2, 3, 64, 128, generator=torch.Generator().manual_seed(1))}
    run = model.run(batch, capture=["resid_pre"])
    edits = [[Edit.zero("z", heads=[(layer, 1)])] for layer in range(model.n_layers)]
    for edit, got in zip(
        edits, model.replay(run, edits, lambda variant: variant.logits), strict=True
    ):
        wanted = model.run(batch, edits=edit).logits
        assert got is not None and wanted is not None and run.logits is not None
        assert off(got, wanted) < ROUNDING < off(wanted, run.logits)


@torch.no_grad()
@pytest.mark.parametrize("layer", POOLED)
def test_writes_may_be_edited_and_the_middle_is_their_sum(layer: int) -> None:
    model, batch = sam2(), images()
    block: Any = model.blocks[layer]
    step = torch.randn(block.proj.out_features, generator=torch.Generator().manual_seed(3))

    def at_one(x: Tensor, seen: Any) -> Tensor:
        x = x.clone()
        x[1, 3] += step
        return x

    def before_the_norm(module: Any, args: tuple, out: Tensor) -> Tensor:
        mid = by_hand(block, kept[0], POOLED[layer])["resid_mid"].clone()
        mid[1, 3] += step
        mid = mid.reshape(out.shape)
        return mid + block.mlp(block.layer_norm2(mid))

    kept = [input_of(model, layer, batch)]
    hook = block.register_forward_hook(before_the_norm)
    wanted = model.module(**batch.inputs)[0]
    hook.remove()
    for site in ("attn_write", "attn_out", "resid_mid"):
        got = model.run(batch, edits=[Edit.apply(f"{site}.{layer}", at_one)]).logits
        assert got is not None and off(got.reshape(wanted.shape), wanted) < ROUNDING
    run = model.run(batch, edits=[Edit.apply(f"mlp_write.{layer}", at_one)], capture=["resid_post"])
    change = (
        run.cache[f"resid_post.{layer}"]
        - model.run(batch, ["resid_post"]).cache[f"resid_post.{layer}"]
    )
    assert torch.allclose(change[1, 3], step, atol=1e-4) and not change[0].any()


@torch.no_grad()
@pytest.mark.parametrize("layer", POOLED)
def test_a_head_is_ablated_and_patched_as_by_a_hook(layer: int) -> None:
    model, batch, other = sam2(), images(), images(64, 3)
    proj, of = model.blocks[layer].attn.proj, model.spec.blocks[layer]
    columns = slice(of.d_head, 2 * of.d_head)  # head 1
    source = Batch({"pixel_values": other.inputs["pixel_values"][1:]})
    read: list[Tensor] = []
    hook = proj.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    model.module(**source.inputs)
    hook.remove()
    z = model.run(source, capture=[f"z.{layer}"]).cache[f"z.{layer}"]
    zero = Edit.zero("z", heads=[(layer, 1)])
    for edit, value in (
        (zero, 0.0),
        (Edit.patch("z", {layer: z}, heads=[(layer, 1)]), read[0][..., columns]),
    ):

        def instead(module: Any, args: tuple, value: Any = value) -> tuple[Tensor]:
            x = args[0].clone()
            x[..., columns] = value
            return (x,)

        hook = proj.register_forward_pre_hook(instead)
        wanted = model.module(**batch.inputs)[0]
        hook.remove()
        got = model.run(batch, edits=[edit]).logits
        assert got is not None and off(got.reshape(wanted.shape), wanted) < ROUNDING
        assert off(model.module(**batch.inputs)[0], wanted) > 10 * ROUNDING


@pytest.mark.parametrize("n_pos", [256, 64])
def test_row_statistics_of_several_numbers_of_positions_are_refused(n_pos: int) -> None:
    rows = torch.ones(2, n_pos, dtype=torch.bool)
    whole = Expected(torch.ones(2, n_pos), rows)
    with pytest.raises(Refused, match=rf"statistics of {n_pos} positions: layer . has queries at"):
        sam2().run(images(), statistics={"whole": whole})


def test_an_empty_edit_changes_nothing() -> None:
    model, batch = sam2(), images()
    sites = [*SITES, "attn_out", "attn_write", "mlp_out", "mlp_write", "resid_mid", "resid_post"]
    same = [Edit.apply(site, lambda x, seen: x) for site in sites]
    plain = model.run(batch, capture=["pattern"]).logits  # computed row by row, as with edits
    assert plain is not None
    assert torch.equal(model.run(batch, edits=same).logits, plain)  # type: ignore[arg-type]
    with torch.no_grad():
        assert (
            off(
                plain.reshape(model.module(**batch.inputs)[0].shape),
                model.module(**batch.inputs)[0],
            )
            < ROUNDING
        )


def test_gradients_are_those_of_small_changes() -> None:
    model = Model(tower().double(), id="double")
    batch = Batch({"pixel_values": images(32).inputs["pixel_values"].double()})
    sites = ("q.2", "k.2", "v.4", "pattern.4", "z.4", "resid_mid.2")
    run = model.run(batch, capture=sites, grad=True)
    assert run.logits is not None
    weights = torch.randn(run.logits.shape, generator=torch.Generator().manual_seed(4)).double()
    target = (run.logits * weights).sum()
    for site in sites:
        step = torch.randn(run.cache[site].shape, generator=torch.Generator().manual_seed(2))
        step = step.double() * (run.cache[site] != 0)
        slope = float((run.gradients(target, site) * step).sum())
        low, high = (
            (model.run(batch, edits=[Edit.add(site, by * step)]).logits * weights).sum()  # type: ignore[operator]
            for by in (-1e-6, 1e-6)
        )
        assert float(high - low) / 2e-6 == pytest.approx(slope, rel=1e-4)


def test_the_mean_is_found_too_and_the_smallest_is_refused(monkeypatch: Any) -> None:
    def mean(x: Tensor, stride: Any) -> Tensor:
        return avg_pool2d(x.movedim(-1, 1), stride).movedim(1, -1)

    def smallest(x: Tensor, stride: Any) -> Tensor:
        return -max_pool2d(-x.movedim(-1, 1), stride).movedim(1, -1)

    module = tower()
    monkeypatch.setattr(modeling_sam2, "do_pool", mean)
    model = Model(module)
    assert not model.spec.refused
    assert model.spec.blocks[2].others[0].pooling == Pooling("mean", "squares", (2, 2))
    monkeypatch.setattr(modeling_sam2, "do_pool", smallest)
    model = Model(module)
    assert model.run(images(), capture=["z"]).cache.layers("z") == list(range(6))
    with pytest.raises(Refused, match="does not add up"):
        model.run(images(), capture=["attn_write.2"])


def test_what_arrives_nowhere_or_twice_is_refused() -> None:
    module = tower()

    def one_for_another(block: Any, args: tuple, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, 0] = out[:, 1]
        return out

    module.blocks[2].attn.register_forward_hook(one_for_another)
    model = Model(module)
    with pytest.raises(Refused, match=r"'z\.2'.*windows"):
        model.run(images(), capture=["z.2"])
    assert model.run(images(), capture=["z"]).cache.layers("z") == [0, 1, 3, 4, 5]
