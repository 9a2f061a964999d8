"""Along which route did the information come? The important-flow graph of one prompt.

Every position's residual stream is a sum: what it held before, what each head brought from each
source position, biases, what the MLP wrote. Each part's share of the sum is its proximity to it; the
parts that hold most of the sum are kept, and from the chosen token at the last layer the kept parts
are followed back to the input. The number of parts grows with heads × positions²; nearly all of them
are settled by bounds and never computed (see `_kept`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.relevance import (
    SINK,
    Target,
    attention_flow,
    chefer_relevance,
    gradient_times_input,
    integrated_gradients,
    one_prompt,
    position_of,
    rollout,
    target_of,
)
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.models.spec import BlockMap
from interp.models.verify import RELATIVE_TOLERANCE
from interp.models.weights import FrozenNorm, linear_map
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.batch import Batch
from interp.run.cache import Run
from interp.run.edits import Edit

FLOOR = 1e-5
"""The least proximity a part can have, as published."""
MASS = 0.8
"""Default share of a sum that the kept parts hold together."""
FIRST_LOOK = 8
"""Parts of an unsettled position that are computed first; then twice as many, and so on."""
ELEMENTS = 2**20
"""Numbers of one exact evaluation held at once."""
SITES = ("pattern", "v", "z", "resid_pre", "resid_post", "attn_out", "attn_write", "mlp_write")
EDGE_COLUMNS = [
    "kind",
    "layer",
    "position",
    "stage",
    "source_position",
    "source_stage",
    "weight",
    "through",
]
HEAD_COLUMNS = ["layer", "position", "source_position", "head", "weight"]


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


def sums(model: Model, run: Run, layer: int, *, exclude_sink: bool = False) -> list[Sum]:
    """The additions of one block, in order: attention then MLP, or one of both in a parallel block.

    `run` must have captured `SITES`, of one prompt.
    Raises Refused where the parts do not sum to what the model wrote.
    """
    block, cache = model.spec.blocks[layer], run.cache

    def at(site: str) -> Tensor:
        return cache[f"{site}.{layer}"][0].detach().float()

    pre, post, written = at("resid_pre"), at("resid_post"), at("attn_write")
    weights, v, W_O, bias = _attention_parts(model, run, layer)
    heads = torch.einsum("hqk,hkd,hdm->qm", weights, v, W_O)
    # The pattern and v are what the model multiplied: only rounding may lie between.
    off = float((heads + bias - written).abs().max() / written.abs().max().clamp_min(1e-6))
    if off > (allowed := RELATIVE_TOLERANCE.get(model.dtype, 6e-2)):
        raise Refused(
            f"layer {layer} of {model.id}: heads and biases do not sum to what attention writes "
            f"(off by {off:.1e} of it, allowed {allowed:.1e}); its flow cannot be drawn"
        )
    if exclude_sink:
        weights = weights.clone()
        weights[:, SINK + 1 :, SINK] = 0
    attention = {"weights": weights, "v": v, "W_O": W_O}
    others = {"residual": pre} | ({"bias": bias} if bool(bias.any()) else {})
    if block.mlp_write is None:
        return [Sum(layer, "post", "pre", post, others, **attention)]
    mlp = at("mlp_write")
    if block.parallel:
        return [Sum(layer, "post", "pre", post, others | {"ffn": mlp}, **attention)]
    mid = pre + written
    return [
        Sum(layer, "mid", "pre", mid, others, **attention),
        Sum(layer, "post", "mid", post, {"residual-ffn": mid, "ffn": mlp}),
    ]


def _attention_parts(model: Model, run: Run, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weights [h q k], v [h k d_head], W_O [h d_head d_model], bias [q d_model] of what is written.

    A norm after attention is linear once its scale is held: out/σ, centred, times the gain. Gain and
    centring go into W_O, 1/σ (one a position) into the weights.
    """
    block = model.spec.blocks[layer]
    W, b, scale = *_output_map(model, block), 1.0
    assert block.attn_write is not None
    scale = block.attn_write.scale
    weights = run.cache[f"pattern.{layer}"][0].detach().float()
    v = run.cache[f"v.{layer}"][0].detach().float().transpose(0, 1)
    v = v[[model.spec.kv_group(layer, head) for head in range(block.n_heads)]]
    after = torch.zeros_like(b)
    shrink = torch.ones(weights.shape[1], 1, device=weights.device)
    if not block.direct:
        norm = FrozenNorm(model.module.get_submodule(block.attn_write.module), model.spec.d_model)
        gain = norm.gain.to(W.device).float()
        if norm.centred:
            W, b = W - W.mean(-1, keepdim=True), b - b.mean()
        W, b, after = W * gain, b * gain, norm.bias.to(W.device).float()
        shrink = 1 / norm.scale(run.cache[f"attn_out.{layer}"][0].detach())
    return weights * shrink, v, W * scale, (shrink * b + after) * scale


