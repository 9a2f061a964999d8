"""Attention within windows: which position each of its rows is, and its activations in the order of positions.

Some blocks cut an image's positions into windows before they attend, after padding or shifting them, and put
the outputs back. Their attention then has a row of the batch for every window. Which position a row holds
is read off a forward in which every position says its number; it depends on the shape of the input alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.attention import Watch
from interp.models.chunks import in_chunks
from interp.models.hooks import RunWatch
from interp.models.layout import (
    ACROSS,
    CHANNELS_FIRST,
    IMAGE,
    PACKED,
    PARTS,
    Address,
    Layout,
    Windows,
    layout_of,
    n_ahead,
    require_between_seen,
    shown,
)
from interp.models.packed import RowByRow, require_equal_rows
from interp.models.recording import AttentionCall, ModuleCall, Recording, record
from interp.models.spec import Spec
from interp.models.stack import Layer, calls_of, outputs_of
from interp.models.told import read_layouts
from interp.run.batch import Batch

MOVED = 1e-3
"""A row has changed if it did by more than this share of the largest number; rounding is far below."""


class InWindows(Watch):
    """Shows a layer's attention to `inner` in the order of positions, and puts what that returns back."""

    at_once = True

    def __init__(self, inner: RunWatch, layout: Layout | Callable[[Tensor, Tensor], Layout]):
        self.inner, self.needs_rows = inner, inner.needs_rows
        self._layout = layout

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layout = self._layout
        self.layout = layout if isinstance(layout, Layout) else layout(q, k)
        given = (q, k, v)
        of = (self.layout.of_queries, self.layout, self.layout)
        shown = [
            _of_heads(layout, x, padding=x is not q) for layout, x in zip(of, given, strict=True)
        ]
        new = self.inner.inputs(*shown)
        back = (
            x if y is seen else layout.windows(y.transpose(1, 2), x.transpose(1, 2)).transpose(1, 2)
            for layout, x, y, seen in zip(of, given, new, shown, strict=True)
        )
        return tuple(back)  # type: ignore[return-value]

    def scores(self, scores: Tensor, start: int) -> Tensor:
        return self._rows("scores", self.inner.scores, scores, start, -torch.inf)

    def pattern(self, pattern: Tensor, start: int) -> Tensor:
        return self._rows("pattern", self.inner.pattern, pattern, start, 0.0)

    def _rows(
        self, which: str, inner: Callable[..., Tensor], x: Tensor, start: int, fill: float
    ) -> Tensor:
        if not self.inner.wants(which):
            return x
        whole = self.layout.rows(x, fill)
        new = inner(whole, start)
        back = self.layout.rows_of_windows(new, x)
        if new is not whole:
            place = f"'{self.inner.prefix}{which}.{self.inner.layer}'"
            require_between_seen(new, self.layout.rows(back, fill), place)
        return back

    def z(self, z: Tensor) -> Tensor:
        layout = self.layout.of_queries
        return layout.windows(self.inner.z(layout.positions(z)), z)


def _of_heads(layout: Layout, x: Tensor, padding: bool) -> Tensor:
    """[batch·windows heads rows d_head] as [batch heads pos d_head]."""
    return layout.positions(x.transpose(1, 2), padding).transpose(1, 2)


def in_one_row(
    watch: RunWatch, module: nn.Module, axes: tuple[str, ...], layout: Layout | None, size: int
) -> Watch:
    """A watch that is shown each of `size` inputs in one row of its own: not windows, parts, or all in one."""
    watch.n_rows = size
    if watch.part is not None and watch.part.place is not None:
        return watch
    if axes == PACKED and module not in in_chunks:
        return watch if size == 1 else RowByRow(watch, size)
    if axes in (PARTS, ACROSS) or n_ahead(axes):
        return InWindows(watch, partial(of_parts, axes=axes, size=size))
    watch.row_by_row = layout is None and axes in (IMAGE, CHANNELS_FIRST)  # positions have two axes
    return watch if layout is None else InWindows(watch, layout)


