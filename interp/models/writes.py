"""What a block writes to the residual stream, named: attention's, the MLP's, a source's, and what is neither."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from torch import Tensor

from interp.models.block_map import BlockMap, CrossAttention, Normed, Write
from interp.models.projections import by_channel, elementwise, same
from interp.models.recording import Recording
from interp.models.relative import relative_error, relative_tolerance
from interp.models.repeated import after_attention
from interp.models.several import HEADS
from interp.models.stack import Layer
from interp.models.sums import Candidate, Sums, own_parameters
from interp.models.written import added
from interp.sites import CROSSES


def branch_of(block: str, write: Candidate, layer: Layer, candidates: list[Candidate]) -> str:
    """The module of the block that makes a write: behind a norm of the write, its outermost part."""
    gains = [gain for _, gain in own_parameters(layer.inside, layer.name, write)]
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
    gains = [gain for _, gain in own_parameters(layer.inside, layer.name, candidates[0])]
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
