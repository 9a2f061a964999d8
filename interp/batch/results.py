"""A unit's result on disk: a folder that appears whole, once, with a checksum of every file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from interp.batch.arguments import file_sha256
from interp.errors import SaveFailed

MANIFEST = "manifest.json"
INCOMING = ".incoming-"
State = Literal["finished", "missing", "damaged"]


def state_of(folder: Path) -> State:
    """Whether a unit's result is there, and every byte of it as it was written."""
    if not folder.exists():
        return "missing"
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        sound = all(file_sha256(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound = False
    return "finished" if sound else "damaged"


def write_result(
    out: Path, place: Path, files: Mapping[str, bytes], record: Mapping[str, Any]
) -> None:
    """Write the files of a unit and their manifest, and move them into `out / place` as one folder.

    Only the driver that holds the plan's lock calls this, so a result is written once whoever made it.

    Raises:
        SaveFailed: the disk is full or the folder cannot be written; nothing half-written is left.
    """
    final = out / place
    fresh: Path | None = None
    try:
        fresh = Path(tempfile.mkdtemp(prefix=INCOMING, dir=out))
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        manifest = json.dumps({**record, "files": digests}, indent=1).encode()
        for name, content in {**files, MANIFEST: manifest}.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        fresh.chmod(0o755)
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():  # damaged: what is sound is never run again
            shutil.rmtree(final)
        os.rename(fresh, final)
    except OSError as error:
        raise SaveFailed(f"cannot write to {out}: {error.strerror}") from error
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)


def clear_incoming(out: Path) -> None:
    """Remove what a driver that was killed had begun to write."""
    for path in out.glob(f"{INCOMING}*"):
        shutil.rmtree(path, ignore_errors=True)
