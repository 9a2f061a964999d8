"""What a block's writes, norms and carries make on the probe, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from interp.models.block_map import BlockMap, Carry, Write
from interp.models.calls import at_home
from interp.models.layout import CHANNELS_BEFORE
from interp.models.stack import Layer


def added(total: Tensor, layer: Layer, writes: Sequence[Write]) -> Tensor:
    """`total` plus what these writes added on the probe, in float64."""
    return total + sum(written(layer, writes, total.shape))


def written(layer: Layer, writes: Sequence[Write], shape: torch.Size) -> list[Tensor]:
    """What each of these writes added on the probe, in float64."""
    parts = []
    for write in writes:
        out = layer.inside.call(write.module).output
        assert out is not None
        factor = write.factor(layer.inside.module)
        if isinstance(factor, Tensor):
            factor = factor.cpu().double()
        out = out.double() if write.pooling is None else write.pooling(out.double())
        if write.gate is not None:
            by = layer.inside.call(write.gate.module).output
            assert by is not None
            factor = factor * write.gate.of(by.double(), shape[0], shape[-1])
        parts.append(out.reshape(shape) * factor)
    return parts


def remade(layer: Layer, block: BlockMap, key: int | str) -> Tensor:
    """What a block's writes, through its norms and carries, make of what it read, in float64."""
    x, before = layer.hidden(key), block.before_mid
    if block.norm_pre is not None:
        x = normed(layer, block.norm_pre, x)
    if block.norm_mid is not None or block.carry_mid is not None:
        for number, first in enumerate(block.firsts):
            x = carried(block.carry_first, x) if number == 0 else x.double()
            x = normed(layer, first.norm, added(x, layer, first.writes).to(layer.output))
        known = [write for first in block.firsts for write in first.writes]
        second = tuple(write for write in before if write not in known)
        total = added(carried(block.carry_mid, x), layer, second)
        x = total if block.norm_mid is None else normed(layer, block.norm_mid, total.to(x))
    else:
        before = ()
    for late in block.lates:
        x = normed(layer, late.norm, added(x.double(), layer, late.writes).to(layer.output))
        before = (*before, *late.writes)
    rest = tuple(write for write in block.writes if write not in before)
    out = added(carried(block.carry_post, x), layer, rest)
    if block.norm_post is not None:
        out = normed(layer, block.norm_post, out.to(layer.output))
    return out.double()


def combined(layer: Layer, key: int | str, modules: tuple[str, ...]) -> Tensor:
    """What comes nearest to a block's output [batch pos d_model] of its input's streams and these outputs.

    Each stream of each position has weights of its own, least squares in float64.
    """
    pre, post = streams(layer.hidden(key), layer), streams(layer.output, layer)
    values = [one_stream(layer.inside.call(name).output, pre[..., 0, :]) for name in modules]
    basis = torch.cat([pre, *[value[..., None, :] for value in values]], dim=-2).mT
    # Streams may be equal (in the first block): least squares for matrices that are not of full rank.
    weights = torch.linalg.lstsq(basis, post.mT, driver="gelsd").solution
    return (basis @ weights).mT.flatten(-2)


def streams(x: Tensor, layer: Layer) -> Tensor:
    """[batch pos d_model] as [batch pos n_streams width], in float64."""
    return x.double().unflatten(-1, (layer.n_streams, -1))


def one_stream(value: Tensor | None, like: Tensor) -> Tensor:
    """A module's output in float64, in the shape of one residual stream."""
    assert value is not None
    return value.double().reshape(like.shape)


def carried(carry: Carry | None, x: Tensor) -> Tensor:
    return x.double() if carry is None else carry(x.double())


def normed(layer: Layer, name: str, x: Tensor) -> Tensor:
    call, norm = layer.inside.calls[name][0], layer.inside.module.get_submodule(name)
    if layer.axes == CHANNELS_BEFORE:
        return at_home(norm, x.mT).mT
    return at_home(norm, x.reshape(call.inputs[0].shape)).reshape(x.shape)
