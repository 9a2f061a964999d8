"""Where heads of image models park their attention: one patch, or registers."""

from __future__ import annotations

import torch

from circuits.heads.detector import Detector, score_and_null
from circuits.heads.patches import distances
from circuits.heads.prompt_sets import IMAGES
from circuits.heads.streamed import Streamed
from circuits.heads.tokens import as_many
from interp.data.images import Images, patch_grid
from interp.errors import Refused
from interp.models.model import Model
from interp.run.statistics import Expected

APART = 2.0
"""A patch must be watched from beyond its neighbourhood: rows this near, in patches, do not count."""


def _sink(model: Model, images: Images) -> dict[str, Streamed]:
    patches = images.grid.places.flatten()
    far = distances(images.grid) >= APART  # between patches only
    rows = far.sum(0).clamp_min(1)

    def columns(pattern: torch.Tensor, start: int) -> torch.Tensor:
        part = far[start : start + pattern.shape[2], : pattern.shape[3]].to(pattern)
        return torch.einsum("bhqk,qk->bhk", pattern, part)

    def mean(total: torch.Tensor) -> torch.Tensor:
        return (total / rows.to(total))[..., patches.to(total.device)]

    return {
        "score": Streamed(columns, lambda total: mean(total).amax(-1)),
        "null": Streamed(columns, lambda total: mean(total).mean(-1)),
    }


PATCH_SINK = Detector(
    name="patch_sink",
    title="Patch sink",
    letter="l",
    description="Largest mean attention that one patch gets from all patches two or more away, on images; which "
    "patch it is differs between images. In trained image models such patches tend to be background that stores "
    "something about the whole image; the score shows the attention, not what is stored.",
    source="after Darcet et al. 2024, Vision Transformers Need Registers, §2 (there found by their large norm); "
    "threshold as for sinks of text models",
    reads=IMAGES,
    null="what a patch gets of the same rows on average: the expectation where patches are shuffled row by row",
    threshold=0.3,
    margin=0.2,
    rank=11,
    statistics=_sink,
    combine=score_and_null,
)


def _registers(model: Model, images: Images) -> dict[str, Expected]:
    chosen = torch.isin(images.positions, torch.tensor(images.grid.others[1:]))
    return {
        "score": Expected(chosen.float(), images.content),
        "null": Expected(as_many(chosen, images).float(), images.content),
    }


def _no_registers(model: Model) -> str | None:
    try:
        found = len(patch_grid(model).others)
    except Refused as refusal:
        return str(refusal)
    return None if found > 1 else "the model has no tokens beside patches and CLS"


REGISTER = Detector(
    name="register",
    title="Register",
    letter="g",
    description="Mean attention of patches, on images, to tokens that are neither patches nor the first one: "
    "registers, a distillation token. It does not show what is kept there.",
    source="Darcet et al. 2024, Vision Transformers Need Registers, §3; threshold ours",
    reads=IMAGES,
    null="the same rows' attention to as many patches drawn at random",
    threshold=0.4,
    margin=0.25,
    rank=10,
    statistics=_registers,
    combine=score_and_null,
    unfit=_no_registers,
)
