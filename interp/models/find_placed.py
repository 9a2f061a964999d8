"""Which parts of their inputs attention calls are of, tried on the probe.

What every block reads is changed in some parts of some inputs, while what attention returns is held: a row of
queries, or of keys and values, changes with its own part alone. A row may hold several parts, one after the other:
then each of these does.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from interp.models.hooks import argument
from interp.models.in_parts import inside
from interp.models.layout import PARTED, PARTS, held, shown
from interp.models.placed import Placed
from interp.models.recording import AttentionCall, Recording, record
from interp.models.stack import Layer, calls_of
from interp.run.batch import Batch

MOVED = 1e-3
"""A row has changed if it did by more than this share of the largest number; rounding is far below."""


def find_placed(
    seen: Recording,
    layers: list[Layer],
    axes: Sequence[tuple[str, ...]],
    key: int | str,
    batch: Batch,
) -> list[Layer]:
    """The layers with `placed` where parts see each other, or a part attends in a call of its own.

    Without attention where its rows are not of one part each.
    """
    some = [
        i
        for i, layer in enumerate(layers)
        if axes[i] in (PARTS, PARTED) and layer.inside.attention and not layer.crosses
    ]
    if not some:
        return layers
    told = _Told(seen, layers, axes, key, batch)
    numbers = told.numbers(some)
    made = list(layers)
    for i in some:
        placed = _placed(layers[i], numbers[i], told.n_parts[i], batch.size)
        if not placed:
            made[i] = replace(layers[i], attention=None, attends=(), along="")
        elif axes[i] == PARTED or not all(place.own for place in placed):
            if any(told.parts_in_a_row(i, x) > 1 for x in _queries(layers[i])):
                made[i] = replace(layers[i], attention=None, attends=(), along="")
                continue
            made[i] = replace(layers[i], placed=placed)
    return made


def _queries(layer: Layer) -> list[Tensor]:
    """The queries of all of a layer's attention calls."""
    return [call.tensors["q"] for call in layer.inside.attention]


Units = dict[str, Int[Tensor, " rows"]]
"""By the name of q, k or v, the number of the part, counted through all inputs, that each row is of; -1 unknown."""


def _placed(layer: Layer, calls: list[Units], n_parts: int, size: int) -> tuple[Placed, ...]:
    """Where each of a layer's calls belongs; () where they are not whole attentions, one after the other."""
    placed: list[Placed] = []
    index, queries, keys = 0, set[int](), set[int]()
    every = set(range(n_parts))
    modules = [call.module for call in layer.inside.attention]
    for number, units in enumerate(calls):
        of = {name: _parts_of(x, n_parts, size) for name, x in units.items()}
        if () in of.values() or of["k"] != of["v"]:
            return ()
        if queries and modules[number] is not modules[number - 1]:
            return ()  # another attention begins before this one has seen all parts
        if queries & set(of["q"]) or keys & set(of["k"]):
            return ()
        placed.append(Placed(index, of["q"], of["k"], n_parts))
        queries, keys = queries | set(of["q"]), keys | set(of["k"])
        if queries == every:
            if keys != every:
                return ()
            index, queries, keys = index + 1, set(), set()
    return () if queries else tuple(placed)


def _parts_of(units: Int[Tensor, " rows"], n_parts: int, size: int) -> tuple[int, ...]:
    """The part that each row of an input is of, the same for all inputs, whose rows stand one after the other."""
    if len(units) % size:
        return ()
    rows = units.reshape(size, -1)
    parts = rows - n_parts * torch.arange(size)[:, None]
    known = bool((parts >= 0).all() and (parts < n_parts).all() and (parts == parts[:1]).all())
    found = parts[0].tolist()
    return tuple(found) if known and len(set(found)) == len(found) else ()


