"""What patching every head costs, in units F of one plain forward of the same batch.

F is Hugging Face's own forward with all logits, measured between the other pieces. The exact sweep and
the screen are whole calls of `patch`, both runs of the task and the report included. The plain loop is
measured on heads spread over the layers, and multiplied. Run: python -m benchmarks.patching
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import pandas as pd
import torch

import interp
from circuits.patch_sweep import Place, Sweep
from circuits.patching import patch
from circuits.tasks import as_pairs
from interp.models.model import Model
from interp.run.resume import Checkpoint

T = TypeVar("T")
TOP = 20


def timed(do: Callable[[], T]) -> tuple[T, float]:
    """A result and its wall seconds."""
    start = time.perf_counter()
    result = do()
    return result, time.perf_counter() - start


def top(table: pd.DataFrame) -> set[tuple[int, int]]:
    """The heads with the largest effects."""
    order = np.argsort(-table["effect"].abs().to_numpy(), kind="stable")[:TOP]
    return set(
        zip(table.loc[order, "layer"].tolist(), table.loc[order, "head"].tolist(), strict=True)
    )


def plain_loop(model: Model, pairs, direction: str, sample: int) -> tuple[float, int]:
    """(seconds for all heads, heads measured): full forwards, one head each."""
    sweep = Sweep.of(model, pairs, "z", direction, "patch", "logit_diff", ["all"], 0, True)
    heads = model.spec.heads
    step = max(1, len(heads) // sample)
    chosen = heads[step // 2 :: step][:sample]
    places = [Place(layer, head, "all") for layer, head in chosen]
    _, seconds = timed(lambda: sweep.exact(places, Checkpoint(), lambda done: None))
    return seconds * len(heads) / len(places), len(places)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=["ioi"])
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--direction", default="denoise")
    parser.add_argument("--sample", type=int, default=9, help="heads of the plain loop")
    parser.add_argument("--no-exact", action="store_true", help="leave out the exact sweep")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    model = interp.load(options.model)
    print(f"{model.id}, {model.dtype}, {torch.get_num_threads()} threads, {options.direction}")
    for task in options.tasks:
        pairs = as_pairs(model, task, n=options.pairs)
        forwards: list[float] = []

        @torch.no_grad()
        def measure_forward(pairs=pairs, forwards=forwards) -> None:
            for _ in range(3):
                _, seconds = timed(
                    lambda: model.module(input_ids=pairs.clean.to(model.device), use_cache=False)
                )
                forwards.append(seconds)

        def swept(screen: bool, pairs=pairs):
            measure_forward()
            return timed(
                lambda: patch(
                    model, pairs, direction=options.direction, screen=screen, progress=False
                )
            )

        measure_forward()
        forwards.clear()  # the first ones warm up
        screened, screen_s = swept(True)
        plain_s, sample = plain_loop(model, pairs, options.direction, options.sample)
        exact, exact_s = (None, 0.0) if options.no_exact else swept(False)
        measure_forward()
        F = statistics.median(forwards)
        table = screened.table
        print(
            f"{task}: {len(pairs)} pairs of {pairs.length} tokens, F = {F:.2f} s\n"
            f"  screen      {screen_s / F:6.1f} F, {table['exact'].to_numpy().sum()} of {len(table)} heads exact\n"
            f"  plain loop  {plain_s / F:6.1f} F (from {sample} of {len(table)} heads)"
        )
        if exact is not None:
            same = len(top(table) & top(exact.table))
            print(f"  exact sweep {exact_s / F:6.1f} F; the screen has {same} of its top {TOP}")


if __name__ == "__main__":
    main()
