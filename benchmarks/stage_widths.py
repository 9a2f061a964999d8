"""Widths of stages that still fit each other: every list of them, in a config and its parts, divided by one number.

What a stage returns the next one reads, a neck reads what a backbone's stages return, and a model's own
width may be one of theirs: divided alike, what was equal stays equal.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

DIVISOR, LEAST = 8, 32
"""Smaller numbers in such lists are not widths: images' channels, sizes of kernels, dilations."""
OTHER = re.compile(
    r"(image|feat(ure)?|window|kernel|patch|crop)_?(size|list)|strides?$|token|_id|indices|idx|blocks$|depths|layers$|label"
)
"""Lists of numbers that are not widths."""


def widths(config: PreTrainedConfig, of_parts: bool = False) -> set[int]:
    """All widths that lists name, in a config and its parts; and, `of_parts`, the hidden sizes and their halves."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found |= widths(value, of_parts)
        elif isinstance(value, (list, tuple)) and not OTHER.search(name):
            found |= set(_numbers(value))
        elif of_parts and re.search(r"(hidden_size|embed_dim)$", name) and isinstance(value, int):
            found |= {value, value // 2}  # as many sines as cosines
    return found


def divided(name: str, value: Any, known: set[int]) -> Any:
    """The field with its widths divided, to whole numbers: numbers in lists, or one that is `known` from a list."""
    if isinstance(value, (list, tuple)) and not OTHER.search(name):
        return type(value)(divided("", each, set()) for each in value)
    is_width = not isinstance(value, bool) and isinstance(value, int) and value >= LEAST
    if is_width and (not name or (value in known and _SCALAR.search(name))):
        return -(-value // DIVISOR)
    return value


_SCALAR = re.compile(r"(hidden|embed|d_model|dim|channels|width|pos_feats)(_size|_dim)?$")


def image_sizes(config: PreTrainedConfig) -> set[int]:
    """The sides of images that a config and its parts name."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found |= image_sizes(value)
        elif name == "image_size" and value:
            found |= set(value) if isinstance(value, (list, tuple)) else {value}
    return found


def of_image(value: Any, old: int, new: int) -> Any:
    """The sides of maps of an image that was `old` pixels high, of one that is `new` pixels high.

    >>> of_image([[256, 256], [64, 64]], 1024, 224)
    [[56, 56], [14, 14]]
    """
    if isinstance(value, (list, tuple)):
        return type(value)(of_image(each, old, new) for each in value)
    return value * new // old


def declared(config: PreTrainedConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the class declares, by any of their names, or sets by a property; others it works out anew."""
    names = {n for n in fields if getattr(getattr(type(config), n, None), "fset", None)}
    names |= {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    names |= {other for name, other in config.attribute_map.items() if name in names}
    return {name: value for name, value in fields.items() if name in names}


def _numbers(value: Any) -> Iterator[int]:
    for each in value:
        if isinstance(each, (list, tuple)):
            yield from _numbers(each)
        elif isinstance(each, int) and not isinstance(each, bool) and each >= LEAST:
            yield each


def return_stages(made: Any, config: Any, alone: bool) -> None:
    """A backbone returns the stages that its default config says, where it still has them all, else as many.

    `alone`: also where that is the last stage alone; else all are returned then.
    """
    names, wanted = getattr(made, "stage_names", []), getattr(config, "out_features", None)
    if wanted and set(wanted) <= set(names):
        made.out_features = wanted if alone or len(wanted) > 1 else names[1:]
    elif wanted and names and len(wanted) > 1:  # some layers are gone
        made.out_features = names[-len(wanted) :]
