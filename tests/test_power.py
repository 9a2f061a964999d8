"""What is said of too few prompts: on scores whose spread is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

import circuits
from circuits.heads.claims import claims
from circuits.heads.induction import INDUCTION
from circuits.heads.power import power_notes, power_table
from circuits.heads.scan import Scores


def of_induction(mean: np.ndarray, spread: float, n: int, seed: int = 0):
    """Claims from scores with these means [heads] and this spread over n prompts; the null is 0."""
    noise = np.random.default_rng(seed).normal(0, spread, (n, 1, len(mean)))
    score = mean + noise
    return claims([Scores(INDUCTION, score, np.zeros_like(score))])


def test_heads_far_from_the_threshold_are_decided():
    mean = np.array([0.9] * 5 + [0.0] * 15)
    table = power_table(of_induction(mean, 0.05, 16))
    assert table["undecided"].tolist() == [0] and power_notes(table) == []


def test_heads_at_the_threshold_are_not_and_more_prompts_decide_them():
    mean = np.array([0.9] * 5 + [INDUCTION.threshold + 0.04] * 5 + [0.0] * 10)
    few, many = (power_table(of_induction(mean, 0.1, n)).iloc[0] for n in (4, 400))
    assert few["undecided"] >= 2 and many["undecided"] == 0
    note = power_notes(power_table(of_induction(mean, 0.1, 4)))[0]
    assert f"{few['undecided']} claims" in note and "induction" in note


def test_an_effect_that_is_not_significant_is_undecided():
    """Two prompts that agree on a score over the threshold are not yet a claim."""
    score = np.array([0.6, 0.8])[:, None, None]
    found = claims([Scores(INDUCTION, score, np.zeros_like(score))])
    assert found[0].confidence[0, 0] == 1 and not found[0].label[0, 0]
    table = power_table(found)
    assert table["undecided"].tolist() == [1]
    assert any("Too few prompts" in note for note in power_notes(table))


@pytest.mark.parametrize("n", [8, 32])
def test_the_least_distance_is_found_four_times_in_five(n):
    """Tests drawn with that mean distance and that spread are significant in 80 %, as told.

    The spread itself is estimated, from ten heads: by a few per cent, which moves the power by as many.
    """
    spread, alpha = 0.3, 0.01
    table = power_table(of_induction(np.zeros(2000), spread, n, seed=1), alpha)
    level = alpha / 2000  # nothing is significant: the first p has to pass alone
    least = table["least_distance"][0]
    again = np.random.default_rng(2).normal(least, spread, (n, 4000))
    p = stats.ttest_1samp(again, 0, alternative="greater").pvalue
    assert (p <= level).mean() == pytest.approx(0.8, abs=0.08)


def test_a_report_carries_the_table_and_says_how_labels_kept_over_draws(hand_built):
    report = circuits.classify_heads(
        hand_built,
        detectors=["induction", "previous_token"],
        prompts=4,
        seeds=2,
        ablate=False,
        evidence=0,
        progress=False,
    )
    table = report.tables["power"]
    assert table["role"].tolist() == ["induction", "previous_token"]
    assert (table["prompts"] == 4).all()
    assert any("2 of 2 came back every time" in note for note in report.meta["notes"])
