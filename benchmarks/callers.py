"""Which modelling files of the installed transformers call its attention interface, and have no model type in full.

A file calls the interface where its source names ALL_ATTENTION_FUNCTIONS. It counts as verified where a swept
row of a class that it defines is in full.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Protocol

import transformers

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
CLASSES = re.compile(r"^class (\w+)", re.MULTILINE)


class Swept(Protocol):
    """What is read of a row of the support table."""

    @property
    def model_type(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def outcome(self) -> str: ...
    @property
    def reason(self) -> str: ...


@cache
def calling_files() -> dict[str, frozenset[str]]:
    """The classes that each file defines, of modelling files that call the interface; by the file's name."""
    models = Path(transformers.__file__).parent / "models"
    sources = ((path, path.read_text()) for path in sorted(models.glob("*/modeling_*.py")))
    return {
        path.stem: frozenset(CLASSES.findall(source))
        for path, source in sources
        if INTERFACE in source
    }


def not_in_full(rows: Iterable[Swept]) -> dict[str, str]:
    """Files that call the interface and of which no row is in full, each with what became of its types."""
    rows = list(rows)
    left = {}
    for file, classes in calling_files().items():
        own = [row for row in rows if row.model in classes]
        if not any(row.outcome == "in full" for row in own):
            each = (f"{row.model_type} {row.outcome} ({row.reason})" for row in own)
            left[file] = "; ".join(each) or "no model type of it is swept"
    return left


def summary(rows: Iterable[Swept]) -> str:
    """How many of the files that call the interface have a model type in full, and a line for each that has none."""
    left, total = not_in_full(rows), len(calling_files())
    lines = [
        f"{total - len(left)} of {total} modelling files that call the attention interface ({INTERFACE})",
        "have a model type verified in full" + ("; the others:" if left else ""),
    ]
    return "\n".join(lines + [f"  {file}: {why}"[:160] for file, why in left.items()])
