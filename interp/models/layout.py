"""How blocks hold the hidden state, and the one shape in which sites show it: [batch pos d_model].

Most blocks hold it so. Some carry several residual streams side by side (hyper-connections, AltUp): one
stream after the other makes one vector of n_streams · width entries. Images may keep their rows and
columns apart, before or behind the channels: they are positions, row after row. For attention a block may
cut them into windows (`Layout`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.run.batch import Batch

PLAIN = ("batch", "pos", "d_model")
STREAMS = (("batch", "pos", "n_streams", "d_model"), ("n_streams", "batch", "pos", "d_model"))
IMAGE = ("batch", "height", "width", "d_model")
CHANNELS_FIRST = ("batch", "d_model", "height", "width")


def axes_of(shape: torch.Size, batch: Batch) -> tuple[str, ...] | None:
    """Names of the axes of a hidden state of this shape, None where they cannot be told."""
    if len(shape) == 3:
        return PLAIN
    if len(shape) != 4:
        return None
    if "input_ids" not in batch.inputs:
        return IMAGE if shape[0] == batch.size else None
    rows, length = batch.ids.shape[:2]
    for axes in STREAMS:
        if (shape[axes.index("batch")], shape[axes.index("pos")]) == (rows, length):
            return axes
    return None


def shown(x: Tensor, axes: tuple[str, ...]) -> Tensor:
    """A block's hidden state as sites show it [batch pos d_model]: a view where it can be one.

    >>> shown(torch.arange(8.0).reshape(2, 1, 1, 4), STREAMS[1])
    tensor([[[0., 1., 2., 3., 4., 5., 6., 7.]]])
    """
    if axes == PLAIN:
        return x
    if axes == IMAGE:
        return x.flatten(1, 2)
    if axes == CHANNELS_FIRST:
        return x.flatten(2).mT
    return x.movedim(axes.index("n_streams"), -2).flatten(-2)


def held(x: Tensor, axes: tuple[str, ...], like: Sequence[int]) -> Tensor:
    """The inverse of `shown`: as a block holds it, where a hidden state has shape `like` (of any number of rows)."""
    if axes == PLAIN:
        return x
    if axes == IMAGE:
        return x.reshape(-1, *like[1:])
    if axes == CHANNELS_FIRST:
        return x.mT.reshape(-1, *like[1:])
    where = axes.index("n_streams")
    return x.unflatten(-1, (like[where], like[-1])).movedim(-2, where)


@dataclass(frozen=True, eq=False)
class Layout:
    """Which position every row of every window holds; numbers from `n_pos` on are padding, each its own.

    `of` is the attention module, whose parts return windows.

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

    def holds(self, name: str, x: Tensor, size: int) -> bool:
        """Whether what a module read or returned is of the windows of `size` images."""
        n_windows, n_rows = self.at.shape
        if (n_windows, n_rows) == (1, self.n_pos) and not f"{name}.".startswith(f"{self.of}."):
            return False  # nothing but the order tells one window from the stream
        some = x.ndim > 2 and x.shape[0] == size * n_windows
        return some and x.shape[1:-1].numel() == n_rows

    def positions(self, x: Tensor, padding: bool = False) -> Tensor:
        """[batch·windows rows …] as [batch pos …], or with what is padding behind the positions."""
        order = self.at.flatten().argsort()
        order = (order if padding else order[: self.n_pos]).to(x.device)
        return x.reshape(-1, self.at.numel(), *x.shape[2:])[:, order]

    def windows(self, x: Tensor, before: Tensor) -> Tensor:
        """The inverse: [batch pos …] as [batch·windows rows …], with the padding of `before` if x has none."""
        if x.shape[1] == self.n_pos < self.at.numel():
            x = torch.cat([x, self.positions(before, padding=True)[:, self.n_pos :]], 1)
        return x[:, self.at.flatten().to(x.device)].reshape(before.shape)

    def rows(self, x: Float[Tensor, "windows heads q k"], fill: float) -> Tensor:
        """Scores or patterns as [batch heads query_pos key_pos], `fill` between windows; keys with padding."""
        queries, keys = self._pairs(x.device)
        size = self.at.numel()
        x = x.unflatten(0, (-1, len(self.at))).transpose(1, 2)
        whole = x.new_full((*x.shape[:2], size, size), fill)
        whole[:, :, queries, keys] = x
        return whole[:, :, : self.n_pos]

    def rows_of_windows(self, x: Tensor, before: Tensor) -> Float[Tensor, "windows heads q k"]:
        """The inverse; queries that are padding keep their rows of `before`."""
        queries, keys = self._pairs(x.device)
        x = x[:, :, queries.clamp_max(self.n_pos - 1), keys].transpose(1, 2).flatten(0, 1)
        padding = (queries >= self.n_pos).repeat(len(before) // len(self.at), 1, 1)
        return torch.where(padding[:, None], before, x)

    def _pairs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        at = self.at.to(device)
        return at[:, :, None], at[:, None, :]


@dataclass(frozen=True, eq=False)
class Windows:
    """Where a block cuts positions into windows: `cut` returns what is cut, `read` reads the windows.

    `layout` is that of the probe; an input of another shape has another.
    """

    cut: str
    read: str
    layout: Layout

    @property
    def address(self) -> tuple[str, str, str]:
        """What it takes to read another layout: (cut, read, attention module)."""
        return self.cut, self.read, self.layout.of
