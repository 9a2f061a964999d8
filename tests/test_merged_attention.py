"""A decoder that attends to itself and to a source in one softmax: one pattern, keys of two kinds.

`pattern` and `scores` [batch n_heads query key] have the keys of the target first, those of the source after
them; `k` and `v` likewise. There is no second attention, and so no site cross_*.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.tiny_configs import tiny_model
from interp.models.model import Model
from interp.run.edits import Edit

GENERATOR = torch.Generator().manual_seed(1)
TARGET = torch.randint(10, 90, (2, 5), generator=GENERATOR)
SOURCES = [torch.randint(10, 90, (2, 7), generator=GENERATOR) for _ in range(2)]


@pytest.fixture(scope="module")
def merged() -> Model:
    def runs(module: Any) -> None:
        module(input_ids=SOURCES[0], decoder_input_ids=TARGET)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = tiny_model("t5gemma2", "T5Gemma2ForConditionalGeneration", runs)
    return Model(module.eval(), None, "merged")


def given(source: int) -> dict[str, Tensor]:
    return {"input_ids": SOURCES[source], "decoder_input_ids": TARGET}


def test_it_verifies_in_full_with_no_second_attention(merged: Model) -> None:
    assert not merged.spec.refused and all(check.passed for check in merged.spec.checks)
    assert merged.spec.stack.startswith("model.decoder") and merged.spec.causal
    assert all(block.attention and block.cross is None for block in merged.spec.blocks)


def test_the_keys_are_the_targets_and_then_the_sources(merged: Model) -> None:
    """z = pattern · v, and no key of the target stands after its query."""
    run = merged.run(given(0), capture=["pattern", "v", "z"])
    groups = merged.spec.n_heads // merged.spec.n_kv_heads
    for layer in range(merged.n_layers):
        pattern, v = run.cache[f"pattern.{layer}"], run.cache[f"v.{layer}"]
        assert pattern.shape[2:] == (5, 12)
        assert not pattern[..., :5].triu(1).any() and pattern[..., 5:].amin() >= 0
        torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:3]))
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, v.repeat_interleave(groups, 2))
        torch.testing.assert_close(z, run.cache[f"z.{layer}"], rtol=1e-4, atol=1e-5)


def test_without_the_keys_behind_the_targets_no_source_is_read(merged: Model) -> None:
    def cut(scores: Tensor, seen: Any) -> Tensor:
        scores = scores.clone()
        scores[..., 5:] = float("-inf")
        return scores

    plain, other = (merged.run(given(i)).logits for i in (0, 1))
    assert not torch.allclose(plain, other, atol=1e-3)
    without = [merged.run(given(i), edits=[Edit.apply("scores", cut)]).logits for i in (0, 1)]
    torch.testing.assert_close(*without, rtol=1e-5, atol=1e-6)


def test_a_replay_of_an_edit_equals_a_run_with_it(merged: Model) -> None:
    run = merged.run(given(0), capture=["resid_pre"])
    edits = [Edit.zero("z", heads=[(layer, 1)]) for layer in range(merged.n_layers)]
    replayed = merged.replay(run, [[edit] for edit in edits], lambda variant: variant.logits)
    for edit, logits in zip(edits, replayed, strict=True):
        wanted = merged.run(given(0), edits=[edit]).logits
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
