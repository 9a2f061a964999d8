"""Which axes blocks' tensors have, tried on the probe where their shape does not say it.

A block may hold positions before rows of the batch, have several rows for each input (the frames of a
video, or the places of a frame), or one row for all. Whose row is whose is told by a batch of copies of its
first input: every row of what is shown must then be as that input's row was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from interp.errors import Refused
from interp.models.layout import (
    ACROSS,
    CHANNELS_BEFORE,
    CHANNELS_FIRST,
    FLAT,
    IMAGE,
    ONE_AFTER_THE_OTHER,
    PACKED,
    PARTED,
    PARTS,
    PLAIN,
    POSITIONS_FIRST,
    as_held_inside,
    axes_of,
    held,
    layout_of,
    n_ahead,
    shown,
    shown_inside,
    with_others_ahead,
)
from interp.models.packed import attention_row_by_row
from interp.models.parted import attention_of_parts, with_parts_together
from interp.models.recording import ModuleCall, Recording, record
from interp.models.stack import Layer, calls_of, outputs_of
from interp.models.windows import attention_in_order, crosses_in_order
from interp.run.batch import Batch

MOVED = 1e-3
"""A vector has changed if it did by more than this share of the largest number."""


def find_axes(
    seen: Recording, layers: list[Layer], key: int | str, batch: Batch
) -> list[tuple[str, ...]]:
    """The axes of every layer's hidden state.

    Raises:
        Refused: no axes show for every input a row of its own.
    """
    raw = [layer.hidden(key) for layer in layers]
    if all(x.ndim > 3 or (x.ndim == 3 and x.shape[0] == batch.size) for x in raw):
        axes = _by_shape(layers, key, batch)
        if axes is None or (axes == CHANNELS_FIRST and not seen.attention):
            raise _refused(seen, layers[0], raw[0], batch)
        axes = _with_others(seen, layers, key, batch) if axes == PLAIN else axes
        return [axes] * len(layers)
    if batch.size == 1:
        return _in_one_order(seen, layers, _of_one_row(seen, layers, raw, batch), key, batch)
    copies = batch.rows(slice(0, 1)).repeat(batch.size)
    again = calls_of(record(seen.module, copies), layers)
    found = []
    for layer, before, call in zip(layers, raw, again, strict=True):
        states = [(before, call.inputs[call.keys.index(key)])]
        out, other = layer.call.output, call.output
        if out is not None and other is not None and out.shape == before.shape:
            states.append((out, other))  # it may read the same for all
        kinds = product(states, _possible(before.shape, batch))
        axes = next((kind for of, kind in kinds if _copied(*of, kind, batch.size)), None)
        if axes is None:
            raise _refused(seen, layer, before, batch)
        found.append(axes)
    return _in_one_order(seen, layers, found, key, batch)


def _of_one_row(
    seen: Recording, layers: list[Layer], raw: list[Tensor], batch: Batch
) -> list[tuple[str, ...]]:
    """The axes where the probe is an example of one row: all is that row's, and no other tells how it lies. What is
    first are parts where attention keeps them apart."""
    found = []
    for layer, x in zip(layers, raw, strict=True):
        kinds = _possible(x.shape, batch)
        if PARTS in kinds and layer.attention is not None:
            rows = layer.attention.tensors["q"].shape[0]
            kinds = [PARTS] if rows == len(x) else [kind for kind in kinds if kind != PARTS]
        if len(kinds) != 1:
            raise _refused(seen, layer, x, batch)
        found += kinds
    return found


def _with_others(
    seen: Recording, layers: list[Layer], key: int | str, batch: Batch
) -> tuple[str, ...]:
    """PLAIN, or with channels before positions, or with positions of the model's own ahead of the tokens'.

    Where tokens are is what the first block reads when the first or the last of them is another, in texts of
    two lengths.
    """
    lengths = {layer.hidden(key).shape[1] for layer in layers}
    if set(batch.inputs) != {"input_ids"} or lengths <= {batch.ids.shape[1]} or len(lengths) > 1:
        return PLAIN
    before_first = all(layer.hidden(key).shape[2] == batch.ids.shape[1] for layer in layers)
    axes = CHANNELS_BEFORE if before_first else PLAIN
    before = {
        at - token
        for length in (batch.ids.shape[1], batch.ids.shape[1] - 1)
        for token in (0, length - 1)
        for at in _moved_by(seen, layers[0], key, axes, batch.ids[:, :length], token)
    }
    if before_first:
        return CHANNELS_BEFORE if before == {0} else PLAIN
    return with_others_ahead(before.pop()) if len(before) == 1 else PLAIN


def _moved_by(
    seen: Recording,
    first: Layer,
    key: int | str,
    axes: tuple[str, ...],
    ids: Tensor,
    token: int,
) -> list[int]:
    """The positions that the first block reads something else at when this token of every row is another."""
    other = ids.clone()
    for row in other:  # as it was where a row has one token alone
        row[token] = next((x for x in row if x != row[token]), row[token])
    a, b = (calls_of(record(seen.module, Batch.of_ids(x)), [first])[0].inputs for x in (ids, other))
    at = first.call.keys.index(key)
    moved = shown(a[at] - b[at], axes, len(ids)).abs().amax((0, 2)) > MOVED * a[at].abs().max()
    return moved.nonzero()[:, 0].tolist()


def _possible(shape: torch.Size, batch: Batch) -> list[tuple[str, ...]]:
    if len(shape) == 2 and shape[0] % batch.size == 0:
        return [FLAT]
    if len(shape) != 3:
        return []
    if shape[0] == batch.size:
        return [PLAIN]
    kinds: list[tuple[str, ...]] = []
    if shape[1] == batch.size:
        kinds.append(POSITIONS_FIRST)
    if shape[0] == 1 and shape[1] % batch.size == 0:
        kinds.append(PACKED)
    if shape[0] % batch.size == 0:
        kinds.append(PARTS)
    return kinds


def _copied(before: Tensor, after: Tensor, axes: tuple[str, ...], size: int) -> bool:
    """Whether every row of `after` is the first of `before`, whose others are something else."""
    x, y = (shown(each, axes, size).double() for each in (before, after))
    off, apart = (y - x[:1]).abs().max(), (x[1:] - x[:1]).flatten(1).abs().amax(1).min()
    return float(off) <= MOVED * float(x.abs().max()) < float(apart)


def _refused(seen: Recording, layer: Layer, x: Tensor, batch: Batch) -> Refused:
    if x.ndim != 3:
        stack = layer.name.rpartition(".")[0]
        why = f"{seen.without}; " if seen.without else ""
        return Refused(
            f"{why}blocks of '{stack}' read a tensor of shape {tuple(x.shape)}; expected [batch, pos, d_model]"
        )
    return Refused(
        f"block '{layer.name}' works on {x.shape[0]} rows for {batch.size} of the input: which of them are "
        "whose was not found, so no site has the batch's rows"
    )


def _in_one_order(
    seen: Recording,
    layers: list[Layer],
    axes: list[tuple[str, ...]],
    key: int | str,
    batch: Batch,
) -> list[tuple[str, ...]]:
    """The axes, ACROSS where a layer has a row for each position of what the one before had for each part.

    Between two such layers half of the positions are changed: just these must change on the other side. What
    has as many positions and is in neither order keeps its own: rows of an input are its parts.
    """
    axes, size = list(axes), batch.size
    for i in range(1, len(layers)):
        raw, out = layers[i].hidden(key), layers[i - 1].call.output
        assert out is not None
        if raw.shape == out.shape:
            axes[i] = axes[i - 1]
            continue
        stream = shown(out, axes[i - 1], size)
        if axes[i] != PARTS or shown(raw, PARTS, size).shape != stream.shape:
            continue
        half = torch.rand(stream.shape[1], generator=torch.Generator().manual_seed(0)) < 0.5
        changed = torch.where(half[:, None], stream.flip(-1), stream)
        returned = outputs_of(layers[:i])
        returned[layers[i - 1].returns][-1] = held(changed, axes[i - 1], out.shape)
        call = calls_of(record(seen.module, batch, restored=_padded(returned, seen)), layers)[i]
        moved = call.inputs[call.keys.index(key)] - raw
        for kind in (PARTS, ACROSS):
            by = shown(moved, kind, size).abs().amax((0, 2))
            if torch.equal(by > MOVED * raw.abs().max(), half):
                axes[i] = kind
                break
    return axes


def _padded(returned: dict[str, list[Tensor]], seen: Recording) -> dict[str, list[Tensor]]:
    """With what modules that are called again later on returned then."""
    made = {}
    for name, values in returned.items():
        outputs = [call.output for call in seen.calls[name]]
        made[name] = values + [out for out in outputs[len(values) :] if out is not None]
    return made


def with_axes(layers: Sequence[Layer], axes: Sequence[tuple[str, ...]]) -> list[Layer]:
    """The layers with everything inside them as it is shown: [batch pos width], attention in one row an input."""
    return [_with_axes(layer, of) for layer, of in zip(layers, axes, strict=True)]


def _with_axes(layer: Layer, axes: tuple[str, ...]) -> Layer:
    layer = replace(layer, axes=axes)
    if not as_held_inside(axes):
        return layer
    size, raw, rows = layer.inside.n_rows, layer.call.output, None
    assert raw is not None
    if layer.placed:
        layer = attention_of_parts(layer)
    elif (axes in (PARTS, ACROSS) or n_ahead(axes)) and layer.attention is not None:
        rows = layer.attention.tensors["q"].transpose(1, 2)  # each may hold several parts
        layer = attention_in_order(layer, layout_of(rows, axes, size))
        layer = crosses_in_order(layer, size) if axes == PARTS else layer
    if axes == PARTED:
        return with_parts_together(layer)
    if axes == PACKED:
        layer = attention_row_by_row(layer)

    in_a_row = raw.shape[:2] if rows is None or axes != PARTS else rows.shape[:2]

    def mine(x: Tensor) -> bool:
        one = axes in (POSITIONS_FIRST, *ONE_AFTER_THE_OTHER) or n_ahead(axes) > 0
        flat = one and x.ndim == 2 and len(x) == raw.shape[:-1].numel()
        same = (0, 2) if axes == CHANNELS_BEFORE else (0, 1)
        together = x.ndim == 3 and x.shape[:2] == in_a_row
        whole = x.ndim == raw.ndim == 3 and all(x.shape[i] == raw.shape[i] for i in same)
        return flat or together or whole

    def one(x: Tensor) -> Tensor:
        return shown_inside(x, axes, size) if mine(x) else x

    vectors = layer.output.shape[:2].numel()
    calls = {
        name: [
            replace(
                call,
                inputs=[one(x) for x in call.inputs],
                output=None if call.output is None else one(call.output),
            )
            for call in of
        ]
        for name, of in layer.inside.calls.items()
        # What has as many vectors in another order could be taken for the stream's: no site is read there.
        if all(
            x is None or mine(x) or x.shape[:-1].numel() != vectors
            for call in of
            for x in [call.output, *call.inputs[:1]]
        )
    }
    return replace(layer, inside=replace(layer.inside, calls=calls))


def _by_shape(layers: list[Layer], key: int | str, batch: Batch) -> tuple[str, ...] | None:
    """How blocks hold their hidden states; channels are the axis that linear layers of every block read."""
    x = layers[0].hidden(key)
    axes = axes_of(x.shape, batch)
    if axes in (PLAIN, None):
        return axes
    if axes == PARTED:
        return axes if _linear_layers_read(layers, key, axes.index("d_model")) else None
    last = _linear_layers_read(layers, key, -1)
    if axes != IMAGE:
        return axes if last else None
    first = _linear_layers_read(layers, key, 1)
    if first and last:  # as many channels as columns: some module reads the stream as it lies
        calls = [call for calls in layers[0].inside.calls.values() for call in calls]
        last = any(call.inputs and torch.equal(call.inputs[0], x) for call in calls)
    return IMAGE if last else CHANNELS_FIRST if first else None


def _linear_layers_read(layers: list[Layer], key: int | str, axis: int) -> bool:
    """Whether linear layers of every block read as many channels as this axis of its hidden state has."""

    def reads(inside: Recording, name: str, call: ModuleCall, width: int) -> bool:
        weight = getattr(inside.module.get_submodule(name), "weight", None)
        matrix = isinstance(weight, Tensor) and weight.ndim == 2 and width in weight.shape
        return matrix and bool(call.inputs) and call.inputs[0].shape[-1] == width

    return all(
        any(
            reads(layer.inside, name, call, layer.hidden(key).shape[axis])
            for name, calls in layer.inside.calls.items()
            for call in calls
        )
        for layer in layers
    )
