"""Along which route did the information come? The important-flow graph of one prompt.

Of every sum that builds a position's residual stream, the parts that hold most of it are kept
(`circuits.flow_parts`); from the chosen token at the last layer the kept parts are followed back to
the input. Beside the graph stand the heads and neurons on the route (`circuits.flow_words`) and each
token's relevance (`circuits.relevance`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from circuits.flow_cuts import PLACE, UNREAD, edge_effects, strongest_edges, unread_edges
from circuits.flow_parts import MASS, SITES, Columns, Kept, Rule, Sum, kept_parts, sums
from circuits.flow_words import READ, neuron_layers, route_neurons, route_words
from circuits.relevance import (
    Target,
    integrated_gradients,
    one_prompt,
    position_of,
    relevance_scores,
    target_of,
)
from interp.devices import wide
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.batch import Batch
from interp.run.cache import Run
from interp.sites import ranges

EDGE_COLUMNS = {
    "kind": object,
    "layer": int,
    "position": int,
    "stage": object,
    "source_position": int,
    "source_stage": object,
    "weight": float,
    "through": float,
}
CUT = 32
"""Attention edges that are tried for being read at all, by default."""
HEAD_COLUMNS = {**dict.fromkeys([*PLACE, "head"], int), "weight": float, "through": float}


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
    edges, heads, computed, parts = Columns(EDGE_COLUMNS), Columns(HEAD_COLUMNS), 0, 0
    for layer in reversed(range(model.n_layers)):
        # The search starts from one token: only positions that it has reached are ever looked at.
        reached = through.nonzero()[0].tolist()
        for whole in reversed(
            sums(model, prompt, layer, positions=reached, exclude_sink=exclude_sink)
        ):
            kept = kept_parts(whole, reached, rule)
            computed, parts = computed + kept.computed, parts + kept.parts
            into = _edges_into(whole, kept, through)
            edges.add(into)
            heads.add(_heads_of(whole, kept, through))
            through = _passed_on(into["kind"], into["source_position"], into["through"], length)
    return FlowGraph(place, edges.table(), heads.table(), computed, parts)


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
    model.require_sum("information flow")
    for site in ("pattern", "v", "attn_out", "attn_write", "resid_post"):
        missing = set(range(model.n_layers)) - set(model.layers_with(site))
        if missing:
            raise Refused(
                f"{model.id} has no '{site}' in layer {min(missing)}: its flow cannot be drawn through "
                "that block (see `interp inspect`); circuits.relevance.rollout may still work"
            )


def _edges_into(whole: Sum, kept: Kept, through: np.ndarray) -> dict[str, np.ndarray]:
    """Edges into one stage by kind, position and source; an edge is the sum over its heads."""
    names = np.array([*whole.others, "attention"], dtype=object)
    n = len(through)
    keys, back = np.unique(
        ((kept.other % len(names)) * n + kept.position) * n + kept.source, return_inverse=True
    )
    other, position, source = keys // n**2, keys // n % n, keys % n
    weight = np.bincount(back, weights=kept.weight, minlength=len(keys))
    return {
        "kind": names[other],
        "layer": np.full(len(keys), whole.layer),
        "position": position,
        "stage": np.full(len(keys), whole.stage, dtype=object),
        "source_position": source,
        "source_stage": np.full(len(keys), whole.source, dtype=object),
        "weight": weight,
        "through": weight * through[position],
    }


def _heads_of(whole: Sum, kept: Kept, through: np.ndarray) -> dict[str, np.ndarray]:
    """The attention parts, of each edge the heaviest first."""
    some = np.flatnonzero(kept.head >= 0)
    order = np.lexsort((-kept.weight[some], kept.source[some], kept.position[some]))
    some = some[order]
    return {
        "layer": np.full(len(some), whole.layer),
        "position": kept.position[some],
        "source_position": kept.source[some],
        "head": kept.head[some],
        "weight": kept.weight[some],
        "through": kept.weight[some] * through[kept.position[some]],
    }


def _passed_on(
    kind: np.ndarray, source: np.ndarray, through: np.ndarray, length: int
) -> np.ndarray:
    """Share of the chosen token that each source position passes on; biases come from nowhere."""
    real = kind != "bias"
    return np.bincount(source[real], weights=through[real], minlength=length)


# --- does an edge matter for the prediction? ---------------------------------------------------


def _with_effects(
    model: Model, batch: Batch, target: Target, graph: FlowGraph, strongest: int | None
) -> pd.DataFrame:
    """The edges with a column `effect` (logits; NaN where nothing was cut), of the strongest or all."""
    places = strongest_edges(graph.edges, strongest)
    cut = graph.heads.merge(places, on=PLACE)
    effects = places.assign(effect=edge_effects(model, batch, target, cut), kind="attention")
    return graph.edges.merge(effects, on=["kind", *PLACE], how="left")


def _without_unread(
    model: Model, batch: Batch, target: Target, graph: FlowGraph, edges: pd.DataFrame, looked: int
) -> tuple[pd.DataFrame, str]:
    """The edges less those that nothing reads, of the `looked` strongest; and what to say of it."""
    cut = graph.heads.merge(strongest_edges(edges, looked), on=PLACE)
    try:
        unread = unread_edges(model, batch, target, cut)
    except Refused as refused:
        return edges, f"Edges that nothing reads are not looked for: {refused}"
    if not len(unread):
        return edges, ""
    note = (
        f"{len(unread)} attention edges are left out: with norm scales held, cutting them changes the "
        f"target by less than {UNREAD:.1%} of what the strongest does (unread=0 keeps them)."
    )
    found = edges.merge(unread.assign(kind="attention"), how="left", indicator=True)
    return edges.loc[(found["_merge"] == "left_only").to_numpy()], note


def _reached(edges: pd.DataFrame) -> pd.DataFrame:
    """The attention edges' places, and the share of the chosen token at their ends (as `through`)."""
    some = edges.loc[edges["kind"] == "attention"]
    return some[PLACE].assign(through=some["through"] / some["weight"])


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
            columns = (into[name].to_numpy() for name in ("kind", "source_position", "through"))
            through = _passed_on(*columns, length)
    return pd.concat(kept, ignore_index=True)


