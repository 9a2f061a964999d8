"""What circuits keep of a task, and the area under the curve of it over their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from circuits.edge_engines import Replay
from circuits.graph import Circuit, Graph, Scores
from circuits.heads.claims import resampling
from circuits.measure import Measure
from interp.errors import BadInput
from interp.run.resume import Checkpoint

Values = Float[np.ndarray, "n"]


def sized_circuits(
    graph: Graph, scores: Scores, sizes: Sequence[float], *, absolute: bool = False
) -> list[Circuit]:
    """For each size (percent of all edges) the highest-ranked edges, less those on no path through.

    >>> graph = Graph.of(tiny_model())
    >>> [int(c.sum()) <= n for c, n in zip(sized_circuits(graph, graph.random_scores(), [10, 100]), [11, 110])]
    [True, True]
    """
    return [
        graph.prune(graph.top_edges(scores, round(size / 100 * graph.n_edges), absolute=absolute))
        for size in sizes
    ]


def faithfulness(
    values: Float[np.ndarray, "*circuits n"], whole: Values, empty: Values, weights: Any = None
) -> np.ndarray:
    """f = (m(C) − m(∅)) / (m(N) − m(∅)) with m a mean over pairs: a ratio of means.

    Args:
        values: metric of each circuit and pair. whole, empty: of the model and the empty circuit.
        weights: [resample n] of bootstrap resamples; the result then has resamples as last axis.

    >>> faithfulness(np.array([[3.0, 1.0]]), np.array([4.0, 4.0]), np.zeros(2))
    array([0.5])
    """
    if weights is None:
        weights = np.full((1, len(whole)), 1 / len(whole))
        return faithfulness(values, whole, empty, weights)[..., 0]
    return ((values - empty) @ weights.T) / ((whole - empty) @ weights.T)


def areas(
    sizes: Sequence[float], f: Float[np.ndarray, "sizes ..."]
) -> tuple[np.ndarray, np.ndarray]:
    """(CPR, CMD): the trapezoids under f and under |1 − f| over the share of edges, nothing clipped.

    >>> [round(float(area), 3) for area in areas([0.1, 100.0], np.array([0.5, 1.0]))]
    [0.749, 0.25]
    """
    share = np.asarray(sizes, dtype=float) / 100
    return np.trapezoid(f, share, axis=0), np.trapezoid(np.abs(1 - f), share, axis=0)


class Judge:
    """Values of circuits, kept as they come; the two ends of faithfulness and its resamples."""

    def __init__(self, replay: Replay, units: Checkpoint, seed: int):
        self.replay, self.units, self.graph = replay, units, replay.graph
        self.measure: Measure = replay.measure
        self.whole = self.measure.clean.cpu().double().numpy()
        if replay.ablation == "resample":
            self.empty = self.measure.corrupted.cpu().double().numpy()
        else:
            self.empty = self.values("empty", self.graph.empty, known=False)
        self.weights = resampling(len(self.whole), seed)
        gap = float(self.whole.mean() - self.empty.mean())
        if abs(gap) < 1e-6:
            raise BadInput(
                f"{self.measure.metric} is {self.whole.mean():.4f} {self.measure.unit} for the model and for the "
                f"empty circuit ({replay.ablation} ablation) alike: faithfulness is not defined"
            )

    def values(self, name: str, circuit: Circuit, *, known: bool = True) -> Values:
        """The metric of every pair; known without a run for the model and the empty circuit."""
        if known and not circuit.any():
            return self.empty
        if known and bool((circuit == self.graph.allowed).all()):
            return self.whole

        def unit() -> dict[str, np.ndarray]:
            return {"values": self.replay.values([circuit])[0].cpu().double().numpy()}

        return self.units.compute(name, unit)["values"]

    def f(self, values: np.ndarray, *, resampled: bool = False) -> np.ndarray:
        """Faithfulness of values [... n]; with `resampled` that of every bootstrap resample."""
        weights = self.weights if resampled else None
        return faithfulness(values, self.whole, self.empty, weights)
