"""Whether how many positions a model computes with follows from the values of its inputs, not from their shape."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from interp.models.calls import main_input
from interp.models.recording import Recording, record
from interp.run.batch import Batch


def follow_values(seen: Recording, module: nn.Module, batch: Batch) -> str:
    """Why no map of this model can be tried, where other values in inputs of one shape give other shapes inside.

    Trials change what parts return and hold all else as it was: that takes as many positions as before. "" where
    shapes stay.
    """
    name = main_input(module)
    if name not in batch.inputs:
        return ""
    other = replace(batch, inputs={**batch.inputs, name: batch.inputs[name].flip(-1)})
    before, after = _shapes(seen), _shapes(record(module, other))
    moved = next((part for part in before if after.get(part) != before[part]), None)
    if moved is None:
        return ""
    return (
        f"how many positions {type(module).__name__} has follows from the values of '{name}', not from its shape "
        f"(durations that it predicts, perhaps): '{moved}' returns {before[moved]}, and {after.get(moved)} for the "
        "same values in another order. No identity can be tried on it; a part that has as many positions as its "
        "input can be passed by itself"
    )


def _shapes(seen: Recording) -> dict[str, list[tuple[int, ...]]]:
    """What each module returned, by its name, a shape a call."""
    return {
        name: [tuple(call.output.shape) for call in calls if call.output is not None]
        for name, calls in seen.calls.items()
    }
