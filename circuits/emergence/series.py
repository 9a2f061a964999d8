"""A series of checkpoints: folders `step-<n>` on disk, or revisions of a hub id, in order of training."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from circuits.emergence.clamping import Clamped, Clamps
from circuits.emergence.training import HELD_OUT, TRAINING
from interp.errors import BadInput
from interp.models.model import Model
from interp.open import load

STEP = re.compile(r"step[-_]?(\d+)")


@dataclass(frozen=True)
class CheckpointAt:
    """One checkpoint: what `interp.load` opens, and after how many steps it was kept."""

    source: str
    step: int
    revision: str | None = None

    @property
    def name(self) -> str:
        """The source, with its revision."""
        return self.source + (f"@{self.revision}" if self.revision else "")

    def fingerprint(self) -> list[Any]:
        """What tells that a folder's files changed, without reading the weights."""
        if self.revision is not None:
            return [self.name]
        files = sorted(path for path in Path(self.source).iterdir() if path.is_file())
        return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


@dataclass(frozen=True)
class Series:
    """Checkpoints of one training, steps strictly increasing.

    Attributes:
        name: how tables and figures call it. home: the folder of its checkpoints; None on the hub.
    """

    name: str
    checkpoints: tuple[CheckpointAt, ...]
    home: Path | None = None

    @property
    def held_out(self) -> str | None:
        """Text that came with the series, one row a line."""
        path = None if self.home is None else self.home / HELD_OUT
        return path.read_text(encoding="utf-8") if path is not None and path.is_file() else None

    def clamps(self) -> list[str]:
        """What was held while it was trained, as `training.json` tells."""
        path = None if self.home is None else self.home / TRAINING
        if path is None or not path.is_file():
            return []
        return json.loads(path.read_text())["options"]["clamps"]


def open_checkpoint(at: CheckpointAt, held: Clamps) -> Model:
    """The model, under the clamps that were held at its step."""
    model = load(at.source, revision=at.revision)
    return Clamped(model, held, at.step) if held.at(at.step) else model


def find_series(models: Sequence[str]) -> list[Series]:
    """The series that these names make up: a folder of `step-<n>` folders is one, as are checkpoints beside
    each other in one folder, and revisions of one hub id.

    Args:
        models: folders, folders of checkpoints, or `org/name@revision`.

    Raises:
        BadInput: no such folder or no step folder in it, no step in a name, steps that do not increase,
            fewer than two checkpoints.
    """
    found: dict[str, list[CheckpointAt]] = {}
    homes: dict[str, Path | None] = {}
    for text in [models] if isinstance(models, str) else models:
        for name, home, at in _checkpoints(str(text)):
            found.setdefault(name, []).append(at)
            homes[name] = home
    if not found:
        raise BadInput("no series was given: name a folder of step-<n> folders")
    for name, checkpoints in found.items():
        for before, after in pairwise(checkpoints):
            if after.step <= before.step:
                raise BadInput(
                    f"steps of {name} do not increase: {before.name} (step {before.step}) is followed by "
                    f"{after.name} (step {after.step}); give each checkpoint once, in order of training"
                )
        if len(checkpoints) < 2:
            raise BadInput(
                f"{name} has one checkpoint ({checkpoints[0].name}): a change needs at least two, and shows "
                "only between those that were kept"
            )
    short = _short_names(list(found))
    return [Series(short[name], tuple(found[name]), homes[name]) for name in found]


def _checkpoints(text: str) -> Iterator[tuple[str, Path | None, CheckpointAt]]:
    path = Path(text).expanduser()
    if path.is_dir():
        folders = [path]
        if not (path / "config.json").is_file():
            steps = [f for f in path.iterdir() if f.is_dir() and STEP.fullmatch(f.name)]
            folders = sorted(steps, key=lambda f: (_step(f.name), f.name))
        if not folders:
            raise BadInput(
                f"{text} has no step-<n> folders and is no checkpoint itself; wanted a series such as "
                f"`python -m circuits.emergence.training --out {text}` leaves"
            )
        for folder in folders:
            home = folder.resolve().parent
            yield str(home), home, CheckpointAt(str(folder), _step(folder.name))
        return
    source, at, revision = text.rpartition("@")
    if not at:
        if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
            raise BadInput(f"no folder '{text}': give a folder of step-<n> folders")
        raise BadInput(
            f"no folder '{text}' here: give a folder of step-<n> folders; of a hub id, its revisions, such as "
            f"{text}@step1000"
        )
    yield source, None, CheckpointAt(source, _step(revision), revision)


def _step(name: str) -> int:
    found = STEP.search(name)
    if found is None:
        raise BadInput(f"'{name}' names no step: wanted a name such as step-1000 or step1000")
    return int(found[1])


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """The last part of each name; the whole where that is not unique."""
    last = [name.rsplit("/", 1)[-1] for name in names]
    return {n: s if last.count(s) == 1 else n for n, s in zip(names, last, strict=True)}
