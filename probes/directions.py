"""The direction that tells two classes apart, what can be done along it, and what that does to the next token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.metrics import kl, logit_diff
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.cache import Run
from interp.run.edits import Edit
from interp.sites import Site
from probes.captured import Feature
from probes.erasure import Eraser, leace

DIRECTIONS = ("mean", "ridge", "leace")
RANDOM_FROM = ("sphere", "data")

Vectors = Float[np.ndarray, "items width"]


@dataclass(frozen=True, eq=False)
class Direction:
    """What tells two classes apart: `eraser` is centred midway between their means.

    step: what leads from the first class's mean to the second's along it, [width].
    """

    eraser: Eraser
    step: Float[np.ndarray, " width"]


def direction_of(x: Vectors, y: np.ndarray, name: str) -> Direction:
    """The direction that tells items with y from those without, as one of DIRECTIONS finds it.

    "leace" shrinks the covariance as the items ask for (OAS), as they are few for the width.

    >>> x = np.array([[0.0, 1.0], [0.0, 2.0], [4.0, 1.0], [4.0, 2.0]])
    >>> direction_of(x, np.array([False, False, True, True]), "mean").step.tolist()
    [4.0, 0.0]
    """
    first, second = x[~y].mean(0), x[y].mean(0)
    centre, apart = torch.as_tensor((first + second) / 2), second - first
    if name == "leace":
        eraser = leace(x, y, shrinkage=None)
        read, write = eraser.read, eraser.write
    else:
        along = apart if name == "mean" else _ridge(x, y)
        unit = torch.as_tensor(along / max(float(np.linalg.norm(along)), 1e-300))
        read, write = unit[:, None], unit[None]
    step = torch.as_tensor(apart) @ read @ write
    return Direction(Eraser(centre, read, write), step.numpy())


def _ridge(x: Vectors, y: np.ndarray) -> Float[np.ndarray, " width"]:
    """Weights of a ridge probe on standardised features, its penalty chosen by leave-one-out error."""
    from sklearn.linear_model import RidgeCV

    scale = x.std(0)
    # What differs by float rounding alone is constant: dividing by it would make noise a feature.
    varies = scale > 1e-6 * np.abs(x).max(0, initial=0.0)
    weights = np.zeros_like(scale)
    if varies.any():
        standard = (x - x.mean(0))[:, varies] / scale[varies]
        probe = RidgeCV(alphas=np.logspace(0, 5, 6)).fit(standard, 2.0 * y - 1)
        weights[varies] = probe.coef_ / scale[varies]
    return weights


def interventions(
    direction: Direction, x: Vectors, doses: Sequence[float]
) -> list[tuple[str, float, Vectors]]:
    """Every intervention: its name, its dose (NaN where it has none), and what it adds to each item."""
    removed = direction.eraser.removed(torch.as_tensor(x)).numpy()
    return [
        ("erase", float("nan"), -removed),
        ("swap", float("nan"), -2 * removed),
        *(("add", float(d), np.tile(d * direction.step, (len(x), 1))) for d in doses),
    ]


def with_turned(
    change: Vectors, direction: Direction, random: Float[np.ndarray, "draws width"]
) -> list[Vectors]:
    """The change, then one as large and of the same sign, item by item, along each random direction."""
    along = np.sign(change @ direction.step) * np.linalg.norm(change, axis=1)
    return [change, *(along[:, None] * v for v in random)]


def random_directions(
    x: Vectors, y: np.ndarray, draws: int, source: str, seed: int
) -> Float[np.ndarray, "draws width"]:
    """Unit vectors: of any direction, or as the items vary within their classes."""
    rng = np.random.default_rng(seed)
    if source == "sphere":
        v = rng.normal(size=(draws, x.shape[1]))
    else:
        within = np.concatenate([x[y] - x[y].mean(0), x[~y] - x[~y].mean(0)])
        v = rng.normal(size=(draws, len(x))) @ within
    return v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-300)


# --- what is watched ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bench:
    """Prompts, their clean run, where each is changed, and the answer tokens (of class 2, of class 1)."""

    model: Model
    run: Run
    places: Int[Tensor, " items"]
    words: tuple[list[int], list[int]] | None

    def vectors(self, site: Site) -> Vectors:
        """The clean activations that are changed."""
        x = self.run.cache[site]
        rows = torch.arange(len(x), device=x.device)
        return x[rows, self.places.to(x.device)].cpu().double().numpy()

    def odds(self, run: Run) -> Float[Tensor, " items"]:
        """Log-odds of the answers of class 2 against those of class 1 (zeros without answers)."""
        logits = _last(run)
        if self.words is None:
            return torch.zeros(len(logits), device=logits.device)
        second, first = (torch.tensor([ids] * len(logits)) for ids in self.words)
        return logit_diff(logits, second, first)

    def measured(
        self, site: Site, changes: Sequence[Vectors], advance: Any
    ) -> Float[np.ndarray, "changes items 2"]:
        """Log-odds, and KL divergence from the clean run, of every item under every change."""
        clean = _last(self.run)
        shape = (len(self.places), 1, 1, -1) if site.head is not None else (len(self.places), 1, -1)
        variants = [
            [Edit.add(site, torch.as_tensor(c).float().reshape(shape), positions=self.places)]
            for c in changes
        ]
        values = self.model.replay(
            self.run,
            variants,
            lambda run: torch.stack([self.odds(run), kl(clean, _last(run))], 1).cpu().double(),
            logits=torch.tensor([self.run.batch.ids.shape[1] - 1]),
            progress=advance,
        )
        return torch.stack(values).numpy()


def bench_of(
    model: Model,
    prompts: tuple[Batch, Int[Tensor, " items"]],
    features: Mapping[str, Feature],
    words: tuple[list[int], list[int]] | None,
) -> Bench:
    batch, places = prompts
    sites = [Site(f.site, f.layer) for f in features.values()]
    starts = [Site("resid_pre", f.layer) for f in features.values()]
    read = torch.tensor([batch.ids.shape[1] - 1])
    run = model.run(batch, capture=[*sites, *starts], logits=read)
    return Bench(model, run, places, words)


def _last(run: Run) -> Float[Tensor, "items d_vocab"]:
    """Next-token logits."""
    assert run.logits is not None
    return run.logits[:, -1].float()
