"""Members of a list that are blocks in a row: modules each of which attends, reads what the one before returned,
and adds to it (DaViT's blocks over windows, then over channels). The modules are the layers then, not the members.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from interp.models.recording import ModuleCall, Recording
from interp.models.stack import Layer


def with_blocks_in_a_row(seen: Recording, layers: list[Layer]) -> list[Layer]:
    """The layers; in place of one that attends several times in a row of blocks, its blocks. All or none are so."""
    found = [
        _in_a_row(seen, layer) if len(layer.inside.attention) > 1 else [layer] for layer in layers
    ]
    return [each for blocks in found for each in blocks] if all(found) else layers


def _in_a_row(seen: Recording, layer: Layer) -> list[Layer]:
    """The blocks that a layer calls one after the other and calls nothing besides; none where it is no such row."""
    names = [
        f"{layer.name}.{child}"
        for child, _ in seen.module.get_submodule(layer.name).named_children()
    ]
    called = [(call, name) for name in names for call in layer.inside.calls.get(name, [])]
    called.sort(key=lambda each: each[0].order)
    calls = [call for call, _ in called]
    if len(calls) < 2 or layer.members or not _goes_through(layer.call, calls):
        return []
    blocks = []
    for call, name in called:
        within = seen.within(call)
        blocks.append(
            replace(
                layer,
                name=name,
                call=call,
                inside=within,
                attention=next(iter(within.attention), None),
            )
        )
    return blocks if all(block.attention for block in blocks) else []


def _goes_through(whole: ModuleCall, calls: list[ModuleCall]) -> bool:
    """Whether each call is given what the one before it returned, the first what the whole is given and so on."""
    if whole.output is None or any(call.output is None or not call.inputs for call in calls):
        return False
    given = [call.inputs[0] for call in calls]
    links = [(whole.inputs[0], given[0]), (calls[-1].output, whole.output)]
    links += [(a.output, x) for a, x in zip(calls, given[1:], strict=False)]
    return all(a is not None and torch.equal(a, x) for a, x in links)
