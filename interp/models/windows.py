"""Attention within windows: which position each of its rows is, and its activations in the order of positions.

Some blocks cut an image's positions into windows before they attend, after padding or shifting them, and put
the outputs back. Their attention then has a row of the batch for every window. Which position a row holds
is read off a forward in which every position says its number; it depends on the shape of the input alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.attention import Watch, window
from interp.models.calls import call_model
from interp.models.chunks import in_chunks
from interp.models.hooks import RunWatch
from interp.models.layout import ACROSS, PACKED, PARTS, Layout, Windows, layout_of, n_ahead
from interp.models.packed import RowByRow, require_equal_rows
from interp.models.recording import AttentionCall, ModuleCall, Recording, record
from interp.models.spec import Spec, first_tensor, with_first
from interp.models.stack import Layer
from interp.run.batch import Batch

BASE = 200
"""Positions are told in digits of this base: bfloat16 counts to 256."""
MOVED = 1e-3
"""A row has changed if it did by more than this share of the largest number; rounding is far below."""


class InWindows(Watch):
    """Shows a layer's attention to `inner` in the order of positions, and puts what that returns back."""

    at_once = True

    def __init__(self, inner: RunWatch, layout: Layout | Callable[[Tensor], Layout]):
        self.inner, self.needs_rows = inner, inner.needs_rows
        self._layout = layout

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layout = self._layout
        self.layout = layout if isinstance(layout, Layout) else layout(q.transpose(1, 2))
        given = (q, k, v)
        shown = [_of_heads(self.layout, x, padding=x is not q) for x in given]
        new = self.inner.inputs(*shown)
        back = (
            x
            if y is seen
            else self.layout.windows(y.transpose(1, 2), x.transpose(1, 2)).transpose(1, 2)
            for x, y, seen in zip(given, new, shown, strict=True)
        )
        return tuple(back)  # type: ignore[return-value]

    def scores(self, scores: Tensor, start: int) -> Tensor:
        if not self.inner.wants("scores"):
            return scores
        whole = self.layout.rows(scores, -torch.inf)
        return self.layout.rows_of_windows(self.inner.scores(whole, start), scores)

    def pattern(self, pattern: Tensor, start: int) -> Tensor:
        if not self.inner.wants("pattern"):
            return pattern
        whole = self.layout.rows(pattern, 0.0)
        return self.layout.rows_of_windows(self.inner.pattern(whole, start), pattern)

    def z(self, z: Tensor) -> Tensor:
        return self.layout.windows(self.inner.z(self.layout.positions(z)), z)


def _of_heads(layout: Layout, x: Tensor, padding: bool) -> Tensor:
    """[batch·windows heads rows d_head] as [batch heads pos d_head]."""
    return layout.positions(x.transpose(1, 2), padding).transpose(1, 2)


def in_one_row(
    watch: RunWatch, module: nn.Module, axes: tuple[str, ...], layout: Layout | None, size: int
) -> Watch:
    """A watch that is shown each of `size` inputs in one row of its own: not windows, parts, or all in one."""
    watch.n_rows = size
    if axes == PACKED and module not in in_chunks:
        return watch if size == 1 else RowByRow(watch, size)
    if axes in (PARTS, ACROSS) or n_ahead(axes):
        return InWindows(watch, partial(layout_of, axes=axes, size=size))
    return watch if layout is None else InWindows(watch, layout)


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
        if self.addresses and shapes != self._shapes:
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
    must change.
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
    returned: dict[str, list[Tensor]] = {}
    for layer in layers:
        assert layer.call.output is not None
        returned.setdefault(layer.returns, []).append(layer.call.output)
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
        padded = torch.cat([halves[i], torch.zeros(layout.at.numel() - layout.n_pos).bool()])
        wanted = padded[layout.at].repeat(batch.size, 1)
        if before and len(after) == 1 and _moved(before, after[0], wanted):
            found[i] = Windows(*addresses[i][:2], layout)
    return found


