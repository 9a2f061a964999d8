"""One pass over each prompt set feeds every detector that reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from circuits.heads.detector import Detector, PerPrompt
from interp.data.prompts import Prompts
from interp.models.model import Model
from interp.run.resume import Checkpoint

TOKENS_PER_PASS = 1024


@dataclass(frozen=True)
class Scores:
    """A detector's result: score and null of every prompt and head [n n_layers n_heads]."""

    detector: Detector
    score: np.ndarray
    null: np.ndarray


def scan(
    model: Model,
    detectors: Sequence[Detector],
    sets: dict[str, Prompts],
    checkpoint: Checkpoint,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Scores]:
    """Every detector's scores. `sets` holds "repeated" with its control "unrepeated", and "text"."""
    seen = {
        name: _statistics_of(
            model, [d for d in detectors if name in _reads(d)], prompts, checkpoint, advance
        )
        for name, prompts in sets.items()
        if any(name in _reads(d) for d in detectors)
    }
    return [_scores(detector, seen) for detector in detectors]


def passes(detectors: Sequence[Detector], sets: dict[str, Prompts]) -> int:
    """How many prompts `scan` will run, for a progress bar."""
    return sum(
        len(prompts) for name, prompts in sets.items() if any(name in _reads(d) for d in detectors)
    )


def _reads(detector: Detector) -> tuple[str, ...]:
    return ("repeated", "unrepeated") if detector.reads == "repeated" else (detector.reads,)


def _scores(detector: Detector, seen: dict[str, dict[str, PerPrompt]]) -> Scores:
    first, *control = (
        {
            key.removeprefix(f"{detector.name}."): value
            for key, value in seen[name].items()
            if key.startswith(f"{detector.name}.")
        }
        for name in _reads(detector)
    )
    if detector.combine is None:
        score, null = first["score"], control[0]["score"]
    else:
        score, null = detector.combine(first, control[0] if control else None)
    return Scores(detector, score.numpy(), null.numpy())


def _statistics_of(
    model: Model,
    detectors: Sequence[Detector],
    prompts: Prompts,
    checkpoint: Checkpoint,
    advance: Callable[[int], None],
) -> dict[str, PerPrompt]:
    """All row statistics and measures that these detectors want of a prompt set."""
    parts: list[dict[str, np.ndarray]] = []
    for rows in _chunks(prompts):
        part = prompts.rows(rows)
        unit = partial(one_pass, model, detectors, part)
        parts.append(checkpoint.compute(f"scan.{prompts.name}.{rows.start}", unit))
        advance(len(part))
    return {
        key: torch.from_numpy(np.concatenate([part[key] for part in parts])) for key in parts[0]
    }


def _chunks(prompts: Prompts) -> Iterator[slice]:
    size = max(1, TOKENS_PER_PASS // prompts.length)
    return (slice(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size))


def one_pass(
    model: Model, detectors: Sequence[Detector], prompts: Prompts
) -> dict[str, np.ndarray]:
    wanted = {
        f"{d.name}.{key}": statistic
        for d in detectors
        if d.statistics is not None
        for key, statistic in d.statistics(prompts).items()
    }
    captures = sorted({site for d in detectors for site in d.captures(model)})
    run = model.run(prompts.batch, capture=captures, statistics=wanted or None, logits=False)
    measured = {
        f"{d.name}.score": d.measure(model, prompts, run)
        for d in detectors
        if d.measure is not None
    }
    return {key: value.numpy() for key, value in (run.statistics | measured).items()}
