"""Images held in rows and columns, several lists of blocks called in turn, and what is refused by name."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from benchmarks.architectures import runs
from benchmarks.tiny_configs import tiny_model
from interp.data.images import reads_images
from interp.errors import BadInput, Refused
from interp.models.calls import main_input
from interp.models.layout import IMAGE, held, shown
from interp.models.model import Model
from interp.models.probe import probe_batch
from interp.run.batch import Batch
from interp.run.edits import Edit
from tests.families import FAMILIES

IDS = torch.randint(10, 97, (2, 9), generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
ROUNDING = 1e-5
"""A few float32 roundings, two or three blocks deep."""


def off(got: Tensor | None, wanted: Tensor | None) -> float:
    assert got is not None and wanted is not None and got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


def read_by(model: Model, module: nn.Module, data: dict[str, Tensor]) -> list[Tensor]:
    """What a module is called with, call by call, in a plain forward."""
    kept: list[Tensor] = []
    hook = module.register_forward_pre_hook(
        lambda module, args, kwargs: kept.append((*args, *kwargs.values())[0].clone()),
        with_kwargs=True,
    )
    with torch.no_grad():
        model.module(**data)
    hook.remove()
    return kept


# --- rows and columns -----------------------------------------------------------------------------


@cache
def image_model() -> Model:
    """Three blocks on an image of 8 x 8 patches, which attend to all of it."""
    torch.manual_seed(0)
    config = transformers.Sam3ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        pretrain_image_size=32,
        patch_size=4,
        window_size=0,
        global_attn_indexes=[0, 1, 2],
    )
    module = transformers.Sam3ViTModel(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return Model(module, id="image")


@pytest.mark.parametrize("name", ["sam_vision", "sam3"])
def test_positions_are_the_rows_of_an_image_one_after_the_other(name: str) -> None:
    model = image_model() if name == "sam3" else Model(FAMILIES[name](), id=name)
    assert (model.spec.hidden_axes, model.spec.d_model) == (IMAGE, 32)
    cache = model.run({"pixel_values": PIXELS}, capture=["resid_pre"]).cache
    side = 8 if name == "sam3" else 4
    for layer in range(model.n_layers):
        (raw,) = read_by(model, model.blocks[layer], {"pixel_values": PIXELS})
        assert raw.shape == (2, side, side, 32)
        mine = cache[f"resid_pre.{layer}"]
        for row in range(side):
            assert torch.equal(mine[:, side * row : side * (row + 1)], raw[:, row])


def test_attention_to_the_whole_image_has_every_site() -> None:
    model = image_model()
    assert not model.spec.refused
    batch = Batch({"pixel_values": PIXELS})
    run = model.run(batch, capture=["resid_pre", "attn_write", "resid_mid", "mlp_write", "pattern"])
    assert run.cache["pattern.1"].shape == (2, 4, 64, 64)
    mid = run.cache["resid_pre.1"] + run.cache["attn_write.1"]
    assert off(mid, run.cache["resid_mid.1"]) < ROUNDING
    edits = [Edit.zero("z", heads=[(1, 2)]), Edit.zero("resid_mid.2", positions=[9])]
    for edit in edits:
        (replayed,) = model.replay(run, [[edit]], lambda variant: variant.logits)
        rerun = model.run(batch, edits=[edit]).logits
        assert off(replayed, rerun) < ROUNDING
        assert off(rerun, run.logits) > 100 * ROUNDING


def test_what_is_held_of_an_image_has_any_number_of_rows() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(held(shown(x, IMAGE, 2), IMAGE, x.shape), x)
    assert held(shown(x, IMAGE, 2).repeat(2, 1, 1), IMAGE, x.shape).shape == (4, 3, 4, 5)


# --- several lists ----------------------------------------------------------------------------------


def test_layers_of_two_stacks_are_their_calls_in_turn() -> None:
    """Each layer's resid_pre is what the plain forward called that module with, that time."""
    model = Model(FAMILIES["hrm_text"](), id="hrm")
    names = [block.name for block in model.spec.blocks]
    low, high = (["model.L_module.layers.0"] * 2, ["model.H_module.layers.0"])
    per_stack = len({name for name in names if "L_module" in name})
    assert names[:: max(1, per_stack)] == [*low, *high, *low, *high]
    cache = model.run(IDS, capture=["resid_pre"]).cache
    for name in sorted(set(names)):
        calls = read_by(model, model.module.get_submodule(name), {"input_ids": IDS})
        layers = [layer for layer, each in enumerate(names) if each == name]
        assert len(calls) == len(layers)
        for layer, raw in zip(layers, calls, strict=True):
            assert torch.equal(cache[f"resid_pre.{layer}"], raw)
    (failed,) = (check for check in model.spec.checks if not check.passed)
    assert failed.name == "stream"
    with pytest.raises(Refused, match="between blocks"):
        model.require_sum("this test")


def test_what_a_model_computes_without_gradients_has_none_rather_than_zeros() -> None:
    """HRM's forward runs its first calls in torch.no_grad; that these change its logits a plain hook shows."""
    model = Model(FAMILIES["hrm_text"](), id="hrm")
    run = model.run(IDS, capture=["resid_pre", "z"], grad=True)
    target = run.logits[0, -1, 5]
    edit = Edit.apply("resid_pre.0", lambda x, seen: 2 * x.flip(-1))
    assert (model.run(IDS, edits=[edit]).logits - run.logits).abs().max() > 1e-3
    for site in ("resid_pre.0", "z.0", "z"):
        with pytest.raises(BadInput, match="with gradients switched off"):
            run.gradients(target, site)
    assert run.gradients(target, f"z.{model.n_layers - 1}").any()


