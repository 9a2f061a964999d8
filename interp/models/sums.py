"""What a block adds to the residual stream, solved for.

The sub-module outputs, with multipliers, that sum to `resid_post - resid_pre`. Where none do, the block
normalises after adding: then the sums lie before its norms, `resid_mid = norm_mid(resid_pre + …)` and
`resid_post = norm_post(resid_mid + …)`. Where none do either, a parameter of the block's own may scale
each channel of a write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from interp.models.block_map import Carry
from interp.models.gate import Gate
from interp.models.pooling import Pooling
from interp.models.projections import elementwise, same
from interp.models.recording import Recording
from interp.models.solve import smallest_sum
from interp.models.stack import Layer


@dataclass(eq=False)
class Candidate:
    """A value that might be written to the residual stream, and the modules that returned it.

    With `gain`, the value is a module's output times this parameter; with `channels`, times these numbers; with
    `gate`, times what that is; with `pooling`, what that makes of it.
    """

    value: Tensor
    modules: list[str]
    order: int
    gain: str | None = None
    channels: Tensor | None = None
    pooling: Pooling | None = None
    gate: Gate | None = None


@dataclass(frozen=True)
class Sums:
    """A block taken apart: (candidate, scale) of its writes, first written first, its norms and carries."""

    writes: list[tuple[Candidate, float]]
    norm_mid: str | None = None
    norm_post: str | None = None
    n_before_mid: int | None = None
    """How many of the writes lie before the middle; None where neither a norm nor a carry stands there."""
    firsts: tuple[tuple[int, str], ...] = ()
    """Norms before norm_mid, each with how many of the writes lie before it."""
    norm_pre: str | None = None
    carry_first: Carry | None = None
    carry_mid: Carry | None = None
    carry_post: Carry | None = None
    reshapes_behind: str | None = None
    """What reads the middle last before the block gives the stream another shape."""

    @property
    def rescales(self) -> bool:
        """Whether what goes on of the stream is not the stream itself."""
        carries = (self.carry_first, self.carry_mid, self.carry_post)
        return any(x is not None for x in (self.norm_pre, *carries))

    @property
    def stays(self) -> bool:
        """Whether nothing norms what was added; that the stream is rescaled before leaves it as it is."""
        return self.norm_mid is None and self.norm_post is None


def taken_apart(layer: Layer, key: int | str) -> tuple[Sums | None, list[Candidate]]:
    """The block's writes and norms, None if none were found; and all candidates, latest first."""
    pre, post = layer.hidden(key).double(), layer.output.double()
    candidates = candidates_of(layer.inside, pre.shape)
    dtype = layer.output.dtype
    found = _sums(layer, pre, post, candidates, dtype)
    if found is None and (scaled := _scaled(layer.inside, layer.name, candidates)):
        found = _sums(layer, pre, post, candidates + scaled, dtype)
    return found, candidates


def _sums(
    layer: Layer, pre: Tensor, post: Tensor, candidates: list[Candidate], dtype: torch.dtype
) -> Sums | None:
    norms = norms_of(layer.inside, pre.shape)
    if not pre.any():  # a stream that is still zero is whatever the last norm returns: no write
        returned = {name for _, name, _, _ in norms}
        candidates = [c for c in candidates if not returned & set(c.modules)]
    if chosen := solved(pre, post, candidates, dtype):
        return Sums(chosen)
    for norm_post, x in ends_of(norms, post):
        inside = [c for c in candidates if norm_post not in c.modules]
        if norm_post and (chosen := solved(pre, x.double(), inside, dtype)):
            return Sums(chosen, norm_post=norm_post)
        for order, norm_mid, x_mid, mid in norms:
            if norm_mid == norm_post:
                continue
            # What the norm returned is the middle itself: taken away as a write it would let all else in.
            later = [c for c in inside if c.order > order and norm_mid not in c.modules]
            rest = solved(mid.double(), x.double(), later, dtype)
            if rest is None:
                continue
            before = [c for c in inside if c.order < order]
            if first := solved(pre, x_mid.double(), before, dtype):
                return Sums(first + rest, norm_mid, norm_post, len(first))
            if found := _twice(pre, x_mid, before, norms, dtype):
                first, second, norm = found
                n = len(first) + len(second)
                return Sums(first + second + rest, norm_mid, norm_post, n, ((len(first), norm),))
    for norm_post, x in ends_of(norms, post):
        inside = [c for c in candidates if norm_post not in c.modules]
        found = in_pieces(pre, x.double(), inside, norms, dtype)
        if found or (
            found is not None and norm_post is None
        ):  # none: all of them vanish in rounding
            return Sums(found, norm_post=norm_post)
    return None


