"""Duplicate-token heads: attention to the earlier copy of the current token."""

from circuits.heads.detector import Detector, offset_key, score_on_control
from circuits.heads.prompt_sets import REPEATED
from interp.data.prompts import Prompts
from interp.models.model import Model
from interp.run.statistics import Mass


def _statistics(model: Model, prompts: Prompts) -> dict[str, Mass]:
    return {"score": Mass(offset_key(prompts, prompts.period), prompts.second_half)}


DUPLICATE_TOKEN = Detector(
    name="duplicate_token",
    title="Duplicate token",
    letter="D",
    description="Mean attention in the second copy of repeated random tokens to the first copy of the "
    "same token.",
    source="Wang et al. 2022, IOI, §3 (duplicate-token heads); threshold ours",
    reads=REPEATED,
    null="the same rows and keys where the second half is fresh tokens (no repeat)",
    threshold=0.3,
    margin=0.2,
    rank=2,
    statistics=_statistics,
    combine=score_on_control,
    serves="repeated",
)
