"""Attention that a module computes itself: a product of queries and keys, a softmax, a product with values.

Models that do not call the attention interface compute z in their own code, with matrix products or
with PyTorch's SDPA. While such a module runs, a `Tape` keeps what it computes; at the product of a
pattern with values everything is known that the interface is called with, and a `Watch` is shown it. What
the watch changes is put in place by computing again the steps that depend on it, with the module's
own functions; where it changes nothing, nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.factors import Found, factor_of
from interp.models.forwards import other_forwards
from interp.models.pieces import pieces, watched
from interp.models.tape import (
    KERNEL,
    PRODUCTS,
    Tape,
    is_product,
    key_of,
    softmax_of_rows,
    two_factors,
)

if TYPE_CHECKING:
    from interp.models.attention import Watch

own: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Modules that compute attention themselves, and how many heads: some fold them into the batch."""
beside_interface: WeakSet[nn.Module] = WeakSet()
"""Those of models whose other modules call the attention interface."""


@contextmanager
def own_attention_shown(
    modules: Iterable[nn.Module],
    watch_of: Callable[[nn.Module], Watch],
    kernel: Callable[..., Tensor],
) -> Iterator[None]:
    """Inside, each call of these modules shows its attention to a watch.

    `kernel` computes, with a watch, what PyTorch's SDPA computes.
    """
    forwards = {
        module: partial(watched, module, module.forward, watch_of)
        if module in pieces
        else partial(_watched, module, module.forward, watch_of, kernel)
        for module in modules
    }
    with other_forwards(forwards):
        yield


def _watched(
    module: nn.Module,
    forward: Callable[..., Any],
    watch_of: Callable[[nn.Module], Watch],
    kernel: Callable[..., Tensor],
    *given: Any,
    **named: Any,
) -> Any:
    seen = 0

    def attended(tape: Tape, name: str, function: Any, args: tuple, kwargs: dict) -> Any:
        nonlocal seen
        found = None if name == KERNEL else found_at(tape, name, args, kwargs, n_heads=own[module])
        if found is None and name != KERNEL:
            layer = _layer(module, args) if name == "linear" and tape.in_parts else None
            return function(*args, **kwargs) if layer is None else layer(args[0])
        seen += 1
        if found is None:
            return kernel(watch_of(module), *args, **kwargs)
        return _attend(watch_of(module), found, partial(_product, function, args, kwargs, found))

    with Tape(attended) as tape:
        out = forward(*given, **named)
    if (
        tape.steps and not seen
    ):  # an edit would be left out without a word; what is skipped computes nothing
        raise Refused(
            f"{type(module).__name__} did not attend as it did on the probe: on inputs of "
            "this kind (longer ones, perhaps) it computes attention in another way"
        )
    return out


def _layer(module: nn.Module, args: tuple) -> nn.Linear | None:
    """The linear layer of a module of whose weights a function makes use without calling the layer.

    Called in its place, it is seen, and may be hooked, as W_O of other models is.
    """
    layers = (part for part in module.modules() if isinstance(part, nn.Linear))
    same = (x for x in layers if len(args) == 3 and x.weight is args[1] and x.bias is args[2])
    return next(same, None)