def of_parts(q: Tensor, k: Tensor, axes: tuple[str, ...], size: int) -> Layout:
    """The layout of an attention that has several rows for each of `size` inputs; each may see a part of a source,
    the positions of which are those of its parts, one part after the other."""
    queries = layout_of(q.transpose(1, 2), axes, size)
    if axes != PARTS or k.shape[2] == q.shape[2]:
        return queries
    return replace(layout_of(k.transpose(1, 2), PARTS, size), queries=queries)


class Layouts:
    """By layer, the layout of inputs of one shape: that of the latest.

    It is read again when the shape changes, since modules may go on cutting as the last image asked for.
    """

    def __init__(self, module: nn.Module, spec: Spec):
        self.module, self.spec = module, spec
        self.addresses = {
            layer: block.windows.address
            for layer, block in enumerate(spec.blocks)
            if block.windows is not None
        }
        self._shapes: dict[str, torch.Size] = {}
        self._found: dict[int, Layout] = {}

    def of(self, batch: Batch) -> dict[int, Layout]:
        """Layouts for inputs of this shape.

        Raises:
            Refused: windows of this shape do not hold every position once.
            BadInput: all rows are packed into one and are not equally long.
        """
        require_equal_rows(self.module, self.spec, batch)
        shapes = {name: x.shape[1:] for name, x in batch.inputs.items()}
        same = shapes == self._shapes and not batch.objects  # whose shapes are not known
        if self.addresses and not same:
            found = read_layouts(self.module, self.addresses, batch.rows(slice(0, 1)))
            if missing := sorted(self.addresses.keys() - found.keys()):
                raise Refused(
                    f"layer {missing[0]} attends in windows, and which positions they hold in inputs of "
                    f"shape {[list(shape) for shape in shapes.values()]} was not found; give inputs of the "
                    "size that the model's config names"
                )
            self._shapes, self._found = shapes, found
        return self._found


# --- the probe ------------------------------------------------------------------------------------


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


def attention_in_order(layer: Layer, layout: Layout) -> Layer:
    """The layer with its attention in the order of positions."""
    of = layer.attention
    assert of is not None
    attention = _call_in_order(of, layout)
    others = [attention if call is of else call for call in layer.inside.attention]
    return replace(layer, inside=replace(layer.inside, attention=others), attention=attention)


def crosses_in_order(layer: Layer, size: int) -> Layer:
    """The layer, which has several rows for each of `size` inputs, with its attention to sources in that order."""
    made = {
        id(call): _call_in_order(
            call, of_parts(call.tensors["q"], call.tensors["k"], layer.axes, size)
        )
        for call in layer.crosses
    }
    others = [made.get(id(call), call) for call in layer.inside.attention]
    crosses = tuple(made[id(call)] for call in layer.crosses)
    return replace(layer, inside=replace(layer.inside, attention=others), crosses=crosses)


def _call_in_order(of: AttentionCall, layout: Layout) -> AttentionCall:
    size = len(of.tensors["q"]) // len(layout.at)
    tensors = {name: _of_heads(layout, of.tensors[name], padding=True) for name in ("k", "v")}
    tensors["q"] = _of_heads(layout.of_queries, of.tensors["q"], padding=False)
    tensors["z"] = layout.of_queries.positions(of.tensors["z"])
    # Patterns of all images and heads would be large; whether any sees a key is all that is asked of them.
    most = torch.cat(of.rows, 2).unflatten(0, (size, -1)).amax((0, 2))
    rows = [layout.rows(most[:, None], 0.0)]
    return AttentionCall(of.module, of.order, None, tensors, rows)


def in_order(layer: Layer, layout: Layout) -> Layer:
    """The layer with everything that it holds in windows in the order of positions."""
    assert layer.attention is not None
    size = len(layer.attention.tensors["q"]) // len(layout.at)

    def ordered(name: str, x: Tensor) -> Tensor:
        held_in = layout.holding(name, x, size)
        return x if held_in is None else held_in.positions(x.flatten(1, -2))

    def seen(name: str, call: ModuleCall) -> ModuleCall:
        inputs = [ordered(name, x) for x in call.inputs]
        output = None if call.output is None else ordered(name, call.output)
        return replace(call, inputs=inputs, output=output)

    inside = layer.inside.calls.items()
    calls = {name: [seen(name, call) for call in calls] for name, calls in inside}
    layer = attention_in_order(layer, layout)
    return replace(layer, inside=replace(layer.inside, calls=calls))
