"""Patch-offset heads: attention from each patch to the one at a fixed place beside it."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from circuits.heads.detector import Detector, head_table, strongest
from circuits.heads.patches import neighbours, shuffled
from circuits.heads.prompt_sets import IMAGES
from interp.data.images import Images
from interp.models.model import Model
from interp.run.statistics import Mass

REACH = 2
OFFSETS = [
    (dy, dx)
    for dy in range(-REACH, REACH + 1)
    for dx in range(-REACH, REACH + 1)
    if (dy, dx) != (0, 0)
]


def _statistics(model: Model, images: Images) -> dict[str, Mass]:
    found = {}
    for dy, dx in OFFSETS:
        keys = neighbours(images.grid, dy, dx)
        if bool((keys < 0).all()):  # a grid of few rows or columns
            continue
        for name, at in (("there", keys.expand(len(images), -1)), ("null", shuffled(images, keys))):
            found[f"{name} {dy} {dx}"] = Mass(at[..., None], at >= 0)
    return found


def _combine(seen, _):
    best, null = (
        strongest([value for key, value in seen.items() if key.startswith(name)])
        for name in ("there", "null")
    )
    return best, null


def _table(seen: Mapping[str, np.ndarray]) -> dict[str, pd.DataFrame]:
    """The best offset of every head."""
    names = [key for key in seen if key.startswith("there")]
    means = np.stack([seen[key].mean(0) for key in names])
    best = np.nan_to_num(means, nan=-1.0).argmax(0)
    dy, dx = (np.array([int(key.split()[i]) for key in names], float)[best] for i in (1, 2))
    table = head_table(mass=means.max(0), dy=dy, dx=dx)
    return {"patch_offsets": table.astype({"dy": int, "dx": int})}


PATCH_OFFSET = Detector(
    name="patch_offset",
    title="Patch offset",
    letter="o",
    description="Largest over (dy, dx) up to two patches away of the mean of A[(r, c), (r + dy, c + dx)] on "
    "images: the head looks at a fixed place beside each patch, as one tap of a convolution does. Patches without "
    "such a neighbour are left out. The table patch_offsets says which place.",
    source="Cordonnier et al. 2020, On the Relationship between Self-Attention and Convolutional Layers, §3 and 4; "
    "threshold ours",
    reads=IMAGES,
    null="the best offset of the same rows where the places of the patches are shuffled",
    threshold=0.3,
    margin=0.2,
    rank=3,
    statistics=_statistics,
    combine=_combine,
    tables=_table,
)
