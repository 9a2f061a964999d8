"""What a worker does: keeps one model, runs a unit on it, and hands back the files of its report.

A worker writes nothing into the plan's folder; the driver does.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import os
import socket
import tempfile
import time
import traceback
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.batch.unit import Unit
from interp.errors import InterpError
from interp.registry import ANALYSES

if TYPE_CHECKING:
    from interp.models.model import Model


@dataclass(frozen=True)
class Outcome:
    """How a unit ended: the files of its report, or the error.

    Attributes:
        error: "Type: message", or None. trace: the traceback of the error.
        attempts: times the unit was begun; more than one where workers died of it or beside it.
    """

    unit: Unit
    files: Mapping[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0
    worker: str = ""
    error: str | None = None
    trace: str = ""
    attempts: int = 1


_resident: dict[str, Model] = {}
"""The model of the last unit, by what it was loaded from; one at most."""


def perform(unit: Unit) -> Outcome:
    """Run a unit; whatever it raises is its outcome, so that the other units go on."""
    started = time.perf_counter()
    worker = f"{socket.gethostname()}:{os.getpid()}"
    try:
        files = _files(unit)
    except Exception as error:  # noqa: BLE001 - an analysis may raise anything; it is reported
        message = str(error).strip().splitlines()
        shown = f"{type(error).__name__}: {message[0] if message else ''}".rstrip(": ")
        if not isinstance(error, InterpError):  # out of memory, or hooks may be left behind
            forget()
        trace = traceback.format_exc()
        return Outcome(unit, {}, time.perf_counter() - started, worker, shown, trace)
    return Outcome(unit, files, time.perf_counter() - started, worker)


def forget() -> None:
    """Let the resident model go."""
    left = [weakref.ref(model.module) for model in _resident.values()]
    _resident.clear()
    if any(module() is not None for module in left):  # a look at all objects takes a quarter second
        gc.collect()


def _files(unit: Unit) -> dict[str, bytes]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(unit.threads)
    try:
        with tempfile.TemporaryDirectory(prefix="interp-unit-") as folder:
            return _report_files(unit, Path(folder))
    finally:
        torch.set_num_threads(before)


def _report_files(unit: Unit, folder: Path) -> dict[str, bytes]:
    importlib.import_module(unit.module)
    function = ANALYSES[unit.analysis].function
    known = inspect.signature(function).parameters
    ours: dict[str, Any] = {"progress": False, "out": folder}
    given = {name: value for name, value in ours.items() if name in known}
    report = function(_model(unit), **unit.arguments, **given)
    report.meta["unit"] = unit.id
    beside = {  # an analysis with an `out` writes its own files there: a lens, an autoencoder
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return {**beside, **report.files(page=unit.page)}


def _model(unit: Unit) -> Model:
    """The unit's model: the resident one, or loaded after that was let go."""
    from interp.open import load

    key = unit.source.key + unit.source.sha256
    if key not in _resident:
        forget()
        _resident[key] = load(unit.source.given, **unit.source.loading)
    return _resident[key]
