"""Every head's exact effect, on as many prompts as its mean needs."""

import numpy as np
import pytest
import torch

import interp
from circuits.heads.ablate import FIRST, ablate_heads
from circuits.heads.game import Game, prompts_of
from interp.errors import BadInput
from interp.metrics import loss
from tests.ground_truth.induction_model import (
    INDUCTION_HEAD,
    PREVIOUS_TOKEN_HEAD,
    character_tokenizer,
    induction_model,
)

PLANTED = [PREVIOUS_TOKEN_HEAD, INDUCTION_HEAD]


@pytest.fixture(scope="module")
def hand_built():
    return interp.load(induction_model(), tokenizer=character_tokenizer())


@pytest.fixture(scope="module")
def report(hand_built):
    return ablate_heads(hand_built, prompts=32, error=1e-4, progress=False)


def test_both_planted_heads_cost_nats_and_the_others_nothing(report):
    value = report.table.set_index(["layer", "head"])["value"]
    assert (value[PLANTED] > 3).all() and value.drop(PLANTED).abs().max() < 1e-4


def test_only_heads_that_vary_see_more_prompts(report):
    prompts = report.table.set_index(["layer", "head"])["prompts"]
    assert (prompts.drop(PLANTED) == FIRST).all() and prompts[PLANTED].max() > FIRST
    told = report.meta["ablation"]
    assert told["heads_times_prompts"] == prompts.sum()
    assert told["all_as_the_hardest"] == len(prompts) * prompts.max()
    if told["within"]:
        assert told["largest_error"] <= 1e-4 * told["largest"]


def test_values_are_those_of_plain_forwards(tiny):
    """Independently: every head's columns of what W_O reads set to their mean, the whole model run."""
    found = ablate_heads(tiny, prompts=8, length=8, progress=False).table
    prompts = prompts_of(tiny, "repeated", 8, 0, 8)
    read = prompts.judged
    means = Game.of(tiny, prompts).means

    def losses(change=None) -> torch.Tensor:
        layer, head = change or (0, None)
        block = tiny.spec.blocks[layer]

        def put(_, args):
            z = args[0].clone()
            if head is not None:
                columns = slice(head * block.d_head, (head + 1) * block.d_head)
                z[..., columns] = means[layer][head]
            return (z,)

        with tiny.module.get_submodule(block.W_O).register_forward_pre_hook(put), torch.no_grad():
            logits = tiny.module(input_ids=prompts.ids).logits
        return loss(logits[:, read], prompts.ids[:, read + 1])

    clean = losses()
    for row in found.to_dict("records"):
        effect = (losses((row["layer"], row["head"])) - clean).double().numpy()
        assert row["value"] == pytest.approx(effect.mean(), abs=1e-6)
        assert row["error"] == pytest.approx(effect.std(ddof=1) / np.sqrt(8), abs=1e-6)


def test_an_interrupted_call_goes_on(hand_built, report, tmp_path, monkeypatch):
    options = {"prompts": 32, "error": 1e-4, "progress": False, "checkpoint": tmp_path / "units"}
    ablate_heads(hand_built, **options)
    max(
        (tmp_path / "units").glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns
    ).unlink()
    calls = []
    toggled = Game.toggled
    monkeypatch.setattr(Game, "toggled", lambda *args: calls.append(1) or toggled(*args))
    again = ablate_heads(hand_built, **options, resume=True)
    assert len(calls) == 1 and again.table.equals(report.table)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"data": "texts"}, "did you mean 'text'"),
        ({"prompts": 4}, "at least 8"),
        ({"error": 0.0}, "share of the largest"),
    ],
)
def test_bad_options_are_told(tiny, options, told):
    with pytest.raises(BadInput, match=told):
        ablate_heads(tiny, progress=False, **options)
