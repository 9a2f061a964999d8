"""Attention to a source that stands before blocks, in a list of its own, and not inside them.

What a block reads is then not what the one before it returned:

    resid_pre.l = carry_l · x_l + cross_write.l

where x_l, which the attention reads, is resid_post of the block before. In the first layer it is what
the model begins with: `embed`, what the first block reads, is behind it. `carry` is more than 1 where the
attention adds the stream to its output, and code outside adds it once more.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from interp.models.block_map import BlockMap, CrossAttention, Write
from interp.models.draft import Draft
from interp.models.feeding import is_attention
from interp.models.in_parts import AND
from interp.models.layout import PLAIN
from interp.models.projections import cross_attention
from interp.models.recording import ModuleCall, Recording
from interp.models.solve import smallest_sum
from interp.models.stack import Layer
from interp.run.batch import Batch
from interp.sites import CROSS_SITES


def with_ahead(
    seen: Recording, layers: list[Layer], stack: str, refused: dict[str, str]
) -> list[Layer]:
    """Each layer with the attention that is called after the layer before it and before itself, if any."""
    lists = _between_blocks(seen, layers, stack.replace(AND, ", ").split(", "))
    if not lists:
        return layers
    found: dict[int, list[Layer]] = {}
    for name, call in [(name, call) for of in lists for name, call in _members(seen, of)]:
        behind = [i for i, layer in enumerate(layers) if layer.call.start >= call.order]
        inside = seen.within(call)
        attention = inside.attention[0] if len(inside.attention) == 1 else None
        aside = Layer(name, call, inside, attention)
        found.setdefault(behind[0] if behind else len(layers), []).append(aside)
    alone = all(len(each) == 1 and each[0].attention for each in found.values())
    alone = alone and all(seen.once(each[0].name) for each in found.values())
    plain = all(layer.axes == PLAIN and not layer.crosses for layer in layers)
    if len(layers) in found or not alone or not plain:
        why = f"the attention of '{lists[0]}' stands between blocks, in a list of its own"
        refused |= dict.fromkeys(CROSS_SITES, f"{why}, and not once before a block each")
        return layers
    return [
        replace(layer, ahead=found[i][0]) if i in found else layer for i, layer in enumerate(layers)
    ]


def with_attention_ahead(draft: Draft) -> list[BlockMap]:
    """The blocks with the attention before them, where that is so of every one; its sites refused otherwise."""
    made = []
    for i, (layer, block) in enumerate(draft.pairs):
        if layer.ahead is None:
            made.append(block)
            continue
        before = draft.layers[i - 1] if i else None
        cross = _attention_ahead(before, layer, draft.key, draft.batch)
        if cross is None:
            why = (
                f"'{layer.ahead.name}' stands between blocks, and what '{layer.name}' reads is not a multiple "
                "of the stream plus what the heads of that attention write"
            )
            draft.refused.update(dict.fromkeys(CROSS_SITES, why))
            return draft.blocks
        made.append(replace(block, crosses=(cross,)))
    return made


def _attention_ahead(
    before: Layer | None, layer: Layer, key: int | str, batch: Batch
) -> CrossAttention | None:
    """Heads, output and write of the attention before a block, and how much of the stream goes on beside it."""
    aside, read = layer.ahead, layer.hidden(key)
    assert aside is not None
    for where, x in zip(aside.call.keys, aside.call.inputs, strict=True):
        if x.shape != read.shape or not (before is None or torch.equal(x, before.output)):
            continue
        cross = cross_attention(aside, where, batch)
        out = aside.inside.once(cross.out)
        if cross.out is None or out is None or out.output is None:
            continue
        values = [out.output.reshape(x.shape), x]
        scales = dict(smallest_sum(x, read, values, read.dtype) or [])
        if 0 in scales:
            write = Write(cross.out, scales[0])
            return replace(cross, write=write, reads=where, carry=1 + scales.get(1, 0.0))
    return None


def _between_blocks(seen: Recording, layers: list[Layer], stack: list[str]) -> list[str]:
    """The lists of attention modules that are called in turns with blocks of the stack, and are no part of them."""
    first, last = layers[0].call.start, layers[-1].call.order
    lists = {seen.names[call.module].rpartition(".")[0]: None for call in seen.attention}
    return [
        name
        for name in lists
        if isinstance(seen.module.get_submodule(name), nn.ModuleList)
        and not any(f"{name}.".startswith(f"{each}.") for each in stack)
        and is_attention(seen, name)
        and any(first < call.order < last for _, call in _members(seen, name))
    ]


def _members(seen: Recording, name: str) -> list[tuple[str, ModuleCall]]:
    """The calls of a list's members, each with the member's name."""
    members = range(len(seen.module.get_submodule(name)))  # type: ignore[arg-type]
    return [(f"{name}.{i}", call) for i in members for call in seen.calls.get(f"{name}.{i}", [])]
