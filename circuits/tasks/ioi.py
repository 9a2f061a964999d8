"""Indirect object identification: "When Mary and John went to the store, John gave a drink to" → Mary."""

from __future__ import annotations

import random

from circuits.tasks.make import one_token_words, pairs_from_template
from interp.data.pairs import Pairs
from interp.errors import unknown
from interp.models.model import Model

NAMES = (
    "Mary John Tom James Anna Alice Bob Paul David Mark Kate Jack Sarah Michael Emma Peter George Frank "
    "Henry Laura Robert Simon Andrew Daniel Steven Adam"
)
PLACES = "store park school office station garden house hospital"
OBJECTS = "drink book ring ball letter gift kiss computer"

ABBA = "When {IO} and {S} went to the {place}, {S} gave a {object} to"
BABA = "When {S} and {IO} went to the {place}, {S} gave a {object} to"

CORRUPTIONS = {
    "abc": "three new names: neither the repeated name nor the other one is told",
    "s2": "the second subject is the other name: the answer flips",
    "s2-new": "the second subject is a new name: no name is repeated",
    "io": "the indirect object is a new name: the answer is nowhere in the prompt",
}


def ioi(model: Model, n: int = 32, seed: int = 0, *, corruption: str = "abc") -> Pairs:
    """IOI pairs, ABBA and BABA in turn; positions IO, S1, S1+1, S2, place, object, end.

    >>> ioi(tiny_model(), n=2)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    interp.errors.BadInput: task 'ioi' is made of text, and tiny was loaded without a tokenizer: ...

    Source: Wang et al. 2022, "Interpretability in the wild". Names, places and objects are ours; all
    prompts have the length of one template.
    """
    if corruption not in CORRUPTIONS:
        raise unknown("corruption of task 'ioi'", corruption, CORRUPTIONS)
    names = one_token_words(model, "ioi", "names", NAMES, need=5)
    places = one_token_words(model, "ioi", "places", PLACES, need=1)
    objects = one_token_words(model, "ioi", "objects", OBJECTS, need=1)
    draw = random.Random(seed)
    rows, changes = [], []
    for _ in range(n):
        a, b, c, d, e = draw.sample(names, 5)
        rows.append({"IO": a, "S": b, "place": draw.choice(places), "object": draw.choice(objects)})
        changes.append(
            {
                "abc": {"IO": c, "S1": d, "S2": e},
                "s2": {"S2": a},
                "s2-new": {"S2": c},
                "io": {"IO": c},
            }[corruption]
        )
    return pairs_from_template(
        model,
        [(ABBA, BABA)[i % 2] for i in range(n)],
        rows,
        changes,
        answer=" {IO}",
        wrong=" {S}",
        positions=["S1+1"],
        name=f"ioi:{corruption}",
    )
