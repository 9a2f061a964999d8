"""Which positions the rows of windows are: found on the probe, where positions are cut into windows for attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from interp.models.layout import (
    Address,
    Layout,
    Windows,
    shown,
)
from interp.models.recording import AttentionCall, Recording, record
from interp.models.stack import Layer, calls_of, outputs_of
from interp.models.told import read_layouts
from interp.run.batch import Batch

MOVED = 1e-3
"""A row has changed if it did by more than this share of the largest number; rounding is far below."""


def find_windows(
    seen: Recording, layers: list[Layer], key: int | str, batch: Batch
) -> dict[int, Windows]:
    """By layer, where positions are cut into windows for attention, tried on the probe.

    Where some layers have windows, all are tried: a single window may hold its positions in another order.
    Each layer is given half of its positions changed: just the rows of q, k and v that are these positions'
    must change. Queries that are pooled have positions of their own: where half of the z of these is changed, just
    this half of what the block returns must change.
    """
    if not any(_has_windows(layer, key) for layer in layers):
        return {}
    addresses = {
        i: found
        for i, layer in enumerate(layers)
        if (found := _addresses(seen, layer, key)) is not None
    }
    layouts = read_layouts(seen.module, addresses, batch)
    layouts |= _with_wrappers(layouts, addresses, layers, seen.module, batch)
    generator = torch.Generator().manual_seed(0)
    halves = {
        i: torch.rand(layout.n_pos, generator=generator) < 0.5 for i, layout in layouts.items()
    }
    returned = outputs_of(layers)
    for i, half in halves.items():
        call = layers[i].inside.once(addresses[i][0]) or seen.call(addresses[i][0])
        out = call.output
        assert out is not None
        stream = out.reshape(batch.size, -1, out.shape[-1])
        changed = torch.where(half[:, None], stream.flip(-1), stream)
        returned[addresses[i][0]] = [changed.reshape(out.shape)]
    again = record(seen.module, batch, restored=returned)
    found = {}
    for i, layout in layouts.items():
        before = layers[i].attention
        after = [call for call in again.attention if before and call.module is before.module]
        wanted = _rows_of(halves[i], layout).repeat(batch.size, 1)
        names = ("k", "v") if layout.queries else ("q", "k", "v")
        if before and len(after) == 1 and _moved(before, after[0], wanted, names):
            found[i] = Windows(*addresses[i][:2], layout, addresses[i][3])
    pooled = {i: of.layout.queries for i, of in found.items() if of.layout.queries}
    stays = pooled.keys() - _put_back(seen, layers, pooled, batch)
    return {i: of for i, of in found.items() if i not in stays}


def _rows_of(half: Bool[Tensor, " pos"], layout: Layout) -> Bool[Tensor, "windows rows"]:
    """Which rows are these positions'; padding is not."""
    return torch.cat([half, torch.zeros(layout.at.numel() - layout.n_pos).bool()])[layout.at]


def _moved(
    before: AttentionCall, after: AttentionCall, wanted: Tensor, names: tuple[str, ...]
) -> bool:
    """Whether just these rows [windows rows] of the tensors `names` have changed."""
    for name in names:
        x, y = before.tensors[name].float(), after.tensors[name].float()
        moved = (y - x).abs().amax((1, 3)) > MOVED * x.abs().max()
        if not torch.equal(moved[:, : wanted.shape[1]], wanted):  # other keys come behind
            return False
    return True


def _put_back(
    seen: Recording, layers: list[Layer], layouts: Mapping[int, Layout], batch: Batch
) -> set[int]:
    """The layers that return something else just where these layouts say that z, changed, is."""
    if not layouts:
        return set()
    generator = torch.Generator().manual_seed(0)
    halves = {i: torch.rand(of.n_pos, generator=generator) < 0.5 for i, of in layouts.items()}
    sign = {
        id(layers[i].attention): torch.where(_rows_of(half, layouts[i]), -1.0, 1.0)
        for i, half in halves.items()
    }
    factors = [
        sign[id(call)].repeat(batch.size, 1)[..., None, None] if id(call) in sign else torch.ones(1)
        for call in seen.attention
    ]
    again = calls_of(record(seen.module, batch, factors, outputs_of(layers)), layers)
    passed = set()
    for i, half in halves.items():
        x, out = layers[i].output, again[i].output
        assert out is not None
        change = (shown(out, layers[i].axes, batch.size) - x).abs().amax((0, 2))
        if torch.equal(change > MOVED * x.abs().max(), half):
            passed.add(i)
    return passed


