"""Layers that are no module: the i-th members of several lists, called one after the other in a model's own forward.

    attentions.i(x)  norms.i(x + …)  mlps.i(…)  other_norms.i(… + …) = x of layer i + 1

The first of them reads the residual stream and the last returns it; what is added in between is code outside
them all. Such lists are named together, with " + " in between.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn

from interp.models.feeding import is_attention
from interp.models.recording import ModuleCall, Recording

AND = " + "


def lists_in_turn(seen: Recording, attentions: str) -> str:
    """The lists whose i-th members make layer i, of which one is a list of attention modules; "" if none do.

    Every member is called once, those of one layer in the order of those of all others and before the next
    layer's; and the first reads just what the last of the layer before returned.
    """
    count, turns = len(_list(seen, attentions)), {}
    for name, part in seen.module.named_modules():
        if isinstance(part, nn.ModuleList) and len(part) == count > 1:
            calls = [seen.once(f"{name}.{i}") for i in range(count)]
            if all(call is not None and call.output is not None for call in calls):
                turns[name] = [call for call in calls if call is not None]
    alone = attentions not in turns or not is_attention(seen, attentions)
    if alone or any(_reads(b, a) for a, b in pairwise(turns[attentions])):
        return ""
    outer = [name for name in turns if not any(name.startswith(f"{other}.") for other in turns)]
    names = sorted(outer, key=lambda name: turns[name][0].order)
    # Lists before the first or behind the last layer (embeddings, heads) are no part of any.
    names = [name for name in names if _within(turns[name], turns[attentions])]
    order = [turns[name][i] for i in range(count) for name in names]
    in_turn = all(a.order <= b.start for a, b in pairwise(order))
    if len(names) < 2 or not in_turn:
        return ""
    linked = (_reads(b, a) for a, b in zip(turns[names[-1]], turns[names[0]][1:], strict=False))
    return AND.join(names) if all(linked) else ""


def members(seen: Recording, lists: str) -> list[tuple[str, ...]]:
    """The names of the modules that make each layer of such lists."""
    names = lists.split(AND)
    return [tuple(f"{name}.{i}" for name in names) for i in range(len(_list(seen, names[0])))]


def as_one(calls: list[ModuleCall]) -> ModuleCall:
    """The call of a layer: what its first module was given, and what its last returned."""
    first, last = calls[0], calls[-1]
    return replace(last, inputs=first.inputs, keys=first.keys, start=first.start)


def inside(seen: Recording, call: ModuleCall, names: tuple[str, ...]) -> Recording:
    """What happened during a layer's call: calls of these modules of its own are among it."""
    return seen.within(replace(call, order=call.order + 1) if names else call)


def _list(seen: Recording, name: str) -> nn.ModuleList:
    found = seen.module.get_submodule(name)
    assert isinstance(found, (nn.ModuleList, nn.Sequential))
    return found  # type: ignore[return-value]


def _reads(call: ModuleCall, before: ModuleCall) -> bool:
    """Whether what a module is given is what the other returned."""
    out = before.output
    return out is not None and any(torch.equal(x, out) for x in call.inputs)


def _within(calls: list[ModuleCall], turns: list[ModuleCall]) -> bool:
    """Whether some of these calls are between the first and the last of the others."""
    return any(turns[0].start <= call.start < turns[-1].order for call in calls)
