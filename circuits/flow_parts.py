"""The sums that build a residual stream, and which of their parts hold most of each.

Every position's residual stream is a sum: what it held before, what each head brought from each source
position, biases, what the MLP wrote. Each part's share is its proximity to the whole. The number of
parts grows with heads × positions²; nearly all of them are settled by bounds and never computed (see
`kept_parts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.relevance import SINK
from interp.devices import float_type, wide
from interp.errors import Refused
from interp.models.model import Model
from interp.models.verify import relative_tolerance
from interp.run.cache import Run

FLOOR = 1e-5
"""The least proximity a part can have, as published."""
MASS = 0.8
"""Default share of a sum that the kept parts hold together."""
FIRST_LOOK = 8
"""Parts of an unsettled position that are computed first; then twice as many, and so on."""
ELEMENTS = 2**20
"""Numbers of one exact evaluation held at once."""
SITES = ("pattern", "v", "resid_pre", "resid_post", "attn_out", "attn_write", "mlp_write")


# --- sums and their parts ----------------------------------------------------------------------


@dataclass(frozen=True)
class Sum:
    """One addition of a block, at every position: `whole` = Σ attention parts + Σ `others`.

    Head h brings weights[h, i, j] · v[h, j] @ W_O[h] from j to i; a norm after attention is folded in
    with its scale held fixed, so that the parts still sum. `stage` is where the whole lies ("mid" or
    "post"), `source` where its parts were read ("pre" or "mid").
    """

    layer: int
    stage: str
    source: str
    whole: Float[Tensor, "pos d_model"]
    others: dict[str, Float[Tensor, "pos d_model"]]
    weights: Float[Tensor, "n_heads query_pos key_pos"] | None = None
    v: Float[Tensor, "n_heads key_pos d_head"] | None = None
    W_O: Float[Tensor, "n_heads d_head d_model"] | None = None


def proximity(
    part: Float[Tensor, "*batch d_model"], whole: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch"]:
    """How much closer the whole is to zero without the part: max(‖w‖₁ − ‖w − p‖₁, 1e-5).

    Written as Σ_d min(s p, 2|w| − s p) with s = sign w, which is the same number without the
    difference of two large ones.

    >>> proximity(torch.tensor([1.0, -1.0]), torch.tensor([3.0, 0.5]))
    tensor(1.0000e-05)
    >>> proximity(torch.tensor([1.0, 0.5]), torch.tensor([3.0, 0.5]))
    tensor(1.5000)
    """
    along = torch.where(whole < 0, -part, part)
    return torch.minimum(along, 2 * whole.abs() - along).sum(-1).clamp_min(FLOOR)


def sums(
    model: Model,
    run: Run,
    layer: int,
    *,
    positions: Sequence[int] | None = None,
    exclude_sink: bool = False,
) -> list[Sum]:
    """The additions of one block, in order: attention then MLP, or one of both in a parallel block.

    `run` must have captured `SITES`, of one prompt. That the parts sum to what the model wrote is
    checked at `positions` (all by default); Refused where they do not.
    """
    block, cache = model.spec.blocks[layer], run.cache

    def at(site: str) -> Tensor:
        return wide(cache[f"{site}.{layer}"][0].detach())

    pre, post, written = at("resid_pre"), at("resid_post"), at("attn_write")
    weights, v, W_O, bias = attention_parts(model, run, layer)
    rows = slice(None) if positions is None else list(positions)
    heads = ((weights[:, rows] @ v) @ W_O).sum(0)
    norm = norm_after_attention(model, layer)
    check_sum(model, layer, "attention", heads + bias[rows], written[rows], norm)
    if exclude_sink:
        weights = weights.clone()
        weights[:, SINK + 1 :, SINK] = 0
    attention = {"weights": weights, "v": v, "W_O": W_O}
    others = {"residual": pre} | ({"bias": bias} if bool(bias.any()) else {})
    if block.mlp_write is None:
        return [Sum(layer, "post", "pre", post, others, **attention)]
    mlp = at("mlp_write")
    if block.parallel:
        return [Sum(layer, "post", "pre", post, others | {"mlp": mlp}, **attention)]
    mid = pre + written
    return [
        Sum(layer, "mid", "pre", mid, others, **attention),
        Sum(layer, "post", "mid", post, {"residual-mlp": mid, "mlp": mlp}),
    ]


def norm_after_attention(model: Model, layer: int) -> str | None:
    """The norm between an attention and the stream; None where it is written as it is."""
    block = model.spec.blocks[layer]
    return None if block.direct or block.attn_write is None else block.attn_write.module


def check_sum(
    model: Model, layer: int, what: str, parts: Tensor, written: Tensor, norm: str | None
) -> None:
    """Refused unless the parts sum to what was written; only rounding may lie between, the norm's too."""
    off = float((parts - written).abs().max() / written.abs().max().clamp_min(1e-6))
    computed = {model.dtype} if norm is None else {model.dtype, model.norm(norm).dtype}
    if off > (allowed := max(map(relative_tolerance, computed))):
        raise Refused(
            f"layer {layer} of {model.id}: parts and biases do not sum to what {what} writes "
            f"(off by {off:.1e} of it, allowed {allowed:.1e}); its flow cannot be drawn"
        )


