"""How blocks hold the hidden state, and the one shape in which sites show it: [batch pos d_model].

Most blocks hold it so. Some carry several residual streams side by side (hyper-connections, AltUp): one
stream after the other makes one vector of n_streams · width entries. Images may keep their rows and
columns apart: they are positions, row after row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from interp.run.batch import Batch

PLAIN = ("batch", "pos", "d_model")
STREAMS = (("batch", "pos", "n_streams", "d_model"), ("n_streams", "batch", "pos", "d_model"))
IMAGE = ("batch", "height", "width", "d_model")


def axes_of(shape: torch.Size, batch: Batch) -> tuple[str, ...] | None:
    """Names of the axes of a hidden state of this shape, None where they cannot be told."""
    if len(shape) == 3:
        return PLAIN
    if len(shape) != 4:
        return None
    if "input_ids" not in batch.inputs:
        return IMAGE if shape[0] == batch.size else None
    rows, length = batch.ids.shape
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
    return x.movedim(axes.index("n_streams"), -2).flatten(-2)


def held(x: Tensor, axes: tuple[str, ...], like: Sequence[int]) -> Tensor:
    """The inverse of `shown`: as a block holds it, where a hidden state has shape `like` (of any number of rows)."""
    if axes == PLAIN:
        return x
    if axes == IMAGE:
        return x.reshape(-1, *like[1:])
    where = axes.index("n_streams")
    return x.unflatten(-1, (like[where], like[-1])).movedim(-2, where)
