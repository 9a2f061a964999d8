"""Layers that are called again on another stream, every row of which attends to a part of a source of its own.

EdgeTAM's perceiver sums up a map of features: its layers run on latents that see the whole map, and again on a row
for each window of the map, which sees that window.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.edgetam_video.modeling_edgetam_video import (
    EdgeTamVideoPerceiverEncoderLayer,
)

from interp import Edit, Model

LATENTS, WINDOWS, SIDE, WIDTH = 5, 9, 6, 32
LAYERS, KEYS = 2, SIDE * SIDE
AGAIN = range(LAYERS, 2 * LAYERS)
"""The layers of the second round."""


class Summary(nn.Module):
    """Layers of a perceiver, which read a map of features: with one head, since they mix up several."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.EdgeTamVideoConfig(
            perceiver_resampler_hidden_size=WIDTH,
            perceiver_resampler_mlp_intermediate_size=48,
            perceiver_resampler_num_attention_heads=1,
            perceiver_resampler_attention_head_dim=WIDTH,
        )
        self.config._attn_implementation = "sdpa"
        self.latents = nn.Parameter(torch.randn(LATENTS, WIDTH))
        self.of_windows = nn.Parameter(torch.randn(WINDOWS, WIDTH))
        self.layers = nn.ModuleList(
            EdgeTamVideoPerceiverEncoderLayer(self.config) for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, features: Tensor) -> Tensor:
        """Of features [batch height width d_model], the latents [batch pos d_model]."""
        rows, whole = len(features), features.flatten(1, 2)
        first = self.latents.expand(rows, -1, -1)
        second = self.of_windows.repeat(rows, 1).unsqueeze(1)
        for layer in self.layers:
            first = layer(first, whole, 0.1 * whole)
        for layer in self.layers:
            second = layer(second, in_windows(features).flatten(0, 1))
        return self.norm(torch.cat([first, second.reshape(rows, WINDOWS, WIDTH)], 1))


def in_windows(x: Tensor) -> Tensor:
    """[batch height width d] as [batch windows within d]."""
    side = round(WINDOWS**0.5)
    x = x.unflatten(2, (side, -1)).unflatten(1, (side, -1))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def layers_of(model: Model) -> Any:
    """The modules of both rounds."""
    return model.module.layers


def features(rows: int) -> Tensor:
    return torch.randn(rows, SIDE, SIDE, WIDTH, generator=torch.Generator().manual_seed(rows))


@cache
def opened(rows: int) -> Model:
    torch.manual_seed(0)
    module = Summary().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return Model(module, example={"features": features(rows)})


@pytest.mark.parametrize("rows", [1, 2])
def test_each_round_is_layers_of_its_own_and_all_sites_are_there(rows):
    model = opened(rows)
    assert model.n_layers == 2 * LAYERS and [len(stage) for stage in model.spec.stages] == [2, 2]
    cross = {f"cross_{site}" for site in ("q", "k", "v", "scores", "pattern", "z", "out", "write")}
    assert not (cross | {"pattern", "z", "attn_out", "attn_write", "mlp_out"}) & set(
        model.spec.refused
    )
    run = model.run({"features": features(rows)}, ["resid_post"])
    first, second = (run.cache[f"resid_post.{i}"] for i in (LAYERS - 1, 2 * LAYERS - 1))
    assert first.shape == (rows, LATENTS, WIDTH) and second.shape == (rows, WINDOWS, WIDTH)
    norm: Any = model.module.norm
    normed = norm(torch.cat([first, second], 1))
    torch.testing.assert_close(normed, model.module(features(rows)))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_window_attends_to_its_own_part_of_the_source(rows):
    model = opened(rows)
    sites = ["cross_q", "cross_k", "cross_scores", "cross_pattern", "cross_v", "cross_z"]
    cache = model.run({"features": features(rows)}, sites).cache
    for layer in AGAIN:
        pattern = cache[f"cross_pattern.{layer}"]
        assert pattern.shape == (rows, 1, WINDOWS, KEYS)
        torch.testing.assert_close(pattern.sum(-1), torch.ones(rows, 1, WINDOWS))
        own = torch.eye(WINDOWS).repeat_interleave(KEYS // WINDOWS, 1).bool()
        assert torch.equal(pattern > 0, own.expand_as(pattern))
        q, k, v, z = (cache[f"cross_{x}.{layer}"] for x in "qkvz")
        scores = torch.einsum("bphd,bshd->bhps", q, k) / WIDTH**0.5
        shown = cache[f"cross_scores.{layer}"]
        torch.testing.assert_close(shown, scores.masked_fill(~own, -torch.inf))
        torch.testing.assert_close(torch.einsum("bhps,bshd->bphd", pattern, v), z)
        block: Any = layers_of(model)[layer - LAYERS]
        read = in_windows(features(rows)).flatten(1, 2)
        wanted = block.cross_attention.k_proj(block.layer_norm_input(read))
        torch.testing.assert_close(k.flatten(2), wanted)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("site", ["cross_z", "cross_pattern", "cross_v", "z"])
@pytest.mark.parametrize("layer", [0, AGAIN[0]])
def test_a_layer_of_one_round_is_edited_alone(rows, site, layer):
    model, batch = opened(rows), {"features": features(rows)}
    block: Any = layers_of(model)[layer % LAYERS]
    attention = block.self_attention if site == "z" else block.cross_attention
    calls = []

    def without(module: nn.Module, args: tuple) -> tuple | None:
        calls.append(0)
        return (0 * args[0],) if len(calls) - 1 == layer // LAYERS else None

    with torch.no_grad():
        plain = model.module(batch["features"])
        handle = attention.o_proj.register_forward_pre_hook(without)
        wanted = model.module(batch["features"])
        handle.remove()
    edited = model.run(batch, edits=[Edit.zero(f"{site}.{layer}")]).logits
    torch.testing.assert_close(edited, wanted)
    half = slice(0, LATENTS) if layer < LAYERS else slice(LATENTS, None)
    changed = (edited - plain).abs().amax((0, 2)) > 1e-3
    assert changed[half].all() and changed.sum() == changed[half].numel()


@pytest.mark.parametrize("rows", [1, 2])
def test_heads_sum_to_what_the_attention_to_the_source_writes(rows):
    model = opened(rows)
    cache = model.run({"features": features(rows)}, ["cross_z", "cross_out", "cross_write"]).cache
    for layer in range(model.n_layers):
        W = layers_of(model)[layer % LAYERS].cross_attention.o_proj.weight
        made = cache[f"cross_z.{layer}"].flatten(2) @ W.T
        torch.testing.assert_close(cache[f"cross_out.{layer}"], made)
        torch.testing.assert_close(cache[f"cross_write.{layer}"], made)