def _with_wrappers(
    layouts: Mapping[int, Layout],
    addresses: Mapping[int, Address],
    layers: list[Layer],
    module: nn.Module,
    batch: Batch,
) -> dict[int, Layout]:
    """Layouts of one window in another order than the stream, `of` the outermost module that reads this window.

    What projects the attention's output may stand beside the attention, and nothing but the order tells one
    window from the stream.
    """
    moved = [i for i, x in layouts.items() if not torch.equal(x.at, torch.arange(x.n_pos)[None])]
    found: dict[int, Layout] = {}
    for i in moved:
        cut, read, of, _ = addresses[i]
        if len(layouts[i].at) > 1 or not read:
            continue
        inside, parts = layers[i].inside, of.split(".")
        outer = [".".join(parts[:end]) for end in range(layers[i].name.count(".") + 2, len(parts))]
        for name in outer:
            call = inside.once(name)
            if (
                call
                and call.keys[:1] == (0,)
                and call.inputs[0].shape == inside.call(read).inputs[0].shape
            ):
                told = read_layouts(module, {i: (cut, name, name, "")}, batch).get(i)
                if told is not None and torch.equal(told.at, layouts[i].at):
                    found[i] = replace(told, queries=layouts[i].queries)
                    break
    return found


def _addresses(seen: Recording, layer: Layer, key: int | str) -> Address | None:
    """What it takes to read the layout of a layer that may attend within windows.

    `read` is the first of the attention's parts to read as many windows as q has, of as many rows as q or, where
    queries are pooled, k has; `cut` the last module before it that returns a stream: in the block, or the one that
    returns what the block reads.
    """
    hidden, attention = layer.hidden(key), layer.attention
    if attention is None or layer.attends:
        return None
    n_windows, _, n_rows, _ = attention.tensors["q"].shape
    n_keys = attention.tensors["k"].shape[2]
    of = layer.inside.names[attention.module]
    once = [(name, calls[0]) for name, calls in layer.inside.calls.items() if len(calls) == 1]
    reads = [
        (call.inputs[0].shape[1:-1].numel(), call.start, name)
        for name, call in once
        if (name == of or name.startswith(of + "."))
        and call.inputs
        and call.start <= attention.order
        and call.inputs[0].shape[0] == n_windows
        and call.inputs[0].shape[-1] == hidden.shape[-1]
    ]
    pooled = [(start, name) for n, start, name in reads if n == n_keys > n_rows]
    reads = pooled or [(start, name) for n, start, name in reads if n == n_rows]
    if not reads:
        return _chunked(layer, key, of) if _has_windows(layer, key) else None
    start, read = min(reads)
    cuts = [
        (call.order, name)
        for name, call in once
        if call.output is not None
        and call.order <= start
        and call.output.shape[-1] == hidden.shape[-1]
        and call.output.numel() == hidden.numel()
    ]
    cuts = cuts or [
        (calls[0].order, name)
        for name, calls in seen.calls.items()
        if len(calls) == 1
        and calls[0].order <= layer.call.start
        and calls[0].output is not None
        and calls[0].output.shape == hidden.shape
        and torch.equal(calls[0].output, hidden)
    ]
    back = layer.returns if pooled else ""
    return (max(cuts)[1], read, of, back) if cuts else None


def _chunked(layer: Layer, key: int | str, of: str) -> Address | None:
    """The same, `read` empty, of an attention that may cut the projected positions into windows as they come."""
    hidden, attending = layer.hidden(key), layer.inside.once(of)
    cuts = [
        (calls[0].order, name)
        for name, calls in layer.inside.calls.items()
        if len(calls) == 1
        and attending is not None
        and calls[0].order <= attending.start
        and calls[0].output is not None
        and calls[0].output.shape == hidden.shape
    ]
    return (max(cuts)[1], "", of, "") if cuts else None


def _has_windows(layer: Layer, key: int | str) -> bool:
    """Whether its attention has another number of rows of the batch, or of positions, than the stream."""
    if layer.attention is None or layer.placed:
        return False
    n_windows, _, n_rows, _ = layer.attention.tensors["q"].shape
    return (n_windows, n_rows) not in (layer.hidden(key).shape[:2], layer.output.shape[:2])
