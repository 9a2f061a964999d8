"""What a block writes to the residual stream, solved for.

The sub-module outputs, with multipliers, that sum to `resid_post - resid_pre`. Where none do, the block
normalises after adding: then the sums lie before its norms, `resid_mid = norm_mid(resid_pre + …)` and
`resid_post = norm_post(resid_mid + …)`. Where none do either, a parameter of the block's own may scale
each channel of a write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from interp.models.block_map import BlockMap, Carry, CrossAttention, Normed, Write
from interp.models.gate import Gate
from interp.models.pooling import Pooling
from interp.models.projections import by_channel, elementwise, same
from interp.models.recording import Recording
from interp.models.repeated import after_attention
from interp.models.several import HEADS
from interp.models.solve import smallest_sum
from interp.models.stack import Layer
from interp.models.verify import added, relative_error, relative_tolerance
from interp.sites import CROSSES


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
        for name, gain in (_parameters(seen, block, candidates[0]) if candidates else [])
        for c in candidates
        if gain.all()  # an edited write is divided by its gain again
    ]


def _parameters(seen: Recording, block: str, like: Candidate) -> list[tuple[str, Tensor]]:
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


def branch_of(block: str, write: Candidate, layer: Layer, candidates: list[Candidate]) -> str:
    """The module of the block that makes a write: behind a norm of the write, its outermost part."""
    gains = [gain for _, gain in _parameters(layer.inside, layer.name, write)]
    name = before_norm(layer.inside, write.modules[0], candidates, gains)
    if not name.startswith(block + "."):
        return name
    inner = name.removeprefix(block + ".").split(".")
    for end in range(1, len(inner) + 1):
        outer = ".".join([block, *inner[:end]])
        call = layer.inside.once(outer)
        if call and call.output is not None and call.output.numel() == write.value.numel():
            return outer
    return name


def write_map(
    layer: Layer,
    block: BlockMap,
    sums: Sums,
    candidates: list[Candidate],
    by_position: set[str] | None,
    key: int | str,
    refused: dict[str, str],
) -> BlockMap:
    """The block with its writes named: attention's, the MLP's, and what is neither.

    `by_position` are the branches that may be an MLP, None where every one that is not attention may.
    """
    gains = [gain for _, gain in _parameters(layer.inside, layer.name, candidates[0])]
    of = (block.W_O, block.attn_out, block.attention)
    if block.along == HEADS:  # each of its outputs is a write of its own
        of = (None, None, None)
    from_attention = downstream(layer.inside, of, candidates, gains)
    crosses = list(block.crosses)
    from_sources = [
        downstream(layer.inside, (cross.W_O, cross.out, cross.attention), candidates, gains)
        for cross in crosses
    ]
    if block.W_O is None and block.attn_out is None and layer.attention is not None:
        order = layer.attention.order
        own = after_attention(layer.inside, block.attention or "", order, block.repeated)
        from_attention += [c for c in candidates if own & set(c.modules)]
    others: list[Write] = []
    writes: list[Write] = []
    for candidate, scale in sums.writes:
        # The last module to return this value.
        of = (candidate.gain, candidate.pooling, candidate.gate, candidate.channels)
        write = Write(candidate.modules[0], scale, *of)
        writes.append(write)
        if write.pooling is not None:  # no change of it can be put in place of what was pooled
            others.append(write)
        elif any(c.modules is candidate.modules for c in from_attention):
            if block.attn_write is not None:
                others.append(write)
                continue
            direct = write.plain and sums.stays and block.W_O in candidate.modules
            block = replace(block, attn_write=write, direct=direct)
            if block.attn_out is None and write.module in block.repeated:
                block = replace(block, attn_out=write.module)
        elif (source := _source_of(candidate, crosses, from_sources)) is not None:
            crosses[source] = replace(crosses[source], write=write)
        elif block.mlp_write is None and (
            by_position is None
            or branch_of(layer.name, candidate, layer, candidates) in by_position
        ):
            out = before_norm(layer.inside, write.module, candidates, gains)
            block = neurons(layer.inside, replace(block, mlp_write=write, mlp_out=out), candidates)
        else:
            others.append(write)
    convolved = [
        name
        for candidate, _ in sums.writes
        for name in candidate.modules
        if (call := layer.inside.once(name)) is not None
        and by_channel(layer.inside, name, call)
        and not elementwise(layer.inside, name, call)
    ]
    block = replace(
        block,
        crosses=tuple(crosses),
        others=tuple(others),
        firsts=tuple(
            Normed(norm, tuple(writes[start:end]))
            for (start, _), (end, norm) in pairwise([(0, ""), *sums.firsts])
        ),
        norm_mid=sums.norm_mid,
        norm_post=sums.norm_post,
        norm_pre=sums.norm_pre,
        carry_first=sums.carry_first,
        carry_mid=sums.carry_mid,
        carry_post=sums.carry_post,
        convolved=convolved[0] if convolved else None,
        reshapes_behind=sums.reshapes_behind,
    )
    touched = {*(write.module for write in writes), block.W_out, block.mlp_out, sums.norm_mid}
    touched |= {block.W_O, block.attn_out, *(cross.out for cross in crosses)}
    block = replace(block, repeated=block.repeated & touched, turned=block.turned & touched)
    for prefix, cross in zip(CROSSES, crosses, strict=False):
        if cross.write is None:
            adds = f"does not add the output of '{cross.attention}' to the residual stream"
            refused.setdefault(f"{prefix}write", f"'{block.name}' {adds}")
    return _with_mid(layer, block, sums, writes, key)


def _source_of(
    candidate: Candidate, crosses: list[CrossAttention], from_sources: list[list[Candidate]]
) -> int | None:
    """Which of a block's attentions to sources, of those that no write is known of, made a candidate; None if none."""
    return next(
        (
            i
            for i, (cross, made) in enumerate(zip(crosses, from_sources, strict=True))
            if cross.write is None and any(c is candidate for c in made)
        ),
        None,
    )


