"""Row statistics that one detector brings by itself, streamed over the pattern like all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.run.edits import Edit, Seen


@dataclass(frozen=True)
class Streamed:
    """finish(Σ over chunks of weigh(chunk, start)): a number a head, from rows seen a chunk at a time.

    weigh: (pattern [n n_heads rows keys], first row) -> [n n_heads …], summed over chunks.
    finish: that sum -> [n n_heads].
    """

    weigh: Callable[[Tensor, int], Tensor]
    finish: Callable[[Tensor], Float[Tensor, "n n_heads"]] = lambda total: total


class Stream:
    """Feeds every `Streamed` from one forward: `edit` reads patterns and changes nothing.

    Of a pattern it reads the keys at `length` positions; behind them come keys that are no position's.
    """

    def __init__(self, wanted: Mapping[str, Streamed], length: int):
        self.wanted, self.length = wanted, length
        self._sums: dict[tuple[str, int], Tensor] = {}
        self.edit = Edit.apply("pattern", self._read)

    def _read(self, pattern: Tensor, seen: Seen) -> Tensor:
        read = pattern.detach()[..., : self.length].float()
        for name, streamed in self.wanted.items():
            found = streamed.weigh(read, seen.start)
            key = name, seen.layer
            self._sums[key] = found if key not in self._sums else self._sums[key] + found
        return pattern

    def results(
        self, n: int, n_layers: int, n_heads: int
    ) -> dict[str, Float[Tensor, "n n_layers n_heads"]]:
        """Every number for all layers; NaN where a layer (or a head of it) was not seen."""
        out = {name: torch.full((n, n_layers, n_heads), torch.nan) for name in self.wanted}
        for (name, layer), total in self._sums.items():
            found = self.wanted[name].finish(total)
            out[name][:, layer, : found.shape[1]] = found.cpu()
        return out
