"""Finding a circuit: from scores of edges or nodes to a subgraph, and by pruning the whole model (ACDC).

Selections take a dense tensor of scores and return a dense circuit (see `circuits.graph`). ACDC asks the
model itself: it goes through the edges from the logits backwards and drops every one whose corruption
costs less than a threshold. It is done here exactly as if edge by edge, but many at once: as nearly
every edge is dropped, the circuits without the next 1, 2, …, k edges are evaluated together, on the bet
that all k go; where the bet is lost, the edge that is kept is known, and what came after it is tried
again.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph import Circuit, Graph, Scores
from interp.errors import BadInput
from interp.run.resume import Checkpoint

Evaluate = Callable[[Sequence[Circuit]], Float[Tensor, " k"]]
"""What circuits lose: a number for each, lower is better, such as KL(model ‖ circuit)."""

FIRST_BET, LARGEST_BET = 4, 64
"""Edges bet on at once at first, and at most; a bet that is won doubles the next."""


# --- selection by score ----------------------------------------------------------------------------


def top_circuit(graph: Graph, scores: Scores, n: int) -> Circuit:
    """The n edges of largest magnitude, less those that lie on no path from embedding to logits.

    >>> graph = Graph.of(tiny_model())
    >>> scores = graph.random_scores()
    >>> int(top_circuit(graph, scores, graph.n_edges).sum()) == graph.n_edges
    True
    """
    _check_count(graph, n)
    return graph.prune(graph.top_edges(scores, n, absolute=True))


def threshold_circuit(graph: Graph, scores: Scores, threshold: float) -> Circuit:
    """The edges whose score is at least `threshold` in magnitude, pruned as in `top_circuit`.

    >>> graph = Graph.of(tiny_model())
    >>> int(threshold_circuit(graph, graph.random_scores(), 100.0).sum())
    0
    """
    graph.check(scores)
    if not threshold >= 0:
        raise BadInput(f"threshold={threshold}: give 0 or more, in the unit of the metric")
    return graph.prune(graph.allowed & (scores.abs() >= threshold))


def greedy_circuit(graph: Graph, scores: Scores, n: int) -> Circuit:
    """n edges, each the strongest of those that lead to what is in the circuit already.

    As in Dijkstra's search, from the logits: every edge taken ends at a node that reaches the logits,
    so no edge is spent on a part of the graph that goes nowhere. A last pruning drops what the
    embedding does not reach.

    Source: Hanna et al. 2024, "Have faith in faithfulness", §3.

    >>> graph = Graph.of(tiny_model())
    >>> circuit = greedy_circuit(graph, graph.random_scores(), 40)
    >>> int(circuit.sum()) <= 40, bool(circuit[:, -1].any())
    (True, True)
    """
    graph.check(scores)
    _check_count(graph, n)
    strength = scores.abs().masked_fill(~graph.allowed, -1.0)
    into: list[list[int]] = [[] for _ in range(len(graph.senders) + 1)]
    for column, node in enumerate(graph.node.tolist()):
        into[node].append(column)
    circuit, seen = graph.empty, {len(graph.senders)}
    heap: list[tuple[float, int, int]] = []

    def open_node(node: int) -> None:
        for column in into[node]:
            for row in graph.allowed[:, column].nonzero()[:, 0].tolist():
                heapq.heappush(heap, (-float(strength[row, column]), row, column))

    open_node(len(graph.senders))
    taken = 0
    while heap and taken < n:
        _, row, column = heapq.heappop(heap)
        circuit[row, column] = True
        taken += 1
        if row not in seen:
            seen.add(row)
            open_node(row)
    return graph.prune(circuit)


def node_circuit(graph: Graph, scores: Float[Tensor, " n_senders"], n: int) -> Circuit:
    """All edges among the n heads and MLPs of largest score in magnitude, from embedding to logits.

    Args:
        scores: one a sender of the graph; the embedding's is not used, it is always in.
    """
    if scores.shape != (len(graph.senders),):
        raise BadInput(
            f"node scores have shape {tuple(scores.shape)}; this model has {len(graph.senders)} senders"
        )
    if not 0 < n < len(graph.senders):
        raise BadInput(f"a circuit of {n} nodes: give 1 to {len(graph.senders) - 1}")
    order = torch.argsort(scores[1:].abs(), descending=True, stable=True)[:n] + 1
    return graph.prune(graph.node_circuit([graph.senders[int(i)].name for i in order]))


def _check_count(graph: Graph, n: int) -> None:
    if not 0 < n <= graph.n_edges:
        raise BadInput(f"a circuit of {n} edges: give 1 to {graph.n_edges}")


# --- ACDC ------------------------------------------------------------------------------------------


@dataclass
class Pruning:
    """What ACDC found.

    Attributes:
        circuit: what is left, pruned. kept: edges tried and kept.
        cost: [n_senders n_receivers], what dropping each edge cost when it was tried (NaN: not tried).
        loss: of the circuit. tried: edges. evaluations: circuits evaluated, lost bets included.
    """

    circuit: Circuit
    kept: Circuit
    cost: Float[Tensor, "n_senders n_receivers"]
    loss: float
    tried: int = 0
    evaluations: int = 0


@dataclass
class _State:
    circuit: Circuit
    cost: Tensor
    loss: float
    place: int = 0
    bet: int = FIRST_BET
    tried: int = 0
    evaluations: int = 0
    kept: list[tuple[int, int]] = field(default_factory=list)


def backwards(graph: Graph, start: Circuit | None = None) -> list[tuple[int, int]]:
    """Edges in the order ACDC tries them: receivers from the logits back, senders latest first."""
    circuit = graph.allowed if start is None else start & graph.allowed
    return [
        (row, column)
        for column in reversed(range(len(graph.receivers)))
        for row in reversed(circuit[:, column].nonzero()[:, 0].tolist())
    ]


def acdc(
    graph: Graph,
    evaluate: Evaluate,
    threshold: float,
    *,
    start: Circuit | None = None,
    units: Checkpoint | None = None,
    progress: Callable[[int], None] | None = None,
) -> Pruning:
    """The circuit that is left when every edge that costs less than `threshold` is dropped.

    From the logits backwards, edge e is dropped for good if loss(C − e) − loss(C) < τ, C what is left
    then. The result is that of trying edges one by one; an edge whose receiver has lost every way to
    the logits is dropped without a try, since nothing can come of it.

    The order decides: of two edges that make up for each other, the one tried first is dropped and the
    other kept. A threshold near the rounding of the loss keeps noise.

    Args:
        evaluate: losses of several circuits at once; called with about 4 to 64.
        threshold: τ, in the unit of the loss.
        start: the circuit to prune; by default the whole model.
        units: finished stretches, so that a long search goes on where it stopped.
        progress: called with the edges just decided.

    Source: Conmy et al. 2023, "Towards automated circuit discovery", algorithm 1.

    >>> graph = Graph.of(tiny_model())
    >>> wanted = graph.circuit([("embed", "0.1.v"), ("0.1", "logits")])
    >>> found = acdc(graph, lambda cs: torch.tensor([float((wanted & ~c).sum()) for c in cs]), 0.5)
    >>> bool((found.circuit == wanted).all()), found.evaluations < graph.n_edges
    (True, True)
    """
    if not threshold > 0:
        raise BadInput(f"threshold={threshold}: give more than 0, in the unit of the metric")
    first = graph.whole if start is None else start & graph.allowed
    if not first.any():
        raise BadInput("the circuit to prune is empty: give at least one edge")
    units = Checkpoint() if units is None else units
    order = backwards(graph, first)
    state = _State(first.clone(), torch.full(graph.shape, torch.nan), float("nan"))
    (state.loss,) = units.compute("whole", lambda: {"loss": _losses(evaluate, [first])})["loss"]
    state.evaluations = 1
    while state.place < len(order):
        before = state.place
        stretch = list(_alive(graph, state, order))
        if stretch:
            name = f"from {order[before]} with {len(stretch)}"
            losses = units.compute(
                name, lambda stretch=stretch: _stretch(evaluate, state.circuit, stretch)
            )["loss"]
            _decide(state, stretch, losses, threshold, order)
        if progress is not None:
            progress(state.place - before)
    kept = graph.empty
    for row, column in state.kept:
        kept[row, column] = True
    return Pruning(
        graph.prune(state.circuit), kept, state.cost, state.loss, state.tried, state.evaluations
    )


def _alive(
    graph: Graph, state: _State, order: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """The next edges to bet on; edges that lead nowhere any more are dropped on the way."""
    reaches = _reaches(graph, state.circuit)
    found = 0
    while state.place < len(order) and not found:
        row, column = order[state.place]
        if reaches[int(graph.node[column])]:
            break
        state.circuit[row, column] = False
        state.place += 1
    for row, column in order[state.place :]:
        if found == state.bet or not reaches[int(graph.node[column])]:
            return
        found += 1
        yield row, column


def _reaches(graph: Graph, circuit: Circuit) -> Tensor:
    """Which nodes have a way to the logits [n_senders + 1]."""
    feeds = graph.adjacency(circuit)
    out = torch.zeros(len(feeds), dtype=torch.bool)
    out[-1] = True
    for i in reversed(range(len(feeds) - 1)):
        out[i] = (feeds[i] & out).any()
    return out


def _stretch(
    evaluate: Evaluate, circuit: Circuit, stretch: Sequence[tuple[int, int]]
) -> dict[str, np.ndarray]:
    """Losses of the circuit without the first 1, 2, … edges of a stretch."""
    without, rest = [], circuit
    for edge in stretch:
        rest = rest.clone()
        rest[edge] = False
        without.append(rest)
    return {"loss": _losses(evaluate, without)}


def _losses(evaluate: Evaluate, circuits: Sequence[Circuit]) -> np.ndarray:
    found = evaluate(circuits).detach().cpu().double().numpy()
    if not np.isfinite(found).all():
        raise BadInput(
            "the loss of a circuit is NaN or infinite: check the metric and the model's weights"
        )
    return found


def _decide(
    state: _State,
    stretch: Sequence[tuple[int, int]],
    losses: np.ndarray,
    threshold: float,
    order: Sequence[tuple[int, int]],
) -> None:
    """Drop the edges of a stretch up to the first that costs too much; that one is kept."""
    state.evaluations += len(stretch)
    for edge, loss in zip(stretch, losses.tolist(), strict=True):
        state.place += 1
        state.tried += 1
        state.cost[edge] = loss - state.loss
        if loss - state.loss >= threshold:
            state.kept.append(edge)
            state.bet = FIRST_BET
            return
        state.circuit[edge] = False
        state.loss = loss
    state.bet = min(2 * state.bet, LARGEST_BET)
