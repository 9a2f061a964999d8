"""Roles of several models side by side: how many heads have each, and at what depth.

Depth is relative, (layer + ½) / n_layers, so that models of any number of layers lie on one axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.stats import binomtest, false_discovery_control

from interp.resampling import INTERVAL

BINS = 10
ROLES = [
    *(
        "model",
        "role",
        "heads",
        "heads_low",
        "heads_high",
        "share",
        "share_low",
        "share_high",
        "depth",
    ),
    *("strongest", "layer", "head", "strongest_depth", "score", "low", "high"),
]
FEWEST = 3
"""With fewer heads in either model the distance of two profiles has no p-value to speak of."""


def relative_depth(table: pd.DataFrame, n_layers: int) -> Float[np.ndarray, " heads"]:
    """(layer + ½) / n_layers of every row.

    >>> relative_depth(pd.DataFrame({"layer": [0, 1]}), 2).tolist()
    [0.25, 0.75]
    """
    return (table["layer"].to_numpy(dtype=float) + 0.5) / n_layers


def with_role(table: pd.DataFrame, role: str) -> Bool[np.ndarray, " heads"]:
    """Which heads have a label."""
    return np.array([role in labels.split(",") for labels in table["labels"]], dtype=bool)


def role_counts(
    tables: Mapping[str, pd.DataFrame],
    n_layers: Mapping[str, int],
    roles: Sequence[str],
    alpha: Mapping[str, float],
) -> pd.DataFrame:
    """How many heads of each model have each role, and the strongest of them.

    Two intervals, for two questions. `share_low`, `share_high`: Wilson's 95 % interval, as if heads had the role
    by lot: whether two models' shares differ by more than that. `heads_low`, `heads_high`: how many would get the
    label on other prompts of the same kind, each head by its confidence (bootstrap over prompts), heads taken as
    independent.

    Args:
        tables: a table of heads by model. alpha: the level at which its labels were given.

    Returns: a row a model and role: heads, heads_low, heads_high, share, share_low, share_high, depth (mean
        relative depth of its heads), strongest ("L5H1"), layer, head, strongest_depth, score, low and high of
        the strongest head, whether it has the label or not.
    """
    rows: list[dict[str, Any]] = []
    for model, table in tables.items():
        depth = relative_depth(table, n_layers[model])
        for role in roles:
            mine = with_role(table, role)
            found = int(mine.sum())
            share = binomtest(found, len(table)).proportion_ci(method="wilson")
            chance = table[f"{role}_confidence"].where(table[f"{role}_p"] <= alpha[model], 0.0)
            low, high = _count_interval(chance.fillna(0.0).to_numpy(float))
            row: dict[str, Any] = {
                "model": model,
                "role": role,
                "heads": found,
                "heads_low": low,
                "heads_high": high,
                "share": found / len(table),
                "share_low": float(share.low),
                "share_high": float(share.high),
                "depth": float(depth[mine].mean()) if found else np.nan,
            }
            scores = table[role].to_numpy(float)
            row |= {"strongest": "", "layer": pd.NA, "head": pd.NA}
            if np.isfinite(scores).any():
                # of equally strong heads the one that has the label
                best = int(np.nanargmax(np.where(mine, scores + 1e-9, scores)))
                layer, head = int(table["layer"].iloc[best]), int(table["head"].iloc[best])
                row |= {
                    "strongest": f"L{layer}H{head}",
                    "layer": layer,
                    "head": head,
                    "strongest_depth": float(depth[best]),
                    "score": float(scores[best]),
                    "low": float(table[f"{role}_low"].iloc[best]),
                    "high": float(table[f"{role}_high"].iloc[best]),
                }
            rows.append(row)
    found = pd.DataFrame(rows, columns=ROLES)
    whole = dict.fromkeys(("heads", "heads_low", "heads_high", "layer", "head"), "Int64")
    return found.astype(whole)


def _count_interval(chance: Float[np.ndarray, " heads"]) -> tuple[int, int]:
    """95 % interval of the number of heads that pass, each by its own chance.

    >>> _count_interval(np.array([1.0, 1.0, 0.0]))
    (2, 2)
    """
    counts = np.ones(1)
    for p in chance[chance > 0]:
        counts = np.convolve(counts, [1 - p, p])
    below = counts.cumsum()
    low, high = (int(np.searchsorted(below, q - 1e-12)) for q in INTERVAL)
    return low, high


def depth_profiles(
    tables: Mapping[str, pd.DataFrame],
    n_layers: Mapping[str, int],
    roles: Sequence[str],
    bins: int = BINS,
) -> pd.DataFrame:
    """Share of the heads at each relative depth that have each role.

    Returns: a row a model, role and bin: low, high (relative depth), heads (with the role), of (all heads there),
        share (NaN where the model has no layer there).
    """
    edges = np.linspace(0, 1, bins + 1)
    rows = []
    for model, table in tables.items():
        place = np.minimum((relative_depth(table, n_layers[model]) * bins).astype(int), bins - 1)
        of = np.bincount(place, minlength=bins)
        for role in roles:
            heads = np.bincount(place[with_role(table, role)], minlength=bins)
            rows += [
                (
                    model,
                    role,
                    edges[i],
                    edges[i + 1],
                    int(heads[i]),
                    int(of[i]),
                    _share(heads[i], of[i]),
                )
                for i in range(bins)
            ]
    columns = ["model", "role", "low", "high", "heads", "of", "share"]
    return pd.DataFrame(rows, columns=columns)


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else float("nan")


def profile_distances(
    tables: Mapping[str, pd.DataFrame],
    n_layers: Mapping[str, int],
    roles: Sequence[str],
    *,
    draws: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """How far the heads of a role would have to be moved to lie as deep as another model's.

        distance = ∫ |F_a(x) − F_b(x)| dx    (Wasserstein-1, in relative depth)

    p: share of random exchanges of the two models' heads with as large a distance, corrected over all rows; none
    with under three heads in either model. A role that fewer than one head has in either model has no distance.

    Returns: a row a pair of models and role: model_a, model_b, role, heads_a, heads_b, distance, p.
    """
    depths = {
        (model, role): relative_depth(table, n_layers[model])[with_role(table, role)]
        for model, table in tables.items()
        for role in roles
    }
    rows = []
    for a, b in combinations(tables, 2):
        for role in roles:
            x, y = depths[a, role], depths[b, role]
            if len(x) and len(y):
                distance, p = _moved(x, y, draws, seed)
                rows.append((a, b, role, len(x), len(y), distance, p))
    columns = ["model_a", "model_b", "role", "heads_a", "heads_b", "distance", "p"]
    found: Any = pd.DataFrame(rows, columns=columns)
    tested = found["p"].notna()
    if tested.any():
        found.loc[tested, "p"] = false_discovery_control(found.loc[tested, "p"])
    return found


def _moved(
    x: Float[np.ndarray, " a"], y: Float[np.ndarray, " b"], draws: int, seed: int
) -> tuple[float, float]:
    """Wasserstein-1 distance of two samples, and p of exchanging their members.

    >>> _moved(np.array([0.25] * 4), np.array([0.75] * 4), 999, 0)[0]
    0.5
    """
    pooled = np.concatenate([x, y])
    order = np.argsort(pooled, kind="stable")
    gaps = np.diff(pooled[order])
    first = np.zeros(len(pooled))
    first[: len(x)] = 1

    def distance(mine: np.ndarray) -> np.ndarray:
        below = np.cumsum(mine[..., order], -1)[..., :-1] / len(x)
        above = np.cumsum(1 - mine[..., order], -1)[..., :-1] / len(y)
        return (np.abs(below - above) * gaps).sum(-1)

    seen = float(distance(first))
    if min(len(x), len(y)) < FEWEST:
        return seen, float("nan")
    exchanged = np.random.default_rng(seed).permuted(np.tile(first, (draws, 1)), axis=1)
    return seen, float((1 + (distance(exchanged) >= seen - 1e-12).sum()) / (1 + draws))
