"""A unit of a plan: one analysis of one model on one data set, named by all that its result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from interp.batch.arguments import bound, contents
from interp.batch.models import Source
from interp.batch.plan import Plan, Task
from interp.errors import BadInput
from interp.schemas import SCHEMA_VERSION

NONE = "-"
"""Stands in folder names and tables for a revision or data set that was not given."""


@dataclass(frozen=True)
class Unit:
    """What a worker is sent: plain data, and the address of the function.

    Attributes:
        id: 16 hex digits of the hash of the model's content, name and revision, how it is loaded,
            the analysis, its arguments and the content of files they name, and of the versions of
            this package and of the reports' schema.
        module: where the analysis is registered. options: those of `arguments` that are not the data
            set's, for a person.
    """

    id: str
    source: Source
    analysis: str
    module: str
    data: str
    arguments: dict[str, Any]
    options: str = ""
    threads: int = 1
    page: bool = True

    @property
    def revision(self) -> str:
        """Revision of the model, as folders and tables name it."""
        return self.source.revision or NONE

    @property
    def folder(self) -> Path:
        """Where the result is, inside the plan's folder: `key=value` parts, as duckdb and pyarrow read them."""
        keys = {
            "model": self.source.name,
            "revision": self.revision,
            "analysis": self.analysis,
            "data": self.data,
            "unit": self.id,
        }
        return Path("units", *(f"{key}={quote(value, safe='')}" for key, value in keys.items()))

    @property
    def shown(self) -> str:
        """The unit for a person."""
        on = f" on {self.data}" if self.data != NONE else ""
        return f"{self.analysis} of {self.source.shown}{on}"


def units_of(plan: Plan, sources: Iterable[Source]) -> list[Unit]:
    """Every task on every source, whose content is known; units of one model stand together."""
    tasks = [(task, _depends_on(task)) for task in plan.tasks]
    units = [
        Unit(
            _digest(source, depends),
            source,
            task.analysis.name,
            task.analysis.function.__module__,
            task.data or NONE,
            task.arguments,
            ", ".join(f"{name}={value}" for name, value in task.options.items()),
            plan.threads,
            plan.pages,
        )
        for source in sources
        for task, depends in tasks
    ]
    by_id: dict[str, Unit] = {}
    for unit in units:
        if unit.id in by_id:
            raise BadInput(
                f"{unit.shown} and {by_id[unit.id].shown} are the same; leave one of them out"
            )
        by_id[unit.id] = unit
    return units


def _depends_on(task: Task) -> dict[str, Any]:
    from interp.report import installed_version

    return {
        "analysis": task.analysis.name,
        "arguments": contents(bound(task.analysis, task.arguments)),
        "schema_version": SCHEMA_VERSION,
        "package": installed_version("interp-suite"),
    }


def _digest(source: Source, depends: dict[str, Any]) -> str:
    model = [source.name, source.revision, source.loading, source.sha256]
    text = json.dumps({"model": model, **depends}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
