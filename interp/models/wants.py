"""Inputs that a forward cannot do without, each as the layer wants it that was given None in its place.

Names tell nothing here: a linear layer says how many numbers a position has, an embedding that whole
numbers are looked up, a convolution how many channels there are. An input belongs to the first parameter
with which the forward comes further, to another layer without input or to its end.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from interp.models.calls import FAILURES, call_model, output_tensor
from interp.models.spec import module_device
from interp.run.batch import Batch

FRAMES = 40
"""Of what a convolution reads beside the main input."""
MOST = 6
"""Inputs that are found so, at most."""
LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d)


def told_by_layers(
    module: nn.Module, inputs: dict[str, Tensor], main: str
) -> dict[str, Tensor] | None:
    """The inputs with those besides that make the forward work; None where layers do not tell them.

    Args:
        main: the name of the input whose axes, [row pos ...], the others follow.
    """
    parameters = inspect.signature(type(module).forward).parameters
    unset = [name for name, p in parameters.items() if p.default in (None, p.empty)]
    unset = [name for name in unset if name not in ("self", "kwargs", *inputs)]
    required = [name for name in unset if parameters[name].default is parameters[name].empty]
    layer, given = _without_input(module, inputs, required), dict(inputs)
    for _ in range(MOST):
        if layer is None:
            return None
        for name in unset:
            tried = {**given, name: _wanted(layer, given[main])}
            after = _without_input(module, tried, required)
            if after is not layer and (after is not None or _works(module, tried)):
                break
        else:
            return None
        layer, given = after, tried
        if layer is None:
            return given
    return None


def _wanted(layer: nn.Module, main: Tensor) -> Tensor:
    """Numbers as a layer takes them, of as many rows and positions as the main input has."""
    generator = torch.Generator().manual_seed(3)
    positions = main.shape[:-1] if main.ndim > 2 else main.shape
    if isinstance(layer, nn.Embedding):
        if main.is_floating_point() and main.ndim == 2:  # of waves: one for a row
            positions = (main.shape[0], 1)
        places = torch.arange(positions[-1]) % layer.num_embeddings
        return places.expand(positions).clone()
    assert isinstance(layer, (nn.Linear, nn.Conv1d))
    shape = (
        (*positions, layer.in_features)
        if isinstance(layer, nn.Linear)
        else (main.shape[0], layer.in_channels, FRAMES)
    )
    return torch.randn(shape, generator=generator).to(layer.weight.dtype)


def _without_input(
    module: nn.Module, inputs: dict[str, Tensor], required: list[str]
) -> nn.Module | None:
    """The layer at which the forward fails for want of its input; None where it works, or fails otherwise."""
    wanting: list[nn.Module] = []

    def enter(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if args and args[0] is None:
            wanting.append(layer)

    hooks = [
        layer.register_forward_pre_hook(enter)
        for layer in module.modules()
        if isinstance(layer, LAYERS)
    ]
    try:
        _call(module, inputs, required)
    except FAILURES:
        return wanting[-1] if wanting else None
    finally:
        for hook in hooks:
            hook.remove()
    return None


def _works(module: nn.Module, inputs: dict[str, Tensor]) -> bool:
    try:
        return output_tensor(_call(module, inputs, [])).ndim > 1
    except FAILURES:
        return False


def _call(module: nn.Module, inputs: dict[str, Tensor], required: list[str]) -> Any:
    missing = {name: None for name in required if name not in inputs}
    with torch.no_grad():
        return call_model(module, Batch.of_inputs(inputs).to(module_device(module)), **missing)
