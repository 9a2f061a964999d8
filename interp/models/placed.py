"""Attention between the parts of an input: which part each row's queries are of, and which part its keys.

A model that compares two images holds a pair as two parts. A row of its attention may have the queries of the one
and the keys of the other, and one attention may be called for each part in turn. Sites show all parts in one row,
part after part: a pattern is 0, and scores -inf, where the queries of a part do not see another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from interp.errors import Refused


@dataclass(frozen=True)
class Placed:
    """Which part the queries, and the keys, of each row of one attention call are of, for every input.

    It is the `index`-th attention of its layer, or what that computes for some of the `n_parts` parts.

    >>> crossed = Placed(0, (0, 1), (1, 0), n_parts=2)
    >>> k = torch.tensor([[5.0], [7.0]])[:, :, None, None]  # [rows pos heads d_head], of one input
    >>> crossed.among(crossed.unknown("k", k, 1), "k", k).flatten()
    tensor([7., 5.])
    """

    index: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    n_parts: int

    @property
    def own(self) -> bool:
        """Whether every part attends to itself, in a row of its own, in this one call."""
        return self.queries == self.keys == tuple(range(self.n_parts))

    def require(self, name: str, rows: int, size: int, of: int | None = None) -> None:
        """Refused where there are not as many rows as `size` inputs have: those of this call, or `of` for each."""
        wanted = len(self.queries) if of is None else of
        if rows != size * wanted:
            raise Refused(
                f"'{name}' has {rows} rows for {size} inputs, where the probe saw {wanted} for each: which are whose "
                "is not known (some inputs may have stopped early); give them one by one"
            )

    def unknown(self, name: str, x: Tensor, count: int) -> Tensor:
        """The site of a layer that attends `count` times, of which nothing is known yet: NaN everywhere.

        `x` is the site of this call alone: [rows pos heads d_head], of scores and patterns [rows heads query key].
        """
        size = x.shape[0] // len(self.queries)
        if _by_query(name):
            lengths = (self.n_parts * x.shape[2], self.n_parts * x.shape[3])
            return x.new_full((size, count * x.shape[1], *lengths), torch.nan)
        return x.new_full(
            (size, self.n_parts * x.shape[1], count * x.shape[2], x.shape[3]), torch.nan
        )

    def among(self, whole: Tensor, name: str, x: Tensor) -> Tensor:
        """The layer's site with what this call computes of it."""
        whole = whole.clone()
        parts = x.unflatten(0, (-1, len(self.queries))).unbind(1)
        if _by_query(name):
            fill = -torch.inf if name.endswith("scores") else 0.0
            for part in self.queries:
                self._in_parts(whole, name)[:, self._heads(name, x), part] = fill
        for i, part in enumerate(parts):
            self._place(i, whole, name, x).copy_(part)
        return whole

    def mine(self, whole: Tensor, name: str, x: Tensor) -> Tensor:
        """The inverse: what of a layer's site this call computes, in the shape of x."""
        rows = range(len(self.queries))
        return torch.stack([self._place(i, whole, name, x) for i in rows], 1).reshape(x.shape)

    def _place(self, i: int, whole: Tensor, name: str, x: Tensor) -> Tensor:
        """The view of `whole` that the i-th row of every input is."""
        seen, heads = self._in_parts(whole, name), self._heads(name, x)
        if _by_query(name):
            return seen[:, heads, self.queries[i], :, self.keys[i]]
        of = self.keys if name.endswith(("k", "v")) else self.queries
        return seen[:, of[i], :, heads]

    def _in_parts(self, whole: Tensor, name: str) -> Tensor:
        if _by_query(name):
            return whole.unflatten(3, (self.n_parts, -1)).unflatten(2, (self.n_parts, -1))
        return whole.unflatten(1, (self.n_parts, -1))

    def _heads(self, name: str, x: Tensor) -> slice:
        n = x.shape[1 if _by_query(name) else 2]
        return slice(self.index * n, (self.index + 1) * n)


def _by_query(name: str) -> bool:
    return name.endswith(("scores", "pattern"))
