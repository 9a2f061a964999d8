"""What claims about heads cost, and how far they can be trusted, on the default model.

speed: every fast detector beside the plain forwards over its prompts; exact ablation of every head by
replay beside a loop of full forwards, with the largest difference of the two; Shapley values until every
standard error is under 0.05 of the largest value, in exact ablation sweeps.

labels: agreement of labels over three seeds; labels on the same architecture with random weights, every
detector on, as a share of all heads × roles.

    python -m benchmarks.heads speed
    python -m benchmarks.heads labels
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

import circuits
import interp
from benchmarks.capture import medians
from circuits.heads.ablation import ablation_effects
from circuits.heads.detector import choose
from circuits.heads.scan import prompt_sets, scan
from circuits.heads.shapley import shapley_values
from circuits.heads.usable import usable
from interp.data.prompts import Prompts, repeated_tokens
from interp.metrics import loss
from interp.models.model import Model
from interp.run.edits import Edit
from interp.run.resume import Checkpoint
from probes.controls import random_weights


@torch.no_grad()
def plain(model: Model, prompts: Prompts) -> None:
    """A Hugging Face forward of every prompt, 8 at a time."""
    for start in range(0, len(prompts), 8):
        model.module(input_ids=prompts.ids[start : start + 8], use_cache=False)


def fast_detectors(model: Model, n: int, repeats: int) -> None:
    detectors, _ = usable(model, choose(["fast"]))
    sets = prompt_sets(model, detectors, n, 0)
    every = [prompts for both in sets.values() for prompts in both if prompts is not None]

    def all_fast() -> None:
        scan(model, detectors, sets, n, 0, Checkpoint())

    def forwards() -> None:
        for prompts in every:
            plain(model, prompts)

    seconds = medians({"detectors": all_fast, "forwards": forwards}, repeats)
    print(
        f"{len(detectors)} fast detectors: {seconds['detectors'] / seconds['forwards']:.2f} x the plain "
        f"forwards over their {sum(map(len, every))} prompts"
    )


def exact_ablation(model: Model) -> None:
    """Replay beside a loop of full forwards: one head each, the same loss."""
    prompts, _ = repeated_tokens(model, 4)
    targets = prompts.ids[:, prompts.judged + 1]
    heads = model.spec.heads

    def loop(some) -> np.ndarray:
        clean = loss(model.run(prompts.batch, logits=prompts.judged).logits, targets)
        out = []
        for head in some:
            edit = Edit.mean("z", heads=[head])
            run = model.run(prompts.batch, edits=[edit], logits=prompts.judged)
            out.append((loss(run.logits, targets) - clean).numpy())
        return np.stack(out)

    start = time.perf_counter()
    replayed = ablation_effects(model, prompts, heads)
    middle = time.perf_counter()
    looped = loop(heads)
    end = time.perf_counter()
    print(
        f"exact ablation of {len(heads)} heads, {len(prompts)} prompts: {middle - start:.0f} s by replay, "
        f"{end - middle:.0f} s in a loop of forwards, {(end - middle) / (middle - start):.1f} x; largest "
        f"difference {np.abs(replayed - looped).max():.1e} nats"
    )


def shapley(model: Model) -> None:
    report = shapley_values(model, progress=False)
    table, game = report.table, report.meta["game"]
    share = table["error"].max() / table["value"].abs().max()
    print(f"Shapley: largest standard error {share:.3f} of the largest value; {game}")


def stability(model: Model) -> None:
    report = circuits.classify_heads(
        model, detectors=["fast"], seeds=3, ablate=False, evidence=0, progress=False
    )
    print(f"labels over three seeds, fast detectors: {report.meta['stability']}")


def false_labels(model: Model, seeds: int) -> None:
    for seed in range(seeds):
        report = circuits.classify_heads(
            random_weights(model, seed),
            detectors=["all"],
            prompts=16,
            ablate=False,
            evidence=0,
            progress=False,
        )
        labels = [name for text in report.table["labels"] for name in text.split(",") if name]
        roles = sum(bool(detector["labels"]) for detector in report.meta["detectors"])
        pairs = roles * len(report.table)
        print(
            f"random weights, seed {seed}: {len(labels)} labels in {pairs} heads x roles "
            f"({len(labels) / pairs:.2%}): {dict(zip(*np.unique(labels, return_counts=True), strict=True))}; "
            f"skipped: {report.meta['skipped']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("speed", "labels"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1, help="draws of random weights")
    options = parser.parse_args()
    model = interp.load(options.model)
    if options.what == "speed":
        fast_detectors(model, options.prompts, options.repeats)
        exact_ablation(model)
        shapley(model)
    else:
        stability(model)
        false_labels(model, options.seeds)


if __name__ == "__main__":
    main()
