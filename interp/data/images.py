"""Images for head detection: drawn from a seed, or the user's own, as a model takes them.

Which positions are patches, and where on the grid, is found by changing pixels and looking which
positions move (`patch_grid`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.data.drawn_images import drawn_images
from interp.errors import BadInput, Refused
from interp.models.calls import main_input
from interp.models.model import Model
from interp.run.batch import Batch

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".npy")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of the channels, where the checkpoint does not say."""
MOVED = 1e-3
"""A position has moved if it changes by more than this share of the largest number; rounding is far below."""


@dataclass(frozen=True)
class Grid:
    """Where a model keeps the patches of an image.

    Attributes:
        places: the position of every patch. length: positions in all.

    >>> grid = Grid(1 + torch.arange(6).view(2, 3), 7)
    >>> grid.others, grid.labels[:3], grid.rows_and_columns[4].tolist()
    ([0], ['CLS', '0,0', '0,1'], [1.0, 0.0])
    """

    places: Int[Tensor, "height width"]
    length: int

    @property
    def others(self) -> list[int]:
        """Positions that hold no patch: CLS, registers, a distillation token."""
        return sorted(set(range(self.length)) - set(self.places.flatten().tolist()))

    @property
    def labels(self) -> list[str]:
        """A name for every position: "row,column"; "CLS" for the first that is no patch, then "+1", "+2", …"""
        names = {place: f"+{k}" if k else "CLS" for k, place in enumerate(self.others)}
        for row, line in enumerate(self.places.tolist()):
            names |= {place: f"{row},{column}" for column, place in enumerate(line)}
        return [names[place] for place in range(self.length)]

    @cached_property
    def rows_and_columns(self) -> Float[Tensor, "pos 2"]:
        """Row and column of every position, in patches; NaN where there is no patch."""
        found = torch.full((self.length, 2), torch.nan)
        height, width = self.places.shape
        axes = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        found[self.places.flatten()] = torch.stack([axis.flatten().float() for axis in axes], dim=1)
        return found


@dataclass(frozen=True)
class Images:
    """Images as a model takes them, with where their patches are; read by detectors like `Prompts`.

    Attributes:
        pixels: normalised. titles: what each shows. note: on how they were normalised; "" for nothing.
    """

    name: str
    pixels: Float[Tensor, "n channels height width"]
    titles: tuple[str, ...]
    grid: Grid
    note: str = ""
    causal: bool = False
    period: int = 0

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def length(self) -> int:
        """Positions of an image, those without a patch included."""
        return self.grid.length

    @property
    def lead(self) -> int:
        """Positions before the first patch."""
        return int(self.grid.places.min())

    def rows(self, rows: slice) -> Images:
        """Some of the images."""
        return replace(self, pixels=self.pixels[rows], titles=self.titles[rows])

    @property
    def batch(self) -> Batch:
        """What a model is run on."""
        return Batch({"pixel_values": self.pixels})

    @property
    def positions(self) -> Int[Tensor, "n pos"]:
        """0, 1, 2, … in every image."""
        return torch.arange(self.length).expand(len(self), -1)

    @property
    def content(self) -> Bool[Tensor, "n pos"]:
        """Where patches are."""
        return torch.isin(self.positions, self.grid.places)


def reads_images(model: Model) -> bool:
    """Whether a model's input is pixels."""
    return main_input(model.module) == "pixel_values"


def image_prompts(
    model: Model, n: int, *, seed: int = 0, images: str | Path | Tensor | None = None
) -> Images:
    """`n` images for a model: drawn from `seed`, or the first `n` of a folder or a tensor.

    Args:
        images: a folder of pictures (PNG, JPEG, … or .npy of [height width channels]), or a tensor
            [n channels height width]; numbers 0 to 1, or 0 to 255 in bytes. Their shorter side is scaled
            to the model's, and the middle is kept.

    Raises:
        BadInput: nothing that can be read as an image. Refused: the model keeps no grid of patches.
    """
    grid = patch_grid(model)
    channels, height, width = _input_shape(model)
    if images is None:
        pixels, titles = drawn_images(n, height, width, seed=seed)
    elif isinstance(images, Tensor):
        pixels = _fitted(images[:n], height, width)
        titles = tuple(f"image {i}" for i in range(len(pixels)))
    else:
        pixels, titles = _read_folder(Path(images), n, height, width)
    if pixels.shape[1] != channels:
        if channels != 1:
            raise BadInput(f"images have {pixels.shape[1]} channels, {model.id} reads {channels}")
        pixels = pixels.mean(1, keepdim=True)
    mean, deviation, note = _normalisation(model, channels)
    pixels = (pixels - mean[:, None, None]) / deviation[:, None, None]
    return Images("images", pixels.to(model.dtype), titles, grid, note)


