"""First-token sinks: attention parked on position 0."""

import torch

from circuits.heads.detector import Detector, random_key, score_and_null
from circuits.heads.prompt_sets import TEXT
from interp.data.prompts import Prompts
from interp.models.model import Model
from interp.run.statistics import Mass


def _statistics(model: Model, prompts: Prompts) -> dict[str, Mass]:
    rows = prompts.positions >= 1
    first = torch.zeros_like(prompts.positions)[..., None]
    return {"score": Mass(first, rows), "null": Mass(random_key(prompts, lowest=1), rows)}


FIRST_TOKEN_SINK = Detector(
    name="first_token_sink",
    title="First-token sink",
    letter="S",
    description="Mean of A[q, 0] on prose: the head parks its attention on the first token (BOS where "
    "the tokenizer has one). On other text the same head may do something else.",
    source="Gu et al. 2024, When Attention Sink Emerges, eq. 5 (their epsilon 0.3, on 64 tokens; ours 128)",
    reads=TEXT,
    null="the same rows' attention to a later visible key drawn at random",
    threshold=0.3,
    margin=0.2,
    rank=8,
    statistics=_statistics,
    combine=score_and_null,
    causal_only=True,
)
