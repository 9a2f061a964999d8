"""The report of what corrupting each edge of the computational graph does to a metric."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from circuits.edge_engines import FastJob, engine
from circuits.edge_scores import METHODS, atp, check_method, importance, weaker_end
from circuits.graph import Graph, Scores
from circuits.measure import METRICS, Measure
from circuits.tasks import as_pairs, check_task
from interp.data.pairs import Pairs
from interp.errors import BadInput, unknown
from interp.figures.head_claims import head_claims, heads_report
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.progress import Progress
from interp.run.resume import Checkpoint


def check_options(
    *,
    task: Any = None,
    method: str = "eap-ig",
    steps: int = 5,
    metric: str = "logit_diff",
    n: int = 32,
    top: int = 1000,
    naive: bool = False,
    heads: Report | Path | None = None,
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if isinstance(task, (str, Path)):
        check_task(task)
    if heads is not None:
        heads_report(heads)
    check_method(method, steps, naive=naive)
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    for what, value in (("n", n), ("top", top)):
        if value < 1:
            raise BadInput(f"{what}={value}: give at least 1")


@analysis(
    name="edges",
    source="Syed et al. 2023 (EAP); Hanna et al. 2024 (EAP-IG); Nanda 2023, Kramár et al. 2024 (AtP, AtP*)",
    example="interp edges smollm2-135m ioi --method eap-ig --steps 5",
    figure="graph",
    validate=check_options,
    takes="text",
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
    heads: Report | Path | None = None,
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
        heads: a report of `interp heads` on the same model (its folder, or itself): what it claims of
            each head is then on the cards of the circuit's nodes.
        checkpoint: folder for finished portions. resume: go on from what is there.
        progress: show progress bars; by default in a terminal or a notebook.

    Returns: a Report. Table "edges": sender, receiver, score (unit of the metric) and importance (share
        of the gap clean − corrupted) of the strongest edges. Table "nodes": the same for each head, MLP
        and the embedding, a node's score being the sum over its edges (for atp the node's own).
        Table "head_claims", with `heads`: that report's, one row a head.
        Array "scores" [n_senders n_receivers], axes named in meta["senders"] and meta["receivers"].

    Raises:
        BadInput: unknown task, method or metric; a metric that is NaN or the same on both sides; `heads`
            of other weights.
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
    claims, about_claims = head_claims(heads, source["model"])
    key = {"model": source["model"], "options": options, "seed": seed, "pairs": pairs.digest}
    units = Checkpoint(checkpoint, key, resume=resume)
    job_of, notes = engine(model, method, naive=naive)
    nodes = None
    with Progress(progress) as bars:
        job = job_of(pairs, metric)
        measured = job.measure
        advance = bars.stage("Scoring edges", job.n_units(method))
        if method == "atp" and isinstance(job, FastJob):
            nodes = atp(job.task, units, advance)
            scores = weaker_end(graph, *nodes)
        else:
            scores = job.scores(method, steps=steps, units=units, advance=advance)
    notes += measured.notes
    table = graph.to_table(scores, n=top)
    table["importance"] = importance(torch.tensor(table["score"].to_numpy()), measured).numpy()
    meta: dict[str, Any] = (
        source
        | about_claims
        | {
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
    )
    meta["notes"] = [meta["protocol"], *notes]
    if method == "eap-ig":
        gap = meta["corrupted"] - meta["clean"]
        meta["completeness"] = {"sum_over_embedding": float(scores[0].sum()), "difference": gap}
    tables = {"edges": table, "nodes": _node_table(graph, scores, measured, nodes), **claims}
    meta["wall_time_s"] = round(time.perf_counter() - started, 2)
    return Report("edges", tables, {"scores": scores.numpy()}, meta)


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
