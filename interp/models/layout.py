"""How blocks hold the hidden state, and the one shape in which sites show it: [batch pos d_model].

Most blocks hold it so. Some have the positions first, some the channels before the positions. Some carry
several residual streams side by side (hyper-connections, AltUp): one stream after the other makes one vector
of n_streams · width entries. Images may keep their rows and columns apart, before or behind the channels:
they are positions, row after row. Blocks on videos may have a row of the batch for every frame, or for every
place in a frame: positions are places, frame after frame. All rows of a batch may lie one after the other in
a single one. Positions of the model's own, prompts that it has learnt, may stand before the tokens': they are
shown behind them. For attention a block may cut positions into windows (`Layout`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import BadInput, Refused
from interp.run.batch import Batch

PLAIN = ("batch", "pos", "d_model")
STREAMS = (("batch", "pos", "n_streams", "d_model"), ("n_streams", "batch", "pos", "d_model"))
IMAGE = ("batch", "height", "width", "d_model")
CHANNELS_FIRST = ("batch", "d_model", "height", "width")
POSITIONS_FIRST = ("pos", "batch", "d_model")
PARTS = ("batch·part", "pos", "d_model")
"""A row for each part of an input: its positions are those of the parts, one part after the other."""
ACROSS = ("batch·pos", "part", "d_model")
"""A row for each position in a part: what stands there in all parts."""
PARTED = ("batch", "part", "d_model", "height", "width")
"""Parts of an input apart, channels before positions: its positions are those of the parts, one part after the other.
A module inside has a row for each part, or is called once for each."""
CHANNELS_BEFORE = ("batch", "d_model", "pos")
PACKED = ("one", "batch·pos", "d_model")
"""All rows of the batch one after the other; a module inside may leave out the first axis."""
FLAT = ("batch·pos", "d_model")
"""The same without that axis."""

ONE_AFTER_THE_OTHER = (PACKED, FLAT)
ROWS_ELSEWHERE = (POSITIONS_FIRST, PARTS, ACROSS, *ONE_AFTER_THE_OTHER)
"""Axes whose first is not the batch."""
AHEAD = " ahead·pos"


def with_others_ahead(n: int) -> tuple[str, ...]:
    """Axes of blocks that hold `n` positions of the model's own (prompts that it has learnt) before the tokens'.

    Shown behind them, so that a token's position is its number.

    >>> n_ahead(with_others_ahead(32)), n_ahead(PLAIN)
    (32, 0)
    """
    return ("batch", f"{n}{AHEAD}", "d_model") if n else PLAIN


def n_ahead(axes: tuple[str, ...]) -> int:
    """How many positions of the model's own stand before the tokens'."""
    return int(axes[1].removesuffix(AHEAD)) if axes[1].endswith(AHEAD) else 0


def as_held_inside(axes: tuple[str, ...]) -> bool:
    """Whether modules inside a block hold rows, positions or channels elsewhere, as the block itself does."""
    elsewhere = (*ROWS_ELSEWHERE, PARTED)
    return axes in elsewhere or (read_in_plain_order(axes) and axes != PLAIN)


def read_in_plain_order(axes: tuple[str, ...]) -> bool:
    """Whether what comes behind the blocks reads the tokens' positions as sites show them."""
    return axes in (PLAIN, CHANNELS_BEFORE) or n_ahead(axes) > 0


def require_rows_first(blocks: Iterable[tuple[str, ...]], what: str) -> None:
    """Refuse `what`, which takes the first axis of blocks' tensors for the batch, where it is another."""
    for axes in blocks:
        if as_held_inside(axes):
            raise Refused(
                f"a block holds its stream as [{', '.join(axes)}], which {what} does not know; model.run with "
                "captures and edits works"
            )


def require_tokens_alone(axes: tuple[str, ...], what: str) -> None:
    """Refuse `what`, which takes positions for tokens, where a model puts some of its own before them."""
    if n := n_ahead(axes):
        raise Refused(
            f"the model puts {n} positions of its own before every text, which {what} does not know; model.run with "
            "captures and edits, lenses and scores of heads work"
        )


def axes_of(shape: torch.Size, batch: Batch) -> tuple[str, ...] | None:
    """Names of the axes of a hidden state of this shape, None where they cannot be told."""
    if len(shape) == 3:
        return PLAIN
    if len(shape) == len(PARTED) and "input_ids" not in batch.inputs and shape[0] == batch.size:
        return PARTED
    if len(shape) != 4:
        return None
    if "input_ids" not in batch.inputs:
        return IMAGE if shape[0] == batch.size else None
    rows, length = batch.ids.shape[:2]
    for axes in STREAMS:
        if (shape[axes.index("batch")], shape[axes.index("pos")]) == (rows, length):
            return axes
    return None


