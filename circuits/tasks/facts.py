"""Facts: "The capital of France is" → Paris; the corrupted prompt asks about another subject."""

from __future__ import annotations

import random
from collections import defaultdict

from circuits.tasks.make import (
    listed,
    next_token,
    pairs_from_template,
    require_tokenizer,
    token_ids,
)
from interp.data.facts import RELATIONS, prompt
from interp.data.facts import facts as table
from interp.data.pairs import Pairs
from interp.errors import BadInput, unknown
from interp.models.model import Model


def facts(model: Model, n: int = 32, seed: int = 0, *, relation: str = "capital") -> Pairs:
    """Pairs of two facts of one relation whose prompts have the same length; positions subject, end.

    The wrong answer is the right one of the corrupted prompt. Used are the facts whose answer is one
    token and whose prompt has the most common length; a subject may be several tokens.

    >>> facts(tiny_model(), n=2)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    interp.errors.BadInput: task 'facts' is made of text, and tiny was loaded without a tokenizer: ...

    Source: the contrast of Meng et al. 2022, "Locating and editing factual associations in GPT"; the
    facts are `interp.data.facts`.
    """
    if relation not in RELATIONS:
        raise unknown("relation of task 'facts'", relation, RELATIONS)
    require_tokenizer(model, "facts")
    groups: dict[int, list[tuple[str, str]]] = defaultdict(list)
    split = []
    for subject, answer in table(relation):
        text = prompt(relation, subject)
        ids = token_ids(model, text)
        if next_token(model, text, ids, f" {answer}") is None:
            split.append(answer)
        else:
            groups[len(ids)].append((subject, answer))
    usable = max(groups.values(), key=len, default=[])
    if len({answer for _, answer in usable}) < 2:
        raise BadInput(
            f"task 'facts:{relation}': {model.id} leaves {len(usable)} facts of one length with one-token "
            f"answers, wanted two different ones. These answers split: {listed(split)}"
        )
    draw = random.Random(seed)
    order = draw.sample(usable, len(usable))
    rows, changes = [], []
    for i in range(n):
        subject, answer = order[i % len(order)]
        other = draw.choice([fact for fact in usable if fact[1] != answer])
        rows.append({"subject": subject, "answer": answer, "wrong": other[1]})
        changes.append({"subject": other[0]})
    return pairs_from_template(
        model,
        RELATIONS[relation],
        rows,
        changes,
        answer=" {answer}",
        wrong=" {wrong}",
        name=f"facts:{relation}",
    )
