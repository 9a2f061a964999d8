"""What a store's activations say of every feature of an SAE: densities, histograms, best contexts.

One pass over the store, block by block. A block's finding is a few numbers a feature and its best
contexts, and two findings merge into one of the same size, so that memory does not grow with the text
and an interrupted pass goes on behind its last block.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.run.progress import Progress
from interp.run.resume import Checkpoint
from interp.run.store import ActivationStore
from probes.saes.model import SAE

BINS = 32
"""Bins of a feature's histogram, from 0 to the power of two above its largest activation."""

NEVER = -100
"""Exponent of a histogram with nothing in it: gives way to any other."""

BLOCK_ROWS = 65_536
LATENTS_AT_ONCE = 2**24
"""Latents, rows times d_sae, that exist at once."""

Found = dict[str, np.ndarray]
"""A finding: arrays by name, of features or of contexts."""


def _blocks(store: ActivationStore) -> list[tuple[int, int, int]]:
    """(shard, first row, last row + 1) of blocks of whole windows, in order."""
    starts = store.extras["row_start"].long()
    found, first = [], 0
    for number, shard in enumerate(store.shards):
        end = first + shard["rows"]
        while first < end:
            stop = min(first + BLOCK_ROWS, end)
            if stop < end:
                cut = int(starts[torch.searchsorted(starts, torch.tensor(stop), right=True) - 1])
                stop = cut if cut > first else int(starts[starts > first][0])
            found.append((number, first, stop))
            first = stop
    return found


def one_pass(
    sae: SAE,
    store: ActivationStore,
    chosen: Tensor,
    contexts: int,
    around: int,
    units: Checkpoint,
    bars: Progress,
) -> tuple[Found, str]:
    """Everything that is known of features from their activations; and what contexts differ in."""
    documents = store.extras["document"].unique()
    distinct = "document" if len(documents) >= contexts else "window"
    windows = torch.arange(len(store.extras["document"]))
    groups = store.extras["document"].long() if distinct == "document" else windows
    blocks = _blocks(store)
    advance = bars.stage("Features", store.n_rows)
    shard, x = -1, torch.empty(0)
    total: Found | None = None
    for number, first, stop in blocks:

        def unit(number: int = number, first: int = first, stop: int = stop) -> Found:
            nonlocal shard, x
            if number != shard:
                shard, x = number, store.shard(number)
            base = sum(part["rows"] for part in store.shards[:number])
            rows = x[first - base : stop - base]
            return _of_block(sae, store, rows, first, chosen, groups, contexts, around)

        found = units.compute(f"rows {first}", unit)
        total = found if total is None else _merged(total, found, contexts)
        advance(stop - first)
    assert total is not None
    return total, distinct


