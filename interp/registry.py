"""Every analysis, as the command line, the docs and the contract tests find it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from interp.errors import unknown

if TYPE_CHECKING:
    import pandas as pd

    from interp.report import Report

F = TypeVar("F", bound=Callable)
Reads = Literal["model", "models", "reports"]
"""What an analysis is given first, `function(first, data…, *, options) -> Report`: an opened Model; names of
models, which it opens itself with `interp.load`, one at a time; or Reports, such as `Report.load` gives."""


@dataclass(frozen=True)
class Analysis:
    """What is known about an analysis: `function(model, data, *, options) -> Report`.

    The command line is made from the function's signature and docstring. `validate(**options)` raises
    BadInput for options that no model could satisfy, so that a typo is told before a large model is
    loaded. `summary(report)` is the table that the command line prints; by default the first rows.
    `reads` is what stands in the place of the model.
    """

    name: str
    function: Callable
    source: str
    example: str
    figure: str
    validate: Callable[..., None]
    summary: Callable[[Report], pd.DataFrame]
    reads: Reads = "model"


ANALYSES: dict[str, Analysis] = {}


def analysis_called(name: str) -> Analysis:
    """The registered or installed analysis of this name, imported now; BadInput names the nearest.

    >>> analysis_called("head").name
    Traceback (most recent call last):
    interp.errors.BadInput: no analysis 'head'; did you mean 'heads'? known: ...
    """
    if name not in ANALYSES:
        installed = {entry.name: entry for entry in entry_points(group="interp.analyses")}
        if name not in installed:
            raise unknown("analysis", name, sorted({*installed, *ANALYSES}))
        installed[name].load()
    return ANALYSES[name]


def first_rows(report: Report) -> pd.DataFrame:
    """The first rows of the main table."""
    return report.table.head(15)


def intervals(table: pd.DataFrame, name: str) -> list[str]:
    """The intervals in columns `<name>_low` and `<name>_high`, as a summary shows them."""
    low, high = table[f"{name}_low"], table[f"{name}_high"]
    return [f"{a:.2f} to {b:.2f}" for a, b in zip(low, high, strict=True)]


def analysis(
    *,
    name: str,
    source: str,
    example: str,
    figure: str,
    validate: Callable[..., None],
    summary: Callable[[Report], pd.DataFrame] = first_rows,
    reads: Reads = "model",
) -> Callable[[F], F]:
    """Register a function as an analysis and return it unchanged."""
    if reads not in get_args(Reads):
        raise ValueError(f"reads={reads!r}; wanted one of {', '.join(get_args(Reads))}")

    def register(function: F) -> F:
        ANALYSES[name] = Analysis(name, function, source, example, figure, validate, summary, reads)
        return function

    return register
