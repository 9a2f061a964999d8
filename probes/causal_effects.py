"""What an intervention along a direction does beside random ones, and how well the direction tells classes apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from interp.data.labelled import LabelledTexts
from interp.resampling import INTERVAL, draw_counts
from probes.controls import shuffled_labels
from probes.directions import Bench, Direction, Vectors, direction_of

SHUFFLES = 5
BOOTSTRAP = 1000


def told_apart(
    direction: Direction,
    name: str,
    x: Vectors,
    seen: Vectors,
    texts: LabelledTexts,
    y: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    seed: int,
) -> dict[str, float]:
    """How well the direction tells the classes apart on new items, and what shuffled labels give."""

    def accuracy(found: Direction, labels: np.ndarray) -> float:
        score = found.eraser.removed(torch.as_tensor(seen)).numpy() @ found.step
        return float(((score > 0) == labels).mean())

    shuffled = [shuffled_labels(y, texts.groups, seed + i) for i in range(SHUFFLES)]
    drawn = [
        accuracy(direction_of(x, labels[train], name), labels[test])
        for labels in shuffled
        if 0 < labels[train].sum() < len(train)
    ]
    share = float(y[test].mean())
    return {
        "accuracy": accuracy(direction, y[test]),
        "shuffled_accuracy": float(np.mean(drawn)) if drawn else float("nan"),
        "majority": max(share, 1 - share),
        "class_distance": float(np.linalg.norm(direction.step)),
    }


def effect_row(
    kind: str,
    effects: Float[np.ndarray, "changes items 2"],
    leaks: Float[np.ndarray, " changes"],
    bench: Bench,
    second: np.ndarray,
    groups: Sequence[str],
    seed: int,
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """An intervention's row, and what each random direction did; the found direction comes first."""
    clean = bench.odds(bench.run).cpu().double().numpy()
    divergence = effects[..., 1].mean(1)
    if bench.words is None:
        values, gap, before, unit = effects[..., 1], False, 0.0, "nats"
    else:
        gap = kind != "add"
        values, unit = effects[..., 0] - clean, "logits"
        before = float(_weights(np.ones(len(clean)), second, gap) @ clean)
    mine, *others = (values @ _weights(np.ones(len(clean)), second, gap)).tolist()
    resampled = _weights(_resampling(groups, seed), second, gap) @ values[0]
    low, high = np.nanquantile(resampled, INTERVAL)
    random_low, random_high = np.quantile(others, INTERVAL)
    as_large = sum(abs(other) >= abs(mine) for other in others)
    row = {
        "effect": mine,
        "low": float(low),
        "high": float(high),
        "random": float(np.mean(others)),
        "random_low": float(random_low),
        "random_high": float(random_high),
        "p": (1 + as_large) / (1 + len(others)),
        "clean": before,
        "unit": unit,
        "kl": float(divergence[0]),
        "random_kl": float(divergence[1:].mean()),
        "off_target_kl": float(leaks[0]),
        "random_off_target_kl": float(leaks[1:].mean()),
    }
    drawn = [
        {"effect": effect, "kl": float(on), "off_target_kl": float(off)}
        for effect, on, off in zip(others, divergence[1:], leaks[1:], strict=True)
    ]
    return row, drawn


def _weights(
    counts: Float[np.ndarray, "*draws items"], second: np.ndarray, gap: bool
) -> Float[np.ndarray, "*draws items"]:
    """What items are weighed with: for their mean, or for class 2's mean minus class 1's.

    A draw without items of a class has no gap: NaN.
    """
    if not gap:
        return counts / counts.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        of_second, of_first = counts * second, counts * ~second
        return of_second / of_second.sum(-1, keepdims=True) - of_first / of_first.sum(
            -1, keepdims=True
        )


def _resampling(groups: Sequence[str], seed: int) -> Float[np.ndarray, "draws items"]:
    """How often each item is drawn when groups are drawn with replacement."""
    names, of_item = np.unique(np.asarray(groups), return_inverse=True)
    return draw_counts(len(names), BOOTSTRAP, seed)[:, of_item].astype(float)
