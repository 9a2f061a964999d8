"""Which norm of a block attention reads, and which its MLP: TransformerLens' ln1 and ln2, found by what they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.model import Model
from interp.models.projections import same

NEAR = 1e-2
"""How far the stream that is added up here may be from what a norm read: bfloat16's rounding."""


@dataclass
class _Call:
    """What a module inside a block read and returned; nothing, where that is no tensor."""

    name: str
    read: Tensor
    returned: Tensor


@dataclass
class BlockNorms:
    """(module, site that it reads) by layer: of the norm that attention reads, of the one that the MLP alone does."""

    before_attention: dict[int, tuple[str, str]]
    before_mlp: dict[int, tuple[str, str]]


@torch.no_grad()
def block_norms(model: Model) -> BlockNorms:
    """The norms of the layers with attention, seen in one forward over a few tokens.

    A module of the block that reads resid_pre or resid_mid, returns what a norm of it is, and is read by a module
    inside attention (ln1), or by none there but by another one (ln2; in parallel blocks it reads resid_pre).
    """
    found = BlockNorms({}, {})
    sites = [name for name in ("resid_mid", "resid_pre") if name not in model.spec.refused]
    if model.spec.shared or model.spec.n_streams > 1 or not sites:
        return found
    calls: dict[int, list[_Call]] = {}
    with ExitStack() as stack:
        for layer, name, module in _inside_blocks(model):

            def keep(
                _: nn.Module, args: tuple, given: dict, out: Any, at: int = layer, name: str = name
            ) -> None:
                read = [*args, *given.values()]
                if len(read) == 1 and isinstance(read[0], Tensor):
                    returned = out.cpu() if isinstance(out, Tensor) else torch.empty(0)
                    calls.setdefault(at, []).append(_Call(name, read[0].cpu(), returned))

            stack.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
        run = model.run(model.probed, capture=sites, logits=False)
    streams = {site: run.cache.by_layer(site) for site in sites}
    for layer in calls:
        inside = f"{model.spec.blocks[layer].attention}."
        readers = _normed(
            model, calls[layer], {s: x[layer] for s, x in streams.items() if layer in x}
        )
        attention = {
            at for at, by in readers.items() if any(f"{x}.".startswith(inside) for x in by)
        }
        for names, kept in (
            (attention, found.before_attention),
            (readers.keys() - attention, found.before_mlp),
        ):
            if len(names) == 1:
                kept[layer] = next(iter(names))
    return found


def _inside_blocks(model: Model) -> Iterator[tuple[int, str, nn.Module]]:
    for layer in model.spec.attention_layers:
        block = model.spec.blocks[layer].name
        for name, module in model.module.get_submodule(block).named_modules(prefix=block):
            if name != block:
                yield layer, name, module


def _normed(
    model: Model, calls: list[_Call], streams: dict[str, Tensor]
) -> dict[tuple[str, str], set[str]]:
    """By (norm, the site that it read), the modules that read the norm."""
    found: dict[tuple[str, str], set[str]] = {}
    for call in calls:
        off = {site: _off(call.read, stream.cpu()) for site, stream in streams.items()}
        site = min(off, key=off.__getitem__, default="")
        if site and off[site] <= NEAR and call.read.shape == call.returned.shape:
            by = {x.name for x in calls if x.name != call.name and same(x.read, call.returned)}
            if by and _is_norm(model, call):
                found[call.name, site] = by
    return found


def _off(read: Tensor, stream: Tensor) -> float:
    """How far what was read is from the stream, as a part of each position's largest channel."""
    if read.numel() != stream.numel():
        return float("inf")
    stream = stream.float()
    error = (read.reshape(stream.shape).float() - stream).abs().amax(-1)  # OPT's blocks flatten
    return float((error / stream.abs().amax(-1).clamp(min=1e-30)).max())


def _is_norm(model: Model, call: _Call) -> bool:
    """Whether gain · x [less its mean] / σ(x) + bias is what the module returned."""
    try:
        norm = model.norm(call.name)
    except Refused:  # it mixes channels
        return False
    x, gain, bias = call.read.float(), norm.gain.cpu().float(), norm.bias.cpu().float()
    wanted = call.returned.float()
    error = gain * norm.centre(x) / norm.scale(x).cpu() + bias - wanted
    return float(error.abs().max()) <= 1e-2 * float(wanted.abs().max())
