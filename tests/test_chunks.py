"""Attention that cuts its projected positions into windows as they come, in a stack that gets shorter.

Granite Speech 5: blocks of `CHUNK` frames attend to themselves, the last one padded; the first layers halve
the number of frames; after half of the layers something is added to the stream outside any block.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
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


def off(got: Tensor | None, wanted: Tensor | None) -> float:
    assert got is not None and wanted is not None and got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


WRITTEN = ["resid_pre", "resid_mid", "resid_post", "attn_write", "mlp_write"]


def test_every_layer_has_every_site() -> None:
    model, spec = speech(), speech().spec
    assert not spec.refused and not spec.absent and all(check.passed for check in spec.checks)
    assert {"reshaping", "writes"} <= {check.name for check in spec.checks}
    assert all(model.layers_with(site) == [0, 1, 2, 3] for site in WRITTEN)
    assert [block.reshapes_behind for block in spec.blocks] == [
        "layers.0.norm_conv",
        "layers.1.norm_conv",
        None,
        None,
    ]
    assert [block.starts_stage for block in spec.blocks] == [False, True, True, False]
    assert all(block.windows is not None for block in spec.blocks)
    with pytest.raises(Refused, match="in stages"):
        model.require_sum("this test")


@pytest.mark.parametrize("frames", [72, 50])
@torch.no_grad()
def test_blocks_that_halve_the_length_write_before_they_do(frames: int) -> None:
    model, batch = speech(), sounds(frames=frames)
    run = model.run(batch, capture=WRITTEN)
    for layer, n_pos in ((0, frames), (1, frames // 2)):
        block: Any = model.blocks[layer]
        pre, mid, post, attention, first = (run.cache[f"{site}.{layer}"] for site in WRITTEN)
        assert mid.shape == pre.shape == (2, n_pos, 32) and post.shape[1] == n_pos // 2
        assert off(first, 0.5 * block.feed_forward1(block.norm_feed_forward1(pre))) < ROUNDING
        assert off(pre + first + attention, mid) < ROUNDING
        pooled = mid.unfold(1, 2, 2).mean(-1)
        convolved = block.conv(block.norm_conv(mid), attention_mask=None)
        pooled = pooled + convolved[:, : pooled.shape[1]]
        pooled = pooled + 0.5 * block.feed_forward2(block.norm_feed_forward2(pooled))
        assert off(block.norm_out(pooled), post) < ROUNDING
    for site in ("attn_write.0", "mlp_write.1", "resid_mid.0"):
        edit = Edit.zero(site, positions=[4])
        (replayed,) = model.replay(run, [[edit]], lambda variant: variant.logits)
        changed = model.run(batch, edits=[edit], capture=WRITTEN)
        assert off(replayed, changed.logits) < ROUNDING < off(changed.logits, run.logits)
        pre, mid, _, attention, first = (changed.cache[f"{x}.{site[-1]}"] for x in WRITTEN)
        total = pre + attention + first
        if site == "resid_mid.0":
            total[:, 4] = 0
        assert off(mid, total) < ROUNDING and not changed.cache[site][:, 4].any()


def test_what_is_not_all_that_is_added_before_the_length_is_halved_is_refused_by_layer() -> None:
    module = transformers.AutoModel.from_config(speech().module.config).eval()
    changed: Any = module.layers[0].norm_conv
    changed.register_forward_pre_hook(lambda module, args: (args[0].tanh(),))
    model = Model(module, id="speech")
    assert {"attn_write.0", "resid_mid.0"} <= model.spec.refused.keys()
    assert all(name.endswith(".0") for name in model.spec.refused) and not model.spec.absent
    assert model.layers_with("attn_write") == [1, 2, 3]
    with pytest.raises(Refused, match="does not add up"):
        model.run(sounds(), capture=["attn_write.0"])
    with pytest.raises(BadInput, match=r"layers with this site: 1.3"):
        model.run(sounds(), edits=[Edit.zero("attn_write.0")])


@torch.no_grad()
def test_blocks_that_keep_the_length_return_the_norm_of_their_writes() -> None:
    model, batch = speech(), sounds(frames=50)
    run = model.run(batch, capture=WRITTEN)
    for layer in (2, 3):
        block: Any = model.blocks[layer]
        pre, mid, post, attention, first = (run.cache[f"{site}.{layer}"] for site in WRITTEN)
        assert off(pre + first, mid) < ROUNDING  # attention reads behind the first MLP
        after = mid + attention
        after = after + block.conv(block.norm_conv(after), attention_mask=None)
        after = after + 0.5 * block.feed_forward2(block.norm_feed_forward2(after))
        assert off(block.norm_out(after), post) < ROUNDING

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
        assert clean.logits is not None and alone.logits is not None
        assert off(clean.logits[row], alone.logits[0]) < ROUNDING
        for layer, pattern in alone.cache.by_layer("pattern").items():
            assert off(clean.cache[f"pattern.{layer}"][row], pattern[0]) < ROUNDING
