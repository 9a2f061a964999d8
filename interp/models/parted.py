"""Blocks whose inputs are in parts: what happens inside them, all parts of an input in one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from interp.models.layout import CHANNELS_FIRST, shown
from interp.models.placed import Placed
from interp.models.recording import AttentionCall, ModuleCall
from interp.models.several import HEADS, seen_as_one
from interp.models.stack import Layer


def attention_of_parts(layer: Layer) -> Layer:
    """The layer with its attention calls as one, each input in one row: heads of several attentions side by side."""
    calls, placed = layer.inside.attention, layer.placed
    groups: list[AttentionCall] = []
    for number in range(1 + placed[-1].index):
        mine = [each for each in zip(calls, placed, strict=True) if each[1].index == number]
        groups.append(_of_all_parts(mine))
    attends: tuple[nn.Module, ...] = tuple(call.module for call in calls) if len(calls) > 1 else ()
    if len(groups) == 1:
        return replace(layer, attention=groups[0], attends=attends, along="")
    one = seen_as_one(groups)
    if one is None or one[1] != HEADS:
        return replace(layer, attention=None, attends=(), along="")
    return replace(layer, attention=one[0], attends=attends, along=HEADS)


def _of_all_parts(calls: Sequence[tuple[AttentionCall, Placed]]) -> AttentionCall:
    """The one attention that these calls compute, some parts each."""

    def together(name: str) -> Tensor:
        whole = None
        for call, place in calls:
            x = torch.cat(call.rows, 2) if name == "pattern" else call.tensors[name]
            x = x.transpose(1, 2) if name in ("q", "k", "v") else x
            place = replace(place, index=0)
            whole = place.among(place.unknown(name, x, 1) if whole is None else whole, name, x)
        assert whole is not None
        return whole.transpose(1, 2) if name in ("q", "k", "v") else whole

    tensors = {name: together(name) for name in ("q", "k", "v", "z")}
    first, last = calls[0][0], calls[-1][0]
    return AttentionCall(first.module, last.order, None, tensors, [together("pattern")])


def with_parts_together(layer: Layer) -> Layer:
    """The layer with what modules inside hold as [row height width channels], or channels first, as [batch pos width].

    A row is a part of an input; a module that is called once for each part is called once on all, part after part.
    """
    raw, size = layer.call.output, layer.inside.n_rows
    assert raw is not None
    n_parts, (height, width) = raw.shape[1], raw.shape[3:]

    def one(x: Tensor) -> Tensor | None:
        """[row pos channels] of all rows that a module was called on."""
        if x.ndim == 4 and x.shape[1:3] == (height, width):
            return x.flatten(1, 2)
        if x.ndim == 4 and x.shape[2:] == (height, width):
            return shown(x, CHANNELS_FIRST, len(x))
        return x if x.ndim == 3 and x.shape[1] == height * width else None

    def together(of: Sequence[Tensor | None]) -> Tensor | None:
        """[batch pos channels]; None where these are not of all parts."""
        seen = [None if x is None else one(x) for x in of]
        known = [x for x in seen if x is not None]
        if len(known) < len(of) or any(len(x) * len(of) != size * n_parts for x in known):
            return None
        if len({x.shape for x in known}) > 1:
            return None
        return torch.cat([x.reshape(size, -1, x.shape[-1]) for x in known], 1)

    def joined(calls: list[ModuleCall]) -> list[ModuleCall]:
        output = together([call.output for call in calls])
        if output is None or len(calls) not in (1, n_parts):
            return calls
        pairs = zip(*(call.inputs for call in calls), strict=False)
        inputs = [x if (x := together(each)) is not None else each[0] for each in pairs]
        return [replace(calls[-1], inputs=inputs, output=output, start=calls[0].start)]

    calls = {name: joined(of) for name, of in layer.inside.calls.items()}
    return replace(layer, inside=replace(layer.inside, calls=calls))
