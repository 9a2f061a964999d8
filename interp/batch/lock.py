"""One driver a folder: the lock is the operating system's, so it ends with the process that holds it."""

from __future__ import annotations

import datetime
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from interp.errors import BadInput
from interp.run.files import write_atomically

LOCK, OWNER = ".lock", ".lock-owner.json"


@contextmanager
def locked(folder: Path) -> Iterator[dict[str, Any] | None]:
    """Hold the folder's lock; gives the owner of a lock that was left behind by a process that is gone.

    Raises:
        BadInput: another process holds it; says which, on which host, since when.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        owner = _owner(folder) or {}
        raise BadInput(
            f"{folder} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')} "
            f"since {owner.get('since', '?')}; wait for it, end it, or give another folder with --out"
        ) from error
    try:
        left = _owner(folder)
        mine = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        write_atomically(folder / OWNER, json.dumps(mine).encode())
        yield left
    finally:
        (folder / OWNER).unlink(missing_ok=True)
        lock.release()


def _owner(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
