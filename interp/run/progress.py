"""Progress bars for long work, in a terminal and in a notebook; silent elsewhere.

A notebook gets one output of plain HTML that is updated in place. (Rich's bars need ipywidgets in the
kernel, in the server and in whatever shows the file later, and show nothing where one has not got it.)
"""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

SECONDS_BETWEEN = 0.25
"""A notebook's output is sent again at most this often: every sending is a message to the browser."""
STAGES_SHOWN = 12
"""The last so many: long trainings have one for every epoch, and a notebook's output does not scroll by."""


class Progress:
    """A stack of named stages, each with a bar.

    >>> with Progress(False) as bars:
    ...     advance = bars.stage("Counting", 2)
    ...     advance(1)
    """

    def __init__(self, show: bool | None = None):
        if show is not False and in_notebook():
            self._bars = _NotebookBars()
        else:
            self._bars = _TerminalBars(show)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def stage(self, name: str, total: int) -> Callable[[int], None]:
        """Start a stage of `total` steps; call what is returned with the steps just done."""
        return self._bars.stage(name, total)


def in_notebook() -> bool:
    """Whether a Jupyter kernel (JupyterLab, VS Code, Colab, nbconvert) runs this process.

    >>> in_notebook()
    False
    """
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


class _TerminalBars:
    """Rich's bars, on stderr."""

    def __init__(self, show: bool | None):
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        shown = console.is_terminal if show is None else show
        self._bars = Bars(*columns, console=console, disable=not shown)
        self.start, self.stop = self._bars.start, self._bars.stop

    def stage(self, name: str, total: int) -> Callable[[int], None]:
        task = self._bars.add_task(name, total=total)
        return lambda done: self._bars.advance(task, done)


@dataclass
class _Stage:
    name: str
    total: int
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def told(self) -> str:
        """Steps done, time taken, and what is left at this pace."""
        text = f"{self.done}/{self.total}  {_clock(self.seconds)}"
        if 0 < self.done < self.total:
            text += f"  {_clock(self.seconds / self.done * (self.total - self.done))} left"
        return text


class _NotebookBars:
    """One output, updated in place, that any notebook shows without a widget, as does the saved file."""

    def __init__(self) -> None:
        self._stages: list[_Stage] = []
        self._output: Any = None
        self._sent = 0.0

    def start(self) -> None:
        """Nothing is shown before the first stage."""

    def stop(self) -> None:
        if self._stages:
            self._send()

    def stage(self, name: str, total: int) -> Callable[[int], None]:
        stage = _Stage(name, total)
        self._stages.append(stage)
        self._send()

        def advance(done: int) -> None:
            stage.done += done
            stage.seconds = time.monotonic() - stage.started
            if time.monotonic() - self._sent >= SECONDS_BETWEEN:
                self._send()

        return advance

    def _send(self) -> None:
        from IPython.display import display

        data = {"text/plain": self._text(), "text/html": self._html()}
        if self._output is None:
            self._output = display(data, raw=True, display_id=True)
        else:
            self._output.update(data, raw=True)
        self._sent = time.monotonic()

    def _earlier(self) -> list[str]:
        """What is said of the stages that are not shown."""
        hidden = len(self._stages) - STAGES_SHOWN
        return [f"{hidden} earlier"] if hidden > 0 else []

    def _text(self) -> str:
        shown = self._stages[-STAGES_SHOWN:]
        return "\n".join([*self._earlier(), *(f"{stage.name}  {stage.told()}" for stage in shown)])

    def _html(self) -> str:
        rows = "".join(f"<span>{text}</span><span></span><span></span>" for text in self._earlier())
        rows += "".join(
            f"<span>{html.escape(stage.name)}</span>"
            f'<progress value="{stage.done}" max="{max(stage.total, 1)}"></progress>'
            f"<span>{stage.told()}</span>"
            for stage in self._stages[-STAGES_SHOWN:]
        )
        return (
            '<div style="display:grid;grid-template-columns:max-content 12em max-content;'
            f'gap:0 1em;align-items:center;white-space:pre">{rows}</div>'
        )


def _clock(seconds: float) -> str:
    """Minutes and seconds.

    >>> _clock(75)
    '1:15'
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
