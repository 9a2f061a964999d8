"""When induction appears over several trainings: free, with parts of the circuit given, with one layer.

For every seed and training: the interval and the step of the earliest induction onset, the two checkpoints
between which accuracy on repeats jumps, whether the interval contains them, and the step over that
of the free training.

    python -m benchmarks.emergence --seeds 3
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from circuits.emergence.analysis import emergence
from circuits.emergence.training import train_series

KINDS = {
    "free": {},
    "previous-token head given": {"clamps": ["pattern.0.0=previous_token"]},
    "induction head given": {"clamps": ["pattern.1.0=induction"]},
    "both given": {"clamps": ["pattern.0.0=previous_token", "pattern.1.0=induction"]},
    "layer 0 kept uniform": {"clamps": ["pattern.0=uniform"]},
    "one layer": {"layers": 1},
}


def one_seed(seed: int, steps: int, kinds: list[str]) -> None:
    with tempfile.TemporaryDirectory() as home:
        folders = {}
        started = time.perf_counter()
        for i, kind in enumerate(kinds):
            folders[f"{i}"] = train_series(
                Path(home) / f"{i}", steps=steps, seed=seed, progress=False, **KINDS[kind]
            )
        trained = time.perf_counter()
        report = emergence([str(folder) for folder in folders.values()], progress=False)
        measured = time.perf_counter()
    onsets, curves = report.tables["onsets"], report.tables["curves"]
    free = None
    for i, kind in enumerate(kinds):
        mine = onsets[(onsets["series"] == f"{i}") & onsets["step"].notna()]
        curve = curves[curves["series"] == f"{i}"]
        at = int(np.diff(curve["accuracy"]).argmax())
        jump = curve["step"].iloc[[at, at + 1]].tolist()
        final = curve["accuracy"].iloc[-1]
        for quantity in ("induction", "accuracy"):
            found = mine[mine["quantity"] == quantity].sort_values("step")
            told = f"seed {seed}  {kind:26} {quantity:10}"
            if not len(found):
                print(f"{told} no onset (accuracy on repeats at the end {final:.2f})")
                continue
            first = found.iloc[0]
            if quantity == "accuracy":
                free = first["step"] if free is None else free
            inside = first["low"] <= jump[0] and jump[1] <= first["high"]
            ratio = f", {first['step'] / free:.2f} x free" if quantity == "accuracy" else ""
            print(
                f"{told} step {first['step']:5.0f} ({first['low']:.0f} to {first['high']:.0f}); accuracy "
                f"jumps {jump[0]} to {jump[1]}: {'inside' if inside else 'OUTSIDE'}{ratio}"
            )
    print(
        f"seed {seed}  {len(kinds)} trainings of {steps} steps {trained - started:.1f} s, "
        f"{len(curves)} checkpoints measured {measured - trained:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--steps", type=int, default=304)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    given = parser.parse_args()
    torch.set_num_threads(1)  # of so small a model, threads would wait for each other
    for seed in range(given.first, given.first + given.seeds):
        one_seed(seed, given.steps, given.kinds)


if __name__ == "__main__":
    main()
