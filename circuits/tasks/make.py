"""Pairs from a template or a table: tokenised by the model's own tokenizer, positions named by slots."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import Any, NamedTuple

import pandas as pd

from interp.data.pairs import Pairs
from interp.errors import BadInput, unknown
from interp.models.model import Model

log = logging.getLogger("interp")

Slots = Mapping[str, str]
Answer = str | Sequence[str]
COLUMNS = ("clean", "corrupted", "answer", "wrong")
POSITION_COLUMN = "position_"
SHOWN = 12
"""How many refused words or rows a message lists."""


class Prompt(NamedTuple):
    """A filled template: its text, and where (in characters) each slot ends."""

    text: str
    ends: dict[str, int]


class Row(NamedTuple):
    """One pair as token ids, with its positions."""

    clean: list[int]
    corrupted: list[int]
    answers: list[int]
    wrong: list[int]
    positions: dict[str, int]


def pairs_from_template(
    model: Model,
    template: str | Sequence[str],
    rows: Sequence[Slots] | pd.DataFrame,
    corrupted: Slots | Sequence[Slots] | pd.DataFrame,
    *,
    answer: Answer,
    wrong: Answer,
    positions: Sequence[str] | Mapping[str, str] = (),
    name: str = "template",
    drop: bool = False,
) -> Pairs:
    """Pairs whose named positions are the template's slots.

        rows = [{"IO": "Mary", "S": "John"}, {"IO": "Anna", "S": "Tom"}]
        template = "When {IO} and {S} went to the store, {S} gave a drink to"
        pairs = pairs_from_template(model, template, rows, {"S2": "{IO}"}, answer=" {IO}", wrong=" {S}")

    A slot's position is its last token. A slot that occurs twice, {S} … {S}, has the positions S1 and
    S2, and a row may fill the two differently by those names.

    Args:
        template: text with {slots}; or one a row.
        rows: what fills the slots of each clean prompt (a DataFrame: columns are slots).
        corrupted: what differs in the corrupted prompts: one mapping for all rows, in which {slot}
            stands for the row's own word, or one mapping a row.
        answer, wrong: the next token (several: a list), written as it follows the prompt, so mostly
            with a space before it; {slots} are those of the clean row.
        positions: more positions, relative to slots: ["S1+1"], or {"after": "S1+1"} with a name; {slots}
            of the clean row may choose ({"color": "c{asked}"}).
        name: of the task.
        drop: leave out rows that do not fit this tokenizer (a length other than most rows', an answer
            of several tokens), and log which, instead of raising.

    Returns: Pairs, all prompts of one length.

    Raises:
        BadInput: no tokenizer; an unknown slot; a slot that is not at the same token in clean and
        corrupted; an answer that is several tokens; prompts of unequal length.

    >>> pairs_from_template(tiny_model(), "{A} to", [{"A": "x"}], {"A": "y"}, answer=" a",
    ...     wrong=" b")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    interp.errors.BadInput: task 'template' is made of text, and tiny was loaded without a tokenizer: ...
    """
    require_tokenizer(model, name)
    slots = _records(rows)
    if not slots:
        raise BadInput(f"task '{name}' has no rows: give at least one")
    templates = [template] * len(slots) if isinstance(template, str) else list(template)
    changes = [corrupted] * len(slots) if isinstance(corrupted, Mapping) else _records(corrupted)
    for what, given in (("templates", templates), ("corrupted rows", changes)):
        if len(given) != len(slots):
            raise BadInput(f"task '{name}' has {len(slots)} rows and {len(given)} {what}")
    extra = positions if isinstance(positions, Mapping) else {place: place for place in positions}

    def made(i: int) -> Row:
        where = f"task '{name}', row {i}"
        row, change = slots[i], {k: fill(v, slots[i], where) for k, v in changes[i].items()}
        _check_slots(templates[i], row, change, where)
        clean = filled(templates[i], row, where)
        return _row(
            model,
            clean,
            filled(templates[i], {**row, **change}, where),
            [fill(text, row, where) for text in _several(answer)],
            [fill(text, row, where) for text in _several(wrong)],
            {place: fill(text, row, where) for place, text in extra.items()},
            where,
        )

    return joined(name, _made(name, made, len(slots), drop))


def pairs_from_frame(
    model: Model,
    frame: pd.DataFrame,
    *,
    name: str = "frame",
    positions: Mapping[str, str] | None = None,
) -> Pairs:
    """Pairs from a table with columns clean, corrupted, answer, wrong.

    Args:
        frame: one row a pair. `answer` and `wrong` are written as they follow the prompt (mostly with a
            space before them); a cell may be a list of several.
        name: of the task.
        positions: {name: column}; by default every column called position_NAME. A cell is a token's
            number (negative from the end) or a piece of the clean prompt, whose last token is meant.

    Raises:
        BadInput: a missing column, a piece that is not in the prompt once, and as in
        `pairs_from_template`.

    >>> frame = pd.DataFrame({"clean": ["a"], "corrupted": ["b"], "answer": [" c"]})
    >>> pairs_from_frame(tiny_model(), frame)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    interp.errors.BadInput: task 'frame' has no column 'wrong'; wanted clean, corrupted, ...
    """
    if missing := [column for column in COLUMNS if column not in frame.columns]:
        raise BadInput(
            f"task '{name}' has no column '{missing[0]}'; wanted {', '.join(COLUMNS)}; "
            f"found {', '.join(map(str, frame.columns))}"
        )
    if positions is None:
        found = [str(c) for c in frame.columns if str(c).startswith(POSITION_COLUMN)]
        positions = {column.removeprefix(POSITION_COLUMN): column for column in found}
    for column in positions.values():
        if column not in frame.columns:
            raise unknown(f"column of task '{name}'", column, map(str, frame.columns))
    if not len(frame):
        raise BadInput(f"task '{name}' has no rows: give at least one")
    require_tokenizer(model, name)
    records = frame.to_dict("records")

    def made(i: int) -> Row:
        where, cells = f"task '{name}', row {i}", records[i]
        for column in ("clean", "corrupted"):
            if not isinstance(cells[column], str) or not cells[column]:
                raise BadInput(f"{where}: {column} is {cells[column]!r}, wanted a text")
        text = cells["clean"]
        row = _row(
            model,
            Prompt(text, {}),
            Prompt(cells["corrupted"], {}),
            _several(cells["answer"]),
            _several(cells["wrong"]),
            {},
            where,
        )
        for place, column in positions.items():
            row.positions[place] = _place(
                model, text, row.clean, cells[column], f"{where}, {place}"
            )
        return row

    return joined(name, _made(name, made, len(records), drop=False))


def joined(name: str, rows: Sequence[Row]) -> Pairs:
    """Pairs of finished rows; the positions that all of them have."""
    names = [place for place in rows[0].positions if all(place in row.positions for row in rows)]
    return Pairs.of(
        [row.clean for row in rows],
        [row.corrupted for row in rows],
        answers=[row.answers for row in rows],
        wrong=[row.wrong for row in rows],
        positions={place: [row.positions[place] for row in rows] for place in names},
        name=name,
    )


# --- tokens ----------------------------------------------------------------------------------


def require_tokenizer(model: Model, name: str) -> None:
    """BadInput where text cannot be read."""
    if model.tokenizer is None:
        raise BadInput(
            f"task '{name}' is made of text, and {model.id} was loaded without a tokenizer: load it with "
            "tokenizer=, use the task 'induction' (random tokens), or give token ids with Pairs.of"
        )


def token_ids(model: Model, text: str) -> list[int]:
    """A prompt's ids as `model.tokenize` begins it, without what some tokenizers put after the text."""
    ids = model.tokenize(text).ids[0].tolist()
    plain = list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    for lead in range(len(ids) - len(plain) + 1):
        if ids[lead : lead + len(plain)] == plain:
            return ids[: lead + len(plain)]
    return ids


