"""A layer that attends several times, its calls seen as one attention: heads side by side, or wider heads.

Calls of one layer with the very same queries and keys mix different values with one pattern: they are one
attention whose heads are as many times wider (differential attention). Calls with patterns of their own
are so many heads more, those of the first call first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from interp.errors import BadInput
from interp.models.block_map import Aside, BlockMap
from interp.models.layout import require_between_seen
from interp.models.placed import Placed
from interp.models.recording import AttentionCall, Recording
from interp.run.edits import Edit, Seen

HEADS, WIDTH = "n_heads", "d_head"


@dataclass(frozen=True)
class Part:
    """Which of a layer's attentions it is, and what these lie side by side along: heads, or their width.

    `place`: which parts of the input it is of, where several calls make one attention or parts see each other;
    `first`: no call of the layer comes before it.
    """

    index: int
    count: int
    along: str
    place: Placed | None = None
    first: bool = True

    def axis(self, name: str) -> int | None:
        """The axis of a site [batch pos heads d_head] or [batch heads query key]; None where calls agree."""
        of_rows = name.endswith(("scores", "pattern"))
        if self.along == HEADS:
            return 1 if of_rows else 2
        return 3 if name.endswith(("v", "z")) else None

    def among(self, name: str, x: Tensor) -> Tensor:
        """The whole layer's site, of which x is this call's part: NaN where another call computes it."""
        axis = self.axis(name)
        if self.place is not None:
            return self.place.among(self.place.unknown(name, x, self.count), name, x)
        if axis is None:
            return x
        unknown = torch.full_like(x, torch.nan)
        return torch.cat([x if i == self.index else unknown for i in range(self.count)], axis)

    def mine(self, name: str, whole: Tensor, x: Tensor) -> Tensor:
        """The inverse: this call's part of the whole, in the shape of x."""
        axis = self.axis(name)
        if self.place is not None:
            return self.place.mine(whole, name, x)
        return (
            whole if axis is None else whole.narrow(axis, self.index * x.shape[axis], x.shape[axis])
        )

    def edited(self, edit: Edit, x: Tensor, seen: Seen, name: str) -> Tensor:
        """x after an edit of the whole layer, of which x is this call's part.

        The parts of the other calls are not known yet, or already used: the edit sees NaN there.

        Raises:
            BadInput: it makes something else of x where these parts are other numbers.
        """
        whole, state = self.among(name, x), torch.get_rng_state()
        edited, unknown = edit(whole, seen), whole.isnan()
        new = self.mine(name, edited, x)
        if self.place is not None and not bool(new.isnan().any()):
            taken = self.among(name, new)
            require_between_seen(
                edited.where(~unknown, 0.0), taken.where(~unknown, 0.0), f"'{name}.{seen.layer}'"
            )
        alone = not bool(new.isnan().any()) or bool(x.isnan().any())
        if (
            alone and edit.kind == "apply" and bool(unknown.any())
        ):  # a comparison with NaN swallows it
            large = 2 * x.nan_to_num(0.0, 0.0, 0.0).abs().amax() + 1
            with torch.random.fork_rng(devices=[]):
                for other in (large, -large):
                    torch.set_rng_state(state)
                    again = edit(torch.where(unknown, other, whole), seen)
                    alone = alone and torch.equal(
                        self.mine(name, again, x).nan_to_num(), new.nan_to_num()
                    )
        if not alone:
            raise BadInput(
                f"the edit of '{name}.{seen.layer}' mixes what several attention calls of this layer "
                "compute one after the other; change what each of them computes by itself"
            )
        return new

    def joined(self, name: str, before: Callable[[], Tensor], x: Tensor) -> Tensor:
        """What is kept of the layer once this call is seen: the earlier calls' parts and x."""
        axis = self.axis(name)
        if self.place is not None:
            known = self.place.unknown(name, x, self.count) if self.first else before()
            return self.place.among(known.to(x.device), name, x)
        if axis is None or self.index == 0:
            return x
        return torch.cat([before(), x.to(before().device)], axis)

    def spread(self, pattern: Tensor) -> Tensor:
        """A pattern among the heads and parts of the whole layer, 0 for those of the other calls."""
        if self.place is not None:
            nothing = torch.zeros_like(self.place.unknown("pattern", pattern, self.count))
            return self.place.among(nothing, "pattern", pattern)
        if self.along != HEADS:
            return pattern
        heads = pattern.shape[1]
        new = pattern.new_zeros(pattern.shape[0], self.count * heads, *pattern.shape[2:])
        new.narrow(1, self.index * heads, heads).copy_(pattern)
        return new


