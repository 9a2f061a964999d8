"""The two engines of edge scores and edge circuits on a task: the fast one, and the plain one it is held to.

The plain one serves `naive=True`, and models whose readers of the residual stream cannot be told apart:
a forward and a backward a receiver, and a forward a receiver for every circuit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.edge_replay import ABLATIONS, EdgeReplay
from circuits.edge_scores import PLAIN, check_method, n_units, score_edges
from circuits.edges_plain import plain_circuit_logits, plain_edge_scores, plain_state
from circuits.graph import Circuit, Graph, Scores
from circuits.heads_alone import require_heads_alone
from circuits.measure import Measure, measure
from circuits.passes import Parts, Task, task_of
from interp.data.pairs import Pairs
from interp.errors import Refused, unknown
from interp.models.model import Model
from interp.run.resume import Checkpoint


@dataclass(frozen=True)
class FastJob:
    """A task on the fast engine."""

    task: Task

    @property
    def graph(self) -> Graph:
        return self.task.parts.graph

    @property
    def measure(self) -> Measure:
        return self.task.measure

    def n_units(self, method: str) -> int:
        """How many portions `scores` tells of."""
        return n_units(self.task, method)

    def scores(
        self,
        method: str,
        *,
        steps: int = 5,
        units: Checkpoint | None = None,
        advance: Callable[[int], None] = lambda done: None,
    ) -> Scores:
        """As `score_edges`."""
        return score_edges(self.task, method, steps=steps, units=units, advance=advance)

    def replay(self, ablation: str = "resample") -> EdgeReplay:
        """What runs circuits of the task."""
        return EdgeReplay(self.task, ablation)


@dataclass(frozen=True)
class PlainJob:
    """A task on the plain engine."""

    model: Model
    graph: Graph
    measure: Measure

    def n_units(self, method: str) -> int:
        """How many receivers `scores` tells of."""
        return self.graph.shape[1]

    def scores(
        self,
        method: str,
        *,
        steps: int = 5,
        units: Checkpoint | None = None,
        advance: Callable[[int], None] = lambda done: None,
    ) -> Scores:
        """As `score_edges`, for the methods that the plain engine has; one receiver a unit."""
        check_method(method, steps, naive=True)
        alphas = [1.0] if method == "eap" else [step / steps for step in range(steps)]
        pairs, scores = self.measure.pairs, torch.zeros(self.graph.shape)
        units = Checkpoint() if units is None else units
        for column, receiver in enumerate(self.graph.receivers):

            def unit(column: int = column) -> dict[str, np.ndarray]:
                found = plain_edge_scores(
                    self.model,
                    self.graph,
                    self.model.as_batch(pairs.clean_batch),
                    self.model.as_batch(pairs.corrupted_batch),
                    self.measure,
                    alphas=alphas,
                    receivers=[column],
                )
                return {"scores": found[:, column].numpy()}

            scores[:, column] = torch.from_numpy(units.compute(receiver.name, unit)["scores"])
            advance(1)
        return scores

    def replay(self, ablation: str = "resample") -> PlainCircuits:
        """What runs circuits of the task."""
        return PlainCircuits(self, ablation)


class PlainCircuits:
    """Logits of circuits of one task in full forwards; the same as `EdgeReplay`, which says what they are."""

    def __init__(self, job: PlainJob, ablation: str):
        if ablation not in ABLATIONS:
            raise unknown("ablation", ablation, ABLATIONS)
        self.job, self.ablation = job, ablation
        self.graph, self.measure = job.graph, job.measure
        pairs = job.measure.pairs
        self.clean = job.model.as_batch(pairs.clean_batch)
        with torch.no_grad():
            self.other = plain_state(
                job.model, job.graph, job.model.as_batch(pairs.corrupted_batch), ablation
            )

    @torch.no_grad()
    def logits(self, circuits: Sequence[Circuit]) -> Float[Tensor, "circuits n d_vocab"]:
        """Logits at the last position with only each circuit's edges clean."""
        for circuit in circuits:
            self.graph.check(circuit)
        return torch.stack(
            [
                plain_circuit_logits(self.job.model, self.graph, circuit, self.clean, self.other)
                for circuit in circuits
            ]
        )

    def values(self, circuits: Sequence[Circuit]) -> Float[Tensor, "circuits n"]:
        """The task's metric of every circuit and pair, raw."""
        return torch.stack([self.measure(logits) for logits in self.logits(circuits)])


Job = FastJob | PlainJob
Replay = EdgeReplay | PlainCircuits


def engine(
    model: Model, method: str | None, *, naive: bool = False
) -> tuple[Callable[[Pairs, str], Job], list[str]]:
    """(what makes a job of pairs and a metric, notes for the reader).

    Args:
        method: of the scores that will be wanted; None where none are.
        naive: the plain engine even where the fast one can do the work.

    Raises:
        BadInput: the plain engine is asked for a method that it lacks. Refused: the residual stream is
        not a sum of known writes, or attention reads it by more than q, k and v; or the fast engine is
        refused and the plain one lacks the method.

    >>> job, notes = engine(tiny_model(), "eap", naive=True)
    >>> pairs = Pairs.of([[5, 6, 7]], [[5, 9, 7]], answers=[3], wrong=[4])
    >>> plain, fast = job(pairs, "logit_diff"), engine(tiny_model(), "eap")[0](pairs, "logit_diff")
    >>> bool((plain.scores("eap") - fast.scores("eap")).abs().max() < 1e-4)
    True
    """
    notes = []
    if naive and method is not None:
        check_method(method, 1, naive=True)
    graph = Graph.of(model)
    require_heads_alone(model, "edges")
    if not naive:
        try:
            parts = Parts.of(model)
        except Refused as refusal:
            if method is not None and method not in PLAIN:
                raise
            notes.append(f"the plain engine was used: {refusal}")
        else:
            fast = _tried(model, lambda pairs, metric: FastJob(task_of(parts, pairs, metric)))
            return fast, [*parts.notes]

    def plain(pairs: Pairs, metric: str) -> PlainJob:
        return PlainJob(model, graph, measure(model, pairs, metric))

    return _tried(model, plain), notes


def _tried(model: Model, job: Callable[[Pairs, str], Job]) -> Callable[[Pairs, str], Job]:
    """The same, refused of prompts on which attention reads the stream by more than it did on the probe."""

    def tried(pairs: Pairs, metric: str) -> Job:
        require_heads_alone(model, "edges", pairs)
        return job(pairs, metric)

    return tried
