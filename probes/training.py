"""What training keeps on disk: one file with its tensors, and the key that says what they were made with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from interp.errors import BadInput, InterpError
from interp.run.files import write_atomically


class Diverged(InterpError):
    """Training gave a loss that is not a number; the last good checkpoint was kept."""


def write_state(
    path: Path, tensors: Mapping[str, Tensor], key: Mapping[str, Any], **about: str
) -> None:
    """Write tensors, their key and words about them as one file, whole or not at all."""
    plain = {name: value.contiguous() for name, value in tensors.items()}
    write_atomically(path, save(plain, {"key": json.dumps(key, default=str), **about}))


def read_state(path: Path, key: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, words) of a file that was written with this key.

    Raises:
        BadInput: a damaged file, or one of another key (says what differs).
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            # Copies: what lies unaligned in the file may add in another order.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        found = json.loads(about["key"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise BadInput(
            f"checkpoint {path} is damaged: {error}; train again without resume"
        ) from error
    wanted = json.loads(json.dumps(key, default=str))
    if found != wanted:
        raise BadInput(
            f"cannot resume from {path}: {_difference(found, wanted)}; give the same data and "
            "options, or leave out resume to start anew"
        )
    return tensors, about


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first entry in which two keys differ."""
    for part in sorted({*found, *wanted}):
        mine, theirs = wanted.get(part), found.get(part)
        if mine == theirs:
            continue
        if isinstance(mine, dict) and isinstance(theirs, dict):
            return _difference(theirs, mine)
        return f"it was made with {part}={theirs!r}, now {mine!r}"
    return "it was made by another version"