def shown(x: Tensor, axes: tuple[str, ...], size: int) -> Tensor:
    """A block's hidden state, of `size` inputs, as sites show it [batch pos d_model]: a view where it can be one.

    >>> shown(torch.arange(8.0).reshape(2, 1, 1, 4), STREAMS[1], 1)
    tensor([[[0., 1., 2., 3., 4., 5., 6., 7.]]])
    >>> shown(torch.arange(6.0).reshape(2, 3, 1), ACROSS, 1)[..., 0]
    tensor([[0., 3., 1., 4., 2., 5.]])
    """
    if axes == PLAIN:
        return x
    if axes == POSITIONS_FIRST:
        return x.transpose(0, 1)
    if axes == CHANNELS_BEFORE:
        return x.mT
    if n := n_ahead(axes):
        return x.roll(-n, 1)
    if axes in (PARTS, ACROSS):
        return layout_of(x, axes, size).positions(x)
    if axes in ONE_AFTER_THE_OTHER:
        return x.reshape(size, -1, x.shape[-1])
    if axes == IMAGE:
        return x.flatten(1, 2)
    if axes == CHANNELS_FIRST:
        return x.flatten(2).mT
    if axes == PARTED:
        return x.flatten(3).mT.flatten(1, 2)
    return x.movedim(axes.index("n_streams"), -2).flatten(-2)


def held(x: Tensor, axes: tuple[str, ...], like: Sequence[int]) -> Tensor:
    """The inverse of `shown`: as a block holds it, where a hidden state has shape `like` (of any number of rows)."""
    if axes == PLAIN:
        return x
    if axes == POSITIONS_FIRST:
        return x.transpose(0, 1)
    if axes == CHANNELS_BEFORE:
        return x.mT
    if axes == ACROSS:
        x = x.unflatten(1, (like[1], -1)).transpose(1, 2)
    if n := n_ahead(axes):
        return x.roll(n, 1)
    if axes in (IMAGE, PARTS, ACROSS):
        return x.reshape(-1, *like[1:])
    if axes in ONE_AFTER_THE_OTHER:
        return x.reshape(*like[:-2], -1, like[-1])
    if axes == CHANNELS_FIRST:
        return x.mT.reshape(-1, *like[1:])
    if axes == PARTED:
        return x.unflatten(1, (like[1], -1)).mT.reshape(-1, *like[1:])
    where = axes.index("n_streams")
    return x.unflatten(-1, (like[where], like[-1])).movedim(-2, where)