def attention_parts(model: Model, run: Run, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weights [h q k], v [h k d_head], W_O [h d_head d_model], bias [q d_model] of what is written.

    A norm after attention is linear once its scale is held: out/σ, centred, times the gain. Gain and
    centring go into W_O, 1/σ (one a position) into the weights.
    """
    block = model.spec.blocks[layer]
    assert block.attn_write is not None
    weights = wide(run.cache[f"pattern.{layer}"][0].detach())
    v = wide(run.cache[f"v.{layer}"][0].detach()).transpose(0, 1)
    v = v[[model.spec.kv_group(layer, head) for head in range(block.n_heads)]]
    W, b = wide(model.W_O(layer).detach()), wide(model.b_O(layer).detach())
    out = run.cache[f"attn_out.{layer}"][0].detach()
    norm = norm_after_attention(model, layer)
    shrink, W, bias = through_norm(model, norm, out, W, b, block.attn_write.scale)
    return weights * shrink, v, W, bias


def through_norm(
    model: Model, norm: str | None, out: Tensor, W: Tensor, b: Tensor, scale: float
) -> tuple[Float[Tensor, "pos 1"], Tensor, Float[Tensor, "pos d_model"]]:
    """(shrink, W, bias): scale · norm(x W + b) = shrink · (x W') + bias, the norm's σ(out) held."""
    shrink, after = torch.ones(len(out), 1, dtype=W.dtype, device=W.device), torch.zeros_like(b)
    if norm is not None:
        held = model.norm(norm)
        gain = wide(held.gain.to(W.device))
        W, b = held.centre(W) * gain, held.centre(b) * gain
        after, shrink = wide(held.bias.to(W.device)), 1 / held.scale(out)
    return shrink, W * scale, (shrink * b + after) * scale


# --- which parts are kept ----------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Which parts of a sum are kept: the largest that hold `mass` of it; or all above `threshold`."""

    mass: float = MASS
    threshold: float | None = None


@dataclass
class Kept:
    """The kept parts of one Sum, one entry a part, with weights that sum to one at each position.

    position: [n]. other: [n], index into the sum's others, −1 for attention. head, source: [n].
    weight: [n], share of what was kept. computed, parts: how many were computed, of how many.
    """

    position: np.ndarray
    other: np.ndarray
    head: np.ndarray
    source: np.ndarray
    weight: np.ndarray
    computed: int
    parts: int


@torch.no_grad()
def kept_parts(whole: Sum, positions: Sequence[int] | Tensor, rule: Rule) -> Kept:
    """The parts of `whole` that matter at each of `positions`, by the rule, as if all were computed.

    Two facts settle nearly every part without computing it. With s = sign w:
    π(p, w) ≤ Σ_d s_d p_d, because |x| lies above its tangents; that is A_ij times a dot product in
    d_head dimensions (W_O pulled back), and at most A_ij ‖u‖₁. And
    π(p, w) ≥ Σ_d s_d p_d − ½ Σ_d p_d² / |w_d|, because (x − |w|)⁺ ≤ x² / 4|w|. Parts are computed from
    the largest bound down, until neither the order nor the total of the rest can change what is kept.
    """
    rows = torch.as_tensor(positions, device=whole.whole.device)
    others = torch.stack(
        [proximity(p[rows], whole.whole[rows]) for p in whole.others.values()], dim=1
    )
    others = others.to(float_type(others.device))
    indices = torch.arange(others.shape[1], device=rows.device).expand_as(others)
    if whole.weights is None:
        return _collect(rows, others, indices, others.sum(1), rule, 0)
    heads = _Heads(whole)
    high = heads.high(rows)
    state = _State(rows, others, indices, torch.zeros_like(high[:, :1]), high)
    found, n_parts, computed, look = [], int((heads.A[:, rows] > 0).sum()), 0, 0
    n_keys, n_others = whole.weights.shape[2], others.shape[1]
    while True:
        done = state.decided(rule)
        found.append(state.kept(done, rule, n_keys, n_others))
        if bool(done.all()):
            return _joined(found, computed, n_parts)
        state = state.of(~done)
        look = max(FIRST_LOOK, 2 * look)
        if look == 2 * FIRST_LOOK:  # the upper bounds did not settle it
            state.low = heads.low(state.rows).masked_fill_(state.high == 0, 0.0)
        computed += state.look_at(heads, look, n_others)


class _Heads:
    """Attention parts of a Sum: bounds of all, exact values of some; index = head · n_keys + key."""

    def __init__(self, whole: Sum):
        assert whole.weights is not None and whole.v is not None and whole.W_O is not None
        self.whole, self.A, self.v, self.W_O = whole.whole, whole.weights, whole.v, whole.W_O
        # Float32 sums over d_model: 1e-5 of ‖u‖₁, here of a bound of it, covers their rounding.
        self.slack = 1e-5 * (self.v.abs() @ self.W_O.abs().sum(-1, keepdim=True))[..., 0]

    def high(self, rows: Tensor) -> Tensor:
        """Upper bounds [rows heads·keys]; 0 where attention is 0: there is no such part."""
        return self._bound(rows, self._along(rows) + self.slack[:, None])

    def low(self, rows: Tensor) -> Tensor:
        """Lower bounds [rows heads·keys]."""
        curve = 0.5 / self.whole[rows].abs().clamp_min(1e-12)
        u = self.v @ self.W_O
        excess = (curve @ (u * u).flatten(0, 1).T).view(len(rows), len(self.A), -1)
        excess = self.A[:, rows] * excess.transpose(0, 1)
        return self._bound(rows, self._along(rows) - excess - self.slack[:, None])

    def _along(self, rows: Tensor) -> Tensor:
        """s · u [heads rows keys], the proximity of a part that nowhere overshoots, for A = 1."""
        sign = torch.where(self.whole[rows] < 0, -1.0, 1.0).to(self.W_O.dtype)
        pulled = sign @ self.W_O.flatten(0, 1).T
        pulled = pulled.view(len(rows), *self.W_O.shape[:2]).transpose(0, 1)
        return pulled @ self.v.transpose(1, 2)

    def _bound(self, rows: Tensor, of_unit: Tensor) -> Tensor:
        A = self.A[:, rows]
        bound = (A * of_unit).clamp_min_(FLOOR).mul_(A > 0)
        return bound.transpose(0, 1).flatten(1)

    def exact(self, rows: Tensor, index: Tensor) -> Tensor:
        """Proximity [rows k] of the parts at `index` [rows k]; 0 where attention is 0."""
        n_keys = self.A.shape[2]
        head, key = index // n_keys, index % n_keys
        A = self.A[head, rows[:, None], key]
        u, place = self._written(index)
        out = torch.empty_like(A)
        step = max(1, ELEMENTS // (index.shape[1] * self.whole.shape[1]))
        for i in range(0, len(rows), step):
            here = slice(i, i + step)
            part = A[here, :, None] * u[place[here]]
            out[here] = proximity(part, self.whole[rows[here], None])
        return torch.where(A > 0, out, 0.0)

    def _written(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """u = v W_O of every (head, key) in `index`, once each, and each entry's place among them."""
        n_keys = self.A.shape[2]
        pairs, place = torch.unique(index, return_inverse=True)
        head, key = pairs // n_keys, pairs % n_keys
        counts = torch.bincount(head, minlength=len(self.W_O)).tolist()
        keys = key.split(counts)
        parts = [self.v[h, of] @ self.W_O[h] for h, of in enumerate(keys) if len(of)]
        return torch.cat(parts), place


@dataclass
class _State:
    """Positions that are not settled: exact values so far, bounds of the rest.

    rows: [n]. values, index: [n m], known parts, the others first. low, high: [n heads·keys], zero
    where a part is known. low is one column of zeros until it is needed.
    """

    rows: Tensor
    values: Tensor
    index: Tensor
    low: Tensor
    high: Tensor

    def of(self, some: Tensor) -> _State:
        """These positions only."""
        parts = (self.rows, self.values, self.index, self.low, self.high)
        return _State(*(part[some] for part in parts))

    def look_at(self, heads: _Heads, n: int, n_others: int) -> int:
        """Compute the next n parts of each position, largest bound first; how many there were."""
        chosen = self.high.topk(min(n, self.high.shape[1]), dim=1)
        exact = torch.where(chosen.values > 0, heads.exact(self.rows, chosen.indices), 0.0)
        self.values = torch.cat([self.values, exact.to(self.values)], dim=1)
        self.index = torch.cat([self.index, n_others + chosen.indices], dim=1)
        if self.low.shape[1] == self.high.shape[1]:
            self.low.scatter_(1, chosen.indices, 0.0)
        self.high.scatter_(1, chosen.indices, 0.0)
        return int((chosen.values > 0).sum())

    def total(self) -> tuple[Tensor, Tensor]:
        """Bounds of the sum of all proximities, each [n]."""
        known = self.values.sum(1)
        rest = [bound.sum(1, dtype=known.dtype) for bound in (self.low, self.high)]
        return known + rest[0], known + rest[1]

    def decided(self, rule: Rule) -> Tensor:
        """Where no values that the rest could have would change what the rule keeps."""
        ordered = self.values.sort(dim=1, descending=True).values
        (low, high), next_bound = self.total(), self.high.amax(1)
        fewest, most = _count(ordered, high, rule), _count(ordered, low, rule)
        if rule.threshold is not None:
            return (fewest == most) & (next_bound <= rule.threshold * low)
        last = ordered.gather(1, (most - 1)[:, None])[:, 0]
        reached = (self.values.sum(1) >= rule.mass * high) | (next_bound == 0)
        return (fewest == most) & (last >= next_bound) & reached

    def kept(self, done: Tensor, rule: Rule, n_keys: int, n_others: int) -> Kept:
        """What is kept where it is decided: any total between the bounds gives the same."""
        low, high = self.total()
        total = (low + high) / 2
        return _collect(
            self.rows[done],
            self.values[done],
            self.index[done],
            total[done],
            rule,
            n_keys,
            n_others,
        )


def _count(ordered: Tensor, total: Tensor, rule: Rule) -> Tensor:
    """How many of the parts, largest first along the last axis, the rule keeps."""
    if rule.threshold is not None:
        return (ordered > rule.threshold * total[:, None]).sum(1)
    return ((ordered.cumsum(1) < rule.mass * total[:, None]).sum(1) + 1).clamp_max(ordered.shape[1])


def _collect(
    rows: Tensor,
    values: Tensor,
    index: Tensor,
    total: Tensor,
    rule: Rule,
    n_keys: int,
    n_others: int = 0,
) -> Kept:
    """The kept parts, weights summing to one at each row; attention parts follow the others in `index`."""
    ordered, order = values.sort(dim=1, descending=True)
    count = _count(ordered, total, rule)
    kept = (torch.arange(ordered.shape[1], device=rows.device) < count[:, None]) & (ordered > 0)
    weight = ordered / (ordered * kept).sum(1, keepdim=True).clamp_min(FLOOR)
    place, column = kept.nonzero(as_tuple=True)
    part, position = index.gather(1, order)[place, column], rows[place]
    attention = part - n_others if n_keys else torch.full_like(part, -1)
    other, keys = attention < 0, max(n_keys, 1)
    found = (
        position,
        torch.where(other, part, -1),
        torch.where(other, -1, attention // keys),
        torch.where(other, position, attention % keys),
        weight[place, column],
    )
    return Kept(*(x.cpu().numpy() for x in found), computed=0, parts=0)


def _joined(found: list[Kept], computed: int, parts: int) -> Kept:
    columns = ("position", "other", "head", "source", "weight")
    whole = {name: np.concatenate([getattr(kept, name) for kept in found]) for name in columns}
    return Kept(**whole, computed=computed, parts=parts)


# --- tables ------------------------------------------------------------------------------------


class Columns:
    """A table that grows by blocks of columns; a DataFrame is made once, at the end."""

    def __init__(self, types: Mapping[str, type]):
        self.blocks = {name: [np.zeros(0, dtype)] for name, dtype in types.items()}

    def add(self, block: dict[str, np.ndarray]) -> None:
        for name, parts in self.blocks.items():
            parts.append(block[name])

    def table(self) -> pd.DataFrame:
        return pd.DataFrame({name: np.concatenate(parts) for name, parts in self.blocks.items()})
