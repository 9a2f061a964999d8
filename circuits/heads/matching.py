"""Heads of two models paired by what they do, and how much nearer each pair is than chance would bring it.

A head is its vector of scores. The pairs are the assignment with the least sum of distances, so a partner is
always found; whether it means anything is another question. The null is a model whose heads have the same
means, spreads and linear correlations of scores as the real one's, otherwise put together at random: scores on
the principal axes, each shuffled over heads. A pair is a match where it is nearer than the nearest head of such
models, seen from both sides. Heads of which many are alike (those that do nothing, say) are interchangeable:
such models have them too, and no match is claimed.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.stats import false_discovery_control

DRAWS = 999
ALPHA = 0.05
LEAST_EFFECT = 0.25
"""A match is at least this share nearer than the nearest head of the median model put together at random."""
COPY = 0.9
"""A head put together at random that has more than this share of its length from one head is that head."""
TIE = 1e-9
"""Cost of a place's difference: between partners that are equally near, the one in the same place."""

Vectors = Float[np.ndarray, "heads scores"]


def standardised(
    a: Vectors, b: Vectors, noise_a: Vectors | None = None, noise_b: Vectors | None = None
) -> tuple[Vectors, Vectors, Float[np.ndarray, " scores"]]:
    """Both models' scores in standard deviations over all heads of both, each weighed by its reliability.

    A score whose spread over heads is little more than its own error says little of which head is which: it
    is multiplied by √(1 − error²/spread²), 0 where nothing is left. Unknown values count as the mean.

    Args:
        noise_a, noise_b: standard errors of the scores.

    Returns: both, and what one unit of each score was multiplied by.

    >>> standardised(np.array([[0.0, 1.0]]), np.array([[2.0, 1.0]]))[0]
    array([[-1.,  0.]])
    """
    both = np.concatenate([a, b]).astype(float)
    known = np.isfinite(both)
    count = known.sum(0).clip(1)
    mean = np.where(known, both, 0).sum(0) / count
    centred = np.where(known, both - mean, 0)
    variance = (centred**2).sum(0) / count
    error = np.zeros_like(variance)
    if noise_a is not None and noise_b is not None:
        error = (np.nan_to_num(np.concatenate([noise_a, noise_b])) ** 2).sum(0) / count
    # a constant's spread is rounding
    real = variance > (1e-6 * np.abs(np.where(known, both, 0)).max(0, initial=0)) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = np.where(real, np.sqrt((1 - error / variance).clip(0) / variance), 0.0)
    return centred[: len(a)] * unit, centred[len(a) :] * unit, unit


def distances(a: Vectors, b: Vectors) -> Float[np.ndarray, "heads_a heads_b"]:
    """Root of the mean squared difference over scores, in standard deviations.

    >>> distances(np.array([[0.0, 3.0]]), np.array([[4.0, 3.0], [0.0, 3.0]])).round(2).tolist()
    [[2.83, 0.0]]
    """
    squares = ((a[:, None] - b[None]) ** 2).mean(-1) if a.shape[1] else np.zeros((len(a), len(b)))
    return np.sqrt(squares)


