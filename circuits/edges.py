"""What corrupting each edge of the computational graph does to a metric, estimated for all edges at once.

    score[s, r] = Σ_positions (corrupted write − clean write of sender s) · g_r, averaged over pairs

with g_r the gradient of the metric with respect to the residual stream that receiver r alone reads. It
estimates metric(edge corrupted) − metric(clean): an edge that the answer needs has a *negative* score
under logit_diff. `importance` turns that into a share of the gap between clean and corrupted, positive
where the answer needs the edge, whatever the metric.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.edge_gradients import Gradients
from circuits.edges_plain import plain_edge_scores
from circuits.graph import Graph, Scores
from circuits.measure import METRICS, Measure, measure
from circuits.passes import Parts, Side, Task, run_pass, task_of
from circuits.tasks import as_pairs, check_task
from interp.data.pairs import Pairs
from interp.errors import BadInput, Refused, unknown
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.edits import Edit
from interp.run.progress import Progress
from interp.run.resume import Checkpoint

METHODS = {
    "eap-ig": "gradients averaged on the way from corrupted to clean embeddings (Hanna et al. 2024)",
    "eap": "gradients at the clean prompts (Syed et al. 2023)",
    "eap-ig-activations": "the sender's own write moved from corrupted to clean (Hanna et al. 2024)",
    "atp": "scores of nodes, the softmax taken exactly for q and k (Kramár et al. 2024); an edge has the "
    "score of its weaker end",
}
PLAIN = ("eap", "eap-ig")
"""Methods that the plain engine has too."""


# --- scores ----------------------------------------------------------------------------------------


def input_scores(task: Task, side: Side, *, steps: int | None) -> Scores:
    """EAP (`steps=None`: gradients at the clean prompts) or EAP-IG over the embeddings, Σ over pairs.

    EAP-IG averages the gradients at embeddings corrupted + α (clean − corrupted), α = 0 … (m − 1)/m.
    """
    gradients = Gradients(task.parts)
    start, end = side.corrupted.embed, side.clean.embed
    for alpha in [1.0] if steps is None else [step / steps for step in range(steps)]:
        at = (start + alpha * (end - start)).requires_grad_()
        seen = run_pass(
            task.parts, side.pairs.clean_batch, edits=[Edit.patch("embed", at)], grad=True
        )
        gradients.add(seen, lambda logits: task.metric(side, logits))
        del seen
    difference = side.corrupted.less(side.clean, task.parts.graph, task.parts.writers)
    return gradients.scores(difference) / (1 if steps is None else steps)


def activation_scores(
    task: Task, side: Side, *, steps: int, units: Checkpoint, advance: Callable[[int], None]
) -> Scores:
    """EAP-IG over each sender's own write, Σ over pairs: one integral for each embedding, layer's heads
    together, and MLP, on otherwise clean prompts.

    The scores of such a group sum to what corrupting the whole group does to the metric, up to the
    error of the sum of `steps` terms.
    """
    parts = task.parts
    difference = side.corrupted.less(side.clean, parts.graph, parts.writers)
    total = torch.zeros(parts.graph.shape)
    for site, rows, first in _groups(parts):

        def unit(site: str = site, rows: slice = rows, first: int = first) -> dict[str, np.ndarray]:
            moved = difference[rows].sum(0)
            gradients = Gradients(parts, first=first)
            for step in range(steps):
                edit = Edit.add(site, (1 - step / steps) * moved)
                seen = run_pass(parts, side.pairs.clean_batch, edits=[edit], grad=True)
                gradients.add(seen, lambda logits: task.metric(side, logits))
                del seen
            scores = gradients.scores(difference[rows], first_row=rows.start) / steps
            return {"scores": scores[rows].numpy()}

        name = f"pairs {side.rows.start} {site}"
        total[rows] = torch.from_numpy(units.compute(name, unit)["scores"])
        advance(1)
    return total


def _groups(parts: Parts) -> Iterator[tuple[str, slice, int]]:
    """(site, rows, first layer that reads it) of what is moved together."""
    yield "embed", slice(0, 1), 0
    for layer, block in enumerate(parts.model.spec.blocks):
        rows = parts.graph.rows(layer)
        mlp = int(block.mlp_write is not None and rows.stop > rows.start)
        if layer in parts.writers:
            first = layer + 1 if block.parallel or not mlp else layer
            yield f"attn_write.{layer}", slice(rows.start, rows.stop - mlp), first
        if mlp:
            yield f"mlp_write.{layer}", slice(rows.stop - 1, rows.stop), layer + 1


def node_effects(
    task: Task, side: Side
) -> tuple[Float[Tensor, " n_senders"], Float[Tensor, " n_receivers"]]:
    """AtP: first-order effect on the metric of corrupting each node, Σ over pairs.

    A sender's effect is Δz · ∂metric/∂z (write for embedding and MLPs), at the clean prompts. For q, k
    and v of a head, Δz is computed exactly: the head's own z where that q (k, v), at all positions, is the
    corrupted run's, everything else clean; a saturated softmax, where the plain gradient of q and k is
    zero, does not hide them. The logits' entry is infinite: they are always in.
    """
    parts, model = task.parts, task.parts.model
    graph, clean = parts.graph, side.pairs.clean_batch
    seen = run_pass(parts, clean, grad=True, capture=("embed",))
    assert seen.run is not None and seen.run.logits is not None
    value = task.metric(side, seen.run.logits[:, -1].float()).sum()
    mlps = list(side.clean.mlp)
    heads = list(parts.writers)
    targets = [seen["embed"], *(seen[f"mlp_write.{layer}"] for layer in mlps)]
    targets += [seen.heads[layer].out for layer in heads]
    found = torch.autograd.grad(value, targets, allow_unused=True)
    grads = [
        torch.zeros_like(x) if g is None else g.float() for x, g in zip(targets, found, strict=True)
    ]
    by_mlp = dict(zip(mlps, grads[1 : 1 + len(mlps)], strict=True))
    by_head = dict(zip(heads, grads[1 + len(mlps) :], strict=True))
    base = {f"resid_pre.{layer}": seen[f"resid_pre.{layer}"].detach() for layer in heads}
    del seen, value, targets

    senders, receivers = torch.zeros(graph.shape[0]), torch.full((graph.shape[1],), torch.inf)
    senders[0] = float((grads[0] * (side.corrupted.embed - side.clean.embed)).sum())
    for layer, grad in by_mlp.items():
        effect = float((grad * (side.corrupted.mlp[layer] - side.clean.mlp[layer])).sum())
        senders[graph.rows(layer).stop - 1] = effect
        receivers[graph.columns(layer).stop - 1] = effect
    for layer, grad in by_head.items():
        effects = (grad * (side.corrupted.z[layer] - side.clean.z[layer]).float()).sum((0, 1, 3))
        first = graph.rows(layer).start
        senders[first : first + len(effects)] = effects.cpu()
    kept = [
        Edit.patch(site, x) for site, x in base.items()
    ]  # nothing replaced reaches another layer
    corrupted = model.run(side.pairs.corrupted_batch, capture=["q", "k", "v"], logits=False).cache
    for i, kind in enumerate("qkv"):
        edits = [*kept, Edit.patch(kind, corrupted.by_layer(kind))]
        made = model.run(clean, capture=["z"], edits=edits, logits=False).cache
        for layer, grad in by_head.items():
            effects = (grad * (made[f"z.{layer}"] - side.clean.z[layer]).float()).sum((0, 1, 3))
            first = graph.columns(layer).start + i * len(effects)
            receivers[first : first + len(effects)] = effects.cpu()
    return senders, receivers


def weaker_end(graph: Graph, senders: Tensor, receivers: Tensor) -> Scores:
    """Scores of nodes as scores of edges: each edge has the score of its end of smaller magnitude.

    The n highest edges are then those among the highest nodes.
    """
    smaller = senders.abs()[:, None] <= receivers.abs()
    return torch.where(smaller, senders[:, None], receivers) * graph.allowed


def atp(
    task: Task, units: Checkpoint, advance: Callable[[int], None] = lambda done: None
) -> tuple[Tensor, Tensor]:
    """`node_effects` of all pairs, mean: scores of senders and of receivers."""
    totals = torch.zeros(task.parts.graph.shape[0]), torch.zeros(task.parts.graph.shape[1])
    for side in task.sides:

        def unit(side: Side = side) -> dict[str, np.ndarray]:
            senders, receivers = node_effects(task, side)
            return {"senders": senders.numpy(), "receivers": receivers.numpy()}

        found = units.compute(f"nodes of pairs {side.rows.start}", unit)
        for total, name in zip(totals, ("senders", "receivers"), strict=True):
            total += torch.from_numpy(found[name])
        advance(1)
    return totals[0] / len(task.pairs), totals[1] / len(task.pairs)


def score_edges(
    task: Task,
    method: str = "eap-ig",
    *,
    steps: int = 5,
    units: Checkpoint | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Effect on the metric of corrupting each edge [n_senders n_receivers], mean over the task's pairs.

    Args:
        task: from `task_of`. method: one of METHODS. steps: of the integral.
        units: finished portions, for long methods. advance: called with portions just done.

    >>> model = tiny_model()
    >>> pairs = Pairs.of([[5, 6, 7]], [[5, 9, 7]], answers=[3], wrong=[4])
    >>> task = task_of(Parts.of(model), pairs)
    >>> scores = score_edges(task, "eap-ig", steps=64)
    >>> gap = float(task.measure.corrupted.mean() - task.measure.clean.mean())
    >>> abs(float(scores[0].sum()) - gap) < 0.05 * abs(gap)  # complete over the embedding's edges
    True
    """
    check_options(method=method, steps=steps)
    units = Checkpoint() if units is None else units
    if method == "atp":
        return weaker_end(task.parts.graph, *atp(task, units, advance))
    total = torch.zeros(task.parts.graph.shape)
    for side in task.sides:
        if method == "eap-ig-activations":
            total += activation_scores(task, side, steps=steps, units=units, advance=advance)
            continue

        def unit(side: Side = side) -> dict[str, np.ndarray]:
            found = input_scores(task, side, steps=None if method == "eap" else steps)
            return {"scores": found.numpy()}

        total += torch.from_numpy(units.compute(f"pairs {side.rows.start}", unit)["scores"])
        advance(1)
    return total / len(task.pairs)


