"""Recency heads: attention inside a short window that no single offset explains."""

import torch

from circuits.heads.detector import Detector, offset_key, strongest
from circuits.heads.prompt_sets import TEXT
from interp.data.prompts import Prompts
from interp.models.model import Model
from interp.run.statistics import Mass

WINDOW = 10


def _statistics(model: Model, prompts: Prompts) -> dict[str, Mass]:
    rows = prompts.positions >= min(WINDOW + 2, prompts.length - 1)
    offsets = [offset_key(prompts, k) for k in range(WINDOW + 1)]
    single = {str(k): Mass(keys, rows) for k, keys in enumerate(offsets)}
    return {"score": Mass(torch.cat(offsets, dim=-1), rows), **single}


def _combine(seen, control):
    return seen["score"], strongest([seen[str(k)] for k in range(WINDOW + 1)])


RECENCY = Detector(
    name="recency",
    title="Recency",
    letter="R",
    description="Mean attention on prose to the last ten tokens and the current one. The label asks for "
    "a window: heads that look at one fixed offset have their own roles.",
    source="RecurFormer (Yan et al. 2024), recency ratio; window of 10 and threshold ours",
    reads=TEXT,
    null="the same rows' mass on the window's best single offset",
    threshold=0.5,
    margin=0.2,
    rank=6,
    statistics=_statistics,
    combine=_combine,
    causal_only=True,
)
