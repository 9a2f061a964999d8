"""The embedded default model against plain Hugging Face: hooks and outputs of its own, not ours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from interp.models import attention
from interp.models.attention import Watch, window
from interp.models.model import Model
from interp.run.edits import Edit

TEXT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def ids(smollm: Model) -> Tensor:
    return smollm.tokenize([TEXT, "The quick brown fox jumps over the lazy dog"]).ids[:, :10]


@pytest.fixture(scope="module")
def plain(smollm: Model, ids: Tensor):
    with torch.no_grad():
        return smollm.module(ids, output_hidden_states=True, use_cache=False)


def test_the_map(smollm: Model) -> None:
    spec = smollm.spec
    assert (spec.n_layers, spec.n_heads, spec.n_kv_heads) == (30, 9, 3)
    assert (spec.d_model, spec.d_head, spec.causal) == (576, 64, True)
    assert not spec.refused and all(check.passed for check in spec.checks)
    assert len(spec.heads) == 270


def test_logits_are_the_same_bits(smollm: Model, ids: Tensor, plain) -> None:
    """Not watched, and watched where the pattern is not needed."""
    assert torch.equal(smollm.run(ids).logits, plain.logits)
    assert torch.equal(smollm.run(ids, edits=[Edit.zero("z", heads=[])]).logits, plain.logits)
    watched = smollm.run(ids, capture=["q", "k", "v", "z", "attn_write", "resid_post"])
    assert torch.equal(watched.logits, plain.logits)
    with torch.no_grad(), window(smollm.module, lambda module: Watch()):
        assert torch.equal(smollm.module(ids, use_cache=False).logits, plain.logits)


def test_z_is_what_o_proj_reads(smollm: Model, ids: Tensor) -> None:
    read = []
    handle = smollm.module.model.layers[5].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: read.append(args[0])
    )
    with torch.no_grad():
        smollm.module(ids, use_cache=False)
    handle.remove()
    z = smollm.run(ids, capture=["z.5"]).cache["z.5"]
    assert torch.equal(z.flatten(2), read[0])


def test_the_residual_stream_is_hugging_faces(smollm: Model, ids: Tensor, plain) -> None:
    """`hidden_states[l + 1]` follows block l, but for the last, which follows the final norm."""
    cache = smollm.run(ids, capture=["embed", "resid_pre", "resid_post"]).cache
    assert torch.equal(cache["embed"], plain.hidden_states[0])
    for layer in range(smollm.n_layers - 1):
        assert torch.equal(cache[f"resid_post.{layer}"], plain.hidden_states[layer + 1])
        assert torch.equal(cache[f"resid_pre.{layer + 1}"], plain.hidden_states[layer + 1])
    last = cache[f"resid_post.{smollm.n_layers - 1}"]
    with torch.no_grad():
        assert torch.equal(smollm.module.model.norm(last), plain.hidden_states[-1])


def test_patterns_are_eagers(smollm: Model, ids: Tensor) -> None:
    """To 1e-5: float32, 30 layers, and one product a kv group where eager has one a head."""
    run = smollm.run(ids, capture=["pattern"])
    before = smollm.module.config._attn_implementation
    try:
        smollm.module.set_attn_implementation("eager")
        with torch.no_grad():
            eager = smollm.module(ids, output_attentions=True, use_cache=False)
    finally:
        smollm.module.set_attn_implementation(before)
    for layer, pattern in enumerate(eager.attentions):
        assert (run.cache[f"pattern.{layer}"] - pattern).abs().max() < 1e-5
    # Logits are around 20 here: 1e-5 of that, ten times for the depth.
    assert (run.logits - eager.logits).abs().max() < 2e-3
    assert not attention._listeners


def test_padding_on_either_side(smollm: Model) -> None:
    """Logits at real positions equal the single prompt's (1e-5 of their size, ten times for depth)."""
    texts = [TEXT, "The quick brown"]
    alone = [smollm.run(text).logits[0] for text in texts]
    for side in ("left", "right"):
        batch = smollm.tokenize(texts, padding_side=side)
        logits = smollm.run(batch).logits
        assert batch.mask is not None and batch.padded
        for row, wanted in enumerate(alone):
            got = logits[row, batch.mask[row]]
            assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_replay_equals_a_rerun(smollm: Model, ids: Tensor) -> None:
    """Heads of an early, a middle and the last layer ablated, all variants in one call."""
    run = smollm.run(ids, capture=["resid_pre"])
    variants = [[Edit.zero("z", heads=[place])] for place in ((0, 0), (14, 3), (18, 6), (29, 8))]
    replayed = smollm.replay(run, variants, lambda variant: variant.logits)
    for edits, logits in zip(variants, replayed, strict=True):
        rerun = smollm.run(ids, edits=edits).logits
        assert (logits - rerun).abs().max() < 1e-4 * rerun.abs().max()
        assert (rerun - run.logits).abs().max() > 1e-2
