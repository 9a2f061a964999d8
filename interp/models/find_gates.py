"""Gates that a block computes, found by trying: which chunk of what a module returns makes a write what is added.

Of every gate it is first asked in a few entries whether anything that the block computes, times the gate, may make
one of the stream's states of another one. What may is a candidate as any other from then on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product

import torch
from torch import Tensor

from interp.models.gate import THROUGH, Gate
from interp.models.layout import PLAIN
from interp.models.stack import Layer
from interp.models.sums import Candidate, Sums, in_pieces, norms_of

ENTRIES = 1024
"""In how many entries of the stream a gate is tried first."""
NEARLY = 1e-3
"""How much of a difference of states may be left over there, relative to its size."""


def gated(layer: Layer, key: int | str, candidates: list[Candidate]) -> Sums | None:
    """The block taken apart where it gates what it adds; None where that does not explain it either."""
    if layer.axes != PLAIN or not candidates:
        return None
    pre, post, dtype = layer.hidden(key).double(), layer.output.double(), layer.output.dtype
    norms = norms_of(layer.inside, pre.shape)
    few = torch.linspace(0, pre.numel() - 1, min(ENTRIES, pre.numel())).long()
    states = [x.double().flatten()[few] for x in (pre, *(x for _, _, x, _ in norms), post)]
    steps = [b - a for a, b in combinations(states, 2) if not torch.equal(a, b)]
    plain = torch.stack([c.value.double().flatten()[few] for c in candidates], dim=1)
    through = [
        replace(c, value=c.value * opened, gate=gate)
        for gate, order, opened in _gates(layer, pre)
        for c in _promising(candidates, plain, opened.double().expand_as(pre).flatten()[few], steps)
        if c.order > order  # it is open by then
    ]
    found = in_pieces(pre, post, candidates + through, norms, dtype) if through else None
    return Sums(found) if found else None


def _gates(layer: Layer, pre: Tensor) -> Iterator[tuple[Gate, int, Tensor]]:
    """(gate, when its module had returned, what it is on the probe [batch pos d_model]) of all that may be one."""
    rows, n_pos, d_model = pre.shape
    for name, calls in layer.inside.calls.items():
        x = calls[0].output
        if len(calls) > 1 or x is None or not x.is_floating_point() or x.shape[-1] % d_model:
            continue
        if x.numel() // x.shape[-1] not in (rows, rows * n_pos):
            continue
        for chunk, through in product(range(x.shape[-1] // d_model), THROUGH):
            gate = Gate(name, chunk, through)
            yield gate, calls[0].order, gate.of(x, rows, d_model)


def _promising(
    candidates: list[Candidate], plain: Tensor, gate: Tensor, steps: list[Tensor]
) -> list[Candidate]:
    """Those whose entries [entries candidates], times the gate's, and others' make one of the stream's steps."""
    columns = torch.cat([plain * gate[:, None], plain], dim=1)
    aims = torch.stack(steps, dim=1)
    sizes = aims.norm(dim=0)
    scales = torch.linalg.lstsq(columns, aims, driver="gelsd").solution
    made = (aims - columns @ scales).norm(dim=0) <= NEARLY * sizes
    parts = columns.norm(dim=0)[:, None] * scales.abs()
    part_of = (parts > NEARLY * sizes)[:, made].any(1)
    return [c for c, wanted in zip(candidates, part_of.tolist(), strict=False) if wanted]
