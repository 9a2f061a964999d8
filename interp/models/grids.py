"""Patches of all images of a batch one after the other, with a grid that tells each image's rows and columns.

Which parameter of a forward is the grid is told by its name; in which shape it takes the patches is found by
trying those that are in use, of the sizes that configs name alike in every model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from interp.errors import BadInput, Refused
from interp.models.calls import FAILURES, call_model, output_tensor, parameters_of
from interp.models.companions import as_weights
from interp.models.spec import module_device
from interp.run.batch import Batch

ROWS = 2
GRIDS = {"grid_thw": 3, "target_sizes": 2, "tgt_sizes": 2}
"""How names of parameters end that tell how many (frames,) rows and columns of patches each image has."""
SIDES = (8, 4, 16)
"""Patches a side: several after merging, and several windows of most models that have any."""
CHANNELS = ("in_channels", "num_channels", "in_chans")
TIMES = ("temporal_patch_size",)
MERGED = ("spatial_merge_size", "merge_size")
PIXELS = "pixel_values"
MOVED = 1e-3
"""A row has changed if it did by more than this share of the largest number."""


@dataclass(frozen=True, eq=False)
class Patches:
    """How a forward takes patches: by which names, and along which axis, with `entries` for each place of the grid."""

    name: str
    grid: str
    axis: int
    entries: int
    inputs: dict[str, Tensor]


_known: WeakKeyDictionary[nn.Module, Patches] = WeakKeyDictionary()


def packed_patches(module: nn.Module) -> Batch | None:
    """Two random images as one row of patches with a grid, as the forward takes them; None where it takes no grid.

    Raises:
        Refused: it works with none of the shapes that were tried; with why the likeliest failed.
    """
    parameters = parameters_of(module)
    name = next((each for each in parameters if each != "self"), "")
    grid = next((each for each in parameters if _size(each)), None)
    if grid is None or "input_ids" in parameters:
        return None
    if module not in _known:
        required = [
            each
            for each, parameter in parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            and each not in ("self", name, grid)
        ]
        reasons: dict[tuple[int, ...], str] = {}
        for patches in _trials(module, name, grid, required):
            why = _refuted(module, _batch(patches, patches.inputs))
            if not why:
                _known[module] = patches
                break
            reasons.setdefault(tuple(patches.inputs[name].shape), why)
        else:
            shape, why = next(iter(reasons.items()), ((), f"{', '.join(required)} not known"))
            raise Refused(
                f"{type(module).__name__} takes '{name}' with '{grid}', and its forward works with none of the "
                f"{len(reasons)} shapes of random patches that were tried (of {shape}: {why})"
            )
    patches = _known[module]
    return _batch(patches, as_weights(module, patches.inputs))


def inputs_known(module: nn.Module) -> dict[str, Tensor]:
    """What the forward works with, where it takes patches with a grid; nothing of any other."""
    return _known[module].inputs if module in _known else {}


def taken_as(module: nn.Module) -> Patches | None:
    """How the forward takes the patches of several images in one row; None where it takes none so."""
    return _known.get(module)


def named_as_taken(module: nn.Module, data: Any) -> Any:
    """Inputs as a processor names them (pixel_values, image_grid_thw) by the names that the forward has."""
    patches = _known.get(module)
    if patches is None or not isinstance(data, (Mapping, Batch)):
        return data
    inputs = dict(data.inputs if isinstance(data, Batch) else data)
    for name, is_it in ((patches.name, PIXELS.__eq__), (patches.grid, _size)):
        given = [other for other in inputs if is_it(other)]
        if name not in inputs and len(given) == 1:
            inputs = {name if other == given[0] else other: x for other, x in inputs.items()}
    return replace(data, inputs=inputs) if isinstance(data, Batch) else inputs


def with_images_apart(module: nn.Module, batch: Batch) -> Batch:
    """The batch with an image a row where the forward takes patches of all images in one.

    Raises:
        BadInput: patches or grid are missing, do not fit each other, or are not alike for all images.
    """
    patches = _known.get(module)
    if patches is None:
        return batch
    reads = (
        f"{type(module).__name__} reads '{patches.name}', the patches of all images one after the other, such as "
        f"{tuple(patches.inputs[patches.name].shape)}, and '{patches.grid}' "
        f"[image, {patches.inputs[patches.grid].shape[1]}]"
    )
    if missing := patches.inputs.keys() - batch.inputs.keys():
        raise BadInput(f"{reads}; missing: {', '.join(sorted(missing))}")
    x, grid = batch.inputs[patches.name], batch.inputs[patches.grid]
    if grid.ndim != 2 or grid.shape[1] != patches.inputs[patches.grid].shape[1] or not len(grid):
        raise BadInput(f"{reads}; got a grid of shape {tuple(grid.shape)}")
    entries = int(grid.prod(1).sum()) * patches.entries
    if x.ndim <= patches.axis or x.shape[patches.axis] != entries:
        raise BadInput(
            f"{reads}; got {tuple(x.shape)}, and the grid tells of {entries} on axis {patches.axis}"
        )
    for name, told in batch.inputs.items():
        if name in patches.inputs and name != patches.name and (told != told[:1]).any():
            raise BadInput(
                f"images of a batch must be alike: '{name}' is {told.tolist()}, and sites show rows of equal "
                "length [batch pos d_model]; give the images one by one"
            )
    return _batch(patches, batch.inputs)


def _batch(patches: Patches, inputs: dict[str, Tensor]) -> Batch:
    return Batch(inputs, None, {patches.name: patches.axis}, len(inputs[patches.grid]))


def _size(name: str) -> int:
    """How many numbers an image has in a grid of this name; 0 where it is none."""
    return next((size for end, size in GRIDS.items() if name.endswith(end)), 0)


def _trials(module: nn.Module, name: str, grid: str, required: list[str]) -> Iterator[Patches]:
    """Inputs to try, the likeliest first; none where some other parameter is required that is not known."""
    config: Any = getattr(module, "config", None)
    merges = dict.fromkeys([*_sizes(config, MERGED), 2, 1])
    if not all(each.endswith("merge_sizes") for each in required):
        return
    dtype = next(module.parameters()).dtype
    generator = torch.Generator().manual_seed(0)
    for side, merge in product(SIDES, merges if required else (1,)):
        told = torch.tensor([[1, side, side][-_size(grid) :]] * ROWS)
        besides = {each: torch.full((ROWS,), merge) for each in required}
        for axis, entries, shape in _shapes(config, int(told.prod(1).sum())):
            x = torch.randn(shape, generator=generator).to(dtype)
            yield Patches(name, grid, axis, entries, {name: x, grid: told, **besides})


def _shapes(config: Any, n: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """(axis of the patches, its entries for each, shape) for n patches, or n squares of patches, cut or in a strip."""
    channels, times = [*_sizes(config, CHANNELS), 3], [*_sizes(config, TIMES), 1, 2]
    for c, side in product(dict.fromkeys(channels), _sizes(config, ("patch_size",))):
        for t in dict.fromkeys(times):
            yield 0, 1, (n, c * t * side**2)
        yield 0, 1, (n, c, side, side)
        yield 1, 1, (1, n, c, side, side)
        for m in dict.fromkeys([*_sizes(config, MERGED), 1]):
            yield 0, 1, (n, m * side, m * side, c)
        yield 3, side, (1, c, side, n * side)


def _sizes(config: Any, names: tuple[str, ...]) -> list[int]:
    found = (getattr(config, name, None) for name in names)
    return [size for size in found if isinstance(size, int) and size > 0]


def _refuted(module: nn.Module, batch: Batch) -> str:
    """Why patches do not lie so: the forward fails, or the first image has other rows beside another; "" if they do."""
    copies = batch.rows(slice(0, 1)).repeat(batch.size)
    try:
        with torch.no_grad():
            made = [
                output_tensor(call_model(module, each.to(module_device(module)))).double()
                for each in (batch, copies)
            ]
    except (*FAILURES, ArithmeticError) as error:  # a config's window may be smaller than a patch
        return " ".join(str(error).split())[:120] or type(error).__name__
    shape = made[0].shape
    if shape[0] != batch.size and (shape[:-2].numel() > 1 or shape[-2] % batch.size):
        return f"it returns {tuple(shape)} for {batch.size} images"
    x, y = (each.reshape(batch.size, -1) for each in made)
    own, other = (y - x[:1]).abs().max(), (x[1:] - x[:1]).abs().max()
    if not float(own) <= MOVED * float(x.abs().max()) < float(other):
        return "what it returns for an image depends on the image beside it"
    return ""
