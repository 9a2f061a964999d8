"""An nnsight model, opened as the Hugging Face module that it wraps."""

from __future__ import annotations

from typing import Any

from torch import nn

from interp.errors import BadInput, Refused


def is_nnsight(source: Any) -> bool:
    """Whether `source` is an nnsight model; does not import nnsight."""
    return any(
        cls.__name__ == "Envoy" and cls.__module__.startswith("nnsight.")
        for cls in type(source).__mro__
    )


def dispatched(source: Any, tokenizer: Any) -> tuple[nn.Module, Any]:
    """The module an nnsight model wraps and its tokenizer; a lazy one loads its weights first.

    Raises:
        BadInput: its weights cannot be loaded. Refused: what it wraps is no Hugging Face model.
    """
    if getattr(source, "dispatched", True) is False:
        from interp.models.sources.pretrained import one_line

        with one_line(str(getattr(source, "repo_id", None) or type(source).__name__)):
            source.dispatch()
    module = source._module
    if not isinstance(module, nn.Module) or not hasattr(module, "config"):
        raise Refused(
            f"this {type(source).__name__} wraps {type(module).__name__}, no Hugging Face model: only "
            "token and image models of transformers can be probed"
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        raise BadInput(
            f"the weights of this {type(source).__name__} are not here (meta tensors): dispatch it, or "
            "run it on NDIF with interp.load(model, remote=True)"
        )
    return module, getattr(source, "tokenizer", None) if tokenizer is None else tokenizer