def assignment(
    cost: Float[np.ndarray, "heads_a heads_b"],
    depth_a: Float[np.ndarray, " heads_a"],
    depth_b: Float[np.ndarray, " heads_b"],
    penalty: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """(rows of a, rows of b) of the pairs with the least sum of cost + penalty · |difference in depth|."""
    depth = np.abs(depth_a[:, None] - depth_b)
    place = np.abs(np.arange(cost.shape[0])[:, None] - np.arange(cost.shape[1])) / max(cost.shape)
    return linear_sum_assignment(cost + penalty * depth + TIE * (depth + place))


def nearest_by_chance(
    heads: Vectors,
    model: Vectors,
    partners: Int[np.ndarray, " heads"],
    draws: int = DRAWS,
    seed: int = 0,
) -> Float[np.ndarray, "draws heads"]:
    """Distance of each head to the nearest head of models put together at random from `model`'s scores.

    A head put together of almost nothing but the scores of the head's own partner is that partner, and does not
    count for it; infinite where no other is left.
    """
    generator = np.random.default_rng(seed)
    mean = model.mean(0)
    left, sizes, axes = np.linalg.svd(model - mean, full_matrices=False)
    real = sizes > 1e-9 * sizes.max(initial=0)
    along, axes = (left * sizes)[:, real], axes[real]
    places = np.tile(np.arange(len(model))[:, None], along.shape[1])
    columns = np.arange(along.shape[1])
    found = np.full((draws, len(heads)), np.inf)
    size = (heads**2).sum(1)
    for draw in range(draws):
        taken = generator.permuted(places, axis=0)
        scores = along[taken, columns]
        other = scores @ axes + mean
        square = size[:, None] + (other**2).sum(1) - 2 * heads @ other.T
        square[partners[:, None] == _copied(taken, scores**2)] = np.inf
        found[draw] = square.min(1, initial=np.inf)
    # differences of squares: what is below their rounding is 0
    found[found < 1e-12 * (size.max(initial=0) + 1)] = 0
    return np.sqrt(found / max(heads.shape[1], 1))


def _copied(taken: Int[np.ndarray, "rows axes"], squares: Vectors) -> Int[np.ndarray, " rows"]:
    """The head that more than COPY of a row's squared length was taken from; -1 where there is none."""
    if not taken.shape[1]:
        return np.full(len(taken), -1)
    largest = taken[np.arange(len(taken)), squares.argmax(1)]
    share = (squares * (taken == largest[:, None])).sum(1)
    return np.where(share > COPY * squares.sum(1), largest, -1)


def match_heads(
    a: Vectors,
    b: Vectors,
    *,
    depth_a: Float[np.ndarray, " heads_a"] | None = None,
    depth_b: Float[np.ndarray, " heads_b"] | None = None,
    penalty: float = 0.0,
    alpha: float = ALPHA,
    draws: int = DRAWS,
    seed: int = 0,
) -> pd.DataFrame:
    """The best partner of every head, and whether the pair is nearer than chance.

        effect = 1 − distance / chance,    p = (1 + #{draws with a head as near}) / (1 + draws)

    `chance` is the median distance to the nearest head of models put together at random; it and p are the less
    favourable of both sides', p corrected over pairs (Benjamini & Hochberg 1995). A match needs
    p ≤ alpha and effect ≥ 0.25. It does not show that the two heads are the same: compare the distance with
    what other prompts would make of it.

    Args:
        a, b: standardised scores (`standardised`).
        depth_a, depth_b: relative depth of each head, 0 to 1; only needed with a penalty.
        penalty: cost of pairing the first layer with the last, in standard deviations; it moves the assignment
            and not the distance.
        alpha: corrected significance level of a match.

    Returns: a row a pair: a, b (rows), distance, chance, effect, p, matched.

    >>> heads = np.eye(6)
    >>> match_heads(heads, heads[[1, 0, 2, 3, 5, 4]])["b"].tolist()
    [1, 0, 2, 3, 5, 4]
    """
    depth_a = np.zeros(len(a)) if depth_a is None else depth_a
    depth_b = np.zeros(len(b)) if depth_b is None else depth_b
    cost = distances(a, b)
    rows, partners = assignment(cost, depth_a, depth_b, penalty)
    distance = cost[rows, partners]
    sides = (
        nearest_by_chance(a[rows], b, partners, draws, seed),
        nearest_by_chance(b[partners], a, rows, draws, seed),
    )
    p = np.max([(1 + (side <= distance).sum(0)) / (1 + draws) for side in sides], axis=0)
    chance = np.min([np.median(side, axis=0) for side in sides], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        effect = np.where(chance > 0, 1 - distance / chance, 0.0)
    # one score alone, or the same of every head: no other model can be put together of them
    effect = np.where(np.isfinite(chance), effect, 0.0)
    p = false_discovery_control(p) if len(p) else p
    return pd.DataFrame(
        {
            "a": rows,
            "b": partners,
            "distance": distance,
            "chance": chance,
            "effect": effect,
            "p": p,
            "matched": (p <= alpha) & (effect >= LEAST_EFFECT),
        }
    )
