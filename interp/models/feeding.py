"""Of several stacks of blocks the one that the output is made of, where the others only feed it.

A tower that reads an image or sound feeds the language model behind it, in its embeddings or by an attention
to a source: whatever the tower returns, the output stays as it is while the language model's blocks return
what they returned. Towers side by side both reach the output, and none of them is the model's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from interp.models.recording import ModuleCall, Recording, record
from interp.run.batch import Batch


def fed_stack(seen: Recording, lists: list[str], batch: Batch) -> list[str]:
    """The fewest lists, called after all others, through whose blocks alone the others reach the output; else []."""
    calls = {name: _calls(seen, name) for name in lists}
    if not all(calls.values()) or any(c.output is None for of in calls.values() for c, _ in of):
        return []
    lists = [name for name in lists if not is_attention(seen, name)]
    lists = sorted(lists, key=lambda name: calls[name][-1][0].order)
    for count in range(1, len(lists)):
        before, behind = lists[:-count], lists[-count:]
        begins = min(call.start for name in behind for call, _ in calls[name])
        if begins < max(call.order for name in before for call, _ in calls[name]):
            continue  # in turns
        returned: dict[str, list[Tensor]] = {}
        for name in behind:
            for call, block in calls[name]:
                returned.setdefault(block, []).append(_output(call))
        for name in before:
            last = calls[name][-1][1]
            returned[last] = [_output(c).flip(-1) for c, block in calls[name] if block == last]
        if torch.equal(record(seen.module, batch, restored=returned).output, seen.output):
            return behind
    return []


def is_attention(seen: Recording, name: str) -> bool:
    """Whether every member of the list that is called is an attention module, not a block that holds one."""
    attends = {seen.names[call.module] for call in seen.attention}
    return all(block in attends for _, block in _calls(seen, name))


def _calls(seen: Recording, name: str) -> list[tuple[ModuleCall, str]]:
    """The calls of a list's members, first ended first, each with the member's name."""
    prefix = f"{name}."
    found = [
        (call, block)
        for block, calls in seen.calls.items()
        if block.startswith(prefix) and block.removeprefix(prefix).isdigit()
        for call in calls
    ]
    return sorted(found, key=lambda pair: pair[0].order)


def _output(call: ModuleCall) -> Tensor:
    assert call.output is not None
    return call.output