class _Told:
    """Rows of q, k and v told apart by forwards in which every part of every input, but for some, is another."""

    def __init__(
        self,
        seen: Recording,
        layers: list[Layer],
        axes: Sequence[tuple[str, ...]],
        key: int | str,
        batch: Batch,
    ):
        self.seen, self.layers, self.axes, self.key, self.batch = seen, layers, axes, key, batch
        raw = [layer.call.inputs[layer.call.keys.index(key)] for layer in layers]
        self.n_parts = [
            x.shape[1] if kind == PARTED else max(1, x.shape[0] // batch.size)
            for x, kind in zip(raw, axes, strict=True)
        ]
        self.lengths = [x.shape[1] for x in raw]
        self.returned: dict[str, list[Tensor]] = {}
        for layer in layers:
            assert layer.call.output is not None
            self.returned.setdefault(layer.returns, []).append(layer.call.output)

    def numbers(self, some: list[int]) -> dict[int, list[Units]]:
        """For each of these layers and each of its attention calls, which part every row is of."""
        most = self.batch.size * max(self.n_parts[i] for i in some)
        found: dict[int, list[Units]] = {}
        for bit in range(max(1, (most - 1).bit_length())):
            with_it, without = (self._moved(some, bit, wanted) for wanted in (1, 0))
            for i in some:
                calls = found.setdefault(i, [{} for _ in with_it[i]])
                for units, a, b in zip(calls, with_it[i], without[i], strict=True):
                    for name in a:
                        before = units.get(name, torch.zeros(len(a[name]), dtype=torch.long))
                        known = (before >= 0) & (a[name] != b[name])
                        units[name] = torch.where(known, before + (a[name].long() << bit), -1)
        return found

    def _moved(self, some: list[int], bit: int, wanted: int) -> dict[int, list[dict[str, Tensor]]]:
        """Which rows of q, k and v have changed, parts whose number has this bit (or not) being others."""
        turns: dict[str, Any] = {}
        for i, layer in enumerate(self.layers):
            turns.setdefault(layer.name, []).append(i)
        with ExitStack() as stack:
            for name, numbers in turns.items():
                reads = self.seen.module.get_submodule(name)
                left = iter(numbers)

                def change(module: nn.Module, args: tuple, kwargs: dict, left: Any = left) -> Any:
                    x = argument(args, kwargs, self.key)
                    number = next(left)
                    new = self._changed(x, number, bit, wanted)
                    sizes = self.batch.size, self.n_parts[number]

                    def other(y: Any) -> Any:
                        return _as_changed(y, x, new, *sizes)

                    return tuple(map(other, args)), {at: other(y) for at, y in kwargs.items()}

                stack.callback(reads.register_forward_pre_hook(change, with_kwargs=True).remove)
            held_ = [call.tensors["z"] for call in self.seen.attention]
            again = record(self.seen.module, self.batch, restored=self.returned, held=held_)
        calls = calls_of(again, self.layers)
        return {
            i: [
                self._rows_moved(i, before, after)
                for before, after in zip(
                    self.layers[i].inside.attention,
                    inside(again, calls[i], self.layers[i].members).attention,
                    strict=True,
                )
            ]
            for i in some
        }

    def parts_in_a_row(self, layer: int, x: Tensor) -> int:
        """How many parts of an input a row of q, k or v [row heads pos d_head] is long enough for; 1 if not whole."""
        n_parts, rows = self.n_parts[layer], x.shape[0] or 1
        together, left = divmod(self.batch.size * n_parts, rows)
        whole = not left and together > 0 and n_parts % together == 0
        whole = whole and x.shape[2] == together * self.lengths[layer]
        return together if whole and self.axes[layer] == PARTS else 1

    def _rows_moved(
        self, layer: int, before: AttentionCall, after: AttentionCall
    ) -> dict[str, Bool[Tensor, " rows"]]:
        """Which rows of q, k and v have changed, or which parts in them; none of what is shown without a width."""
        found = {}
        for name in ("q", "k", "v"):
            x, y = before.tensors[name].float(), after.tensors[name].float()
            moved = (y - x).abs() > MOVED * (x.abs().max() if x.numel() else 0)
            parts = moved.unflatten(2, (self.parts_in_a_row(layer, x), -1)).transpose(1, 2)
            found[name] = parts.flatten(0, 1).flatten(1).any(1)
        return found

    def _changed(self, x: Tensor, layer: int, bit: int, wanted: int) -> Tensor:
        """What a block reads, with some parts in other numbers."""
        axes, size, n_parts = self.axes[layer], self.batch.size, self.n_parts[layer]
        if axes not in (PARTS, PARTED):
            return x
        units = torch.arange(size * n_parts, device=x.device).reshape(size, n_parts)
        some: Bool[Tensor, "batch part"] = (units >> bit) & 1 == wanted
        stream = shown(x, axes, size).unflatten(1, (n_parts, -1))
        new = torch.where(some[:, :, None, None], stream.flip(-1), stream)
        return held(new.flatten(1, 2), axes, x.shape)


def _as_changed(y: Any, x: Tensor, new: Tensor, size: int, n_parts: int) -> Any:
    """What a block is given, with the parts of its stream x as they are in `new`: x itself, or its parts reordered.

    Of parts that look alike an input's own come first.
    """
    if y is x:
        return new
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return y
    before, after, given = (each.reshape(size * n_parts, -1) for each in (x, new, y))
    order = []
    for number, part in enumerate(given):
        alike = [i for i, other in enumerate(before) if other.equal(part)]
        if not alike:
            return y
        order.append(min(alike, key=lambda i: i // n_parts != number // n_parts))
    return after[order].reshape(y.shape)
