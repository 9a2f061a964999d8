"""What a block writes of several positions together: the largest, or the mean, of each channel in a group of them.

A block that returns fewer positions than it reads may begin its stream with what a module makes of what it reads,
pooled. Which positions are pooled together is found by trying: squares of an image, the same place of so many
parts, or neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

SQUARES, ACROSS, BESIDE = "squares", "across", "beside"
POOLINGS = {"max": torch.amax, "mean": torch.mean}


@dataclass(frozen=True)
class Pooling:
    """How groups of positions become one each: `kind` "max" or "mean", `sides` how many lie together.

    `of`: "squares" of an image [batch height width d] (what does not fill one is left out); the same place of
    `sides` parts [batch pos d] ("across"), or as many neighbours ("beside").

    >>> x = torch.arange(8.0).reshape(1, 8, 1)
    >>> Pooling("max", "across", (4,))(x)[0, :, 0], Pooling("mean", "beside", (4,))(x)[0, :, 0]
    (tensor([6., 7.]), tensor([1.5000, 5.5000]))
    >>> Pooling("max", "squares", (2, 2))(x.reshape(1, 2, 4, 1))[0, :, 0]
    tensor([5., 7.])
    """

    kind: str
    of: str
    sides: tuple[int, ...]

    def __str__(self) -> str:
        sides = " × ".join(map(str, self.sides))
        of = {SQUARES: "squares of", ACROSS: "the same place of", BESIDE: "neighbours,"}[self.of]
        return f"{self.kind} over {of} {sides}"

    def __call__(self, x: Tensor) -> Tensor:
        """[batch pos d] of what a module returned."""
        if self.of == SQUARES:
            x = x.movedim(-1, 1)
            pool = nn.functional.max_pool2d if self.kind == "max" else nn.functional.avg_pool2d
            return pool(x, self.sides).flatten(2).mT  # type: ignore[arg-type]
        (n,) = self.sides
        x = x.unflatten(1, (n, -1) if self.of == ACROSS else (-1, n))
        return POOLINGS[self.kind](x, 1 if self.of == ACROSS else 2)

    def alike(self, x: Tensor) -> Tensor:
        """Positions [batch pos d] that are all as the x that they are pooled to."""
        assert self.of != SQUARES
        (n,) = self.sides
        return x.repeat(1, n, 1) if self.of == ACROSS else x.repeat_interleave(n, 1)


def poolings(shape: torch.Size, wanted: torch.Size) -> Iterator[Pooling]:
    """Poolings to try, of tensors [batch height width d] or [batch pos d], to as few positions as `wanted` has."""
    if len(shape) == len(wanted) == 4:
        sides = [
            [before // after] if before % after == 0 else _sides(before, after)
            for before, after in zip(shape[1:3], wanted[1:3], strict=True)
        ]
        yield from (Pooling(kind, SQUARES, side) for kind in POOLINGS for side in product(*sides))
    elif len(shape) == len(wanted) == 3 and shape[1] % wanted[1] == 0:
        n = shape[1] // wanted[1]
        yield from (Pooling(kind, of, (n,)) for kind, of in product(POOLINGS, (ACROSS, BESIDE)))


def _sides(before: int, after: int) -> list[int]:
    """How many of so many in a row may make one of `after` each, the rest left out."""
    return [n for n in range(1, before + 1) if before // n == after]