def found_at(
    tape: Tape, name: str, args: tuple, kwargs: dict, n_rows: int = 0, n_heads: int = 0
) -> Found | None:
    """The attention whose z this call is; folded heads are told apart by the number of rows or of heads."""
    factors = two_factors(name, args, kwargs) if name in PRODUCTS else None
    if factors is None:
        return None
    weights, values = factors
    if weights.ndim not in (3, 4) or values.ndim not in (3, 4):
        return None
    after = tape.origin(weights, softmax_of_rows)
    if after is None:
        return None
    softmax = after[0]
    scores = softmax.args[0] if softmax.args else softmax.kwargs["input"]
    if scores.ndim not in (3, 4):  # chunks of queries have an axis of their own: `pieces`
        return None
    steps = tape.origin(scores, is_product, softmax.made_by.get(id(scores))) or []
    folds = [x for step in [*steps, *after] for x in step.outputs if x.ndim == 4]
    folds = [x for x in folds if x.shape[-2:] == weights.shape[-2:]]
    if folds:
        n_rows, n_heads = folds[0].shape[:2]
    elif n_heads:
        n_rows = weights.shape[0] // n_heads
    elif n_rows:
        n_heads = weights.shape[0] // n_rows
    if n_rows * n_heads * weights.shape[-2] * weights.shape[-1] != weights.numel():
        return None
    if values.shape[0] % n_rows or (values.ndim == 4 and values.shape[0] != n_rows):
        return None
    found = Found(tape, weights, values, after, n_rows, n_heads)
    if not steps or steps[0].outputs[0].shape[-2:] != weights.shape[-2:]:
        return found
    left, right = steps[0].factors() or (weights, values)
    q = factor_of(found, left, steps[0], turned=False)
    k = factor_of(found, right, steps[0], turned=True)
    return found if q is None or k is None else replace(found, q=q, k=k)


def first_step(found: Found) -> int:
    """The first step of this attention: what holds it is running by then."""
    makers = [factor.maker for factor in (found.q, found.k) if factor and factor.maker]
    return min(step.index for step in [found.after[0], *makers])


def _attend(watch: Watch, found: Found, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """z as the module has it, its parts shown to `watch` and what it changes put in place."""
    tape, softmax = found.tape, found.after[0]
    values: dict[tuple[int, int], Tensor] = {}
    v = found.by_head(found.values)
    if found.q is None or found.k is None:  # as many as there are, and nothing to see of them
        q = v.new_empty(found.n_rows, found.n_heads, found.weights.shape[-2], 0)
        q, k, new_v = watch.inputs(q, v.new_empty(*v.shape[:3], 0), v)
    else:
        factors = (found.q, found.k)
        q, k = (factor.shown(found) for factor in factors)
        new_q, new_k, new_v = watch.inputs(q, k, v)
        for factor, shown, new in zip(factors, (q, k), (new_q, new_k), strict=True):
            if not _same(new, shown, factor.x):
                values[key_of(factor.x, factor.maker)] = factor.held(new)
        if values:
            tape.again(min(index for index, _ in values), values)
    made_by = softmax.made_by.get(id(found.scores))
    scores = values.get(key_of(found.scores, made_by), found.scores)
    if watch.needs_rows:
        shown = found.by_head(scores)
        changed = watch.scores(shown, 0)
        if not _same(changed, shown, scores):
            tape.redo(softmax, {id(found.scores): changed.reshape(scores.shape)}, values)
            tape.again(softmax.index, values)
    weights = values.get(key_of(found.weights, found.after[-1]), found.weights)
    if watch.needs_rows:
        shown = found.by_head(weights)
        changed = watch.pattern(shown, 0)
        weights = weights if _same(changed, shown, weights) else changed.reshape(weights.shape)
    same = _same(new_v, v, found.values)
    z = product(weights, found.values if same else new_v.reshape(found.values.shape))
    shown = found.by_head(z).transpose(1, 2)
    changed = watch.z(shown)
    z = z if _same(changed, shown, z) else changed.transpose(1, 2).reshape(z.shape)
    return z.clone()  # some modules add to it in place


def _same(new: Tensor, shown: Tensor, old: Tensor) -> bool:
    """Whether what a watch was shown of a tensor goes on as it was: with gradients, only the very tensor."""
    return new is shown and (shown is old or not torch.is_grad_enabled())


def _product(
    function: Callable[..., Tensor],
    args: tuple,
    kwargs: dict,
    found: Found,
    weights: Tensor,
    values: Tensor,
) -> Tensor:
    """The product of another pattern with other values."""
    new = {id(found.weights): weights, id(found.values): values}
    args = tuple(new.get(id(x), x) for x in args)
    return function(*args, **{name: new.get(id(x), x) for name, x in kwargs.items()})
