"""Is it the whole circuit? Faithfulness over sizes, completeness, minimality, and the overlap of circuits.

A circuit is run with all other edges carrying the corrupted side's writes (`circuits.edge_replay`), so
every number here is exact for its protocol; the protocol is printed beside it, because ablation, level
(node or edge), positions and the kind of mean move such numbers by more than circuits differ.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from circuits.edge_engines import engine
from circuits.edge_replay import ABLATIONS
from circuits.edge_scores import METHODS, check_method, importance
from circuits.faithfulness import Judge, areas, node_overlap, sized_circuits, without_nodes
from circuits.graph import Circuit, Graph, Scores
from circuits.heads.claims import INTERVAL
from circuits.measure import METRICS
from circuits.tasks import as_pairs, check_task
from interp.data.pairs import Pairs
from interp.errors import BadInput, unknown
from interp.models.model import Model
from interp.registry import analysis, first_rows, leading
from interp.report import Report, provenance
from interp.run.progress import Progress
from interp.run.resume import Checkpoint

SIZES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""Circuit sizes of the MIB benchmark, in percent of all edges."""
RANKINGS = {"signed": "CPR", "absolute": "CMD"}
"""How edges are ranked, and the area that is read off that ranking's curve."""
RANDOM = "random"
MOST_NODES = 20
"""Nodes whose removal is tried for minimality: those of the largest scores."""

DEEP_SUBSETS = 2
"""Subsets after whose removal each of these nodes is removed as well."""


# --- analysis: one circuit -------------------------------------------------------------------------


