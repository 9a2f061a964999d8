"""Members of a list that are blocks in a row, each a layer; and attention from channels to channels, which is none."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.florence2.modeling_florence2 import Florence2VisionBackbone

from benchmarks.tiny_configs import build
from interp.errors import Refused
from interp.models.model import Model
from interp.models.probe import probe_batch
from interp.run.edits import Edit
from interp.sites import AXES

ROUNDING = 1e-4
"""float32; eight blocks in three stages."""
IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
GIVEN = {"hidden_states": IMAGES}


@cache
def davit() -> Model:
    """Three stages of widths 12, 24 and 48 and 256, 64 and 16 positions: at the last, as many as channels a group."""
    config = transformers.Florence2VisionConfig(
        embed_dim=[12, 24, 48],
        depths=[1, 1, 2],
        num_heads=[2, 2, 3],
        num_groups=[2, 2, 3],
        patch_size=[7, 3, 3],
        patch_stride=[4, 2, 2],
        patch_padding=[3, 1, 1],
        patch_prenorm=[False, True, True],
        window_size=4,
        drop_path_rate=0.1,
    )
    module = build(Florence2VisionBackbone, config)
    assert sum(parameter.numel() for parameter in module.parameters()) < 300_000
    return Model(module, id="davit")


def close(got: Tensor, wanted: Tensor) -> bool:
    assert got.shape == wanted.shape
    return float((got - wanted).detach().abs().max() / wanted.abs().max()) < ROUNDING


def test_each_block_in_a_row_is_a_layer_and_returns_what_is_shown() -> None:
    model = davit()
    assert model.n_layers == 8 and [len(stage) for stage in model.spec.stages] == [2, 2, 4]
    names = [block.name for block in model.spec.blocks]
    assert names[:2] == ["blocks.0.0.spatial_block", "blocks.0.0.channel_block"]
    assert model.spec.attention_layers == [0, 2, 4, 6]
    returned: dict[str, Tensor] = {}
    hooks = [
        model.module.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: returned.update({name: out})
        )
        for name in names
    ]
    run = model.run(GIVEN, capture=["resid_post"])
    for hook in hooks:
        hook.remove()
    for layer, name in enumerate(names):
        assert torch.equal(run.cache[f"resid_post.{layer}"], returned[name].flatten(2).mT)


def test_all_sites_are_captured_edited_and_replayed() -> None:
    model = davit()
    assert set(model.spec.refused) == model.spec.absent
    sites = [s for s in AXES if s not in model.spec.refused and model.layers_with(s)]
    assert {"pattern", "z", "attn_write", "mlp_write", "mlp_post", "resid_mid"} <= set(sites)
    with torch.no_grad():
        plain = model.module(**GIVEN).last_hidden_state
    run = model.run(GIVEN, capture=sites)
    assert close(run.logits, plain)
    assert run.cache["pattern.0"].shape == (3, 2, 256, 256)
    torch.testing.assert_close(run.cache["pattern.0"].sum(-1), torch.ones(3, 2, 256))
    same = [Edit.apply(site, lambda x, seen: x) for site in sites]
    assert close(model.run(GIVEN, edits=same).logits, plain)
    edit = [Edit.zero("z", heads=[(4, 1)])]
    without = model.run(GIVEN, edits=edit).logits
    assert not close(without, plain)
    clean = model.run(GIVEN, capture=["resid_pre"])
    (replayed,) = model.replay(clean, [edit], lambda run: run.logits)
    assert close(replayed, without)


def test_a_head_that_is_zeroed_is_missing_from_what_its_layer_writes() -> None:
    model = davit()
    cache = model.run(GIVEN, capture=["z.2", "attn_out.2"]).cache
    less = model.run(GIVEN, capture=["attn_out.2"], edits=[Edit.zero("z", heads=[(2, 1)])]).cache
    head = cache["z.2"][:, :, 1] @ model.W_O(2)[1]
    assert close(cache["attn_out.2"] - less["attn_out.2"], head)


@pytest.mark.parametrize("layer", [1, 5, 7])  # 7: as many channels as positions
def test_attention_over_channels_has_no_site_of_attention(layer: int) -> None:
    model = davit()
    for site in ("q", "pattern", "z", "attn_out"):
        assert f"{site}.{layer}" in model.spec.absent
        with pytest.raises(Refused, match="attends from channels to channels"):
            model.run(GIVEN, capture=[f"{site}.{layer}"])
    cache = model.run(GIVEN, capture=["mlp_out", "mlp_write"]).cache
    torch.testing.assert_close(cache[f"mlp_write.{layer}"], cache[f"mlp_out.{layer}"])
    edit = Edit.zero(f"mlp_write.{layer}")
    assert not close(model.run(GIVEN, edits=[edit]).logits, model.run(GIVEN).logits)


def test_a_convolution_that_reads_no_wave_tells_that_an_image_is_wanted() -> None:
    inputs = probe_batch(davit().module).inputs
    assert {name: tuple(x.shape) for name, x in inputs.items()} == {"hidden_states": (2, 3, 64, 64)}


class Attends(nn.Module):
    """x + softmax(q kᵀ) v W_O."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads, self.qkv, self.out = n_heads, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        z = (q @ k.mT).softmax(-1) @ v
        return x + self.out(z.transpose(1, 2).flatten(2))


class Two(nn.Module):
    """Blocks in a row; `between`: something else is done in between."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.between, self.first, self.second = between, Attends(2), Attends(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x + x.mean(1, keepdim=True) if self.between else x)


class Rows(nn.Module):
    main_input_name = "input_ids"

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.config: Any = PreTrainedConfig(vocab_size=50)
        self.embed = nn.Embedding(50, 8)
        self.blocks = nn.ModuleList(Two(between) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_are_told_apart_only_where_nothing_is_done_between_them() -> None:
    torch.manual_seed(0)
    model = Model(Rows(between=False))
    assert [block.name for block in model.spec.blocks] == [
        f"blocks.{i}.{name}" for i in range(2) for name in ("first", "second")
    ]
    assert not set(model.spec.refused) - model.spec.absent and model.n_layers == 4
    cache = model.run(torch.tensor([[5, 6, 7]]), capture=["pattern"]).cache
    assert [cache[f"pattern.{i}"].shape for i in range(2)] == [(1, 2, 3, 3), (1, 4, 3, 3)]
    other = Model(Rows(between=True))
    assert other.n_layers == 2 and "resid_post" not in other.spec.refused
    assert "no one attention" in other.spec.refused["z"]
