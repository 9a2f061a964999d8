"""How a model calls its blocks: what they are given beside the hidden state, recorded from a pass over one prompt."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import Cache

from circuits.columns import Columns
from interp.models.attention import Watch, window
from interp.models.calls import call_model
from interp.models.model import Model
from interp.run.batch import Batch


@dataclass(frozen=True)
class Call:
    """How the model calls a block (beside the hidden state), and what its attention module returns."""

    args: tuple
    kwargs: dict[str, Any]
    attention: Any


def recorded_calls(model: Model, ids: Int[Tensor, "1 pos"], columns: Columns) -> list[Call]:
    """The call of every block in a pass over one prompt's tokens at `columns`, at their positions."""
    places = torch.tensor([columns], device=ids.device)
    batch = Batch({"input_ids": ids[:, list(columns)], "position_ids": places})
    seen: list[tuple[tuple, dict]] = []
    outputs: dict[nn.Module, Any] = {}
    modules = [
        None if block.attention is None else model.module.get_submodule(block.attention)
        for block in model.spec.blocks
    ]
    with ExitStack() as stack:
        for block, attention in zip(model.blocks, modules, strict=True):
            hook = block.register_forward_pre_hook(
                lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
            )
            stack.callback(hook.remove)
            if attention is not None:
                after = attention.register_forward_hook(
                    lambda m, args, output: outputs.__setitem__(m, output)
                )
                stack.callback(after.remove)
        stack.enter_context(window(model.module, lambda m: Watch()))
        call_model(model.module, batch, model.spec.first_position)
    return [
        # A key/value cache that the model made for itself would grow with every call.
        Call(
            args,
            {name: None if isinstance(x, Cache) else x for name, x in kwargs.items()},
            None if attention is None else outputs[attention],
        )
        for (args, kwargs), attention in zip(seen, modules, strict=True)
    ]
