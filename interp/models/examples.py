"""Inputs that a user gives as an example, where none can be made up: what of them is no tensor is copied.

A forward may take an object with a state of its own, such as the session of a video tracker, which remembers the
frames that it has seen. Every forward gets a copy of it, so that all see the same state and the user's stays as it is.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from interp.errors import BadInput

GIVE = "give an example in Python, interp.load(model, example={'name of an input': …})"
"""What to do where no input can be made up with which a forward works."""


def told(error: BaseException) -> str:
    """A failure in a line: of a KeyError its text is the key alone."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


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
