"""How far heads of image models look: mean distance of attention between patches."""

from __future__ import annotations

import torch

from circuits.heads.detector import Detector, PerPrompt
from circuits.heads.patches import distances
from circuits.heads.prompt_sets import IMAGES
from circuits.heads.streamed import Streamed
from interp.data.images import Images
from interp.models.model import Model
from interp.run.statistics import Expected, Statistic


def _statistics(model: Model, images: Images) -> dict[str, Statistic | Streamed]:
    far = distances(images.grid)
    n_patches = images.grid.places.numel()
    even = float(far.sum()) / n_patches**2

    def reach(pattern: torch.Tensor, start: int) -> torch.Tensor:
        part = far[start : start + pattern.shape[2], : pattern.shape[3]].to(pattern)
        return torch.einsum("bhqk,qk->bh", pattern, part) / n_patches

    def evenly(pattern: torch.Tensor, start: int) -> torch.Tensor:
        share = pattern.shape[2] / images.length  # of all rows, so that chunks sum to one
        return pattern.new_full(pattern.shape[:2], even * share)

    return {
        "far": Streamed(reach),
        "even": Streamed(evenly),
        "mass": Expected(images.content.float(), images.content),
    }


def _combine(seen, control) -> tuple[PerPrompt, PerPrompt]:
    return seen["far"] / seen["mass"].clamp_min(1e-6), seen["even"]


PATCH_DISTANCE = Detector(
    name="patch_distance",
    title="Mean patch distance",
    letter="t",
    description="Σ A[q, k] ‖place(q) − place(k)‖ / Σ A[q, k] over pairs of patches, on images: how far the head "
    "looks, in patches. A score, not a label; of a head that parks nearly all its attention on CLS or registers it "
    "describes only the rest.",
    source="Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, appendix D.7 (there in pixels); Raghu et al. "
    "2021, Do Vision Transformers See Like CNNs, §4",
    reads=IMAGES,
    null="even attention to all patches",
    threshold=None,
    margin=0.0,
    side=-1,
    rank=12,
    unit="patches",
    statistics=_statistics,
    combine=_combine,
)
