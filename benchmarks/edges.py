"""Edge scores and edge circuits in plain forwards, beside the plain way.

F is one plain Hugging Face forward of the same batch, unembedding of all positions included. "Plain" is
EAP-IG as it is usually written: q, k and v of every query head read a full-width copy of the residual
stream of their own, every head's write is formed at full width, one backward gives the gradients at all
copies, and each step's scores are contracted by themselves. It finds the same numbers (printed).

Times are the best of several rounds in which the sides take turns, so that other work on the machine
counts least; memory is the peak resident size of a process of its own, less that of a process that only
loads the model and runs one forward. Run: python -m benchmarks.edges
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import interp
from benchmarks.memory import peak_mb
from circuits.edge_gradients import Gradients
from circuits.edge_replay import EdgeReplay, Other, _Run
from circuits.edge_scores import input_scores
from circuits.graph import Scores
from circuits.passes import Parts, Task, run_pass, task_of
from circuits.reads import float_input, with_float_input
from circuits.stream import frozen
from circuits.tasks import as_pairs
from interp.models.model import Model
from interp.run.edits import Edit

STEPS = 5


class CopiedStream(_Run):
    """A pass in which every receiver reads a copy of the stream, all copies in the graph."""

    def __init__(self, parts: Parts, other: Other, embed: Tensor):
        super().__init__(parts, other, [parts.graph.whole])
        self.embed = embed
        self.copies: dict[int, Tensor] = {}
        self.mlp_copies: dict[int, Tensor] = {}

    def enter_block(self, layer: int, call: tuple[tuple, dict]) -> None:
        x = call[0][0] if call[0] else call[1]["hidden_states"]
        x = x if layer else self.embed  # this hook comes before the edit of the embedding
        n_heads = self.other.writes.z[layer].shape[2]
        copies = x.expand(3 * n_heads, *x.shape).clone()
        self.copies[layer] = copies
        self.heads[layer] = self._split(layer, call, copies.unflatten(0, (1, 3, n_heads)))

    def leave_heads(self, layer: int, z: Tensor, attn_out: Tensor | None = None) -> None:
        self.parts.writers[layer].parts(z)  # every head's write at full width

    def leave_mlp(self, layer: int, written: Tensor) -> None:
        pass

    def _at_mlp(self, layer: int):
        def hook(module: Any, args: tuple, kwargs: dict) -> Any:
            value = float_input(args, kwargs)
            assert value is not None
            self.mlp_copies[layer] = value.clone()
            return with_float_input(args, kwargs, self.mlp_copies[layer])

        return hook

    def _at_end(self, module: Any, args: tuple, output: Any) -> Any:
        return None


def plain_scores(task: Task, steps: int) -> Scores:
    """EAP-IG with a copy of the residual stream for every receiver; Σ over pairs."""
    parts, total = task.parts, torch.zeros(task.parts.graph.shape)
    for side in task.sides:
        difference = side.corrupted.less(side.clean, parts.graph, parts.writers).flatten(1)
        start, end = side.corrupted.embed, side.clean.embed
        for step in range(steps):
            at = (start + step / steps * (end - start)).requires_grad_()
            run = CopiedStream(parts, Other(side.pairs, end, side.corrupted, {}), at)
            last = f"resid_post.{parts.model.n_layers - 1}"
            with frozen(parts.model.module), run.hooked():
                seen = parts.model.run(
                    side.pairs.clean_batch,
                    capture=[last],
                    edits=[Edit.patch("embed", at)],
                    logits=torch.tensor([side.pairs.end]),
                    grad=True,
                )
            assert seen.logits is not None
            value = task.metric(side, seen.logits[:, -1].float()).sum()
            layers = list(run.copies)
            mlps = list(run.mlp_copies)
            targets = [*run.copies.values(), *run.mlp_copies.values(), seen.cache[last]]
            grads = torch.autograd.grad(value, targets)
            for layer, grad in zip(layers, grads, strict=False):
                first = parts.graph.columns(layer).start
                scores = difference @ grad.flatten(1).T
                total[:, first : first + len(grad)] += scores / steps
            for layer, grad in zip(mlps, grads[len(layers) :], strict=False):
                column = parts.graph.columns(layer).stop - 1
                total[:, column] += difference @ grad.flatten() / steps
            total[:, -1] += difference @ grads[-1].flatten() / steps
    return total * parts.graph.allowed


def fast_scores(task: Task, steps: int) -> Scores:
    """The same by `circuits.edge_scores`."""
    total = torch.zeros(task.parts.graph.shape)
    for side in task.sides:
        total += input_scores(task, side, steps=steps)
    return total


def setup(name: str, n: int) -> tuple[Model, Any]:
    """The model and IOI pairs on it."""
    model = interp.load(name)
    return model, as_pairs(model, "ioi", n=n)


def forward(model: Model, ids: Tensor) -> None:
    """One plain forward."""
    with torch.no_grad():
        model.module(input_ids=ids, use_cache=False)


def peak_of(arguments: argparse.Namespace, what: str) -> float:
    """Peak resident size of a process that does one thing."""
    command = [sys.executable, "-m", "benchmarks.edges", "--only", what]
    command += ["--model", arguments.model, "--pairs", str(arguments.pairs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def only(arguments: argparse.Namespace) -> None:
    """Do one thing and print the peak resident size in MB."""
    model, pairs = setup(arguments.model, arguments.pairs)
    forward(model, pairs.clean)
    if arguments.only != "forward":
        task = task_of(Parts.of(model), pairs)
        if arguments.only == "replay":
            EdgeReplay(task).values([task.parts.graph.whole])
        else:
            (plain_scores if arguments.only == "plain" else fast_scores)(task, STEPS)
    print(peak_mb())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        only(arguments)
        return
    torch.set_num_threads(2)
    model, pairs = setup(arguments.model, arguments.pairs)
    parts = Parts.of(model)
    task = task_of(parts, pairs)
    graph, replay = parts.graph, EdgeReplay(task)
    small = graph.prune(graph.top_edges(graph.random_scores(), graph.n_edges // 20))
    found: dict[str, Any] = {}

    def keep(name: str, do: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            found[name] = do()

        return run

    def one_pass() -> None:
        Gradients(parts).add(
            run_pass(parts, task.sides[0].pairs.clean_batch, grad=True),
            lambda logits: task.metric(task.sides[0], logits),
        )

    sides: dict[str, Callable[[], None]] = {
        "F": lambda: forward(model, pairs.clean),
        "the parts of the model (once)": keep("parts", lambda: Parts.of(model)),
        "both sides' writes and the metric's ends": keep("task", lambda: task_of(parts, pairs)),
        "one forward and backward, gradients of all receivers": one_pass,
        f"EAP-IG, {STEPS} steps, all edges": keep("fast", lambda: fast_scores(task, STEPS)),
        f"EAP-IG, {STEPS} steps, the plain way": keep("plain", lambda: plain_scores(task, STEPS)),
        "one edge circuit, all edges": keep("whole", lambda: replay.values([graph.whole])),
        "one edge circuit, 5 % of edges at random": keep("small", lambda: replay.values([small])),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, do in sides.items():
            start = time.perf_counter()
            do()
            times[name].append(time.perf_counter() - start)
    best = {name: min(values) for name, values in times.items()}
    n, length = pairs.clean.shape
    print(
        f"{model.id}: {n} pairs of {length} tokens, {graph.n_edges:,} edges; F = {best['F']:.3f} s"
    )
    for name, seconds in best.items():
        print(f"{seconds / best['F']:8.2f} F  {name}")
    ig = (
        best["both sides' writes and the metric's ends"] + best[f"EAP-IG, {STEPS} steps, all edges"]
    )
    print(f"{ig / best['F']:8.2f} F  EAP-IG with both sides' writes (wanted: at most 15)")
    off = float((found["fast"] - found["plain"]).abs().max() / found["plain"].abs().max())
    print(f"largest difference from the plain way: {off:.1e} of the largest score")
    print(f"a circuit by one forward a receiver: {graph.shape[1]} F and more")
    if not arguments.no_memory:
        start = peak_of(arguments, "forward")
        fast, plain, evaluated = (peak_of(arguments, what) for what in ("fast", "plain", "replay"))
        print(
            f"peak memory: a forward {start:.0f} MB, EAP-IG {fast:.0f}, plain {plain:.0f}, circuit {evaluated:.0f}"
        )
        print(
            f"EAP-IG uses {fast / plain:.0%} of the plain way, {(fast - start) / (plain - start):.0%} of its extra"
        )


if __name__ == "__main__":
    main()