def check_options(
    *,
    task: Any = None,
    scores: Any = "eap-ig",
    sizes: Sequence[float] = SIZES,
    at: float = 2.0,
    steps: int = 5,
    metric: str = "logit_diff",
    ablation: str = "resample",
    n: int = 32,
    random: int = 3,
    subsets: int = 10,
    naive: bool = False,
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if isinstance(task, (str, Path)):
        check_task(task)
    if isinstance(scores, str) and scores not in (*METHODS, RANDOM) and not Path(scores).is_dir():
        raise unknown("method, or folder of a saved report,", scores, (*METHODS, RANDOM))
    for what, value, known in (("metric", metric, METRICS), ("ablation", ablation, ABLATIONS)):
        if value not in known:
            raise unknown(what, value, known)
    if len(sizes) < 2 or sorted(set(sizes)) != list(sizes) or not 0 < sizes[0] < sizes[-1] <= 100:
        raise BadInput(
            f"sizes {list(sizes)}: give at least two, growing, in percent of all edges (0 to 100)"
        )
    if not 0 < at <= 100:
        raise BadInput(f"at={at}: give a size in percent of all edges (0 to 100)")
    for what, value, least in (("steps", steps, 1), ("n", n, 2), ("random", random, 0)):
        if value < least:
            raise BadInput(f"{what}={value}: give at least {least}")
    if subsets < 0:
        raise BadInput(f"subsets={subsets}: give 0 or more")
    if method := _method(scores):
        check_method(method, steps, naive=naive)


def _method(scores: Any) -> str | None:
    """The method that edges are to be scored by, if any."""
    return scores if isinstance(scores, str) and scores in METHODS else None


@analysis(
    name="circuit_evaluate",
    source="Wang et al. 2022 (completeness, minimality); Mueller et al. 2025 (MIB: CPR, CMD); "
    "Miller et al. 2024 (on protocols)",
    example="interp circuit evaluate smollm2-135m ioi --scores eap-ig",
    figure="faithfulness",
    validate=check_options,
    summary=lambda report: report.table.loc[~report.table["ranking"].str.startswith(RANDOM)],
    takes="text",
)
def circuit_evaluate(
    model: Model,
    task: Pairs | str,
    *,
    scores: str | Report = "eap-ig",
    sizes: Sequence[float] = SIZES,
    at: float = 2.0,
    steps: int = 5,
    metric: str = "logit_diff",
    ablation: str = "resample",
    n: int = 32,
    seed: int = 0,
    random: int = 3,
    subsets: int = 10,
    naive: bool = False,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """Faithfulness over circuit sizes with CPR and CMD, completeness and minimality, beside random circuits.

    f = (m(C) − m(∅)) / (m(N) − m(∅)), m the mean metric over pairs, C the circuit, N the model, ∅ no edge:
    1 is all of the task, 0 none; values outside are possible and not clipped. CPR is the area under f
    with edges ranked by signed score, CMD the area of |1 − f| ranked by magnitude (smaller is better).
    A circuit of k % keeps the first k % of the edges and is then pruned to paths from embedding to logits.
    A faithful circuit need not be the model's own: see completeness (do circuit and model still agree
    with the same nodes removed?) and minimality (what does each node add?).

    Args:
        task: a task's name (ioi, greater_than, …), a file of pairs, or Pairs.
        scores: eap-ig, eap, eap-ig-activations, atp or random; or a report of `interp edges` or
            `interp circuit find`: its folder, or itself.
        sizes: circuit sizes in percent of all edges. at: the size (percent, signed ranking) that
            completeness and minimality are about.
        steps: of eap-ig. metric: logit_diff, prob_diff, kl or loss.
        ablation: what other edges carry: resample (the corrupted prompts'), mean or zero.
        n: pairs of a named task. seed: of the task, of random circuits and resamples.
        random: random circuits of each size to compare with. subsets: sets of nodes for completeness.
        naive: the plain engine: full forwards, one for each receiver of each circuit (scores: eap, eap-ig).
        checkpoint: folder for finished circuits. resume: go on from what is there.
        progress: show progress bars; by default in a terminal or a notebook.

    Returns: a Report. Table "circuit_evaluate": ranking (signed, absolute, random 0, …, circuit: the
        saved one), size (percent), nominal (edges before pruning), edges, nodes, faithfulness with its
        95 % interval over pairs (low, high), value (mean metric). Table "areas": CPR and CMD with
        intervals. Table "completeness": nodes removed, metric of circuit and model without them, and
        their difference as a share of the model's gap. Table "minimality": for each node what removing
        it costs, alone and at most after one of the subsets, as a share of the gap.

    Raises:
        BadInput: unknown options; a saved circuit without edges, or of another model. Refused: the
        residual stream is not a sum of known writes.

    >>> report = circuit_evaluate(
    ...     tiny_model(), "induction", scores="eap", sizes=[10, 100], n=2, random=1, subsets=1, progress=False)
    >>> f = report.table.set_index(["ranking", "size"])["faithfulness"]
    >>> float(f["signed", 100.0])
    1.0
    """
    started = time.perf_counter()
    saved = scores if isinstance(scores, Report) else None
    scores = f"the report '{scores.analysis}'" if isinstance(scores, Report) else str(scores)
    options: dict[str, Any] = {
        "scores": scores,
        "sizes": [float(size) for size in sizes],
        "at": at,
        "steps": steps,
        "metric": metric,
        "ablation": ablation,
        "random": random,
        "subsets": subsets,
        "naive": naive,
    }
    check_options(**{**options, "scores": saved or scores, "n": n})
    graph = Graph.of(model)
    pairs = as_pairs(model, task, n=n, seed=seed)
    if len(pairs) < 2:
        raise BadInput("one pair has no interval: give at least two")
    options |= {"task": pairs.name, "n": len(pairs)}
    source = provenance(model, options=options, seed=seed)
    if saved is None and Path(scores).is_dir():
        saved = Report.load(scores)
    given = None if saved is None else _saved(saved, scores, graph, source)
    key = {"model": source["model"], "options": options, "seed": seed, "pairs": pairs.digest}
    if given is not None:
        key["edges"] = _digest(given[0], given[1])
    units = Checkpoint(checkpoint, key, resume=resume)
    job_of, notes = engine(model, _method(scores), naive=naive)
    with Progress(progress) as bars:
        whole = job_of(pairs, metric)
        notes += whole.measure.notes
        if given is not None:
            found, circuit, told = given
            notes += told
        else:
            found, circuit = graph.random_scores(seed), None
            if scores != RANDOM:
                held_out = isinstance(task, str) and Path(task).suffix == ""
                other = as_pairs(model, task, n=n, seed=seed + 1) if held_out else pairs
                notes += _not_held_out(other, pairs)
                fit = job_of(other, metric) if held_out else whole
                advance = bars.stage("Scoring edges", fit.n_units(scores))
                found = fit.scores(scores, steps=steps, units=units.part("scores"), advance=advance)
                found = importance(found, fit.measure)
        judge = Judge(whole.replay(ablation), units, seed)
        curves = _curves(judge, found, circuit, sizes, random, seed, bars)
        own = circuit
        if own is None:
            (own,) = sized_circuits(graph, found, [at])
        removed, minimal = _removals(judge, own, found, subsets, seed, bars)
    meta: dict[str, Any] = source | {
        "task": pairs.name,
        "metric": metric,
        "unit": whole.measure.unit,
        "model_value": float(judge.whole.mean()),
        "empty_value": float(judge.empty.mean()),
        "n_edges": graph.n_edges,
        "protocol": _protocol(judge, scores, len(pairs)),
        "judged": {"edges": int(own.sum()), "nodes": graph.nodes(own), "at": at},
        "notes": notes,
    }
    tables = {
        "circuit_evaluate": curves,
        "areas": _areas(judge, curves, sizes),
        "completeness": removed,
        "minimality": minimal,
    }
    meta["notes"] = [meta["protocol"], _told(tables["areas"]), *meta["notes"]]
    empty = curves.loc[curves["edges"] == 0]
    if len(empty):
        sizes_of = empty.groupby("ranking", sort=False)["size"].agg(list)
        named = [f"{name} at {', '.join(f'{x:g}' for x in at)} %" for name, at in sizes_of.items()]
        meta["notes"].append(
            "none of these circuits' edges lie on a path from embedding to logits, so they are empty and "
            f"their faithfulness is 0 by definition: {'; '.join(named)}"
        )
    meta["wall_time_s"] = round(time.perf_counter() - started, 2)
    return Report("circuit_evaluate", tables, {}, meta)


def _curves(
    judge: Judge,
    scores: Scores,
    circuit: Circuit | None,
    sizes: Sequence[float],
    random: int,
    seed: int,
    bars: Progress,
) -> pd.DataFrame:
    """Faithfulness of every ranking and size."""
    graph = judge.graph
    rankings = [("signed", scores, False), ("absolute", scores, True)]
    rankings += [
        (f"random {i}", graph.random_scores(1000 * (seed + 1) + i), False) for i in range(random)
    ]
    plan = [
        (name, size, round(size / 100 * graph.n_edges), own)
        for name, ranked, absolute in rankings
        for size, own in zip(
            sizes, sized_circuits(graph, ranked, sizes, absolute=absolute), strict=True
        )
    ]
    if circuit is not None:
        n = int(circuit.sum())
        plan.append(("circuit", 100 * n / graph.n_edges, n, graph.prune(circuit)))
    advance = bars.stage("Running circuits", len(plan))
    rows = []
    for name, size, nominal, own in plan:
        values = judge.values(f"{name} at {size}", own)
        low, high = np.quantile(judge.f(values, resampled=True), INTERVAL)
        rows.append(
            {
                "ranking": name,
                "size": float(size),
                "nominal": nominal,
                "edges": int(own.sum()),
                "nodes": len(graph.nodes(own)),
                "faithfulness": float(judge.f(values)),
                "low": float(low),
                "high": float(high),
                "value": float(values.mean()),
            }
        )
        rows[-1]["values"] = values
        advance(1)
    return pd.DataFrame(rows)


def _areas(judge: Judge, curves: pd.DataFrame, sizes: Sequence[float]) -> pd.DataFrame:
    """CPR and CMD with intervals; of random circuits the mean over draws. Drops the values used."""
    rows = []
    kinds = {name: curves[curves["ranking"] == name] for name in RANKINGS}
    draws = curves[curves["ranking"].str.startswith(RANDOM)]
    if len(draws):
        kinds[RANDOM] = draws
    for ranking, table in kinds.items():
        values = np.stack(list(table["values"])).reshape(-1, len(sizes), len(judge.whole))
        exact = np.moveaxis(judge.f(values), 0, 1)  # [sizes draws]
        drawn = np.moveaxis(judge.f(values, resampled=True), 0, 1)
        for which, name in enumerate(("CPR", "CMD")):
            if RANKINGS.get(ranking, name) != name:
                continue
            low, high = np.quantile(areas(sizes, drawn)[which].mean(0), INTERVAL)
            area = float(areas(sizes, exact)[which].mean())
            rows.append({"area": name, "ranking": ranking, "value": area, "low": low, "high": high})
    curves.drop(columns="values", inplace=True)
    return pd.DataFrame(rows)


def _told(table: pd.DataFrame) -> str:
    """The areas in one line."""
    return "; ".join(
        f"{row['area']} of {'random circuits' if row['ranking'] == RANDOM else row['ranking'] + ' ranking'} "
        f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        for row in table.to_dict("records")
    )


def _removals(
    judge: Judge,
    circuit: Circuit,
    scores: Scores,
    subsets: int,
    seed: int,
    bars: Progress,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Completeness over random subsets of the circuit's nodes, and minimality of its nodes."""
    graph, draw = judge.graph, np.random.default_rng(seed)
    nodes = [name for name in graph.nodes(circuit) if name != "embed"]
    size = graph.node_scores(scores * circuit)
    order = sorted(nodes, key=lambda name: -abs(float(size[graph.sender(name)])))[:MOST_NODES]
    chosen = []
    for _ in range(subsets if nodes else 0):
        share = draw.uniform(0, 0.5)
        picked = [name for name in nodes if draw.random() < share]
        chosen.append(picked or [nodes[int(draw.integers(len(nodes)))]])
    deep = chosen[:DEEP_SUBSETS]
    advance = bars.stage("Removing nodes", 2 * len(chosen) + (1 + len(deep)) * len(order))

    def judged(name: str, own: Circuit) -> tuple[float, float]:
        values = judge.values(name, graph.prune(own))
        advance(1)
        return float(judge.f(values)), float(values.mean())

    rows, left = [], []
    for i, removed in enumerate(chosen):
        f_circuit, of_circuit = judged(
            f"circuit without {i}", without_nodes(graph, circuit, removed)
        )
        f_model, of_model = judged(f"model without {i}", without_nodes(graph, graph.whole, removed))
        rows.append((i, len(removed), " ".join(removed), of_circuit, of_model, f_circuit - f_model))
        left.append(f_circuit)
    columns = ["subset", "n_removed", "removed", "circuit", "model", "difference"]
    completeness = pd.DataFrame(rows, columns=columns)
    start = float(judge.f(judge.values("circuit", graph.prune(circuit))))
    rows = []
    for name in order:
        alone = start - judged(f"without {name}", without_nodes(graph, circuit, [name]))[0]
        after = [
            left[i]
            - judged(f"without {i} and {name}", without_nodes(graph, circuit, [*removed, name]))[0]
            for i, removed in enumerate(deep)
        ]
        rows.append((name, alone, max([abs(alone), *map(abs, after)])))
    return completeness, pd.DataFrame(rows, columns=["node", "alone", "at_most"])


def _saved(
    report: Report, called: str, graph: Graph, source: dict[str, Any]
) -> tuple[Scores, Circuit | None, list[str]]:
    """Importances (and circuit) of a saved report of `edges` or `circuit_find`, and what to say of it."""
    if report.analysis not in ("edges", "circuit_find") or "scores" not in report.arrays:
        raise BadInput(
            f"{called} is a report of '{report.analysis}'; give one of `interp edges` or `interp circuit find`"
        )
    names = [report.meta.get("senders"), report.meta.get("receivers")]
    if names != [graph.sender_names, graph.receiver_names]:
        raise BadInput(
            f"{called} was made on {report.meta['model']['id']}, whose graph is another than this model's"
        )
    notes = []
    if report.meta["model"]["sha256"] != source["model"]["sha256"]:
        notes.append(f"the edges were scored on other weights ({report.meta['model']['id']})")
    scores = torch.from_numpy(report.arrays["scores"]).float()
    ends = report.meta.get("faithfulness", {})
    gap = report.meta.get("clean", ends.get("model", 1.0)) - report.meta.get(
        "corrupted", ends.get("empty", 0.0)
    )
    if report.meta.get("signed", True):
        scores = -scores / gap
    circuit = None
    if "mask" in report.arrays:
        circuit = torch.from_numpy(report.arrays["mask"]).bool()
        if not graph.prune(circuit).any():
            raise BadInput(
                f"the circuit in {called} has no edge on a path from embedding to logits: nothing to judge"
            )
    same = [report.meta.get("options", {}).get("task"), report.meta.get("seed")]
    if same == [source["options"]["task"], source["seed"]]:
        notes.append("edges were scored on pairs drawn with the same seed as those judged on")
    return scores, circuit, notes


def _digest(scores: Scores, circuit: Circuit | None) -> str:
    """Changes when a saved report's edges do."""
    content = scores.numpy().tobytes() + (b"" if circuit is None else circuit.numpy().tobytes())
    return hashlib.sha256(content).hexdigest()[:16]


def _not_held_out(scored: Pairs, judged: Pairs) -> list[str]:
    """A note where pairs that circuits are judged on are among those that edges were scored on.

    Another seed draws the same pairs again where a task has few.
    """
    seen, own = (
        [tuple(row) for row in torch.cat([pairs.clean, pairs.corrupted], 1).tolist()]
        for pairs in (scored, judged)
    )
    known = set(seen)
    shared = sum(row in known for row in own)
    if not shared:
        return []
    which = "the same" if shared == len(own) else f"{shared} of the {len(own)}"
    return [f"edges were scored on {which} pairs that circuits are judged on"]


def _protocol(judge: Judge, scores: Any, n: int) -> str:
    """Everything that moves such numbers."""
    measured = judge.measure
    carried = {
        "resample": "their corrupted prompt's writes",
        "mean": "the mean of the corrupted prompts' writes at each position",
        "zero": "zeros",
    }[judge.replay.ablation]
    return (
        f"edge level; q, k, v of each query head, MLPs and logits as receivers; edges outside of the circuit "
        f"carry {carried}, at all positions; {measured.metric} ({measured.unit}) at the last position; "
        f"faithfulness is a ratio of means over {n} pairs of '{measured.pairs.name}', "
        f"(m(C) − m(∅)) / (m(N) − m(∅)) with m(N) = {judge.whole.mean():.3f} and m(∅) = {judge.empty.mean():.3f}; "
        f"edges ranked by {scores}, circuits pruned to paths from embedding to logits, sizes nominal, "
        "nothing clipped; intervals: 95 %, bootstrap over pairs"
    )


# --- analysis: circuits of several tasks -----------------------------------------------------------


def check_overlap(
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
    validate=check_overlap,
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
    check_overlap(**options)
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
