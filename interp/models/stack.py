"""Which modules are the layers: the members of one ModuleList, in the order in which they are called."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from interp.errors import Refused
from interp.models.recording import AttentionCall, ModuleCall, Recording
from interp.sites import AXES


@dataclass(frozen=True)
class Layer:
    """One call of a block: what happened during it, and its attention call if it has one."""

    name: str
    call: ModuleCall
    inside: Recording
    attention: AttentionCall | None

    def hidden(self, key: int | str) -> Tensor:
        """The hidden state the block was given."""
        return self.call.inputs[self.call.keys.index(key)]


def find_stack(seen: Recording, refused: dict[str, str]) -> tuple[str, list[Layer], int | str]:
    """The name of the list of blocks, its layers, and where their calls have the hidden state."""
    placed, outside = _place(seen)
    if not placed:
        why = (
            f"{type(seen.module).__name__} does not call transformers' attention interface"
            if not outside
            else f"attention module '{outside[0]}' stands in no ModuleList of blocks"
        )
        for site in set(AXES) - {"embed", "resid_pre", "resid_post"}:
            refused[site] = f"{why}; resid_pre, resid_post and logits still work"
        stack = _largest_chain(seen)
    elif len(placed) > 1:
        raise Refused(
            f"{type(seen.module).__name__} has {len(placed)} stacks of attention blocks "
            f"({', '.join(placed)}); pass one part of the model{_parts(seen.module, placed)}"
        )
    else:
        (stack,) = placed
    layers = layers_of(seen, stack)
    key = _hidden_key(layers)
    if key is None:
        raise Refused(
            f"blocks of '{stack}' are not called with a hidden state that the next one reads: "
            "nothing can be addressed"
        )
    shape = layers[0].hidden(key).shape
    if len(shape) != 3:
        raise Refused(
            f"blocks of '{stack}' read a tensor of shape {tuple(shape)}; expected [batch, pos, d_model]"
        )
    for layer in layers:
        if (several := len(layer.inside.attention)) > 1:
            again = "one module " if len({c.module for c in layer.inside.attention}) == 1 else ""
            raise Refused(
                f"block '{layer.name}' attends {several} times ({again or 'cross-attention or several '}"
                "branches); one attention a block can be addressed"
            )
    return stack, layers, key


def layers_of(seen: Recording, stack: str) -> list[Layer]:
    """Every call of a member of the list, first called first; a member may be called several times."""
    members = len(seen.module.get_submodule(stack))  # type: ignore[arg-type]
    calls = [
        (call, f"{stack}.{i}")
        for i in range(members)
        for call in seen.calls.get(f"{stack}.{i}", [])
    ]
    layers = []
    for call, name in sorted(calls, key=lambda pair: pair[0].order):
        inside = seen.within(call)
        layers.append(Layer(name, call, inside, next(iter(inside.attention), None)))
    if not layers or any(layer.call.output is None for layer in layers):
        raise Refused(f"blocks of '{stack}' return no hidden state: nothing can be addressed")
    return layers


def _hidden_key(layers: list[Layer]) -> int | str | None:
    """The argument in which every block gets what the one before it returned."""
    first = layers[0].call
    for key in first.keys:
        if not all(key in layer.call.keys for layer in layers):
            continue
        shape = layers[0].hidden(key).shape
        linked = [(a.call.output, b.hidden(key)) for a, b in pairwise(layers)]
        if all(out is not None and out.shape == x.shape for out, x in linked):
            equal = all(out is not None and torch.equal(out, x) for out, x in linked)
            if equal and (linked or _same_shape(first, shape)):
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


def _same_shape(call: ModuleCall, shape: torch.Size) -> bool:
    return call.output is not None and call.output.shape == shape


def _place(seen: Recording) -> tuple[list[str], list[str]]:
    """The ModuleLists that hold the attention calls, and the names of attention modules in no list.

    The nearest list counts, unless a list further out holds all calls (T5's blocks are lists too).
    """
    levels: list[list[str]] = []
    outside = []
    for call in seen.attention:
        places = _lists_around(seen.module, seen.names[call.module])
        if not places:
            outside.append(seen.names[call.module])
        for level, name in enumerate(places):
            while len(levels) <= level:
                levels.append([])
            if name not in levels[level]:
                levels[level].append(name)
    single = [level for level in levels if len(level) == 1]
    return (single or levels or [[]])[0], outside


def _lists_around(module: nn.Module, name: str) -> list[str]:
    """Every ModuleList that holds the module called `name`, nearest first."""
    parts = name.split(".")
    return [
        parent
        for end in range(len(parts) - 1, 0, -1)
        if parts[end].isdigit()
        and isinstance(module.get_submodule(parent := ".".join(parts[:end])), nn.ModuleList)
    ]


def _parts(module: nn.Module, stacks: list[str]) -> str:
    """ ", such as `model.text_model` or …": the smallest models inside `module` that hold one stack."""
    found = []
    for stack in stacks:
        parts = stack.split(".")
        around = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
        mine = [
            name
            for name in around
            if isinstance(module.get_submodule(name), PreTrainedModel)
            and not any(other.startswith(name + ".") for other in stacks if other != stack)
        ]
        found += mine[:1]
    return f", such as {' or '.join(f'`model.{name}`' for name in found)}" if found else ""


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
        raise Refused(
            f"{type(seen.module).__name__} shows no stack of blocks: nothing can be addressed"
        )
    return max(chains)[1]
