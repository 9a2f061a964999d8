"""What finding a circuit costs, in plain forwards of the same pairs (F).

CD-T: every head and MLP of the last layers taken apart by itself, beside as many plain forwards. ACDC: the
same edges pruned on bets (many circuits in one forward) and one by one, in turns in one process; both find
the same circuit, which is checked.
Run: python benchmarks/discovery.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import interp
from circuits import discovery
from circuits.contextual import Decomposition
from circuits.discovery import acdc, top_circuit
from circuits.edge_replay import EdgeReplay
from circuits.edge_scores import input_scores
from circuits.passes import Parts, task_of
from circuits.tasks import as_pairs


def seconds(do: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    do()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="ioi")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--edges", type=int, default=60, help="that ACDC starts from")
    parser.add_argument("--threshold", type=float, default=0.02)
    parser.add_argument("--layers", type=int, default=4, help="whose nodes CD-T takes apart")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = interp.load(options.model)
    pairs = as_pairs(model, options.task, n=options.pairs)
    model.run(pairs.clean_batch)
    plain = statistics.median(
        seconds(lambda: model.run(pairs.clean_batch)) for _ in range(options.repeats)
    )
    print(
        f"{model.id}, {options.task}, {len(pairs)} pairs of {pairs.length} tokens, F = {plain:.3f} s"
    )

    whole = Decomposition(model, pairs)
    first = model.n_layers - options.layers
    nodes = [name for name in whole.nodes if int(name.split(".")[name.startswith("mlp")]) >= first]
    taken = statistics.median(
        seconds(lambda: whole.relevance(nodes)) for _ in range(options.repeats)
    )
    print(f"CD-T: {len(nodes)} nodes of the last {options.layers} layers in {taken / plain:.1f} F")

    task = task_of(Parts.of(model), pairs)
    graph, replay = task.parts.graph, EdgeReplay(task)
    scores = torch.zeros(graph.shape)
    ig = seconds(lambda: [scores.add_(input_scores(task, side, steps=5)) for side in task.sides])
    print(f"EAP-IG, 5 steps: {graph.n_edges} edges in {ig / plain:.1f} F (both sides run before)")
    start = top_circuit(graph, scores, options.edges)
    found = {}

    def prune(bet: int) -> None:
        before = discovery.FIRST_BET, discovery.LARGEST_BET
        discovery.FIRST_BET = discovery.LARGEST_BET = bet
        try:
            losses = lambda circuits: -replay.values(circuits).mean(-1)  # noqa: E731
            found[bet] = acdc(graph, losses, options.threshold, start=start)
        finally:
            discovery.FIRST_BET, discovery.LARGEST_BET = before

    times: dict[int, list[float]] = {1: [], 4: [], 16: []}
    for _ in range(options.repeats):
        for bet, taken_by in times.items():
            taken_by.append(seconds(lambda bet=bet: prune(bet)))
    for bet, taken_by in times.items():
        result = found[bet]
        assert torch.equal(result.circuit, found[1].circuit)
        print(
            f"ACDC, bets of {bet}: {int(start.sum())} edges, {result.evaluations} circuits evaluated, "
            f"{statistics.median(taken_by) / plain:.1f} F"
        )


if __name__ == "__main__":
    main()
