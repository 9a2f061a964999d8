"""Decoders of masks: tokens and image attend to each other, and the blocks' stream is that of the tokens.

The third attention of a block writes to the image, which later blocks read: it is at no site, and what it carries on
is part of every run, edit and replay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.architectures import runs
from benchmarks.tiny_configs import tiny_model
from interp.errors import BadInput
from interp.models.block_map import Aside
from interp.models.model import Model
from interp.run.edits import Edit

CLASSES = {"sam": "SamModel", "sam2": "Sam2Model"}
LAYERS = "mask_decoder.transformer.layers"
ROUNDING = 1e-5
"""A few float32 roundings, two blocks deep."""
MOVED = 1e-3
"""A hundred times that: an effect, and no rounding."""
every = pytest.mark.parametrize("family", CLASSES)


def off(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


@cache
def opened(family: str) -> Model:
    module = tiny_model(family, CLASSES[family], runs)
    assert sum(x.numel() for x in module.parameters()) < 3_000_000
    torch.manual_seed(3)
    for name, parameter in module.named_parameters():
        if name.startswith("mask_decoder") and parameter.ndim == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))  # norms and biases that tell
    return Model(module, id=family, stack=LAYERS)


def inputs(prompts: int = 1) -> dict[str, Tensor]:
    """Two images with three points a prompt."""
    generator = torch.Generator().manual_seed(7)
    return {
        "pixel_values": torch.randn(2, 3, 224, 224, generator=generator),
        "input_points": 224 * torch.rand(2, prompts, 3, 2, generator=generator),
        "input_labels": torch.ones(2, prompts, 3, dtype=torch.long),
    }


def block_of(model: Model, layer: int) -> Any:
    return model.module.get_submodule(f"{LAYERS}.{layer}")


Called = dict[str, tuple[list[Tensor], Any]]


@contextmanager
def calls_of(block: nn.Module) -> Iterator[Called]:
    """What every module of a block was given and returned, by name."""
    seen: Called = {}
    hooks = [
        part.register_forward_hook(
            lambda module, args, kwargs, out, name=name: seen.__setitem__(
                name, ([x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)], out)
            ),
            with_kwargs=True,
        )
        for name, part in block.named_modules()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def last_linear(attention: Any) -> str:
    return "out_proj" if hasattr(attention, "out_proj") else "o_proj"


@every
def test_attention_of_each_role_is_found(family: str) -> None:
    model = opened(family)
    assert not set(model.spec.refused) - model.spec.absent
    for layer, block in enumerate(model.spec.blocks):
        name = f"{LAYERS}.{layer}"
        assert block.attention == f"{name}.self_attn" and block.attn_write is not None
        assert block.cross is not None and block.cross.write is not None
        assert block.cross.attention == f"{name}.cross_attn_token_to_image"
        assert block.cross.d_head < block.d_head
        assert block.asides == (Aside(f"{name}.cross_attn_image_to_token"),)
        assert (block.carry_first is not None) == (layer == 0)  # attention replaces what it reads
    assert any("cross_attn_image_to_token" in note for note in model.notes)
    assert not model.spec.chained and model.spec.not_a_sum


@every
def test_sites_are_what_a_plain_forward_has(family: str) -> None:
    model, given = opened(family), inputs()
    names = ["resid_pre", "z", "v", "pattern", "attn_write", "cross_pattern", "cross_z"]
    names += ["cross_write", "resid_mid", "mlp_post", "mlp_write", "resid_post"]
    run = model.run(given, capture=names)
    for layer in range(model.n_layers):
        block, at = block_of(model, layer), {name: run.cache[f"{name}.{layer}"] for name in names}
        with calls_of(block) as seen, torch.no_grad():
            scores = model.module(**given).iou_scores
        assert run.logits is not None and off(run.logits, scores) < ROUNDING
        for name, part in (
            ("resid_pre", seen["self_attn"][0][-1]),  # the values
            ("attn_write", seen["self_attn"][1][0]),
            ("cross_write", seen["cross_attn_token_to_image"][1][0]),
            ("resid_mid", seen["layer_norm2"][1]),
            ("mlp_write", seen["mlp"][1]),
            ("resid_post", seen[""][1][0]),
        ):
            assert off(at[name], part.flatten(1, 2)) < ROUNDING, name
        for prefix, attention in (("", "self_attn"), ("cross_", "cross_attn_token_to_image")):
            module = getattr(block, attention)
            z = at[f"{prefix}z"]
            read = seen[f"{attention}.{last_linear(module)}"][0][0]
            assert off(z.flatten(2), read.reshape(2, z.shape[1], -1)) < ROUNDING
            q, k, v = (
                seen[f"{attention}.{of}_proj"][1].reshape(2, -1, *z.shape[2:]) for of in "qkv"
            )
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / z.shape[-1] ** 0.5
            assert off(at[f"{prefix}pattern"], scores.softmax(-1)) < ROUNDING
            assert off(z, torch.einsum("bhqk,bkhd->bqhd", at[f"{prefix}pattern"], v)) < ROUNDING


@every
def test_writes_through_the_norms_are_what_blocks_return(family: str) -> None:
    model = opened(family)
    names = ["resid_pre", "attn_write", "cross_write", "resid_mid", "mlp_write", "resid_post"]
    cache = model.run(inputs(), capture=names).cache
    for layer in range(model.n_layers):
        block = block_of(model, layer)
        pre, attn, cross, mid, mlp, post = (cache[f"{name}.{layer}"] for name in names)
        x = block.layer_norm1(attn if layer == 0 else pre + attn)
        assert off(block.layer_norm2(x + cross), mid) < ROUNDING
        assert off(block.layer_norm3(mid + mlp), post) < ROUNDING


@contextmanager
def by_hand(model: Model, layer: int, site: str) -> Iterator[None]:
    """Inside, a plain forward has the site's head 1, or all of it, at zero."""
    block = block_of(model, layer)
    attention = block.self_attn if site == "z" else block.cross_attn_token_to_image
    if site in ("z", "cross_z"):

        def without(module: nn.Module, args: tuple) -> tuple:
            x = args[0].unflatten(-1, (4, -1)).clone()
            x[..., 1, :] = 0
            return (x.flatten(-2),)

        hook = getattr(attention, last_linear(attention)).register_forward_pre_hook(without)
    else:
        part = block.layer_norm2 if site == "resid_mid" else block.mlp
        hook = part.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    try:
        yield
    finally:
        hook.remove()


