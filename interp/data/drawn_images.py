"""Images drawn from a seed: gratings, blobs, shapes, and noise with the 1/f spectrum of natural scenes.

They have edges, textures, objects and backgrounds, and none of the meaning of photographs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def drawn_images(
    n: int, height: int, width: int, *, seed: int = 0
) -> tuple[Float[Tensor, "n 3 height width"], tuple[str, ...]]:
    """`n` colour images with numbers from 0 to 1, kinds in turn, and what each is.

    >>> pixels, titles = drawn_images(4, 16, 16)
    >>> pixels.shape, titles
    (torch.Size([4, 3, 16, 16]), ('grating', 'blobs', 'shapes', 'noise'))
    """
    rng = np.random.default_rng(seed)
    titles = tuple(list(KINDS)[i % len(KINDS)] for i in range(n))
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    drawn = [KINDS[title](rng, y, x) for title in titles]
    return torch.from_numpy(np.stack(drawn)).float().permute(0, 3, 1, 2).clamp(0, 1), titles


def _grating(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Stripes of two colours at any angle."""
    angle, cycles, phase = rng.uniform(0, np.pi), rng.uniform(2, 12), rng.uniform(0, 2 * np.pi)
    wave = np.sin(2 * np.pi * cycles * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    return _mixed((wave[..., None] + 1) / 2, rng.random(3), rng.random(3))


def _blobs(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Soft round spots on an even ground."""
    image = np.broadcast_to(rng.random(3), (*y.shape, 3))
    for _ in range(rng.integers(2, 7)):
        (cy, cx), spread = rng.random(2), rng.uniform(0.04, 0.2)
        spot = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * spread**2))[..., None]
        image = _mixed(spot, image, rng.random(3))
    return image


def _shapes(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Discs, boxes and triangles with sharp edges, before noise."""
    image = 0.3 * _noise(rng, y, x) + 0.5 * rng.random(3)
    for _ in range(rng.integers(2, 6)):
        (cy, cx), size, kind = rng.random(2), rng.uniform(0.08, 0.25), rng.integers(3)
        dy, dx = y - cy, x - cx
        inside = (
            dy**2 + dx**2 < size**2,
            np.maximum(abs(dy), abs(dx)) < size,
            (dy < size) & (2 * abs(dx) < dy + size),
        )[kind]
        image = np.where(inside[..., None], rng.random(3), image)
    return image


def _noise(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Clouds with amplitude 1/f, as in natural scenes, of two colours and a little of the others."""
    frequency = np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) for n in y.shape), indexing="ij"))
    frequency[0, 0] = np.inf
    white = rng.standard_normal((3, *y.shape))
    clouds = np.fft.ifft2(np.fft.fft2(white) / frequency).real
    clouds /= clouds.std((1, 2), keepdims=True)
    ground = _mixed(1 / (1 + np.exp(-2 * clouds[0]))[..., None], rng.random(3), rng.random(3))
    return ground + 0.05 * clouds.transpose(1, 2, 0)


def _mixed(share: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (1 - share) * one + share * other


KINDS: dict[str, Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]] = {
    "grating": _grating,
    "blobs": _blobs,
    "shapes": _shapes,
    "noise": _noise,
}