@dataclass(frozen=True, eq=False)
class Layout:
    """Which position every row of every window holds; numbers from `n_pos` on are padding, each its own.

    `of` is the attention module, whose parts return windows. Keys of a single window that are none of its rows'
    (global ones) stand behind all rows. `queries`: where a window has other queries than keys (pooled ones), their
    layout: which position of what the block returns every row of q, pattern and z is.

    >>> layout = Layout(torch.tensor([[1, 2], [0, 3]]), 3)
    >>> windows = torch.tensor([[10, 20], [0, -1]])  # one image
    >>> layout.positions(windows), layout.positions(windows, padding=True)
    (tensor([[ 0, 10, 20]]), tensor([[ 0, 10, 20, -1]]))
    >>> layout.windows(torch.tensor([[5, 6, 7]]), windows)
    tensor([[ 6,  7],
            [ 5, -1]])
    """

    at: Int[Tensor, "windows rows"]
    n_pos: int
    of: str = ""
    queries: Layout | None = None

    @property
    def of_queries(self) -> Layout:
        """The layout of queries: that of keys, in most models."""
        return self.queries or self

    def holding(self, name: str, x: Tensor, size: int) -> Layout | None:
        """The layout, of keys or of queries, of what a module holds for `size` images; None if of neither."""
        kinds = (self, self.of_queries)
        return next((kind for kind in kinds if kind._holds(name, x, size)), None)

    def _holds(self, name: str, x: Tensor, size: int) -> bool:
        n_windows, n_rows = self.at.shape
        if (n_windows, n_rows) == (1, self.n_pos) and not f"{name}.".startswith(f"{self.of}."):
            return False  # nothing but the order tells one window from the stream
        some = x.ndim > 2 and x.shape[0] == size * n_windows
        return some and x.shape[1:-1].numel() == n_rows

    def positions(self, x: Tensor, padding: bool = False) -> Tensor:
        """[batch·windows rows …] as [batch pos …], or with what is padding behind the positions."""
        at = self._with_others(x.shape[1])
        order = at.flatten().argsort()
        order = (order if padding else order[: self.n_pos]).to(x.device)
        return x.reshape(-1, at.numel(), *x.shape[2:])[:, order]

    def windows(self, x: Tensor, before: Tensor) -> Tensor:
        """The inverse: [batch pos …] as [batch·windows rows …], with the padding of `before` if x has none."""
        at = self._with_others(before.shape[1])
        if x.shape[1] == self.n_pos < at.numel():
            x = torch.cat([x, self.positions(before, padding=True)[:, self.n_pos :]], 1)
        return x[:, at.flatten().to(x.device)].reshape(before.shape)

    def rows(self, x: Float[Tensor, "windows heads q k"], fill: float) -> Tensor:
        """Scores or patterns as [batch heads query_pos key_pos], `fill` between windows; keys with padding."""
        queries, keys = self._pairs(x)
        sizes = (queries.numel(), keys.numel())
        x = x.unflatten(0, (-1, len(self.at))).transpose(1, 2)
        whole = x.new_full((*x.shape[:2], *sizes), fill)
        whole[:, :, queries, keys] = x
        return whole[:, :, : self.of_queries.n_pos]

    def rows_of_windows(self, x: Tensor, before: Tensor) -> Float[Tensor, "windows heads q k"]:
        """The inverse; queries that are padding keep their rows of `before`."""
        queries, keys = self._pairs(before)
        n_pos = self.of_queries.n_pos
        x = x[:, :, queries.clamp_max(n_pos - 1), keys].transpose(1, 2).flatten(0, 1)
        padding = (queries >= n_pos).repeat(len(before) // len(self.at), 1, 1)
        return torch.where(padding[:, None], before, x)

    def _pairs(self, x: Float[Tensor, "windows heads q k"]) -> tuple[Tensor, Tensor]:
        queries, keys = self.of_queries.at.to(x.device), self._with_others(x.shape[3]).to(x.device)
        return queries[:, :, None], keys[:, None, :]

    def _with_others(self, n: int) -> Int[Tensor, "windows keys"]:
        """`at`, and what of n keys is none of the rows'."""
        if len(self.at) > 1 or n <= self.at.shape[1]:
            return self.at
        return torch.cat([self.at, torch.arange(self.at.shape[1], n)[None]], 1)


def require_between_seen(edited: Tensor, taken: Tensor, of: str) -> None:
    """BadInput where scores or a pattern were edited between a query and a key that the model never compares.

    `taken` is what it can make use of; a rest that was left out would stand in the cache all the same.
    """
    if not bool(((edited == taken) | (edited.isnan() & taken.isnan())).all()):
        raise BadInput(
            f"the edit of {of} has values where queries see no key (of another window, block or part): leave scores of "
            "-inf and weights of 0 there as they are, such as torch.where(x == 0, x, new)"
        )


def layout_of(x: Tensor, axes: tuple[str, ...], size: int) -> Layout:
    """The layout of tensors [rows pos …] of a block that has several rows for each of `size` inputs.

    >>> layout_of(torch.zeros(4, 3, 1), ACROSS, 2).at
    tensor([[0, 2, 4],
            [1, 3, 5]])
    """
    rows, length = x.shape[0] // size, x.shape[1]
    at = torch.arange(rows * length)
    if n := n_ahead(axes):
        return Layout(at.roll(n)[None], length)
    return Layout(
        at.reshape(length, rows).T if axes == ACROSS else at.reshape(rows, length), len(at)
    )


def shown_inside(x: Tensor, axes: tuple[str, ...], size: int) -> Tensor:
    """What a module inside a block reads or returns, of `size` inputs, as [batch pos width], flattened or not."""
    if axes == POSITIONS_FIRST and x.ndim == 2:
        x = x.unflatten(0, (-1, size))
    if n_ahead(axes):
        return shown(x.reshape(size, -1, x.shape[-1]), axes, size)
    if axes == PARTED:
        return x.reshape(size, -1, x.shape[-1])
    if as_held_inside(axes):
        return shown(x, axes, size)
    return x if x.ndim == 3 else x.reshape(size, -1, x.shape[-1])


def held_inside(x: Tensor, axes: tuple[str, ...], like: Sequence[int]) -> Tensor:
    """The inverse of `shown_inside`: in the shape `like`."""
    if as_held_inside(axes) and axes != PARTED:
        x = held(x, axes, like)
    return x.reshape(tuple(like))


Address = tuple[str, str, str, str]
"""What it takes to read a layout: (cut, read, attention module, back)."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Where a block cuts positions into windows: `cut` returns what is cut, `read` reads the windows.

    `back` returns positions again, where windows have queries of their own: "" where these are their keys' positions.
    `layout` is that of the probe; an input of another shape has another.
    """

    cut: str
    read: str
    layout: Layout
    back: str = ""

    @property
    def address(self) -> Address:
        """What it takes to read another layout."""
        return self.cut, self.read, self.layout.of, self.back
