"""Video models that are seen on clips of one frame alone, since nothing that is tried shows more frames rightly.

Such a model may call some blocks on all frames at once and others once a frame, carrying something on from frame to
frame. A single frame is one call of each.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from interp.errors import Refused
from interp.models.hooked import parts_of
from interp.models.spec import Spec, module_device
from interp.models.wants import tried
from interp.run.batch import Batch


@dataclass(frozen=True)
class OneFrame:
    """On which axis of the input `name` frames lie, and why the shape `several`, of more frames, could not be used."""

    name: str
    axis: int
    several: tuple[int, ...]
    why: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The same of one frame."""
        return (*self.several[: self.axis], 1, *self.several[self.axis + 1 :])


one_frame: WeakKeyDictionary[nn.Module, OneFrame] = WeakKeyDictionary()
"""Models whose probe is a clip of one frame."""


def require_one_frame(module: nn.Module, batch: Batch) -> None:
    """Refused where a model that is seen on clips of one frame is given more."""
    told = one_frame.get(module)
    x = None if told is None else batch.inputs.get(told.name)
    if told is None or x is None or x.ndim <= told.axis or x.shape[told.axis] == 1:
        return
    raise Refused(
        f"'{told.name}' of shape {tuple(x.shape)} has {x.shape[told.axis]} frames, and this model is seen on clips of "
        f"one frame alone: {_why(told)}. Wanted: a shape such as {told.shape}; frames given as clips of their own do "
        "not know of each other"
    )


def note(module: nn.Module, spec: Spec) -> tuple[str, ...]:
    """What to say of a model that is seen on clips of one frame, with the blocks that more frames call more often."""
    told = one_frame.get(module)
    if told is None:
        return ()
    blocks = [parts[0] for parts in parts_of(module, spec)]
    called, known = Counter[nn.Module](), Counter(blocks)
    with ExitStack() as stack:
        for block in known:
            count = block.register_forward_pre_hook(lambda block, args: called.update([block]))
            stack.callback(count.remove)
        clip = torch.zeros(told.several, dtype=next(module.parameters()).dtype)
        made, _ = tried(module, Batch({told.name: clip}).to(module_device(module)))
    n = told.several[told.axis]
    each = [str(i) for i, block in enumerate(blocks) if called[block] == n * known[block]]
    calls = (
        f", and calls layers {', '.join(each)} once a frame" if each and made is not None else ""
    )
    return (f"seen on clips of one frame alone, longer ones are refused: {_why(told)}{calls}",)


def _why(told: OneFrame) -> str:
    does = told.why if told.why.startswith("returns") else f"fails ({told.why})"
    return f"on {told.several[told.axis]} frames, {told.several}, its forward {does}"
