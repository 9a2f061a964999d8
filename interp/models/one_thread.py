"""One thread at a time looks into a module: hooks that one puts on it would act in the forward of another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, get_ident

from torch import nn

_inside: list[tuple[int, frozenset[int]]] = []
"""The threads that look into a module, each with the ids of its parts; a thread may be there several times."""
_left = Condition()


@contextmanager
def one_thread(module: nn.Module) -> Iterator[None]:
    """Inside, no other thread is inside with a module that shares a part with this one: it waits until then."""
    me = get_ident(), frozenset(map(id, module.modules()))

    def free() -> bool:
        return all(thread == me[0] or parts.isdisjoint(me[1]) for thread, parts in _inside)

    with _left:
        _left.wait_for(free)
        _inside.append(me)
    try:
        yield
    finally:
        with _left:
            _inside.remove(me)
            _left.notify_all()
