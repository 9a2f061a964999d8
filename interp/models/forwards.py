"""Functions in place of modules' own `forward`, and blocks whose `forward` a model calls itself.

What calls `block.forward(…)` and not `block(…)` passes the block's hooks by. While such a model runs, that
call is made a call of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

called: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
"""By model, the blocks whose `forward` it calls itself, as its probe finds."""


@contextmanager
def other_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, calling one of these modules calls what is given for it; its hooks stay."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own


def find_called(model: nn.Module, run: Callable[[], Any], seen: Container[str]) -> bool:
    """Whether `run` calls the `forward` of members of lists past their hooks, which have not `seen` them.

    They are noted: `hooks_called` makes their hooks be called from then on.
    """
    lists = [(name, x) for name, x in model.named_modules() if isinstance(x, nn.ModuleList)]
    left = {
        part
        for name, members in lists
        for i, part in enumerate(members)
        if part is not None
        and f"{name}.{i}" not in seen
        and type(part).forward is not nn.Module.forward
    }
    found: WeakSet[nn.Module] = WeakSet()

    def note(part: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found.add(part)
        return forward(*args, **kwargs)

    if left:
        with other_forwards({part: partial(note, part, part.forward) for part in left}):
            run()
    if found:
        called[model] = found
    return bool(found)


@contextmanager
def hooks_called(model: nn.Module) -> Iterator[None]:
    """Inside, where `model` calls the `forward` of a block it calls the block, with its hooks."""
    entered: set[nn.Module] = set()

    def call(part: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if part in entered:  # by the block's own call, behind its hooks
            entered.discard(part)
            return forward(*args, **kwargs)
        return part(*args, **kwargs)

    parts = list(called.get(model, ()))
    hooks = [part.register_forward_pre_hook(lambda part, args: entered.add(part)) for part in parts]
    try:
        with other_forwards({part: partial(call, part, part.forward) for part in parts}):
            yield
    finally:
        for hook in hooks:
            hook.remove()
