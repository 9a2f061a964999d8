"""Circuits with nodes removed: do circuit and model then still agree, and what does each node add?"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from circuits.faithfulness import Judge
from circuits.graph import Circuit, Graph, Scores
from interp.run.progress import Progress

MOST_NODES = 20
"""Nodes whose removal is tried for minimality: those of the largest scores."""
DEEP_SUBSETS = 2
"""Subsets after whose removal each of these nodes is removed as well."""


def removals(
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


def without_nodes(graph: Graph, circuit: Circuit, nodes: Iterable[str]) -> Circuit:
    """The circuit with every write of these nodes corrupted: their outgoing edges are dropped."""
    left = circuit.clone()
    left[[graph.sender(name) for name in nodes]] = False
    return left
