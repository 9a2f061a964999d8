"""Keys of a patch on the grid of an image, and the same grid with its patches shuffled."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.data.images import Grid, Images


def neighbours(grid: Grid, dy: int, dx: int) -> Int[Tensor, " pos"]:
    """For every position the one `dy` rows below and `dx` columns right; -1 where there is none.

    >>> grid = Grid(torch.arange(6).view(2, 3), 6)
    >>> neighbours(grid, 1, -1).tolist()
    [-1, 3, 4, -1, -1, -1]
    """
    height, width = grid.places.shape
    found = torch.full((grid.length,), -1)
    if abs(dy) < height and abs(dx) < width:
        here = grid.places[max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
        there = grid.places[max(0, dy) : height + min(0, dy), max(0, dx) : width + min(0, dx)]
        found[here.flatten()] = there.flatten()
    return found


def shuffled(images: Images, keys: Int[Tensor, " pos"], seed: int = 0) -> Int[Tensor, "n pos"]:
    """The same relation between the places of patches that are dealt out anew, in every image otherwise.

    If key(q) is a patch's neighbour, π(key(π⁻¹(q))) is the one it would have after the shuffle π.
    """
    patches = images.grid.places.flatten()
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(len(images), len(patches), generator=generator).argsort(dim=1)
    moved = torch.arange(images.length).expand(len(images), -1).clone()
    moved[:, patches] = patches[order]
    found = torch.full_like(moved, -1)
    there = torch.where(keys >= 0, moved[:, keys.clamp_min(0)], -1)
    return found.scatter(1, moved, there)


def distances(grid: Grid) -> Float[Tensor, "pos pos"]:
    """Euclidean distance between patches, in patches; 0 where either is none."""
    places = grid.rows_and_columns.nan_to_num()
    patch = torch.zeros(grid.length)
    patch[grid.places.flatten()] = 1
    # The exact way: by products, torch rounds small distances of large grids.
    far = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    return far * patch[:, None] * patch
