"""How far heads look, how sharply, and whether by place or by content."""

import numpy as np
import pytest
import torch

import circuits
import interp
from circuits.heads.locality import (
    effective_context,
    entropies,
    entropy_floor,
    position_and_content,
)
from interp.data.prompts import Prompts, repeated_tokens, text_windows
from interp.models.model import Model
from tests.families import FAMILIES
from tests.ground_truth.head_zoo import FIXED, WINDOW, ZOO, head_zoo
from tests.ground_truth.induction_model import character_tokenizer

NAMES = ["effective_context", "entropy", "positional_share", "key_share"]


@pytest.fixture(scope="module")
def zoo():
    return interp.load(head_zoo(), tokenizer=character_tokenizer())


@pytest.fixture(scope="module")
def table(zoo):
    report = circuits.classify_heads(
        zoo, detectors=NAMES, prompts=6, ablate=False, evidence=0, progress=False
    )
    assert not report.meta["skipped"]
    return report.table[report.table["layer"] == 0].reset_index(drop=True)


def of(table, name: str):
    return table.iloc[list(ZOO).index(name)]


def test_effective_context_is_the_planted_reach(table):
    for name, tokens in (("current_token", 1), ("previous_token", 2), ("fixed_offset", FIXED + 1)):
        assert of(table, name)["effective_context"] == pytest.approx(tokens, abs=0.1)
    # eleven keys share the mass evenly: ten hold 91 % of it
    assert of(table, "recency")["effective_context"] == pytest.approx(WINDOW, abs=0.1)
    even = of(table, "")
    assert even["effective_context"] == pytest.approx(even["effective_context_null"], abs=1.5)


def test_place_and_content_are_told_apart(table):
    """Heads that look by offset, heads that look for some keys, a head that matches query and key."""
    for name in ("previous_token", "fixed_offset", "current_token", "recency"):
        found = of(table, name)
        assert found["positional_share"] > 0.95 and found["key_share"] < 0.05, name
    for name in ("delimiter", "rare_token"):
        found = of(table, name)
        assert found["key_share"] > 0.9 and found["positional_share"] < 0.1, name
    match = of(table, "duplicate_token")
    assert match["positional_share"] < 0.5 and match["key_share"] < 0.3
    for column in (
        "positional_share_null",
        "key_share_null",
    ):  # out of sample: below 0 where useless
        assert table[column].max() < 0.02


def test_entropy_is_never_under_its_floor(table, tiny):
    assert (table["entropy"] >= table["entropy_null"] - 1e-4).all()
    assert of(table, "previous_token")["entropy"] < 0.2
    assert of(table, "recency")["entropy"] == pytest.approx(np.log(WINDOW + 1), abs=0.3)
    even = of(table, "")
    assert even["entropy"] == pytest.approx(even["entropy_null"], rel=1e-4)  # both uniform
    found, floor = entropies(tiny, repeated_tokens(tiny, 4, length=16)[0])
    assert (found >= floor).all() and (floor > 0).all()


@pytest.mark.parametrize("keys", [2, 5, 40])
@pytest.mark.parametrize("norm", [0.1, 1.0, 4.0])
def test_the_floor_is_the_least_entropy_of_that_norm(keys, norm):
    """Attained by one logit that stands out, and not gone under by random or descending ones."""
    torch.manual_seed(0)
    peak = torch.zeros(keys, dtype=torch.float64)
    peak[0] = 1
    peak = (peak - peak.mean()) / (peak - peak.mean()).norm() * norm
    floor = entropy_floor(torch.tensor(norm).double(), torch.tensor(keys).double())

    def entropy(logits):
        return torch.special.entr(logits.softmax(-1)).sum(-1)

    torch.testing.assert_close(entropy(peak), floor, rtol=1e-9, atol=1e-12)
    tried = torch.randn(500, keys, dtype=torch.float64)
    tried = tried / tried.norm(dim=-1, keepdim=True) * norm
    for _ in range(30):
        tried.requires_grad_()
        (step,) = torch.autograd.grad(entropy(tried).sum(), tried)
        tried = tried.detach() - 0.5 * step
        tried = tried / tried.norm(dim=-1, keepdim=True) * norm
    assert entropy(tried).min() >= floor - 1e-9


def test_effective_context_against_plain_counting(tiny):
    """Row by row from the whole pattern; chunking must not show."""
    prompts, _ = repeated_tokens(tiny, 2, length=16)
    pattern = tiny.run(prompts.batch, capture=["pattern"]).cache["pattern"]
    first, found = max(prompts.lead, 1), effective_context(tiny, prompts)
    expected = np.zeros(found.shape)
    for at in np.ndindex(*expected.shape):
        counts = []
        for q in range(prompts.length // 2, prompts.length):
            mass = pattern[at][q, first : q + 1].flip(0)
            held = mass.cumsum(0)
            counts.append(int((held < 0.9 * held[-1]).sum()) + 1)
        expected[at] = np.mean(counts)
    # one row of sixteen may round the other way at the edge of 90 %
    np.testing.assert_allclose(found, expected, atol=1 / 16 + 1e-6)


def test_long_rows_come_in_chunks_and_count_the_same(tiny, monkeypatch):
    prompts, _ = repeated_tokens(tiny, 1, length=30)
    whole = effective_context(tiny, prompts)
    monkeypatch.setattr("interp.models.attention.CHUNK_BYTES", 1)
    # chunks of 16 rows; sums in another order can move one row across 90 %
    np.testing.assert_allclose(effective_context(tiny, prompts), whole, atol=1 / 16)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "deepseek_v3"])
def test_windows_softcaps_and_sinks(family):
    """Sliding windows leave fewer offsets, softcaps and sink logits change the scores: all are read."""
    model = Model(FAMILIES[family](), id=family)
    ids = torch.randint(5, 97, (3, 24), generator=torch.Generator().manual_seed(0))
    prompts = Prompts("text", ids, 0)
    offset, key = position_and_content(model, prompts)
    entropy, floor = entropies(model, prompts)
    for values in (offset, key, entropy, floor, effective_context(model, prompts)):
        assert np.isfinite(values).all()
    assert (offset.mean(0) <= 1).all() and (entropy >= floor - 1e-5).all()


def test_they_need_text_and_say_so(tiny):
    report = circuits.classify_heads(
        tiny,
        detectors=["induction", *NAMES],
        prompts=4,
        ablate=False,
        evidence=0,
        progress=False,
    )
    assert set(report.meta["skipped"]) == set(NAMES)


@pytest.mark.slow
def test_on_the_default_model(smollm):
    """The strongest previous-token head looks one token back, by place; a broad head does not."""
    prompts = text_windows(smollm, 3, length=64)
    context = effective_context(smollm, prompts).mean(0)
    offset, key = (x.mean(0) for x in position_and_content(smollm, prompts))
    assert context[16, 0] < 6 and context[16, 0] < np.median(context)
    assert offset[16, 0] > np.median(offset)
    assert np.isfinite(key).all() and (offset <= 1).all()
