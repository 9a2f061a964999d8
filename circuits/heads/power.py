"""Whether the prompts were enough: claims that their draw decides, and what a test of so many could have found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import brentq

from circuits.heads.claims import Claim

SURE = 0.05
"""A claim is undecided while it passes in more than this share of resamples and fails in more than it."""
POWER = 0.8
NEAREST = 10
"""Heads nearest to a label, whose spread over prompts stands for the role."""


def power_table(found: Sequence[Claim], alpha: float = 0.01) -> pd.DataFrame:
    """For each role, how many heads its prompts leave undecided, and the distance from the null that they can show.

    A head is undecided where its effect passes in 5 % to 95 % of the resamples of prompts, or in more but
    without significance. least_distance: the mean distance from the null that a paired t-test finds with
    probability 0.8, for the spread over prompts (root mean square) of the ten heads nearest to the margin; at the level
    that correction over all heads and roles has come to (alpha · significant / tested, one at least). It
    does not say what more prompts would show.

    Returns: a row a role: role, prompts (n), undecided (heads), least_distance and margin (unit of the score).
    """
    tests = sum(int(np.isfinite(claim.p).sum()) for claim in found)
    # the k-th smallest of m p-values passes while p ≤ alpha k / m
    passed = sum(int((claim.p <= alpha).sum()) for claim in found)
    level = alpha * max(passed, 1) / max(tests, 1)
    rows = []
    for claim in found:
        detector, n = claim.scores.detector, len(claim.scores.score)
        if not detector.labels:
            continue
        between = (claim.confidence > SURE) & (claim.confidence < 1 - SURE)
        effect_only = (claim.confidence >= 1 - SURE) & ~(np.nan_to_num(claim.p, nan=1.0) <= alpha)
        rows.append(
            {
                "role": detector.name,
                "prompts": n,
                "undecided": int((between | effect_only).sum()),
                "least_distance": _least_distance(claim, n, level),
                "margin": detector.margin,
            }
        )
    return pd.DataFrame(rows)


def _least_distance(claim: Claim, n: int, level: float) -> float:
    detector = claim.scores.detector
    distance = detector.side * (claim.scores.score - claim.scores.null)
    mean, spread = distance.mean(0).ravel(), distance.std(0, ddof=1).ravel()
    known = np.isfinite(mean) & np.isfinite(spread)
    if not known.any():
        return float("nan")
    near = np.argsort(np.abs(mean[known] - detector.margin), kind="stable")[:NEAREST]
    return float(_least_shift(n - 1, level) * np.sqrt((spread[known][near] ** 2).mean() / n))


def _least_shift(df: int, level: float) -> float:
    """Noncentrality at which a t-test of this level has its power: mean over s² of Φ(δ − t s) = 0.8."""
    shares = (np.arange(2000) + 0.5) / 2000
    size = stats.t.isf(level, df) * np.sqrt(stats.chi2.ppf(shares, df) / df)
    high = float(size.max()) + 10
    found: Any = brentq(lambda shift: stats.norm.cdf(shift - size).mean() - POWER, 0.0, high)
    return float(found)


def power_notes(power: pd.DataFrame) -> list[str]:
    """What the reader should know of it, in at most two sentences."""
    table: Any = power
    notes: list[str] = []
    if not len(table):
        return notes
    if undecided := int(table["undecided"].sum()):
        most: list[dict[str, Any]] = (
            table[table["undecided"] > 0].nlargest(3, "undecided").to_dict("records")
        )
        named = ", ".join(f"{row['role']} {row['undecided']}" for row in most)
        notes.append(
            f"{undecided} claims about heads are undecided: on other prompts of the kind they may fall the other "
            f"way (most of them: {named}). More prompts can settle them."
        )
    weak = table[table["least_distance"] > table["margin"]]
    if len(weak):
        named = ", ".join(f"{row.role} ({row.prompts})" for row in weak.itertuples())
        notes.append(
            "Too few prompts to say that a head has no such role, for it could lie a label's margin above the "
            f"null and not be significant: {named}."
        )
    return notes