# --- the analysis ------------------------------------------------------------------------------


def check_options(
    *,
    mass: float = MASS,
    threshold: float | None = None,
    effects: int = 0,
    unread: int = CUT,
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    _rule(mass, threshold)
    for name, value in (("effects", effects), ("unread", unread)):
        if value < 0:
            raise BadInput(f"{name}={value}: give a number of edges, 0 for none")


@analysis(
    name="flow",
    source="Ferrando & Voita 2024; Abnar & Zuidema 2020; Chefer et al. 2021; Sundararajan et al. 2017",
    example='interp flow smollm2-135m "When Mary and John went to the store, John gave a drink to"',
    figure="graph",
    validate=check_options,
    summary=lambda report: report.tables["relevance"],
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
    effects: int = 0,
    unread: int = CUT,
    max_flow: bool = True,
    integrate: bool = False,
    words: int = READ,
) -> Report:
    """The route by which a prediction's information came, and how much each input token matters to it.

    The graph is `flow_graph`'s: what the residual stream at `position` was built from, by proximity.
    Beside it stand scores of every input token (`circuits.relevance`): rollout and attention flow
    (shares, patterns alone), Chefer's relevance (no unit), gradient × input and, with `integrate`,
    integrated gradients (logits). They answer different questions and need not agree; none says what
    would happen under an intervention. `min_effect` and `effects` do: they cut attention edges, so that
    what is left supports the prediction.

    Args:
        model: from `interp.load`, with verified residual writes and a language-model head.
        prompt: one text, token ids, or a Batch of one row; at least two tokens.
        position: whose prediction; from the end when negative.
        answer: the token explained, as text with its leading space or as id; by default the model's own
            first choice.
        instead: the token that the answer is compared with; by default none.
        mass: share of each sum that the kept parts hold.
        threshold: the published rule in its place: keep every part with a larger share of the sum.
        exclude_sink: leave out attention to the first token, in graph, rollout, flow and relevance.
        min_effect: cut every attention edge in turn (one replay of the model each) and drop those that
            are worth less to the target, in logits; edges that lower it are worth less than nothing.
        effects: how many attention edges, those with the most `through` first, are cut to fill the
            column "effect" (logits; NaN where not cut).
        unread: of this many attention edges, those with the most `through`, leave out what nothing on
            the way to the target reads: cut with the scale of every norm held, it changes the target
            by less than a thousandth of what the strongest does. 0: leave nothing out. Not looked at
            with `min_effect`.
        max_flow: whether to compute attention flow (seconds on long prompts of deep models).
        integrate: whether to compute integrated gradients (some hundred gradients on deep models; meta
            says how far from complete they are).
        words: how many of the strongest head parts, and of the strongest neurons, are read as words.

    Returns: a Report with tables "flow" (one row an edge), "flow_heads" (one row a head of an
        attention edge), "flow_neurons" (`route_neurons`), "flow_words" (`route_words`) and
        "relevance" (one row a token); tokens and the target in meta.

    Raises:
        BadInput: no such position or token, an answer of several tokens, a prompt of one. Refused:
            no language-model head, or residual writes that could not be verified.

    >>> report = information_flow(tiny_model(), [5, 6, 7])
    >>> [len(report.tables["relevance"]), report.meta["tokens"]]
    [3, ['#5', '#6', '#7']]

    Source: Ferrando & Voita 2024; Abnar & Zuidema 2020; Chefer et al. 2021; Sundararajan et al. 2017.
    """
    started = time.perf_counter()
    check_options(mass=mass, threshold=threshold, effects=effects, unread=unread)
    _require_writes(model)
    batch = one_prompt(model, prompt)
    target = target_of(model, batch, position=position, answer=answer, instead=instead)
    neurons_in = neuron_layers(model)
    inside = ["mlp_post", "mlp_out"] if neurons_in else []
    at = torch.tensor([target.position])
    run = model.run(batch, capture=[*_sites(model), *inside], logits=at)
    graph = flow_graph(
        model,
        run,
        position=target.position,
        mass=mass,
        threshold=threshold,
        exclude_sink=exclude_sink,
    )
    edges, heads = graph.edges, graph.heads
    if min_effect is not None or effects > 0:
        edges = _with_effects(
            model, batch, target, graph, None if min_effect is not None else effects
        )
    notes = [*model.notes]
    if min_effect is not None:
        weak = (edges["kind"] == "attention") & (edges["effect"] < min_effect)
        edges = edges.loc[~weak]
    elif unread > 0:
        edges, note = _without_unread(model, batch, target, graph, edges, unread)
        notes += [note] if note else []
    if len(edges) < len(graph.edges):
        edges = _leading_to(graph, edges, model.n_layers)
        heads = heads.drop(columns="through").merge(_reached(edges), on=PLACE)
        heads["through"] *= heads["weight"]
    neurons = route_neurons(model, run, edges)
    if without := sorted(set(model.layers_with("resid_post")) - set(neurons_in)):
        why = model.spec.refused.get("mlp_post", "no one linear layer makes the MLP's output there")
        notes.append(f"FFN edges are not split into neurons in layers {ranges(without)}: {why}.")
    if "unembedding" in model.spec.refused:
        notes.append(f"Parts are not read as words: {model.spec.refused['unembedding']}.")
        words = 0
    said = route_words(model, run, target.position, heads, neurons, strongest=words)
    patterns = torch.stack([wide(p[0]) for p in run.cache.by_layer("pattern").values()])
    scores = relevance_scores(
        model, batch, target, patterns, exclude_sink=exclude_sink, max_flow=max_flow
    )
    extra = {}
    if integrate:
        found = integrated_gradients(model, batch, target)
        scores["integrated_gradients"] = found.scores.cpu().numpy()
        extra["integrated_gradients"] = found.about
    assert run.logits is not None
    value = target.of(run.logits[:, 0])[0]
    options = {
        "position": position,
        "answer": answer,
        "instead": instead,
        "mass": mass,
        "threshold": threshold,
        "exclude_sink": exclude_sink,
        "min_effect": min_effect,
        "effects": effects,
        "unread": unread,
        "max_flow": max_flow,
        "integrate": integrate,
        "words": words,
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
        "notes": notes,
    }
    meta |= extra
    meta["wall_time_s"] = round(time.perf_counter() - started, 2)
    tables = {"flow": edges, "flow_heads": heads, "flow_neurons": neurons, "flow_words": said}
    return Report("flow", tables | {"relevance": scores}, {}, meta)
