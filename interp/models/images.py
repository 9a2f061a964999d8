"""Random images as a model takes them: pixels, or patches that are cut already."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from interp.models.calls import FAILURES, call_model, parameters_of
from interp.models.spec import module_device
from interp.run.batch import Batch

ROWS = 2
ANY_SIDES = (64, 128, 256, 224)
"""Pixels a side for models whose config names no size: most take any, some only images of several patches.

Last the size that most have been trained on: some have a table of as many places.
"""
MOST_SIDE = 1024
"""Of an image that a failure asks for."""
PLACES = "pixel_position_ids"
"""The parameter that tells the column and the row of each patch."""


def random_images(module: nn.Module) -> dict[str, Tensor]:
    """Two random images by the names of the model's inputs.

    Pixels [row channel height width] of the size that the config names, [row frame channel height width]
    where it names frames; where it names no size, the smallest of a few on which the forward works, else the one
    that a failure asks for. A model that is told how many rows and columns of patches there are (`spatial_shapes`),
    or which of them each is in (`pixel_position_ids`), reads patches [row patch channel·height·width].
    """
    config: Any = getattr(module, "config", None)
    config = getattr(config, "vision_config", config)
    channels = getattr(config, "num_channels", 3)
    taken = parameters_of(module)
    n_patches = getattr(config, "num_patches", None)
    if "spatial_shapes" in taken and n_patches:
        side = int(n_patches**0.5)
        numbers = _normal(module, ROWS, side * side, channels * config.patch_size**2)
        given = {
            "pixel_values": numbers,
            "spatial_shapes": torch.full((ROWS, 2), side),
            "pixel_attention_mask": torch.ones(ROWS, side * side, dtype=torch.long),
        }
        return {name: x for name, x in given.items() if name in taken}
    if PLACES in taken and "input_ids" not in taken:
        side = 2 * max(getattr(config, "pooling_kernel_size", None) or 1, 2)
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(1)  # x before y
        return {
            "pixel_values": _normal(module, ROWS, side * side, channels * config.patch_size**2),
            PLACES: places.expand(ROWS, -1, -1),
        }
    frames = getattr(config, "num_frames", None)  # a video: one image a frame
    lead = (ROWS, channels) if frames is None else (ROWS, frames, channels)
    size = getattr(config, "image_size", None) or _trained_on(config)
    if size:
        sides = size if isinstance(size, (tuple, list)) else (size, size)
        return {"pixel_values": _normal(module, *lead, *sides)}
    images = [{"pixel_values": _normal(module, *lead, side, side)} for side in ANY_SIDES]
    faults = []
    for image in images:
        faults.append(_fault(module, image))
        if not faults[-1]:
            return image
    for fault, side in zip(faults, ANY_SIDES, strict=True):
        told = sides_told(fault, side)
        if told and not _fault(module, made := {"pixel_values": _normal(module, *lead, *told)}):
            return made
    return images[0]


def otherwise_cut(module: nn.Module, pixels: Tensor) -> Iterator[Tensor]:
    """The same pixels as a row of patches an image [row patch height·width·channel], or with a row for each frame."""
    side = getattr(getattr(module, "config", None), "patch_size", None)
    if pixels.ndim == 5:
        yield pixels.flatten(0, 1)
    elif pixels.ndim == 4 and isinstance(side, int) and min(pixels.shape[-2:]) >= side:
        patches = pixels.unfold(2, side, side).unfold(3, side, side)  # row channel y x height width
        yield patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def _trained_on(config: Any) -> tuple[int, int] | None:
    """Height and width in the `input_size` [channel height width] that a checkpoint's config tells of its training."""
    told = (x.get("input_size") for x in vars(config or object).values() if isinstance(x, Mapping))
    return next(((x[1], x[2]) for x in told if isinstance(x, (list, tuple)) and len(x) == 3), None)


def _normal(module: nn.Module, *shape: int) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return numbers.to(next(module.parameters()).dtype)


def _fault(module: nn.Module, inputs: dict[str, Tensor]) -> str:
    """Why the model's forward fails on these inputs; "" where it works."""
    try:
        with torch.no_grad():
            call_model(module, Batch(inputs).to(module_device(module)))
    except FAILURES as error:
        return str(error) or type(error).__name__
    return ""


def sides_told(fault: str, tried: int) -> tuple[int, int] | None:
    """Height and width of the images that a failure asks for, beside the side that was tried; None where it does not.

    >>> sides_told("Input image size (64*64) doesn't match model (32*48).", 64)
    (32, 48)
    >>> sides_told("Input height (64) doesn't match model (224).", 64)
    (224, 224)
    """
    numbers = [int(each) for each in re.findall(r"\d+", fault)]
    other = [each for each in numbers if each != tried]
    if (
        tried not in numbers
        or len(other) not in (1, 2)
        or not 0 < min(other) <= max(other) <= MOST_SIDE
    ):
        return None
    return other[0], other[-1]
