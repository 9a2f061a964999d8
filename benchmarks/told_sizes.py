"""Sizes of a config that a failure asks for: the field that has the one size gets the other, one after the other.

A layer that was given 256 channels and reads 96 says so, and does not say which of the config's fields made it so.
Each field that has one of the two sizes is tried with the other, until the model is made and works. A validator says
which field must have which value.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, TypeVar

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Made = TypeVar("Made")

PAIRS = (
    r"shapes cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)",
    r"to have (\d+) channels, but got (\d+) channels",
    r"Expected size (\d+) but got size (\d+)",
    r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)",
    r"normalized_shape=\[(\d+)\].* input of size\[(?:\d+, )*(\d+)\]",
)
"""How a failure names two sizes that should be one."""
NORM = "Given normalized_shape"
"""How a norm says that it is given another shape."""
MUST = re.compile(r"(\w+)`? must be (\w+), got (\w+)")
"""How a validator names a field with its value."""
DEEPEST, MOST = 6, 24
"""How many fields are changed one after the other, at most, and how many models are tried in all."""


def sizes_told(why: str) -> tuple[int, int] | None:
    """The two sizes that should be one; None where the failure tells none.

    >>> sizes_told("mat1 and mat2 shapes cannot be multiplied (8x256 and 96x64)")
    (256, 96)
    """
    found = (re.search(pattern, why) for pattern in PAIRS)
    return next(((int(x[1]), int(x[2])) for x in found if x and x[1] != x[2]), None)


def field_told(why: str) -> tuple[str, Any] | None:
    """The name and the value of the field that must have it; None where the failure tells none.

    >>> field_told("hidden_size_per_layer_input must be 0, got 256")
    ('hidden_size_per_layer_input', 0)
    """
    found = MUST.search(why)
    if found is None or not (found[2].isdigit() or found[2] in ("True", "False", "None")):
        return None
    return found[1], ast.literal_eval(found[2])


def part_told(of: type[PreTrainedConfig], why: str) -> dict[str, dict[str, Any]]:
    """By name the parts of a config that have a field which must have a value, with both; none where none is told."""
    name, value = field_told(why) or ("", None)
    parts = {
        part: getattr(spec, "model_type", None) for part, spec in of.sub_configs_defaults.items()
    }
    return {
        part: {name: value}
        for part, model_type in parts.items()
        if model_type and name in inspect.signature(CONFIG_MAPPING[model_type]).parameters
    }


def fitted(make: Callable[[PreTrainedConfig], Made], config: PreTrainedConfig) -> Made:
    """What is made of a config, or of the first with such sizes as the failures ask for.

    Raises:
        what the config's own failure was, where no other works either.
    """
    first: Exception | None = None
    waiting, tried = [(config, "", 0)], 0
    while waiting and tried <= MOST:
        other, before, depth = waiting.pop()
        tried += 1
        try:
            return make(other)
        except Exception as error:  # noqa: BLE001 - any model's own code: anything may be raised
            first = first or error
            if str(error) != before and depth < DEEPEST:  # it comes further: the next size, first
                further = [(x, str(error), depth + 1) for x in _changed(other, str(error))]
                waiting += reversed(further)
    assert first is not None
    raise first


def _changed(config: PreTrainedConfig, why: str) -> Iterator[PreTrainedConfig]:
    """The config with one field changed, for each that has one of the two sizes that the failure tells.

    Where a norm fails on what it is given, flags that switch on a norm are switched off before.
    """
    for name, value in vars(config).items():
        if NORM in why and value is True and "norm" in name:
            other = deepcopy(config)
            setattr(other, name, False)
            yield other
    pair = sizes_told(why)
    for old, new in (pair, pair[::-1]) if pair else ():
        for path in _places(config, old):
            other = deepcopy(config)
            *parts, name = path
            holder: Any = other
            for part in parts:
                holder = getattr(holder, part) if isinstance(part, str) else holder[part]
            if isinstance(name, str):
                setattr(holder, name, new)
            else:
                holder[name] = new
            yield other


def _places(of: Any, size: int) -> Iterator[tuple[Any, ...]]:
    """Where in a config, in its parts and in their lists a size stands."""
    held = vars(of).items() if isinstance(of, PreTrainedConfig) else enumerate(of)
    for name, value in held:
        if isinstance(value, (PreTrainedConfig, list)) and not str(name).startswith("_"):
            yield from ((name, *rest) for rest in _places(value, size))
        elif type(value) is int and value == size:
            yield (name,)
