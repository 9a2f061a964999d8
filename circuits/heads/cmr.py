"""The context maintenance and retrieval model of human free recall, as a family of lag curves.

Studying a list of distinct items leaves two matrices: M, which item a context cues (item j is bound to the
drifting context before it, e_i decayed by (1 − β_enc)^(j−1−i)), and the same read the other way, which
context an item brings back. Recalling item s moves the context t towards
t_IN = (1 − γ) e_s + γ M e_s by t ← (1 − β_rec) t + β_rec t_IN, both normed to length 1, and the next item
is drawn from Mᵀt. The lag curve (lag-CRP) is the probability that the next item lies j places after s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float

ITEMS, CHAINS, STEPS, STARTS = 48, 48, 16, 24
"""List length, recalls simulated for each setting, transitions in each, and first items they start from."""

Curves = Float[np.ndarray, "*heads lags"]


@dataclass(frozen=True)
class Grid:
    """Lag curves over a grid of parameters.

    Attributes:
        parameters: β_enc, β_rec, γ of each [settings 3]. curves: probability of each lag −reach … +reach
            [settings lags], each summing to 1 over these lags.
    """

    parameters: Float[np.ndarray, "settings 3"]
    curves: Float[np.ndarray, "settings lags"]


@cache
def cmr_grid(reach: int = 5, step: float = 0.1, gamma_step: float = 0.2, seed: int = 0) -> Grid:
    """The model's lag curve at every β_enc (over 0), β_rec and γ of a grid.

    At each step of a simulated recall the whole distribution of the next item is added up by its lag, not
    only the item drawn: the same curve in the mean, with far less noise.

    >>> grid = cmr_grid()
    >>> serial = (grid.parameters == [1.0, 1.0, 0.0]).all(1).argmax()  # each item cues the next
    >>> np.abs(grid.curves[serial] - np.eye(11)[6]).max() < 1e-9
    np.True_
    """
    n = round(1 / step)
    betas = np.linspace(step, 1, n)
    rest = np.stack(
        np.meshgrid(
            np.linspace(0, 1, n + 1), np.linspace(0, 1, round(1 / gamma_step) + 1), indexing="ij"
        ),
        axis=-1,
    ).reshape(-1, 2)
    curves = [_lag_curves(beta, rest, reach, np.random.default_rng(seed)) for beta in betas]
    parameters = np.concatenate([np.insert(rest, 0, beta, axis=1) for beta in betas])
    return Grid(parameters, np.concatenate(curves))


def _lag_curves(
    beta_enc: float, rest: np.ndarray, reach: int, generator: np.random.Generator
) -> np.ndarray:
    """Lag curves of many (β_rec, γ) with one β_enc, all chains of all settings side by side."""
    place = np.arange(ITEMS + 1)
    gap = place[None] - place[:, None] - 1  # item j is bound to context i = j − 1 − gap
    M = np.where(gap >= 0, (1 - beta_enc) ** np.maximum(gap, 0), 0.0).astype(np.float32)
    M[-1] = 0.0  # the last place absorbs: recall ends there
    beta_rec, gamma = (np.repeat(column, CHAINS)[:, None].astype(np.float32) for column in rest.T)
    now = np.tile(np.arange(CHAINS) % STARTS, len(rest))
    t = np.eye(ITEMS + 1, dtype=np.float32)[now]
    alive = np.ones(len(now), bool)
    width = 2 * reach + 1
    sums = np.zeros((len(rest), width))
    lags = np.arange(-reach, reach + 1)
    for step in range(STEPS):
        if step:
            back = (1 - gamma) * np.eye(ITEMS + 1, dtype=np.float32)[now] + gamma * M.T[now]
            t = (1 - beta_rec) * t + beta_rec * _unit(back)
            t = _unit(t)
        F = t @ M
        total = F.sum(1, keepdims=True)
        alive &= total[:, 0] > 1e-12
        P = F / np.maximum(total, 1e-12)
        # Places outside the list are left out; so is a chain once it has ended.
        at = now[:, None] + lags
        inside = (at >= 0) & (at < ITEMS) & alive[:, None]
        near = np.where(inside, np.take_along_axis(P, at.clip(0, ITEMS), 1), 0.0)
        sums += near.reshape(len(rest), CHAINS, width).sum(1)
        drawn = (P.cumsum(1) < generator.random((len(P), 1), dtype=np.float32)).sum(1)
        now = np.where(alive, drawn.clip(0, ITEMS), now)
        alive &= now < ITEMS
    return sums / np.maximum(sums.sum(1, keepdims=True), 1e-12)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def cmr_fit(
    curves: Curves, grid: Grid
) -> tuple[Float[np.ndarray, " *heads"], Float[np.ndarray, "*heads 3"]]:
    """CMR distance of each lag curve, and the β_enc, β_rec and γ of the nearest one.

    Distance: mean over lags of (a − c)² / Var(a), with a and c the curve and the model's, each moved to
    minimum 0 and c scaled to a's maximum. It knows no scale: a curve of any height can fit. A flat curve
    has no distance (NaN).

    >>> grid = cmr_grid()
    >>> distance, parameters = cmr_fit(0.3 * grid.curves[[40]] + 0.1, grid)
    >>> bool(distance[0] < 1e-9)
    True
    """
    a = curves - curves.min(-1, keepdims=True)
    c = grid.curves - grid.curves.min(-1, keepdims=True)
    c = c / np.maximum(c.max(-1, keepdims=True), 1e-12)
    top, variance = a.max(-1), a.var(-1)
    # mean (a − top·c)² without a [heads settings lags] array
    n = a.shape[-1]
    square = (
        (a**2).mean(-1)[..., None]
        - 2 / n * top[..., None] * (a @ c.T)
        + top[..., None] ** 2 * (c**2).mean(-1)
    )
    best = np.nan_to_num(square, nan=np.inf).argmin(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.take_along_axis(square, best[..., None], -1)[..., 0] / variance
    distance = np.where(variance > 1e-16, distance.clip(min=0), np.nan)
    return distance, grid.parameters[best]
