"""Value drain, no-op heads and heads that switch between domains, where they are planted."""

import numpy as np
import pytest
import torch

import circuits
import interp
from circuits.heads.dormant import switching
from circuits.heads.first_token_sink import FIRST_TOKEN_SINK
from circuits.heads.no_op import mass_on_small_values
from circuits.heads.value_drain import first_over_median
from interp.data.prompts import repeated_tokens, text_windows
from tests.ground_truth.dormant_model import EVEN, PREVIOUS, SINK, SWITCHING, dormant_model
from tests.ground_truth.induction_model import character_tokenizer

NAMES = ["value_drain", "no_op", "switching"]


@pytest.fixture(scope="module")
def planted():
    return interp.load(dormant_model(), tokenizer=character_tokenizer())


@pytest.fixture(scope="module")
def report(planted):
    return circuits.classify_heads(
        planted, detectors=NAMES, prompts=8, ablate=False, evidence=0, progress=False
    )


def by_head(report):
    return report.table[report.table["layer"] == 0].set_index("head")


def test_exactly_the_planted_heads_are_labelled(report):
    labels = {(r.layer, r.head): r.labels for r in report.table.itertuples() if r.labels}
    assert labels == {(0, SINK): "no_op", (0, SWITCHING): "switching"}


def test_a_drained_value_is_seen_whether_or_not_the_head_attends_to_it(report):
    drain = by_head(report)["value_drain"]
    assert (drain[[SINK, EVEN]] < 1e-3).all()
    assert drain.drop([SINK, EVEN]).between(0.5, 2).all()


def test_a_no_op_writes_nothing_and_its_neighbours_write(report):
    table = report.tables["no_op"].query("layer == 0").set_index("head")
    assert table.loc[SINK, "small_value_mass"] > 0.95
    assert table.loc[SINK, "relative_output"] < 0.02
    assert table.drop(SINK)["small_value_mass"].max() < 0.2
    assert table.loc[PREVIOUS, "relative_output"] == pytest.approx(1, abs=0.3)


def test_the_switching_head_is_dormant_in_prose_alone(report):
    shares = report.tables["domains"].query("layer == 0")
    shares = shares.pivot(index="head", columns="domain", values="dormant")
    assert shares.loc[SWITCHING, "prose"] > 0.8
    assert shares.loc[SWITCHING, "lists"] < 0.4
    assert (shares.loc[SINK] > 0.95).all()  # always parked: that is not switching
    assert (shares.drop([SINK, SWITCHING]).max(axis=1) < 0.2).all()


def test_a_head_that_does_not_switch_has_mean_difference_zero():
    """The two domains are chosen on other prompts: the largest of three chance differences is not."""
    generator = np.random.default_rng(0)
    shares = generator.uniform(size=(16, 3, 20, 20))
    naive = shares.mean(0).max(0) - shares.mean(0).min(0)
    # 400 heads with a standard error of 0.1 each
    assert abs(switching(shares).mean()) < 0.03 < 0.08 < naive.mean()


def test_values_of_the_first_token_are_those_that_the_window_saw(tiny):
    prompts, _ = repeated_tokens(tiny, 2, length=10)
    run = tiny.run(prompts.batch, capture=["v"])
    found = first_over_median(tiny, prompts, run)
    for layer, head in tiny.spec.heads:
        v = run.cache[f"v.{layer}"][:, :, head // 2]
        norms = (v @ tiny.W_O(layer)[head]).norm(dim=-1)
        expected = norms[:, 0] / norms[:, 1:].median(dim=1).values
        torch.testing.assert_close(found[:, layer, head], expected)


def test_even_attention_is_its_own_null(tiny):
    """With q = 0 every head attends evenly, so the mass on small values is their share.

    Values along one direction alone are sometimes small.
    """
    with torch.no_grad():
        for layer in tiny.module.model.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.v_proj.weight[1:] = 0.0
    prompts, _ = repeated_tokens(tiny, 3)
    found = mass_on_small_values(tiny, prompts)
    torch.testing.assert_close(found["score"], found["null"])
    assert found["score"].max() > 0.05


@pytest.mark.parametrize("seed", range(2))
def test_random_models_get_no_label(tiny_model, seed):
    module = tiny_model(seed).module
    model = interp.load(module, tokenizer=character_tokenizer())
    report = circuits.classify_heads(
        model, detectors=NAMES, prompts=6, seed=seed, ablate=False, evidence=0, progress=False
    )
    assert (report.table["labels"] == "").all()


@pytest.mark.slow
def test_the_first_token_of_the_default_model_is_drained(smollm):
    """Heads that park on BOS write little of it: the drain is a property of nearly every sink head."""
    prompts = text_windows(smollm, 2)
    statistics = FIRST_TOKEN_SINK.statistics(smollm, prompts)
    run = smollm.run(prompts.batch, capture=["v"], statistics=statistics, logits=False)
    drain = first_over_median(smollm, prompts, run).mean(0)
    parked = run.statistics["score"].mean(0) > 0.5
    assert parked.sum() > 60
    assert (drain[parked] < 0.5).float().mean() > 0.8


@pytest.mark.slow
def test_what_the_default_model_parks_on_writes_little(smollm):
    """Three independent readings of the same heads: mass on small values, size of what is written, and
    how often a row is dormant in three kinds of text."""
    report = circuits.classify_heads(
        smollm,
        detectors=["no_op", "switching", "first_token_sink"],
        prompts=4,
        ablate=False,
        evidence=0,
        progress=False,
    )
    no_op = report.tables["no_op"]
    assert no_op["small_value_mass"].corr(no_op["relative_output"], method="spearman") < -0.6
    dormant = report.tables["domains"].pivot_table("dormant", ["layer", "head"], "domain")
    parked = report.table.set_index(["layer", "head"])["first_token_sink"]
    assert dormant["prose"].corr(parked, method="spearman") > 0.9
    # other kinds of text wake other heads: the order is like that of prose, and not the same
    assert 0.6 < dormant["code"].corr(dormant["prose"]) < 0.95
    assert (dormant.max(axis=1) - dormant.min(axis=1)).max() > 0.4
