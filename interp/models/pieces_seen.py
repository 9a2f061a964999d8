"""One run of a module whose attention lies in pieces: the calls it makes, what they may make instead, and the z of it.

A module may have several softmaxes, each of queries of its own: what is seen of them lies one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.models.pairs import rows_of
from interp.models.pooling import Pooling
from interp.models.spec import first_tensor, with_first
from interp.models.tape import Step, Tape


@dataclass(frozen=True)
class Pieces:
    """Which calls of a module make its attention: its softmaxes and its linear layers, counted from the first.

    `k` and `v` are of the positions, then of keys that are no position's. `reader` reads z, and where there is none
    the module returns it. `q` and `k` are () where the scores are not made of the stream through them alone.
    `turned`: whether q, k and v, and whether z, have positions before rows of the batch. `empty`: keys and values
    of which the probe had none. `calls`: the softmaxes and linear layers, in the order of their calls.
    `more`: softmax and reader of further queries, where a module has several softmaxes: they stand behind the first's.
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
    more: tuple[tuple[int, int], ...] = ()

    def made_by(self, role: str) -> tuple[int, ...]:
        """The linear layers of "q", "k" or "v"."""
        return {"q": self.q, "k": self.k, "v": self.v}[role]


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
        """The first of them, where there are several."""
        return [step for step in self.tape.steps if step.name == "softmax"][self.of.softmax]

    @property
    def parts(self) -> list[Seen]:
        """The same with one softmax each."""
        each = [(self.of.softmax, self.of.reader), *self.of.more]
        return [
            replace(self, of=replace(self.of, softmax=softmax, reader=reader, more=()))
            for softmax, reader in each
        ]

    @property
    def weights(self) -> Tensor:
        """What the softmax returned; of several all entries, in one row."""
        if self.of.more:
            return torch.cat([part.weights.flatten() for part in self.parts])
        return self.softmax.outputs[0]

    @property
    def scores(self) -> Tensor:
        """What the softmax was given; of several all entries, in one row."""
        if self.of.more:
            return torch.cat([part.scores.flatten() for part in self.parts])
        softmax = self.softmax
        return softmax.args[0] if softmax.args else softmax.kwargs["input"]

    def by_softmax(self, x: Tensor) -> dict[int, Tensor]:
        """What is shaped as `weights`, by the numbers of softmaxes as each of them has it."""
        sizes = [part.weights.numel() for part in self.parts]
        pieces = zip(self.parts, x.flatten().split(sizes), strict=True)
        return {part.of.softmax: piece.reshape(part.weights.shape) for part, piece in pieces}

    @property
    def made_z(self) -> tuple[Tensor, Step | None]:
        """z of an only softmax as the module has it, and the step that made it."""
        if self.of.reader is None:
            x = first_tensor(self.out)
            assert x is not None
            return x, self.tape.latest.get(id(x))
        reader = self.linears[self.of.reader]
        return reader.args[0], reader.made_by.get(id(reader.args[0]))

    @property
    def z(self) -> Tensor:
        """[rows pos width] of all heads, or positions first: these, or the heads, may have an axis more."""
        if self.of.more:
            return torch.cat([part.z for part in self.parts], 1)
        x, _ = self.made_z
        in_chunks = x.ndim > 3 and self.of.v and x.shape[-1] == self.made[self.of.v[0]].shape[-1]
        return x.flatten(1, -2) if in_chunks else x.flatten(2)

    def by_reader(self, z: Tensor) -> dict[int | None, Tensor]:
        """z of all positions, by the numbers of what reads it as each of them does."""
        split = z.split([part.z.shape[1] for part in self.parts], 1)
        pieces = zip(self.parts, split, strict=True)
        return {part.of.reader: piece.reshape(part.made_z[0].shape) for part, piece in pieces}

    @property
    def n_queries(self) -> int:
        """Positions that z has: fewer than v has where queries are pooled."""
        return rows_of(self.z, self.of.turned[1])[1]

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
