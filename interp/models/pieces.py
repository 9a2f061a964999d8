"""Attention whose pattern lies in pieces, blocks of keys or a band of them: shown over all pairs of positions.

Some modules let a query see few keys and keep scores and pattern in a shape of their own: blocks of rows, each
with its own, the neighbouring and global blocks of keys, or a band along the diagonal. Which query and which
key an entry of it belongs to is read off derivatives. z is linear in the pattern and in the values: where the
values are numbers of their rows, the derivative of z by an entry of the pattern is the number of the key whose
value it is multiplied with. Nothing else about how the module computes is known, or needs to be.

A module is run by itself first, for its attention to be looked at, and then once more, with what was changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.layout import require_between_seen
from interp.models.pairs import pairs, rows_of
from interp.models.pooling import Pooling
from interp.models.spec import first_tensor, with_first
from interp.models.tape import Step, Tape

if TYPE_CHECKING:
    from interp.models.attention import Watch

CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""How far products may be from those of the module, relative to their size: roundings of one product."""


@dataclass(frozen=True)
class Pieces:
    """Which calls of a module make its attention: its softmaxes and its linear layers, counted from the first.

    `k` and `v` are of the positions, then of keys that are no position's. `reader` reads z, and where there is none
    the module returns it. `q` and `k` are () where the scores are not made of the stream through them alone.
    `turned`: whether q, k and v, and whether z, have positions before rows of the batch. `empty`: keys and values
    of which the probe had none. `calls`: the softmaxes and linear layers, in the order of their calls.
    `columns`: where one layer makes more than one of q, k and v, those that are "v", and "q" and "k" if they are known;
    `pooling`: what makes queries of several positions each of the former.
    """

    softmax: int
    reader: int | None
    v: tuple[int, ...]
    n_heads: int
    turned: tuple[bool, bool]
    q: tuple[int, ...] = ()
    k: tuple[int, ...] = ()
    empty: tuple[int, ...] = ()
    calls: tuple[str, ...] = ()
    columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    pooling: Pooling | None = None

    def made_by(self, role: str) -> tuple[int, ...]:
        """The linear layers of "q", "k" or "v"."""
        return {"q": self.q, "k": self.k, "v": self.v}[role]


pieces: WeakKeyDictionary[nn.Module, Pieces] = WeakKeyDictionary()
"""Modules whose pattern lies in pieces, as their probe finds."""


@dataclass
class Substitutes:
    """What calls of a module return or read instead, by their numbers; and the tape of a run with them."""

    linear: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    pattern: dict[int, Tensor] = field(default_factory=dict)
    read: dict[int, Tensor] = field(default_factory=dict)
    returned: Tensor | None = None

    def run(
        self, forward: Callable[..., Any], args: tuple, kwargs: dict
    ) -> tuple[Tape, Any, list[Tensor]]:
        """What the module computes with these: its calls, what it returns, and what its linear layers do."""
        counts, made = {"linear": -1, "softmax": -1}, list[Tensor]()

        def attended(tape: Tape, name: str, function: Any, args: tuple, kwargs: dict) -> Any:
            if name not in counts:
                return function(*args, **kwargs)
            counts[name] += 1
            number = counts[name]
            if name == "linear":
                if number in self.read:
                    args = (self.read[number], *args[1:])
                made.append(
                    self.linear[number] if number in self.linear else function(*args, **kwargs)
                )
                return made[-1].clone()  # the module may go on to change it in place
            if number in self.pattern:
                return self.pattern[number]
            x = self.scores.get(number)
            return (
                function(*args, **kwargs) if x is None else _softmax_of(x, function, args, kwargs)
            )

        tape = Tape(attended)
        with tape:
            out = forward(*args, **kwargs)
        return tape, out if self.returned is None else with_first(out, self.returned), made


def _softmax_of(x: Tensor, function: Any, args: tuple, kwargs: dict) -> Tensor:
    if args:
        return function(x, *args[1:], **kwargs)
    return function(**{**kwargs, "input": x})


