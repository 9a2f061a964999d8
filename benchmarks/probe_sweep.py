"""What probes cost: all heads against a scikit-learn loop, and all layers against the capture they need.

1. Every head of the model × 5 folds on the same features of the same texts: `ridge_sweep` against
   `make_pipeline(StandardScaler(), RidgeClassifier(class_weight="balanced"))` in a loop, at one strength
   (the loop would need 13 times as many fits to choose among three). Accuracies have to be equal.
2. `linear_probes` over the residual stream of every layer, with its strength chosen inside the folds, all
   its controls and its table, against `capture_features` of what it reads: the model's activations,
   and with random weights those of a second model, drawn on the way.

The sides take turns; ratios are medians over rounds. Run: python -m benchmarks.probe_sweep
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

import interp
from interp.data.labelled import LabelledTexts, labelled_texts, of
from probes.balanced import balanced_accuracy
from probes.captured import capture_features
from probes.controls import random_weights
from probes.estimators import estimator
from probes.folds import folds_by_group
from probes.linear import linear_probes
from probes.ridge_sweep import ridge_sweep

T = TypeVar("T")
SETS = ("sentiment", "number", "tense")


def timed(do: Callable[[], T]) -> tuple[T, float]:
    """A result and its wall seconds."""
    start = time.perf_counter()
    result = do()
    return result, time.perf_counter() - start


def prompts(n: int) -> LabelledTexts:
    """n shipped texts of three sets of two classes, in turn; the label is the class within the set."""
    rows = []
    for name in SETS:
        data = labelled_texts(name)
        second = sorted(set(data.labels))[1]
        for text, label, group in zip(data.texts, data.labels, data.groups, strict=True):
            rows.append((text, int(label == second), f"{name} {group}"))
    order = np.random.default_rng(0).permutation(len(rows))[:n]
    texts, labels, groups = zip(*(rows[i] for i in order), strict=True)
    return of(texts, labels, groups, name=f"{len(texts)} texts")


def plain_loop(x: np.ndarray, y: np.ndarray, folds: np.ndarray, alpha: float) -> np.ndarray:
    """Out-of-fold predictions [sites items], one estimator a site and fold."""
    predicted = np.zeros((len(x), len(y)), dtype=np.int64)
    for site, features in enumerate(x):
        for fold in range(folds.max() + 1):
            train, test = folds != fold, folds == fold
            fitted = estimator("ridge", alpha).fit(features[train], y[train])
            predicted[site, test] = fitted.predict(features[test])
    return predicted


def against_the_loop(model: interp.Model, data: LabelledTexts, rounds: int, alpha: float) -> None:
    x = np.stack(list(capture_features(model, data, "z", progress=False).values()))
    x = x.astype(np.float64)  # both in double precision
    y = np.array([int(label) for label in data.labels])
    folds = folds_by_group(y, data.groups, 5, 0)
    ratios, seconds = [], []
    for _ in range(rounds):
        sweep, ours = timed(lambda: ridge_sweep(x, y[None], folds, alphas=[alpha]))
        loop, theirs = timed(lambda: plain_loop(x, y, folds, alpha))
        ratios.append(theirs / ours)
        seconds.append((ours, theirs))
    ours, theirs = seconds[int(np.argsort(ratios)[rounds // 2])]
    mine = [balanced_accuracy(row, y) for row in sweep.predicted[:, 0]]
    plain = [balanced_accuracy(row, y) for row in loop]
    print(
        f"{len(x)} heads x 5 folds, {len(y)} texts, width {x.shape[-1]}\n"
        f"  ridge sweep        {ours:6.2f} s\n"
        f"  scikit-learn loop  {theirs:6.2f} s   {statistics.median(ratios):.1f} x\n"
        f"  accuracies: mean {np.mean(mine):.4f} and {np.mean(plain):.4f}, largest difference "
        f"{np.abs(np.subtract(mine, plain)).max():.1e}; predictions that differ: "
        f"{int((sweep.predicted[:, 0] != loop).sum())} of {loop.size}"
    )


def against_the_capture(
    model: interp.Model, data: LabelledTexts, rounds: int, random_model: bool
) -> None:
    def capture() -> None:
        for one in (model, random_weights(model)) if random_model else (model,):
            capture_features(one, data, "resid_post", progress=False)

    ratios, seconds = [], []
    for _ in range(rounds):
        _, needed = timed(capture)
        _, whole = timed(
            lambda: linear_probes(model, data, random_model=random_model, progress=False)
        )
        ratios.append(whole / needed)
        seconds.append((needed, whole))
    needed, whole = seconds[int(np.argsort(ratios)[rounds // 2])]
    what = "with the random model" if random_model else "without the random model"
    print(
        f"all layers, {len(data)} texts, {what}\n"
        f"  capture            {needed:6.2f} s\n"
        f"  probe sweep        {whole:6.2f} s   {statistics.median(ratios):.2f} x"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alpha", type=float, default=100.0)
    parser.add_argument("--only", choices=["loop", "capture"])
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    model = interp.load(options.model)
    data = prompts(options.n)
    print(f"{model.id}, {model.dtype}, {torch.get_num_threads()} threads")
    capture_features(model, data.rows(range(32)), "resid_post", progress=False)  # warm up
    if options.only != "capture":
        against_the_loop(model, data, options.rounds, options.alpha)
    if options.only != "loop":
        for random_model in (False, True):
            against_the_capture(model, data, options.rounds, random_model)


if __name__ == "__main__":
    main()
