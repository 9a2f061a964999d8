"""Facts that many models know: a subject, the answer that should follow, and prompts that align.

`facts.csv` holds countries and cities, verb forms, plurals and opposites, written for this project. Left
out are facts that are disputed (capitals with two claims, countries with two main languages), changing
(a currency about to be replaced) or that give themselves away (Kuwait City).
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from interp.data.answers import begun
from interp.errors import BadInput, unknown
from interp.models.model import Model

RELATIONS = {
    "capital": "The capital of {subject} is",
    "language": "The people of {subject} mostly speak",
    "currency": "The currency of Poland is the zloty. The currency of {subject} is the",
    "continent": "The country of {subject} is on the continent of",
    "country": "The city of {subject} is in the country of",
    "past": "Today we play, yesterday we played. Today we {subject}, yesterday we",
    "plural": "One dog, two dogs. One {subject}, two",
    "opposite": "The opposite of good is bad. The opposite of {subject} is",
}
"""Each relation's prompt: the answer follows it, with a space before it. Relations whose form a small
model would not guess begin with one example, which is no fact of theirs."""


class Fact(NamedTuple):
    """One subject and its answer, as plain words without a leading space."""

    subject: str
    answer: str


def facts(relation: str) -> list[Fact]:
    """The shipped facts of a relation, in a fixed order; BadInput with the nearest name.

    Answers repeat where several subjects share one (Spanish, euro, Europe); subjects do not.

    >>> facts("capital")[0]
    Fact(subject='France', answer='Paris')
    """
    if relation not in RELATIONS:
        raise unknown("relation", relation, RELATIONS)
    return list(_all()[relation])


def prompt(relation: str, subject: str) -> str:
    """The prompt that the answer follows.

    >>> prompt("language", "Brazil")
    'The people of Brazil mostly speak'
    """
    if relation not in RELATIONS:
        raise unknown("relation", relation, RELATIONS)
    return RELATIONS[relation].format(subject=subject)


@dataclass(frozen=True)
class FactPrompts:
    """Prompts of one template and one length, so that a position means the same in every row.

    Attributes:
        facts: one a row. ids: the prompts' tokens, a BOS included where the tokenizer puts one.
        answers: the first token of each answer, as it follows the prompt.
        subject: the positions of the subject's tokens. The last position reads out the answer.
    """

    facts: tuple[Fact, ...]
    ids: Int[Tensor, "n pos"]
    answers: Int[Tensor, " n"]
    subject: range

    def __len__(self) -> int:
        return len(self.facts)

    @property
    def end(self) -> int:
        """The last position."""
        return self.ids.shape[1] - 1

    def rows(self, rows: Sequence[int]) -> FactPrompts:
        """Some of the prompts."""
        chosen = torch.as_tensor(rows, dtype=torch.long)
        facts = tuple(self.facts[i] for i in chosen.tolist())
        return FactPrompts(facts, self.ids[chosen], self.answers[chosen], self.subject)


def fact_prompts(
    model: Model, known: Sequence[Fact], template: str
) -> tuple[FactPrompts, dict[Fact, str]]:
    """Prompts that align token by token, and why each other fact was left out.

    Of the lengths that the tokenizer gives the prompts, the most frequent one is kept. The positions
    between the first and the last token that differ between rows are the subject's. An answer that
    begins with the same token as another one is left out: the two could not be told apart.

    Args:
        template: text with {subject} in it, and something after it. The answer follows after a space,
            unless the template ends in one.

    Raises:
        BadInput: no tokenizer; a template without a place for the subject, or with nothing after it;
            no two facts whose prompts align.
    """
    check_template(template)
    rows: dict[Fact, tuple[list[int], int]] = {}
    left_out: dict[Fact, str] = {}
    for fact in known:
        ids, answer, why = begun(model, template.format(subject=fact.subject), fact.answer)
        if answer is None:
            left_out[fact] = why
        else:
            rows[fact] = ids, answer
    lengths = Counter(len(ids) for ids, _ in rows.values())
    most = max(lengths, key=lambda length: (lengths[length], -length), default=0)
    for fact in [fact for fact, (ids, _) in rows.items() if len(ids) != most]:
        left_out[fact] = f"its prompt has {len(rows.pop(fact)[0])} tokens, most have {most}"
    begins: dict[int, set[str]] = {}
    for fact, (_, answer) in rows.items():
        begins.setdefault(answer, set()).add(fact.answer)
    for fact, (_, answer) in list(rows.items()):
        if others := begins[answer] - {fact.answer}:
            left_out[fact] = f"its answer begins with the same token as {min(others)}"
            del rows[fact]
    if len(rows) < 2:
        reasons = Counter(left_out.values()).most_common(1)
        raise BadInput(
            f"{len(rows)} of {len(known)} facts give prompts that align in {model.id}"
            + (f" (of {reasons[0][1]}: {reasons[0][0]})" if reasons else "")
            + "; give more facts, or another template"
        )
    ids = torch.tensor([ids for ids, _ in rows.values()])
    differ = (ids != ids[0]).any(0).nonzero()[:, 0].tolist() or [0]
    if differ[-1] == ids.shape[1] - 1:
        raise BadInput(
            f"in '{template}' the subject's last token is the prompt's last: let words follow it, so that "
            "something has to be carried to the end"
        )
    answers = torch.tensor([answer for _, answer in rows.values()])
    return FactPrompts(tuple(rows), ids, answers, range(differ[0], differ[-1] + 1)), left_out


def check_template(template: str) -> None:
    """Raise BadInput for a template that no subject could be put into."""
    if template.count("{subject}") != 1 or "{" in template.replace("{subject}", ""):
        raise BadInput(
            f"template {template!r} must contain {{subject}} once, as in 'The capital of {{subject}} is'"
        )


@cache
def _all() -> dict[str, tuple[Fact, ...]]:
    text = files("interp.data").joinpath("facts.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    return {
        relation: tuple(
            Fact(row["subject"], row["answer"]) for row in rows if row["relation"] == relation
        )
        for relation in RELATIONS
    }
