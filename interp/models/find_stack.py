"""Which lists of a model hold its blocks: its only stack, the one that others feed, or one of several that was named.

Lists of several blocks may work on one stream, one after the other or in turns, or side by side on streams of
their own; of the latter none is the model's own, and a user names one.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import torch
from torch import Tensor, nn

from interp.errors import BadInput, Refused, unknown
from interp.models.aside import with_asides
from interp.models.feeding import fed_stack
from interp.models.in_a_row import with_blocks_in_a_row
from interp.models.in_parts import AND, lists_in_turn
from interp.models.named import is_heard
from interp.models.reads import merged, read_of
from interp.models.recording import Recording, record
from interp.models.stack import Layer, added_outside, hidden_key, layers_of, with_cross
from interp.models.towers import alike, common, parts_around, side_by_side
from interp.run.batch import Batch
from interp.sites import AXES, CROSS_SITES


class SeveralStacks(Refused):
    """A model has several stacks of blocks, none of which is its own.

    Attributes:
        parts: by stack, the part of the model that holds it and is a model of its own; "" where none does.
    """

    def __init__(self, module: nn.Module, parts: dict[str, str]):
        self.parts = parts
        whole = [stack for stack, part in parts.items() if not part]
        named = [f"`model.{part}`" for part in dict.fromkeys(parts.values()) if part]
        part = f"pass one part of the model: {' or '.join(named)}" if named else ""
        if part and whole:
            part += f" ({', '.join(whole)}: in no part that is a model with inputs of its own)"
        example = whole[0] if whole else next(iter(parts))
        name = f"name one, and the whole model runs: interp.load(model, stack='{example}')"
        super().__init__(
            f"{type(module).__name__} has {len(parts)} stacks of attention blocks ({', '.join(parts)}); "
            + "; or ".join(way for way in (part, name) if way)
        )


def find_stack(
    seen: Recording, batch: Batch, refused: dict[str, str], called: str | None = None
) -> tuple[str, bool, list[Layer], int | str]:
    """The name of the list of blocks, whether it is one of several and not the model's own, its layers, and
    where their calls have the hidden state. `called`: the stack that is wanted of a model of several.

    Raises:
        SeveralStacks: there are several, none is the model's own, and none was named. BadInput: none is
            called so.
    """
    placed, outside = _place(seen)
    if not placed:
        why = (
            seen.without
            if not outside
            else f"attention module '{outside[0]}' stands in no ModuleList of blocks"
        )
        for site in set(AXES) - {"embed", "resid_pre", "resid_post", *CROSS_SITES}:
            refused[site] = f"{why}; resid_pre, resid_post and logits still work"
    if called is None:
        stack, named = _own_stack(seen, placed, batch), False
    else:
        stack, named = _called(seen, placed, batch, called)
    layers = layers_of(seen, stack)
    key = hidden_key(layers)
    if key is None:
        raise Refused(
            f"blocks of '{stack}' are not called with a hidden state that the next one reads: "
            "nothing can be addressed"
        )
    told = [with_cross(layer, key) for layer in layers]
    if any(layer.inside.attention and not layer.attention for layer in told):  # no one attention
        told = [with_cross(layer, key) for layer in with_blocks_in_a_row(seen, layers)]
    layers = with_asides(seen, told, key, batch)
    layers = added_outside(layers, key)
    if not _same_sources(layers, key):
        why = f"blocks of '{stack}' attend to two sources each, and not to the same ones in the same order"
        refused |= dict.fromkeys(CROSS_SITES, why)
    shapes = {layer.hidden(key).shape for layer in layers}
    if len(shapes) > 1 and any(_attends_again(layer) for layer in layers):
        raise Refused(
            f"members of '{stack}' are stages: several blocks each, of streams that differ"
        )
    return stack, named, layers, key


def _attends_again(layer: Layer) -> bool:
    """Whether a layer attends more than once, to a source and for other streams aside."""
    return len(layer.inside.attention) > 1 + len(layer.crosses) + len(layer.asides)


def _same_sources(layers: list[Layer], key: int | str) -> bool:
    """Whether a block's first source is that of all others, and its second one too; where none attends to two, so it
    is. A source is told by the argument that it is given in, and is no other block's other source."""
    read = [[read_of(layer, key, call) for call in layer.crosses] for layer in layers]
    most = max(read, key=len)
    if len(most) < 2:
        return True
    for number, source in ((n, source) for sources in read for n, source in enumerate(sources)):
        others = [other for n, other in enumerate(most) if n != number]
        if not most[number].keys() & source.keys():
            return False
        if any(_share(source, x) and not _share(most[number], x) for x in others):
            return False
    return True


def _share(a: dict[int | str, Tensor], b: dict[int | str, Tensor]) -> bool:
    return any(torch.equal(x, y) for x in a.values() for y in b.values())


