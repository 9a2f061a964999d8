"""Models of several towers side by side: which of their parts are models of their own, and which reads images."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from torch import nn

from interp.models.calls import named_input, parameters_of


def image_part(module: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of the part that reads images, of a model that embeds images and texts; else None."""
    if not all(hasattr(module, f"get_{kind}_features") for kind in ("image", "text")):
        return None
    for name, part in module.named_modules():
        if name and _reads_itself(part) and named_input(part) == "pixel_values":
            return name, part
    return None


def parts_around(module: nn.Module, stacks: list[str]) -> dict[str, str]:
    """By stack the smallest model inside `module`, with inputs of its own, that holds it (or its stages), or ""."""
    return {stack: _part(module, stack, stacks) for stack in stacks}


def side_by_side(module: nn.Module, lists: list[str]) -> list[list[str]]:
    """The stacks that these lists are: those of one part, which are the stages of one stack, are one."""
    found: dict[str, list[str]] = {}
    for name, part in parts_around(module, lists).items():
        found.setdefault(part or name, []).append(name)
    return list(found.values())


def common(names: list[str]) -> str:
    """The innermost module that is around all of these, or the only one itself."""
    split = [name.split(".") for name in names]
    same = [
        parts[0]
        for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))
    ]
    return ".".join(same)


def _part(module: nn.Module, stack: str, stacks: list[str]) -> str:
    """The smallest model inside `module` around this stack, "" if none, or if it holds others that are no stages."""
    parts = stack.split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        if _reads_itself(module.get_submodule(name)):
            inside = [each for each in stacks if each.startswith(f"{name}.")]
            return name if len(inside) == 1 or alike(module, inside) else ""
    return ""


def _reads_itself(part: nn.Module) -> bool:
    """Whether it is a model that takes tokens, pixels or sound, no hidden states."""
    taken = parameters_of(part)
    return hasattr(part, "config") and named_input(part) in taken


def alike(module: nn.Module, lists: Iterable[str]) -> bool:
    """Whether a class of blocks is in all of these lists, as in the stages of one model."""
    members: list[Any] = [module.get_submodule(name) for name in dict.fromkeys(lists)]
    classes = [{type(block) for block in blocks} for blocks in members]
    return bool(set.intersection(*classes))