def in_pieces(
    pre: Tensor,
    post: Tensor,
    candidates: list[Candidate],
    norms: list[tuple[int, str, Tensor, Tensor]],
    dtype: torch.dtype,
) -> list[tuple[Candidate, float]] | None:
    """More writes than can be tried at once: what the block's norms read are the stream's states between."""
    found: list[tuple[Candidate, float]] = []
    at = pre
    for order, x in [*((order, x) for order, _, x, _ in norms), (None, post)]:
        if torch.equal(x.double(), at):
            continue
        left = [c for c in candidates if not any(c is known for known, _ in found)]
        left = [c for c in left if order is None or c.order < order]
        if chosen := solved(at, x.double(), left, dtype):
            found, at = found + chosen, x.double()
        elif order is None:
            return None
    return found


def _twice(
    pre: Tensor,
    x_mid: Tensor,
    candidates: list[Candidate],
    norms: list[tuple[int, str, Tensor, Tensor]],
    dtype: torch.dtype,
) -> tuple[list[tuple[Candidate, float]], list[tuple[Candidate, float]], str] | None:
    """Writes before and after a norm that stands before x_mid, and that norm: attention, then to a source.

    The source may be read in another way than by attention (deformable sampling of an image).
    """
    for order, norm, x, out in norms:
        earlier = [c for c in candidates if c.order < order]
        later = [c for c in candidates if c.order > order]
        first = solved(pre, x.double(), earlier, dtype)
        if first and (second := solved(out.double(), x_mid.double(), later, dtype)):
            return first, second, norm
    return None


def ends_of(
    norms: list[tuple[int, str, Tensor, Tensor]], post: Tensor
) -> list[tuple[str | None, Tensor]]:
    """(norm, what it reads) of the norms that return resid_post, then (None, resid_post)."""
    last = [(name, x) for _, name, x, out in norms if torch.equal(out.double(), post)]
    return [*last, (None, post)]


def norms_of(seen: Recording, shape: torch.Size) -> list[tuple[int, str, Tensor, Tensor]]:
    """(order, name, input, output) of every norm of the stream's shape that the block calls once."""
    return sorted(
        (
            (
                calls[0].order,
                name,
                calls[0].inputs[0].reshape(shape),
                calls[0].output.reshape(shape),
            )
            for name, calls in seen.calls.items()
            if len(calls) == 1
            and calls[0].inputs
            and calls[0].output is not None
            and calls[0].inputs[0].numel() == calls[0].output.numel() == shape.numel()
            and calls[0].output.is_floating_point()
            and elementwise(seen, name, calls[0])
            and not torch.equal(calls[0].inputs[0], calls[0].output)
        ),
        key=lambda found: found[0],
    )


def candidates_of(seen: Recording, shape: torch.Size) -> list[Candidate]:
    """Distinct d_model-wide outputs of modules called once inside the block, latest first.

    Some blocks flatten batch and position (OPT): any output with the right last axis and size counts.
    """
    found: list[tuple[int, str, Tensor]] = [
        (calls[0].order, name, calls[0].output.reshape(shape))
        for name, calls in seen.calls.items()
        if len(calls) == 1
        and calls[0].output is not None
        and calls[0].output.shape[-1] == shape[-1]
        and calls[0].output.numel() == shape.numel()
        and calls[0].output.is_floating_point()
    ]
    candidates: list[Candidate] = []
    for order, name, value in sorted(found, key=lambda item: -item[0]):
        equal = next((c for c in candidates if torch.equal(c.value, value)), None)
        if equal is None:
            candidates.append(Candidate(value, [name], order))
        else:
            equal.modules.append(name)
    return candidates


def _scaled(seen: Recording, block: str, candidates: list[Candidate]) -> list[Candidate]:
    """Candidates times each parameter [d_model] of the block's own."""
    return [
        Candidate(c.value * gain, c.modules, c.order, name)
        for name, gain in (own_parameters(seen, block, candidates[0]) if candidates else [])
        for c in candidates
        if gain.all()  # an edited write is divided by its gain again
    ]


def own_parameters(seen: Recording, block: str, like: Candidate) -> list[tuple[str, Tensor]]:
    """Parameters [d_model] held by modules that have modules of their own: layer scales, not norms."""
    return [
        (f"{path}.{name}", parameter.detach().reshape(-1).cpu())
        for path, module in seen.module.get_submodule(block).named_modules(prefix=block)
        if any(True for _ in module.children())
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.numel() == like.value.shape[-1]
    ]


def solved(
    pre: Tensor, post: Tensor, candidates: Sequence[Candidate], dtype: torch.dtype
) -> list[tuple[Candidate, float]] | None:
    """The fewest candidates, with multipliers, that sum to post - pre, first written first."""
    if not same((pre + post).to(dtype), post.to(dtype)):
        # The sum itself is no part of it, unless what is added to is lost in its rounding.
        candidates = [c for c in candidates if not same(c.value.to(post), post)]
    found = smallest_sum(pre, post, [candidate.value for candidate in candidates], dtype)
    if found is None:
        return None
    return sorted(((candidates[i], scale) for i, scale in found), key=lambda each: each[0].order)
