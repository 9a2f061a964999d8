"""Attention in chunks of queries that are folded into the batch (Gemma 3n's audio encoder), over all pairs.

Scores and pattern are [batch heads chunk query key] in the model, z [batch pos heads d_head]: what is shown is held to
the model's own softmax, and to plain forwards with a head taken out.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from interp.models.model import Model
from interp.models.own_attention import own
from interp.models.pieces import pieces
from interp.models.probe import probe_batch
from interp.run.batch import Batch
from interp.run.edits import Edit

ROUNDING = 1e-5
"""A few float32 roundings, two blocks deep."""
N_HEADS, CHUNK, LEFT, RIGHT = 4, 4, 3, 1
SITES = ["q", "k", "v", "scores", "pattern", "z", "attn_out"]


def module() -> Any:
    """Chunks of 4 positions, each of which sees itself, the two before it and the one behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.Gemma3nAudioConfig(
            hidden_size=32,
            input_feat_size=32,
            conf_num_hidden_layers=2,
            conf_num_attention_heads=N_HEADS,
            conf_attention_chunk_size=CHUNK,
            conf_attention_context_left=LEFT,
            conf_attention_context_right=RIGHT,
            conf_attention_logit_cap=2.0,
            sscp_conv_channel_size=(8, 4),
        )
        made: Any = transformers.Gemma3nAudioEncoder(config).eval()
        assert sum(parameter.numel() for parameter in made.parameters()) < 100_000
        with torch.no_grad():
            for parameter in made.parameters():
                noise = 0.2 * torch.randn_like(parameter)
                parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return made


@cache
def model() -> Model:
    return Model(module(), id="gemma3n audio")


def given() -> Batch:
    return probe_batch(model().module)


def attention(layer: int) -> Any:
    block: Any = model().blocks[layer]
    return block.attention.attn


def off(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


def over_all_pairs(chunks: Tensor, n: int) -> Tensor:
    """[batch heads chunk query key] as [batch heads query key]: keys of a chunk begin LEFT - 1 before it."""
    whole = chunks.new_zeros(*chunks.shape[:2], n, n)
    for chunk, query, key in torch.cartesian_prod(*map(torch.arange, chunks.shape[2:])).tolist():
        i, j = chunk * CHUNK + query, chunk * CHUNK + key - (LEFT - 1)
        if i < n and 0 <= j < n:
            whole[:, :, i, j] = chunks[:, :, chunk, query, key]
    return whole


def test_all_sites_are_verified() -> None:
    spec = model().spec
    assert not set(spec.refused) - spec.absent
    assert (spec.n_heads, spec.attention_layers) == (N_HEADS, [0, 1])
    assert pieces[attention(0)].q and own[attention(0)] == N_HEADS


@pytest.mark.parametrize("layer", [0, 1])
def test_rows_are_those_of_the_models_own_softmax(
    layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Tensor, Tensor]] = []
    softmax = torch.nn.functional.softmax

    def noted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made.append((x, softmax(x, *args, **kwargs)))
        return made[-1][1]

    cache, batch = model().run(given(), capture=SITES).cache, given()
    monkeypatch.setattr(torch.nn.functional, "softmax", noted)
    with torch.no_grad():
        plain = model().module(**batch.inputs).last_hidden_state
    monkeypatch.undo()
    scores, pattern = (over_all_pairs(x, cache["z"].shape[1]) for x in made[layer])
    shown = cache[f"pattern.{layer}"]
    assert shown.shape[2] % CHUNK and shown.shape[2] > 2 * CHUNK  # the last chunk is not full
    assert off(shown, pattern) < ROUNDING
    sees = pattern > 0
    assert off(cache[f"scores.{layer}"][sees], scores[sees]) < ROUNDING
    assert sees.any(0)[0].sum(-1).max() == LEFT + RIGHT
    z, v = cache[f"z.{layer}"], cache[f"v.{layer}"]
    assert off(z, torch.einsum("bhqk,bkhd->bqhd", pattern, v)) < ROUNDING
    assert off(z.flatten(2) @ model().W_O(layer).flatten(0, 1), cache[f"attn_out.{layer}"]) < 1e-5
    logits = model().run(given()).logits
    assert logits is not None and off(logits, plain) < ROUNDING


@pytest.mark.parametrize("layer", [0, 1])
def test_a_head_taken_out_is_taken_out_of_a_plain_forward(layer: int) -> None:
    def without(module: Any, args: tuple, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, :, 2] = 0
        return out

    batch = given()
    edits = (Edit.zero("z", heads=[(layer, 2)]), Edit.zero("v", heads=[(layer, 2)]))
    runs = [model().run(batch, edits=[edit]).logits for edit in edits]
    handle = attention(layer).register_forward_hook(without)
    try:
        with torch.no_grad():
            wanted = model().module(**batch.inputs).last_hidden_state
    finally:
        handle.remove()
    clean = model().run(batch).logits
    assert clean is not None and off(clean, wanted) > 100 * ROUNDING
    assert all(made is not None and off(made, wanted) < ROUNDING for made in runs)


def test_longer_sounds_have_more_chunks_and_padding_is_no_key() -> None:
    n = 5 * CHUNK + 1
    sound = torch.randn(2, 4 * n, 32, generator=torch.Generator().manual_seed(1))
    padding = torch.zeros(2, 4 * n, dtype=torch.bool)
    padding[0, 4 * 9 :] = True
    run = model().run({"audio_mel": sound, "audio_mel_mask": padding}, capture=["pattern", "z"])
    pattern = run.cache["pattern.1"]
    assert pattern.shape[2:] == (n, n)
    assert not pattern[0, :, :9, 9:].any() and bool(pattern[1, :, :9, 9:].any())
    assert torch.allclose(pattern[1].sum(-1), torch.ones(()), atol=ROUNDING)
    with torch.no_grad():
        plain = model().module(sound, padding).last_hidden_state
    assert run.logits is not None and off(run.logits, plain) < ROUNDING


def test_keys_that_are_no_positions_are_refused() -> None:
    """Two keys for each position, and every other query left out: rows of the pattern are of no positions."""
    other = module()
    for block in other.conformer:
        attend = block.attention.attn
        forward = attend.forward

        def doubled(x: Tensor, mask: Tensor, run: Any = forward) -> Tensor:
            return run(x.repeat_interleave(2, 1), mask.repeat_interleave(2, 1))[:, ::2]

        attend.forward = doubled
    spec = Model(other, id="other").spec
    assert "softmax with values" in spec.refused["z"] and not spec.attention_layers
    assert not any(part in pieces for part in other.modules())
