"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from interp.errors import SaveFailed


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there; on failure leave what was there before.

    Raises:
        SaveFailed: the folder cannot be written, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise SaveFailed(f"cannot write {path}: {error.strerror}; choose another folder") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SaveFailed(f"cannot write {path}: {error.strerror}; free some space or choose another folder") from error
        raise


def check_writable(folder: Path) -> None:
    """Raise SaveFailed now if nothing could be written to `folder` later; makes the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SaveFailed(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from error
