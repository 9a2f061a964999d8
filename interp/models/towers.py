"""Models of images and texts side by side: which part reads images."""

from __future__ import annotations

from torch import nn


def image_part(module: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of the part that reads images, of a model that embeds images and texts; else None."""
    if not all(hasattr(module, f"get_{kind}_features") for kind in ("image", "text")):
        return None
    for name, part in module.named_modules():
        if (
            name
            and getattr(part, "main_input_name", "") == "pixel_values"
            and hasattr(part, "config")
        ):
            return name, part
    return None
