"""Inputs that a user gives as an example, where none can be made up: what of them is no tensor is copied.

A forward may take an object with a state of its own, such as the session of a video tracker, which remembers the
frames that it has seen. Every forward gets a copy of it, so that all see the same state and the user's stays as it is.
"""

from __future__ import annotations

import io
import pickle
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from interp.errors import BadInput


def give(name: str = "name of an input") -> str:
    """What to do where nothing can be made up as this input with which a forward works."""
    return f"give an example in Python, interp.load(model, example={{'{name}': …}})"


def told(error: BaseException) -> str:
    """A failure in a line: of a KeyError its text is the key alone."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def all_in_float64(name: str, x: Any) -> Any:
    """A copy of an input that is no tensor with every float tensor in it, and every dtype it names, in float64.

    Raises:
        BadInput: it cannot be taken apart, which pickle does.
    """
    held: list[Any] = []

    class Apart(pickle.Pickler):
        def persistent_id(self, obj: Any) -> int | None:
            if isinstance(obj, Tensor):
                held.append(obj.detach().double() if obj.is_floating_point() else obj.detach())
            elif isinstance(obj, torch.dtype):
                held.append(torch.float64 if obj.is_floating_point else obj)
            else:
                return None
            return len(held) - 1

    class Together(pickle.Unpickler):
        def persistent_load(self, pid: int) -> Any:
            return held[pid]

    file = io.BytesIO()
    try:
        Apart(file).dump(x)
    except Exception as error:
        raise BadInput(
            f"'{name}' is a {type(x).__name__} of which no copy in float64 can be made: {error}"
        ) from error
    return Together(io.BytesIO(file.getvalue())).load()


def fresh(name: str, x: Any) -> Any:
    """A copy of an input that is no tensor: a forward may change the state of what it is given.

    Raises:
        BadInput: it cannot be copied.
    """
    try:
        return deepcopy(x)
    except Exception as error:
        raise BadInput(
            f"'{name}' is a {type(x).__name__} that cannot be copied, and every forward takes a copy: {error}. Tensors "
            "in it must have no graph: run what fills it under torch.no_grad()"
        ) from error
