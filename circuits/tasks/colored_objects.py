"""Colored objects: of several objects, each with a color, the color of one is asked for."""

from __future__ import annotations

import random

from circuits.tasks.make import one_token_words, pairs_from_template
from interp.data.pairs import Pairs
from interp.errors import unknown
from interp.models.model import Model

COLORS = "red blue green yellow black white brown pink gray"
OBJECTS = "pen cup hat ball book box car shirt bag key ring lamp chair phone plate"

TEMPLATE = (
    "Yesterday the {o1} was painted {c1}, the {o2} was painted {c2} and the {o3} was painted {c3}. "
    "Remember that the {query} was painted"
)

CORRUPTIONS = {
    "query": "another of the objects is asked for: the answer is its color",
    "colors": "all three colors are others: the answer is nowhere in the prompt",
}


def colored_objects(
    model: Model, n: int = 32, seed: int = 0, *, corruption: str = "query"
) -> Pairs:
    """Pairs that ask for one color of three; the wrong answer is another of the three.

    Positions: object and color (where the one asked for is told), query, o1, c1, o2, c2, o3, c3, end.

    >>> colored_objects(tiny_model(), n=2)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    interp.errors.BadInput: task 'colored_objects' is made of text, and tiny was loaded without a tokenizer: ...

    Source: Merullo et al. 2024, "Circuit component reuse across tasks", after BIG-bench's reasoning
    about colored objects. Ours is shorter, and worded so that small models do it.
    """
    if corruption not in CORRUPTIONS:
        raise unknown("corruption of task 'colored_objects'", corruption, CORRUPTIONS)
    colors = one_token_words(model, "colored_objects", "colors", COLORS, need=6)
    objects = one_token_words(model, "colored_objects", "objects", OBJECTS, need=3)
    draw = random.Random(seed)
    rows, changes = [], []
    for _ in range(n):
        things, shades = draw.sample(objects, 3), draw.sample(colors, 6)
        mine, other = draw.sample(range(3), 2)
        row = {f"o{i + 1}": thing for i, thing in enumerate(things)}
        row |= {f"c{i + 1}": shade for i, shade in enumerate(shades[:3])}
        row |= {"query": things[mine], "right": shades[mine], "wrong": shades[other]}
        rows.append({**row, "asked": str(mine + 1)})
        new = {f"c{i + 1}": shade for i, shade in enumerate(shades[3:])}
        changes.append(new if corruption == "colors" else {"query": things[other]})
    return pairs_from_template(
        model,
        TEMPLATE,
        rows,
        changes,
        answer=" {right}",
        wrong=" {wrong}",
        positions={"object": "o{asked}", "color": "c{asked}"},
        name=f"colored_objects:{corruption}",
    )