def next_token(model: Model, prompt: str, ids: Sequence[int], answer: str) -> int | None:
    """The one token that `answer` adds to a prompt (`ids` are the prompt's); None if it is not one."""
    longer = token_ids(model, prompt + answer)
    return longer[-1] if len(longer) == len(ids) + 1 and longer[:-1] == list(ids) else None


def one_token_words(model: Model, task: str, what: str, words: str, *, need: int) -> list[str]:
    """Those of `words` (spaces between) that are one token in mid-sentence; a log line lists the others.

    Raises:
        BadInput: fewer than `need` remain; lists the words that split.
    """
    require_tokenizer(model, task)
    before = token_ids(model, "the")
    listing = words.split()
    good = [word for word in listing if next_token(model, "the", before, f" {word}") is not None]
    split = [word for word in listing if word not in set(good)]
    if len(good) < need:
        raise BadInput(
            f"task '{task}' needs {need} {what} that are one token of {model.id}; {len(good)} of "
            f"{len(listing)} are. These split: {listed(split)}"
        )
    if split:
        log.info("task '%s': %s of several tokens are left out: %s", task, what, listed(split))
    return good


def listed(words: Sequence[str]) -> str:
    """Some words, and how many more."""
    more = f" … ({len(words)} in all)" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more


# --- templates -------------------------------------------------------------------------------