def _with_mid(
    layer: Layer,
    block: BlockMap,
    sums: Sums,
    writes: list[Write],
    key: int | str,
) -> BlockMap:
    """The block with the writes that the MLP reads, and whether it reads attention's at all.

    Where the MLP writes first, its write is before what attention reads; where it reads attention's output beside
    the stream, before what is read next.
    """
    if sums.n_before_mid is not None:
        return replace(block, before_mid=tuple(writes[: sums.n_before_mid]))
    if block.mlp_write is None:
        return block
    both = [writes.index(w) for w in (block.attn_write, block.mlp_write) if w is not None]
    before = writes[: max(both)]
    if not before and layer.attention is not None and block.attn_write is None:
        before = writes[:1] if len(writes) > 1 else []
    if not before:
        return block
    if sums.rescales:  # nothing inside reads a middle
        return replace(block, parallel=block.attn_write is not None)
    mid = added(layer.hidden(key).double(), layer, before)
    allowed = relative_tolerance(layer.output.dtype)
    sequential = any(
        x.numel() == mid.numel() and relative_error(x.reshape(mid.shape), mid)[0] <= allowed
        for calls in layer.inside.calls.values()
        for call in calls
        for x in call.inputs
    )
    if sequential:
        return replace(block, before_mid=tuple(before))
    return replace(block, parallel=block.attn_write is not None)


def downstream(
    seen: Recording,
    addresses: tuple[str | None, str | None, str | None],
    candidates: list[Candidate],
    gains: list[Tensor],
) -> list[Candidate]:
    """Candidates that are an attention's output, passed through dropout, scaling or a norm or not.

    `addresses`: its W_O, the module that returns its output, and its module.
    """
    starts = [name for name in addresses if name]
    reached = [
        candidate
        for candidate in candidates
        if any(
            name in starts or (addresses[-1] or "?").startswith(name + ".")
            for name in candidate.modules
        )
    ]
    for candidate in reversed(candidates):  # in order of execution
        for name in candidate.modules:
            call = seen.once(name)
            if call and call.inputs and by_channel(seen, name, call):
                known = any(candidate is each for each in reached)
                if not known and any(_made_of(call.inputs[0], c.value, gains) for c in reached):
                    reached.append(candidate)
    return reached


def _made_of(x: Tensor, value: Tensor, gains: list[Tensor]) -> bool:
    """Whether x is `value`, or `value` times one of the block's parameters."""
    if x.numel() != value.numel():
        return False
    return same(x, value) or any(same(x, value * gain) for gain in gains)


def before_norm(
    seen: Recording, module: str, candidates: list[Candidate], gains: Sequence[Tensor] = ()
) -> str:
    """The MLP's own output: what a norm that makes the write reads, in the MLP or behind it, else the write itself."""
    names = next((c.modules for c in candidates if module in c.modules), [module])
    for name in names:
        call = seen.once(name)
        if call and call.inputs and by_channel(seen, name, call):
            for candidate in candidates:
                if name not in candidate.modules and _made_of(
                    call.inputs[0], candidate.value, list(gains)
                ):
                    return candidate.modules[0]
    return module


def neurons(seen: Recording, block: BlockMap, candidates: list[Candidate]) -> BlockMap:
    """W_out: the linear layer that returns mlp_out as it is; none where experts or gates mix it."""
    if block.mlp_out in block.turned:
        return block
    for name in next(c.modules for c in candidates if block.mlp_out in c.modules):
        call, module = seen.once(name), seen.module.get_submodule(name)
        linear = isinstance(getattr(module, "weight", None), Tensor)
        leaf = linear and not any(True for _ in module.children())
        if leaf and call and call.inputs and not elementwise(seen, name, call):
            return replace(block, W_out=name, d_mlp=call.inputs[0].shape[-1])
    return block
