"""How far back heads look: mean distance of the attention that is not on the first token."""

import torch

from circuits.heads.detector import Detector, PerPrompt
from circuits.heads.prompt_sets import TEXT
from interp.data.prompts import Prompts
from interp.models.model import Model
from interp.run.statistics import Distance, Expected


def _statistics(model: Model, prompts: Prompts) -> dict[str, Distance | Expected]:
    keys = prompts.content & (prompts.positions >= 1)
    rows = prompts.positions >= prompts.length // 2 if prompts.causal else keys
    return {"far": Distance(keys, rows), "mass": Expected(keys.float(), rows)}


def _combine(seen, control) -> tuple[PerPrompt, PerPrompt]:
    distance = seen["far"] / seen["mass"].clamp_min(1e-6)
    return distance, torch.full_like(distance, torch.nan)


DISTANCE = Detector(
    name="distance",
    title="Mean distance",
    letter="T",
    description="Mean distance, in tokens, of the attention that a head pays on prose to tokens after the "
    "first, over the second half of the prompt (in an encoder over all of it, CLS and separators left out). A "
    "score, not a label; of a head that parks nearly all its attention on the first token it describes only "
    "the rest.",
    source="mean attention distance after Dosovitskiy et al. 2021, appendix D.7 (there in pixels); "
    "leaving out the first token is ours",
    reads=TEXT,
    null="none",
    threshold=None,
    margin=0.0,
    rank=12,
    unit="tokens",
    statistics=_statistics,
    combine=_combine,
)
