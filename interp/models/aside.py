"""Attention of a block that writes to something else than its stream: to another one that the block returns besides.

A decoder of masks attends in both directions: tokens to the image, and the image to the tokens. Its residual stream
is the one that blocks return first and read again (the tokens'); what the image's attention writes goes to the other,
which later blocks attend to. Such a call is no attention of the stream, and not one with the others of its block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from interp.models.attention import window
from interp.models.calls import FAILURES, call_model
from interp.models.recording import AttentionCall, Recording
from interp.models.relative import relative_error, relative_tolerance
from interp.models.several import HEADS
from interp.models.spec import first_tensor
from interp.models.stack import Layer, with_cross
from interp.models.trials import either_sign
from interp.run.batch import Batch


def with_asides(seen: Recording, layers: list[Layer], key: int | str, batch: Batch) -> list[Layer]:
    """The layers, attention that writes to another stream told apart where that leaves one attention of the stream.

    Tried where a block returns several things and its calls are not one attention as they are, or what it attends to
    is as long as its stream and may be such another one, which attends to itself.
    """
    some = [
        i
        for i, layer in enumerate(layers)
        if layer.call.is_tuple
        and not layer.members
        and len(layer.inside.attention) > 1
        and (
            layer.attention is None
            or layer.along == HEADS
            or len(layer.crosses) > 1
            or any(
                call.tensors["k"].shape[2] == layer.hidden(key).shape[1] for call in layer.crosses
            )
        )
    ]
    if not some:
        return layers
    made = list(layers)
    given = _arguments(seen, {layers[i].name for i in some}, batch)
    for i in some:
        turn = [layer.name for layer in layers[:i]].count(layers[i].name)
        found: tuple[AttentionCall, ...] = ()
        with suppress(*FAILURES):  # a block that cannot be called by itself: its heads stay refused
            found = _asides(seen, layers[i], *given[layers[i].name][turn])
        other = with_cross(replace(layers[i], asides=found), key)
        if found and other.attention is not None:
            made[i] = other
    return made


def _arguments(seen: Recording, names: set[str], batch: Batch) -> dict[str, list[tuple]]:
    """What each of these blocks is called with in a forward under the window, call by call: (arguments, keywords)."""
    given: dict[str, list[tuple]] = {name: [] for name in names}
    with ExitStack() as stack:
        for name in names:

            def keep(module: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
                given[name].append((args, kwargs))

            hook = seen.module.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(window(seen.module, AttentionCall))
        call_model(seen.module, batch)
    return given


def _asides(seen: Recording, layer: Layer, args: tuple, kwargs: dict) -> tuple[AttentionCall, ...]:
    """The calls whose heads change nothing of the stream that a block returns, but something that it returns besides.

    The block is called by itself, on what it was given, with one call's z multiplied by numbers of either sign: once
    for each. () where it does not return again what it returned.
    """
    block, calls = seen.module.get_submodule(layer.name), layer.inside.attention
    generator = torch.Generator().manual_seed(0)

    def returned(scaled: int | None) -> list[Tensor]:
        count = 0

        def listen(module: nn.Module) -> AttentionCall:
            nonlocal count
            call, z = AttentionCall(module), calls[count].tensors["z"]
            if count == scaled:
                call.factor = either_sign(z.shape, generator).to(z)
            count += 1
            return call

        with torch.no_grad(), window(seen.module, listen):
            made = block(*args, **kwargs)
        return list(_tensors(made))

    plain = returned(None)
    recorded = layer.call.output
    assert recorded is not None
    again = relative_error(plain[0], recorded)[0] <= relative_tolerance(recorded.dtype)
    if not again or len(plain) < 2:
        return ()
    found = []
    for number, call in enumerate(calls):
        stream, *besides = returned(number)
        unmoved = torch.equal(stream, plain[0])
        if unmoved and not all(map(torch.equal, besides, plain[1:])):
            found.append(call)
    return tuple(found)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors that a module returned, its stream's first."""
    first = first_tensor(value)
    if first is not None:
        yield first
    yield from (x for x in _flat(value) if x is not first)


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _flat(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _flat(part)
