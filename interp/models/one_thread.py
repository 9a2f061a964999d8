"""One thread at a time looks into a module: hooks that one puts on it would act in the forward of another."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, get_ident

from torch import nn

_inside: list[tuple[int, nn.Module]] = []
"""Each thread that looks into a module, and that module; a thread may be there several times."""
_left = Condition()
PATIENCE = 20.0
"""Seconds after which it is told what a thread waits for: for good, if the other one waits for it."""
_log = logging.getLogger("interp")


@contextmanager
def one_thread(module: nn.Module) -> Iterator[None]:
    """Inside, no other thread is inside with a module that shares a part with this one: it waits until then."""
    mine = get_ident(), module

    def free() -> bool:
        return all(thread == mine[0] or _apart(module, other) for thread, other in _inside)

    with _left:
        if not _left.wait_for(free, PATIENCE):
            _log.warning(
                "a thread waits until another one is done with %s: it has a run or hooks of it open, and should close "
                "them before it waits for this one",
                type(module).__name__,
            )
            _left.wait_for(free)
        _inside.append(mine)
    try:
        yield
    finally:
        with _left:
            _inside.remove(mine)
            _left.notify_all()


def _apart(a: nn.Module, b: nn.Module) -> bool:
    return set(a.modules()).isdisjoint(b.modules())
