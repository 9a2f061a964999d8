"""What holds for every registered detector of heads: it finds what was planted, alone, and nothing by chance."""

import pytest

from circuits.heads.detector import Detector, catalogue
from tests.ground_truth.detector_worlds import NULLS, TRUTHS, Truth, null_report, planted_report

DETECTORS = catalogue()
NAMES = [detector.name for detector in DETECTORS]


@pytest.fixture(params=DETECTORS, ids=NAMES)
def detector(request) -> Detector:
    return request.param


@pytest.fixture
def truth(detector) -> Truth:
    if detector.name not in TRUTHS:
        pytest.fail(
            f"{detector.name} has no planted truth: add to TRUTHS in tests/ground_truth/detector_worlds.py "
            "a model with a head on which it must answer, and how far it may answer on a random one"
        )
    return TRUTHS[detector.name]


def test_no_truth_is_left_of_a_detector_that_is_gone():
    assert set(TRUTHS) <= set(NAMES)


def test_it_answers_on_the_planted_heads_and_on_no_other(detector, truth):
    table = planted_report(truth.world).table.set_index(["layer", "head"])
    score = table[detector.name].fillna(0.0)
    low, high = truth.says
    assert score[list(truth.heads)].between(low, high).all(), score[list(truth.heads)]
    low, high = truth.others
    others = score.drop([*truth.heads, *truth.apart])
    assert others.between(low, high).all(), others
    assert len(others) > 0


def test_its_neighbours_do_not_answer_there(detector, truth):
    table = planted_report(truth.world).table.set_index(["layer", "head"])
    given = {
        head: {name for name in names.split(",") if name} for head, names in table["labels"].items()
    }
    mine = {detector.name} if detector.labels else set()
    for head in truth.heads:
        assert mine <= given[head]
        if mine:
            assert given[head] <= mine | truth.with_it, head
    assert not any(detector.name in given[head] for head in given if head not in truth.heads)
    if detector.labels:  # nor would they with more prompts
        assert set(table.index[_large_enough(table, detector)]) == set(truth.heads)


def test_on_a_random_model_it_answers_nothing(detector, truth):
    """Neither a label, nor a score and distance from the null that would be large enough for one."""
    table = null_report(truth.null).table
    assert not table["labels"].str.split(",").map(lambda names: detector.name in names).any()
    assert table[detector.name].notna().all()
    if detector.labels:
        large = _large_enough(table, detector)
        assert not large.any(), table[large]


def test_its_null_is_what_a_random_head_scores_and_not_what_a_planted_one_does(detector, truth):
    low, high = truth.chance
    distance = _distance(null_report(truth.null).table, detector.name, truth)
    assert distance.between(low, high).all(), distance
    table = planted_report(truth.world).table.set_index(["layer", "head"])
    planted = _distance(table, detector.name, truth)[list(truth.heads)]
    assert not planted.between(low, high).any(), planted


def _large_enough(table, detector: Detector):
    """Whether score and distance from the null are those of a label, be they significant or not."""
    score, null = table[detector.name], table[f"{detector.name}_null"]
    return (score >= detector.threshold) & (detector.side * (score - null) >= detector.margin)


def _distance(table, name: str, truth: Truth):
    """Score less null."""
    if truth.even is None:
        return table[name] - table[f"{name}_null"]
    assert table[f"{name}_null"].isna().all()  # else its own is what should be looked at
    return table[name] - truth.even


def test_random_models_of_every_kind_are_read_by_all_their_detectors():
    for null in NULLS:
        assert not null_report(null).meta["skipped"]
