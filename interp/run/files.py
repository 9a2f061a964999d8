"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from interp.errors import BadInput, SaveFailed


def read_utf8(path: Path) -> str:
    """The text of a file; BadInput where it is no UTF-8, with the place."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"'{path}' is no UTF-8 text (byte {error.start}): save it as UTF-8, such as with "
            "iconv -f latin1 -t utf-8"
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there; on failure leave what was there before.

    Raises:
        SaveFailed: the folder cannot be written, or the disk is full.
    """
    write_together(path.parent, {path.name: content})


def write_together(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files or none: each goes beside its place first, and all are moved at the end.

    Moving needs no space, so a full disk is met before anything is replaced.
    """
    written: list[tuple[str, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            written.append((temporary, folder / name))
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
        for temporary, path in written:
            os.replace(temporary, path)
    except OSError as error:
        raise SaveFailed(
            f"cannot write to {folder}: {error.strerror}; free some space or choose another folder"
        ) from error
    finally:
        for temporary, _ in written:
            Path(temporary).unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise SaveFailed now if nothing could be written to `folder` later; makes the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SaveFailed(
            f"cannot write to {folder}: {error.strerror}; choose another folder with --out"
        ) from error
