"""Attention within windows: every site in the order of positions, against attention written out by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import circuits
from interp.data.images import patch_grid
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.edits import Edit
from interp.run.statistics import Mass

ROUNDING = 1e-5
"""A few float32 roundings, four blocks deep."""
WINDOW = 4
UNSEEN = 1e-30
"""A shifted model hides keys by -100, which leaves e^-100 of them."""


def images(side: int) -> Batch:
    generator = torch.Generator().manual_seed(side)
    return Batch({"pixel_values": torch.randn(2, 3, side, side, generator=generator)})


def randomised(module: Any) -> Any:
    assert sum(parameter.numel() for parameter in module.parameters()) < 100_000
    with torch.no_grad():
        for parameter in module.parameters():
            noise = 0.2 * torch.randn_like(parameter)  # biases too: padding is nothing else
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return module.eval()


@cache
def shifted(side: int = 32) -> Model:
    """Two stages of two blocks, windows of 4 × 4, those of every second block shifted by 2 × 2.

    32 pixels are 16 × 16 and 8 × 8 positions; 20 are 10 × 10 (padded to 12 × 12) and 5 × 5 (to 8 × 8).
    """
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    config = transformers.SwinConfig(image_size=side, patch_size=2, window_size=WINDOW, **sizes)
    return Model(randomised(transformers.SwinModel(config)), id="shifted")


@cache
def rows_and_columns() -> Model:
    """Three blocks on an image of 8 × 8 positions; the last attends to all of it, the others in windows."""
    torch.manual_seed(0)
    return Model(randomised(_rows_and_columns()), id="image")


def _rows_and_columns() -> nn.Module:
    config = transformers.Sam3ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        pretrain_image_size=32,
        patch_size=4,
        window_size=WINDOW,
        global_attn_indexes=[2],
    )
    return transformers.Sam3ViTModel(config)


def off(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


def together(side: int, shift: int) -> Tensor:
    """Which of side × side positions share a window, once rows and columns are moved up by `shift`.

    What has gone around the edge does not see what has not.
    """
    place = torch.arange(side)
    moved = (place - shift) % side
    same = moved[:, None] // WINDOW == moved[None] // WINDOW
    around = (place < shift)[:, None] == (place < shift)[None]
    one = same & around
    return (one[:, None, :, None] & one[None, :, None, :]).reshape(side**2, side**2)


@torch.no_grad()
def by_hand(model: Model, layer: int, batch: Batch, side: int) -> dict[str, Tensor]:
    """pattern, v and z of one layer over all pairs of positions, from its weights and a plain forward."""
    block: Any = model.blocks[layer]
    kept: list[Tensor] = []
    hook = block.layernorm_before.register_forward_hook(
        lambda module, args, out: kept.append(out.clone())
    )
    model.module(**batch.inputs)
    hook.remove()
    x, attention = kept[0], block.attention
    n_heads = attention.num_attention_heads
    q, k, v = (
        linear(x).unflatten(-1, (n_heads, -1)).transpose(1, 2)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    shift = block.shift_size
    place = (torch.arange(side) - shift) % side % WINDOW  # row or column inside the window
    step = place[:, None] - place[None] + WINDOW - 1
    at = step[:, None, :, None] * (2 * WINDOW - 1) + step[None, :, None, :]
    table = attention.relative_position_bias.relative_position_bias_table
    bias = table[at.reshape(side**2, side**2)].permute(2, 0, 1)
    scores = q @ k.mT / q.shape[-1] ** 0.5 + bias
    pattern = scores.masked_fill(~together(side, shift), -torch.inf).softmax(-1)
    return {"pattern": pattern, "v": v.transpose(1, 2), "z": (pattern @ v).transpose(1, 2)}


SITES = ["q", "k", "v", "scores", "pattern", "z"]
WRITES = ["resid_pre", "attn_out", "attn_write", "resid_mid", "mlp_write", "resid_post"]


@pytest.mark.parametrize("layer", range(4))
def test_shifted_windows_are_attention_of_positions(layer: int) -> None:
    model, side = shifted(), (16, 16, 8, 8)[layer]
    assert not model.spec.refused and all(check.passed for check in model.spec.checks)
    cache = model.run(images(32), capture=SITES).cache
    for name, wanted in by_hand(model, layer, images(32), side).items():
        assert off(cache[f"{name}.{layer}"], wanted) < ROUNDING, name
    unseen = ~together(side, (0, 2)[layer % 2])
    hidden = cache[f"scores.{layer}"].masked_select(unseen)
    assert (hidden < -90).all()
    assert (cache[f"pattern.{layer}"].masked_select(unseen) < UNSEEN).all()


@pytest.mark.parametrize("model", [shifted, rows_and_columns])
def test_heads_and_writes_sum_to_the_stream(model: Any) -> None:
    model = model()
    assert not model.spec.refused
    cache = model.run(images(32), capture=["z", *WRITES]).cache
    for layer in range(model.n_layers):
        heads = torch.einsum("bphd,hdm->bpm", cache[f"z.{layer}"], model.W_O(layer))
        assert off(heads + model.b_O(layer), cache[f"attn_out.{layer}"]) < ROUNDING
        mid = cache[f"resid_pre.{layer}"] + cache[f"attn_write.{layer}"]
        assert off(mid, cache[f"resid_mid.{layer}"]) < ROUNDING
        assert off(mid + cache[f"mlp_write.{layer}"], cache[f"resid_post.{layer}"]) < ROUNDING


@pytest.mark.parametrize("layer", range(4))
def test_v_is_read_from_the_normed_stream(layer: int) -> None:
    """v = norm(resid_pre) @ W_V + the same bias everywhere."""
    model = shifted()
    name = f"{model.spec.blocks[layer].name}.layernorm_before"
    cache = model.run(images(32), capture=["resid_pre", "v"]).cache
    norm, x = model.norm(name), cache[f"resid_pre.{layer}"]
    made = torch.einsum("bpm,hmd->bphd", norm.centre(x) / norm.scale(x), model.W_V(layer))
    rest = cache[f"v.{layer}"] - made
    assert off(rest, rest[:1, :1].expand_as(rest)) < 10 * ROUNDING  # a difference of large numbers


def test_windows_of_an_image_held_in_rows_and_columns() -> None:
    """Its queries are rotated inside each window: q and k are taken as they are, the rest follows."""
    model = rows_and_columns()
    batch = images(32)
    cache = model.run(batch, capture=SITES).cache
    attention: Any = model.blocks[0].attention
    normed: list[Tensor] = []
    hook = model.blocks[0].layer_norm1.register_forward_hook(  # type: ignore[union-attr]
        lambda module, args, out: normed.append(out.flatten(1, 2))
    )
    with torch.no_grad():
        model.module(**batch.inputs)
        v = attention.v_proj(normed[0]).unflatten(-1, (4, 8))
    hook.remove()
    assert off(cache["v.0"], v) < ROUNDING
    q, k = cache["q.0"].transpose(1, 2), cache["k.0"].transpose(1, 2)
    scores = (q @ k.mT / 8**0.5).masked_fill(~together(8, 0), -torch.inf)
    assert torch.equal(cache["scores.0"] == -torch.inf, scores == -torch.inf)
    assert off(cache["pattern.0"], scores.softmax(-1)) < ROUNDING
    assert (cache["pattern.2"] > 0).all()


def test_padding_stands_behind_the_positions() -> None:
    """10 × 10 positions are padded to nine windows: 44 keys more, which are seen and hold the bias of k and v."""
    model = shifted(20)
    assert not model.spec.refused
    cache = model.run(images(20), capture=[*SITES, "attn_out"]).cache
    assert cache["pattern.0"].shape == (2, 2, 100, 144) and cache["k.0"].shape[1] == 144
    assert cache["q.1"].shape[1] == cache["z.1"].shape[1] == 100
    attention: Any = model.blocks[1].attention
    padding = attention.v_proj.bias.detach().unflatten(-1, (2, 8))
    assert off(cache["v.1"][:, 100:], padding.expand(2, 44, 2, 8)) < ROUNDING
    pattern, v = cache["pattern.1"], cache["v.1"]
    assert off(pattern.sum(-1), torch.ones(2, 2, 100)) < ROUNDING
    assert cache["pattern.0"][..., 100:].sum() > 1  # a shift hides most of it in layer 1
    assert off(torch.einsum("bhqk,bkhd->bqhd", pattern, v), cache["z.1"]) < ROUNDING
    heads = torch.einsum("bphd,hdm->bpm", cache["z.1"], model.W_O(1)) + model.b_O(1)
    assert off(heads, cache["attn_out.1"]) < ROUNDING


# --- edits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [32, 20])
def test_edits_reach_the_positions_they_name(side: int) -> None:
    model, batch = shifted(side), images(side)
    clean = model.run(batch, capture=[*SITES, "attn_out"]).cache
    n = clean["z.1"].shape[1]

    def seen(edit: Edit, *sites: str) -> Any:
        return model.run(batch, capture=sites, edits=[edit]).cache

    out = seen(Edit.zero("z.1.0", positions=[37]), "attn_out.1")["attn_out.1"]
    less = clean["z.1"][:, 37, 0] @ model.W_O(1)[0]
    assert off(out[:, 37], clean["attn_out.1"][:, 37] - less) < ROUNDING
    rest = [p for p in range(n) if p != 37]
    assert off(out[:, rest], clean["attn_out.1"][:, rest]) < ROUNDING

    to_itself = Edit.apply("pattern.1", lambda x, seen: torch.eye(n, x.shape[-1]).expand_as(x))
    assert off(seen(to_itself, "z.1")["z.1"], clean["v.1"][:, :n]) < ROUNDING

    changed = seen(Edit.zero("k.1", positions=[37]), "pattern.1")["pattern.1"]
    moved = (changed - clean["pattern.1"]).abs().amax((0, 1, 3)) > 10 * ROUNDING
    assert torch.equal(moved, clean["pattern.1"][0, 0, :, 37] > UNSEEN)

    hide = Edit.apply("scores.1", lambda x, seen: x.index_fill(-1, torch.tensor([37]), -torch.inf))
    hidden = seen(hide, "pattern.1")["pattern.1"]
    wanted = clean["pattern.1"].index_fill(-1, torch.tensor([37]), 0.0)
    assert off(hidden, wanted / wanted.sum(-1, keepdim=True)) < ROUNDING

    written = seen(Edit.zero("attn_write.1", positions=[37]), "resid_mid.1", "resid_pre.1")
    assert off(written["resid_mid.1"][:, 37], written["resid_pre.1"][:, 37]) < ROUNDING


@pytest.mark.parametrize("name", SITES)
def test_an_edit_that_changes_nothing_changes_nothing(name: str) -> None:
    """Padding keeps its queries' rows, and everything finds back into its window."""
    for model, batch in ((shifted(20), images(20)), (rows_and_columns(), images(32))):
        edit = Edit.apply(name, lambda x, seen: x.clone())
        same = model.run(batch, edits=[edit]).logits
        clean = model.run(batch, capture=["scores"]).logits
        assert same is not None and clean is not None
        assert off(same, clean) < ROUNDING


