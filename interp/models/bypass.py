"""Whether anything but the next block reads what a block returned: the end of another stage, say."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from interp.models.calls import call_model, output_tensor
from interp.models.recording import Recording
from interp.models.spec import first_tensor, with_first
from interp.models.stack import Layer
from interp.models.verify import relative_error, relative_tolerance
from interp.run.batch import Batch


def read_besides(seen: Recording, layers: list[Layer], key: int | str, batch: Batch) -> bool:
    """Whether the model, or its last block, returns something else when every other block returns another stream.

    Each block reads what it read before, so that only what goes other ways can tell.
    """
    inputs: dict[tuple[str, str], list[Tensor]] = {}
    for layer in layers:
        given = layer.call.inputs[layer.call.keys.index(key)]
        inputs.setdefault((layer.name, layer.returns), []).append(given)
    left, last_made = len(layers), torch.empty(0)

    with ExitStack() as stack:
        for (first, last), values in inputs.items():
            turns = iter(values)

            def put(module: nn.Module, args: tuple, kwargs: dict, turns: Any = turns) -> Any:
                if isinstance(key, str):
                    return args, {**kwargs, key: next(turns).to(kwargs[key])}
                return (*args[:key], next(turns).to(args[key]), *args[key + 1 :]), kwargs

            def other(module: nn.Module, args: tuple, output: Any) -> Any:
                nonlocal left, last_made
                left -= 1
                made = first_tensor(output)
                if made is None or left:
                    return None if made is None else with_first(output, made.flip(-1))
                last_made = made
                return None

            reads, returns = seen.module.get_submodule(first), seen.module.get_submodule(last)
            stack.callback(reads.register_forward_pre_hook(put, with_kwargs=True).remove)
            stack.callback(returns.register_forward_hook(other).remove)
        made = output_tensor(call_model(seen.module, batch))
    end = layers[-1].call.output
    assert end is not None
    pairs = ((made, seen.output), (last_made.cpu(), end))
    return any(relative_error(a, b)[0] > relative_tolerance(b.dtype) for a, b in pairs)