# --- the grid -----------------------------------------------------------------------------------

_grids: WeakKeyDictionary[Model, Grid] = WeakKeyDictionary()


@torch.no_grad()
def patch_grid(model: Model) -> Grid:
    """The position of every patch: row i and column j are changed, and one position moves with both.

    The config gives the size of an image and of a patch; that every patch is one position of the first
    block, and that every attention layer has all positions, is tried out. CLS, registers and the like are
    the positions that move with no patch.

    Raises:
        Refused: patches are windowed, merged, overlapping, masked or shuffled, or there are none.
    """
    if model not in _grids:
        _grids[model] = _find_grid(model)
    return _grids[model]


def _find_grid(model: Model) -> Grid:
    if not reads_images(model):
        raise Refused(f"{model.id} reads no images: it has no grid of patches")
    _check_stages(model)
    config: Any = model.module.config
    size: Any = getattr(getattr(config, "vision_config", config), "patch_size", None)
    if (isinstance(size, (tuple, list)) and len(size) > 2) or size is None:
        raise Refused(
            f"{model.id} has no grid of patches: its config has no patch_size for one image"
        )
    sides: Any = size if isinstance(size, (tuple, list)) else (size, size)
    high, wide = sides
    channels, height, width = _input_shape(model)
    rows, columns = height // high, width // wide
    pixels = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0)).to(
        model.dtype
    )
    before = pixels[0].expand(1 + rows + columns, -1, -1, -1).clone()
    for i in range(rows):
        band = slice(i * high, (i + 1) * high)
        before[1 + i, :, band] = pixels[1, :, band]
    for j in range(columns):
        band = slice(j * wide, (j + 1) * wide)
        before[1 + rows + j, :, :, band] = pixels[1, :, :, band]
    parts = [
        model.run(
            Batch({"pixel_values": part}), capture=["resid_pre.0"], stop_at=0, logits=False
        ).cache["resid_pre.0"]
        for part in before.split(16)
    ]
    if any(part.ndim != 3 or part.shape[1:] != parts[0].shape[1:] for part in parts):
        raise Refused(
            f"{model.id} has no grid of patches: its first block reads no [batch pos d_model]"
        )
    resid = torch.cat(parts).float()
    moved = (resid[1:] - resid[0]).abs().amax(-1) > MOVED * resid.abs().max()
    both = moved[:rows, None] & moved[None, rows:]
    if not bool((both.sum(-1) == 1).all()) or int(moved[:rows].sum()) != rows * columns:
        raise Refused(
            f"{model.id} keeps no grid of {rows} × {columns} patches, one a position: patches overlap, are "
            "merged, masked or shuffled on the way in"
        )
    grid = Grid(both.int().argmax(-1).cpu(), resid.shape[1])
    _check_layers(model, pixels[:1], grid)
    return grid


def _check_stages(model: Model) -> None:
    """Every stage has as many positions of an image: roles of heads are told on one grid for all layers."""
    stages = model.spec.stages
    if len(stages) == 1:
        return
    batch = model.probed
    sites = [f"resid_pre.{stage[0]}" for stage in stages]
    cache = model.run(batch, capture=sites, logits=False).cache
    lengths = [cache[site].shape[1] for site in sites]
    if len(set(lengths)) > 1:
        raise Refused(
            f"{model.id} has no one grid of patches: its blocks work in stages, on "
            f"{', '.join(map(str, lengths))} positions of an image one after the other, and the roles of heads "
            "on images are told on one grid for all layers; model.run gives the patterns of every layer"
        )


