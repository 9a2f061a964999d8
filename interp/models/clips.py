"""Random clips as a model takes them: of the frames and sides that its config tells, or a part that reads images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from interp.models.calls import main_input
from interp.models.images import random_images

ROWS = 2
FRAMES = ("num_frames", "frames_per_clip")
SOME_FRAMES = 3
"""Of a video whose frames no config counts."""
SIDES = ("image_size", "crop_size")


def clip_shapes(module: nn.Module, name: str) -> Iterator[tuple[tuple[int, ...], int]]:
    """Shapes of clips as the input `name`, each with the axis of the frames: [row frame channel height width] first.

    Of models whose config counts frames and names a side, or whose input is called videos. Where no config names a
    side the frames are as the parts that are models of images take them.
    """
    config = getattr(module, "config", None)
    is_video = name.endswith("videos")
    for frames in sizes(config, FRAMES) or [SOME_FRAMES] * is_video:
        for side in sizes(config, SIDES) or (_sides_of_parts(module) if is_video else ()):
            for channels in [*sizes(config, ("num_channels", "in_chans")), 3]:
                yield (ROWS, frames, channels, side, side), 1
                yield (ROWS, channels, frames, side, side), 2


def _sides_of_parts(module: nn.Module) -> list[int]:
    """The sides of images that the outermost parts take that are models of images."""
    parts: dict[str, int] = {}
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in parts)
        is_model = name and not inside and isinstance(part, PreTrainedModel)
        if is_model and main_input(part) == "pixel_values":
            parts[name] = random_images(part)["pixel_values"].shape[-1]
    return list(dict.fromkeys(parts.values()))


def sizes(config: Any, names: tuple[str, ...]) -> list[int]:
    """The values that a config and its parts have under these names."""
    own = [getattr(config, name, None) for name in names]
    parts = [p for p in vars(config).values() if isinstance(p, PreTrainedConfig)] if config else []
    inner = [size for part in parts for size in sizes(part, names)]
    return [size for size in own if isinstance(size, int) and size > 0] + inner