def slots_of(template: str) -> list[tuple[str, str, str]]:
    """(text before, slot, name of this occurrence) of every slot; the text after the last has slot "".

    >>> slots_of("{A} and {B}, {A} to")
    [('', 'A', 'A1'), (' and ', 'B', 'B'), (', ', 'A', 'A2'), (' to', '', '')]
    """
    parts = [(literal, slot or "") for literal, slot, _, _ in Formatter().parse(template)]
    often, seen = Counter(slot for _, slot in parts if slot), Counter()
    out = []
    for literal, slot in parts:
        seen[slot] += 1
        out.append((literal, slot, f"{slot}{seen[slot]}" if often[slot] > 1 else slot))
    return out


def filled(template: str, row: Slots, where: str) -> Prompt:
    """The template with its slots filled."""
    text, ends = "", {}
    for literal, slot, occurrence in slots_of(template):
        text += literal
        if slot:
            if occurrence not in row and slot not in row:
                raise unknown(f"slot value ({where})", slot, row)
            text += row.get(occurrence, row.get(slot, ""))
            ends[occurrence] = len(text)
    return Prompt(text, ends)


def fill(text: str, row: Slots, where: str) -> str:
    """A text in which {slot} stands for the row's word."""
    return filled(text, row, where).text if "{" in text else text


def _check_slots(template: str, row: Slots, change: Slots, where: str) -> None:
    """A change that names no slot would silently corrupt nothing."""
    known = {
        name for _, slot, occurrence in slots_of(template) for name in (slot, occurrence) if name
    }
    for name in change:
        if name not in known and name not in row:
            raise unknown(f"slot ({where})", name, sorted(known))


def _row(
    model: Model,
    clean: Prompt,
    corrupted: Prompt,
    answers: Sequence[str],
    wrong: Sequence[str],
    extra: Mapping[str, str],
    where: str,
) -> Row:
    ids = token_ids(model, clean.text)
    other = token_ids(model, corrupted.text)
    places = {
        slot: _token_at(model, clean.text, ids, end, slot, where)
        for slot, end in clean.ends.items()
    }
    for slot, end in corrupted.ends.items():
        there = _token_at(model, corrupted.text, other, end, slot, where)
        if there != places[slot]:
            raise BadInput(
                f"{where}: {{{slot}}} ends at token {places[slot]} of the clean prompt and {there} of the "
                f"corrupted one ({clean.text!r}, {corrupted.text!r}); use words of equally many tokens"
            )
    for name, expression in extra.items():
        places[name] = _relative(expression, places, len(ids), where)
    return Row(
        ids,
        other,
        [_answer(model, clean.text, ids, text, where) for text in answers],
        [_answer(model, clean.text, ids, text, where) for text in wrong],
        places,
    )


