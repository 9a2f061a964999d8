"""Queries and keys of attention that a module computes itself: what its scores depend on through them alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from interp.models.tape import Step, Tape, earlier, only_through, swapped, tensors

PRIME = 65521
"""Entries are told apart by their number modulo this: exact in float32, and no axis is as long."""


@dataclass(frozen=True)
class Factor:
    """Queries or keys, [.. pos d_head] or, as the product has keys, [.. d_head pos]; and the step that made them.

    `order` makes [batch heads pos d_head] of four axes in another order.
    """

    x: Tensor
    maker: Step | None
    turned: bool
    order: tuple[int, ...] | None = None

    def shown(self, found: Found) -> Tensor:
        """[batch heads pos d_head]."""
        if self.order is not None:
            return self.x.permute(self.order)
        return found.by_head(self.x.mT if self.turned else self.x)

    def held(self, new: Tensor) -> Tensor:
        """The inverse."""
        if self.order is not None:
            return new.permute(tuple(torch.tensor(self.order).argsort().tolist()))
        return (new.mT if self.turned else new).reshape(self.x.shape)


@dataclass(frozen=True)
class Found:
    """The product of a pattern with values that is about to be formed, and how its pattern was made.

    `after` are the steps from the softmax to the pattern. q and k are None where the scores depend on what
    they are made of in another way besides.
    """

    tape: Tape
    weights: Tensor
    values: Tensor
    after: list[Step]
    n_rows: int
    n_heads: int
    q: Factor | None = None
    k: Factor | None = None

    @property
    def scores(self) -> Tensor:
        """What the softmax was given."""
        softmax = self.after[0]
        return softmax.args[0] if softmax.args else softmax.kwargs["input"]

    def by_head(self, x: Tensor) -> Tensor:
        """[batch heads rows columns] of a tensor that may have its heads folded into the batch."""
        return x if x.ndim == 4 else x.unflatten(0, (self.n_rows, -1))


def factor_of(found: Found, x: Tensor, product: Step, turned: bool) -> Factor | None:
    """Where the scores depend on queries or keys through one tensor alone: at the product, or a few steps before it.

    (In DeBERTa keys enter the product, and products with positions besides.)
    """
    between: list[Step] = []
    for given, maker in earlier(x, product.made_by.get(id(x))):
        as_read = _in_same_order(given, x, between)
        as_shown = turned and not as_read and _in_same_order(given, x.mT, between, turned=True)
        order = None if as_read or as_shown else _order(found, given, x, between, turned)
        if order is None and (given.ndim not in (3, 4) or given.shape[0] % found.n_rows):
            return None
        reached = as_read or as_shown or order is not None
        if reached and only_through(found.tape, given, maker, found.after[0]):
            return Factor(given, maker, turned and as_read, order)
        if maker is not None:
            between.append(maker)
    return None


def _in_same_order(given: Tensor, x: Tensor, between: list[Step], turned: bool = False) -> bool:
    """Whether steps that made x of `given` (the last one first) left its entries where they are."""
    if given.shape != x.shape or (turned and not between):
        return False
    if not between:
        return True
    numbers = _numbers(given)
    made = _through(between, numbers)
    return _proportional(made.mT if turned else made, numbers)


def _order(
    found: Found, given: Tensor, x: Tensor, between: list[Step], turned: bool
) -> tuple[int, ...] | None:
    """The order of axes in which steps made x of `given`, to which they may have added the same everywhere."""
    if given.ndim != 4 or x.ndim != 4 or not between:
        return None
    numbers = _numbers(given)
    made = _through(between, numbers) - _through(between, torch.zeros_like(numbers))
    made = made.mT if turned else made
    return next(
        (
            order
            for order in permutations(range(4))
            if numbers.permute(order).shape == made.shape
            and _proportional(made, numbers.permute(order))
        ),
        None,
    )


def _numbers(like: Tensor) -> Tensor:
    numbers = torch.arange(like.numel(), device=like.device) % PRIME
    return numbers.float().reshape(like.shape)


def _through(steps: list[Step], made: Tensor) -> Tensor:
    """What these steps (the last one first) make of another tensor."""
    for step in reversed(steps):
        old = next(x for x in tensors(step.args, step.kwargs) if x.numel() == made.numel())
        made = step.function(
            *swapped(step.args, {id(old): made}), **swapped(step.kwargs, {id(old): made})
        )
    return made


def _proportional(made: Tensor, numbers: Tensor) -> bool:
    """Whether they are numbers times a factor, to a tenth of the distance between two."""
    at = numbers.flatten().argmax()
    scale = made.flatten()[at] / numbers.flatten()[at].clamp_min(1)
    return bool(((made - scale * numbers).abs() <= 0.1 * scale.abs()).all())
