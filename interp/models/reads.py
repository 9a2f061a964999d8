"""Whether an attention reads a source: something that its block was given besides the hidden state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interp.models.recording import AttentionCall, Recording

if TYPE_CHECKING:
    from interp.models.stack import Layer


def given(layer: Layer, key: int | str) -> list[Tensor]:
    """Sequences that a block was given besides its hidden state, with three axes or as many as that has."""
    named = dict(zip(layer.call.keys, layer.call.inputs, strict=True))
    return [x for at, x in named.items() if at != key and x.ndim in (3, named[key].ndim)]


def read_of(layer: Layer, key: int | str, attention: AttentionCall) -> dict[int | str, Tensor]:
    """What an attention reads of what a block was given besides the hidden state, by the argument it was given in."""
    sources = given(layer, key)
    return {
        at: x
        for at, x in zip(layer.call.keys, layer.call.inputs, strict=True)
        if any(x is each for each in sources) and reads_any(layer.inside, attention, [x])
    }


def reads_any(
    seen: Recording, attention: AttentionCall, sources: list[Tensor], *, values: bool = False
) -> bool:
    """Whether a linear layer called before an attention, in its module or around it, reads one of these.

    A norm in the block may come between. `values`: and makes its values of it.
    """
    sources = [*sources, *_normed(seen, sources)]
    name = _around(seen, attention)
    outer = [c for c in seen.calls.get(name, []) if c.start <= attention.order < c.order]
    return any(
        len(call.inputs) > 0 and any(torch.equal(call.inputs[0], x) for x in sources)
        for path, calls in seen.calls.items()
        if path.startswith(name + ".") and _has_matrix(seen, path)
        for call in calls
        if outer and outer[0].start <= call.start and call.order <= attention.order
        if not values or _holds(call.output, attention.tensors["v"])
    )


def _normed(seen: Recording, sources: list[Tensor]) -> list[Tensor]:
    """What modules with no matrix (norms) make of one of these."""
    return [
        call.output
        for path, calls in seen.calls.items()
        if not _has_matrix(seen, path)
        for call in calls
        if call.output is not None
        if call.inputs and any(torch.equal(call.inputs[0], x) for x in sources)
    ]


def _has_matrix(seen: Recording, name: str) -> bool:
    return any(weight.ndim > 1 for weight in seen.module.get_submodule(name).parameters())


def _holds(out: Tensor | None, v: Tensor) -> bool:
    """Whether the first channel of v [batch kv pos d_head] is a column of a linear layer's output."""
    if out is None or out.numel() % v[:, 0, :, 0].numel():
        return False
    columns = out.reshape(-1, out.shape[-1])
    first = v[:, 0, :, 0]
    wanted = (first.reshape(-1, 1), first.T.reshape(-1, 1))  # rows, or positions, first
    return any(len(x) == len(columns) and bool((columns == x).all(0).any()) for x in wanted)


def _around(seen: Recording, attention: AttentionCall) -> str:
    """The outermost module of the block in which nothing else attends: projections may stand beside the attention."""
    parts = seen.names[attention.module].split(".")
    others = {seen.names[call.module] for call in seen.attention} - {".".join(parts)}
    outer = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return next(
        name
        for name in outer
        if name == outer[-1]
        or (name in seen.calls and not any(f"{other}.".startswith(f"{name}.") for other in others))
    )


def merged(layer: Layer, key: int | str) -> bool:
    """Whether the one attention of a block reads a source's keys besides those of its own positions."""
    sources = given(layer, key)
    return bool(sources) and any(
        call.tensors["k"].shape[2] > call.tensors["q"].shape[2]
        and reads_any(layer.inside, call, sources)
        for call in layer.inside.attention
    )