@pytest.mark.parametrize("site", ["z.1", "attn_out.0", "resid_mid.1", "pattern.1"])
@pytest.mark.parametrize("model", [shifted, rows_and_columns])
def test_a_replay_is_a_rerun(model: Any, site: str) -> None:
    model, batch = model(), images(32)
    run = model.run(batch, capture=["resid_pre"])
    edits = [[Edit.scale(site, factor)] for factor in (0.5, 2.0)]
    replayed = model.replay(run, edits, lambda variant: variant.logits)
    for edit, logits in zip(edits, replayed, strict=True):
        rerun = model.run(batch, edits=edit).logits
        assert off(logits, rerun) < ROUNDING < 100 * ROUNDING < off(rerun, run.logits)


@pytest.mark.parametrize("site", ["z.0", "pattern.0", "k.0", "attn_out.0"])
def test_gradients_are_of_the_positions(site: str) -> None:
    """The derivative along a direction is the slope of what an edit along it does."""
    model, batch = shifted(20), images(20)
    double = Model(model.module.double(), id="double")
    try:
        batch = Batch({"pixel_values": batch.inputs["pixel_values"].double()})
        run = double.run(batch, capture=[site], grad=True)
        assert run.logits is not None
        weights = torch.randn_like(run.logits)  # a plain sum of what a norm returns is always 0
        target = (run.logits * weights).sum()
        direction = torch.randn_like(run.cache[site]) * (run.cache[site] != 0)  # within windows
        slope = (run.gradients(target, site) * direction).sum()

        def moved(by: float) -> Tensor:
            edit = Edit.apply(site, lambda x, seen: x + by * direction)
            logits = double.run(batch, edits=[edit]).logits
            assert logits is not None
            return (logits * weights).sum()

        step = 1e-4  # central differences: an error of its square, in float64
        assert float((moved(step) - moved(-step)) / (2 * step)) == pytest.approx(
            float(slope), rel=1e-5
        )
    finally:
        model.module.float()


