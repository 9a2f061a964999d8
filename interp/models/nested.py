"""A pass inside another one of the same model: what both watch, the inner one sees as the outer one leaves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from interp.models.attention import Watch

Watching = Callable[[nn.Module], Watch]

_under_way: WeakKeyDictionary[nn.Module, Watching] = WeakKeyDictionary()
"""By model, what watches the attention of the pass that is under way."""


class Both(Watch):
    """Shows one attention call to two watches, to the second as the first leaves it."""

    def __init__(self, first: Watch, second: Watch):
        self.watches = first, second
        self.needs_rows = first.needs_rows or second.needs_rows
        self.at_once = first.at_once or second.at_once
        self.n_rows = max(first.n_rows, second.n_rows)

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for watch in self.watches:
            q, k, v = watch.inputs(q, k, v)
        return q, k, v

    def scores(self, scores: Tensor, start: int) -> Tensor:
        for watch in self.watches:
            scores = watch.scores(scores, start)
        return scores

    def pattern(self, pattern: Tensor, start: int) -> Tensor:
        for watch in self.watches:
            pattern = watch.pattern(pattern, start)
        return pattern

    def z(self, z: Tensor) -> Tensor:
        for watch in self.watches:
            z = watch.z(z)
        return z


@contextmanager
def inside_others(model: nn.Module, watching: Watching) -> Iterator[Watching]:
    """What watches the attention of a pass of `model` that would do so with `watching`, were it the only one."""
    outer = _under_way.get(model)

    def both(module: nn.Module) -> Watch:
        return watching(module) if outer is None else Both(outer(module), watching(module))

    _under_way[model] = both
    try:
        yield both
    finally:
        if outer is None:
            del _under_way[model]
        else:
            _under_way[model] = outer