def n_units(task: Task, method: str) -> int:
    """How many portions `score_edges` tells of."""
    return len(task.sides) * (
        len(list(_groups(task.parts))) if method == "eap-ig-activations" else 1
    )


def importance(scores: Tensor, measured: Measure) -> Tensor:
    """Scores as shares of the metric's gap between clean and corrupted; positive: the answer needs it."""
    return -scores / float(measured.clean.mean() - measured.corrupted.mean())


# --- analysis --------------------------------------------------------------------------------------


def check_options(
    *,
    task: Any = None,
    method: str = "eap-ig",
    steps: int = 5,
    metric: str = "logit_diff",
    n: int = 32,
    top: int = 1000,
    naive: bool = False,
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if isinstance(task, (str, Path)):
        check_task(task)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    for what, value in (("steps", steps), ("n", n), ("top", top)):
        if value < 1:
            raise BadInput(f"{what}={value}: give at least 1")
    if naive and method not in PLAIN:
        raise BadInput(f"naive=True is there for {' and '.join(PLAIN)}, not for '{method}'")


@analysis(
    name="edges",
    source="Syed et al. 2023 (EAP); Hanna et al. 2024 (EAP-IG); Nanda 2023, Kramár et al. 2024 (AtP, AtP*)",
    example="interp edges smollm2-135m ioi --method eap-ig --steps 5",
    figure="graph",
    validate=check_options,
)
def edge_attribution(
    model: Model,
    task: Pairs | str,
    *,
    method: str = "eap-ig",
    steps: int = 5,
    metric: str = "logit_diff",
    n: int = 32,
    seed: int = 0,
    top: int = 1000,
    naive: bool = False,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """Estimated effect on the metric of corrupting each edge of the computational graph.

    score[s, r] = mean over pairs of Σ_positions (corrupted − clean write of s) · ∂metric/∂(input of r).
    Receivers are q, k and v of every query head, MLPs and the logits. Negative under logit_diff: the
    answer needs the edge. It is a first-order estimate: edges that make up for each other, and what a
    large change does, are not in it; `interp circuit evaluate` runs the circuits themselves. Scores of
    different receivers overlap, so they do not sum to the metric (over the embedding's edges those of
    eap-ig do).

    Args:
        task: a task's name (ioi, ioi:s2, greater_than, …), a file of pairs, or Pairs.
        method: eap-ig, eap, eap-ig-activations (slow) or atp (scores of nodes).
        steps: terms of the integral of eap-ig.
        metric: logit_diff, prob_diff, kl or loss.
        n: pairs of a named task. seed: of the task.
        top: edges in the table; the array has them all.
        naive: the plain engine, one receiver at a time in full forwards (eap and eap-ig).
        checkpoint: folder for finished portions. resume: go on from what is there.
        progress: show progress bars; by default in a terminal or a notebook.

    Returns: a Report. Table "edges": sender, receiver, score (unit of the metric) and importance (share
        of the gap clean − corrupted) of the strongest edges. Table "nodes": the same for each head, MLP
        and the embedding, a node's score being the sum over its edges (for atp the node's own).
        Array "scores" [n_senders n_receivers], axes named in meta["senders"] and meta["receivers"].

    Raises:
        BadInput: unknown task, method or metric; a metric that is NaN or the same on both sides.
        Refused: the residual stream is not a sum of known writes.

    >>> report = edge_attribution(tiny_model(), "induction", n=4, method="eap", progress=False)
    >>> report.arrays["scores"].shape, list(report.table)
    ((11, 27), ['sender', 'receiver', 'score', 'importance'])
    """
    started = time.perf_counter()
    check_options(method=method, steps=steps, metric=metric, n=n, top=top, naive=naive)
    graph = Graph.of(model)
    pairs = as_pairs(model, task, n=n, seed=seed)
    options = {
        "task": pairs.name,
        "method": method,
        "steps": steps if "ig" in method else None,
        "metric": metric,
        "n": len(pairs),
        "naive": naive,
    }
    source = provenance(model, options=options, seed=seed)
    key = {"model": source["model"], "options": options, "seed": seed, "ids": pairs.clean.tolist()}
    units = Checkpoint(checkpoint, key, resume=resume)
    notes: list[str] = []
    parts = None
    if not naive:
        try:
            parts = Parts.of(model)
        except Refused as refusal:
            if method not in PLAIN:
                raise
            notes.append(f"the plain engine was used: {refusal}")
    nodes = None
    with Progress(progress) as bars:
        if parts is None:
            measured = measure(model, pairs, metric)
            advance = bars.stage("Scoring receivers", graph.shape[1])
            scores = _plain(model, graph, measured, method, steps, units, advance)
        else:
            whole = task_of(parts, pairs, metric)
            measured = whole.measure
            notes += parts.notes
            advance = bars.stage("Scoring edges", n_units(whole, method))
            if method == "atp":
                nodes = atp(whole, units, advance)
                scores = weaker_end(graph, *nodes)
            else:
                scores = score_edges(whole, method, steps=steps, units=units, advance=advance)
    notes += measured.notes
    table = graph.to_table(scores, n=top)
    table["importance"] = importance(torch.tensor(table["score"].to_numpy()), measured).numpy()
    meta: dict[str, Any] = source | {
        "task": pairs.name,
        "metric": metric,
        "unit": measured.unit,
        "clean": float(measured.clean.mean()),
        "corrupted": float(measured.corrupted.mean()),
        "n_edges": graph.n_edges,
        "senders": graph.sender_names,
        "receivers": graph.receiver_names,
        "protocol": _protocol(method, steps, measured),
    }
    meta["notes"] = [meta["protocol"], *notes]
    if method == "eap-ig":
        gap = meta["corrupted"] - meta["clean"]
        meta["completeness"] = {"sum_over_embedding": float(scores[0].sum()), "difference": gap}
    tables = {"edges": table, "nodes": _node_table(graph, scores, measured, nodes)}
    meta["wall_time_s"] = round(time.perf_counter() - started, 2)
    return Report("edges", tables, {"scores": scores.numpy()}, meta)


def _plain(
    model: Model,
    graph: Graph,
    measured: Measure,
    method: str,
    steps: int,
    units: Checkpoint,
    advance: Callable[[int], None],
) -> Scores:
    """The plain engine, one receiver a unit."""
    alphas = [1.0] if method == "eap" else [step / steps for step in range(steps)]
    pairs, scores = measured.pairs, torch.zeros(graph.shape)
    for column, receiver in enumerate(graph.receivers):

        def unit(column: int = column) -> dict[str, np.ndarray]:
            found = plain_edge_scores(
                model,
                graph,
                model.as_batch(pairs.clean_batch),
                model.as_batch(pairs.corrupted_batch),
                measured,
                alphas=alphas,
                receivers=[column],
            )
            return {"scores": found[:, column].numpy()}

        scores[:, column] = torch.from_numpy(units.compute(receiver.name, unit)["scores"])
        advance(1)
    return scores


def _node_table(
    graph: Graph, scores: Scores, measured: Measure, nodes: tuple[Tensor, Tensor] | None
) -> pd.DataFrame:
    """One row a sender; for AtP also one for each head's q, k and v."""
    rows = [(s.name, s.kind, s.layer, s.head) for s in graph.senders]
    values = graph.node_scores(scores) if nodes is None else nodes[0]
    if nodes is not None:
        inputs = [i for i, r in enumerate(graph.receivers) if r.kind in "qkv"]
        rows += [(r.name, r.kind, r.layer, r.head) for r in (graph.receivers[i] for i in inputs)]
        values = torch.cat([values, nodes[1][inputs]])
    table = pd.DataFrame(rows, columns=["node", "kind", "layer", "head"])
    table["score"] = values.double().numpy()
    table["importance"] = importance(values.double(), measured).numpy()
    return table.sort_values("score", key=lambda x: -x.abs(), kind="stable", ignore_index=True)


def _protocol(method: str, steps: int, measured: Measure) -> str:
    """What a reader needs to know to compare a score with another's."""
    how = METHODS[method]
    path = f", α = 0 … {(steps - 1) / steps:.3g} in {steps} steps" if "ig" in method else ""
    return (
        f"{method}: {how}{path}; effect on {measured.metric} ({measured.unit}) at the last position of "
        f"exchanging an edge's clean value for the corrupted one, mean over {len(measured.pairs)} pairs of "
        f"'{measured.pairs.name}', all positions together; receivers: q, k, v of each query head, MLPs, logits"
    )
