"""Attention that cuts its projected positions into windows as they come, in a stack that gets shorter.

Granite Speech 5: blocks of `CHUNK` frames attend to themselves, the last one padded; the first layers halve
the number of frames; after half of the layers something is added to the stream outside any block.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.granite_speech5 import modeling_granite_speech5 as theirs
from transformers.models.granite_speech5.configuration_granite_speech5 import (
    GraniteSpeech5EncoderConfig,
)

from interp.errors import BadInput, Refused
from interp.models.attention import implementation
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.edits import Edit

ROUNDING = 1e-5
CHUNK, FRAMES = 8, 72
"""So many frames the probe has; halved twice they are 36 and 18: five windows, then three, with padding."""


@cache
def speech() -> Model:
    config = GraniteSpeech5EncoderConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        num_mel_bins=5,
        max_position_embeddings=CHUNK,
        context_size=CHUNK,
        conv_kernel_size=3,
        subsample_layers=[0, 1],
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = theirs.GraniteSpeech5Encoder(config).eval()
        for parameter in module.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(0.1 * noise) if parameter.ndim < 2 else parameter.copy_(0.2 * noise)
    return Model(module, id="speech")


def sounds(n: int = 2, frames: int = FRAMES) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch({"input_features": torch.randn(n, frames, 20, generator=generator)})


def off(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


def test_attention_is_there_and_writes_are_refused_where_a_block_halves_the_length() -> None:
    model, spec = speech(), speech().spec
    writes = ("attn_write", "mlp_write", "mlp_out", "mlp_post", "resid_mid")
    assert spec.refused.keys() == {f"{site}.{layer}" for site in writes for layer in (0, 1)}
    assert "returns shape (2, 36, 32), reads (2, 72, 32)" in spec.refused["attn_write.0"]
    assert all(model.layers_with(site) == [2, 3] for site in writes)
    assert "writes" in {check.name for check in spec.checks}
    assert spec.not_a_sum
    assert not spec.absent and all(check.passed for check in spec.checks)
    assert [block.starts_stage for block in spec.blocks] == [False, True, True, False]
    assert all(block.windows is not None for block in spec.blocks)
    with pytest.raises(Refused, match="does not add up"):
        model.run(sounds(), capture=["attn_write.0"])
    with pytest.raises(BadInput, match=r"layers with this site: 2.3"):
        model.run(sounds(), edits=[Edit.zero("attn_write.1")])


@torch.no_grad()
def test_blocks_that_keep_the_length_return_the_norm_of_their_writes() -> None:
    model, batch = speech(), sounds(frames=50)
    sites = ["resid_pre", "resid_mid", "resid_post", "attn_write", "mlp_write"]
    run = model.run(batch, capture=sites)
    assert set(run.cache.by_layer("attn_write")) == {2, 3}
    for layer in (2, 3):
        block: Any = model.blocks[layer]
        pre, mid, post, attention, first = (run.cache[f"{site}.{layer}"] for site in sites)
        assert off(pre + first + attention, mid) < ROUNDING
        mid = mid + block.conv(block.norm_conv(mid), attention_mask=None)
        mid = mid + 0.5 * block.feed_forward2(block.norm_feed_forward2(mid))
        assert off(block.norm_out(mid), post) < ROUNDING

    def halved(module: nn.Module, args: tuple, kwargs: dict, out: tuple) -> tuple:
        return (out[0] / 2, *out[1:])

    hook = model.module.get_submodule("layers.2.self_attn").register_forward_hook(
        halved, with_kwargs=True
    )
    wanted = model.module(**batch.inputs).last_hidden_state
    hook.remove()
    got = model.run(batch, edits=[Edit.scale("attn_write.2", 0.5)]).logits
    assert got is not None and off(got, wanted) < ROUNDING
    assert run.logits is not None and off(run.logits, wanted) > ROUNDING


@pytest.mark.parametrize("frames", [72, 71, 16, 50])
def test_patterns_are_those_of_the_model_s_own_kernel(
    frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, weights = speech(), sounds(frames=frames), []
    run = model.run(batch, capture=["pattern", "z", "v", "resid_pre", "attn_out"])
    kernel = theirs.eager_attention_forward

    def keep(*args: Any, **named: Any) -> Any:
        z, pattern = kernel(*args, **named)
        weights.append((z, pattern, args[3]))
        return z, pattern

    monkeypatch.setattr(theirs, "eager_attention_forward", keep)
    with torch.no_grad(), implementation(model.module, "eager"):
        wanted = model.module(**batch.inputs).last_hidden_state
    assert run.logits is not None and off(run.logits, wanted) < ROUNDING
    for layer, (z, pattern, v) in enumerate(weights):
        length = frames // [1, 2, 4, 4][layer]
        shown = run.cache[f"pattern.{layer}"]
        assert run.cache[f"resid_pre.{layer}"].shape == (2, length, 32)
        n = len(pattern) // 2
        assert shown.shape == (2, 4, length, n * CHUNK)  # padding's keys behind the positions
        own = torch.zeros_like(shown)
        for row in range(2):
            for query in range(length):
                window, at = divmod(query, CHUNK)
                keys = slice(window * CHUNK, (window + 1) * CHUNK)
                own[row, :, query, keys] = pattern[row * n + window, :, at]
                assert torch.equal(run.cache[f"z.{layer}"][row, query], z[row * n + window, at])
                mine = run.cache[f"v.{layer}"][row, query]
                assert torch.equal(mine, v[row * n + window, :, at])
        assert off(shown, own) < ROUNDING
        heads = torch.einsum("bphd,hdm->bpm", run.cache[f"z.{layer}"], model.W_O(layer))
        assert off(heads + model.b_O(layer), run.cache[f"attn_out.{layer}"]) < ROUNDING


@pytest.mark.parametrize("layer", range(4))
def test_an_edit_of_a_position_is_of_that_frame(layer: int) -> None:
    model, batch, position = speech(), sounds(), 10  # in the second window
    edits = [
        Edit.zero(f"z.{layer}.2", positions=[position]).on_rows(slice(1, 2)),
        Edit.zero(f"resid_post.{layer}", positions=[4]).on_rows(slice(1, 2)),
    ]

    def head(module: nn.Module, args: tuple) -> tuple:
        x = args[0].clone()
        x[1, position, 16:24] = 0
        return (x,)

    def end(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        out = out.clone()
        out[1, 4] = 0
        return out

    block = model.blocks[layer]
    clean = model.run(batch).logits
    hooks = [
        model.module.get_submodule(model.spec.blocks[layer].W_O or "").register_forward_pre_hook(
            head
        ),
        block.register_forward_hook(end),
    ]
    wanted = model.run(batch).logits
    for hook in hooks:
        hook.remove()
    got = model.run(batch, edits=edits).logits
    assert got is not None and wanted is not None and clean is not None
    assert off(got, wanted) < ROUNDING < off(wanted, clean)
    assert torch.equal(got[0], clean[0])


def test_a_replay_is_a_rerun_and_a_row_is_as_it_is_alone() -> None:
    model, batch = speech(), sounds(3)
    clean = model.run(batch, capture=["resid_pre", "pattern"])
    edits = [Edit.scale(f"resid_pre.{layer}", 0.5, positions=[3]) for layer in range(4)]
    edits += [Edit.zero("z", heads=[(layer, 1)]) for layer in range(4)]
    edits += [Edit.zero(f"pattern.{layer}.0", positions=[2, 9]) for layer in range(4)]
    replayed = model.replay(clean, [[edit] for edit in edits], lambda run: run.logits)
    for edit, got in zip(edits, replayed, strict=True):
        wanted = model.run(batch, edits=[edit]).logits
        assert off(got, wanted) < ROUNDING < off(wanted, clean.logits), edit.site
    for row in range(3):
        alone = model.run(batch.rows(slice(row, row + 1)), capture=["pattern"])
        assert off(clean.logits[row], alone.logits[0]) < ROUNDING
        for layer, pattern in alone.cache.by_layer("pattern").items():
            assert off(clean.cache[f"pattern.{layer}"][row], pattern[0]) < ROUNDING
