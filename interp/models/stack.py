"""Which modules are the layers: the members of one ModuleList, in the order in which they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.feeding import fed_stack
from interp.models.in_parts import AND, as_one, inside, lists_in_turn, members
from interp.models.layout import PLAIN, shown
from interp.models.placed import Placed
from interp.models.reads import given, merged, reads_any
from interp.models.recording import AttentionCall, ModuleCall, Recording, record
from interp.models.several import seen_as_one
from interp.models.towers import alike, parts_named
from interp.run.batch import Batch
from interp.sites import AXES, CROSS_SITES


@dataclass(frozen=True)
class Layer:
    """One call of a block: what happened during it, its attention call and the one to a source, if any."""

    name: str
    call: ModuleCall
    inside: Recording
    attention: AttentionCall | None
    cross: AttentionCall | None = None
    axes: tuple[str, ...] = PLAIN
    attends: tuple[nn.Module, ...] = ()
    along: str = ""
    placed: tuple[Placed, ...] = ()
    in_a_row: int = 1
    """How many residual streams lie one after the other in the last axis, where `axes` has none for them."""
    ahead: Layer | None = None
    """The attention to a source that is called between the block before and this one, and is in neither."""
    members: tuple[str, ...] = ()
    """The modules that the layer is made of, called one after the other, where it is no one module."""

    def hidden(self, key: int | str) -> Tensor:
        """The hidden state the block was given [batch pos d_model]."""
        x = self.call.inputs[self.call.keys.index(key)]
        return shown(x, self.axes, self.inside.n_rows)

    def reshapes(self, key: int | str) -> bool:
        """Whether it returns a stream of another width or length than it reads."""
        return self.output.shape != self.hidden(key).shape

    @property
    def output(self) -> Tensor:
        """The hidden state it returned [batch pos d_model]."""
        assert self.call.output is not None
        return shown(self.call.output, self.axes, self.inside.n_rows)

    @property
    def returns(self) -> str:
        """The name of the module that returns its output."""
        return self.members[-1] if self.members else self.name

    @property
    def to_source(self) -> tuple[Recording, AttentionCall | None]:
        """The attention to a source, and what happens around it."""
        if self.ahead is not None:
            return self.ahead.inside, self.ahead.attention
        return self.inside, self.cross

    @property
    def n_streams(self) -> int:
        """How many residual streams it reads and returns."""
        if "n_streams" not in self.axes or self.call.output is None:
            return self.in_a_row
        return self.call.output.shape[self.axes.index("n_streams")]


def find_stack(
    seen: Recording, batch: Batch, refused: dict[str, str]
) -> tuple[str, list[Layer], int | str]:
    """The name of the list of blocks, its layers, and where their calls have the hidden state."""
    placed, outside = _place(seen)
    placed = _decoder(seen, placed) or placed
    if not placed:
        why = (
            seen.without
            if not outside
            else f"attention module '{outside[0]}' stands in no ModuleList of blocks"
        )
        for site in set(AXES) - {"embed", "resid_pre", "resid_post", *CROSS_SITES}:
            refused[site] = f"{why}; resid_pre, resid_post and logits still work"
        stack = _largest_chain(seen)
    elif len(placed) > 1 and (why := _not_one_stream(seen, placed, batch)):
        fed = [] if alike(seen.module, placed) else fed_stack(seen, placed, batch)
        if not fed or (len(fed) > 1 and _not_one_stream(seen, fed, batch)):
            raise Refused(
                f"{type(seen.module).__name__} has {len(placed)} stacks of attention blocks "
                f"({', '.join(placed)}){why}"
            )
        stack = ", ".join(fed)
    else:
        stack = ", ".join(placed)
        stack = lists_in_turn(seen, stack) or stack if len(placed) == 1 else stack
    layers = layers_of(seen, stack)
    key = _hidden_key(layers)
    if key is None:
        raise Refused(
            f"blocks of '{stack}' are not called with a hidden state that the next one reads: "
            "nothing can be addressed"
        )
    layers = [with_cross(layer, key) for layer in layers]
    shapes = {layer.hidden(key).shape for layer in layers}
    if len(shapes) > 1 and any(len(layer.inside.attention) > 1 for layer in layers):
        raise Refused(
            f"members of '{stack}' are stages: several blocks each, of streams that differ"
        )
    return stack, layers, key


def _decoder(seen: Recording, placed: list[str]) -> list[str]:
    """Of several lists the one whose blocks attend to a source besides, where all others are called before it."""
    if len(placed) < 2:
        return []
    stacks = {name: layers_of(seen, name) for name in placed}
    last = max(placed, key=lambda name: stacks[name][-1].call.order)
    begins = stacks[last][0].call.start
    if any(stacks[name][-1].call.order > begins for name in placed if name != last):
        return []  # two streams that attend to each other, block by block
    key = _hidden_key(stacks[last])
    attends = key is not None and any(
        with_cross(layer, key).cross or merged(layer, key) for layer in stacks[last]
    )
    return [last] if attends else []


def with_cross(layer: Layer, key: int | str) -> Layer:
    """The layer with its attention to a source told apart: its keys or values are made of something else
    that the block was given than the hidden state at `key`. A block's only attention stays `attention`.
    """
    sources = given(layer, key)
    calls = layer.inside.attention
    cross = [call for call in calls if sources and reads_any(layer.inside, call, sources)]
    if len(cross) > 1:  # positions given to every block may be all that the first one reads
        cross = [c for c in cross if c.tensors["k"].shape[2] != c.tensors["q"].shape[2]]
    own = [call for call in calls if not any(call is other for other in cross)]
    if len(cross) != 1 or not own:
        own, cross = calls, []
    layer = replace(layer, attention=own[0] if own else None, cross=cross[0] if cross else None)
    if len(own) < 2:
        return layer
    if (one := seen_as_one(own)) is None:
        return replace(layer, attention=None)
    return replace(layer, attention=one[0], attends=tuple(c.module for c in own), along=one[1])


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


def _hidden_key(layers: list[Layer]) -> int | str | None:
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


def starts_stage(before: Layer, layer: Layer, key: int | str) -> bool:
    """Whether a block reads a stream of another width or length than the one before read or returned, or other axes."""
    shapes = {before.hidden(key).shape, before.output.shape, layer.hidden(key).shape}
    return layer.axes != before.axes or len(shapes) > 1


def _same_shape(call: ModuleCall, shape: torch.Size) -> bool:
    return call.output is not None and call.output.shape == shape


def _place(seen: Recording) -> tuple[list[str], list[str]]:
    """The ModuleLists that hold the attention calls, and the names of attention modules in no list.

    The nearest list counts, unless a list further out holds all calls (T5's blocks are lists too).
    """
    levels: list[list[str]] = []
    outside = []
    around = []
    for call in seen.attention:
        places = _lists_around(seen.module, seen.names[call.module])
        around.append(places)
        if not places:
            outside.append(seen.names[call.module])
        for level, name in enumerate(places):
            while len(levels) <= level:
                levels.append([])
            if name not in levels[level]:
                levels[level].append(name)
    single = [level for level in levels if len(level) == 1]
    if single and levels[0] != single[0]:
        if _stages(seen, levels[0]) or _reshapes(seen, single[0][0]):
            return _innermost(levels[0]), outside
    # Two stacks of blocks that are lists: the fewest lists that hold every call.
    whole = [level for i, level in enumerate(levels) if all(len(each) > i for each in around)]
    lists = (single or sorted(whole, key=len) or levels or [[]])[0]
    if len(lists) == 1 and _reshapes(seen, lists[0]):  # stages, whose blocks may be in a Sequential
        inner = [
            _around(seen.module, seen.names[call.module], nn.Sequential) for call in seen.attention
        ]
        if all(inner):
            lists = list(dict.fromkeys(places[0] for places in inner))
    return lists, outside


def _innermost(lists: list[str]) -> list[str]:
    """The lists, less those that hold others of them: attention of theirs stands behind the blocks of a stage."""
    return [name for name in lists if not any(each.startswith(f"{name}.") for each in lists)]


def _lists_around(module: nn.Module, name: str) -> list[str]:
    """Every ModuleList that holds the module called `name`, nearest first; where none does, every Sequential."""
    return _around(module, name, nn.ModuleList) or _around(module, name, nn.Sequential)


def _around(module: nn.Module, name: str, kind: type) -> list[str]:
    parts = name.split(".")
    ends = [end for end in range(len(parts) - 1, 0, -1) if parts[end].isdigit()]
    around = [".".join(parts[:end]) for end in ends]
    return [each for each in around if isinstance(module.get_submodule(each), kind)]


def _not_one_stream(seen: Recording, stacks: list[str], batch: Batch) -> str:
    """Why several lists do not work on one residual stream, one after the other; "" if they do.

    They do where what the last block of one list returns, changed, changes what the next block reads. Blocks
    of one class may work on streams of several shapes: they are the stages of one model.
    """
    layers = layers_of(seen, ", ".join(stacks))
    key = _hidden_key(layers)
    apart = f"; pass one part of the model{parts_named(seen.module, stacks)}"
    if key is None:
        return apart
    lists = [layer.name.rpartition(".")[0] for layer in layers]
    if len({layer.hidden(key).shape for layer in layers}) > 1 and not alike(seen.module, lists):
        return apart
    ends = [i for i in range(len(layers) - 1) if lists[i] != lists[i + 1]]
    returned: dict[str, list[Tensor]] = {}
    for i, layer in enumerate(layers):
        out = layer.output.flip(-1) if i in ends else layer.output  # a norm sees more than its size
        returned.setdefault(layer.name, []).append(out)
    again = layers_of(record(seen.module, batch, restored=returned), ", ".join(stacks))
    unmoved = (torch.equal(again[i + 1].hidden(key), layers[i + 1].hidden(key)) for i in ends)
    return apart if any(unmoved) else ""


def _stages(seen: Recording, lists: list[str]) -> bool:
    """Whether some list has several members of one class that attend: blocks, and what is around a stage.

    (T5's blocks are lists too, of different classes.)
    """
    members: dict[str, set[str]] = {}
    for call in seen.attention:
        name = seen.names[call.module]
        for around in lists:
            if name.startswith(around + "."):
                member, _, inner = name.removeprefix(around + ".").partition(".")
                if inner:  # not a list of attention modules
                    members.setdefault(around, set()).add(f"{around}.{member}")
    return any(
        len({type(seen.module.get_submodule(name)) for name in found}) < len(found)
        for found in members.values()
    )


def _reshapes(seen: Recording, stack: str) -> bool:
    """Whether a member of the list returns another shape than it reads: a stage, and what follows it."""
    members = range(len(seen.module.get_submodule(stack)))  # type: ignore[arg-type]
    calls = [call for i in members for call in seen.calls.get(f"{stack}.{i}", [])]
    return any(
        call.inputs and call.output is not None and call.inputs[0].shape != call.output.shape
        for call in calls
    )


def _largest_chain(seen: Recording) -> str:
    """The longest ModuleList whose members were each called once, each on its predecessor's output."""
    chains = []
    for name, submodule in seen.module.named_modules():
        if isinstance(submodule, nn.ModuleList) and len(submodule):
            calls = [seen.once(f"{name}.{i}") for i in range(len(submodule))]
            linked = all(
                call is not None
                and call.output is not None
                and call.inputs
                and call.inputs[0].shape == call.output.shape
                for call in calls
            )
            if linked and all(torch.equal(a.output, b.inputs[0]) for a, b in pairwise(calls)):  # type: ignore
                chains.append((len(submodule), name))
    if not chains:
        why = f"{seen.without}; it" if seen.without else type(seen.module).__name__
        raise Refused(f"{why} shows no stack of blocks: nothing can be addressed")
    return max(chains)[1]
