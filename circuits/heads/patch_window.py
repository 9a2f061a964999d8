"""Local heads of image models: attention inside the 3 × 3 patches around each one."""

import torch

from circuits.heads.detector import Detector, strongest
from circuits.heads.patches import neighbours
from circuits.heads.prompt_sets import IMAGES
from interp.data.images import Images
from interp.models.model import Model
from interp.run.statistics import Mass

WINDOW = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]


def _statistics(model: Model, images: Images) -> dict[str, Mass]:
    keys = [neighbours(images.grid, *offset).expand(len(images), -1) for offset in WINDOW]
    single = {str(i): Mass(at[..., None], images.content) for i, at in enumerate(keys)}
    return {"score": Mass(torch.stack(keys, dim=-1), images.content), **single}


def _combine(seen, control):
    return seen["score"], strongest([seen[str(i)] for i in range(len(WINDOW))])


PATCH_WINDOW = Detector(
    name="patch_window",
    title="Patch window",
    letter="w",
    description="Mean attention on images of a patch to itself and the eight around it: the head works locally. "
    "The label asks for a window: heads that look at one fixed place have a role of their own.",
    source="Raghu et al. 2021, Do Vision Transformers See Like CNNs, §4 (local heads in the lower layers); window "
    "of 3 × 3 and threshold ours",
    reads=IMAGES,
    null="the same rows' mass on the best single place of the nine",
    threshold=0.5,
    margin=0.2,
    rank=6,
    statistics=_statistics,
    combine=_combine,
)
