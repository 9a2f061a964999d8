"""`circuit find`: from a task to a circuit, its nodes, its words, and how much of the behaviour it has."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.contextual import Decomposition
from circuits.decomposition import search
from circuits.discovery import (
    acdc,
    greedy_circuit,
    node_circuit,
    threshold_circuit,
    top_circuit,
)
from circuits.edge_engines import Job, Replay, engine
from circuits.edge_replay import ABLATIONS
from circuits.edge_scores import METHODS as EDGE_METHODS
from circuits.edge_scores import check_method
from circuits.faithfulness import faithfulness
from circuits.graph import Circuit, Graph, Scores
from circuits.heads.claims import INTERVAL, resampling
from circuits.measure import METRICS
from circuits.readout import NodeWrites
from circuits.readout import tables as word_tables
from circuits.tasks import as_pairs, check_task
from interp.data.pairs import Pairs
from interp.errors import BadInput, unknown
from interp.figures.head_claims import head_claims, heads_report
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.progress import Progress
from interp.run.resume import Checkpoint

METHODS = {
    **EDGE_METHODS,
    "cd-t": "contextual decomposition: heads and MLPs by their widest path to the logits (Hsu et al. 2024)",
    "acdc": "edges dropped one by one from the logits backwards (Conmy et al. 2023)",
}
SELECTIONS = ("greedy", "top")
NODE_METHODS = ("cd-t",)
LOSSES = ("kl", "loss")
"""Metrics that a circuit should keep low; the others it should keep high."""
EDGES, ACDC_EDGES = 500, 2000
"""Edges of a circuit where nothing is said; edges that ACDC starts from."""
WORDED = 60
"""Nodes that are read as words."""


@dataclass
class Found:
    """A circuit, and the scores that it was chosen by."""

    circuit: Circuit
    scores: Scores
    signed: bool = True
    about: dict[str, Any] = field(default_factory=dict)


def check_options(
    *,
    task: Any = None,
    method: str = "eap-ig",
    edges: int | None = None,
    threshold: float | None = None,
    selection: str = "greedy",
    metric: str = "logit_diff",
    ablation: str = "resample",
    steps: int = 5,
    n: int = 32,
    naive: bool = False,
    heads: Report | Path | None = None,
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if isinstance(task, (str, Path)):
        check_task(task)
    if heads is not None:
        heads_report(heads)
    for what, value, known in (
        ("method", method, METHODS),
        ("selection", selection, SELECTIONS),
        ("metric", metric, METRICS),
        ("ablation", ablation, ABLATIONS),
    ):
        if value not in known:
            raise unknown(what, value, known)
    if method == "acdc" and threshold is None:
        raise BadInput(
            "acdc needs a threshold: what dropping an edge may cost, in the metric's unit (such as 0.01 "
            "with metric kl)"
        )
    if method != "acdc" and edges is not None and threshold is not None:
        raise BadInput(
            "both edges and threshold given: the circuit's size follows from one of them"
        )
    if method in NODE_METHODS and metric != "logit_diff":
        raise BadInput(f"{method} takes apart the logit difference: leave out metric '{metric}'")
    if threshold is not None and not (math.isfinite(threshold) and threshold > 0):
        raise BadInput(f"threshold={threshold}: give more than 0, in the unit of the scores")
    if scored := _scores_of(method):
        check_method(scored, steps, naive=naive)
    for what, value in (("edges", edges), ("n", n)):
        if value is not None and value < 1:
            raise BadInput(f"{what}={value}: give at least 1")


@analysis(
    name="circuit_find",
    source="Syed et al. 2023 (EAP); Hanna et al. 2024 (EAP-IG, greedy); Conmy et al. 2023 (ACDC); "
    "Hsu et al. 2024 (CD-T)",
    example="interp circuit find smollm2-135m ioi --method eap-ig --edges 500",
    figure="graph",
    validate=check_options,
    takes="text",
)
def circuit_find(
    model: Model,
    task: Pairs | str,
    *,
    method: str = "eap-ig",
    edges: int | None = None,
    threshold: float | None = None,
    selection: str = "greedy",
    metric: str = "logit_diff",
    ablation: str = "resample",
    steps: int = 5,
    n: int = 32,
    seed: int = 0,
    naive: bool = False,
    heads: Report | Path | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """A circuit for a task: its edges and nodes, what they write as words, and its faithfulness.

    A circuit is a set of edges sender → receiver; every other edge carries what its sender writes on
    the other side (`ablation`). Faithfulness is (m(C) − m(∅)) / (m(N) − m(∅)), a ratio of means over
    pairs, with C the circuit, N the model and ∅ the circuit without edges.

    It does not show that this is the only circuit, or that its size is natural: scores of the
    gradient methods are first-order estimates (a saturated softmax hides an edge unless `steps` is
    large), ACDC's result depends on the order of edges, and the faithfulness is measured on the pairs
    that the circuit was found on.

    Args:
        task: a shipped task ("ioi", "facts:language"), a file of pairs, or Pairs.
        method: eap, eap-ig, eap-ig-activations, atp, cd-t or acdc (slow: one evaluation for every edge).
        edges: size of the circuit before pruning, by default 500. cd-t: as many nodes as have at most
            so many edges among them. acdc: it starts from this many edges, the strongest by eap-ig, by
            default 2000.
        threshold: instead of edges: the smallest magnitude of a score. acdc: what dropping an edge may
            cost, in the unit of the metric.
        selection: greedy (each edge leads to what is in the circuit already) or top.
        metric: logit_diff, prob_diff, kl or loss.
        ablation: what other edges carry: resample, mean or zero. Scores compare with the corrupted
            side always.
        steps: gradients between corrupted and clean, for the methods with ig (acdc's start too).
        n: pairs of a named task. seed: of the task and the bootstrap.
        heads: a report of `interp heads` on the same model (its folder, or itself): what it claims of
            each head is then on the cards of the circuit's nodes.
        naive: the plain engine: full forwards, one for each receiver of each circuit (scores: eap, eap-ig).
        checkpoint: folder for finished units. resume: go on from what is there.
        progress: show progress bars; by default in a terminal or a notebook.

    Returns: a Report. Table "circuit_find": the circuit's edges (sender, receiver, score), strongest
        first; a score is metric(edge corrupted) − metric(clean), so that the answer needs an edge of
        negative score under logit_diff (cd-t: a magnitude). Table "nodes": edges_in, edges_out, score
        (sum over its edges; cd-t: its own), contribution (direct, logits). Table "words": tokens that
        the nodes write at the end. Table "head_claims", with `heads`: that report's, one row a head.
        Arrays: mask and scores [n_senders n_receivers], whose axes are meta["senders"] and
        meta["receivers"]. meta["faithfulness"]: value, low, high (95 %, bootstrap over pairs), and the
        three means it is made of.

    Raises:
        BadInput: unknown options or task, a model the metric of which does not differ between sides,
        a circuit without edges, `heads` of other weights. Refused: the residual stream is not a sum of known writes.

    >>> pairs = Pairs.of([[5, 6, 7], [8, 6, 7]], [[5, 9, 7], [8, 3, 7]], answers=[3, 4], wrong=[4, 3])
    >>> report = circuit_find(tiny_model(), pairs, method="eap", edges=30, progress=False)
    >>> len(report.table) <= 30, report.arrays["mask"].shape
    (True, (11, 27))
    """
    started = time.perf_counter()
    options: dict[str, Any] = {
        "method": method,
        "edges": edges,
        "threshold": threshold,
        "selection": selection,
        "metric": metric,
        "ablation": ablation,
        "steps": steps,
        "naive": naive,
    }
    check_options(**options, n=n)
    pairs = as_pairs(model, task, n=n, seed=seed)
    options |= {"task": pairs.name, "n": len(pairs)}
    meta = provenance(model, options=options, seed=seed)
    claims, about_claims = head_claims(heads, meta["model"])
    key = {"model": meta["model"], "options": options, "seed": seed, "pairs": pairs.digest}
    units = Checkpoint(checkpoint, key, resume=resume)
    job_of, notes = engine(model, _scores_of(method), naive=naive)
    whole = job_of(pairs, metric)
    replay, graph = whole.replay(ablation), whole.graph
    with Progress(progress) as bars:
        if method == "cd-t":
            found = _by_nodes(model, graph, pairs, edges, threshold, units, bars)
        elif method == "acdc":
            assert threshold is not None
            found = _by_pruning(whole, replay, edges, threshold, steps, units, bars)
        else:
            scores = _scored(whole, method, steps, units, bars)
            found = _by_edges(graph, scores, edges, threshold, selection)
    if not found.circuit.any():
        strongest = float(found.scores.abs().max())
        raise BadInput(
            f"no edge lies on a path from the embedding to the logits: the circuit is empty. The strongest "
            f"score is {strongest:.4g}; lower the threshold, or give more edges"
        )
    writes = NodeWrites(model, pairs)
    nodes = _nodes_table(graph, found, writes)
    _, words = word_tables(writes, _worded(nodes), top_k=5, shown=4)
    faithful = _faithful(replay, found.circuit, seed)
    told = (
        f"faithfulness {faithful['value']:.2f} (95 %: {faithful['low']:.2f} to {faithful['high']:.2f}), on the "
        f"pairs it was found on: {metric} is {faithful['circuit']:.2f} {faithful['unit']} with the circuit, "
        f"{faithful['empty']:.2f} without any edge, {faithful['model']:.2f} for the model; other edges are "
        f"{'corrupted' if ablation == 'resample' else f'ablated ({ablation})'}"
    )
    meta |= {
        "senders": graph.sender_names,
        "receivers": graph.receiver_names,
        "n_edges": graph.n_edges,
        "signed": found.signed,
        "faithfulness": faithful,
        **found.about,
        **about_claims,
        "notes": [told, *model.notes, *whole.measure.notes, *notes],
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    arrays = {"mask": found.circuit.cpu().numpy(), "scores": found.scores.float().cpu().numpy()}
    tables = {
        "circuit_find": graph.to_table(found.scores, found.circuit),
        "nodes": nodes,
        "words": words,
        **claims,
    }
    return Report("circuit_find", tables, arrays, meta)


def _scores_of(method: str) -> str | None:
    """The method that scores edges, if any does: ACDC starts from the strongest by EAP-IG."""
    return "eap-ig" if method == "acdc" else method if method in EDGE_METHODS else None


def _scored(task: Job, method: str, steps: int, units: Checkpoint, bars: Progress) -> Scores:
    """Scores of all edges, with a bar."""
    advance = bars.stage("Scoring edges", task.n_units(method))
    return task.scores(method, steps=steps, units=units.part("scores"), advance=advance)


def _by_edges(
    graph: Graph, scores: Scores, edges: int | None, threshold: float | None, selection: str
) -> Found:
    if threshold is not None:
        return Found(threshold_circuit(graph, scores, threshold), scores)
    choose = greedy_circuit if selection == "greedy" else top_circuit
    return Found(choose(graph, scores, min(edges or EDGES, graph.n_edges)), scores)


def _by_nodes(
    model: Model,
    graph: Graph,
    pairs: Pairs,
    edges: int | None,
    threshold: float | None,
    units: Checkpoint,
    bars: Progress,
) -> Found:
    """CD-T's search: the nodes of largest score, as many as fit, with all edges among them."""
    taken_apart = Decomposition(model, pairs)
    relevance = taken_apart.relevance(
        units=units, progress=bars.stage("Decomposing", len(taken_apart.nodes))
    )
    found, _ = search(relevance)
    own = torch.zeros(len(graph.senders))
    for name, score in zip(relevance.nodes, found.tolist(), strict=True):
        if name in graph.sender_names:  # a head that writes nothing is no sender
            own[graph.sender(name)] = score
    if threshold is not None:
        circuit = graph.empty
        if count := int((own >= threshold).sum()):
            circuit = node_circuit(graph, own, count)
    else:
        circuit = _largest(graph, own, edges or EDGES)
    own[0] = own.max()
    # An edge is in from the threshold on at which both of its ends are.
    ends = torch.cat([own, own.max()[None]])
    scores = torch.minimum(own[:, None], ends[graph.node]) * graph.allowed
    return Found(circuit, scores, signed=False, about={"node_scores": own.tolist()})


def _largest(graph: Graph, own: Float[Tensor, " n_senders"], edges: int) -> Circuit:
    """The node circuit of most nodes with at most so many edges."""
    low, high = 0, len(graph.senders) - 1
    while low < high:  # more nodes never have fewer edges
        middle = (low + high + 1) // 2
        if int(node_circuit(graph, own, middle).sum()) <= edges:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        raise BadInput(f"no node has as few as {edges} edges: give more, or a threshold")
    return node_circuit(graph, own, low)


def _by_pruning(
    task: Job,
    replay: Replay,
    edges: int | None,
    threshold: float,
    steps: int,
    units: Checkpoint,
    bars: Progress,
) -> Found:
    """ACDC, from the strongest edges of EAP-IG where there are more."""
    graph = task.graph
    sign = 1 if task.measure.metric in LOSSES else -1
    wanted = ACDC_EDGES if edges is None else edges
    start = graph.whole
    if wanted < graph.n_edges:
        start = top_circuit(graph, _scored(task, "eap-ig", steps, units, bars), wanted)

    def losses(circuits: Sequence[Circuit]) -> Float[Tensor, " k"]:
        return sign * replay.values(circuits).mean(-1)

    count = int(start.sum())
    found = acdc(
        graph, losses, threshold, start=start, units=units, progress=bars.stage("Pruning", count)
    )
    about = {
        "acdc": {
            "started_from": count,
            "tried": found.tried,
            "evaluations": found.evaluations,
            "loss": found.loss,
        }
    }
    return Found(found.circuit, sign * found.cost.nan_to_num(0.0).float(), about=about)


def _faithful(replay: Replay, circuit: Circuit, seed: int) -> dict[str, Any]:
    """The circuit's faithfulness with its interval, and the three means that it is made of."""
    inside, empty = (x.cpu().double().numpy() for x in replay.values([circuit, replay.graph.empty]))
    model = replay.measure.clean.cpu().double().numpy()
    drawn = faithfulness(inside, model, empty, resampling(len(model), seed))
    low, high = np.quantile(drawn, INTERVAL)
    return {
        "value": float(faithfulness(inside, model, empty)),
        "low": float(low),
        "high": float(high),
        "circuit": float(inside.mean()),
        "empty": float(empty.mean()),
        "model": float(model.mean()),
        "unit": replay.measure.unit,
        "ablation": replay.ablation,
    }


def _nodes_table(graph: Graph, found: Found, writes: NodeWrites) -> pd.DataFrame:
    """One row a sender of the circuit, in order of computation."""
    own = found.about.get("node_scores")
    by_edges = graph.node_scores(found.scores * found.circuit)
    into = graph.adjacency(found.circuit)
    rows = []
    for name in graph.nodes(found.circuit):
        place = graph.sender(name)
        sender = graph.senders[place]
        rows.append(
            {
                "node": name,
                "kind": sender.kind,
                "layer": sender.layer,
                "head": sender.head,
                "edges_in": int(found.circuit[:, graph.node == place].sum()),
                "edges_out": int(found.circuit[place].sum()),
                "feeds": int(into[place].sum()),
                "score": float(by_edges[place]) if own is None else own[place],
                "contribution": float(writes.at(name, "end").contribution.mean()),
            }
        )
    return pd.DataFrame(rows)


def _worded(nodes: pd.DataFrame) -> list[str]:
    """The nodes that are read as words: those of the largest direct contributions."""
    order = np.argsort(-np.abs(nodes["contribution"].to_numpy(float)), kind="stable")[:WORDED]
    return [str(nodes["node"].iloc[int(i)]) for i in sorted(order)]
