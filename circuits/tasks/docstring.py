"""Docstring copying: a Python signature, and a docstring that has reached its last parameter."""

from __future__ import annotations

import random

from circuits.tasks.make import one_token_words, pairs_from_template
from interp.data.pairs import Pairs
from interp.errors import unknown
from interp.models.model import Model

ARGUMENTS = (
    "load size files last path name value count index color line page user group key text state order "
    "model image node parent source target width height"
)
WORDS = "oil unit crime column piece dark population sound river market glass paper summer"

TEMPLATE = '''def {method}(self, {a}, {b}, {c}):
    """{w1} {w2}

    :param {a}: {w3} {w4}
    :param {b}: {w5} {w6}
    :param'''

CORRUPTIONS = {
    "def": "the signature names other arguments: what comes next is not told",
    "doc": "the docstring describes other parameters: how far it has come is not told",
}


def docstring(model: Model, n: int = 32, seed: int = 0, *, corruption: str = "def") -> Pairs:
    """Pairs asking for the third argument; positions a1, b1, c (signature), a2, b2 (docstring), end.

    >>> docstring(tiny_model(), n=2)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    interp.errors.BadInput: task 'docstring' is made of text, and tiny was loaded without a tokenizer: ...

    Source: Heimersheim and Janiak 2023, "A circuit for Python docstrings in a 4-layer attention-only
    transformer". The words are ours; the wrong answers are the two arguments described already.
    """
    if corruption not in CORRUPTIONS:
        raise unknown("corruption of task 'docstring'", corruption, CORRUPTIONS)
    names = one_token_words(model, "docstring", "argument names", ARGUMENTS, need=6)
    words = one_token_words(model, "docstring", "words", WORDS, need=7)
    draw = random.Random(seed)
    rows, changes = [], []
    for _ in range(n):
        a, b, c, *others = draw.sample(names, 6)
        method, *rest = draw.sample(words, 7)
        row = {"method": method, "a": a, "b": b, "c": c}
        rows.append({**row, **{f"w{i + 1}": word for i, word in enumerate(rest)}})
        new = dict(
            zip(("a1", "b1", "c") if corruption == "def" else ("a2", "b2"), others, strict=False)
        )
        changes.append(new)
    return pairs_from_template(
        model,
        TEMPLATE,
        rows,
        changes,
        answer=" {c}",
        wrong=[" {a}", " {b}"],
        name=f"docstring:{corruption}",
    )
