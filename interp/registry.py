"""Every analysis, as the command line, the docs and the contract tests find it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from interp.errors import Refused, unknown

if TYPE_CHECKING:
    import pandas as pd

    from interp.report import Report

F = TypeVar("F", bound=Callable)
Reads = Literal["model", "models", "reports"]
"""What an analysis is given first, `function(first, data…, *, options) -> Report`: an opened Model; names of
models, which it opens itself with `interp.load`, one at a time; or Reports, such as `Report.load` gives."""

Takes = Literal["any", "one stack", "text"]
"""Which models an analysis can serve at all: any; not encoder-decoders, whose decoder reads a source besides;
of the others only those that read tokens."""


@dataclass(frozen=True)
class Analysis:
    """What is known about an analysis: `function(model, data, *, options) -> Report`.

    The command line is made from the function's signature and docstring. `validate(**options)` raises
    BadInput for options that no model could satisfy, so that a typo is told before a large model is
    loaded. `summary(report)` is the table that the command line prints; by default the first rows.
    `reads` is what stands in the place of the model; `takes` are the models that it can serve at all.
    """

    name: str
    function: Callable
    source: str
    example: str
    figure: str
    validate: Callable[..., None]
    summary: Callable[[Report], pd.DataFrame]
    reads: Reads = "model"
    takes: Takes = "any"


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


def leading(rows: pd.DataFrame, *names: str) -> pd.DataFrame:
    """The same rows with these columns first: a narrow terminal shows the first ones."""
    return rows.reindex(columns=[*names, *(name for name in rows if name not in names)])


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
    takes: Takes = "any",
) -> Callable[[F], F]:
    """Register a function as an analysis and return it; where it `takes` not any model, it refuses the others first."""
    for option, value, known in (("reads", reads, Reads), ("takes", takes, Takes)):
        if value not in get_args(known):
            raise ValueError(f"{option}={value!r}; wanted one of {', '.join(get_args(known))}")

    def register(function: F) -> F:
        checked = function if takes == "any" else _checked(function, name, takes)
        ANALYSES[name] = Analysis(
            name, checked, source, example, figure, validate, summary, reads, takes
        )
        return checked

    return register


def _checked(function: F, name: str, takes: Takes) -> F:
    """The function, which asks first whether it can serve the model: before data are made or read."""

    @wraps(function)
    def checked(model: Any, *data: Any, **options: Any) -> Report:
        require_kind(model, name, takes)
        return function(model, *data, **options)

    return checked  # type: ignore[return-value]


def require_kind(model: Any, name: str, takes: Takes) -> None:
    """Refused where the analysis called `name`, which takes such models, cannot serve this one."""
    from interp.models.calls import is_encoder_decoder, main_input

    main = main_input(model.module)
    if is_encoder_decoder(model.module):
        given = "is an encoder-decoder: its decoder reads a source besides what it has written"
        instead = (
            "model.run, `interp lens` and `interp massive` take a source; "
            "Model(model.module.get_encoder()) is one stack"
        )
    elif takes == "text" and main != "input_ids":
        given = f"reads '{main}', no tokens"
        instead = "model.run takes them, and of images `interp heads` makes its own"
    elif takes == "text" and model.spec.beside:
        given = "has no tokens at the positions of its stack"
        instead = "model.run takes what the whole model reads"
    else:
        return
    wanted = "one sequence of tokens" if takes == "text" else "one sequence"
    raise Refused(f"{model.id} {given}. '{name}' wants a model of {wanted}; {instead}")
