"""What changed between a model and its fine-tuned version, head by head: scores with intervals, labels.

Heads are compared in their place, which means something only where one model was made from the other (a
fine-tune, checkpoints of one training): training moves what a head does, not where it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from circuits.heads.claims import Claim, resampling
from interp.resampling import INTERVAL

Z95 = float(stats.norm.ppf(INTERVAL[1]))
"""Half the width of a 95 % interval in standard errors."""
SCORES = ["layer", "head", "score", "before", "after", "change", "low", "high", "p", "changed"]
HEADS = [
    *("layer", "head", "labels_before", "labels_after", "gained", "lost", "changed_scores"),
    *("clearest", "change", "low", "high"),
]


def errors(table: pd.DataFrame, scores: Sequence[str]) -> Float[np.ndarray, "heads scores"]:
    """Standard errors of scores, from their intervals; 0 where none is known."""
    found = [(table[f"{name}_high"] - table[f"{name}_low"]) / (2 * Z95) for name in scores]
    return np.stack([x.fillna(0).to_numpy(float) for x in found], axis=1)


def changes_of_tables(
    before: pd.DataFrame,
    after: pd.DataFrame,
    margins: Mapping[str, float],
    *,
    prompts: int,
    alpha: float = 0.05,
) -> pd.DataFrame:
    """Change of every score of every head, from two tables of heads.

    The interval treats the tables' errors as independent. Where both were made from the same prompts they are
    not, and it is wider than it need be; changes over the very same prompts are `changes_of_claims`.

    Args:
        before, after: one row a head, the same heads in the same order.
        margins: the scores, and the least change of each that counts.
        prompts: how many each score is the mean of; Student's t with one less degree of freedom.
        alpha: corrected significance level of "changed".

    Returns: a row a head and score: layer, head, score, before, after, change (of the score's own unit), low,
        high, p (corrected over all rows), changed (p ≤ alpha and at least the margin).
    """
    names = list(margins)
    x, y = (table[names].to_numpy(float) for table in (before, after))
    # the bootstrap's error of n prompts is too small by √(n / (n − 1))
    squares = errors(before, names) ** 2 + errors(after, names) ** 2
    error = np.sqrt(squares * prompts / (prompts - 1))
    reach = stats.t.ppf(INTERVAL[1], prompts - 1) * error
    change = y - x
    parts = (x, y, change, change - reach, change + reach, _p(change, error, prompts))
    return _rows(before, names, parts, margins, alpha)


def changes_of_claims(
    before: Sequence[Claim],
    after: Sequence[Claim],
    heads: pd.DataFrame,
    *,
    alpha: float = 0.05,
    seed: int = 0,
) -> pd.DataFrame:
    """Change of every score of every head over the same prompts, prompt by prompt.

    Intervals from a bootstrap over prompts of the difference, p from a paired t-test; as `changes_of_tables`
    else.

    Args:
        before, after: the same detectors on the same prompts. heads: columns layer and head.
    """
    at = heads["layer"].to_numpy(), heads["head"].to_numpy()
    names, columns, margins = [], [], {}
    for a, b in zip(before, after, strict=True):
        x, y = (claim.scores.score[:, *at].astype(float) for claim in (a, b))
        difference = y - x
        n = len(difference)
        low, high = np.quantile(resampling(n, seed) @ difference, INTERVAL, axis=0)
        error = difference.std(0, ddof=1) / np.sqrt(n)
        mean = difference.mean(0)
        columns.append((x.mean(0), y.mean(0), mean, low, high, _p(mean, error, n)))
        name = a.scores.detector.name
        names.append(name)
        margins[name] = a.scores.detector.margin
    parts = tuple(np.stack(part, axis=1) for part in zip(*columns, strict=True))
    return _rows(heads, names, parts, margins, alpha)


def _p(change: np.ndarray, error: np.ndarray, n: int) -> np.ndarray:
    """Two-sided p of Student's t; a change without any error is certain, none is none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stats.t.sf(np.abs(change) / error, n - 1)
    return np.where(error > 0, p, np.where(change == 0, 1.0, 0.0))


def _rows(
    heads: pd.DataFrame,
    names: Sequence[str],
    parts: tuple[np.ndarray, ...],
    margins: Mapping[str, float],
    alpha: float,
) -> pd.DataFrame:
    known = np.isfinite(parts[2])
    p = np.full(known.shape, np.nan)
    if known.any():
        p[known] = stats.false_discovery_control(parts[5][known])
    margin = np.array([margins[name] for name in names])
    # rounding of a score that is the same in both
    least = np.maximum(margin, 1e-6 * np.abs(parts[0]))
    changed = (p <= alpha) & (np.abs(parts[2]) >= least) & (np.abs(parts[2]) > 1e-9)
    place = {name: np.repeat(heads[name].to_numpy(), len(names)) for name in ("layer", "head")}
    columns = ("before", "after", "change", "low", "high")
    found = place | {"score": np.tile(names, len(heads))}
    found |= {name: part.ravel() for name, part in zip(columns, parts, strict=False)}
    return pd.DataFrame(found | {"p": p.ravel(), "changed": changed.ravel()}, columns=SCORES)


def changes_by_head(
    scores: pd.DataFrame, labels_before: Sequence[str], labels_after: Sequence[str]
) -> pd.DataFrame:
    """One row a head: labels gained and lost, how many scores changed, and the clearest change.

    The clearest is the one with the largest |change| / half its interval among those that changed. A label can be
    gained or lost by a change that is not significant: near its threshold a little is enough.

    Args:
        scores: from `changes_of_tables` or `changes_of_claims`; heads in the labels' order.
    """
    rows: list[dict[str, Any]] = []
    groups: Any = scores.groupby(["layer", "head"], sort=False)
    for ((layer, head), mine), before, after in zip(
        groups, labels_before, labels_after, strict=True
    ):
        first, second = (set(filter(None, text.split(","))) for text in (before, after))
        row: dict[str, Any] = {
            "layer": layer,
            "head": head,
            "labels_before": before,
            "labels_after": after,
            "gained": ",".join(sorted(second - first)),
            "lost": ",".join(sorted(first - second)),
            "changed_scores": int(mine["changed"].sum()),
            "clearest": "",
        }
        changed: Any = mine[mine["changed"]]
        if len(changed):
            half = ((changed["high"] - changed["low"]) / 2).clip(lower=1e-12)
            best = changed.loc[(changed["change"].abs() / half).idxmax()]
            row["clearest"] = best["score"]
            row |= {name: float(best[name]) for name in ("change", "low", "high")}
        rows.append(row)
    return pd.DataFrame(rows, columns=HEADS)
