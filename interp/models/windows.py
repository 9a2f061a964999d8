"""Attention within windows: which position each of its rows is, and its activations in the order of positions.

Some blocks cut an image's positions into windows before they attend, after padding or shifting them, and put
the outputs back. Their attention then has a row of the batch for every window. Which position a row holds
is read off a forward in which every position says its number; it depends on the shape of the input alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
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
    Layout,
    layout_of,
    n_ahead,
    require_between_seen,
)
from interp.models.packed import RowByRow, require_equal_rows
from interp.models.recording import AttentionCall, ModuleCall
from interp.models.spec import Spec
from interp.models.stack import Layer
from interp.models.told import read_layouts
from interp.run.batch import Batch


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
