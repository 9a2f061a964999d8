"""Tasks: clean and corrupted prompts with named positions, made for each tokenizer.

A new task is a function `(model, n, seed, *, option) -> Pairs` in a file of its own, and an entry of TASKS.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from circuits.tasks import agreement as _agreement
from circuits.tasks import colored_objects as _colored_objects
from circuits.tasks import docstring as _docstring
from circuits.tasks import facts as _facts
from circuits.tasks import greater_than as _greater_than
from circuits.tasks import induction as _induction
from circuits.tasks import ioi as _ioi
from circuits.tasks.make import pairs_from_frame, pairs_from_template
from interp.data.facts import RELATIONS
from interp.data.pairs import Pairs
from interp.errors import BadInput, unknown
from interp.models.model import Model

__all__ = ["TASKS", "Task", "as_pairs", "check_task", "pairs_from_frame", "pairs_from_template"]

READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": lambda path: pd.read_csv(path, dtype=str, keep_default_na=False),
    ".parquet": pd.read_parquet,
    ".jsonl": lambda path: pd.DataFrame(
        [json.loads(line) for line in path.read_text().splitlines()]
    ),
}


@dataclass(frozen=True)
class Task:
    """A shipped task.

    Attributes:
        make: `(model, n, seed, **{option: variant}) -> Pairs`.
        about: one line. source: the paper.
        option: what "name:variant" sets. variants: its values and what each means, the default first.
    """

    make: Callable[..., Pairs]
    about: str
    source: str
    option: str
    variants: Mapping[str, str]


TASKS: dict[str, Task] = {
    "ioi": Task(
        _ioi.ioi,
        "who received it: the name that was not repeated",
        "Wang et al. 2022",
        "corruption",
        _ioi.CORRUPTIONS,
    ),
    "colored_objects": Task(
        _colored_objects.colored_objects,
        "the color of the object asked for, out of three",
        "Merullo et al. 2024",
        "corruption",
        _colored_objects.CORRUPTIONS,
    ),
    "greater_than": Task(
        _greater_than.greater_than,
        "a year later than the one a war began in; many right answers",
        "Hanna et al. 2023",
        "corruption",
        _greater_than.CORRUPTIONS,
    ),
    "facts": Task(
        _facts.facts,
        "capitals and other relations: the answer for one subject against another's",
        "Meng et al. 2022",
        "relation",
        RELATIONS,
    ),
    "induction": Task(
        _induction.induction,
        "random tokens come again: what followed then follows now",
        "Olsson et al. 2022",
        "corruption",
        _induction.CORRUPTIONS,
    ),
    "docstring": Task(
        _docstring.docstring,
        "the third argument of a function in its docstring",
        "Heimersheim and Janiak 2023",
        "corruption",
        _docstring.CORRUPTIONS,
    ),
    "agreement": Task(
        _agreement.agreement,
        "a verb of the subject's number, past a noun of the other",
        "Linzen et al. 2016",
        "corruption",
        _agreement.CORRUPTIONS,
    ),
}


def as_pairs(model: Model, task: Pairs | str | Path, *, n: int = 32, seed: int = 0) -> Pairs:
    """The pairs that `task` names: a shipped task, a file, or Pairs as they are.

    >>> len(as_pairs(tiny_model(), "induction", n=4)), as_pairs(tiny_model(), "induction:successor").name
    (4, 'induction:successor')

    Args:
        task: Pairs; a name of TASKS, with a variant if wanted ("ioi", "ioi:s2", "facts:language"); or
            the path of a .csv, .parquet or .jsonl file with columns clean, corrupted, answer, wrong and,
            if wanted, position_NAME (see `pairs_from_frame`).
        n, seed: how many pairs of a shipped task, and which. A file's first n rows are taken.

    Raises:
        BadInput: an unknown name (with the nearest), a file that is missing or lacks a column, n < 1.
    """
    if isinstance(task, Pairs):
        return task
    if n < 1:
        raise BadInput(f"n={n}: a task needs at least one pair")
    path = Path(task)
    if path.suffix in READERS:
        _check_file(path)
        return pairs_from_frame(model, READERS[path.suffix](path).head(n), name=path.stem)
    known, options = _find(str(task))
    return known.make(model, n, seed, **options)


def check_task(task: str | Path) -> None:
    """Raise BadInput for a task that no model could have: an unknown name, a file that is not there."""
    if Path(task).suffix in READERS:
        _check_file(Path(task))
    else:
        _find(str(task))


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise BadInput(f"no file {path}: give a path, or one of the tasks {', '.join(TASKS)}")


def _find(task: str) -> tuple[Task, dict[str, str]]:
    """A shipped task and its options; BadInput with the nearest name."""
    name, _, variant = task.partition(":")
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    found = TASKS[name]
    if variant and variant not in found.variants:
        raise unknown(f"{found.option} of task '{name}'", variant, found.variants)
    return found, {found.option: variant} if variant else {}