def _of_block(
    sae: SAE,
    store: ActivationStore,
    x: Tensor,
    first: int,
    chosen: Tensor,
    groups: Tensor,
    contexts: int,
    around: int,
) -> Found:
    """What one block of rows says of every chosen feature."""
    place = torch.full((sae.config.d_sae,), -1)
    place[chosen] = torch.arange(len(chosen))
    at_once = max(64, LATENTS_AT_ONCE // sae.config.d_sae)
    parts = []
    for start in range(0, len(x), at_once):
        codes = sae.codes(x[start : start + at_once].to(sae.encoder))
        at, latent, strength = (y.cpu() for y in (codes.row, codes.latent, codes.value))
        keep = (strength > 0) & (place[latent] >= 0)
        parts.append((at[keep] + start, place[latent[keep]], strength[keep]))
    row, feature, value = (torch.cat(column) for column in zip(*parts, strict=True))
    n = len(chosen)
    starts = store.extras["row_start"].long()
    window = torch.searchsorted(starts, row + first, right=True) - 1
    largest = torch.zeros(n).scatter_reduce(0, feature, value, "amax")
    exponent = torch.frexp(largest).exponent.long()
    exponent[largest == 0] = NEVER
    bins = (value / 2.0 ** exponent[feature].float() * BINS).long()
    histogram = torch.bincount(feature * BINS + bins.clamp_max(BINS - 1), minlength=n * BINS)
    best = _best(feature, groups[window], value, contexts)
    places = row[best], feature[best], window[best]
    near = _near(row, feature, value, places, starts - first, around)
    return {
        "fired": torch.bincount(feature, minlength=n).numpy(),
        "total": torch.zeros(n, dtype=torch.double).index_add_(0, feature, value.double()).numpy(),
        "exponent": exponent.numpy(),
        "histogram": histogram.view(n, BINS).numpy(),
        "feature": feature[best].numpy(),
        "group": groups[window[best]].numpy(),
        "value": value[best].numpy(),
        "row": (row[best] + first).numpy(),
        "near": near.numpy(),
    }


def _best(
    feature: Int[Tensor, " n"], group: Int[Tensor, " n"], value: Float[Tensor, " n"], k: int
) -> Int[Tensor, " best"]:
    """Which entries are the k largest of their feature, one a group at most; by feature, largest first.

    >>> _best(torch.tensor([0, 0, 0, 1]), torch.tensor([5, 5, 6, 5]), torch.tensor([1.0, 3, 2, 9]), 2)
    tensor([1, 2, 3])
    """
    order = value.argsort(descending=True, stable=True)
    pair = feature * (int(group.max()) + 1 if len(group) else 1) + group
    order = order[pair[order].argsort(stable=True)]
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = pair[order][1:] != pair[order][:-1]
    order = order[first]
    order = order[value[order].argsort(descending=True, stable=True)]
    order = order[feature[order].argsort(stable=True)]
    sorted_feature = feature[order]
    rank = torch.arange(len(order)) - torch.searchsorted(sorted_feature, sorted_feature)
    return order[rank < k]


def _near(
    row: Tensor,
    feature: Tensor,
    value: Tensor,
    places: tuple[Tensor, Tensor, Tensor],
    starts: Tensor,
    around: int,
) -> Float[Tensor, "best tokens"]:
    """A feature's activations around its best rows; zero outside the window and where it is not active."""
    n_features = int(feature.max()) + 1 if len(feature) else 1
    key = row * n_features + feature
    key, order = key.sort()
    best_row, best_feature, best_window = places
    near = best_row[:, None] + torch.arange(-around, around + 1)
    inside = (near >= starts[best_window][:, None]) & (near < starts[best_window + 1][:, None])
    wanted = near * n_features + best_feature[:, None]
    where = torch.searchsorted(key, wanted).clamp_max(max(len(key) - 1, 0))
    if not len(key):
        return torch.zeros(wanted.shape)
    return torch.where(inside & (key[where] == wanted), value[order[where]], 0.0)


def _merged(one: Found, two: Found, contexts: int) -> Found:
    """Two blocks' findings as one."""
    exponent = np.maximum(one["exponent"], two["exponent"])
    histogram = sum(_widened(part, exponent) for part in (one, two))
    names = ("feature", "group", "value", "row", "near")
    joint = {name: np.concatenate([one[name], two[name]]) for name in names}
    feature, group, value = (
        torch.from_numpy(joint[name]) for name in ("feature", "group", "value")
    )
    best = _best(feature, group, value, contexts).numpy()
    return {
        "fired": one["fired"] + two["fired"],
        "total": one["total"] + two["total"],
        "exponent": exponent,
        "histogram": np.asarray(histogram),
    } | {name: column[best] for name, column in joint.items()}


def _widened(found: Found, exponent: np.ndarray) -> np.ndarray:
    """A histogram on bins up to 2^exponent: a doubling joins each two bins into one."""
    n = len(exponent)
    by = np.minimum(exponent - found["exponent"], 10)
    target = np.arange(BINS)[None] >> by[:, None]
    flat = (np.arange(n)[:, None] * BINS + target).ravel()
    weights = found["histogram"].ravel()
    return np.bincount(flat, weights, minlength=n * BINS).astype(np.int64).reshape(n, BINS)
