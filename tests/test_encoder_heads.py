"""Head labels where a model reads in both directions: CLS and separators as the tokenizer puts them."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel

import circuits
import interp
from circuits.heads.distance import DISTANCE
from circuits.heads.scan import one_pass
from interp.data.prompts import frame, pair_frame, paired_windows, repeated_tokens, text_windows
from interp.errors import BadInput
from interp.models.model import Model
from tests.families import FAMILIES
from tests.ground_truth.encoder_model import (
    CLS,
    D_VOCAB,
    ENCODER_ZOO,
    SEP,
    bert_tokenizer,
    encoder_zoo,
)
from tests.ground_truth.induction_model import character_tokenizer


@pytest.fixture(scope="module")
def zoo() -> Model:
    return interp.load(encoder_zoo(), tokenizer=bert_tokenizer())


@pytest.fixture(scope="module")
def report(zoo):
    return circuits.classify_heads(zoo, prompts=8, progress=False)


def test_exactly_the_planted_heads_get_exactly_their_labels(report):
    assert report.table["labels"].tolist() == list(ENCODER_ZOO)


def test_planted_attention_scores_over_95_percent(report):
    table = report.table.set_index("head")
    for head, labels in enumerate(ENCODER_ZOO):
        for name in labels.split(","):
            if name not in ("", "broad", "cls_reads"):
                assert table[name][head] > 0.95, name
    # CLS asks nothing there and reads everything alike: all but the three special tokens of 64
    assert table["cls_reads"][list(ENCODER_ZOO).index("separator,cls_reads")] == pytest.approx(
        62 / 64, abs=0.01
    )


def test_the_distance_of_heads_with_an_offset_is_that_offset(report):
    table = report.table.set_index("head")["distance"]
    for name, tokens in (("previous_token", 1), ("next_token", 1), ("current_token", 0)):
        assert table[list(ENCODER_ZOO).index(name)] == pytest.approx(tokens, abs=0.05)


def test_what_makes_no_sense_in_an_encoder_is_skipped_with_the_reason(report):
    skipped = report.meta["skipped"]
    assert {"induction", "recency", "first_token_sink"} <= set(skipped)
    assert set(skipped.values()) == {"needs a model that reads left to right"}
    assert not any("image" in reason for reason in skipped.values())
    with pytest.raises(BadInput, match="'induction' in this report: needs a model that reads left"):
        report.figure("map", score="induction")


@pytest.mark.parametrize("seed", range(2))
def test_random_encoders_get_no_labels(seed):
    """As they are initialised; one label in 8 × 12 (head, role) pairs would be chance at alpha 0.01."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=D_VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = interp.load(BertModel(config), tokenizer=bert_tokenizer())
    found = circuits.classify_heads(model, prompts=6, seed=seed, evidence=0, progress=False)
    assert sum(map(bool, found.table["labels"])) <= 1


def test_prompts_of_an_encoder_are_framed_as_its_tokenizer_frames_them(zoo):
    lead, tail = frame(zoo)
    assert (lead.tolist(), tail.tolist()) == ([CLS], [SEP])
    window = text_windows(zoo, 3, length=20)
    text = "".join(zoo.tokens(window.ids[0, 1:-1].tolist()))
    assert window.ids[0].tolist() == list(zoo.tokenizer(text)["input_ids"])
    repeated, control = repeated_tokens(zoo, 3, length=10)
    for prompts in (window, repeated, control):
        assert prompts.content.sum(1).tolist() == [20] * 3
        assert (prompts.ids[:, 0] == CLS).all() and (prompts.ids[:, -1] == SEP).all()
    assert repeated.second_half.sum(1).tolist() == [10] * 3


def test_pairs_are_what_the_tokenizer_makes_of_two_texts(zoo):
    prompts = paired_windows(zoo, 4, length=24)
    assert prompts.separators is not None and prompts.types is not None
    cuts = set()
    for ids, marks, types in zip(prompts.ids, prompts.separators, prompts.types, strict=True):
        first, last = marks.nonzero().flatten().tolist()
        one, two = (
            "".join(zoo.tokens(part.tolist())) for part in (ids[1:first], ids[first + 1 : last])
        )
        told = zoo.tokenizer(one, two)
        assert ids.tolist() == list(told["input_ids"])
        assert types.tolist() == list(told["token_type_ids"])
        cuts.add(first)
    assert len(cuts) > 1  # so that a separator is not a position
    part = prompts.rows(slice(1, 3))
    assert part.batch.inputs["token_type_ids"].equal(prompts.types[1:3])


def test_a_model_that_reads_left_to_right_is_given_what_it_was(tiny, hand_built):
    """No tail, no separators, and detectors of encoders are not even named as skipped."""
    assert frame(tiny)[1].tolist() == []
    assert text_windows(hand_built, 2, length=16).separators is None
    found = circuits.classify_heads(tiny, prompts=4, ablate=False, evidence=0, progress=False)
    assert not {"cls", "separator", "next_token", "patch_offset"} & set(found.meta["skipped"])
    with pytest.raises(interp.InterpError, match="reads in both directions"):
        circuits.classify_heads(tiny, detectors=["next_token"], prompts=4, progress=False)


def test_without_special_tokens_there_is_no_cls_and_no_separator_and_the_report_says_so():
    model = Model(FAMILIES["bert"](), character_tokenizer())
    assert pair_frame(model)[0] == [[], [], []]
    found = circuits.classify_heads(
        model, detectors=["cls", "separator", "next_token"], prompts=4, evidence=0, progress=False
    )
    assert found.meta["skipped"] == {
        "cls": "the tokenizer puts no token before a text",
        "separator": "the tokenizer puts nothing between two texts",
    }


@pytest.mark.parametrize("name", ["roberta", "modernbert", "distilbert", "electra", "t5_encoder"])
def test_every_family_of_encoders_gets_a_report(name):
    """RoBERTa counts positions from its padding id, ModernBERT has windows, T5 a bias for positions."""
    model = Model(FAMILIES[name](), bert_tokenizer())
    found = circuits.classify_heads(
        model,
        detectors=["next_token", "separator", "cls", "cls_reads", "distance"],
        prompts=4,
        evidence=1,
        progress=False,
    )
    scores = found.table[["next_token", "separator", "cls", "cls_reads"]]
    assert ((scores >= 0) & (scores <= 1)).all(axis=None)
    assert found.meta["prompts"][0]["tokens"][0] == "[CLS]"


def test_distance_in_an_encoder_is_the_plain_mean_over_ordinary_tokens(zoo):
    prompts = text_windows(zoo, 3, length=20)
    seen = one_pass(zoo, [DISTANCE], prompts)
    pattern = zoo.run(prompts.batch, capture=["pattern"]).cache["pattern.0"][:, :, 1:-1, 1:-1]
    at = torch.arange(20)
    wanted = (pattern * (at[:, None] - at).abs()).sum(-1).mean(-1)
    found = torch.from_numpy(seen["distance.far"])[:, 0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)  # float32 sums