def edit_of(site: str, layer: int) -> Edit:
    of_heads = site in ("z", "cross_z")
    return Edit.zero(site, heads=[(layer, 1)]) if of_heads else Edit.zero(f"{site}.{layer}")


@every
@pytest.mark.parametrize("site", ["z", "cross_z", "resid_mid", "mlp_write"])
def test_an_edit_has_its_effect_through_the_image_too(family: str, site: str) -> None:
    model, given = opened(family), inputs()
    run = model.run(given, capture=["resid_pre", "cross_v"])
    variants = [[edit_of(site, layer)] for layer in range(model.n_layers)]
    again = model.replay(run, variants, lambda each: each.logits)
    for layer, variant in enumerate(variants):
        edited = model.run(given, capture=["cross_v.1"], edits=variant)
        with torch.no_grad(), calls_of(block_of(model, 1)) as seen, by_hand(model, layer, site):
            wanted = model.module(**given)
        with torch.no_grad(), model.hooked(given, edits=variant):
            whole = model.module(**given)
        assert off(whole.pred_masks, wanted.pred_masks) < ROUNDING
        replayed = again[layer]
        assert edited.logits is not None and run.logits is not None and replayed is not None
        assert off(edited.logits, wanted.iou_scores) < ROUNDING
        assert off(replayed, wanted.iou_scores) < ROUNDING
        assert off(wanted.iou_scores, run.logits) > MOVED
        image = seen["cross_attn_token_to_image.v_proj"][1]
        assert off(edited.cache["cross_v.1"].flatten(2), image.flatten(0, 1)) < ROUNDING
        moved = off(edited.cache["cross_v.1"], run.cache["cross_v.1"])
        assert moved > MOVED if layer == 0 else moved == 0


def test_heads_of_several_prompts_an_image_are_refused() -> None:
    """They are rows that do not see each other; the stream has them one after the other."""
    model, given = opened("sam"), inputs(prompts=2)
    resid = model.run(given, capture=["resid_mid.1"])
    assert resid.cache["resid_mid.1"].shape[:2] == (2, 2 * 9)
    for name in ("z", "pattern.1", "cross_pattern"):
        with pytest.raises(BadInput, match="4 rows for 2 inputs"):
            model.run(given, capture=[name])
    with pytest.raises(BadInput, match="4 rows for 2 inputs"):
        model.run(given, edits=[Edit.zero("z", heads=[(0, 1)])])


def test_what_comes_back_to_the_stream_is_no_other_stream() -> None:
    """A block whose third attention reaches its tokens as well: its heads are refused, not passed over."""
    module = tiny_model("sam", "SamModel", runs)

    def with_image(block: nn.Module, args: tuple, out: tuple) -> tuple:
        return (out[0] + out[1].mean(2, keepdim=True), *out[1:])

    for layer in module.get_submodule(LAYERS).children():
        forward = layer.forward
        layer.forward = lambda *args, of=layer, run=forward, **kwargs: with_image(  # type: ignore[method-assign]
            of, args, run(*args, **kwargs)
        )
    model = Model(module, id="sam", stack=LAYERS)
    assert "attends 3 times" in model.spec.refused["z"]
    assert not any(block.asides for block in model.spec.blocks)
