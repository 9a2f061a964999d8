"""Blocks that norm the residual stream three times, after each of three sums.

    x1 = norm1(resid_pre + w1)        x2 = norm2(x1 + w2)        resid_post = norm3(x2 + w3)

Where w1 is attention's and w3 the MLP's, w2 stands between them (an attention of another kind, to a
source) and x2 is resid_mid; where w2 is the MLP's, x1 is, and w3 something behind the MLP (an adapter).
A module may be called several times: one norm may stand in two places.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from interp.models.projections import elementwise, same
from interp.models.spec import BlockMap, Carry
from interp.models.stack import Layer
from interp.models.writes import Candidate, Sums, solved


@dataclass(frozen=True)
class Norm:
    """One call of a norm: what it read and returned, in float64."""

    name: str
    order: int
    x: Tensor
    out: Tensor


def three_norms(
    layer: Layer, key: int | str, candidates: list[Candidate], W_O: str | None = None
) -> Sums | None:
    """The block as three sums with a norm after each; None where that does not explain it.

    The first may be what `W_O`, which reads z, returns: nothing of the stream is in it then.
    """
    pre, post, dtype = layer.hidden(key).double(), layer.output.double(), layer.output.dtype
    norms = _calls(layer, pre.shape)
    names = {norm.name for norm in norms}
    parts = [c for c in candidates if not names & set(c.modules)]

    def between(base: Tensor, target: Tensor, after: int, before: int) -> list:
        some = [c for c in parts if after < c.order < before]
        return solved(base, target, some, dtype) or []

    for last in (norm for norm in norms if torch.equal(norm.out, post)):
        earlier = [norm for norm in norms if norm.order < last.order]
        for first, second in combinations(earlier, 2):
            rest = between(second.out, last.x, second.order, last.order)
            middle = rest and between(first.out, second.x, first.order, second.order)
            start = middle and between(pre, first.x, -1, first.order)
            replaced = [] if start else [(c, 1.0) for c in parts if _alone(c, W_O, first)]
            if middle and (start := start or replaced):
                return Sums(
                    start + middle + rest,
                    carry_first=Carry(0.0) if replaced else None,
                    norm_mid=second.name,
                    norm_post=last.name,
                    n_before_mid=len(start) + len(middle),
                    norm_first=first.name,
                    n_before_first=len(start),
                )
    return None


def _alone(candidate: Candidate, module: str | None, norm: Norm) -> bool:
    """Whether what this module returns is all that a norm reads."""
    return module in candidate.modules and same(candidate.value.double(), norm.x)


def _calls(layer: Layer, shape: torch.Size) -> list[Norm]:
    """Every call of a norm of the stream's shape, first called first."""
    seen = layer.inside
    found = [
        Norm(
            name,
            call.order,
            call.inputs[0].reshape(shape).double(),
            call.output.reshape(shape).double(),
        )
        for name, calls in seen.calls.items()
        for call in calls
        if call.inputs
        and call.output is not None
        and call.inputs[0].numel() == call.output.numel() == shape.numel()
        and call.output.is_floating_point()
        and elementwise(seen, name, call)
        and not same(call.inputs[0], call.output)
    ]
    return sorted(found, key=lambda norm: norm.order)


def with_middle(layer: Layer, block: BlockMap, refused: dict[str, str]) -> BlockMap:
    """The block with resid_mid before its MLP: behind the second norm, or behind the first one."""
    if block.norm_first is None or block.norm_mid is None or block.cross is not None:
        return block
    second = tuple(write for write in block.before_mid if write not in block.before_first)
    if block.mlp_write in second:
        block = replace(
            block,
            norm_first=None,
            before_first=(),
            norm_mid=block.norm_first,
            before_mid=block.before_first,
            norm_late=block.norm_mid,
            before_late=second,
        )
    if layer.inside.once(block.norm_mid) is None:
        why = f"'{block.norm_mid}' is called several times in '{block.name}': which call is told by no name"
        refused.setdefault("resid_mid", why)
    return block
