"""Row statistics: numbers about attention rows that need no whole pattern.

Every detector reads rows of attention: the mass on some keys, the entropy. Given the pattern chunk
by chunk, each statistic keeps one number per row set and head, so the [head, query, key] matrix of a
long context never exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import BadInput, Refused


@dataclass(frozen=True)
class Mass:
    """Mean over chosen rows of the attention mass on chosen keys: mean_q Σ_k∈keys(q) A[q, k].

    keys: for every query the key positions whose weights are summed; -1 stands for none.
    rows: the queries averaged over. Unit: attention mass, 0 to 1.
    """

    keys: Int[Tensor, "batch pos m"]
    rows: Bool[Tensor, "batch pos"]


@dataclass(frozen=True)
class Entropy:
    """Mean over chosen rows of H(A[q]) / log(number of keys q can see): 1 is uniform attention.

    `visible` is that number for every query (q + 1 in a causal model without padding).
    Rows that see one key only have no entropy to speak of: leave them out of `rows`.
    """

    rows: Bool[Tensor, "batch pos"]
    visible: Int[Tensor, "batch pos"]


@dataclass(frozen=True)
class Expected:
    """Mean over chosen rows of what a row expects of a number of each key: mean_q Σ_k A[q, k] values[k].

    With values 1 and 0 it is the mass on some keys, whatever the query. Unit: that of `values`.
    """

    values: Float[Tensor, "batch pos"]
    rows: Bool[Tensor, "batch pos"]


@dataclass(frozen=True)
class Distance:
    """Mean over chosen rows of Σ_k∈keys A[q, k] |q − k|: how far the mass on these keys reaches, in tokens.

    Divided by the mass itself (`Expected` of the keys) it is the mean distance of that mass.
    """

    keys: Bool[Tensor, "batch pos"]
    rows: Bool[Tensor, "batch pos"]


@dataclass(frozen=True)
class PeakColumn:
    """The key that most rows look at: max over chosen keys k of the mean of A[q, k] over later rows q > k.

    Choose only keys that enough rows come after. Unit: attention mass, 0 to 1.
    """

    keys: Bool[Tensor, "batch pos"]
    rows: Bool[Tensor, "batch pos"]


Statistic = Mass | Entropy | Expected | Distance | PeakColumn


class RowStatistics:
    """Accumulates named statistics over pattern chunks; `means` gives each as [batch layer head].

    All masses share one gather a chunk: their keys are laid side by side, so twenty of them cost
    little more than one.
    """

    def __init__(self, wanted: Mapping[str, Statistic]):
        rows = {name: statistic.rows for name, statistic in wanted.items()}
        if empty := [name for name, chosen in rows.items() if not chosen.any(dim=1).all()]:
            raise BadInput(f"statistic '{empty[0]}' has a prompt with no row to average over")
        self._device = next(iter(rows.values())).device
        self._weights = {name: r / r.sum(dim=1, keepdim=True) for name, r in rows.items()}
        self._masses = {name: s for name, s in wanted.items() if isinstance(s, Mass)}
        self._entropies = {name: s for name, s in wanted.items() if isinstance(s, Entropy)}
        self._expected = {name: s for name, s in wanted.items() if isinstance(s, Expected)}
        self._distances = {name: s for name, s in wanted.items() if isinstance(s, Distance)}
        self._peaks = {name: s for name, s in wanted.items() if isinstance(s, PeakColumn)}
        self._sums: dict[str, dict[int, Tensor]] = {name: {} for name in wanted}
        if self._masses:
            self._prepare_masses()
        if self._expected:
            self._values = torch.stack([s.values.float() for s in self._expected.values()], dim=-1)
            self._value_rows = torch.stack([self._weights[name] for name in self._expected], dim=-1)

    def require(self, layer: int, n_pos: int, *, or_more: bool) -> None:
        """Refused where a layer has other positions than rows are chosen of; `or_more`: others may come behind."""
        n_rows = next(iter(self._weights.values())).shape[1]
        if n_pos < n_rows or (n_pos > n_rows and not or_more):
            raise Refused(
                f"row statistics of {n_rows} positions: layer {layer} has queries at {n_pos}, and a model whose layers "
                "have several numbers of positions has no row that is the same in all; capture 'pattern' of a layer"
            )

    def _prepare_masses(self) -> None:
        """One key list for all masses: distinct columns once, with a weight for each (mass, column).

        A column is a key position as a function of the query (one slot of one statistic). Columns
        that several statistics share, such as "the previous token", are gathered once.
        """
        columns: dict[bytes, int] = {}
        kept: list[Tensor] = []
        uses: list[tuple[int, int]] = []
        for index, mass in enumerate(self._masses.values()):
            for slot in mass.keys.unbind(-1):
                key = slot.cpu().numpy().tobytes()
                if key not in columns:
                    columns[key] = len(kept)
                    kept.append(slot)
                uses.append((index, columns[key]))
        self._keys = torch.stack(kept, dim=-1)
        self._use = torch.zeros(len(self._masses), len(kept))
        for use in uses:
            self._use[use] += 1
        self._row_weights = torch.stack([self._weights[name] for name in self._masses], dim=1)

    @torch.no_grad()
    def update(
        self, layer: int, pattern: Float[Tensor, "batch heads rows keys"], start: int
    ) -> None:
        """Take in the rows from `start` on of one layer's pattern."""
        pattern = pattern.to(self._device)  # the layers of a model may lie on several
        stop = start + pattern.shape[2]
        if self._masses:
            keys = self._keys[:, start:stop]
            # A causal chunk leaves out the keys after its last row: their weight is 0.
            inside = (keys >= 0) & (keys < pattern.shape[-1])
            index = keys.where(inside, 0)[:, None].expand(-1, pattern.shape[1], -1, -1)
            found = pattern.gather(-1, index) * inside[:, None]
            rows = self._row_weights[:, :, start:stop].to(found)
            by_column = torch.einsum("bhqc,bsq->bhsc", found, rows)
            sums = torch.einsum("bhsc,sc->bhs", by_column, self._use.to(found))
            for name, total in zip(self._masses, sums.unbind(-1), strict=True):
                self._add(name, layer, total)
        if self._entropies:
            entropy = torch.special.entr(pattern).sum(-1)
            for name, statistic in self._entropies.items():
                scale = self._weights[name] / statistic.visible.clamp_min(2).log()
                self._add(
                    name,
                    layer,
                    torch.einsum("bhq,bq->bh", entropy, scale[:, start:stop].to(entropy)),
                )

        if self._expected:
            values = self._values[:, : pattern.shape[-1]].to(pattern)
            found = torch.einsum("bhqk,bks->bhqs", pattern, values)
            rows = self._value_rows[:, start:stop].to(found)
            for name, total in zip(
                self._expected, torch.einsum("bhqs,bqs->sbh", found, rows), strict=True
            ):
                self._add(name, layer, total)
        if self._distances:
            at = torch.arange(start, stop, device=pattern.device)[:, None]
            far = (at - torch.arange(pattern.shape[-1], device=pattern.device)).abs().to(pattern)
            for name, statistic in self._distances.items():
                keys = statistic.keys[:, : pattern.shape[-1]].to(pattern)
                found = torch.einsum("bhqk,qk,bk->bhq", pattern, far, keys)
                rows = self._weights[name][:, start:stop].to(found)
                self._add(name, layer, torch.einsum("bhq,bq->bh", found, rows))
        for name, statistic in self._peaks.items():
            later = torch.ones(pattern.shape[2:], dtype=torch.bool, device=pattern.device)
            later = later.tril(start - 1)  # rows after the key's own
            rows = statistic.rows[:, start:stop].to(pattern)
            total = torch.einsum("bhqk,bq,qk->bhk", pattern, rows, later.to(pattern))
            length = statistic.keys.shape[1]
            self._add(name, layer, torch.nn.functional.pad(total, (0, length - total.shape[-1])))

    def _peak(self, name: str, sums: Tensor) -> Float[Tensor, "batch heads"]:
        """The largest column mean among the chosen keys."""
        statistic = self._peaks[name]
        rows = statistic.rows.long()
        later = rows.sum(1, keepdim=True) - rows.cumsum(1)
        means = sums / later.clamp_min(1)[:, None]
        chosen = statistic.keys & (later > 0)
        return means.masked_fill(~chosen[:, None], -torch.inf).amax(-1)

    def _add(self, name: str, layer: int, total: Tensor) -> None:
        sums = self._sums[name]
        sums[layer] = total if layer not in sums else sums[layer] + total

    def means(self, n_layers: int) -> dict[str, Float[Tensor, "batch n_layers n_heads"]]:
        """Every statistic for all layers; NaN where a layer (or a head of it) was not seen."""
        out = {}
        for name, sums in self._sums.items():
            if name in self._peaks:
                sums = {layer: self._peak(name, total) for layer, total in sums.items()}
            if not sums:
                raise BadInput(
                    "no attention was seen: the pass stopped before the first attention layer"
                )
            like = next(iter(sums.values()))
            n_heads = max(total.shape[1] for total in sums.values())
            out[name] = torch.full((like.shape[0], n_layers, n_heads), torch.nan)
            for layer, total in sums.items():
                out[name][:, layer, : total.shape[1]] = total.float().cpu()
        return out
