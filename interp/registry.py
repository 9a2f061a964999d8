"""Every analysis, as the command line, the docs and the contract tests find it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

F = TypeVar("F", bound=Callable)


@dataclass(frozen=True)
class Analysis:
    """What is known about an analysis: `function(model, *, options) -> Report`."""

    name: str
    function: Callable
    source: str
    example: str
    figure: str


ANALYSES: dict[str, Analysis] = {}


def analysis(*, name: str, source: str, example: str, figure: str) -> Callable[[F], F]:
    """Register a function as an analysis and return it unchanged."""

    def register(function: F) -> F:
        ANALYSES[name] = Analysis(name, function, source, example, figure)
        return function

    return register