@dataclass(frozen=True)
class Seen:
    """One run of a module: the calls that `of` names, and the z they make."""

    tape: Tape
    out: Any
    made: list[Tensor]
    of: Pieces

    @property
    def linears(self) -> list[Step]:
        return [step for step in self.tape.steps if step.name == "linear"]

    @property
    def softmax(self) -> Step:
        return [step for step in self.tape.steps if step.name == "softmax"][self.of.softmax]

    @property
    def weights(self) -> Tensor:
        """What the softmax returned."""
        return self.softmax.outputs[0]

    @property
    def scores(self) -> Tensor:
        """What the softmax was given."""
        softmax = self.softmax
        return softmax.args[0] if softmax.args else softmax.kwargs["input"]

    @property
    def z(self) -> tuple[Tensor, Step | None]:
        """z as the module has it, and the step that made it."""
        if self.of.reader is None:
            x = first_tensor(self.out)
            assert x is not None
            return x, self.tape.latest.get(id(x))
        reader = self.linears[self.of.reader]
        return reader.args[0], reader.made_by.get(id(reader.args[0]))

    @property
    def width(self) -> int:
        """Channels of z, of all heads: they may have an axis of their own."""
        return self.z[0].shape[2:].numel()

    @property
    def n_queries(self) -> int:
        """Positions that z has: fewer than v has where queries are pooled."""
        return rows_of(self.z[0], self.of.turned[1])[1]

    def shown(self, number: int, role: str = "v") -> Tensor:
        """[batch heads pos d_head] of what a linear layer returned, or of its columns that play this role."""
        x = self.made[number]
        if columns := self.of.columns.get(role):
            x = x[..., list(columns)]
        if role == "q" and self.of.pooling is not None:
            x = self.of.pooling(x)
        return by_head(x, self.of.turned[0], self.of.n_heads)

    def held(self, x: Tensor, role: str, made: Tensor) -> Tensor:
        """The inverse: what a linear layer is to return, that else would return `made`."""
        x = as_held(x, self.of.turned[0])
        if role == "q" and self.of.pooling is not None:
            x = self.of.pooling.alike(x)
        columns = self.of.columns.get(role)
        if not columns:
            return x
        whole = made.clone()
        whole[..., list(columns)] = x
        return whole

    def joined(self, role: str) -> Tensor:
        """The same of all layers that play a role, one behind the other."""
        return torch.cat([self.shown(number, role) for number in self.of.made_by(role)], 2)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v; q and k of no width where the scores are not made of them alone."""
        v = self.joined("v")
        if not self.of.q:
            return v[:, :, : self.n_queries, :0], v[..., :0], v
        return self.joined("q"), self.joined("k"), v

    def spread(
        self, x: Tensor, at: Int[Tensor, "..."], fill: float
    ) -> Float[Tensor, "batch heads query key"]:
        """Entries over all pairs of positions, `fill` where a query has no entry for a key."""
        there, v = at >= 0, self.joined("v")
        shape = (*v.shape[:2], self.n_queries, v.shape[2])
        whole = x.new_full((torch.Size(shape).numel(),), fill)
        return whole.index_put((at[there],), x[there]).reshape(shape)


def by_head(x: Tensor, turned: bool, n_heads: int) -> Tensor:
    """[batch heads pos d_head] of [batch pos width], or of [pos batch width]."""
    x = x.transpose(0, 1) if turned else x
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def as_held(x: Tensor, turned: bool) -> Tensor:
    """The inverse."""
    x = x.transpose(1, 2).flatten(2)
    return (x.transpose(0, 1) if turned else x).contiguous()


# --- a run that is watched ---------------------------------------------------------------------------


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
    z, _ = seen.z
    shown = by_head(z.flatten(2), of.turned[1], of.n_heads).transpose(1, 2)
    changed = watch.z(shown)
    if _changed(changed, shown):
        held = as_held(changed.transpose(1, 2), of.turned[1]).reshape(z.shape)
        if of.reader is None:
            new.returned = held
        else:
            new.read[of.reader] = held
    return new.run(forward, args, kwargs)[1]


def _show_rows(watch: Watch, seen: Seen, new: Substitutes, looked_at: Callable[[], Seen]) -> Seen:
    """Scores and pattern over all pairs of positions; the run with what was changed."""
    found, number = pairs(seen), seen.of.softmax
    if found is None or not once(at := found[0]) or not is_product(seen, at):
        raise Refused(
            "which queries and keys the entries of the pattern belong to was not found on inputs of this "
            "kind (some keys may stand in it twice); q, k, v and z still work"
        )
    whole = seen.spread(seen.scores, at, -torch.inf)
    scores = watch.scores(whole, 0)
    if _changed(scores, whole):
        new.scores[number] = taken = gathered(scores, at, seen.scores)
        require_between_seen(scores, seen.spread(taken, at, -torch.inf), "scores")
        seen = looked_at()
    whole = seen.spread(seen.weights, at, 0.0)
    pattern = watch.pattern(whole, 0)
    if _changed(pattern, whole):
        new.pattern[number] = taken = gathered(pattern, at, seen.weights)
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
    z, v = seen.z[0].detach(), seen.joined("v").detach().double()
    pattern = seen.spread(seen.weights.detach(), at, 0.0).double()
    wanted = by_head(z.flatten(2), seen.of.turned[1], seen.of.n_heads).double()
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
