"""Masks that are True at padding, the opposite of what others mean by them: found by trying, kept by model.

A mask of one value throughout that leaves nothing of what a model reads marks padding, where the other value lets it
through and other numbers at frames so marked change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from interp.errors import BadInput
from interp.models.calls import call_model, output_tensor
from interp.models.spec import module_device
from interp.models.wants import tried
from interp.run.batch import Batch

UNCHANGED = 1e-5
"""Of the largest number: what rounding changes where a convolution adds what is masked as zeros."""
of_padding: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""By model the mask of its main input that is True (or 1) at padding."""


def right_way(
    module: nn.Module, name: str, made: dict[str, Tensor], others: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The inputs `made`, with which the forward works, with the mask of `name` that lets through what it reads.

    That is a mask of zeros where ones mark padding, which is kept for `as_marked`; else they are as they were.
    """
    mask = made.get(own := f"{name}_mask")
    if mask is None or _says_something(module, {**made, **others}):
        return made
    opposite = {**made, own: torch.zeros_like(mask)}
    if not _says_something(module, {**opposite, **others}):
        return made
    if _ignored(module, name, made, others, 1) and not _ignored(module, name, made, others, 0):
        of_padding[module] = own
        return opposite
    return made


def as_marked(module: nn.Module, batch: Batch) -> Batch:
    """The batch with a mask of what is real, where the model's own mask is of what is padding.

    Raises:
        BadInput: all of a row is padding.
    """
    padding = batch.inputs.get(of_padding.get(module, ""))
    if padding is None or batch.has_source or "input_ids" in batch.inputs:
        return batch  # its positions are others
    if batch.mask is not None and not torch.equal(batch.mask, padding.bool()):
        return batch  # it has been seen to
    real = ~padding.bool()
    if not bool(real.any(1).all()):
        raise BadInput(
            f"'{of_padding[module]}' is True (or 1) throughout a row, and {type(module).__name__} takes that for "
            "padding, as its forward shows: give False (or 0) at what is real, ~mask"
        )
    return replace(batch, mask=None if bool(real.all()) else real)


def _says_something(module: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the forward makes finite numbers of these inputs that are not all 0."""
    made, _ = tried(module, Batch.of_inputs(inputs).to(module_device(module)))
    return made is not None and bool(made.isfinite().all()) and bool(made.any())


def _ignored(
    module: nn.Module,
    name: str,
    made: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    value: int,
) -> bool:
    """Whether other numbers in the last quarter change nothing where the last half is marked with `value`.

    Convolutions before the mask may read across the border between the halves.
    """
    mask, x = made[f"{name}_mask"], made[name]
    n = mask.shape[1]
    marked = torch.full_like(mask, 1 - value)
    marked[:, n // 2 :] = value
    axis = 1 if x.shape[1] == n else x.ndim - 1
    later = x.clone()
    end = later.narrow(axis, n - n // 4, n // 4)
    end.copy_(end.flip(axis) + 1)
    outputs = []
    for numbers in (x, later):
        batch = Batch({**made, **others, name: numbers, f"{name}_mask": marked})
        with torch.no_grad():
            outputs.append(output_tensor(call_model(module, batch.to(module_device(module)))))
    first, second = (made.nan_to_num() for made in outputs)
    return float((first - second).abs().max()) <= UNCHANGED * float(first.abs().max())
