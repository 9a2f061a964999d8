"""Balanced accuracy, and its interval over groups of items."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int

from interp.resampling import INTERVAL, draw_counts

RESAMPLES = 1000


def balanced_accuracy(
    predicted: Int[np.ndarray, " items"], labels: Int[np.ndarray, " items"]
) -> float:
    """The mean over classes of the share of its items that are predicted right.

    >>> balanced_accuracy(np.array([0, 0, 0, 0]), np.array([0, 0, 0, 1]))
    0.5
    """
    right = predicted == labels
    return float(np.mean([right[labels == c].mean() for c in np.unique(labels)]))


def group_interval(
    right: Bool[np.ndarray, "sites items"],
    labels: Int[np.ndarray, " items"],
    groups: Int[np.ndarray, " items"],
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(low, high, standard error) of every site's balanced accuracy, resampling whole groups.

    The same resamples serve all sites. The interval is the middle 95 % of resamples.
    """
    from scipy.sparse import csr_array

    n_groups, classes = int(groups.max()) + 1, np.unique(labels)
    draws = draw_counts(n_groups, RESAMPLES, seed)
    shares = []
    for c in classes:
        member = csr_array((labels == c, (np.arange(len(labels)), groups))).astype(float)
        count = draws @ member.sum(0)
        with np.errstate(invalid="ignore"):  # a resample without the class says nothing of it
            shares.append(((right @ member) @ draws.T) / count)
    resampled = np.nanmean(shares, axis=0)
    low, high = np.quantile(resampled, INTERVAL, axis=1)
    return low, high, resampled.std(1)
