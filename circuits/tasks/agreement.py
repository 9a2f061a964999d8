"""Subject-verb agreement past an attractor: "the key near the cabinets here" → is, "the keys …" → are."""

from __future__ import annotations

import random

from circuits.tasks.make import one_token_words, pairs_from_template
from interp.data.pairs import Pairs
from interp.errors import unknown
from interp.models.model import Model

NOUNS = {
    "key": "keys",
    "picture": "pictures",
    "letter": "letters",
    "book": "books",
    "box": "boxes",
    "car": "cars",
    "house": "houses",
    "tree": "trees",
    "dog": "dogs",
    "door": "doors",
    "table": "tables",
    "window": "windows",
    "road": "roads",
    "boat": "boats",
    "bird": "birds",
    "teacher": "teachers",
    "student": "students",
    "doctor": "doctors",
    "farmer": "farmers",
    "artist": "artists",
}
PREPOSITIONS = "near behind beside by"
SINGULAR, PLURAL = (" is", " was", " has"), (" are", " were", " have")

CORRUPTIONS = {"subject": "the subject has the other number: so has the verb"}


def agreement(model: Model, n: int = 32, seed: int = 0, *, corruption: str = "subject") -> Pairs:
    """Pairs whose subject is singular and plural in turn; the attractor has the other number.

    Positions subject, where (the preposition), attractor, end. Answers are the verbs of the subject's
    number (is, was, has), the wrong ones those of the other: logit_diff compares their mean logits,
    prob_diff their summed probabilities.

    >>> agreement(tiny_model(), n=2)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    interp.errors.BadInput: task 'agreement' is made of text, and tiny was loaded without a tokenizer: ...

    Source: Linzen et al. 2016; Finlayson et al. 2021 for its causal analysis. Words are ours.
    """
    if corruption not in CORRUPTIONS:
        raise unknown("corruption of task 'agreement'", corruption, CORRUPTIONS)
    words = " ".join([*NOUNS, *NOUNS.values()])
    good = set(one_token_words(model, "agreement", "nouns", words, need=8))
    nouns = [(one, many) for one, many in NOUNS.items() if one in good and many in good]
    places = one_token_words(model, "agreement", "prepositions", PREPOSITIONS, need=1)
    draw = random.Random(seed)
    rows, changes = [], []
    for i in range(n):
        subject, attractor = draw.sample(nouns, 2)
        number = i % 2
        row = {"subject": subject[number], "attractor": attractor[1 - number]}
        verbs = (SINGULAR, PLURAL)[number], (PLURAL, SINGULAR)[number]
        row |= {f"right{j}": verb for j, verb in enumerate(verbs[0])}
        row |= {f"wrong{j}": verb for j, verb in enumerate(verbs[1])}
        rows.append({**row, "where": draw.choice(places)})
        changes.append({"subject": subject[1 - number]})
    return pairs_from_template(
        model,
        "I think that the {subject} {where} the {attractor} here",
        rows,
        changes,
        answer=[f"{{right{j}}}" for j in range(3)],
        wrong=[f"{{wrong{j}}}" for j in range(3)],
        name=f"agreement:{corruption}",
    )
