"""Which modules are the layers: the members of one ModuleList, in the order in which they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.in_parts import AND, as_one, inside, members
from interp.models.layout import PLAIN, shown
from interp.models.placed import Placed
from interp.models.reads import given, read_of, reads_any
from interp.models.recording import AttentionCall, ModuleCall, Recording
from interp.models.several import seen_as_one
from interp.sites import CROSSES


@dataclass(frozen=True)
class Layer:
    """One call of a block: what happened during it, its attention call and those to sources, if any."""

    name: str
    call: ModuleCall
    inside: Recording
    attention: AttentionCall | None
    crosses: tuple[AttentionCall, ...] = ()
    axes: tuple[str, ...] = PLAIN
    attends: tuple[nn.Module, ...] = ()
    along: str = ""
    placed: tuple[Placed, ...] = ()
    in_a_row: int = 1
    """How many residual streams lie one after the other in the last axis, where `axes` has none for them."""
    ahead: Layer | None = None
    """The attention to a source that is called between the block before and this one, and is in neither."""
    asides: tuple[AttentionCall, ...] = ()
    """Attention calls that write to something else that the block returns, and to nothing of its stream."""
    members: tuple[str, ...] = ()
    """The modules that the layer is made of, called one after the other, where it is no one module."""
    added_to: int | str | None = None
    """Where its call has the stream, if what it returns is no stream, but what code outside adds to that."""

    def hidden(self, key: int | str) -> Tensor:
        """The hidden state the block was given [batch pos d_model]."""
        x = self.call.inputs[self.call.keys.index(key)]
        return shown(x, self.axes, self.inside.n_rows)

    def reshapes(self, key: int | str) -> bool:
        """Whether it returns a stream of another width or length than it reads."""
        return self.output.shape != self.hidden(key).shape

    @property
    def output(self) -> Tensor:
        """The hidden state it returned, or that code outside makes of it and of what it read [batch pos d_model]."""
        assert self.call.output is not None
        made = shown(self.call.output, self.axes, self.inside.n_rows)
        return made if self.added_to is None else self.hidden(self.added_to) + made

    @property
    def returns(self) -> str:
        """The name of the module that returns its output."""
        return self.members[-1] if self.members else self.name

    @property
    def to_sources(self) -> list[tuple[Recording, AttentionCall]]:
        """Each attention to a source, and what happens around it."""
        if self.ahead is not None and self.ahead.attention is not None:
            return [(self.ahead.inside, self.ahead.attention)]
        return [(self.inside, call) for call in self.crosses]

    @property
    def n_streams(self) -> int:
        """How many residual streams it reads and returns."""
        if "n_streams" not in self.axes or self.call.output is None:
            return self.in_a_row
        return self.call.output.shape[self.axes.index("n_streams")]


def with_cross(layer: Layer, key: int | str) -> Layer:
    """The layer with its attention to sources told apart: its keys or values are made of something else
    that the block was given than the hidden state at `key`. A block's only attention stays `attention`; what
    attends to more sources than there are sites for, or to several and not to itself, is told by none.
    """
    sources = given(layer, key)
    asides = {id(call) for call in layer.asides}
    calls = [call for call in layer.inside.attention if id(call) not in asides]
    crosses = [call for call in calls if sources and reads_any(layer.inside, call, sources)]
    if len(crosses) > 1:
        crosses = _of_values(layer, key, crosses, len(calls))
    own = [call for call in calls if not any(call is other for other in crosses)]
    apart = not own and len({frozenset(read_of(layer, key, call)) for call in crosses}) > 1
    if apart or len(crosses) > len(CROSSES):
        return replace(layer, attention=None)
    if not own:
        own, crosses = calls, []
    layer = replace(layer, attention=own[0] if own else None, crosses=tuple(crosses))
    if len(own) < 2:
        return layer
    if (one := seen_as_one(own)) is None:
        return replace(layer, attention=None)
    return replace(layer, attention=one[0], attends=tuple(c.module for c in own), along=one[1])


def _of_values(
    layer: Layer, key: int | str, calls: Sequence[AttentionCall], n_calls: int
) -> list[AttentionCall]:
    """Of some of a block's `n_calls`, which read what it was given, those whose values are made of it and not of the
    stream: positions given to every block may be all that keys are made of."""
    sources = [x for x in given(layer, key) if not torch.equal(x, layer.hidden(key))]
    values = [c for c in calls if reads_any(layer.inside, c, sources, values=True)]
    if values and len(values) < n_calls:
        return values
    return [c for c in calls if c.tensors["k"].shape[2] != c.tensors["q"].shape[2]]


def layers_of(seen: Recording, stack: str, axes: tuple[str, ...] = PLAIN) -> list[Layer]:
    """Every call of a member of the list, first called first; a member may be called several times.

    Of several lists (names with ", " in between), the calls of all their members; of lists whose members
    make layers together (with " + "), those of one layer as one.
    """
    calls = [
        (call, name, ())
        for lists in stack.split(", ")
        if AND not in lists
        for (name,) in members(seen, lists)
        for call in seen.calls.get(name, [])
    ]
    calls += [
        (as_one([seen.call(name) for name in names]), names[0], names)
        for lists in stack.split(", ")
        if AND in lists
        for names in members(seen, lists)
    ]
    layers = []
    for call, name, parts in sorted(calls, key=lambda found: found[0].order):
        within = inside(seen, call, parts)
        attention = next(iter(within.attention), None)
        layers.append(Layer(name, call, within, attention, axes=axes, members=parts))
    if not layers or any(layer.call.output is None for layer in layers):
        raise Refused(f"blocks of '{stack}' return no hidden state: nothing can be addressed")
    return layers


def calls_of(seen: Recording, layers: Sequence[Layer]) -> list[ModuleCall]:
    """These layers' calls in another recording of the same model."""
    names = [layer.members or (layer.name,) for layer in layers]
    taken = {name: iter(seen.calls[name]) for each in names for name in each}
    return [as_one([next(taken[name]) for name in each]) for each in names]


