"""Blocks that start the residual stream anew: they return what they write, and nothing of what they read.

    resid_mid = Σ writes that the MLP reads        resid_post = resid_mid + Σ the other writes

What they read goes on by other ways (later blocks may be given it besides). A sum alone does not tell, since
a module inside may carry the stream: that the output does not grow with the input is tried besides.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from interp.models.block_map import BlockMap, Carry
from interp.models.hooks import argument, with_argument
from interp.models.projections import same
from interp.models.recording import Recording
from interp.models.relative import relative_error, relative_tolerance
from interp.models.solve import smallest_sum
from interp.models.stack import Layer
from interp.models.sums import Candidate, Sums
from interp.models.trials import answering
from interp.run.batch import Batch

LARGER = 1024.0
"""Times this a carried stream would be all that is seen of the output; norms leave the writes as they are.
A power of two rounds nothing."""
UNMOVED = 0.1
"""The eps of norms, and 16 bits behind it; a carried stream is off by a thousand times its share."""


def restarted(layer: Layer, candidates: list[Candidate]) -> Sums | None:
    """The block as a sum of its own outputs, not of its input; None where they do not make what it returns."""
    post, dtype = layer.output.double(), layer.output.dtype
    parts = [c for c in candidates if not same(c.value.double(), post)]
    found = smallest_sum(torch.zeros_like(post), post, [c.value for c in parts], dtype)
    if found is None or len(found) < 2:
        return None
    writes = sorted(((parts[i], scale) for i, scale in found), key=lambda each: each[0].order)
    sums = accumulate(c.value.double() * scale for c, scale in writes[:-1])
    for count, middle in enumerate(sums, start=1):
        if writes[count - 1][0].pooling is not None:
            continue  # an edit of the middle is a change of the last write before it
        if any(
            x.numel() == middle.numel()
            and relative_error(x.reshape(middle.shape), middle)[0] <= relative_tolerance(dtype)
            for calls in layer.inside.calls.values()
            for call in calls
            for x in call.inputs
        ):
            return Sums(writes, n_before_mid=count, carry_mid=Carry(0.0), carry_post=Carry(1.0))
    return Sums(writes, carry_post=Carry(0.0))


def restarts(block: BlockMap) -> bool:
    """Whether nothing goes on of the stream that a block reads."""
    carries = (block.carry_first, block.carry_mid, block.carry_post)
    return any(carry is not None and carry.nothing for carry in carries)


def follow_no_input(seen: Recording, names: set[str], batch: Batch, key: int | str) -> set[str]:
    """Those of these blocks whose output stays as it is when their hidden state is a thousand times as large."""

    def enlarge(args: tuple, kwargs: dict) -> Any:
        return with_argument(args, kwargs, key, argument(args, kwargs, key) * LARGER)

    def unmoved(got: Tensor, wanted: Tensor) -> bool:
        return relative_error(got, wanted)[0] <= UNMOVED

    return answering(seen, names, batch, enlarge, unmoved)