def _moved(before: AttentionCall, after: AttentionCall, wanted: Tensor) -> bool:
    """Whether just these rows [windows rows] of q, k and v have changed."""
    for name in ("q", "k", "v"):
        x, y = before.tensors[name].float(), after.tensors[name].float()
        moved = (y - x).abs().amax((1, 3)) > MOVED * x.abs().max()
        if not torch.equal(moved[:, : wanted.shape[1]], wanted):  # other keys come behind
            return False
    return True


def _with_wrappers(
    layouts: Mapping[int, Layout],
    addresses: Mapping[int, tuple[str, str, str]],
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
        cut, read, of = addresses[i]
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
                told = read_layouts(module, {i: (cut, name, name)}, batch).get(i)
                if told is not None and torch.equal(told.at, layouts[i].at):
                    found[i] = told
                    break
    return found


def _addresses(seen: Recording, layer: Layer, key: int | str) -> tuple[str, str, str] | None:
    """(cut, read, attention module) of a layer that may attend within windows.

    `read` is the first of the attention's parts to read as many windows as q has, `cut` the last module
    before it that returns a stream: in the block, or the one that returns what the block reads.
    """
    hidden, attention = layer.hidden(key), layer.attention
    if attention is None or layer.attends:
        return None
    n_windows, _, n_rows, _ = attention.tensors["q"].shape
    of = layer.inside.names[attention.module]
    once = [(name, calls[0]) for name, calls in layer.inside.calls.items() if len(calls) == 1]
    reads = [
        (call.start, name)
        for name, call in once
        if (name == of or name.startswith(of + "."))
        and call.inputs
        and call.start <= attention.order
        and call.inputs[0].shape[0] == n_windows
        and call.inputs[0].shape[1:-1].numel() == n_rows
        and call.inputs[0].shape[-1] == hidden.shape[-1]
    ]
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
    return (max(cuts)[1], read, of) if cuts else None


def _chunked(layer: Layer, key: int | str, of: str) -> tuple[str, str, str] | None:
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
    return (max(cuts)[1], "", of) if cuts else None


def _has_windows(layer: Layer, key: int | str) -> bool:
    """Whether its attention has another number of rows of the batch, or of positions, than the stream."""
    if layer.attention is None:
        return False
    n_windows, _, n_rows, _ = layer.attention.tensors["q"].shape
    return (n_windows, n_rows) not in (layer.hidden(key).shape[:2], layer.output.shape[:2])


@torch.no_grad()
def read_layouts(
    module: nn.Module, addresses: Mapping[int, tuple[str, str, str]], batch: Batch
) -> dict[int, Layout]:
    """The layout of each of these layers, named by `Windows.address`, for inputs of this shape.

    Only layers that show every position once, image after image in the same order. Where no module reads
    windows they hold positions as these come, padding behind them: their number is that of the queries.
    """
    seen: dict[int, Tensor] = {}
    n_pos: dict[int, int] = {}

    def tell(layer: int, output: Any) -> Any:
        out = first_tensor(output)
        assert out is not None
        codes = out.new_zeros(out.shape).reshape(batch.size, -1, out.shape[-1])
        n_pos[layer] = codes.shape[1]
        at = torch.arange(codes.shape[1], device=out.device)
        codes[..., 0], codes[..., 1] = (at // BASE).to(out), (at % BASE).to(out)
        codes[..., 2] = 1 + torch.arange(batch.size, device=out.device)[:, None].to(out)
        return with_first(output, codes.reshape(out.shape))

    def keep(layer: int, args: tuple, kwargs: dict) -> None:
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        read = next(x for x in given if x.is_floating_point())
        seen[layer] = read.flatten(1, -2)[..., :3].cpu().double()

    chunked = {module.get_submodule(of): i for i, (_, read, of) in addresses.items() if not read}
    shapes: dict[int, tuple[int, int]] = {}

    def listen(attention: nn.Module) -> Watch:
        return _Shape(chunked[attention], shapes) if attention in chunked else Watch()

    with ExitStack() as stack:
        if chunked:
            stack.enter_context(window(module, listen))
        for layer, (cut, read, _) in addresses.items():
            hook = module.get_submodule(cut).register_forward_hook(
                lambda module, args, output, layer=layer: tell(layer, output)
            )
            stack.callback(hook.remove)
            if not read:
                continue
            hook = module.get_submodule(read).register_forward_pre_hook(
                lambda module, args, kwargs, layer=layer: keep(layer, args, kwargs),
                with_kwargs=True,
            )
            stack.callback(hook.remove)
        call_model(module, batch)
    found = {}
    for i, codes in seen.items():
        at = _told(codes, n_pos[i], batch.size)
        if at is not None:
            found[i] = Layout(at, n_pos[i], addresses[i][2])
    for i, (rows, length) in shapes.items():
        n_windows = rows // batch.size
        if (n_windows - 1) * length < n_pos[i] <= n_windows * length and rows % batch.size == 0:
            at = torch.arange(n_windows * length).reshape(n_windows, length)
            found[i] = Layout(at, n_pos[i], addresses[i][2])
    return found


class _Shape(Watch):
    """Notes how many rows and queries an attention has."""

    def __init__(self, layer: int, shapes: dict[int, tuple[int, int]]):
        self.layer, self.shapes = layer, shapes

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.shapes[self.layer] = (q.shape[0], q.shape[2])
        return q, k, v


def _told(codes: Float[Tensor, "windows rows 3"], n_pos: int, size: int) -> Tensor | None:
    """The position that every row of one image's windows tells; None where rows say something else."""
    if len(codes) % size:
        return None
    shape = (len(codes) // size, codes.shape[1])
    high, low, image = codes.reshape(size, -1, 3).unbind(-1)
    is_padding = image == 0
    at = high * BASE + low
    same = torch.equal(at, at[:1].expand_as(at)) and bool((is_padding == is_padding[:1]).all())
    mine = is_padding | (image == 1 + torch.arange(size)[:, None])
    if not same or not bool(mine.all()):
        return None
    at, is_padding = at[0].long(), is_padding[0]
    at[is_padding] = n_pos + torch.arange(int(is_padding.sum()))
    numbers = torch.arange(
        max(n_pos, shape[0] * shape[1])
    )  # queries of every other position are no windows
    if not torch.equal(at.sort().values, numbers):
        return None
    return at.reshape(shape)


def attention_in_order(layer: Layer, layout: Layout) -> Layer:
    """The layer with its attention in the order of positions."""
    of = layer.attention
    assert of is not None
    size = len(of.tensors["q"]) // len(layout.at)
    tensors = {name: _of_heads(layout, of.tensors[name], name != "q") for name in ("q", "k", "v")}
    tensors["z"] = layout.positions(of.tensors["z"])
    # Patterns of all images and heads would be large; whether any sees a key is all that is asked of them.
    most = torch.cat(of.rows, 2).unflatten(0, (size, -1)).amax((0, 2))
    rows = [layout.rows(most[:, None], 0.0)]
    attention = AttentionCall(of.module, of.order, None, tensors, rows)
    others = [attention if call is of else call for call in layer.inside.attention]
    return replace(layer, inside=replace(layer.inside, attention=others), attention=attention)


def in_order(layer: Layer, layout: Layout) -> Layer:
    """The layer with everything that it holds in windows in the order of positions."""
    assert layer.attention is not None
    size = len(layer.attention.tensors["q"]) // len(layout.at)

    def shown(name: str, x: Tensor) -> Tensor:
        return layout.positions(x.flatten(1, -2)) if layout.holds(name, x, size) else x

    def seen(name: str, call: ModuleCall) -> ModuleCall:
        inputs = [shown(name, x) for x in call.inputs]
        output = None if call.output is None else shown(name, call.output)
        return replace(call, inputs=inputs, output=output)

    inside = layer.inside.calls.items()
    calls = {name: [seen(name, call) for call in calls] for name, calls in inside}
    layer = attention_in_order(layer, layout)
    return replace(layer, inside=replace(layer.inside, calls=calls))
