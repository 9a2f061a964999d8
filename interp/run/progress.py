"""Progress bars for long work, in a terminal and in a notebook; silent elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars


class Progress:
    """A stack of named stages, each with a bar.

    >>> with Progress(False) as bars:
    ...     advance = bars.stage("Counting", 2)
    ...     advance(1)
    """

    def __init__(self, show: bool | None = None):
        console = Console(stderr=True)
        show = console.is_terminal or "ipykernel" in sys.modules if show is None else show
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Bars(*columns, console=console, disable=not show)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def stage(self, name: str, total: int) -> Callable[[int], None]:
        """Start a stage of `total` steps; call what is returned with the steps just done."""
        task = self._bars.add_task(name, total=total)
        return lambda done: self._bars.advance(task, done)
