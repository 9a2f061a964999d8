"""Whether anything but the next block reads what a block returned: the end of another stage, say."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from interp.models.calls import call_model, output_tensor
from interp.models.recording import Recording
from interp.models.relative import relative_error, relative_tolerance
from interp.models.spec import first_tensor, with_first
from interp.models.stack import Layer
from interp.run.batch import Batch


def read_besides(
    seen: Recording, layers: list[Layer], key: int | str, batch: Batch, starts: list[int]
) -> bool:
    """Whether something else becomes of the model, of its last block or of a later stage when blocks return another
    stream, each reading what it read before: only what goes other ways can tell.

    `starts`: the layers that a stage begins with. Of what such a layer would have read, the one before it alone
    may tell.
    """
    made, last_made, _ = _with_other_streams(seen, layers, key, batch)
    end = layers[-1].call.output
    assert end is not None
    pairs = [(made, seen.output), (last_made, end)]
    for start in starts:
        given = _with_other_streams(seen, layers, key, batch, but=start - 1)[2][start]
        pairs.append((given, _read(layers[start], key)))
    return any(relative_error(a, b)[0] > relative_tolerance(b.dtype) for a, b in pairs)


def _with_other_streams(
    seen: Recording, layers: list[Layer], key: int | str, batch: Batch, but: int | None = None
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """What the model and its last block return, and what each layer would have read, where every other block returns
    its stream with the channels in reverse, and reads what it read before. The layer `but` returns what it did.
    """
    calls: dict[tuple[str, str], list[int]] = {}
    for i, layer in enumerate(layers):
        calls.setdefault((layer.name, layer.returns), []).append(i)
    last_made, given = torch.empty(0), {}

    with ExitStack() as stack:
        for (first, last), of in calls.items():
            reading, returning = iter(of), iter(of)

            def put(module: nn.Module, args: tuple, kwargs: dict, reading: Any = reading) -> Any:
                i = next(reading)
                now = kwargs[key] if isinstance(key, str) else args[key]
                given[i] = now.cpu()
                before = _read(layers[i], key).to(now)
                if isinstance(key, str):
                    return args, {**kwargs, key: before}
                return (*args[:key], before, *args[key + 1 :]), kwargs

            def other(module: nn.Module, args: tuple, output: Any, of: Any = returning) -> Any:
                nonlocal last_made
                i, made = next(of), first_tensor(output)
                if made is not None and i == len(layers) - 1:
                    last_made = made.cpu()
                elif made is not None and i != but:
                    return with_first(output, made.flip(-1))
                return None

            reads, returns = seen.module.get_submodule(first), seen.module.get_submodule(last)
            stack.callback(reads.register_forward_pre_hook(put, with_kwargs=True).remove)
            stack.callback(returns.register_forward_hook(other).remove)
        made = output_tensor(call_model(seen.module, batch))
    return made, last_made, given


def _read(layer: Layer, key: int | str) -> Tensor:
    """What a layer read as its stream in the recording."""
    return layer.call.inputs[layer.call.keys.index(key)]