@pytest.mark.parametrize("site", ["pattern.1", "scores.1"])
def test_what_no_window_holds_is_not_edited(site: str) -> None:
    """Attention spread over all positions would stand in the cache, and never have been."""
    model, batch = shifted(20), images(20)
    even = Edit.apply(site, lambda x, seen: torch.full_like(x, 1 / x.shape[-1]))
    with pytest.raises(BadInput, match=f"the edit of '{site}' has values where queries see no key"):
        model.run(batch, edits=[even])
    clean = model.run(batch).logits
    assert off(model.run(batch, edits=[Edit.scale(site, 0.5)]).logits, clean) > 10 * ROUNDING


# --- other inputs, other models ------------------------------------------------------------------------


def test_an_image_of_another_size_has_windows_of_its_own() -> None:
    model = shifted()
    for pixels in (48, 32, 48):
        cache = model.run(images(pixels), capture=["pattern.1", "z.1"]).cache
        found = by_hand(model, 1, images(pixels), pixels // 2)
        assert off(cache["pattern.1"], found["pattern"]) < ROUNDING
        assert off(cache["z.1"], found["z"]) < ROUNDING


def test_images_that_look_the_same_everywhere_are_no_trouble() -> None:
    model, blank = shifted(), Batch({"pixel_values": torch.zeros(1, 3, 32, 32)})
    model.run(images(48), capture=["z.1"])
    pattern = model.run(blank, capture=["pattern.1"]).cache["pattern.1"]
    assert torch.equal(pattern[0, 0] > UNSEEN, together(16, 2))


def test_a_single_window_in_another_order_is_told_from_the_stream() -> None:
    """A backbone shifts even where one window holds all: 4 × 4 positions in its second stage."""
    sizes: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, window_size=WINDOW, out_features=["stage2"], **sizes
    )
    torch.manual_seed(0)
    model = Model(randomised(transformers.SwinBackbone(config)), id="backbone")
    assert not model.spec.refused
    cache = model.run(images(16), capture=["pattern", "z", "attn_write", *WRITES]).cache
    for layer, side in enumerate((8, 8, 4, 4)):
        pattern = cache[f"pattern.{layer}"]
        shift = (0, 2)[layer % 2]
        assert torch.equal((pattern > UNSEEN).all((0, 1)), together(side, shift))
        mid = cache[f"resid_pre.{layer}"] + cache[f"attn_write.{layer}"]
        assert off(mid, cache[f"resid_mid.{layer}"]) < ROUNDING
    rerun = model.run(images(16), edits=[Edit.zero("attn_out.3", positions=[5])], capture=WRITES)
    mid, before = rerun.cache["resid_mid.3"], rerun.cache["resid_pre.3"]
    assert torch.equal((mid == before).all(-1)[0], torch.arange(16) == 5)


