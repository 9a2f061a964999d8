"""Which query and which key every entry of a pattern belongs to, whatever shape the pattern has.

Read off derivatives. z is linear in the pattern and in the values: where the values are numbers of their rows,
the derivative of z by an entry of the pattern is the number of the key whose value it is multiplied with;
and the derivative of z times numbers of its rows is that of the query.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from interp.errors import Refused
from interp.models.tape import Step, Tape, key_of, tensors

if TYPE_CHECKING:
    from interp.models.pieces_seen import Seen

CASTS = {"float", "double", "half", "bfloat16", "to", "type", "type_as"}
"""Left out where numbers are sent through a module: they stay exact in float64."""
EXACT = 1e-6
"""How far from an integer a number may come back: sums of a few in float64."""


def pairs(seen: Seen) -> tuple[Int[Tensor, "..."], int] | None:
    """Where each entry of the pattern stands in [batch heads query key], flattened, -1 for nowhere; n_heads.

    None where z is not linear in the pattern, or an entry is of more than one query, head or key.
    """
    parts = seen.parts
    if len(parts) == 1:
        return _pairs(seen)
    found = [_pairs(part) for part in parts]
    known = [each for each in found if each is not None]
    if len(known) < len(found) or len({n_heads for _, n_heads in known}) > 1:
        return None
    n_pos, n_keys = seen.n_queries, seen.joined("v").shape[2]
    places, first = [], 0
    for part, (at, _) in zip(parts, known, strict=True):
        n = part.n_queries
        row, query, key = at // (n * n_keys), at // n_keys % n, at % n_keys
        there = (row * n_pos + first + query) * n_keys + key
        places.append(there.where(at >= 0, -1).flatten())
        first += n
    return torch.cat(places), known[0][1]


def _pairs(seen: Seen) -> tuple[Int[Tensor, "..."], int] | None:
    """The same for an only softmax."""
    weights, z = seen.weights, seen.z
    made_z, maker = seen.made_z
    sources = [(seen.linears[i].outputs[0], seen.linears[i]) for i in seen.of.v]
    before, after = seen.of.turned
    n_rows, n_pos = rows_of(z, after)
    n_keys = sum(rows_of(x, before)[1] for x, _ in sources)
    keys, first = [], 0
    for x, _ in sources:
        size = rows_of(x, before)[1]
        number = torch.arange(n_rows)[:, None] * n_keys + first + torch.arange(size)
        keys.append((number.T if before else number)[..., None])
        first += size
    queries = torch.arange(n_rows * n_pos).reshape(n_rows, n_pos)
    queries = (queries.T if after else queries)[..., None]
    path = leading_to(made_z, maker)

    def derivatives(values: list[Tensor], *of: Tensor) -> list[Tensor] | None:
        """That of each of these sums of z by the entries, values being these numbers."""
        at = torch.ones_like(weights, dtype=torch.float64).requires_grad_()
        sent = {key_of(weights, seen.softmax): at}
        for (x, made), value in zip(sources, values, strict=True):
            sent[key_of(x, made)] = torch.ones_like(x, dtype=torch.float64) * value.to(x.device)
        out = _sent(seen.tape, path, sent).get(key_of(made_z, maker))
        if out is None or not out.requires_grad:
            return None
        found = []
        for weight in of:
            by_position = out.reshape(z.shape)
            ones = torch.ones_like(by_position) * weight.to(out)
            (made,) = torch.autograd.grad(by_position, at, ones, retain_graph=True)
            found.append(made)
        return found

    one, channels = torch.ones(1), torch.arange(z.shape[-1])
    try:
        with torch.enable_grad():
            none = derivatives([0 * number for number in keys], one, queries, channels)
            each = derivatives([one for _ in keys], one, queries, channels)
            told = derivatives(keys, one)
    except (RuntimeError, Refused):  # steps that take no float64, cannot be derived or done again
        return None
    if none is None or each is None or told is None:
        return None
    count, query, channel = (a - b for a, b in zip(each, none, strict=True))
    there = count > 0.5  # what padding adds, whatever the values are, is taken off
    width = count.max().clamp_min(1)
    query, key = query / width, (told[0] - none[0]) / width
    head = (channel / width - (width - 1) / 2) / width
    found = torch.stack([count / width, query, key, head])[:, there]
    if (found - found.round()).abs().max() > EXACT or (found[0] - 1).abs().max() > EXACT:
        return None
    query, key, head = (x.round().long() for x in (query, key, head))
    if not torch.equal((query // n_pos)[there], (key // n_keys)[there]):
        return None
    n_heads = round(z.shape[-1] / float(width))
    at = ((query // n_pos * n_heads + head) * n_pos + query % n_pos) * n_keys + key % n_keys
    return at.where(there, -1), n_heads


def value_columns(seen: Seen) -> tuple[int, ...] | None:
    """Which columns of the one linear layer of values are the channels of z: where each says its number, z does.

    (A row of the pattern sums to one.) None where a channel is of no one column.
    """
    if len(seen.of.v) != 1 or seen.of.more:
        return None
    (number,), (z, maker) = seen.of.v, seen.made_z
    made, weights = seen.linears[number].outputs[0], seen.weights
    numbers = torch.arange(made.shape[-1], dtype=torch.float64, device=made.device)
    sent = {
        key_of(made, seen.linears[number]): numbers.expand_as(made),
        key_of(weights, seen.softmax): weights.double() / weights.double().sum(-1, keepdim=True),
    }
    try:
        out = _sent(seen.tape, leading_to(z, maker), sent).get(key_of(z, maker))
    except (RuntimeError, Refused):  # steps that take no float64, or cannot be done again
        return None
    if out is None:
        return None
    told = out.reshape(seen.z.shape).flatten(0, 1)
    columns = told[0].round()
    if (told - columns).abs().max() > EXACT or len(columns.unique()) < len(columns):
        return None
    return tuple(columns.long().tolist())


def rows_of(x: Tensor, turned: bool) -> tuple[int, int]:
    """Rows of the batch and positions."""
    return (x.shape[1], x.shape[0]) if turned else (x.shape[0], x.shape[1])


def leading_to(x: Tensor, maker: Step | None) -> list[Step]:
    """The steps that x was made with, in their order."""
    found: dict[int, Step] = {}
    open_ = [maker]
    while open_:
        step = open_.pop()
        if step is not None and step.index not in found:
            found[step.index] = step
            open_ += step.made_by.values()
    return [found[index] for index in sorted(found)]


def _sent(
    tape: Tape, path: list[Step], values: Mapping[tuple[int, int], Tensor]
) -> dict[tuple[int, int], Tensor]:
    """What these steps make of other values, by step and tensor; casts are left out."""
    made, first = dict(values), min(index for index, _ in values)
    for step in path:
        if step.index <= first or any(key_of(x, step) in values for x in step.outputs):
            continue
        new = {
            id(x): made[key]
            for x in tensors(step.args, step.kwargs)
            if (key := key_of(x, step.made_by.get(id(x)))) in made
        }
        if not new:
            continue
        if step.name in CASTS:
            x = next(tensors(step.args, step.kwargs))
            if id(x) in new:
                made[key_of(step.outputs[0], step)] = new[id(x)]
        else:
            tape.redo(step, new, made)
    return made
