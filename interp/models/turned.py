"""Modules that hold channels before positions, as convolutions do, in blocks whose stream has them behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from interp.models.layout import CHANNELS_FIRST, PLAIN, held, shown
from interp.models.recording import ModuleCall
from interp.models.stack import Layer


def channels_behind(layer: Layer, key: int | str) -> tuple[Layer, frozenset[str]]:
    """The layer with what modules inside hold as [batch channels pos] shown as [batch pos channels]; their names.

    Where there are as many channels as positions nothing tells the two: what is solved for with them does.
    """
    if layer.axes not in (PLAIN, CHANNELS_FIRST):
        return layer, frozenset()
    rows, n_pos = layer.hidden(key).shape[:2]
    axes = (3, 4) if layer.axes == PLAIN else (4,)

    def turns(x: Tensor) -> bool:
        return x.ndim in axes and x.shape[0] == rows and x.shape[2:].numel() == n_pos

    def turned(call: ModuleCall) -> ModuleCall:
        inputs = [channels_last(x) if turns(x) else x for x in call.inputs]
        return replace(
            call, inputs=inputs, output=None if call.output is None else channels_last(call.output)
        )

    calls = dict(layer.inside.calls)
    for name, of in calls.items():
        if all(call.output is not None and turns(call.output) for call in of):
            calls[name] = [turned(call) for call in of]
    names = frozenset(name for name, of in calls.items() if of is not layer.inside.calls[name])
    return replace(layer, inside=replace(layer.inside, calls=calls)), names


def channels_last(x: Tensor) -> Tensor:
    """[batch channels pos], positions in rows and columns or not, as [batch pos channels]: a view where it can be."""
    return shown(x, CHANNELS_FIRST, x.shape[0])


def channels_first(x: Tensor, like: Sequence[int]) -> Tensor:
    """The inverse of `channels_last`: in the shape `like`."""
    return held(x, CHANNELS_FIRST, like)
