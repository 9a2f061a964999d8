"""Is it the whole circuit? Faithfulness over sizes, completeness and minimality.

A circuit is run with all other edges carrying the corrupted side's writes (`circuits.edge_replay`), so
every number here is exact for its protocol; the protocol is printed beside it, because ablation, level
(node or edge), positions and the kind of mean move such numbers by more than circuits differ.
"""

from __future__ import annotations

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
from circuits.faithfulness import Judge, areas, sized_circuits
from circuits.graph import Circuit, Graph, Scores
from circuits.heads.claims import INTERVAL
from circuits.measure import METRICS
from circuits.removals import removals
from circuits.saved_edges import digest, saved_edges
from circuits.tasks import as_pairs, check_task
from interp.data.pairs import Pairs
from interp.errors import BadInput, unknown
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.progress import Progress
from interp.run.resume import Checkpoint

SIZES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""Circuit sizes of the MIB benchmark, in percent of all edges."""
RANKINGS = {"signed": "CPR", "absolute": "CMD"}
"""How edges are ranked, and the area that is read off that ranking's curve."""
RANDOM = "random"


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
    given = None if saved is None else saved_edges(saved, scores, graph, source)
    key = {"model": source["model"], "options": options, "seed": seed, "pairs": pairs.digest}
    if given is not None:
        key["edges"] = digest(given[0], given[1])
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
        removed, minimal = removals(judge, own, found, subsets, seed, bars)
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