def test_windows_whose_keys_lie_in_another_order_are_refused_by_name() -> None:
    class Rolled(nn.Module):
        def __init__(self, linear: nn.Module) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).roll(1, -2 if x.ndim == 3 else 1)

    torch.manual_seed(0)
    module: Any = randomised(_rows_and_columns())
    module.layers[0].attention.k_proj = Rolled(module.layers[0].attention.k_proj)
    model = Model(module, id="rolled")
    for site in ("z.0", "pattern.0", "attn_out.0"):
        with pytest.raises(Refused, match=r"'layers.0' attends in windows \(8 of 16 positions"):
            model.run(images(32), capture=[site])
    assert any("heads of layers 0 are not seen" in note for note in model.notes)
    batch = images(32)
    run = model.run(batch, capture=["resid_pre"])
    edit = Edit.zero("resid_post.0", positions=[3])
    (replayed,) = model.replay(run, [[edit]], lambda variant: variant.logits)
    rerun = model.run(batch, edits=[edit]).logits
    assert rerun is not None and off(replayed, rerun) < ROUNDING


# --- what reads them -----------------------------------------------------------------------------------


def test_statistics_of_rows_are_those_of_the_pattern() -> None:
    model = rows_and_columns()
    keys = torch.randint(64, (2, 64, 3))
    rows = torch.rand(2, 64) < 0.5
    run = model.run(
        images(32), capture=["pattern"], statistics={"mass": Mass(keys, rows)}, logits=False
    )
    for layer in range(3):
        picked = run.cache[f"pattern.{layer}"].gather(-1, keys[:, None].expand(-1, 4, -1, -1))
        mean = (picked.sum(-1) * rows[:, None]).sum(-1) / rows.sum(-1, keepdim=True)
        assert off(run.statistics["mass"][:, layer], mean) < ROUNDING


def test_heads_in_windows_are_classified_on_the_grid_of_patches() -> None:
    model = rows_and_columns()
    assert patch_grid(model).places.shape == (8, 8)
    report = circuits.classify_heads(
        model, prompts=4, detectors=["patch_offset", "patch_distance"], progress=False
    )
    reach = report.table.groupby("layer")["patch_distance"].mean()
    assert (reach[[0, 1]] < reach[2]).all()  # three patches at most inside a window


def test_stages_have_no_one_grid_and_say_so() -> None:
    with pytest.raises(Refused, match="in stages, on 256, 64 positions of an image"):
        patch_grid(shifted())