def test_towers_side_by_side_are_not_one_stream() -> None:
    """Of one width and length, so that nothing but what moves what tells them apart."""

    class Towers(transformers.BertPreTrainedModel):
        main_input_name = "input_ids"

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.one, self.two = transformers.BertModel(config), transformers.BertModel(config)
            self.post_init()

        def forward(self, input_ids: Tensor) -> Any:
            out = self.one(input_ids)
            out.last_hidden_state = out.last_hidden_state + self.two(input_ids).last_hidden_state
            return out

    config = transformers.BertConfig(**FAMILIES["bert"].options)
    with pytest.raises(Refused, match=r"2 stacks of attention blocks.*`model.one` or `model.two`"):
        Model(Towers(config).eval())


def test_towers_of_two_widths_are_not_stages() -> None:
    """Stages are called in turn, and each reads what was made of the one before."""

    class Towers(transformers.BertPreTrainedModel):
        main_input_name = "input_ids"

        def __init__(self, config: Any, narrow: Any) -> None:
            super().__init__(config)
            self.one, self.two = transformers.BertModel(config), transformers.BertModel(narrow)
            self.post_init()

        def forward(self, input_ids: Tensor) -> Any:
            out = self.one(input_ids)
            mean = self.two(input_ids).last_hidden_state.mean(-1, keepdim=True)
            out.last_hidden_state = out.last_hidden_state + mean
            return out

    options = FAMILIES["bert"].options
    wide, narrow = (
        transformers.BertConfig(**{**options, "hidden_size": width}) for width in (32, 16)
    )
    with pytest.raises(Refused, match=r"2 stacks of attention blocks.*`model.one` or `model.two`"):
        Model(Towers(wide, narrow).eval())


def test_a_part_that_reads_neither_tokens_nor_pixels_is_refused() -> None:
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    )
    with pytest.raises(Refused, match="neither tokens nor pixels"):
        Model(transformers.SwinModel(config).eval().encoder.layers[1])


# --- parts that a refusal names ---------------------------------------------------------------------


def refusal_of(module: nn.Module) -> str:
    with pytest.raises(Refused, match="stacks of attention blocks") as caught:
        Model(module)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "class_name"), [("owlvit", "OwlViTModel"), ("groupvit", "GroupViTModel")]
)
def test_every_part_that_is_named_can_be_loaded(name: str, class_name: str) -> None:
    """Their image towers inherit "input_ids" from the whole model, or are no pretrained model by class."""
    module = tiny_model(name, class_name, runs)
    assert (
        "; pass one part of the model: `model.vision_model` or `model.text_model`; or name one"
        in refusal_of(module)
    )
    for part, reads in (("vision_model", "pixel_values"), ("text_model", "input_ids")):
        model = Model(module.get_submodule(part), id=part)
        assert not model.spec.refused and all(check.passed for check in model.spec.checks)
        assert main_input(model.module) == reads and reads_images(model) == (part == "vision_model")
        assert {"heads", "block writes", "writes"} <= {check.name for check in model.spec.checks}
        batch = probe_batch(model.module)
        run = model.run(batch, capture=["resid_post", "pattern"])
        with torch.no_grad():
            plain = model.module(**batch.inputs).last_hidden_state
        assert off(run.logits, plain) < ROUNDING
        (again,) = model.replay(
            model.run(batch, capture=["resid_pre"]),
            [[Edit.zero("z", heads=[(1, 0)])]],
            lambda variant: variant.logits,
        )
        rerun = model.run(batch, edits=[Edit.zero("z", heads=[(1, 0)])]).logits
        assert off(again, rerun) < ROUNDING < off(rerun, plain)
    with pytest.raises(BadInput, match="reads 'pixel_values' and was given input_ids"):
        Model(module.vision_model).run(IDS)


def test_of_several_main_inputs_the_first_is_what_a_model_reads() -> None:
    class Segments(nn.Module):
        main_input_name = ["pixel_values", "task_inputs"]  # noqa: RUF012 - as transformers' OneFormer

        def forward(self, pixel_values: Tensor, task_inputs: Tensor) -> Tensor:
            return pixel_values

    assert main_input(Segments()) == "pixel_values"


def test_stages_with_attention_between_them_are_their_blocks() -> None:
    """GroupViT: behind a stage its patches are gathered into groups, by attention that is in no block."""
    module = tiny_model("groupvit", "GroupViTModel", runs).get_submodule("vision_model")
    spec = Model(module).spec
    assert spec.stack == ", ".join(f"encoder.stages.{i}.layers" for i in range(3))
    assert [list(stage) for stage in spec.stages] == [[0, 1], [2, 3], [4, 5]]
    attends = {name for name, part in module.named_modules() if "Attention" in type(part).__name__}
    assert {name for name in attends if ".downsample." in name}
    assert not any(".downsample." in (block.attention or "") for block in spec.blocks)


def test_stacks_that_are_in_no_model_of_their_own_are_told() -> None:
    """BridgeTower's cross-modal blocks read a text and an image that other blocks have read before."""
    why = refusal_of(tiny_model("bridgetower", "BridgeTowerModel", runs))
    stacks = "vision_model.visual.transformer.resblocks, cross_modal_text_layers, cross_modal_image_layers"
    assert f"`model.text_model` ({stacks}: in no part" in why