def outputs_of(layers: Sequence[Layer]) -> dict[str, list[Tensor]]:
    """By module, what these layers returned, as it returned it: what a forward is given where that is put back."""
    returned: dict[str, list[Tensor]] = {}
    for layer in layers:
        assert layer.call.output is not None
        returned.setdefault(layer.returns, []).append(layer.call.output)
    return returned


def hidden_key(layers: list[Layer]) -> int | str | None:
    """The argument in which every block gets what the one before it returned, but for the first of a stage."""
    first = layers[0].call
    for key in first.keys:
        if not all(key in layer.call.keys for layer in layers):
            continue
        linked = [
            (a.output, b.hidden(key)) for a, b in pairwise(layers) if not starts_stage(a, b, key)
        ]
        equal = all(torch.equal(out, x) for out, x in linked)
        if equal and (linked or _same_shape(first, layers[0].hidden(key).shape)):
            return key
        if any(torch.equal(out, x) for out, x in linked):
            return key
    # Something may be done to the stream between blocks: `verify` says so; the shape still tells.
    return next(
        (
            key
            for key, x in zip(first.keys, first.inputs, strict=True)
            if _same_shape(first, x.shape) and all(key in layer.call.keys for layer in layers)
        ),
        None,
    )


def added_outside(layers: list[Layer], key: int | str) -> list[Layer]:
    """The layers, as those that return what code outside adds to the stream, where each next one reads that sum."""
    adding = [replace(layer, added_to=key) for layer in layers if not layer.members]
    shapes = {x.shape for layer in layers for x in (layer.output, layer.hidden(key))}
    if len(shapes) > 1 or not 1 < len(layers) == len(adding):
        return layers
    links = zip(pairwise(layers), adding, strict=False)
    sums = all(
        torch.equal(made.output, b.hidden(key)) and not torch.equal(a.output, b.hidden(key))
        for (a, b), made in links
    )
    return adding if sums else layers


def starts_stage(before: Layer, layer: Layer, key: int | str) -> bool:
    """Whether a block reads a stream of another width or length than the one before read or returned, or other axes."""
    shapes = {before.hidden(key).shape, before.output.shape, layer.hidden(key).shape}
    return layer.axes != before.axes or len(shapes) > 1


def _same_shape(call: ModuleCall, shape: torch.Size) -> bool:
    return call.output is not None and call.output.shape == shape