def _token_at(model: Model, text: str, ids: Sequence[int], end: int, slot: str, where: str) -> int:
    """The token in which the first `end` characters of a prompt end."""
    before = token_ids(model, text[:end])
    if list(ids[: len(before)]) != before:
        raise BadInput(
            f"{where}: {slot} does not end where a token ends in {text!r} "
            f"(tokens {model.tokens(ids)}); move what follows it, or leave the row out"
        )
    return len(before) - 1


def _answer(model: Model, prompt: str, ids: Sequence[int], answer: str, where: str) -> int:
    if prompt[-1:].isalpha() and answer[:1].isalpha():
        raise BadInput(
            f"{where}: the answer {answer!r} goes on without a space after {prompt[-20:]!r}; "
            f"did you mean {' ' + answer!r}?"
        )
    token = next_token(model, prompt, ids, answer)
    if token is None:
        added = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
        hint = " (leave out the space at the prompt's end)" if prompt.endswith(" ") else ""
        raise BadInput(
            f"{where}: {answer!r} is not one token after {prompt[-20:]!r}{hint}; on its own it splits "
            f"into {' + '.join(map(repr, model.tokens(added))) or 'nothing'}"
        )
    return token


def _relative(expression: str, places: Mapping[str, int], length: int, where: str) -> int:
    """The position "S1+1" or "S1-1"."""
    match = re.fullmatch(r"(.+?)([+-]\d+)?", expression)
    slot, shift = match.groups() if match else (expression, None)
    if slot not in places:
        raise unknown(f"slot ({where})", slot, places)
    place = places[slot] + int(shift or 0)
    if not 0 <= place < length:
        raise BadInput(f"{where}: {expression} is token {place} of a prompt of {length}")
    return place


def _place(model: Model, text: str, ids: Sequence[int], cell: Any, where: str) -> int:
    """A token's number, given as such or as a piece of the prompt."""
    if isinstance(cell, str) and not re.fullmatch(r"-?\d+", cell):
        if (often := text.count(cell)) != 1 or not cell:
            raise BadInput(
                f"{where}: {cell!r} occurs {often} times in {text!r}; give a longer piece, or the "
                "token's number"
            )
        return _token_at(model, text, ids, text.index(cell) + len(cell), repr(cell), where)
    place = int(cell)
    if not -len(ids) <= place < len(ids):
        raise BadInput(f"{where}: token {place} is not in a prompt of {len(ids)} tokens")
    return place % len(ids)


def _made(name: str, made: Callable[[int], Row], n: int, drop: bool) -> list[Row]:
    """All rows; with `drop`, those that fit and have the most common length."""
    if not drop:
        return [made(i) for i in range(n)]
    rows, refused = {}, {}
    for i in range(n):
        try:
            row = made(i)
        except BadInput as error:
            refused[i] = str(error)
            continue
        if len(row.clean) == len(row.corrupted):
            rows[i] = row
        else:
            refused[i] = f"{len(row.clean)} and {len(row.corrupted)} tokens"
    if not rows:
        raise BadInput(
            f"task '{name}': none of {n} rows fits this tokenizer; the first: {refused[0]}"
        )
    most = Counter(len(row.clean) for row in rows.values()).most_common(1)[0][0]
    kept = {i: row for i, row in rows.items() if len(row.clean) == most}
    if len(kept) < n:
        left = [str(i) for i in range(n) if i not in kept]
        log.info("task '%s': %d of %d rows are left out (%s)", name, len(left), n, listed(left))
    return list(kept.values())


def _records(rows: Sequence[Slots] | Slots | pd.DataFrame) -> list[dict[str, str]]:
    if isinstance(rows, pd.DataFrame):
        return [{str(k): str(v) for k, v in row.items()} for row in rows.to_dict("records")]
    return [dict(row) for row in rows]  # type: ignore[arg-type]


def _several(answer: Any) -> list[str]:
    """One answer, or each of several (a list, or an array as parquet gives it)."""
    return [answer] if isinstance(answer, str) else [str(text) for text in answer]
