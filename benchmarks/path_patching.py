"""What path patching costs, in units F of one plain Hugging Face forward over the same pairs.

Every job runs end to end, the trial of the engine included. What any path needs, the two cached runs,
and what any report needs, the hash of the weights, are timed by themselves: the bounds are for the
paths, so the part beyond these is told too. F is timed around each job; every time is the best of
several, so that other work on the machine counts least. The plain way is two forwards a path: one to
record the receiver's input, one to read the metric.
Run: python -m benchmarks.path_patching
"""

from __future__ import annotations

import argparse
import time

import torch

import interp
from circuits.path_patching import both_runs, path_patch
from circuits.tasks import as_pairs
from interp.data.pairs import Pairs
from interp.models.load import weights_sha256
from interp.models.model import Model

JOBS = {
    "heads → logits": ({}, 7.0),
    "heads → logits, MLPs frozen": ({"mlps": "frozen"}, 0.1),
    "heads → one q at the end": ({"receiver": "23.0.q", "positions": "end"}, 8.0),
    "every q, k, v: screen and 50 exact": ({"receiver": "all", "confirm": 50}, 60.0),
}
"""Options of `path_patch`, and the bound in F that each job should stay under."""


@torch.no_grad()
def plain_seconds(model: Model, pairs: Pairs) -> float:
    """One plain forward, logits of all positions included."""
    start = time.perf_counter()
    model.module(input_ids=pairs.clean, use_cache=False)
    return time.perf_counter() - start


def fixed_seconds(model: Model, pairs: Pairs) -> tuple[float, float]:
    """The clean and the corrupted run that every path needs; the hash of the weights in every report."""
    start = time.perf_counter()
    both_runs(model, pairs, "logit_diff", [])
    between = time.perf_counter()
    weights_sha256(model.module)
    return between - start, time.perf_counter() - between


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--jobs", nargs="*", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--repeat", type=int, default=3, help="times that each job is run")
    options = parser.parse_args()
    model = interp.load(options.model)
    pairs = as_pairs(model, "ioi", n=options.pairs)
    path_patch(model, pairs, senders="0.0", progress=False)  # warm-up
    print(f"{model.id}, {len(pairs)} pairs of {pairs.length} tokens")
    for name in options.jobs:
        arguments, bound = JOBS[name]
        forwards, jobs, runs, hashes = [], [], [], []
        for _ in range(options.repeat):
            forwards += [plain_seconds(model, pairs) for _ in range(2)]
            start = time.perf_counter()
            report = path_patch(model, pairs, progress=False, **arguments)
            jobs.append(time.perf_counter() - start)
            for kept, seconds in zip((runs, hashes), fixed_seconds(model, pairs), strict=True):
                kept.append(seconds)
        F, job, run, read = (min(x) for x in (forwards, jobs, runs, hashes))
        counted = report.meta["forwards"]
        print(
            f"{name:36} {(job - run - read) / F:6.2f} F (bound {bound:g}) beside the two cached runs "
            f"{run / F:.2f} F and the hash {read / F:.2f} F; {counted['ours']:.1f} F of work with the runs; "
            f"the plain way {counted['plain']:,} F; F = {F:.2f} s"
        )


if __name__ == "__main__":
    main()
