"""Greater-than: "The war lasted from the year 1732 to the year 17" → a year after 32."""

from __future__ import annotations

import random
from collections.abc import Sequence

from circuits.tasks.make import (
    Row,
    joined,
    listed,
    one_token_words,
    require_tokenizer,
    token_ids,
)
from interp.data.pairs import Pairs
from interp.errors import BadInput, unknown
from interp.models.model import Model

NOUNS = "war trip siege strike voyage campaign project conflict reign search plague trial"
CENTURIES = range(11, 18)
BEFORE, BETWEEN = "The {noun} lasted from the year ", " to the year "

CORRUPTIONS = {"01": "the war begins in the first year of its century: any year is later"}


def greater_than(model: Model, n: int = 32, seed: int = 0, *, corruption: str = "01") -> Pairs:
    """Pairs with many answers: every next token that only later years begin with.

    The next token is two digits, or one, as the tokenizer has it: after "1732 to 17" the answers are
    33 … 99 and the wrong ones 00 … 32; where digits stand alone, 4 … 9 and 0 … 2 (3 may be either).
    Positions noun, XX (the century), YY (the token to exceed), end. prob_diff is the published metric.

    >>> greater_than(tiny_model(), n=2)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    interp.errors.BadInput: task 'greater_than' is made of text, and tiny was loaded without a tokenizer: ...

    Source: Hanna et al. 2023, "How does GPT-2 compute greater-than?", with its corruption to year 01.
    """
    if corruption not in CORRUPTIONS:
        raise unknown("corruption of task 'greater_than'", corruption, CORRUPTIONS)
    require_tokenizer(model, "greater_than")
    nouns = one_token_words(model, "greater_than", "nouns", NOUNS, need=1)
    draw = random.Random(seed)
    rows: list[Row] = []
    refused: list[str] = []
    for _ in range(8 * n):
        noun, century, year = draw.choice(nouns), draw.choice(CENTURIES), draw.randrange(2, 99)
        row = _row(model, BEFORE.format(noun=noun), str(century), f"{year:02d}")
        if row is None or (rows and len(row.clean) != len(rows[0].clean)):
            refused.append(f"{century}{year:02d}")
        else:
            rows.append(row)
        if len(rows) == n:
            return joined(f"greater_than:{corruption}", rows)
    raise BadInput(
        f"task 'greater_than': {model.id} splits years so that {len(rows)} of {8 * n} prompts can be used, "
        f"wanted {n}; the century and the year must be tokens of their own, and were not in "
        f"{listed(refused)}"
    )


def _row(model: Model, before: str, century: str, year: str) -> Row | None:
    """One pair; None where the tokenizer joins century and year, or no answer stands apart."""
    clean, corrupted = (f"{before}{century}{y}{BETWEEN}{century}" for y in (year, "01"))
    ids, other = token_ids(model, clean), token_ids(model, corrupted)
    start = token_ids(model, before + century)
    if ids[: len(start)] != start or len(other) != len(ids):
        return None
    first = [_first(model, clean, ids, f"{y:02d}") for y in range(100)]
    if None in first:
        return None
    until, later = set(first[: int(year) + 1]), set(first[int(year) + 1 :])
    answers, wrong = (sorted(t for t in side if t) for side in (later - until, until - later))
    if not answers or not wrong:
        return None
    noun = len(token_ids(model, before.split(" lasted")[0])) - 1
    place = len(start) - 1
    return Row(ids, other, answers, wrong, {"noun": noun, "XX": place, "YY": place + 1})


def _first(model: Model, prompt: str, ids: Sequence[int], year: str) -> int | None:
    """The first token of a year after the prompt."""
    longer = token_ids(model, prompt + year)
    joined = longer[: len(ids)] != list(ids) or len(longer) == len(ids)
    return None if joined else longer[len(ids)]
