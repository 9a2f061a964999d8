"""Products of matrices written as einsum: the same product with its axes in order, so that it is seen as one."""

from __future__ import annotations

from torch import Tensor


def is_batched_product(args: tuple) -> bool:
    """Whether a call of einsum is, for every row and head, the product of two matrices.

    >>> p, v = torch.zeros(2, 4, 5, 6), torch.zeros(6, 2, 4, 3)
    >>> is_batched_product(("bnij,jbnd->ibnd", p, v)), is_batched_product(("bnij->ijbn", p))
    (True, False)
    >>> is_batched_product(("bhqk,bhkd->bhqd", [p, p.mT]))
    True
    """
    args = _operands(args)
    if len(args) != 3 or not isinstance(args[0], str) or args[0].count("->") != 1:
        return False
    if not all(isinstance(x, Tensor) and x.ndim == 4 for x in args[1:]):
        return False
    left, right, out = _axes(args[0])
    distinct = all(len(set(names)) == len(names) == 4 for names in (left, right, out))
    return distinct and [
        len(set(left) & set(right) & set(out)),
        len((set(left) & set(right)) - set(out)),
        len((set(left) & set(out)) - set(right)),
        len((set(right) & set(out)) - set(left)),
    ] == [2, 1, 1, 1]


def batched_product(args: tuple) -> Tensor:
    """What such an einsum returns, made by reordering axes and one product of matrices.

    >>> p, v = torch.rand(2, 4, 5, 6), torch.rand(6, 2, 4, 3)
    >>> torch.allclose(batched_product(("bnij,jbnd->ibnd", p, v)), torch.einsum("bnij,jbnd->ibnd", p, v))
    True
    """
    args = _operands(args)
    left, right, out = _axes(args[0])
    both = [axis for axis in left if axis in right and axis in out]
    (summed,) = set(left) & set(right) - set(out)
    (row,), (column,) = set(left) - set(right), set(right) - set(left)
    product = _reordered(args[1], left, [*both, row, summed]) @ _reordered(
        args[2], right, [*both, summed, column]
    )
    return _reordered(product, [*both, row, column], list(out))


def _operands(args: tuple) -> tuple:
    """The equation and its operands, which may be given as a list."""
    listed = len(args) == 2 and isinstance(args[1], (list, tuple))
    return (args[0], *args[1]) if listed else args


def _axes(equation: str) -> tuple[str, str, str]:
    inputs, out = equation.replace(" ", "").split("->")
    left, _, right = inputs.partition(",")
    return left, right, out


def _reordered(x: Tensor, axes: str | list[str], wanted: list[str]) -> Tensor:
    order = [list(axes).index(axis) for axis in wanted]
    return x if order == sorted(order) else x.permute(order)