def _own_stack(seen: Recording, placed: list[str], batch: Batch) -> str:
    """The stack that the model is: its only one, several that work on one stream, or the one that others feed."""
    placed = _decoder(seen, placed, batch) or placed
    if not placed:
        return _largest_chain(seen)
    if len(placed) == 1:
        return _with_its_parts(seen, placed[0])
    if _one_stream(seen, placed, batch):
        return ", ".join(placed)
    fed = [] if alike(seen.module, placed) else fed_stack(seen, placed, batch)
    if fed and (len(fed) == 1 or _one_stream(seen, fed, batch)):
        return ", ".join(fed)
    parts = parts_around(seen.module, placed)
    stacks = _stacks(seen, placed, batch)
    raise SeveralStacks(seen.module, {name: parts[of[0]] for name, of in stacks.items()})


def _stacks(seen: Recording, placed: list[str], batch: Batch) -> dict[str, list[str]]:
    """The lists of each stack side by side with others, by its name: the list, or what holds those of its stages."""
    found = {}
    for lists in side_by_side(seen.module, placed):
        together = len(lists) == 1 or _one_stream(seen, lists, batch)
        for of in [lists] if together else [[name] for name in lists]:
            found[common(of)] = of
    return found


def _called(seen: Recording, placed: list[str], batch: Batch, called: str) -> tuple[str, bool]:
    """The stack of that name, or in the module of that name; and whether the model's own is another."""
    own = None
    with suppress(Refused):
        own = _own_stack(seen, placed, batch)
    stacks = _stacks(seen, placed, batch)
    if own is not None and called in (own, *own.split(AND)):
        return own, False
    inside = [name for name in placed if is_within(name, called)]
    held = [name for name, lists in stacks.items() if set(inside) & set(lists)]
    if called in seen.names.values() and not any(is_within(name, called) for name in seen.calls):
        raise BadInput(
            f"'{called}' is not called on {', '.join(batch.inputs)}, on which {type(seen.module).__name__} was tried: "
            f"pass the part itself, interp.load(model.{called})"
        )
    if not inside:
        names = stacks if own is None or len(stacks) > 1 else [own]
        raise unknown(f"stack of {type(seen.module).__name__}", called, names)
    if len(held) > 1:
        raise BadInput(
            f"'{called}' holds several stacks of {type(seen.module).__name__}: {', '.join(held)}; name one"
        )
    stack = ", ".join(inside) if len(inside) > 1 else _with_its_parts(seen, inside[0])
    if own is not None and stack == own:
        return own, False
    if batch.has_source:
        raise Refused(
            f"'{stack}' is no part of the decoder, whose positions the sites of an encoder-decoder have: open the "
            "encoder on its own, Model(module.get_encoder())"
        )
    return stack, True


def is_within(name: str, called: str) -> bool:
    """Whether a module is, or stands in, one of those that a stack is called by."""
    return any(f"{name}.".startswith(f"{one}.") for one in called.replace(AND, ", ").split(", "))


def _with_its_parts(seen: Recording, name: str) -> str:
    """The list, with those whose members make a layer together with its own."""
    return lists_in_turn(seen, name) or name


def _decoder(seen: Recording, placed: list[str], batch: Batch) -> list[str]:
    """Of several lists the one whose blocks attend to a source besides, where all others are called before it.

    One that attends to two sources is fed by several stacks: it is no one's decoder. Where the last is not heard in
    what the model returns first (a tracker sums up the frame for those to come), it is the one before, if that is.
    """
    if len(placed) < 2:
        return []
    stacks = {name: layers_of(seen, name) for name in placed}
    last = max(placed, key=lambda name: stacks[name][-1].call.order)
    begins = stacks[last][0].call.start
    if any(stacks[name][-1].call.order > begins for name in placed if name != last):
        return []  # two streams that attend to each other, block by block
    key = hidden_key(stacks[last])
    if key is None:
        return []
    blocks = [with_cross(layer, key) for layer in stacks[last]]
    if any(len(block.crosses) > 1 for block in blocks):
        return []
    if not any(block.crosses or merged(block, key) for block in blocks):
        return []
    before = _decoder(seen, [name for name in placed if name != last], batch)
    if before and not is_heard(blocks[-1].name, seen, batch):
        return before if is_heard(layers_of(seen, before[0])[-1].name, seen, batch) else [last]
    return [last]


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


def _one_stream(seen: Recording, stacks: list[str], batch: Batch) -> bool:
    """Whether several lists work on one residual stream, one after the other.

    They do where what the last block of one list returns, changed, changes what the next block reads. Blocks
    of one class may work on streams of several shapes: they are the stages of one model.
    """
    layers = layers_of(seen, ", ".join(stacks))
    key = hidden_key(layers)
    if key is None:
        return False
    lists = [layer.name.rpartition(".")[0] for layer in layers]
    if len({layer.hidden(key).shape for layer in layers}) > 1 and not alike(seen.module, lists):
        return False
    ends = [i for i in range(len(layers) - 1) if lists[i] != lists[i + 1]]
    returned: dict[str, list[Tensor]] = {}
    for i, layer in enumerate(layers):
        out = layer.output.flip(-1) if i in ends else layer.output  # a norm sees more than its size
        returned.setdefault(layer.name, []).append(out)
    again = layers_of(record(seen.module, batch, restored=returned), ", ".join(stacks))
    unmoved = (torch.equal(again[i + 1].hidden(key), layers[i + 1].hidden(key)) for i in ends)
    return not any(unmoved)


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
