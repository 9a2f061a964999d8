"""A model beside what the window makes of it in float64, where in its own dtype rounding sets them apart.

A model can make much of a rounding, and none of its own attentions may round as the window does: of many that it
chooses among (the proposals of a detector, say) two nearly equal ones change places. In float64 nothing does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interp.models.attention import needs_masks
from interp.models.calls import call_model, output_tensor
from interp.models.chunks import in_chunks
from interp.models.kernels import small_in_float64
from interp.models.own_attention import beside_interface, own
from interp.models.pieces import pieces
from interp.models.recording import Recording, record
from interp.models.relative import RELATIVE_TOLERANCE, relative_error
from interp.run.batch import Batch


def exact_instead(module: nn.Module, batch: Batch, seen: Recording) -> tuple[Tensor, Tensor] | None:
    """What the model returns in float64 under the window and by itself, where these agree to the rounding of that.

    None where they do not, where there is no such copy (`small_in_float64`), or where the window sees another number of
    attention calls there than in `seen`.
    """
    if (copies := small_in_float64(module, batch)) is None:
        return None
    copied, exact = copies
    _note_alike(module, copied)
    again, plain = record(copied, exact), output_tensor(call_model(copied, exact))
    if len(again.attention) != len(seen.attention):
        return None
    apart, _ = relative_error(again.output, plain)
    return (again.output, plain) if apart <= RELATIVE_TOLERANCE[torch.float64] else None


def _note_alike(module: nn.Module, copied: nn.Module) -> None:
    """Take down of a copy what the probe has found of the attention of a model."""
    pairs = list(zip(module.modules(), copied.modules(), strict=True))
    own.update([(copy, own[part]) for part, copy in pairs if part in own])
    pieces.update([(copy, pieces[part]) for part, copy in pairs if part in pieces])
    for marked in (beside_interface, in_chunks, needs_masks):
        marked.update([copy for part, copy in pairs if part in marked])


def note(apart: float) -> tuple[str, ...]:
    """What to say of a model whose map was verified in float64, and is so far apart from the window otherwise."""
    if not apart:
        return ()
    return (
        f"with its patterns formed it gives outputs that differ by {apart:.1e} of their size from its own on the "
        "probe, while in float64 they agree: this model makes that much of a rounding (it may choose the largest of "
        "many). Its map was verified in float64; compare runs that form patterns with one another, or load it in "
        "float64",
    )
