"""Blocks that hold all rows of a batch one after the other in a single one: their attention, row by row.

A mask keeps each row's queries to its own keys, so a pattern over all positions has a block on its diagonal
for every row, and zeros elsewhere. Sites show these blocks; that nothing lies elsewhere is looked at wherever a
pattern is formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.errors import BadInput, Refused
from interp.models.attention import Watch
from interp.models.calls import call_model
from interp.models.chunks import rows_apart
from interp.models.hooks import RunWatch, Stop, argument
from interp.models.layout import ONE_AFTER_THE_OTHER, shown
from interp.models.spec import Spec
from interp.models.stack import Layer
from interp.run.batch import Batch


def diagonal_blocks(
    x: Float[Tensor, "one heads all_q all_k"], size: int
) -> Float[Tensor, "batch heads q k"]:
    """The blocks on the diagonal of scores or patterns over all positions of `size` equally long rows: a view.

    >>> diagonal_blocks(torch.arange(16.0).reshape(1, 1, 4, 4), 2)[:, 0].flatten(1)
    tensor([[ 0.,  1.,  4.,  5.],
            [10., 11., 14., 15.]])
    """
    whole = x[0].unflatten(2, (size, -1)).unflatten(1, (size, -1))
    return whole.diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)


def require_apart(pattern: Float[Tensor, "one heads all_q all_k"], size: int, name: str) -> None:
    """Refused where a row attends to another."""
    own = diagonal_blocks(pattern, size)
    if torch.count_nonzero(pattern) != torch.count_nonzero(own):
        raise Refused(
            f"'{name}' holds all {size} rows of the batch in one and attends from one to another: no pattern is "
            "of one row alone; give the rows one by one"
        )


class RowByRow(Watch):
    """Shows a layer's attention to `inner` with the rows of the batch apart, and puts what that returns back."""

    at_once = True

    def __init__(self, inner: RunWatch, size: int):
        self.inner, self.size, self.needs_rows = inner, size, inner.needs_rows

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        new = self.inner.inputs(*(rows_apart(x, self.size) for x in (q, k, v)))
        q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in new)
        return q, k, v

    def scores(self, scores: Tensor, start: int) -> Tensor:
        if not self.inner.wants("scores"):
            return scores
        mine = diagonal_blocks(scores, self.size).contiguous()
        return _with_blocks(scores, self.inner.scores(mine, start))

    def pattern(self, pattern: Tensor, start: int) -> Tensor:
        require_apart(pattern, self.size, f"layer {self.inner.layer}")
        if not self.inner.wants("pattern"):
            return pattern
        mine = diagonal_blocks(pattern, self.size).contiguous()
        return _with_blocks(pattern, self.inner.pattern(mine, start))

    def z(self, z: Tensor) -> Tensor:
        return self.inner.z(z[0].unflatten(0, (self.size, -1))).flatten(0, 1)[None]


def _with_blocks(whole: Tensor, blocks: Float[Tensor, "batch heads q k"]) -> Tensor:
    whole = whole.clone()
    diagonal_blocks(whole, len(blocks)).copy_(blocks)
    return whole


def by_row(output: Tensor, axes: tuple[str, ...], size: int) -> Tensor:
    """A model's output, of `size` inputs, one row each where the last block's stream has all in one."""
    packed = axes in ONE_AFTER_THE_OTHER and output.shape[:-2].numel() == 1
    return shown(output, axes, size) if packed and output.shape[-2] % size == 0 else output


@torch.no_grad()
def require_equal_rows(module: nn.Module, spec: Spec, batch: Batch) -> None:
    """BadInput where rows have different numbers of positions: what the first block reads of each alone.

    Rows of a single tensor are equally long, and so are those of a batch that is packed itself; other inputs may
    say how much of each row counts.
    """
    packed = spec.blocks[0].axes in ONE_AFTER_THE_OTHER
    if batch.size == 1 or len(batch.inputs) == 1 or batch.packed or not packed:
        return
    lengths = list(_lengths(module, spec, batch))
    if len(set(lengths)) > 1:
        raise BadInput(
            f"this model packs all rows of a batch into one, and these have {', '.join(map(str, lengths))} "
            "positions: sites show rows of equal length [batch pos d_model]; give them one by one"
        )


def _lengths(module: nn.Module, spec: Spec, batch: Batch) -> Iterator[int]:
    lengths: list[int] = []

    def stop(block: nn.Module, args: tuple, kwargs: dict) -> None:
        lengths.append(argument(args, kwargs, spec.hidden).shape[-2])
        raise Stop

    block = module.get_submodule(spec.blocks[0].name)
    hook = block.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        for row in range(batch.size):
            with suppress(Stop):
                call_model(module, batch.rows(slice(row, row + 1)))
        yield from lengths
    finally:
        hook.remove()


# --- the probe ------------------------------------------------------------------------------------


def attention_row_by_row(layer: Layer) -> Layer:
    """The layer with the rows of the batch apart in its attention, where that has all in one.

    Raises:
        Refused: some row attends to another.
    """
    of, raw = layer.attention, layer.call.output
    assert raw is not None
    if of is None or any(of.tensors[x].shape[::2] != (1, raw.shape[1]) for x in "qk"):
        return layer
    size, rows = layer.inside.n_rows, torch.cat(of.rows, 2)
    require_apart(rows, size, layer.name)
    tensors = {name: rows_apart(of.tensors[name], size) for name in "qkv"}
    tensors["z"] = of.tensors["z"][0].unflatten(0, (size, -1))
    attention = replace(of, tensors=tensors, rows=[diagonal_blocks(rows, size)])
    others = [attention if call is of else call for call in layer.inside.attention]
    return replace(layer, inside=replace(layer.inside, attention=others), attention=attention)
