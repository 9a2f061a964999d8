"""Blocks that return a stream of another width or length than they read.

Nothing of what they read can go on as it is. Some begin the new stream with what they compute themselves, pooled
where it has the positions of what they read:

    resid_post = Σ writes

Others add to the stream first, and pool what they have before they go on. Their writes up to there sum to
what a norm reads last in the shape of the block's input; what is written behind that is not told:

    resid_mid = resid_pre + Σ writes
"""

from __future__ import annotations

from interp.models.block_map import BlockMap, Carry
from interp.models.pooling import poolings
from interp.models.projections import same
from interp.models.stack import Layer
from interp.models.sums import Candidate, Sums, candidates_of, norms_of, solved
from interp.models.writes import downstream


def as_it_returns(layer: Layer, block: BlockMap) -> tuple[Sums | None, list[Candidate]]:
    """The sum, if attention's output is all that the block returns, norms of it or not; and all candidates.

    Of what else adds up to what it returns, `restarted` and its trial decide.
    """
    candidates = candidates_of(layer.inside, layer.output.shape)
    for candidate in downstream(layer.inside, (block.W_O, None, None), candidates, []):
        if same(candidate.value, layer.output):
            return Sums([(candidate, 1.0)], carry_post=Carry(0.0)), candidates
    return None, candidates + _pooled(layer)


def _pooled(layer: Layer) -> list[Candidate]:
    """What modules returned before attention, pooled to as many positions as the block returns."""
    assert layer.call.output is not None
    wanted, until = layer.call.output.shape, layer.attention.order if layer.attention else 0
    return [
        Candidate(pooling(out), [name], call.order, pooling=pooling)
        for name, calls in layer.inside.calls.items()
        if len(calls) == 1
        and (out := (call := calls[0]).output) is not None
        and call.order <= until
        and out.is_floating_point()
        and (out.shape[0], out.shape[-1]) == (wanted[0], wanted[-1])
        and out.numel() > wanted.numel()
        for pooling in poolings(out.shape, wanted)
    ]


def before_the_shape_changes(
    layer: Layer, block: BlockMap, key: int | str
) -> tuple[Sums | None, list[Candidate]]:
    """The writes that sum to what a norm reads last in the shape of the block's input; and the candidates.

    None where attention's output is not among them: then it is not known what it is added to.
    """
    pre, dtype = layer.hidden(key), layer.output.dtype
    candidates = candidates_of(layer.inside, pre.shape)
    for order, name, x, _ in reversed(norms_of(layer.inside, pre.shape)):
        if same(x, pre):
            continue
        earlier = [c for c in candidates if c.order < order]
        writes = solved(pre.double(), x.double(), earlier, dtype)
        if writes and _attention_among(writes, layer, block, candidates):
            return Sums(writes, n_before_mid=len(writes), reshapes_behind=name), candidates
    return None, candidates


def _attention_among(
    writes: list[tuple[Candidate, float]],
    layer: Layer,
    block: BlockMap,
    candidates: list[Candidate],
) -> bool:
    of = (block.W_O, block.attn_out, block.attention)
    reached = downstream(layer.inside, of, candidates, [])
    return layer.attention is None or any(c is each for c, _ in writes for each in reached)
