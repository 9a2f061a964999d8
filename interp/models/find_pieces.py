"""Which modules' patterns lie in pieces, tried on the probe.

The softmaxes and linear layers that a module calls are tried for what they are: those whose output z changes
with, the pattern held, are values; those that rows of the scores change with are queries, columns keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor, nn

from interp.models.calls import call_model, text_config
from interp.models.forwards import other_forwards
from interp.models.pairs import leading_to, pairs, rows_of, value_columns
from interp.models.pieces import (
    CLOSE,
    calls_of,
    close,
    is_product,
    is_whole,
    once,
    pieces,
)
from interp.models.pieces_seen import Pieces, Seen, Substitutes
from interp.models.pooling import Pooling, poolings
from interp.models.spec import first_tensor
from interp.models.tape import Step, Tape, key_of, softmax_of_rows, tensors
from interp.run.batch import Batch

Ran = tuple[Tape, Any, list[Tensor]]
"""A run of a module: its calls, what it returns, and what its linear layers do."""
Run = Callable[[Substitutes], Ran]
LONGER = (4, 16)
"""How many times as long inputs are tried, until there is a key of every sort: global ones, of many positions each."""


def find_pieces(module: nn.Module, batch: Batch, parts: Sequence[nn.Module]) -> list[nn.Module]:
    """Those of these modules whose pattern lies in pieces, noted from then on."""
    n_ctx = getattr(text_config(module), "max_position_embeddings", None)
    found = _learnt(module, batch, parts)
    for times in LONGER:
        empty = any(of.empty for of in found.values())
        if not empty or set(batch.inputs) != {"input_ids"}:
            break
        ids = batch.ids.repeat(1, times)
        if n_ctx is not None and ids.shape[1] > n_ctx:
            break
        found = _learnt(module, Batch.of_ids(ids), parts)
    if any(part not in found for part in parts):
        return []  # a part of the layers alone would pass for a model of several kinds
    pieces.update(found)
    return list(found)


def _learnt(module: nn.Module, batch: Batch, parts: Sequence[nn.Module]) -> dict[nn.Module, Pieces]:
    found: dict[nn.Module, Pieces] = {}

    def learn(part: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def run(new: Substitutes) -> Ran:
            return new.run(forward, args, kwargs)

        ran = run(Substitutes())
        hidden = next((x for x in tensors(args, kwargs) if x.is_floating_point()), None)
        if hidden is not None and (of := _understood(ran, hidden, run)) is not None:
            empty = tuple(i for i in of.k + of.v if not ran[2][i].numel())
            found[part] = replace(of, empty=empty, calls=calls_of(ran[0]))
        return ran[1]

    forwards = {part: partial(learn, part, part.forward) for part in dict.fromkeys(parts)}
    with other_forwards(forwards), torch.no_grad():
        call_model(module, batch)
    return found


def _understood(
    ran: Ran,
    hidden: Tensor,
    run: Run,
) -> Pieces | None:
    """The one attention of this call with a query for each row of `hidden`, whose z is its pattern times v.

    Of an only softmax there may be fewer queries: each is of several rows together.
    """
    tape = ran[0]
    softmaxes = [step for step in tape.steps if step.name == "softmax"]
    linears = [step for step in tape.steps if step.name == "linear"]
    found, parts = [], list[Pieces]()
    for number, softmax in enumerate(softmaxes):
        of = Pieces(number, _reader(tape, softmax, linears), (), 1, (False, False))
        if of.reader is None and first_tensor(ran[1]) is None:  # it returns no tensor by itself
            continue
        v = _values(Seen(*ran, of), run)
        if not v or hidden.ndim != 3:
            continue
        parts.append(replace(of, v=tuple(v)))
        read = [linears[i].args[0] for i in v]
        before = any(torch.equal(x, hidden.transpose(0, 1)) for x in read)
        before = before and not any(torch.equal(x, hidden) for x in read)
        for after in (False, True):
            own = [i for i in v if rows_of(ran[2][i], before)[1] == hidden.shape[1]]
            n_rows, n_queries = rows_of(Seen(*ran, parts[-1]).z, after)
            fewer = len(softmaxes) == 1 and not after and n_queries < hidden.shape[1]
            if n_rows != hidden.shape[0] or not own:
                continue
            if n_queries != hidden.shape[1] and not fewer:
                continue
            order = (own[0], *(i for i in v if i != own[0]))
            seen = _verified(Seen(*ran, replace(of, v=order, turned=(before, after))))
            if seen is not None:
                fused = bool(seen[0].of.columns)  # the layer of values makes queries and keys, too
                found.append(
                    _of_columns(*seen, run) if fused else _with_queries(*seen, run, hidden)
                )
                break
    if not found and len(parts) > 1:
        return _together(ran, parts, hidden, run)
    return found[0] if len(found) == 1 else None


def _values(seen: Seen, run: Run) -> list[int]:
    """The linear layers that z changes with while the pattern is held; [] where z is not made of the pattern."""
    softmax, (z, maker), made = seen.softmax, seen.made_z, seen.made
    if not softmax_of_rows(softmax) or z.ndim not in (3, 4) or maker is None:
        return []
    path = leading_to(z, maker)
    if softmax not in path:
        return []
    held = Substitutes(pattern={seen.of.softmax: softmax.outputs[0]})

    def changes(number: int) -> bool:
        other = Seen(*run(replace(held, linear={number: 2 * made[number]})), seen.of)
        return not torch.equal(other.made_z[0], z)

    numbers = _numbers(path, seen.linears, without=softmax)
    return [i for i in numbers if not made[i].numel() or changes(i)]


def _together(ran: Ran, parts: list[Pieces], hidden: Tensor, run: Run) -> Pieces | None:
    """Several softmaxes as one attention, each of queries of its own, one after the other; None where they are not."""
    first, *others = parts
    more = [(of.softmax, of.reader) for of in others if of.reader is not None]
    distinct = {first.reader, *(reader for _, reader in more)}
    if None in distinct or len(distinct) < len(parts) or len({of.v for of in parts}) > 1:
        return None
    seen = Seen(*ran, replace(first, more=tuple(more)))
    if any(part.z.shape[0] != hidden.shape[0] for part in seen.parts):
        return None
    if seen.n_queries != hidden.shape[1] or not _returned_in_order(seen, run):
        return None
    verified = _verified(seen)
    return None if verified is None else _with_queries(*verified, run, hidden)


def _returned_in_order(seen: Seen, run: Run) -> bool:
    """Whether a position of what the module returns changes just where z there does."""
    made = first_tensor(seen.out)
    if made is None or made.shape[:2] != seen.z.shape[:2]:
        return False
    half = torch.rand(seen.n_queries, generator=torch.Generator().manual_seed(0)) < 0.5
    half = half.to(made.device)
    changed = torch.where(half[:, None], seen.z.flip(-1), seen.z)
    read = {number: x for number, x in seen.by_reader(changed).items() if number is not None}
    other = first_tensor(run(Substitutes(read=read))[1])
    assert other is not None
    return torch.equal((other != made).flatten(2).any(2).any(0), half)


def _reader(tape: Tape, softmax: Step, linears: list[Step]) -> int | None:
    """Which linear layer is the first to read what is made of a pattern."""
    made = {key_of(softmax.outputs[0], softmax)}
    for step in tape.steps[softmax.index + 1 :]:
        given = [key_of(x, step.made_by.get(id(x))) for x in tensors(step.args, step.kwargs)]
        if made.isdisjoint(given):
            continue
        if step.name == "linear":
            return linears.index(step)
        made |= {key_of(x, step) for x in step.outputs}
    return None


def _numbers(path: list[Step], linears: list[Step], without: Step | None = None) -> list[int]:
    """The last linear layers on a path to a tensor, but for what `without` was made of."""
    open_, found, known = [path[-1]], set(), set()
    while open_:
        step = open_.pop()
        if step is without or step.index in known:
            continue
        known.add(step.index)
        if step.name == "linear":
            found.add(linears.index(step))
        else:
            open_ += step.made_by.values()
    return sorted(found)


def _verified(seen: Seen) -> tuple[Seen, Tensor] | None:
    """With its heads and where entries stand, if z is the pattern over all pairs of positions times v."""
    known, width = pairs(seen), seen.z.shape[-1]
    if known is None or not once(known[0]) or width % known[1]:
        return None
    seen = replace(seen, of=replace(seen.of, n_heads=known[1]))
    if any(seen.made[i].shape[-1] != width for i in seen.of.v):
        if (columns := value_columns(seen)) is None:
            return None
        seen = replace(seen, of=replace(seen.of, columns={"v": columns}))
    whole = is_product(seen, known[0]) and is_whole(seen, known[0])
    return (seen, known[0]) if whole else None


def _with_queries(
    seen: Seen,
    at: Tensor,
    run: Run,
    hidden: Tensor,
) -> Pieces:
    """With the linear layers of q and k, where the scores are one product of them and else something of no q.

    Twice the queries are scores that are larger by q times k; which rows of a layer are queries, and which are
    keys, is seen of what a change of half of them changes. Where queries enter other products besides (with
    positions), the scores must be made of `hidden` through q and k alone, each head's of its own columns.
    """
    of = seen.of
    numbers = sorted(
        {i for part in seen.parts for i in _numbers(_leading_to_scores(part), seen.linears)}
    )
    sizes = [seen.shown(i).shape[2] for i in of.v]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    visible = (at >= 0) & (seen.weights > 0)
    n_pos, n_keys = seen.n_queries, sum(sizes)
    query, key = at[visible] // n_keys % n_pos, at[visible] % n_keys
    head = at[visible] // (n_keys * n_pos) % of.n_heads
    half = torch.rand(n_keys, generator=torch.Generator().manual_seed(0)).to(at.device) < 0.5
    half[[start for start, size in zip(starts, sizes, strict=True) if size]] = True  # of each sort
    eps = CLOSE.get(seen.scores.dtype, CLOSE[torch.bfloat16])

    def scaled(number: int, factor: Tensor) -> Tensor:
        """How the scores change."""
        other = Seen(*run(Substitutes({number: seen.made[number] * factor})), of)
        return (other.scores - seen.scores)[visible].double()

    def moved(number: int, rows: Tensor) -> Tensor:
        factor = 1 + rows.to(seen.made[number])
        return scaled(number, factor[:, None, None] if of.turned[0] else factor[:, None])

    def by_heads(number: int) -> bool:
        width = seen.made[number].shape[-1]
        mine = torch.arange(width, device=at.device) // (width // of.n_heads)
        changes = [scaled(number, 1 + (mine == i).to(hidden)).abs() for i in range(of.n_heads)]
        inside = [change[head == i].max() for i, change in enumerate(changes)]
        rest = torch.stack([change[head != i].sum() for i, change in enumerate(changes)])
        return bool((torch.stack(inside) > 0).all()) and not bool(rest.any())

    def plays(number: int, place: Tensor, start: int, size: int) -> bool:
        rows, inside = half[start : start + size], (place >= start) & (place < start + size)
        if seen.shown(number).shape[2] != size or size == 0:
            return seen.shown(number).shape[2] == size
        change = moved(number, rows).abs()
        rest = change[~(inside & half[place])]
        return bool(change.max() > 0) and not bool((rest > eps * change.max()).any())

    q = [i for i in numbers if plays(i, query, 0, n_pos)]
    places = list(zip(starts, sizes, strict=True))
    k = [[i for i in numbers if plays(i, key, start, size)] for start, size in places]
    if len(q) != 1 or any(len(found) != 1 for found in k):
        return of
    known = replace(seen, of=replace(of, q=(q[0],), k=tuple(found[0] for found in k)))
    change = moved(q[0], torch.ones(n_pos, device=at.device))
    if _follows(change, known, at[visible], eps):
        return known.of
    through = {id(seen.linears[i]) for i in (*known.of.q, *known.of.k)}
    whole = all(seen.made[i].numel() for i in known.of.k) and not _reads(hidden, seen, through)
    return known.of if whole and all(map(by_heads, (*known.of.q, *known.of.k))) else of


def _follows(change: Tensor, seen: Seen, at: Tensor, eps: float) -> bool:
    """Whether a change of scores is a multiple of the queries times the keys."""
    of_pairs = (seen.joined("q").double() @ seen.joined("k").double().mT).flatten()[at]
    scale = (change @ of_pairs) / (of_pairs @ of_pairs)
    return close(scale * of_pairs, change, eps)


def _of_columns(seen: Seen, at: Tensor, run: Run) -> Pieces:
    """With queries and keys that are columns of the layer of values, pooled or not, where these make the scores.

    Twice the queries must be scores that are larger by a multiple of queries times keys. Columns are tried that lie
    to each other as those of values do, and that with these are all there are.
    """
    (number,), z = seen.of.v, seen.z
    made, columns = seen.made[number], seen.of.columns["v"]
    n_pos = rows_of(made, seen.of.turned[0])[1]
    ways: Iterable[Pooling | None] = [None]
    if n_pos != seen.n_queries:
        ways = () if seen.of.turned[0] else poolings(made.shape, z.shape)
    visible = (at >= 0) & (seen.weights > 0)
    eps = CLOSE.get(seen.scores.dtype, CLOSE[torch.bfloat16])

    def larger(columns: tuple[int, ...]) -> Tensor:
        """How the scores change where these are twice as large."""
        twice = made.clone()
        twice[..., list(columns)] *= 2
        other = Seen(*run(Substitutes({number: twice})), seen.of)
        return (other.scores - seen.scores)[visible].double()

    others = _like(columns, made.shape[-1])
    if not others:
        return seen.of
    changes = {of: larger(of) for of in others}
    for pooling, (q, k) in product(ways, permutations(others)):
        by_role = {"q": q, "k": k, "v": columns}
        of = replace(seen.of, q=(number,), k=(number,), columns=by_role, pooling=pooling)
        if _follows(changes[q], replace(seen, of=of), at[visible], eps):
            return of
    return seen.of


def _like(columns: tuple[int, ...], width: int) -> list[tuple[int, ...]]:
    """The two sets of columns that are these, moved, and with these all of `width`; [] where there are none.

    >>> _like((4, 5), 6), _like((1, 4), 6), _like((0, 2), 6)
    ([(0, 1), (2, 3)], [(0, 3), (2, 5)], [])
    """
    left, found = sorted(set(range(width)) - set(columns)), list[tuple[int, ...]]()
    while left and len(found) < 2:
        moved = tuple(column - min(columns) + left[0] for column in columns)
        if not set(moved) <= set(left):
            return []
        left = sorted(set(left) - set(moved))
        found.append(moved)
    return [] if left or len(found) < 2 else found


def _reads(hidden: Tensor, seen: Seen, through: set[int]) -> bool:
    """Whether the scores are made of `hidden` in another way than through these steps."""
    open_ = [part.softmax.made_by.get(id(part.scores)) for part in seen.parts]
    known = set(through)
    while open_:
        step = open_.pop()
        if step is None or id(step) in known:
            continue
        known.add(id(step))
        if any(x is hidden for x in tensors(step.args, step.kwargs)):
            return True
        open_ += step.made_by.values()
    return any(part.scores is hidden for part in seen.parts)


def _leading_to_scores(seen: Seen) -> list[Step]:
    """The steps that the scores of an only softmax were made with."""
    return leading_to(seen.scores, seen.softmax.made_by.get(id(seen.scores)))
