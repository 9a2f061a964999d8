"""Modules that a block calls several times, one of these calls on the stream: a dropout of patterns and outputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.block_map import BlockMap
from interp.models.hooks import argument
from interp.models.recording import Recording
from interp.models.stack import Layer


def on_the_stream(layer: Layer) -> tuple[Layer, frozenset[str]]:
    """The layer with that one call alone of such modules, and their names."""
    once = [calls[0].output for calls in layer.inside.calls.values() if len(calls) == 1]
    kept = {}
    for name, calls in layer.inside.calls.items():
        mine = [call for call in calls if call.output is not None and is_stream(layer, call.output)]
        if len(calls) > 1 and len(mine) == 1:
            value = mine[0].output
            if not any(x is not None and torch.equal(x, value) for x in once):  # type: ignore[arg-type]
                kept[name] = mine
    inside = replace(layer.inside, calls={**layer.inside.calls, **kept})
    return replace(layer, inside=inside), frozenset(kept)


def shared_with_asides(layer: Layer) -> tuple[Layer, frozenset[str]]:
    """The layer with the calls on its stream alone, where attention modules make others for another stream; the names
    of what is called several times."""
    calls = layer.inside.attention
    others = {call.module for call in calls if not any(call is aside for aside in layer.asides)}
    shared = any(call.module in others for call in layer.asides)
    return on_the_stream(layer) if shared else (layer, frozenset())


def is_stream(layer: Layer, x: Tensor) -> bool:
    """Whether a tensor has the axes [batch pos d_model]."""
    return x.shape == layer.output.shape and x.ndim == 3


class CallsOnStream:
    """Which calls of such modules are on the stream, in a run: those of tensors of the shape the block was given."""

    def __init__(self, block: BlockMap, key: int | str):
        self.block, self.key = block, key
        self._shape: torch.Size | None = None
        self._met: set[tuple[str, int]] = set()

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the block is called."""
        self._shape, self._met = argument(args, kwargs, self.key).shape[:-1], set()

    def has(self, name: str, x: Tensor, asking: object) -> bool:
        """Whether this call of a module, with or for x, is the one on the stream.

        Raises:
            Refused: one who is asking was told so of another call before.
        """
        if name not in self.block.repeated:
            return True
        if x.shape[:-1] != self._shape:
            return False
        if (name, id(asking)) in self._met:
            raise Refused(
                f"'{name}' is called several times on tensors of the residual stream's shape in inputs of this "
                "length, and which call is the stream's cannot be told; give inputs of another length"
            )
        self._met.add((name, id(asking)))
        return True


def after_attention(seen: Recording, attention: str, order: int, names: frozenset[str]) -> set[str]:
    """Those of these modules that stand in an attention module and were called once it had attended."""
    inside = {name for name in names if name.startswith(f"{attention}.")}
    return {name for name in inside if seen.call(name).order > order}