def seen_as_one(calls: Sequence[AttentionCall]) -> tuple[AttentionCall, str] | None:
    """The attention that several calls of one layer are together, and along what; None if they are not."""
    first = calls[0].tensors
    shapes = {tuple(call.tensors[name].shape for name in ("q", "k", "v", "z")) for call in calls}
    if len(shapes) > 1:
        return None
    agree = all(
        torch.equal(call.tensors[name], first[name]) for call in calls for name in ("q", "k")
    )
    along = WIDTH if agree else HEADS
    axes = {"v": 3, "z": 3} if agree else {"q": 1, "k": 1, "v": 1, "z": 2}
    tensors = dict(first)
    for name, axis in axes.items():
        tensors[name] = torch.cat([call.tensors[name] for call in calls], axis)
    rows = [torch.cat(call.rows, 2) for call in calls]
    rows = rows[:1] if agree else [torch.cat(rows, 1)]
    joined = AttentionCall(calls[0].module, calls[-1].order, None, tensors, rows)
    return joined, along


Called = tuple[str, str | None, Part | None]
"""(module, prefix of its sites, part of its layer's attention) of an attention call; the prefix is None at no site."""


def attention_calls(block: BlockMap) -> list[Called]:
    """The attention calls of a block that are at sites, those of one module in their order; and where such a module
    makes calls that write to another stream besides, these among them."""
    calls = list(_at_sites(block))
    for aside in block.asides:
        mine = [i for i, (name, _, _) in enumerate(calls) if name == aside.attention]
        if mine:
            at = mine[aside.number] if aside.number < len(mine) else len(calls)
            calls.insert(at, (aside.attention, None, None))
    return calls


def _at_sites(block: BlockMap) -> Iterator[Called]:
    names = block.attends or ((block.attention,) if block.attention else ())
    if block.placed:
        count = 1 + block.placed[-1].index
        for i, (name, place) in enumerate(zip(names, block.placed, strict=True)):
            yield name, "", Part(place.index, count, block.along or HEADS, place, first=i == 0)
    elif block.attends:
        for index, name in enumerate(names):
            yield name, "", Part(index, len(names), block.along, first=index == 0)
    elif block.attention:
        yield block.attention, "", None
    for prefix, cross in block.sources:
        yield cross.attention, prefix, None


def asides_of(seen: Recording, calls: Sequence[AttentionCall]) -> tuple[Aside, ...]:
    """Attention calls of a block, in which `seen` happened, that write to another stream: by their modules."""
    number = {id(call): n for n, call in _numbered(seen.attention)}
    return tuple(Aside(seen.names[call.module], number[id(call)]) for call in calls)


def calls_aside(seen: Recording, asides: Sequence[Aside]) -> tuple[AttentionCall, ...]:
    """The inverse."""
    numbered = _numbered(seen.attention)
    return tuple(call for n, call in numbered if Aside(seen.names[call.module], n) in asides)


def _numbered(calls: Sequence[AttentionCall]) -> Iterator[tuple[int, AttentionCall]]:
    """Each call, and how many its module made before."""
    made: Counter[nn.Module] = Counter()
    for call in calls:
        yield made[call.module], call
        made[call.module] += 1
