"""Blocks that rescale the residual stream before they add to it, solved for half by half.

    resid_mid = norm_mid(c · resid_pre + Σ g · write + b)        resid_post = norm_post(c' · resid_mid + …)

A carry c, a gain g and a shift b is one number, or one a channel. The middle is what some module of the
block reads (the norm before the MLP), so each half is solved on its own. Numbers are found as in any
other sum. Numbers a channel are least squares over the probe's positions, each channel by itself: at
most four unknowns for at least four equations more than that, each of which has to hold to its rounding; once
the map is drawn, on other inputs too (`other_inputs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import torch
from torch import Tensor

from interp.models.block_map import Carry
from interp.models.projections import same
from interp.models.recording import Recording
from interp.models.solve import SLACK, rounding, smallest_sum
from interp.models.stack import Layer
from interp.models.sums import Candidate, Sums, ends_of, norms_of

SPARE = 4
"""Equations that a channel must have beyond its unknowns."""
FIRST = 16
"""Channels that are tried before all of them."""
LEAST_GAIN = 1e-6
"""An edit of a write is divided by its gain."""
ROOM = 1000
"""How many times larger than their sum parts may be whose roundings are left of it."""
CLEAR = 10
"""Roundings of the sum that a part must exceed in most channels: a smaller one explains nothing."""


@dataclass(frozen=True)
class Half:
    """Half of a block: what it carries on of its input, and what it adds."""

    carry: Carry
    writes: list[tuple[Candidate, float]]


@dataclass(frozen=True)
class Middle:
    """A tensor that a module reads: what was done before `start` made `x`; `mid` goes on after `end`."""

    x: Tensor
    mid: Tensor
    start: int
    end: int
    norm: str | None = None


def rescaled(layer: Layer, key: int | str, candidates: list[Candidate]) -> Sums | None:
    """The block taken apart with carries, gains and shifts; None where that does not explain it either.

    What is carried may be a norm of resid_pre instead of resid_pre itself.
    """
    pre, post, dtype = layer.hidden(key), layer.output.double(), layer.output.dtype
    norms = [
        norm
        for norm in norms_of(layer.inside, pre.shape)
        if len(layer.inside.call(norm[1]).inputs) == 1  # others are gates that make a sum
    ]
    bases = [
        (None, pre),
        *((name, out) for _, name, x, out in norms if same(x, pre)),
    ]
    middles = list(_middles(layer.inside, pre, post, norms))
    for norm_post, end in ends_of(norms, post):
        end = end.double()
        inside = [c for c in candidates if norm_post not in c.modules]
        for middle in middles:
            before = [c for c in inside if c.order <= middle.start]
            after = [c for c in inside if c.order > middle.end]
            for norm_pre, base in bases:
                first = _half(base, middle.x, before, dtype)
                rest = None if first is None else _half(middle.mid, end, after, dtype)
                if first is not None and rest is not None:
                    return Sums(
                        first.writes + rest.writes,
                        middle.norm,
                        norm_post,
                        len(first.writes),
                        norm_pre=norm_pre,
                        carry_mid=first.carry,
                        carry_post=rest.carry,
                    )
        for norm_pre, base in bases:
            if whole := _half(base, end, inside, dtype):
                return Sums(
                    whole.writes, norm_post=norm_post, norm_pre=norm_pre, carry_post=whole.carry
                )
    return None


def _middles(
    seen: Recording, pre: Tensor, post: Tensor, norms: list[tuple[int, str, Tensor, Tensor]]
) -> Iterator[Middle]:
    """What modules of the block read that might be its middle, first as it is, then through a norm."""
    known = [pre, post]
    for calls in seen.calls.values():
        for x in calls[0].inputs if len(calls) == 1 else ():
            if x.numel() != pre.numel():
                continue
            x = x.reshape(pre.shape)
            if not any(torch.equal(x.double(), each.double()) for each in known):
                known.append(x)
                yield Middle(x, x, calls[0].start, calls[0].start)
    for order, name, x, out in norms:
        if not same(x.double(), pre.double()) and not same(out.double(), post.double()):
            yield Middle(x, out, order - 1, order, name)


def _half(
    base: Tensor, target: Tensor, candidates: Sequence[Candidate], dtype: torch.dtype
) -> Half | None:
    """target = c · base + Σ g · candidate + b with the fewest candidates; None if none do."""
    parts = [
        c for c in candidates if not any(same(c.value.double(), x.double()) for x in (target, base))
    ]
    values = [c.value for c in parts]
    found = dict(smallest_sum(torch.zeros_like(target), target, [base, *values], dtype) or [])
    if 0 in found and len(found) > 1 and _clear(found[0] * base, target, rounding(dtype)):
        writes = [(parts[i - 1], scale) for i, scale in found.items() if i]
        return Half(Carry(found[0]), sorted(writes, key=lambda each: each[0].order))
    fit = fitted_channels(base, target, values, dtype)
    if fit is None:
        return None
    index, carry, gains = fit
    writes = [
        (
            parts[i]
            if gain is None
            else replace(parts[i], value=parts[i].value * gain, channels=gain),
            1.0,
        )
        for i, gain in zip(index, gains, strict=True)
    ]
    return Half(carry, sorted(writes, key=lambda each: each[0].order))


def fitted_channels(
    base: Tensor, target: Tensor, values: Sequence[Tensor], dtype: torch.dtype
) -> tuple[tuple[int, ...], Carry, list[Tensor | None]] | None:
    """target = c ∘ base + Σ g ∘ value + b, where c, g and b are one number a channel.

    One value is tried before two, and few unknowns before many: c alone or g alone (the other is 1),
    b alone, two of them, all three. `dtype` is what the sums were made in; each part may be rounded as
    its own dtype was before.

    Returns:
        the indices of the values; c and b; each value's g (None where it is 1). None if nothing fits.
    """
    width = target.shape[-1]
    y, x, *vs = (t.double().reshape(-1, width) for t in (target, base, *values))
    few = torch.linspace(0, width - 1, min(FIRST, width)).long().unique()
    eps = rounding(dtype)
    own = [max(eps, rounding(t.dtype)) for t in (base, *values)]
    forms = sorted(product((False, True), repeat=3), key=sum)[1:]
    for count in (1, 2):
        for (carry, gain, shift), index in product(forms, _promising(x, y, vs, count, max(own))):
            chosen, of = [vs[i] for i in index], [own[0], *(own[1 + i] for i in index)]
            if len(y) < carry + gain * count + shift + SPARE:
                continue
            form = (carry, gain, shift, eps, of)
            if _fit(x[:, few], y[:, few], [v[:, few] for v in chosen], *form) is None:
                continue
            fit = _fit(x, y, chosen, *form)
            if fit is not None:
                c, gs, b = ([None if t is None else t.to(dtype) for t in each] for each in fit)
                return index, Carry(1.0 if c[0] is None else c[0], b[0]), gs
    return None


def _promising(
    x: Tensor, y: Tensor, values: list[Tensor], count: int, eps: float
) -> list[tuple[int, ...]]:
    """Which `count` of the values leave little of y where all that may be fitted is; of [positions, d] each.

    Tried in a few entries: no other form leaves less, and of what each value leaves nearly all is told there.
    """
    chosen = list(combinations(range(len(values)), count))
    rows, channels = (
        torch.linspace(0, n - 1, min(most, n)).long().unique()
        for n, most in zip(y.shape, (4 * FIRST, FIRST // 4), strict=True)
    )
    if not chosen or len(rows) < count + 2 + SPARE:
        return chosen
    x, y, *vs = (t[rows][:, channels].T for t in (x, y, *values))
    ones = torch.ones_like(x)
    columns = torch.stack(
        [torch.stack([x, ones, *(vs[i] for i in index)], -1) for index in chosen]
    )  # [choice, d, positions, unknowns]
    basis = torch.linalg.qr(columns).Q
    left = y - (basis @ (basis.mT @ y[..., None]))[..., 0]
    allowed = ROOM * SLACK * eps * y.norm(dim=-1)
    fits = (left.norm(dim=-1) <= allowed).all(-1)
    return [index for index, fit in zip(chosen, fits.tolist(), strict=True) if fit]


def _fit(
    x: Tensor,
    y: Tensor,
    values: list[Tensor],
    carry: bool,
    gain: bool,
    shift: bool,
    eps: float,
    of: list[float],
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]] | None:
    """([c], gains, [b]) of one form, each [d] or None where it is not fitted; None if it does not hold.

    `eps` is y's, `of` that of x and of each value.
    """
    first, others = [(x, of[0])], list(zip(values, of[1:], strict=True))
    free = first * carry + others * gain
    fixed = first * (not carry) + others * (not gain)
    if shift:  # it may be what two larger ones leave
        free.append((torch.ones_like(x), max(of)))
    left = y - sum(part for part, _ in fixed) if fixed else y
    columns = torch.stack([part for part, _ in free], dim=-1).transpose(
        0, 1
    )  # [d, positions, unknowns]
    found = torch.linalg.lstsq(columns, left.T[..., None]).solution[..., 0]
    parts = [*fixed, *((part * found[:, i], own) for i, (part, own) in enumerate(free))]
    bounds = [eps * y.abs(), *(own * part.abs() for part, own in parts)]
    if shift:
        bounds[-1] = bounds[-1].max().expand_as(y)
    parts = [part for part, _ in parts]
    if bool(((y - sum(parts)).abs() > SLACK * sum(bounds)).any()):
        return None
    if not all(_clear(part, y, eps) for part in (parts[:-1] if shift else parts)):
        return None
    each = list(found.unbind(-1))
    c = each.pop(0) if carry else None
    b = each.pop() if shift else None
    gains: list[Tensor | None] = list(each) if gain else [None] * len(values)
    if any(g is not None and float(g.abs().min()) < LEAST_GAIN for g in gains):
        return None
    return [c], gains, [b]


def _clear(part: Tensor, target: Tensor, eps: float) -> bool:
    """Whether a part of a sum is more than its rounding, in most channels."""
    part, target = (x.abs().reshape(-1, x.shape[-1]).amax(0) for x in (part, target))
    return float((part > CLEAR * eps * target).double().mean()) > 0.5
