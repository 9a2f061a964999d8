"""When a trajectory over training rises: a plateau, a ramp and a plateau fitted to it, with an interval.

With u = log2(1 + step), the fit is y(u) = a + b · clip((u − s) / (e − s), 0, 1), its start s and end e at
checkpoints, by least squares over all pairs s < e. Where more than a tenth of the change is made by s, or
less than nine tenths by e, the interval reaches further out. What happened between two checkpoints is
not seen, so it is never narrower than one gap. A bootstrap over prompts repeats all this and widens it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float, Int

from interp.resampling import INTERVAL, draw_counts

RESAMPLES = 500
EDGE = 0.1
"""Share of the change that may have been made outside of the interval."""


@dataclass(frozen=True)
class Onset:
    """A fitted change of a trajectory.

    Attributes:
        low, high: steps. Last checkpoint before the change and first one behind it, each the outermost
            of the fit and the 95 % interval of its refits.
        step: where the fitted ramp is half way; between checkpoints.
        before, after: the plateaus. change: after − before, with change_low and change_high (95 %).
        explained: share of the trajectory's variance that the fit explains; NaN if it never changes.
    """

    low: float
    step: float
    high: float
    before: float
    after: float
    change: float
    change_low: float
    change_high: float
    explained: float


@cache
def ramps(
    steps: tuple[int, ...],
) -> tuple[Float[np.ndarray, "fits 2"], Float[np.ndarray, "fits steps"]]:
    """Start and end (as places in `steps`) of every ramp, and each ramp at every step, from 0 to 1."""
    u = np.log2(1.0 + np.asarray(steps))
    start, end = np.triu_indices(len(steps), k=1)
    values = (u - u[start, None]) / (u[end] - u[start])[:, None]
    return np.stack([start, end], 1), values.clip(0.0, 1.0)


def onset(
    steps: Sequence[int], scores: Float[np.ndarray, "steps prompts"], *, seed: int = 0
) -> Onset:
    """The change that best divides a trajectory into before and after, whether or not it is large.

    Args:
        steps: increasing, at least two. scores: of every prompt at every step.

    Returns: steps, and plateaus in the scores' unit. A trajectory that drifts, or changes twice, is
        fitted too: `explained` and the width of [low, high] tell.

    >>> scores = np.array([[0.0], [0.0], [0.1], [0.9], [1.0], [1.0]]) * np.ones((1, 4))
    >>> found = onset([1, 10, 20, 30, 40, 50], scores)
    >>> (found.low, found.high), 20 < found.step < 30
    ((20.0, 30.0), True)
    """
    at = np.asarray(steps, dtype=float)
    places, values = ramps(tuple(int(step) for step in steps))
    centred = values - values.mean(1, keepdims=True)
    size = (centred**2).sum(1)
    n = scores.shape[1]
    draws = np.concatenate([np.full((1, n), 1.0), draw_counts(n, RESAMPLES, seed)]) / n
    means = draws @ scores.T
    slope = (means - means.mean(1, keepdims=True)) @ centred.T / size
    best = (slope**2 * size).argmax(1)
    start, end = places[best].T
    change = slope[np.arange(len(draws)), best]
    before = means.mean(1) - change * values[best].mean(1)
    first, last = _outer(means, before, change, start, end)
    low, high = np.quantile(at[first[1:]], INTERVAL[0]), np.quantile(at[last[1:]], INTERVAL[1])
    spread = ((means[0] - means[0].mean()) ** 2).sum()
    explained = change[0] ** 2 * size[best[0]] / spread if spread > 0 else np.nan
    middle = np.log2(1 + at[[start[0], end[0]]]).mean()
    change_low, change_high = np.quantile(change[1:], INTERVAL)
    return Onset(
        low=float(_checkpoint(at, min(low, at[first[0]]), down=True)),
        step=float(2**middle - 1),
        high=float(_checkpoint(at, max(high, at[last[0]]), down=False)),
        before=float(before[0]),
        after=float(before[0] + change[0]),
        change=float(change[0]),
        change_low=float(change_low),
        change_high=float(change_high),
        explained=float(explained),
    )


def _outer(
    means: Float[np.ndarray, "draws steps"],
    before: Float[np.ndarray, " draws"],
    change: Float[np.ndarray, " draws"],
    start: Int[np.ndarray, " draws"],
    end: Int[np.ndarray, " draws"],
) -> tuple[Int[np.ndarray, " draws"], Int[np.ndarray, " draws"]]:
    """Places of the last step with less than EDGE of the change made, and of the first with all but EDGE."""
    with np.errstate(divide="ignore", invalid="ignore"):
        made = (means - before[:, None]) / change[:, None]
    place = np.arange(means.shape[1])
    early = (made <= EDGE) & (place <= start[:, None])
    late = (made >= 1 - EDGE) & (place >= end[:, None])
    first = len(place) - 1 - early[:, ::-1].argmax(1)
    return (
        np.where(early.any(1), first, start),
        np.where(late.any(1), late.argmax(1), end),
    )


def _checkpoint(at: Float[np.ndarray, " steps"], value: float, *, down: bool) -> float:
    """The nearest step that was kept, outwards: a quantile may fall between two."""
    return at[at <= value].max() if down else at[at >= value].min()