def _check_layers(model: Model, pixels: Tensor, grid: Grid) -> None:
    """Every attention layer reads every position of the image, with no pooling; windows may have padding behind."""
    run = model.run(Batch({"pixel_values": pixels}), capture=["z", "k"], logits=False)
    for layer in model.spec.attention_layers:
        for site in ("z", "k"):
            seen = tuple(run.cache[f"{site}.{layer}"].shape[:2])
            if site == "k" and model.spec.blocks[layer].windows is not None:
                seen = (seen[0], min(seen[1], grid.length))
            if seen != (1, grid.length):
                raise Refused(
                    f"{model.id} has no one grid of patches: layer {layer} attends over {seen[0]} × "
                    f"{seen[1]} positions of an image that has {grid.length} (windows, merged or pooled "
                    "patches); `interp inspect` lists what its sites still give"
                )


def _input_shape(model: Model) -> tuple[int, int, int]:
    """Channels, height and width of what the model takes."""
    shape = model.probed.inputs["pixel_values"].shape
    if len(shape) == 3:
        raise Refused(
            f"{model.id} reads images that are cut into patches already ({shape[1]} of {shape[2]} numbers), and in "
            "which order a patch holds its pixels, only its processor knows: no image can be drawn for it. "
            "model.run takes what its processor makes"
        )
    if len(shape) != 4:
        raise Refused(f"{model.id} reads no single images: its pixels are {list(shape)}")
    return int(shape[1]), int(shape[2]), int(shape[3])


def _normalisation(model: Model, channels: int) -> tuple[Tensor, Tensor, str]:
    """Mean and deviation of every channel, as the checkpoint was trained with."""
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    config: dict[str, Any] = {}
    home = model.id.rpartition(":")[0] if model.spec.named else model.id
    if Path(home).is_dir() or home.count("/") == 1:
        try:
            config = get_image_processor_config(home)
        except OSError:  # neither in the folder nor, without a network, in the cache
            config = {}
    note = ""
    if "image_mean" not in config:
        note = "No preprocessor_config.json with the model: pixels are normalised as for ImageNet."
    mean, deviation = (
        torch.tensor(config.get(name, default), dtype=torch.float32)
        for name, default in zip(("image_mean", "image_std"), IMAGENET, strict=True)
    )
    if len(mean) != channels:
        mean, deviation = mean.mean().expand(channels), deviation.mean().expand(channels)
    return mean, deviation, note


# --- the user's own -----------------------------------------------------------------------------


def _read_folder(
    folder: Path, n: int, height: int, width: int
) -> tuple[Float[Tensor, "n channels height width"], tuple[str, ...]]:
    if not folder.is_dir():
        raise BadInput(f"no folder '{folder}'; give one with pictures ({', '.join(SUFFIXES)})")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[:n]
    if not paths:
        raise BadInput(f"'{folder}' holds no picture; wanted {', '.join(SUFFIXES)}")
    pixels = [_fitted(_read(path)[None], height, width) for path in paths]
    return torch.cat(pixels), tuple(path.name for path in paths)


def _read(path: Path) -> Float[Tensor, "channels height width"]:
    if path.suffix.lower() == ".npy":
        array = np.load(path, allow_pickle=False)
        if array.ndim != 3:
            raise BadInput(f"'{path}' is {list(array.shape)}; wanted [height width channels]")
        return torch.from_numpy(array).permute(2, 0, 1)
    try:
        from PIL import Image, UnidentifiedImageError  # type: ignore[import-not-found]
    except ImportError as error:
        raise BadInput(
            f"reading '{path.name}' needs Pillow: pip install pillow, or give .npy arrays"
        ) from error
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (UnidentifiedImageError, OSError) as error:
        raise BadInput(f"'{path}' cannot be read as an image: {error}; take it out") from error


def _fitted(images: Tensor, height: int, width: int) -> Float[Tensor, "n channels height width"]:
    """Numbers 0 to 1, the shorter side scaled to the model's, the middle kept."""
    if images.ndim != 4:
        raise BadInput(f"images are {list(images.shape)}; wanted [n channels height width]")
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    if not bool(torch.isfinite(pixels).all()) or pixels.min() < 0 or pixels.max() > 1:
        raise BadInput("images hold numbers outside 0 to 1; give them so, or as bytes 0 to 255")
    scale = max(height / pixels.shape[2], width / pixels.shape[3])
    if scale != 1:
        size = [max(want, round(scale * have)) for want, have in
                zip((height, width), pixels.shape[2:], strict=True)]  # fmt: skip
        pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    top, left = (pixels.shape[2] - height) // 2, (pixels.shape[3] - width) // 2
    return pixels[:, :, top : top + height, left : left + width]
