"""Blocks with several residual streams: what they mix into them, and which of it is the MLP's output.

Hyper-connections and AltUp carry n streams side by side and mix them before and after attention and MLP,
with weights that depend on the token. Nothing is added to a stream as it is; but every stream that a
block returns is, at each position, a combination of the n it read and of a few module outputs:

    post_s = Σ_j A_sj pre_j + Σ_m b_sm out_m        (A and b: any numbers, others at every position)

Source: Zhu et al. 2024, "Hyper-Connections" (arXiv:2409.19606); Baykal et al. 2023, "Alternating Updates
for Efficient Transformers" (arXiv:2301.13310).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from interp.models.block_map import BlockMap
from interp.models.draft import Draft
from interp.models.projections import elementwise
from interp.models.relative import RELATIVE_TOLERANCE
from interp.models.stack import Layer
from interp.models.sums import Candidate, candidates_of
from interp.models.trials import works_by_position
from interp.models.writes import before_norm, branch_of, downstream, neurons
from interp.models.written import one_stream, streams

WHY = (
    "the block mixes several residual streams, with weights that depend on the token: what attention and "
    "MLP return is added to none of them as it is (attn_out and mlp_out are there)"
)
ROUNDINGS = 8
"""How many roundings of a stream's size a combination may be off: a product of small matrices."""
AS_GOOD = 2
"""Times what all outputs together leave over (at least one rounding), fewer may leave."""


def mixed_blocks(draft: Draft) -> list[BlockMap]:
    """The blocks with the modules that they mix into their streams, and the MLP among these."""
    layers, key = draft.layers, draft.key
    candidates = [candidates_of(layer.inside, _shape(layer, key)) for layer in layers]
    chosen = [
        _smallest_span(layer, some, key) for layer, some in zip(layers, candidates, strict=True)
    ]
    branches = [
        {id(c): branch_of(layer.name, c, layer, some) for c in few or ()}
        for layer, some, few in zip(layers, candidates, chosen, strict=True)
    ]
    tried = sorted({name for branch in branches for name in branch.values()})
    by_position = works_by_position(draft, tried)
    made = []
    for (layer, block), some, few, branch in zip(
        draft.pairs, candidates, chosen, branches, strict=True
    ):
        if few is None:
            why = f"no outputs inside '{block.name}' make its residual streams of those it read"
            draft.refuse("mlp_out", why)
            draft.refuse("mlp_post", why)
            made.append(block)
            continue
        block = replace(block, mixed=tuple(c.modules[0] for c in few))
        reached = {
            id(c)
            for c in downstream(
                layer.inside, (block.W_O, block.attn_out, block.attention), some, []
            )
        }
        after = max((c.order for c in few if id(c) in reached), default=0)
        mlps = [c for c in few if id(c) not in reached and branch[id(c)] in by_position]
        # Other things work by position too (a low-rank branch): the MLP is the first behind attention.
        mlps = [c for c in mlps if c.order > after] or mlps
        outs = [before_norm(layer.inside, c.modules[0], some) for c in mlps]
        outs = [m for m in outs if not elementwise(layer.inside, m, layer.inside.call(m))]
        if outs:
            block = neurons(layer.inside, replace(block, mlp_out=outs[0]), some)
        made.append(block)
    return made


def streams_in_a_row(layers: list[Layer]) -> int:
    """How many streams may lie one after the other in the last axis: as many as attention's output is narrower."""
    ratios = set()
    for layer in layers:
        if layer.attention is not None:
            call = layer.inside.once(layer.inside.names[layer.attention.module])
            width = call.output.shape[-1] if call and call.output is not None else 0
            if width == 0 or layer.call.output is None or layer.output.shape[-1] % width:
                return 1
            ratios.add(layer.output.shape[-1] // width)
    return ratios.pop() if len(ratios) == 1 else 1


def _smallest_span(
    layer: Layer, candidates: list[Candidate], key: int | str
) -> list[Candidate] | None:
    """The candidates, first called first, of which the block's streams are made; None if all do not do.

    What the others can do without is left out, norms first (what an MLP reads is made of the streams and
    of attention's output), then the earliest: experts before the MLP that they are part of.
    """
    pre, post = streams(layer.hidden(key), layer), streams(layer.output, layer)
    n, width = pre.shape[-2:]
    few = candidates[: max(1, width // 2 - n)]  # of more than width vectors everything can be made
    parts = torch.cat(
        [pre, *[one_stream(c.value, pre[..., 0, :])[..., None, :] for c in few], post], dim=-2
    )
    parts = torch.where(parts.isfinite(), parts, 0.0)
    # Distances among so few vectors are the same in the few dimensions that they span.
    small = torch.linalg.qr(parts.mT).R
    aim, eps = small[..., -n:], torch.finfo(layer.output.dtype).eps

    def left(chosen: list[int]) -> float:
        basis = small[..., [*range(n), *(n + i for i in chosen)]]
        # Streams may be equal (in the first block): for matrices that are not of full rank.
        weights = torch.linalg.lstsq(basis, aim, driver="gelsd").solution
        return float(
            ((basis @ weights - aim).norm(dim=-2) / aim.norm(dim=-2).clamp_min(1e-30)).max()
        )

    chosen = list(range(len(few)))
    least, floor = left(chosen), RELATIVE_TOLERANCE[torch.float64]
    if least > max(ROUNDINGS * eps, floor):
        return None
    allowed = max(AS_GOOD * least, AS_GOOD * eps, floor)
    for i in sorted(chosen, key=lambda i: (not _is_norm(layer, few[i]), few[i].order)):
        if left(fewer := [j for j in chosen if j != i]) <= allowed:
            chosen = fewer
    return sorted((few[i] for i in chosen), key=lambda c: c.order)


def _is_norm(layer: Layer, candidate: Candidate) -> bool:
    return all(elementwise(layer.inside, m, layer.inside.call(m)) for m in candidate.modules)


def _shape(layer: Layer, key: int | str) -> torch.Size:
    return streams(layer.hidden(key), layer)[..., 0, :].shape