def _output_map(model: Model, block: BlockMap) -> tuple[Tensor, Tensor]:
    """W_O [n_heads d_head d_model] and b_O [d_model], float32."""
    module = model.module.get_submodule(block.W_O or "")
    W, b = linear_map(module, block.n_heads * block.d_head, model.device)
    return W.detach().float().reshape(block.n_heads, block.d_head, -1), b.detach().float()


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
    ).double()
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
        self.u = self.v @ self.W_O
        # Float32 sums over d_model: 1e-5 of what was added covers their rounding.
        self.slack = 1e-5 * self.u.abs().sum(-1)

    def high(self, rows: Tensor) -> Tensor:
        """Upper bounds [rows heads·keys]; 0 where attention is 0: there is no such part."""
        return self._bound(rows, self._along(rows) + self.slack[:, None])

    def low(self, rows: Tensor) -> Tensor:
        """Lower bounds [rows heads·keys]."""
        curve = 0.5 / self.whole[rows].abs().clamp_min(1e-12)
        excess = (curve @ (self.u * self.u).flatten(0, 1).T).view(len(rows), len(self.A), -1)
        excess = self.A[:, rows] * excess.transpose(0, 1)
        return self._bound(rows, self._along(rows) - excess - self.slack[:, None])

    def _along(self, rows: Tensor) -> Tensor:
        """s · u [heads rows keys], the proximity of a part that nowhere overshoots, for A = 1."""
        sign = torch.where(self.whole[rows] < 0, -1.0, 1.0)
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
        out = torch.empty_like(A)
        step = max(1, ELEMENTS // (index.shape[1] * self.whole.shape[1]))
        for i in range(0, len(rows), step):
            here = slice(i, i + step)
            part = A[here, :, None] * self.u[head[here], key[here]]
            out[here] = proximity(part, self.whole[rows[here], None])
        return torch.where(A > 0, out, 0.0)


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
        self.values = torch.cat([self.values, exact.double()], dim=1)
        self.index = torch.cat([self.index, n_others + chosen.indices], dim=1)
        if self.low.shape[1] == self.high.shape[1]:
            self.low.scatter_(1, chosen.indices, 0.0)
        self.high.scatter_(1, chosen.indices, 0.0)
        return int((chosen.values > 0).sum())

    def total(self) -> tuple[Tensor, Tensor]:
        """Bounds of the sum of all proximities, each [n]."""
        known = self.values.sum(1)
        rest = (self.low.sum(1, dtype=torch.float64), self.high.sum(1, dtype=torch.float64))
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


# --- the graph ---------------------------------------------------------------------------------


@dataclass
class FlowGraph:
    """The kept edges that lead to one token of the last layer.

    edges: one row an edge into (layer, position, stage) from (source_position, source_stage) of the
        same layer. Stage "post" of a layer is stage "pre" of the next. weight: the edge's share of
        what was kept of that sum; through: the share of the chosen token that passes the edge.
    heads: one row for each head of an attention edge.
    computed, parts: attention parts that were computed, of how many.
    """

    position: int
    edges: pd.DataFrame
    heads: pd.DataFrame
    computed: int = 0
    parts: int = 0
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def flow_graph(
    model: Model,
    prompt: str | Sequence[int] | Tensor | Batch | Run,
    *,
    position: int = -1,
    mass: float = MASS,
    threshold: float | None = None,
    exclude_sink: bool = False,
) -> FlowGraph:
    """The edges along which most of the residual stream at the last layer's `position` was built.

    At every addition of a block, w = Σ p: p is what head h brings from position j (A_ij v_j W_O), the
    residual stream, the biases, the MLP's write. Proximity π(p, w) = max(‖w‖₁ − ‖w − p‖₁, 1e-5),
    contribution c = π / Σπ. Kept: the largest parts that hold `mass` of the sum, or all c above
    `threshold`; their weights are c over what was kept, an edge's is the sum over its heads. Then the
    kept edges are followed back from the chosen token.

    It shows what the residual stream is made of, not what made the prediction: a large part may be
    irrelevant to the token (`min_effect` of `information_flow` tests that), a small one decisive.
    What queries and keys did is inside A and not drawn.

    Where we differ from the source: edges by mass, because the published threshold of 0.04 keeps
    almost nothing of long prompts; biases are a part; a norm after attention is folded into the parts
    with its scale held; a parallel block is one sum of heads, MLP and residual.

    Args:
        prompt: text, token ids, a Batch of one row, or a Run of one with `SITES` captured.
        mass: share to keep, up to 1 (everything). threshold: the published rule in its place.
        exclude_sink: leave out what is brought from the first token.

    Returns: a FlowGraph; weights are shares (0 to 1).

    Raises: BadInput, Refused (a model whose writes could not be verified).

    >>> graph = flow_graph(tiny_model(), [5, 6, 7], mass=0.9)
    >>> bool(graph.edges.groupby(["layer", "position", "stage"])["weight"].sum().round(6).eq(1).all())
    True

    Source: Ferrando & Voita 2024, "Information Flow Routes"; Tufanov et al. 2024 (LM Transparency
    Tool); the proximity is Ferrando et al. 2022 (ALTI).
    """
    rule = _rule(mass, threshold)
    _require_writes(model)
    if not isinstance(prompt, Run):
        prompt = model.run(one_prompt(model, prompt), capture=_sites(model), logits=False)
    length = prompt.cache["resid_pre.0"].shape[1]
    place = position_of(position, length)
    through = np.zeros(length)
    through[place] = 1.0
    edges, heads, computed, parts = [], [], 0, 0
    for layer in reversed(range(model.n_layers)):
        for whole in reversed(sums(model, prompt, layer, exclude_sink=exclude_sink)):
            kept = kept_parts(whole, through.nonzero()[0].tolist(), rule)
            computed, parts = computed + kept.computed, parts + kept.parts
            table, by_head = _tables(whole, kept, through)
            edges.append(table)
            heads.append(by_head)
            through = _passed_on(table, length)
    return FlowGraph(place, _joined_tables(edges), _joined_tables(heads), computed, parts)


def _rule(mass: float, threshold: float | None) -> Rule:
    if not 0 < mass <= 1:
        raise BadInput(f"mass={mass}: give the share of each sum to keep, over 0 and up to 1")
    if threshold is not None and not 0 <= threshold < 1:
        raise BadInput(f"threshold={threshold}: contributions are shares, give 0 up to under 1")
    return Rule(mass, threshold)


def _sites(model: Model) -> list[str]:
    return [site for site in SITES if site != "mlp_write" or model.layers_with("mlp_write")]


def _require_writes(model: Model) -> None:
    """Refused, with the reason, unless every block's attention is seen and its writes verified."""
    for site in ("pattern", "v", "attn_out", "attn_write", "resid_post"):
        missing = set(range(model.n_layers)) - set(model.layers_with(site))
        if missing:
            raise Refused(
                f"{model.id} has no '{site}' in layer {min(missing)}: its flow cannot be drawn through "
                "that block (see `interp inspect`); circuits.relevance.rollout may still work"
            )


def _tables(whole: Sum, kept: Kept, through: np.ndarray) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Edges into one stage, and the heads of its attention edges."""
    names = np.array([*whole.others, "attention"])
    place = ["layer", "position", "source_position"]
    parts = pd.DataFrame(
        {
            "kind": names[kept.other],
            "layer": np.full(len(kept.weight), whole.layer),
            "position": kept.position,
            "source_position": kept.source,
            "head": kept.head,
            "weight": kept.weight,
        }
    )
    grouped = parts.groupby(["kind", *place])[["weight"]].sum()
    sums_of = pd.DataFrame(grouped).reset_index()
    into = sums_of["position"].to_numpy(dtype=int)
    edges = sums_of.assign(
        stage=whole.stage,
        source_stage=whole.source,
        through=sums_of["weight"].to_numpy() * through[into],
    )
    heads = parts.loc[parts["kind"] == "attention", HEAD_COLUMNS]
    heads = heads.sort_values(by=[*place, "weight"], ascending=[True, True, True, False])
    return edges.loc[:, EDGE_COLUMNS].reset_index(drop=True), heads.reset_index(drop=True)


def _passed_on(edges: pd.DataFrame, length: int) -> np.ndarray:
    """Share of the chosen token that each source position passes on; biases come from nowhere."""
    real = edges[edges["kind"] != "bias"]
    return np.bincount(real["source_position"], weights=real["through"], minlength=length)


def _joined_tables(tables: list[pd.DataFrame]) -> pd.DataFrame:
    some = [table for table in tables if len(table)]
    return pd.concat(some or tables[:1], ignore_index=True)


# --- does an edge matter for the prediction? ---------------------------------------------------


def edge_effects(
    model: Model, batch: Batch, target: Target, heads: pd.DataFrame
) -> Float[np.ndarray, " edges"]:
    """What each attention edge is worth to the target, in logits: the target minus it without the edge.

    An edge is cut by setting its kept heads' attention from that position to that source to zero, the
    rest of the row as it was: exactly its part is gone from the sum, and everything after is
    computed anew. Other edges may stand in for a cut one, so effects do not add up.

    Args:
        heads: rows layer, position, source_position, head (a FlowGraph's); an edge is the rows that
            share the first three.

    Returns: one number for each edge, ordered by (layer, position, source_position).
    """
    groups = heads.groupby(["layer", "position", "source_position"], sort=True)["head"]
    variants = [[_cut(*map(int, place), sorted(some))] for place, some in groups]  # type: ignore[misc]
    if not variants:
        return np.zeros(0)
    at = torch.tensor([target.position])
    clean = model.run(batch, capture=["resid_pre"], logits=at)
    assert clean.logits is not None
    with torch.no_grad():
        whole = float(target.of(clean.logits[:, 0])[0])
        without = model.replay(clean, variants, lambda run: _value(target, run), logits=at)
    return np.array([whole - float(value) for value in without])


def _value(target: Target, run: Run) -> Tensor:
    assert run.logits is not None
    return target.of(run.logits[:, 0])[0]


def _cut(layer: int, query: int, key: int, heads: list[int]) -> Edit:
    def change(x: Tensor, seen: Any) -> Tensor:
        row = query - seen.start
        if not 0 <= row < x.shape[2] or key >= x.shape[3]:
            return x
        x = x.clone()
        x[:, heads, row, key] = 0
        return x

    return Edit.apply(f"pattern.{layer}", change)


def _leading_to(graph: FlowGraph, edges: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    """Those of `edges` that still lead to the graph's token, with `through` counted anew."""
    length = int(edges[["position", "source_position"]].to_numpy().max()) + 1
    through = np.zeros(length)
    through[graph.position] = 1.0
    kept = []
    for layer in reversed(range(n_layers)):
        for stage in ("post", "mid"):
            into = edges.loc[(edges["layer"] == layer) & (edges["stage"] == stage)]
            if not len(into):
                continue
            into = into.assign(through=into["weight"] * through[into["position"]])
            into = into.loc[into["through"] > 0]
            kept.append(into)
            through = _passed_on(into, length)
    return _joined_tables(kept)


# --- the analysis ------------------------------------------------------------------------------


def check_options(*, mass: float = MASS, threshold: float | None = None) -> None:
    """Raise BadInput for options that no model could satisfy."""
    _rule(mass, threshold)


@analysis(
    name="flow",
    source="Ferrando & Voita 2024; Abnar & Zuidema 2020; Chefer et al. 2021; Sundararajan et al. 2017",
    example='interp flow smollm2-135m "When Mary and John went to the store, John gave a drink to"',
    figure="graph",
    validate=check_options,
)
def information_flow(
    model: Model,
    prompt: str | Sequence[int] | Tensor | Batch,
    *,
    position: int = -1,
    answer: str | int | None = None,
    instead: str | int | None = None,
    mass: float = MASS,
    threshold: float | None = None,
    exclude_sink: bool = False,
    min_effect: float | None = None,
    max_flow: bool = True,
    integrate: bool = False,
) -> Report:
    """The route by which a prediction's information came, and how much each input token matters to it.

    The graph is `flow_graph`'s: what the residual stream at `position` was built from, by proximity.
    Beside it stand scores of every input token (`circuits.relevance`): rollout and attention flow
    (shares, patterns alone), Chefer's relevance (no unit), gradient × input and, with `integrate`,
    integrated gradients (logits). They answer different questions and need not agree; none says what would happen under
    an intervention. `min_effect` does: it cuts every attention edge in turn and drops those whose
    loss does not lower the target by that much, so that what is left supports the prediction.

    Args:
        model: from `interp.load`, with verified residual writes and a language-model head.
        prompt: one text, token ids, or a Batch of one row; at least two tokens.
        position: whose prediction; from the end when negative.
        answer, instead: the token (text or id) explained, and the one it is compared with; by default
            the model's own first choice, compared with none.
        mass: share of each sum that the kept parts hold. threshold: the published rule instead.
        exclude_sink: leave out attention to the first token, in graph, rollout, flow and relevance.
        min_effect: in logits; None keeps every edge and cuts nothing (cutting replays the model once
            an edge). Edges that lower the target have a negative effect and go first.
        max_flow: whether to compute attention flow (seconds on long prompts of deep models).
        integrate: whether to compute integrated gradients (hundreds of gradients on deep models; meta
            says how far from complete they are).

    Returns: a Report with tables "flow" (one row an edge), "flow_heads" (one row a head of an
        attention edge) and "relevance" (one row a token); tokens and the target in meta.

    Raises:
        BadInput: no such position or token, an answer of several tokens, a prompt of one. Refused:
            no language-model head, or residual writes that could not be verified.

    >>> report = information_flow(tiny_model(), [5, 6, 7])
    >>> [len(report.tables["relevance"]), report.meta["tokens"]]
    [3, ['#5', '#6', '#7']]

    Source: Ferrando & Voita 2024; Abnar & Zuidema 2020; Chefer et al. 2021; Sundararajan et al. 2017.
    """
    started = time.perf_counter()
    check_options(mass=mass, threshold=threshold)
    _require_writes(model)
    batch = one_prompt(model, prompt)
    target = target_of(model, batch, position=position, answer=answer, instead=instead)
    run = model.run(batch, capture=_sites(model), logits=torch.tensor([target.position]))
    graph = flow_graph(
        model,
        run,
        position=target.position,
        mass=mass,
        threshold=threshold,
        exclude_sink=exclude_sink,
    )
    edges, heads = graph.edges, graph.heads
    if min_effect is not None:
        edges, heads = _effective(model, batch, target, graph, min_effect)
    scores = _relevance(model, batch, run, target, exclude_sink, max_flow)
    extra = {}
    if integrate:
        found = integrated_gradients(model, batch, target)
        scores["integrated_gradients"] = found.scores.cpu().numpy()
        extra["integrated_gradients"] = {
            "change": found.change,
            "gap": found.gap,
            "points": found.points,
        }
    value = _value(target, run)
    options = {
        "position": position,
        "answer": answer,
        "instead": instead,
        "mass": mass,
        "threshold": threshold,
        "exclude_sink": exclude_sink,
        "min_effect": min_effect,
        "max_flow": max_flow,
        "integrate": integrate,
    }
    named = {
        name: {"id": token, "text": model.tokens([token])[0]}
        for name, token in (("answer", target.answer), ("instead", target.instead))
        if token is not None
    }
    meta = provenance(model, options=options, seed=0) | {
        "tokens": model.tokens(batch.ids[0].tolist()),
        "target": {"position": target.position, "value": float(value), "unit": "logits"} | named,
        "attention_parts": {"computed": graph.computed, "of": graph.parts},
        "notes": [*model.notes, "FFN edges are not split into neurons: no site shows them."],
    }
    meta |= extra
    meta["wall_time_s"] = round(time.perf_counter() - started, 2)
    return Report("flow", {"flow": edges, "flow_heads": heads, "relevance": scores}, {}, meta)


def _effective(
    model: Model, batch: Batch, target: Target, graph: FlowGraph, min_effect: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Edges (with a column `effect`, logits; NaN where not an attention edge) and heads that pass."""
    place = ["layer", "position", "source_position"]
    keys = graph.heads.loc[:, place].drop_duplicates().sort_values(by=place)
    keys["effect"] = edge_effects(model, batch, target, graph.heads)
    keys["kind"] = "attention"
    edges = graph.edges.merge(keys, on=["kind", *place], how="left")
    weak = (edges["kind"] == "attention") & (edges["effect"] < min_effect)
    edges = _leading_to(graph, edges.loc[~weak], model.n_layers)
    left = edges.loc[edges["kind"] == "attention", place]
    return edges, graph.heads.merge(left, on=place)


def _relevance(
    model: Model, batch: Batch, run: Run, target: Target, exclude_sink: bool, max_flow: bool
) -> pd.DataFrame:
    """One row a token."""
    patterns = torch.stack([p[0].float() for p in run.cache.by_layer("pattern").values()])
    place = target.position
    table = {
        "position": np.arange(batch.ids.shape[1]),
        "token": model.tokens(batch.ids[0].tolist()),
        "rollout": rollout(patterns, exclude_sink=exclude_sink)[place].cpu().numpy(),
    }
    if max_flow:
        table["attention_flow"] = attention_flow(patterns, place, exclude_sink=exclude_sink)
    relevance = chefer_relevance(model, batch, target, exclude_sink=exclude_sink)[place]
    relevance[place] -= 1  # the identity that relevance starts from
    table["relevance"] = relevance.cpu().numpy()
    table["gradient_x_input"] = gradient_times_input(model, batch, target).cpu().numpy()
    return pd.DataFrame(table)
