"""A model that is already in memory: watched where it is, never moved or cast."""

from __future__ import annotations

from typing import Any

from interp.errors import BadInput
from interp.models.sources.base import Loaded
from interp.models.sources.bridge import is_bridge, load_bridge
from interp.models.sources.nnsight_model import dispatched, is_nnsight
from interp.models.sources.pretrained import with_padding


def load_live(module: Any, *, tokenizer: Any, **asked: Any) -> Loaded:
    """The module itself, switched to eval mode (dropout off), with the tokenizer passed."""
    from torch import nn

    if is_nnsight(module):
        module, tokenizer = dispatched(module, tokenizer)
    if not isinstance(module, nn.Module):
        raise BadInput(
            f"cannot load a {type(module).__name__}; wanted a model name, a path or an nn.Module"
        )
    for name, value in asked.items():
        if value:
            raise BadInput(
                f"{name}={value!r} was given with a live module, which is not changed here; "
                "call .to(...) on it first, and leave this out"
            )
    notes = (
        ("the module was in training mode; switched to eval (dropout off)",)
        if module.training
        else ()
    )
    if is_bridge(module):
        return load_bridge(module, tokenizer=tokenizer)
    name = getattr(getattr(module, "config", None), "_name_or_path", "") or type(module).__name__
    return Loaded(module.eval(), with_padding(tokenizer), name, "live", notes=notes)
