"""Blocks that norm the residual stream three times or four, after each of so many sums.

    x1 = norm1(resid_pre + w1)        x2 = norm2(x1 + w2)        resid_post = norm3(x2 + w3)

Where w1 is attention's and w3 the MLP's, w2 stands between them (an attention of another kind, to a
source) and x2 is resid_mid; where w2 is the MLP's, x1 is, and w3 something behind the MLP (an adapter).
Where attention to two sources stands between, there is one sum more. A module may be called several times:
one norm may stand in two places.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, chain, combinations, pairwise, product

import torch
from torch import Tensor

from interp.models.block_map import BlockMap, Carry, Normed
from interp.models.projections import elementwise, same
from interp.models.stack import Layer
from interp.models.sums import Candidate, Sums, solved


@dataclass(frozen=True, eq=False)
class Norm:
    """One call of a norm: what it read and returned, in float64."""

    name: str
    order: int
    x: Tensor
    out: Tensor


BETWEEN = (2, 3)
"""How many norms lie before the last one, fewest first."""


def norm_by_norm(
    layer: Layer, key: int | str, candidates: list[Candidate], W_O: str | None = None
) -> Sums | None:
    """The block as three or four sums with a norm after each; None where that does not explain it.

    The first may be what `W_O`, which reads z, returns: nothing of the stream is in it then.
    """
    pre, post, dtype = layer.hidden(key).double(), layer.output.double(), layer.output.dtype
    norms = _calls(layer, pre.shape)
    names = {norm.name for norm in norms}
    parts = [c for c in candidates if not names & set(c.modules)]
    start = Norm("", -1, pre, pre)

    @cache
    def between(a: Norm, b: Norm) -> list[tuple[Candidate, float]]:
        some = [c for c in parts if a.order < c.order < b.order]
        return solved(a.out, b.x, some, dtype) or []

    lasts = [norm for norm in norms if torch.equal(norm.out, post)]
    for last, count in product(lasts, BETWEEN):
        for some in combinations([norm for norm in norms if norm.order < last.order], count):
            steps = list(pairwise([*some, last]))
            if not all(between(a, b) for a, b in reversed(steps)):
                continue
            first = between(start, some[0])
            replaced = [] if first else [(c, 1.0) for c in parts if _alone(c, W_O, some[0])]
            if not (first or replaced):
                continue
            writes = [first or replaced, *(between(a, b) for a, b in steps)]
            numbers = list(accumulate(map(len, writes)))
            return Sums(
                list(chain(*writes)),
                carry_first=Carry(0.0) if replaced else None,
                norm_mid=some[-1].name,
                norm_post=last.name,
                n_before_mid=numbers[count - 1],
                firsts=tuple(
                    (n, norm.name) for n, norm in zip(numbers[:-1], some[:-1], strict=False)
                ),
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
    """The block with resid_mid before its MLP: behind the last norm but one, or behind an earlier one."""
    if not block.firsts or block.norm_mid is None:
        return block
    known = [write for first in block.firsts for write in first.writes]
    rest = tuple(write for write in block.before_mid if write not in known)
    steps = (*block.firsts, Normed(block.norm_mid, rest))
    of_mlp = [i for i, step in enumerate(steps) if block.mlp_write in step.writes]
    if of_mlp and of_mlp[0] > 0:
        firsts, middle, lates = steps[: of_mlp[0] - 1], steps[of_mlp[0] - 1], steps[of_mlp[0] :]
        before = tuple(write for step in (*firsts, middle) for write in step.writes)
        block = replace(block, firsts=firsts, norm_mid=middle.norm, before_mid=before, lates=lates)
    assert block.norm_mid is not None
    if layer.inside.once(block.norm_mid) is None:
        why = f"'{block.norm_mid}' is called several times in '{block.name}': which call is told by no name"
        refused.setdefault("resid_mid", why)
    return block
