"""Trials: probe forwards with one thing changed everywhere and every block's output put back.

Since each layer then reads what it read before, one forward tries all layers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from interp.models.axes import with_axes
from interp.models.calls import call_model
from interp.models.draft import Draft
from interp.models.in_parts import inside
from interp.models.layout import POSITIONS_FIRST, shown
from interp.models.recording import Recording, record
from interp.models.spec import first_tensor, with_first
from interp.models.stack import Layer, calls_of, outputs_of
from interp.run.batch import Batch


def scaled_z(
    seen: Recording, layers: list[Layer], batch: Batch
) -> tuple[list[Layer], list[Tensor]]:
    """The layers once more, every entry of every z multiplied by a number of its own; and these numbers."""
    generator = torch.Generator().manual_seed(0)
    factors = [
        either_sign(call.tensors["z"].shape, generator).to(call.tensors["z"])
        for call in seen.attention
    ]
    again = record(seen.module, batch, factors, outputs_of(layers))
    changed = []
    for layer, call in zip(layers, calls_of(again, layers), strict=True):
        within = inside(again, call, layer.members)
        own = (i for i, of in enumerate(layer.inside.attention) if of is layer.attention)
        number = next(own, 0)  # several calls seen as one have none of their own
        attention = within.attention[number] if within.attention else None
        other = Layer(layer.name, call, within, attention)
        changed.append(
            replace(other, members=layer.members, placed=layer.placed, added_to=layer.added_to)
        )
    return with_axes(changed, [layer.axes for layer in layers]), factors


def either_sign(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Numbers of size 0.5 to 1.5: an activation that lets large numbers through is no gate to negative ones."""
    numbers = 2 * torch.rand(shape, generator=generator) - 1
    return numbers + 0.5 * numbers.sign()


def roundings(dtype: torch.dtype) -> float:
    """What rounding alone changes at most, relative to the largest: little enough to see a mixer that is hardly one.

    One that is not trained may mix positions by a thousandth of what it makes of each by itself.
    """
    eps = max(torch.finfo(kind).eps for kind in (dtype, torch.float32))  # gates may be in float32
    return min(64 * eps, 1e-2)


def works_by_position(draft: Draft, branches: list[str], turned: bool = False) -> set[str]:
    """Those of the modules `branches` whose output at a position follows from the input there alone.

    They are given their input (token ids, and the stream that they add to) with the positions in reverse
    order. An MLP and routed experts return their output in reverse order; attention, a state-space layer or
    a convolution something else. `turned`: they hold channels before positions.
    """
    if not branches:
        return set()
    seen, layers, batch, key = draft.seen, draft.layers, draft.batch, draft.key
    rows, ids = layers[0].hidden(key).shape[0], batch.inputs.get("input_ids")
    first = layers[0].axes == POSITIONS_FIRST
    streams = {layer.call.inputs[layer.call.keys.index(key)].shape for layer in layers}

    def reverse(x: Tensor) -> Tensor:
        return x.flatten(2).flip(2).reshape(x.shape) if turned else _reversed(x, rows, first)

    def give_in_reverse(args: tuple, kwargs: dict) -> Any:
        done = False

        def turn(x: Any) -> Any:
            nonlocal done
            if not isinstance(x, Tensor):
                return x
            if ids is not None and torch.equal(x, ids):  # experts may be picked by token
                return x.flip(1)
            if x.is_floating_point() and (not done or x.shape in streams):
                done = True
                return reverse(x)
            return x

        args, kwargs = tuple(map(turn, args)), {name: turn(x) for name, x in kwargs.items()}
        return (args, kwargs) if done else None

    def in_reverse(got: Tensor, wanted: Tensor) -> bool:
        back, kept = reverse(got).cpu().double(), wanted.double()
        by_order = float(
            (reverse(kept) - kept).abs().max()
        )  # not what a bias makes of every position
        allowed = min(roundings(wanted.dtype) * float(kept.abs().max()), 0.1 * by_order)
        return float((back - kept).abs().max()) <= allowed

    return answering(seen, branches, batch, give_in_reverse, in_reverse)


def answering(
    seen: Recording,
    names: Iterable[str],
    batch: Batch,
    change: Callable[[tuple, dict], Any],
    expected: Callable[[Tensor, Tensor], bool],
) -> set[str]:
    """Those of these modules that answer a change of their arguments as expected, in every call.

    `expected` is given what a module returns and what it returned before; the latter goes on.
    """
    passed: dict[str, bool] = {}
    with ExitStack() as stack:
        for name in names:
            module, calls = seen.module.get_submodule(name), iter(seen.calls[name])

            def compare(module, args, output, name=name, calls=calls) -> Any:  # type: ignore[no-untyped-def]
                wanted, got = next(calls).output, first_tensor(output)
                assert wanted is not None and got is not None
                passed[name] = passed.get(name, True) and expected(got, wanted)
                return with_first(output, wanted.to(got))

            before = module.register_forward_pre_hook(
                lambda module, args, kwargs: change(args, kwargs), with_kwargs=True
            )
            stack.callback(before.remove)
            stack.callback(module.register_forward_hook(compare).remove)
        call_model(seen.module, batch)
    return {name for name, each in passed.items() if each}


def sees_no_later(seen: Recording, layers: list[Layer], batch: Batch) -> bool:
    """Whether another last token changes the last block's output at the last position alone.

    Tells causal models whose attention, if any, is not seen; False for inputs that are no tokens.
    """
    if batch.has_source or set(batch.inputs) != {"input_ids"} or batch.ids.ndim > 2:
        return False
    ids = batch.ids.clone()
    other = [next((i for i in row if i != row[-1]), row[-1]) for row in ids.tolist()]
    ids[:, -1] = torch.tensor(other).to(ids)
    again = record(seen.module, Batch.of_ids(ids))
    output = again.calls[layers[-1].returns][-1].output
    if output is None or output.shape != layers[-1].call.output.shape:  # type: ignore[union-attr]
        return False
    moved = (shown(output, layers[-1].axes, batch.size) - layers[-1].output).abs().amax((0, 2))
    allowed = 1e-3 * float(layers[-1].output.abs().max())
    return float(moved[:-1].max()) <= allowed < float(moved[-1])


def _reversed(x: Tensor, rows: int, first: bool) -> Tensor:
    """Positions in reverse order, in [batch pos width] or flattened [batch·pos width]; or they come first."""
    if first:
        return x.flip(0) if x.ndim > 2 else x.unflatten(0, (-1, rows)).flip(0).reshape(x.shape)
    if x.shape[0] == rows:
        return x.flip(1) if x.ndim > 2 else x
    return x.reshape(rows, -1, x.shape[-1]).flip(1).reshape(x.shape)
