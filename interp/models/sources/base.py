"""What every source returns, and how its weights are named by content and checked for NaN."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from interp.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch import nn

    from interp.models.model import Model

Source = Literal["embedded", "hub", "folder", "gguf", "live"]


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, its tokenizer, and where they came from.

    Attributes:
        module: the HF model itself, not a copy or a rewrite.
        tokenizer: with a padding token, or None where the model has no tokenizer.
        id: the name shown in reports.
        source: which door it came in by.
        commit: the hub commit the weights were read from, where there is one.
        notes: what the user should know about this load and no error says; one line each.
    """

    module: nn.Module
    tokenizer: Any
    id: str
    source: Source
    commit: str | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Content hash of the weights as they were when first asked for; see `weights_sha256`."""
        return weights_sha256(self.module)


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over the name, dtype, shape and bytes of every parameter and saved buffer.

    Tied parameters count once. Every byte is read: 135M float32 parameters take about 0.3 s on a
    CPU with SHA instructions, which no sampled hash is worth losing honesty for.

    Args:
        module: any model; weights that accelerate has offloaded are fetched one module at a time.

    Returns:
        64 hexadecimal digits, the same on every device.

    Example:
        >>> import torch
        >>> one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> weights_sha256(one) == weights_sha256(other)
        False
        >>> _ = other.load_state_dict(one.state_dict())
        >>> weights_sha256(one) == weights_sha256(other)
        True
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in named_weights(module):
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_sha256(model: Model) -> str:
    """SHA-256 of a Model: of its weights, and of its stack where that is one of several of the same weights.

    What is made of a model is kept and found again by this.
    """
    digest = weights_sha256(model.module)
    if not model.spec.named:
        return digest
    return hashlib.sha256(f"{digest}\0{model.spec.stack}".encode()).hexdigest()


def check_finite(module: nn.Module, shown: str) -> None:
    """Refuses a model with a NaN or infinite weight, by the parameter's name.

    The sum of a parameter is finite when all its values are, up to overflow; only where it is not
    are the values themselves looked at. About 0.03 s for 135M parameters.
    """
    import torch

    for name, tensor in named_weights(module):
        if not tensor.is_floating_point() or tensor.element_size() < 2:  # integers, float8 and int4
            continue
        if torch.isfinite(tensor.detach().sum()):
            continue
        bad = int((~torch.isfinite(tensor.detach())).sum())
        if bad:
            raise BadInput(
                f"'{shown}' has NaN or infinite weights: {bad} of {tensor.numel()} in '{name}'; "
                "wanted finite weights: load an undamaged checkpoint, or try another --dtype"
            )


def named_weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and saved buffer once, by its first name, with its data at hand."""
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        own = dict(part._parameters) | {
            name: buffer
            for name, buffer in part._buffers.items()
            if name not in part._non_persistent_buffers_set
        }
        fresh = [
            name for name, tensor in own.items() if tensor is not None and id(tensor) not in seen
        ]
        if not fresh:
            continue
        seen.update(id(own[name]) for name in fresh)
        with _at_hand(part):
            for name in fresh:
                yield f"{prefix}.{name}" if prefix else name, getattr(part, name)


def _at_hand(part: nn.Module) -> Any:
    """A context that fetches this module's weights, where accelerate keeps them elsewhere."""
    if not hasattr(part, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(part)
