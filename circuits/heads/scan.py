"""One pass over each prompt set feeds every detector that reads it; the others observe by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.heads.detector import Detector, PerPrompt
from circuits.heads.prompt_sets import TOKENS
from circuits.heads.streamed import Stream, Streamed
from interp.data.images import Images
from interp.data.prompts import Prompts
from interp.metrics import loss
from interp.models.model import Model
from interp.run.cache import Run
from interp.run.resume import Checkpoint
from interp.run.statistics import Statistic

TOKENS_PER_PASS = 1024

Sets = Mapping[str, tuple[Prompts | Images, Prompts | Images | None]]
"""Prompts and their control by the name of the prompt set."""


@dataclass(frozen=True)
class Scores:
    """A detector's result: score and null of every prompt and head [n n_layers n_heads].

    `seen` is everything that an observing detector returned.
    """

    detector: Detector
    score: np.ndarray
    null: np.ndarray
    seen: Mapping[str, np.ndarray] = field(default_factory=dict)


def prompt_sets(
    model: Model,
    detectors: Sequence[Detector],
    n: int,
    seed: int,
    tokens: int = TOKENS,
    given: Sets | None = None,
) -> Sets:
    """The prompts that these detectors read, of `tokens` tokens after the lead where there is room.

    A set that is `given` by name is taken as it is.
    """
    wanted = {d.reads.name: d.reads for d in detectors if d.reads is not None}
    given = given or {}
    return {
        name: given[name] if name in given else prompt_set.make(model, n, seed, tokens)
        for name, prompt_set in wanted.items()
    }


def scan(
    model: Model,
    detectors: Sequence[Detector],
    sets: Sets,
    n: int,
    seed: int,
    checkpoint: Checkpoint,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Scores]:
    """Every detector's scores; `n` and `seed` go to detectors that observe by themselves."""
    seen: dict[str, list[dict[str, PerPrompt]]] = {}
    for name, both in sets.items():
        mine = [d for d in detectors if d.reads and d.reads.name == name]
        seen[name] = [
            _statistics_of(model, mine, prompts, checkpoint, advance)
            for prompts in both
            if prompts is not None
        ]
    found, observed = [], {}
    for detector in detectors:
        if detector.reads is not None:
            found.append(_scores(detector, seen[detector.reads.name]))
        elif (observe := detector.observe) is not None:
            if observe not in observed:
                unit = partial(observe, model, n, seed)
                observed[observe] = checkpoint.compute(f"observe.{detector.name}", unit)
            found.append(_observed(detector, observed[observe]))
            advance(n)
    return found


def passes(detectors: Sequence[Detector], sets: Sets, n: int) -> int:
    """How many prompts `scan` will run, for a progress bar; an observing detector counts as n."""
    shared = sum(len(prompts) for both in sets.values() for prompts in both if prompts is not None)
    return shared + n * sum(detector.reads is None for detector in detectors)


def _observed(detector: Detector, arrays: Mapping[str, np.ndarray]) -> Scores:
    if detector.combine is None:
        return Scores(detector, arrays["score"], arrays["null"], arrays)
    seen = {name: torch.from_numpy(array) for name, array in arrays.items()}
    score, null = (side.numpy() for side in detector.combine(seen, None))
    return Scores(detector, score, null, {**arrays, "score": score, "null": null})


def _scores(detector: Detector, seen: Sequence[Mapping[str, PerPrompt]]) -> Scores:
    first, *control = (
        {
            key.removeprefix(f"{detector.name}."): value
            for key, value in side.items()
            if key.startswith(f"{detector.name}.")
        }
        for side in seen
    )
    if detector.combine is None:
        score, null = first["score"], control[0]["score"]
    else:
        score, null = detector.combine(first, control[0] if control else None)
    arrays = {name: value.numpy() for name, value in first.items()} if detector.tables else {}
    return Scores(detector, score.numpy(), null.numpy(), arrays)


def _statistics_of(
    model: Model,
    detectors: Sequence[Detector],
    prompts: Prompts | Images,
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


def _chunks(prompts: Prompts | Images) -> Iterator[slice]:
    size = max(1, TOKENS_PER_PASS // prompts.length)
    return (slice(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size))


def one_pass(
    model: Model, detectors: Sequence[Detector], prompts: Prompts | Images
) -> dict[str, np.ndarray]:
    """What these detectors want of some prompts, from one forward."""
    wanted: dict[str, Statistic] = {}
    streamed: dict[str, Streamed] = {}
    for d in detectors:
        for key, statistic in d.statistics(model, prompts).items() if d.statistics else ():
            into: dict[str, Any] = streamed if isinstance(statistic, Streamed) else wanted
            into[f"{d.name}.{key}"] = statistic
    captures = sorted({site for d in detectors for site in d.captures(model)})
    run, stream = Run(prompts.batch), Stream(streamed, prompts.length)
    if wanted or captures or streamed:
        run = model.run(
            prompts.batch,
            capture=captures,
            edits=[stream.edit] if streamed else (),
            statistics=wanted or None,
            logits=False,
        )
    found = run.statistics | stream.results(len(prompts), model.n_layers, model.spec.n_heads)
    found |= {
        f"{d.name}.score": d.measure(model, prompts, run)
        for d in detectors
        if d.measure is not None and isinstance(prompts, Prompts)
    }
    if isinstance(prompts, Prompts):
        found |= _from_gradients(model, detectors, prompts)
    return {key: value.numpy() for key, value in found.items()}


def _from_gradients(
    model: Model, detectors: Sequence[Detector], prompts: Prompts
) -> dict[str, Tensor]:
    """What detectors make of z and of the loss's gradient at z: one forward and one backward for all."""
    readers = [(d.name, d.from_gradient) for d in detectors if d.from_gradient is not None]
    if not readers:
        return {}
    run = model.run(prompts.batch, capture=["z"], logits=prompts.judged, grad=True)
    assert run.logits is not None
    targets = prompts.ids[:, prompts.judged + 1]
    z = run.cache.by_layer("z")
    total = loss(run.logits, targets).sum()
    grads = dict(zip(z, torch.autograd.grad(total, [*z.values()]), strict=True))
    z = {layer: value.detach() for layer, value in z.items()}
    return {
        f"{name}.{key}": value.cpu()
        for name, read in readers
        for key, value in read(z, grads).items()
    }
