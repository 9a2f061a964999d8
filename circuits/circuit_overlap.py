"""How much of their circuits several tasks share, and whether one task's circuit does another's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from circuits.edge_engines import engine
from circuits.edge_scores import check_method, importance
from circuits.faithfulness import Judge
from circuits.graph import Circuit, Graph
from circuits.measure import METRICS
from circuits.tasks import as_pairs, check_task
from interp.errors import BadInput, unknown
from interp.models.model import Model
from interp.registry import analysis, first_rows, leading
from interp.report import Report, provenance
from interp.run.progress import Progress
from interp.run.resume import Checkpoint


def check_options(
    *,
    tasks: str | Sequence[str] = (),
    method: str = "eap-ig",
    edges: int = 1000,
    steps: int = 5,
    metric: str = "logit_diff",
    n: int = 32,
    naive: bool = False,
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    names = _names(tasks)
    for name in names:
        check_task(name)
    if len(set(names)) < 2:
        raise BadInput(f"tasks {', '.join(names)}: give at least two different ones, a,b")
    check_method(method, steps, naive=naive)
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    for what, value in (("edges", edges), ("n", n)):
        if value < 1:
            raise BadInput(f"{what}={value}: give at least 1")


def _names(tasks: str | Sequence[str]) -> list[str]:
    several = tasks.split(",") if isinstance(tasks, str) else tasks
    return [name.strip() for name in several if name.strip()]


@analysis(
    name="circuit_overlap",
    source="Merullo et al. 2024, Circuit component reuse across tasks",
    example="interp circuit overlap smollm2-135m ioi,colored_objects",
    figure="overlap",
    validate=check_options,
    summary=lambda report: leading(
        first_rows(report), "a", "b", "heads_shared", "jaccard", "by_chance", "edge_jaccard"
    ),
    takes="text",
)
def circuit_overlap(
    model: Model,
    tasks: str,
    *,
    method: str = "eap-ig",
    edges: int = 1000,
    steps: int = 5,
    metric: str = "logit_diff",
    n: int = 32,
    seed: int = 0,
    naive: bool = False,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """How many heads and edges the circuits of several tasks share, and whether one does another's task.

    Each task's circuit is its `edges` highest edges by signed score, pruned. share_of_a is the share of
    a's heads that b's circuit has too (Merullo et al. report 78 % of the IOI heads for colored objects on
    GPT-2 medium); by_chance is what random sets of heads of these sizes would share. It depends strongly
    on `edges`: large circuits share heads whatever they do, and sharing a head does not show that it does
    the same in both. `faithfulness` is of a's circuit on b's task.

    Args:
        tasks: names, separated by commas.
        method: eap-ig, eap, eap-ig-activations or atp. edges: of each circuit, before pruning.
        steps: of eap-ig. metric: logit_diff, prob_diff, kl or loss.
        n: pairs of each task. seed: of the tasks.
        naive: the plain engine: full forwards, one for each receiver of each circuit (scores: eap, eap-ig).
        checkpoint: folder for finished tasks. resume: go on from what is there.
        progress: show progress bars; by default in a terminal or a notebook.

    Returns: a Report. Table "circuit_overlap": for each ordered pair of tasks (a, b) heads_a, heads_b,
        heads_shared, share_of_a, jaccard, by_chance, edges_shared, edge_jaccard, faithfulness (of a's
        circuit on b). Table "heads": each head with the tasks whose circuit has it. Array "masks"
        [n_tasks n_senders n_receivers].

    Raises:
        BadInput: fewer than two tasks, a circuit without edges. Refused: the residual stream is not a sum
        of known writes.

    >>> report = circuit_overlap(
    ...     tiny_model(), "induction,induction:successor", method="eap", edges=40, n=3, progress=False)
    >>> len(report.table)
    4
    """
    started = time.perf_counter()
    options: dict[str, Any] = {
        "tasks": _names(tasks),
        "method": method,
        "edges": edges,
        "steps": steps,
        "metric": metric,
        "n": n,
        "naive": naive,
    }
    check_options(**options)
    source = provenance(model, options=options, seed=seed)
    key = {"model": source["model"], "options": options, "seed": seed}
    units = Checkpoint(checkpoint, key, resume=resume)
    job_of, notes = engine(model, method, naive=naive)
    graph, names = Graph.of(model), _names(tasks)
    circuits: list[Circuit] = []
    judges: list[Judge] = []
    with Progress(progress) as bars:
        advance = bars.stage("Scoring edges", len(names))
        for name in names:
            task = job_of(as_pairs(model, name, n=n, seed=seed), metric)
            notes += task.measure.notes
            scores = task.scores(method, steps=steps, units=units.part(name))
            ranked = importance(scores, task.measure)
            circuits.append(graph.prune(graph.top_edges(ranked, min(edges, graph.n_edges))))
            if not circuits[-1].any():
                raise BadInput(
                    f"none of the {edges} highest edges of '{name}' lie on a path from embedding to logits: "
                    "the circuit is empty; give more edges"
                )
            judges.append(Judge(task.replay(), units.part(name), seed))
            advance(1)
        advance = bars.stage("Running circuits", len(names) ** 2)
        rows = []
        for a, own in zip(names, circuits, strict=True):
            for b, other, judge in zip(names, circuits, judges, strict=True):
                f = float(judge.f(judge.values(f"circuit of {a}", own)))
                rows.append(
                    {"a": a, "b": b} | node_overlap(graph, own, other) | {"faithfulness": f}
                )
                advance(1)
    heads = [
        {"head": sender.name, "layer": sender.layer, "index": sender.head}
        | {name: bool(own[i].any()) for name, own in zip(names, circuits, strict=True)}
        for i, sender in enumerate(graph.senders)
        if sender.kind == "head" and any(own[i].any() for own in circuits)
    ]
    meta: dict[str, Any] = source | {
        "n_edges": graph.n_edges,
        "senders": graph.sender_names,
        "receivers": graph.receiver_names,
        "protocol": f"{edges} highest edges by signed {method} score, pruned; {metric}; "
        f"resample ablation, edge level, ratio of means over {n} pairs",
        "shared_by_all": [head["head"] for head in heads if all(head[name] for name in names)],
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    meta["notes"] = [meta["protocol"], *notes]
    arrays = {"masks": torch.stack(circuits).numpy()}
    tables = {"circuit_overlap": pd.DataFrame(rows), "heads": pd.DataFrame(heads)}
    return Report("circuit_overlap", tables, arrays, meta)


def node_overlap(graph: Graph, a: Circuit, b: Circuit) -> dict[str, float]:
    """How much two circuits share: heads, and edges.

    Returns: heads_a, heads_b, heads_shared; share_of_a (of a's heads, those that b has too, the number
        Merullo et al. report), jaccard; by_chance (the share_of_a to expect of random sets of these
        sizes); edges_shared, edge_jaccard. NaN where a circuit has no heads.

    >>> graph = Graph.of(tiny_model())
    >>> a = graph.node_circuit(["0.1", "1.2"])
    >>> found = node_overlap(graph, a, graph.node_circuit(["1.2", "1.3"]))
    >>> found["heads_shared"], found["share_of_a"], found["by_chance"]
    (1, 0.5, 0.25)
    """
    is_head = torch.tensor([sender.kind == "head" for sender in graph.senders])
    heads_a, heads_b = (graph.prune(c).any(1) & is_head for c in (a, b))
    shared, union = int((heads_a & heads_b).sum()), int((heads_a | heads_b).sum())
    n_a, n_b = int(heads_a.sum()), int(heads_b.sum())
    edges = int((a & b).sum())
    either = int((a | b).sum())
    nan = float("nan")
    return {
        "heads_a": n_a,
        "heads_b": n_b,
        "heads_shared": shared,
        "share_of_a": shared / n_a if n_a else nan,
        "jaccard": shared / union if union else nan,
        "by_chance": n_b / int(is_head.sum()) if n_a else nan,
        "edges_shared": edges,
        "edge_jaccard": edges / either if either else nan,
    }
