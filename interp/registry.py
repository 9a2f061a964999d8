"""Every analysis, as the command line, the docs and the contract tests find it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

F = TypeVar("F", bound=Callable)


@dataclass(frozen=True)
class Analysis:
    """What is known about an analysis: `function(model, *, options) -> Report`.

    `validate(**options)` raises BadInput for options that no model could satisfy, so that a typo is
    told before a large model is loaded.
    """

    name: str
    function: Callable
    source: str
    example: str
    figure: str
    validate: Callable[..., None]


ANALYSES: dict[str, Analysis] = {}


def analysis(
    *, name: str, source: str, example: str, figure: str, validate: Callable[..., None]
) -> Callable[[F], F]:
    """Register a function as an analysis and return it unchanged."""

    def register(function: F) -> F:
        ANALYSES[name] = Analysis(name, function, source, example, figure, validate)
        return function

    return register
