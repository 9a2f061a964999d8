"""The shipped facts are consistent with themselves; prompts made of facts align."""

from __future__ import annotations

from collections import Counter

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from interp.data.facts import RELATIONS, Fact, fact_prompts, facts, prompt
from interp.errors import BadInput
from interp.models.model import Model


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_has_enough_distinct_subjects(relation: str):
    found = facts(relation)
    assert 60 <= len(found) <= 200
    subjects = Counter(fact.subject for fact in found)
    assert max(subjects.values()) == 1, subjects.most_common(3)
    assert all(fact.subject and fact.answer for fact in found)


@pytest.mark.parametrize("relation", RELATIONS)
def test_words_are_clean(relation: str):
    for fact in facts(relation):
        for word in fact:
            assert word == word.strip() and word.isascii() and "," not in word


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_prompt_never_contains_its_answer(relation: str):
    """An answer that stands in the prompt could be copied instead of recalled."""
    for fact in facts(relation):
        words = prompt(relation, fact.subject).replace(",", "").replace(".", "").split()
        assert fact.answer.split()[0] not in words, fact


def test_two_relations_agree_on_what_they_share():
    """A country with a capital lies on one continent; a city's country is no city."""
    countries = {fact.subject for relation in ("capital", "continent") for fact in facts(relation)}
    capitals = {fact.answer for fact in facts("capital")}
    for fact in facts("country"):
        assert fact.answer in countries | {"Egypt", "Turkey", "Indonesia", "South Africa"}, fact
        assert fact.subject not in capitals, fact


def test_an_unknown_relation_names_the_nearest():
    with pytest.raises(BadInput, match=r"'capitol'.*'capital'"):
        facts("capitol")
    with pytest.raises(BadInput, match="relation"):
        prompt("capitol", "France")


# --- prompts that align --------------------------------------------------------------------------

WORDS = ["<unk>", "of", "is", "New", "One", "Two", "Three", "Left", "Right", "a", "b", "c", "d"]


@pytest.fixture(scope="module")
def model() -> Model:
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(WORDS), n_positions=16)
    return Model(GPT2LMHeadModel(config), tokenizer, id="words")


def test_prompts_of_the_most_frequent_length_align(model: Model):
    known = [Fact("One", "a"), Fact("Two", "b"), Fact("New Three", "c"), Fact("Three", "d")]
    prompts, left_out = fact_prompts(model, known, "of {subject} is")
    assert [fact.subject for fact in prompts.facts] == ["One", "Two", "Three"]
    assert prompts.subject == range(1, 2) and prompts.end == 2
    assert [WORDS[i] for i in prompts.answers] == ["a", "b", "d"]
    assert left_out == {known[2]: "its prompt has 4 tokens, most have 3"}


def test_a_subject_of_several_tokens_is_a_range(model: Model):
    known = [Fact("Left One", "a"), Fact("Right One", "b"), Fact("Left Two", "c")]
    prompts, _ = fact_prompts(model, known, "of {subject} is")
    assert prompts.subject == range(1, 3)


def test_answers_that_begin_alike_are_left_out_with_the_reason(model: Model):
    known = [Fact("One", "a b"), Fact("Two", "a c"), Fact("Three", "b"), Fact("New", "c")]
    known += [Fact("Left", "c"), Fact("Right", "e")]
    prompts, left_out = fact_prompts(model, known, "of {subject} is")
    assert [fact.subject for fact in prompts.facts] == [
        "Three",
        "New",
        "Left",
    ]  # c twice: one answer
    assert "same token as a c" in left_out[known[0]] and "same token as a b" in left_out[known[1]]
    assert left_out[known[-1]] == "the tokenizer does not know the answer"


def test_what_cannot_be_aligned_is_told(model: Model, tiny: Model):
    two = [Fact("One", "a"), Fact("Two", "b")]
    with pytest.raises(BadInput, match="without a tokenizer"):
        fact_prompts(tiny, two, "of {subject} is")
    with pytest.raises(BadInput, match="let words follow it"):
        fact_prompts(model, two, "of {subject}")
    with pytest.raises(BadInput, match=r"0 of 2 facts .*does not know the answer"):
        fact_prompts(model, [Fact("One", "x"), Fact("Two", "y")], "of {subject} is")
    for template in ("of is", "of {subject} {subject} is", "of {subject} {name}"):
        with pytest.raises(BadInput, match="once"):
            fact_prompts(model, two, template)
