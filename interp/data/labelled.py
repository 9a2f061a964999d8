"""Texts with a label each, and the groups that must not be split: what a probe is fitted and judged on.

`labelled_texts.csv` was written for this project. Its sentences come in groups of one frame, one meaning
or one word, so that a probe which knows the group does not know the label.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from interp.errors import BadInput, unknown

LABELLED = {
    "sentiment": "positive or negative; a pair differs in one word and is a group",
    "language": "english, french, german, spanish or italian; a group is one meaning in all five",
    "tense": "past or present; the word is the verb, a group its lemma",
    "number": "singular or plural; the word is the noun, a group its lemma",
    "part_of_speech": "noun, verb or adjective; a group is the word",
}
"""The shipped sets: their labels, and what a group is."""

COLUMNS = ("text", "label", "group", "word")
"""Columns of a file; the first two are needed."""

SUFFIXES = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with a label each.

    Attributes:
        name: the set's.
        texts, labels: one a row.
        groups: rows of one group (a frame, a lemma, a document) belong into one fold.
        words: the word each text is asked about, which is its last occurrence; None where it is the
            whole text.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    groups: tuple[str, ...]
    words: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, indices: Sequence[int]) -> LabelledTexts:
        """Some of the rows, in the order given."""

        def some(values: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(values[int(i)] for i in indices)

        words = None if self.words is None else some(self.words)
        return LabelledTexts(
            self.name, some(self.texts), some(self.labels), some(self.groups), words
        )


def of(
    texts: Sequence[str],
    labels: Sequence[object],
    groups: Sequence[object] | None = None,
    words: Sequence[str] | None = None,
    name: str = "yours",
) -> LabelledTexts:
    """Labelled texts after checks.

    Args:
        texts: none of them empty.
        labels: one a text, of two classes or more; numbers become text.
        groups: one a text. Without them a group is a word (in lower case) where words are given, else
            a text, so that what is the same never stands on both sides of a split.
        words: the word each text is asked about; it must stand in its text as a whole word.

    Raises:
        BadInput: lengths that differ, an empty text or label, one class only, a word that its text
            lacks, one text with two labels.

    >>> found = of(["I am glad.", "I am sad."], ["up", "down"], words=["glad", "sad"])
    >>> found.groups, found.rows([1]).texts
    (('glad', 'sad'), ('I am sad.',))
    """
    count = len(texts)
    if not count:
        raise BadInput(f"{name} has no texts: give two or more, of two classes")
    given = {"labels": labels, "groups": groups, "words": words}
    for what, values in given.items():
        if values is not None and len(values) != count:
            raise BadInput(f"{name} has {count} texts but {len(values)} {what}: give one a text")
    kept = tuple(str(text) for text in texts)
    for what, values in (("text", kept), ("label", labels), ("group", groups), ("word", words)):
        empty = [row for row, value in enumerate(values or (), 1) if not str(value).strip()]
        if empty:
            raise BadInput(f"{name}: row {empty[0]} has an empty {what}")
    classes = sorted({str(label) for label in labels})
    if len(classes) < 2:
        raise BadInput(
            f"{name} has one class only ({classes[0]}): a probe needs texts of two or more"
        )
    asked = None if words is None else tuple(str(word) for word in words)
    for row, (text, word) in enumerate(zip(kept, asked or (), strict=False), 1):
        if word_span(text, word) is None:
            raise BadInput(f"{name}: row {row}: the word '{word}' is not in its text '{text}'")
    seen: dict[tuple[str, str], str] = {}
    for row, key in enumerate(zip(kept, asked or kept, strict=True)):
        if seen.setdefault(key, str(labels[row])) != str(labels[row]):
            raise BadInput(
                f"{name}: row {row + 1}: '{key[0]}' is labelled {labels[row]} here and {seen[key]} above"
            )
    if groups is None:
        groups = kept if asked is None else tuple(word.lower() for word in asked)
    return LabelledTexts(
        name, kept, tuple(str(label) for label in labels), tuple(str(g) for g in groups), asked
    )


def word_span(text: str, word: str) -> tuple[int, int] | None:
    """Where a word stands last in a text as a whole word: first character and one past the last.

    >>> word_span("an art, the Art of part", "art"), word_span("the start", "art")
    ((3, 6), None)
    """
    found = list(re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text))
    return found[-1].span() if found else None


def labelled_texts(name_or_path: str | Path) -> LabelledTexts:
    """A shipped set by its name, or a file's rows.

    Args:
        name_or_path: one of LABELLED; or a .csv, .jsonl or .parquet file with columns text and label
            and, if wanted, group and word (see `of`). Other columns are ignored.

    Raises:
        BadInput: an unknown name (with the nearest), a file that is missing, empty, unreadable or
            without a needed column; and what `of` raises.

    >>> found = labelled_texts("sentiment")
    >>> len(found) >= 200, sorted(set(found.labels))
    (True, ['negative', 'positive'])
    """
    if not isinstance(name_or_path, (str, Path)):
        raise BadInput(
            f"a {type(name_or_path).__name__} of labelled texts: make them with "
            "interp.data.labelled.of(texts, labels), or name a file"
        )
    path = Path(name_or_path).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        if str(name_or_path) not in LABELLED:
            raise unknown("labelled set or file", str(name_or_path), LABELLED)
        return _shipped(str(name_or_path))
    if not path.is_file():
        raise BadInput(f"no file '{path}': give a path, or one of the sets {', '.join(LABELLED)}")
    return _checked(_file_rows(path), str(path), path.stem)


@cache
def _shipped(name: str) -> LabelledTexts:
    text = files("interp.data").joinpath("labelled_texts.csv").read_text(encoding="utf-8")
    rows = [row for row in csv.DictReader(text.splitlines()) if row["set"] == name]
    columns = [c for c in COLUMNS if c != "word" or any(row["word"] for row in rows)]
    return _checked([{c: row[c] for c in columns} for row in rows], name, name)


def _checked(rows: list[dict[str, object]], where: str, name: str) -> LabelledTexts:
    if not rows:
        raise BadInput(f"{where} has no rows: give two texts or more, with columns text and label")
    known = list(dict.fromkeys(column for row in rows for column in row))
    if missing := [column for column in COLUMNS[:2] if column not in known]:
        raise BadInput(
            f"{where} has no column {' and no column '.join(missing)}; its columns are {', '.join(known)}"
        )
    columns: dict[str, list[str] | None] = dict.fromkeys(COLUMNS)
    for column in COLUMNS:
        if column in known:
            columns[column] = ["" if row.get(column) is None else str(row[column]) for row in rows]
    return of(
        columns["text"] or [], columns["label"] or [], columns["group"], columns["word"], name
    )


def _file_rows(path: Path) -> list[dict[str, object]]:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [{k: v for k, v in row.items() if k is not None} for row in csv.DictReader(file)]
    if suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            return [
                _json_row(line, f"{path}, line {n}")
                for n, line in enumerate(file, 1)
                if line.strip()
            ]
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise BadInput(f"{path} is not a parquet file: {error}") from error


def _json_row(line: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadInput(f"{where} is no object with fields text and label: {line.strip()[:60]}")
    return row
