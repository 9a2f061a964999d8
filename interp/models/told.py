"""Which position every row of windows holds, told by the positions or the rows themselves.

What is cut into windows is given numbers of its positions, and which row of which window holds one is read where
windows are read. Where queries are pooled inside windows nothing that goes in is one of them: then rows of what
attention returns are given numbers, and at which position one arrives is read where the block returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.models.attention import Watch, window
from interp.models.calls import call_model
from interp.models.layout import Address, Layout
from interp.models.spec import first_tensor, with_first
from interp.run.batch import Batch

BASE = 200
"""Positions are told in digits of this base: bfloat16 counts to 256."""
LOUD = 256.0
"""How many times as large as all that a block returns a number's digits are that are told through it."""
MOST = 62
"""Binary digits of a whole number in 64 bits."""


@torch.no_grad()
def read_layouts(
    module: nn.Module, addresses: Mapping[int, Address], batch: Batch
) -> dict[int, Layout]:
    """The layout of each of these layers, named by `Windows.address`, for inputs of this shape.

    Only layers that show every position once, image after image in the same order. Where no module reads
    windows they hold positions as these come, padding behind them: their number is that of the queries.
    Where windows have queries of their own, every position that the block returns must be one query's.
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

    chunked = {module.get_submodule(of): i for i, (_, read, of, _) in addresses.items() if not read}
    shapes: dict[int, tuple[int, int]] = {}

    def listen(attention: nn.Module) -> Watch:
        return _Shape(chunked[attention], shapes) if attention in chunked else Watch()

    with ExitStack() as stack:
        if chunked:
            stack.enter_context(window(module, listen))
        for layer, (cut, read, _, _) in addresses.items():
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
    pooled = {i: addresses[i] for i in found if addresses[i][3]}
    queries = _queries(module, pooled, {i: len(found[i].at) for i in pooled}, batch)
    whole = {i: replace(found[i], queries=of) for i, of in queries.items()}
    return {i: of for i, of in found.items() if i not in pooled} | whole


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


def _queries(
    module: nn.Module, addresses: Mapping[int, Address], n_windows: Mapping[int, int], batch: Batch
) -> dict[int, Layout]:
    """By layer, which position of what the block returns every row of its attention's output is.

    A row's number is told in binary digits, one a channel, each so large that nothing the block adds hides it.
    """
    if not addresses:
        return {}
    quiet, n_rows = _returned(module, addresses, batch, {})
    size = {i: LOUD * (1 + float(x.abs().max())) for i, x in quiet.items()}
    loud, _ = _returned(module, addresses, batch, size, quiet)
    found = {}
    for i, out in loud.items():
        if out.numel() % (batch.size * out.shape[-1]) or n_rows[i] % (batch.size * n_windows[i]):
            continue  # rows of no image
        digits = ((out - quiet[i]).double() / size[i]).reshape(batch.size, -1, out.shape[-1])
        at = _arrived(digits.cpu(), n_rows[i])
        if at is not None:
            found[i] = Layout(at.reshape(n_windows[i], -1), digits.shape[1], addresses[i][2])
    return found


def _returned(
    module: nn.Module,
    addresses: Mapping[int, Address],
    batch: Batch,
    size: Mapping[int, float],
    instead: Mapping[int, Tensor] | None = None,
) -> tuple[dict[int, Tensor], dict[int, int]]:
    """What each block returns where its attention returns digits of this size, 0 if none; and how many rows that has.

    What goes on is `instead`, so that blocks read the same whatever the one before was told.
    """
    kept: dict[int, Tensor] = {}
    n_rows: dict[int, int] = {}

    def tell(layer: int, output: Any) -> Any:
        out = first_tensor(output)
        assert out is not None
        rows = out.new_zeros(out.shape).reshape(-1, out.shape[-1])
        n_rows[layer] = len(rows)
        numbers = torch.arange(1, len(rows) + 1, device=out.device)[:, None]
        places = torch.arange(min(rows.shape[1], MOST), device=out.device)
        rows[:, : len(places)] = size.get(layer, 0.0) * (numbers >> places & 1).to(out)
        return with_first(output, rows.reshape(out.shape))

    def keep(layer: int, output: Any) -> Any:
        out = first_tensor(output)
        assert out is not None
        kept[layer] = out.clone()
        return with_first(output, instead[layer]) if instead else None

    with ExitStack() as stack:
        for layer, (_, _, of, back) in addresses.items():
            for name, act in ((of, tell), (back, keep)):
                hook = module.get_submodule(name).register_forward_hook(
                    lambda module, args, output, act=act, layer=layer: act(layer, output)
                )
                stack.callback(hook.remove)
        call_model(module, batch)
    return kept, n_rows


def _arrived(digits: Float[Tensor, "batch pos width"], n_rows: int) -> Tensor | None:
    """The position at which each row of one image arrives; None where one has not one row, the same in every image.

    Rows that arrive nowhere are padding: each has a number behind those of positions.
    """
    size, n_pos, width = digits.shape
    told = digits.round()
    if (digits - told).abs().max() > 0.25 or not bool(((told == 0) | (told == 1)).all()):
        return None
    rows = (told[..., :MOST].long() << torch.arange(min(width, MOST))).sum(-1) - 1
    each = n_rows // size
    rows = rows - each * torch.arange(size)[:, None]
    once = len(rows[0].unique()) == n_pos and bool(((rows >= 0) & (rows < each)).all())
    if not once or not torch.equal(rows, rows[:1].expand_as(rows)):
        return None
    at = torch.full((each,), -1)
    at[rows[0]] = torch.arange(n_pos)
    at[at < 0] = n_pos + torch.arange(each - n_pos)
    return at
