"""Windows that stay cut from block to block, and a block that attends to all of an image's in one row.

RF-DETR's backbone cuts an image into windows, each with a class token of its own, before its blocks: a row of the
batch for each. Some blocks attend within these rows, others put all rows of an image into one. Tolerance: float64,
three blocks deep.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import RfDetrDinov2Backbone, RfDetrDinov2Config

from interp.models.layout import PARTS
from interp.models.mapped import as_mapped
from interp.models.model import Model
from interp.models.probe import probe_batch
from interp.models.recording import record
from interp.run.edits import Edit
from interp.sites import AXES

ROUNDING = 1e-11
WINDOWS, LENGTH, HEADS = 4, 5, 2
"""Of an image of 16 × 16: two rows of two windows, of four patches and a class token each."""
WHOLE = 1
"""The layer that attends across windows."""


@cache
def module() -> RfDetrDinov2Backbone:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": HEADS,
        "num_hidden_layers": 3,
        "mlp_ratio": 2,
    }
    windows = {"image_size": 16, "patch_size": 4, "num_windows": 2, "window_block_indexes": [0, 2]}
    others: dict[str, Any] = {"out_indices": [3], "initializer_range": 0.2}
    config = RfDetrDinov2Config(**sizes, **windows, **others)
    return RfDetrDinov2Backbone(config).double().eval()


@cache
def model() -> Model:
    return Model(module(), id="windows")


def whole_attention() -> Any:
    return module().get_submodule(f"encoder.layer.{WHOLE}.attention")


def images(n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(n, 3, 16, 16, generator=generator).double()}


def close(got: Tensor, wanted: Tensor) -> bool:
    assert got.shape == wanted.shape
    return float((got - wanted).detach().abs().max()) < ROUNDING * float(wanted.abs().max())


def test_every_site_is_the_model_s_own_where_a_row_holds_all_windows() -> None:
    assert [block.axes for block in model().spec.blocks] == [PARTS] * 3
    assert model().spec.refused.keys() == model().spec.absent
    read: list[Tensor] = []
    hook = whole_attention().o_proj.register_forward_pre_hook(
        lambda part, args: read.append(args[0])
    )
    try:
        sites = [site for site in AXES if model().layers_with(site)]
        cache = model().run(images(2), capture=sites).cache
    finally:
        hook.remove()
    assert read[0].shape == (2, WINDOWS * LENGTH, 16)
    assert close(cache[f"z.{WHOLE}"].flatten(2), read[0])
    for layer in range(3):
        pattern, z = cache[f"pattern.{layer}"], cache[f"z.{layer}"]
        assert close(torch.einsum("bhqk,bkhd->bqhd", pattern, cache[f"v.{layer}"]), z)
        assert close(
            cache[f"resid_pre.{layer}"]
            + cache[f"attn_write.{layer}"]
            + cache[f"mlp_write.{layer}"],
            cache[f"resid_post.{layer}"],
        )
        own = torch.block_diag(*[torch.ones(LENGTH, LENGTH)] * WINDOWS).bool()
        assert bool((pattern[..., ~own] == 0).all()) == (layer != WHOLE)


def test_a_head_ablated_at_some_positions_of_all_windows_is_what_plain_hooks_make_of_it() -> None:
    positions = torch.tensor([1, LENGTH + 2, 3 * LENGTH])

    def silent(part: torch.nn.Module, args: tuple) -> tuple:
        z = args[0].clone().unflatten(-1, (HEADS, -1))
        z[:, positions, 1] = 0
        return (z.flatten(2),)

    with torch.no_grad():
        plain = module()(**images(2)).feature_maps[0]
        hook = whole_attention().o_proj.register_forward_pre_hook(silent)
        wanted = module()(**images(2)).feature_maps[0]
        hook.remove()
    edit = Edit.zero("z", heads=[(WHOLE, 1)], positions=positions.tolist())
    got = model().run(images(2), edits=[edit]).logits
    assert got is not None
    assert close(got, wanted)
    assert not torch.allclose(wanted, plain)


def test_where_a_row_holds_windows_in_another_order_its_attention_is_refused() -> None:
    hook = whole_attention().v_proj.register_forward_hook(
        lambda part, args, out: out.roll(LENGTH, 1)
    )
    try:
        spec = Model(module(), id="in another order").spec
        layers = as_mapped(spec, record(module(), probe_batch(module())))
    finally:
        hook.remove()
    assert "which parts of an input" in spec.refused[f"z.{WHOLE}"]
    assert not {"z", "z.0", "z.2", "resid_post"} & set(spec.refused)
    assert [layer.attention is None for layer in layers] == [False, True, False]
