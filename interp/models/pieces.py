"""Attention whose pattern lies in pieces, blocks of keys or a band of them: shown over all pairs of positions.

Some modules let a query see few keys and keep scores and pattern in a shape of their own: blocks of rows, each
with its own, the neighbouring and global blocks of keys, or a band along the diagonal. Which query and which
key an entry of it belongs to is read off derivatives. z is linear in the pattern and in the values: where the
values are numbers of their rows, the derivative of z by an entry of the pattern is the number of the key whose
value it is multiplied with. Nothing else about how the module computes is known, or needs to be.

A module is run by itself first, for its attention to be looked at, and then once more, with what was changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.layout import require_between_seen
from interp.models.pairs import pairs
from interp.models.pieces_seen import Pieces, Seen, Substitutes, as_held, by_head
from interp.models.tape import Tape

if TYPE_CHECKING:
    from interp.models.attention import Watch

CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""How far products may be from those of the module, relative to their size: roundings of one product."""


pieces: WeakKeyDictionary[nn.Module, Pieces] = WeakKeyDictionary()
"""Modules whose pattern lies in pieces, as their probe finds."""


def watched(
    module: nn.Module,
    forward: Callable[..., Any],
    watch_of: Callable[[nn.Module], Watch],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What the module returns, its attention shown to a watch and what that changes put in place."""
    watch, of = watch_of(module), pieces[module]
    new = Substitutes()

    def looked_at() -> Seen:
        with without_hooks(module):
            seen = Seen(*new.run(forward, args, kwargs), of)
        _check(module, seen)
        return seen

    seen = looked_at()
    given = seen.inputs()
    for role, x, y in zip("qkv", given, watch.inputs(*given), strict=True):
        numbers = of.made_by(role)
        if numbers and _changed(y, x):
            parts = y.split([seen.shown(number, role).shape[2] for number in numbers], 2)
            for number, part in zip(numbers, parts, strict=True):
                made = new.linear.get(number, seen.made[number])
                new.linear[number] = seen.held(part, role, made)
    seen = looked_at() if new.linear else seen
    if watch.needs_rows:
        seen = _show_rows(watch, seen, new, looked_at)
    shown = by_head(seen.z, of.turned[1], of.n_heads).transpose(1, 2)
    changed = watch.z(shown)
    if _changed(changed, shown):
        for reader, held in seen.by_reader(as_held(changed.transpose(1, 2), of.turned[1])).items():
            if reader is None:
                new.returned = held
            else:
                new.read[reader] = held
    return new.run(forward, args, kwargs)[1]


def _show_rows(watch: Watch, seen: Seen, new: Substitutes, looked_at: Callable[[], Seen]) -> Seen:
    """Scores and pattern over all pairs of positions; the run with what was changed."""
    found = pairs(seen)
    if found is None or not once(at := found[0]) or not is_product(seen, at):
        raise Refused(
            "which queries and keys the entries of the pattern belong to was not found on inputs of this "
            "kind (some keys may stand in it twice); q, k, v and z still work"
        )
    whole = seen.spread(seen.scores, at, -torch.inf)
    scores = watch.scores(whole, 0)
    if _changed(scores, whole):
        taken = gathered(scores, at, seen.scores)
        new.scores |= seen.by_softmax(taken)
        require_between_seen(scores, seen.spread(taken, at, -torch.inf), "scores")
        seen = looked_at()
    whole = seen.spread(seen.weights, at, 0.0)
    pattern = watch.pattern(whole, 0)
    if _changed(pattern, whole):
        taken = gathered(pattern, at, seen.weights)
        new.pattern |= seen.by_softmax(taken)
        require_between_seen(pattern, seen.spread(taken, at, 0.0), "a pattern")
        seen = looked_at()
    return seen


def _changed(new: Tensor, shown: Tensor) -> bool:
    """Whether what a watch was shown does not go on as it was: with gradients it goes through what was shown."""
    return new is not shown or torch.is_grad_enabled()


def gathered(whole: Tensor, at: Int[Tensor, "..."], before: Tensor) -> Tensor:
    """The inverse; what belongs to no pair stays as it was."""
    return torch.where(at >= 0, whole.flatten()[at.clamp_min(0)].to(before), before)


def once(at: Tensor) -> bool:
    there = at[at >= 0]
    return len(there) == len(there.unique())


def _check(module: nn.Module, seen: Seen) -> None:
    """Raise where a module did not make the calls it made on the probe: other numbers are other calls."""
    filled = any(seen.made[number].numel() for number in seen.of.empty)
    if filled or calls_of(seen.tape) != seen.of.calls:  # an edit would be left out without a word
        raise Refused(
            f"{type(module).__name__} did not attend as it did on the probe: on inputs of this kind "
            "(with global tokens, perhaps) it computes attention in another way"
        )


def calls_of(tape: Tape) -> tuple[str, ...]:
    return tuple(step.name for step in tape.steps if step.name in ("linear", "softmax"))


def is_product(seen: Seen, at: Tensor) -> bool:
    """Whether z is the pattern over all pairs of positions times v."""
    z, v = seen.z.detach(), seen.joined("v").detach().double()
    pattern = seen.spread(seen.weights.detach(), at, 0.0).double()
    wanted = by_head(z, seen.of.turned[1], seen.of.n_heads).double()
    return close(pattern @ v, wanted, CLOSE.get(z.dtype, CLOSE[torch.bfloat16]))


def is_whole(seen: Seen, at: Tensor) -> bool:
    """Whether no weight is left out of a row, but for rows that are left out all.

    (Rows of padding that see nothing may attend to what is no key at all.)
    """
    sums = seen.spread(seen.weights, at, 0.0).double().sum(-1)
    error = (sums - (sums > 0.5).double()).abs().max()
    return bool(error <= CLOSE.get(seen.weights.dtype, CLOSE[torch.bfloat16]))


def close(got: Tensor, wanted: Tensor, eps: float) -> bool:
    return bool((got - wanted).abs().max() <= eps * wanted.abs().max())


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Inside, no hook of a part of this module is called."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    parts = [part for part in module.modules() if part is not module]
    before = [{name: getattr(part, name) for name in names} for part in parts]
    try:
        for part, hooks in zip(parts, before, strict=True):
            part.__dict__.update({name: type(of)() for name, of in hooks.items()})
        yield
    finally:
        for part, hooks in zip(parts, before, strict=True):
            part.__dict__.update(hooks)
