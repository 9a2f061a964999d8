"""Finished units of a long computation, kept on disk so that a rerun does not repeat them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from interp.errors import BadInput
from interp.run.files import write_atomically

KEY_FILE = "key.json"


class Checkpoint:
    """A folder of named results of one computation; without a folder, nothing is kept.

    Args:
        folder: where units are written, each at once and whole.
        key: everything the results depend on. Units of another key are never read.
        resume: go on from units found there; otherwise they are removed first.

    >>> unit = Checkpoint().compute("double", lambda: {"x": np.arange(3) * 2})
    >>> unit["x"].tolist()
    [0, 2, 4]
    """

    def __init__(
        self,
        folder: Path | None = None,
        key: Mapping[str, Any] | None = None,
        *,
        resume: bool = False,
    ):
        self.folder = folder
        self.prefix = ""
        if folder is None:
            return
        wanted = json.loads(json.dumps(key or {}, sort_keys=True, default=str))
        if resume and (folder / KEY_FILE).exists():
            found = json.loads((folder / KEY_FILE).read_text())
            if found != wanted:
                changed = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
                raise BadInput(
                    f"cannot resume from {folder}: it was made with {changed[0]}={found.get(changed[0])!r}, now "
                    f"{wanted.get(changed[0])!r}; give the same options, or leave out --resume to start anew"
                )
        elif folder.exists():
            if any(folder.iterdir()) and not (folder / KEY_FILE).exists():
                raise BadInput(
                    f"{folder} holds other files than finished units: give a new or empty folder"
                )
            shutil.rmtree(folder)
        write_atomically(folder / KEY_FILE, json.dumps(wanted, indent=1).encode())

    def part(self, name: str) -> Checkpoint:
        """The same folder for a part of the computation, its units named apart."""
        part = Checkpoint()
        part.folder, part.prefix = self.folder, f"{self.prefix}{name}."
        return part

    def compute(
        self, name: str, unit: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """The stored result called `name`, or `unit()`, stored."""
        if self.folder is None:
            return unit()
        digest = hashlib.sha256((self.prefix + name).encode()).hexdigest()[:16]
        path = self.folder / f"{digest}.safetensors"
        if path.exists():
            try:
                return load_file(path)
            except SafetensorError:  # a damaged unit is made again
                path.unlink()
        result = {key: np.ascontiguousarray(value) for key, value in unit().items()}
        write_atomically(path, save(result))
        return result
