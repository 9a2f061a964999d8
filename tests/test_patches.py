"""Towers that read the patches of all images in one, with a grid: every site must be each image's own.

Of each form in which blocks hold them: [batch·pos, d_model] (Qwen2-VL), in the order of windows (Qwen2.5-VL), [1,
batch·pos, d_model] (HunYuan), of pixels in one row (PaddleOCR), with a class token before each image's patches
(Inkling), or of pixels in a strip and with a stream that is shortened behind a block (MiniCPM). Tolerance: float32, a
few blocks deep.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    HunYuanVLVisionTransformer,
    Inkling2VisionModel,
    MiniCPMOcrVisionModel,
    PaddleOCRVisionModel,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3ASREncoder,
    Qwen3ASREncoderConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    eager_attention_forward,
)

from interp.data.patch_numbers import patch_numbers
from interp.errors import BadInput, Refused
from interp.models.attention import implementation
from interp.models.chunks import chunk_mask
from interp.models.grids import taken_as
from interp.models.layout import FLAT, PACKED
from interp.models.model import Model
from interp.models.probe import probe_batch
from interp.run.batch import Batch
from interp.run.edits import Edit
from interp.run.statistics import Mass
from interp.sites import AXES, Site
from tests.families import FAMILIES

ROUNDING = 1e-5
SIZES = {"patch_size": 4, "intermediate_size": 48, "num_attention_heads": 4, "num_heads": 4}
TOWERS: dict[str, tuple[type[PreTrainedModel], dict[str, Any]]] = {
    "flat": (
        Qwen2VisionTransformerPretrainedModel,
        {"depth": 3, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2},
    ),
    "windows": (
        Qwen2_5_VisionTransformerPretrainedModel,
        {"depth": 3, "hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
    ),
    "packed": (
        HunYuanVLVisionTransformer,
        {"hidden_size": 32, "num_hidden_layers": 3, "num_key_value_heads": 4},
    ),
    "one row": (
        PaddleOCRVisionModel,
        {"hidden_size": 32, "num_hidden_layers": 3, "image_size": 32},
    ),
    "class token": (Inkling2VisionModel, {"hidden_size": 32, "num_hidden_layers": 3}),
    "strip": (
        MiniCPMOcrVisionModel,
        {"hidden_size": 32, "num_hidden_layers": 3, "insert_layer_id": 1, "image_size": 32},
    ),
}
FORMS = pytest.mark.parametrize("form", TOWERS)
WITHOUT_STAGES = pytest.mark.parametrize("form", [name for name in TOWERS if name != "strip"])


def randomised(of: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = of(config)
        for parameter in module.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(0.1 * noise) if parameter.ndim < 2 else parameter.copy_(0.2 * noise)
    return module.eval()


@cache
def model(form: str) -> Model:
    of, sizes = TOWERS[form]
    small = {"out_hidden_size": 40, "text_hidden_size": 40, "projection_hidden_dim": 48}
    assert of.config_class is not None
    return Model(randomised(of, of.config_class(**{**SIZES, **small, **sizes})), id=form)


def images(form: str, n: int = 2) -> Batch:
    """Random images of as many patches as those of the probe."""
    module, generator = model(form).module, torch.Generator().manual_seed(1)
    batch = probe_batch(module).rows(slice(0, 1)).repeat(n)
    return Batch.of_inputs(
        {
            name: torch.randn(x.shape, generator=generator) if x.is_floating_point() else x
            for name, x in batch.inputs.items()
        }
    )


def rows(form: str, batch: Batch, which: slice) -> Batch:
    return model(form).as_batch(batch).rows(which)


def off(got: Tensor | None, wanted: Tensor | None) -> float:
    assert got is not None and wanted is not None and got.shape == wanted.shape
    got, wanted = (x.detach().clamp_min(-1e9).nan_to_num(neginf=0.0) for x in (got, wanted))
    return float((got - wanted).abs().max() / wanted.abs().max())


def sites(form: str) -> list[str]:
    return [site for site in AXES if model(form).layers_with(site)]


def theirs(form: str, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(form).module(**batch.inputs).last_hidden_state


@FORMS
def test_it_is_told_and_verified_in_full(form: str) -> None:
    spec = model(form).spec
    held = PACKED if form in ("packed", "strip") else FLAT
    assert {block.axes for block in spec.blocks} == {held}
    assert not spec.refused and all(check.passed for check in spec.checks) and not spec.causal
    assert {"heads", "neurons", "writes", "window"} <= {check.name for check in spec.checks}
    assert len(spec.stages) == (2 if form == "strip" else 1)


@FORMS
def test_every_row_is_as_it_is_alone(form: str) -> None:
    batch = images(form, 3)
    joint = model(form).run(batch, capture=sites(form))
    assert joint.logits is not None and len(joint.logits) == 3
    assert off(joint.logits, theirs(form, batch).reshape(joint.logits.shape)) < ROUNDING
    for row in range(3):
        alone = model(form).run(rows(form, batch, slice(row, row + 1)), capture=sites(form))
        assert off(joint.logits[row : row + 1], alone.logits) < ROUNDING
        for site in sites(form):
            for layer, x in alone.cache.by_layer(site).items():
                got = joint.cache[Site(site, layer)]
                assert len(got) == 3 and off(got[row : row + 1], x) < 10 * ROUNDING, site


@FORMS
@torch.no_grad()
def test_patterns_are_those_of_hugging_faces_chunks(form: str) -> None:
    batch = images(form)
    keys = torch.randint(4, (2, 10, 2))
    run = model(form).run(batch, capture=["pattern", "scores"])
    chunks: dict[nn.Module, list[Tensor]] = {}

    def eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, weights = eager_attention_forward(module, *args, **kwargs)
        chunks.setdefault(module, []).append(weights[0])
        return out, weights

    AttentionInterface.register("chunks_of_patches", eager)
    with implementation(model(form).module, "chunks_of_patches"):
        model(form).module(**batch.inputs)
    for layer, block in enumerate(model(form).spec.blocks):
        parts = chunks[model(form).module.get_submodule(block.attention or "")]
        assert len(parts) == (8 if form == "windows" and layer != 1 else 2)
        pattern = run.cache[f"pattern.{layer}"]
        for head in range(4):
            wanted = torch.block_diag(*[part[head] for part in parts])
            assert off(torch.block_diag(*pattern[:, head]), wanted) < ROUNDING
        assert off(run.cache[f"scores.{layer}"].softmax(-1), pattern) < ROUNDING
    if form != "strip":  # whose rows are shorter behind a block
        length = run.cache["pattern.0"].shape[2]
        keys = torch.randint(length, (2, length, 2), generator=torch.Generator().manual_seed(2))
        counted = torch.arange(length).expand(2, -1) > 1
        statistics = {"mass": Mass(keys, counted)}
        got = model(form).run(batch, statistics=statistics).statistics["mass"]
        picked = run.cache["pattern"].gather(-1, keys[:, None, None].expand(-1, 3, 4, -1, -1))
        mean = (picked.sum(-1) * counted[:, None, None]).sum(-1) / (length - 2)
        assert off(got, mean) < ROUNDING


@FORMS
@pytest.mark.parametrize(
    "site",
    [
        *"qkvz",
        "pattern",
        "scores",
        "attn_out",
        "resid_pre",
        "resid_mid",
        "resid_post",
        "mlp_out",
        "mlp_post",
    ],
)
def test_an_edit_of_a_row_is_of_that_image_alone(form: str, site: str) -> None:
    batch, of = images(form), model(form)
    edit = Edit.scale(f"{site}.1", 0.3)
    clean = of.run(batch, capture=[f"{site}.1", "resid_post"])  # SDPA rounds in another way
    both = of.run(batch, edits=[edit], capture=["resid_post"])
    one = of.run(batch, edits=[edit.on_rows(slice(1, 2))], capture=["resid_post"])
    alone = of.run(rows(form, batch, slice(1, 2)), edits=[edit], capture=["resid_post"])
    # An edit of resid_mid is carried by a write, and Inkling's are scaled: divided again, they round.
    allowed = ROUNDING if (form, site) == ("class token", "resid_mid") else 0
    for layer, x in one.cache.by_layer("resid_post").items():
        assert off(x[0], clean.cache[Site("resid_post", layer)][0]) <= allowed
        assert torch.equal(x[1], both.cache[Site("resid_post", layer)][1])
        assert off(x[1:], alone.cache[Site("resid_post", layer)]) < ROUNDING
    assert one.logits is not None and clean.logits is not None
    assert off(one.logits[0], clean.logits[0]) <= allowed
    assert off(one.logits[1], clean.logits[1]) > 100 * ROUNDING


@FORMS
def test_a_head_of_a_row_ablated_is_a_hook_on_the_module(form: str) -> None:
    batch, of = images(form), model(form)
    block = of.spec.blocks[1]

    def zero(module: nn.Module, args: tuple) -> tuple:
        z = args[0].clone().reshape(2, -1, block.n_heads, block.d_head)
        z[1, :, 2] = 0
        return (z.reshape(args[0].shape),)

    hook = of.module.get_submodule(block.W_O or "").register_forward_pre_hook(zero)
    wanted = theirs(form, batch)
    hook.remove()
    got = of.run(batch, edits=[Edit.zero("z", heads=[(1, 2)]).on_rows(slice(1, 2))]).logits
    assert got is not None and off(got, wanted.reshape(got.shape)) < ROUNDING
    assert off(wanted, theirs(form, batch)) > 100 * ROUNDING


@FORMS
def test_an_empty_edit_changes_nothing(form: str) -> None:
    batch, of = images(form), model(form)
    for site in sites(form):
        same = Edit.apply(site, lambda x, seen: x.clone())
        wanted = of.run(batch, capture=[site]).logits
        got = of.run(batch, edits=[same]).logits
        assert off(got, wanted) <= (ROUNDING if form == "class token" else 0), site  # scaled writes


@WITHOUT_STAGES
def test_a_replay_is_a_rerun(form: str) -> None:
    batch, of = images(form), model(form)
    clean = of.run(batch, capture=["resid_pre"])
    vector = torch.randn(32, generator=torch.Generator().manual_seed(5))
    edits: list[Edit] = []
    for layer in range(3):
        edits += [
            Edit.zero("z", heads=[(layer, 1)]),
            Edit.add(f"resid_post.{layer}", vector, positions=[1, 3]),
            Edit.scale(f"mlp_post.{layer}", 0.3),
            Edit.zero(f"pattern.{layer}.1", positions=[0, 2]),
        ]
    replayed = of.replay(clean, [[edit] for edit in edits], lambda run: run.logits)
    for edit, got in zip(edits, replayed, strict=True):
        wanted = of.run(batch, edits=[edit]).logits
        assert off(got, wanted) < ROUNDING, edit.site
        assert off(wanted, clean.logits) > 10 * ROUNDING, f"{edit.site} has no effect"


@FORMS
@pytest.mark.parametrize("site", ["resid_post", "z", "pattern", "q"])
def test_gradients_are_of_the_rows_shown(form: str, site: str) -> None:
    """Those of row 1 are those that it has alone; of row 0, which the loss does not read, none."""

    def gradient(of: Batch) -> Tensor:
        run = model(form).run(of, capture=[f"{site}.1"], grad=True)
        assert run.logits is not None
        return torch.autograd.grad(run.logits[-1].pow(3).sum(), run.cache[f"{site}.1"])[0]

    batch = images(form)
    joint, alone = gradient(batch), gradient(rows(form, batch, slice(1, 2)))
    assert off(joint[1:], alone) < 10 * ROUNDING and not joint[0].any()


def test_frames_of_a_video_are_positions_one_frame_after_the_other() -> None:
    batch = images("flat")
    video = {**batch.inputs, "grid_thw": torch.tensor([[2, 4, 8]] * 2)}
    run = model("flat").run(video, capture=["pattern.0", "resid_post"])
    with torch.no_grad():
        wanted = model("flat").module(**video).last_hidden_state
    assert run.logits is not None and off(run.logits, wanted.reshape(run.logits.shape)) < ROUNDING
    pattern = run.cache["pattern.0"]
    assert pattern.shape == (2, 4, 64, 64) and bool((pattern[:, :, :32, :32] > 0).all())
    assert not pattern[:, :, :32, 32:].any() and not pattern[:, :, 32:, :32].any()


def test_inputs_may_have_the_names_that_a_processor_gives() -> None:
    batch = images("flat")
    named = {
        "pixel_values": batch.inputs["hidden_states"],
        "image_grid_thw": batch.inputs["grid_thw"],
    }
    for given in (named, Batch.of_inputs(named)):
        got = model("flat").run(given).logits
        assert got is not None and torch.equal(got.reshape(128, 32), theirs("flat", batch))


@pytest.mark.parametrize(
    ("grid", "why"),
    [
        ([[1, 8, 8], [1, 4, 16]], "images of a batch must be alike"),  # as many patches, elsewhere
        ([[1, 2, 8], [1, 14, 8]], "images of a batch must be alike"),
        ([[1, 8, 8]], "the grid tells of 64"),
        ([[8, 8], [8, 8]], "got a grid of shape"),
        (
            [[1, 1, 64], [1, 1, 64]],
            "fails on 'hidden_states' of shape .*, with 'grid_thw'",
        ),  # cannot be merged
        (None, "missing: grid_thw"),
    ],
)
def test_what_does_not_fit_is_refused(grid: list[list[int]] | None, why: str) -> None:
    given = {"pixel_values": images("flat").inputs["hidden_states"]}
    if grid is not None:
        given["image_grid_thw"] = torch.tensor(grid)
    with pytest.raises(BadInput, match=why):
        model("flat").run(given, capture=["resid_post"])


def test_chunks_of_two_rows_are_refused() -> None:
    ends = torch.tensor([0, 2, 4, 6, 8])
    assert chunk_mask(ends, 4, causal=False) is None
    mask = chunk_mask(ends, 2, causal=False)
    assert mask is not None and torch.equal(
        mask[1, 0], torch.block_diag(*[torch.ones(2, 2)] * 2) > 0
    )
    causal = chunk_mask(ends, 2, causal=True)
    assert causal is not None and torch.equal(causal, mask.tril())
    with pytest.raises(Refused, match="from one row of the batch to another"):
        chunk_mask(torch.tensor([0, 3, 6]), 3, causal=False)


def test_a_tower_whose_images_see_each_other_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    monkeypatch.setattr(
        modeling_qwen2_vl,
        "get_vision_attention_seqlens",
        lambda grid, *args, **kwargs: (torch.tensor([0, int(grid.prod(1).sum())]), None),
    )
    of, sizes = TOWERS["flat"]
    assert of.config_class is not None
    module = randomised(of, of.config_class(**{**SIZES, **sizes}))
    with pytest.raises(Refused, match="depends on the image beside it"):
        Model(module)


def test_a_tower_that_works_with_no_patches_is_refused_with_why() -> None:
    of, sizes = TOWERS["windows"]
    assert of.config_class is not None
    none_in_one = of.config_class(**{**SIZES, **sizes, "window_size": 4})
    with pytest.raises(Refused, match=r"none of the \d+ shapes .* modulo by zero"):
        Model(randomised(of, none_in_one))


def test_rows_of_packed_inputs() -> None:
    x, grid = torch.arange(12.0).reshape(1, 2, 6), torch.tensor([[1, 1, 2]] * 3)
    batch = Batch({"x": x, "grid": grid}, None, {"x": 2}, 3)
    assert torch.equal(batch.rows(slice(1, 3)).inputs["x"], x[..., 2:])
    twice = batch.repeat(2)
    assert twice.size == len(twice.inputs["grid"]) == 6
    assert torch.equal(twice.inputs["x"], torch.cat([x, x], 2))
    assert batch.rows(slice(0, 1)).size == 1 and batch.to("cpu").size == 3


# --- beside tokens ---------------------------------------------------------------------------------


def test_images_beside_tokens_belong_to_the_rows_of_tokens() -> None:
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 120,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [1, 1, 2],
        },
    }
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=110)
    module = randomised(Qwen2VLForConditionalGeneration, config)
    of, generator = Model(module), torch.Generator().manual_seed(3)
    words = torch.randint(5, 100, (2, 10), generator=generator)
    words[:, 1:5] = 110
    given = {  # patches first
        "pixel_values": torch.randn(32, 96, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "input_ids": words,
        "mm_token_type_ids": (words == 110).int(),
    }
    clean = of.run(given, capture=["resid_pre"])
    with torch.no_grad():
        assert off(clean.logits, module(**given).logits) < ROUNDING and clean.batch.size == 2
    edits = [Edit.zero("z", heads=[(layer, 1)]).on_rows(slice(1, 2)) for layer in (0, 1)]
    replayed = of.replay(
        clean,
        [[edit] for edit in edits],
        lambda run: (run.batch.size, run.cache["resid_post.1"], run.logits),
        capture=["resid_post.1"],
    )
    for edit, (size, resid, logits) in zip(edits, replayed, strict=True):
        wanted = of.run(given, edits=[edit], capture=["resid_post.1"])
        assert size == 2 and off(resid, wanted.cache["resid_post.1"]) < ROUNDING
        assert off(logits, wanted.logits) < ROUNDING
    with pytest.raises(BadInput, match="which of the 32 entries of 'pixel_values'"):
        clean.batch.rows(slice(1, 2))
    tower = Model(module.model.visual)
    alone = tower.run({name: given[name] for name in ("pixel_values", "image_grid_thw")})
    wanted = module.model.visual(given["pixel_values"], given["image_grid_thw"]).last_hidden_state
    assert off(alone.logits, wanted.reshape(2, 16, 32)) < ROUNDING
    again = of.run(given, capture=["z"])  # the tower is known to attend in chunks now
    assert off(again.logits, clean.logits) < ROUNDING


# --- sound -----------------------------------------------------------------------------------------


@cache
def sound() -> Model:
    config = Qwen3ASREncoderConfig(
        d_model=32,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        encoder_layers=2,
        num_mel_bins=16,
        downsample_hidden_size=8,
        n_window_infer=200,
    )
    return Model(randomised(Qwen3ASREncoder, config), id="sound")


def spectrograms(lengths: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(500) < torch.tensor(lengths)[:, None]
    features = torch.randn(len(lengths), 16, 500, generator=generator)
    return {"input_features": features, "input_features_mask": mask.long()}


def test_sound_whose_rows_are_packed_and_attend_in_chunks() -> None:
    spec = sound().spec
    assert {block.axes for block in spec.blocks} == {FLAT} and not spec.refused
    batch = spectrograms([430, 430])  # chunks of 200 frames: 26 positions
    names = [site for site in AXES if sound().layers_with(site)]
    run = sound().run(batch, capture=names)
    with torch.no_grad():
        wanted = sound().module(**batch).last_hidden_state
    assert run.logits is not None and off(run.logits, wanted.reshape(run.logits.shape)) < ROUNDING
    pattern = run.cache["pattern.0"]
    ends = [0, 26, 52, pattern.shape[2]]
    inside = torch.block_diag(*[torch.ones(b - a, b - a) for a, b in pairwise(ends)]) > 0
    assert bool(((pattern > 0) == inside).all())
    alone = sound().run({name: x[1:] for name, x in batch.items()}, capture=names)
    for site in names:
        for layer, x in alone.cache.by_layer(site).items():
            assert off(run.cache[Site(site, layer)][1:], x) < 10 * ROUNDING, site
    edit = Edit.mean("z", heads=[(0, 1)]).on_rows(slice(1, 2))
    edited = sound().run(batch, edits=[edit], capture=["resid_post", "z"])
    run = sound().run(batch, capture=["resid_post", "z"])  # SDPA rounds in another way
    assert torch.equal(edited.cache["resid_post"][0], run.cache["resid_post"][0])
    assert off(edited.cache["resid_post"][1], run.cache["resid_post"][1]) > 100 * ROUNDING
    assert (
        off(edited.cache["z.0"][1, :, 1], run.cache["z.0"][1, :, 1].mean(0).expand(ends[-1], -1))
        < ROUNDING
    )


def test_sound_of_several_lengths_is_refused() -> None:
    with pytest.raises(BadInput, match="these have 65, 56 positions"):
        sound().run(spectrograms([500, 430]), capture=["resid_post"])


@FORMS
def test_each_position_says_whose_patch_it_holds(form: str) -> None:
    """What it says is what moves: other pixels in one patch of an image move the positions with its number alone."""
    given = model(form).as_batch(images(form))
    found, taken = patch_numbers(model(form), given), taken_as(model(form).module)
    assert taken is not None and torch.equal(found[0], found[1])
    n = int(found.max()) + 1
    assert int((found[0] < 0).sum()) == (form == "class token")
    in_order = torch.equal(found[0], torch.arange(found.shape[1]))
    assert in_order == (form not in ("windows", "class token"))

    def stream(batch: Batch) -> Tensor:
        run = model(form).run(batch, capture=["resid_pre.0"], stop_at=0, logits=False)
        return run.cache["resid_pre.0"]

    plain, x = stream(given), given.inputs[taken.name]
    for number in (0, 9, n - 1):
        other = x.clone().movedim(taken.axis, 0)
        start = (n + number) * taken.entries  # of the second image
        other[start : start + taken.entries] += 1.0
        pixels = {taken.name: other.movedim(0, taken.axis)}
        moved = stream(replace(given, inputs={**given.inputs, **pixels})) - plain
        changed = moved.abs().amax(-1) > ROUNDING * float(plain.abs().max())
        assert torch.equal(changed[1], found[1] == number) and not changed[0].any()


def test_a_model_of_whole_images_has_no_numbers_of_patches() -> None:
    with pytest.raises(Refused, match="patch_grid tells"):
        patch_numbers(Model(FAMILIES["vit"]()), {})
