"""Next-token heads: attention from each token to the one after it, where a model reads in both directions."""

from circuits.heads.detector import Detector, offset_key, random_key, score_and_null
from circuits.heads.prompt_sets import REPEATED
from interp.data.prompts import Prompts
from interp.models.model import Model
from interp.run.statistics import Mass


def _statistics(model: Model, prompts: Prompts) -> dict[str, Mass]:
    rows = prompts.content & (prompts.positions < prompts.length - 1)
    return {"score": Mass(offset_key(prompts, -1), rows), "null": Mass(random_key(prompts), rows)}


NEXT_TOKEN = Detector(
    name="next_token",
    title="Next token",
    letter="f",
    description="Mean of A[q, q+1] on random tokens: the head looks one token ahead whatever stands "
    "there. It does not show that what it moves is used.",
    source="Clark et al. 2019, What Does BERT Look At, §3.1 (heads that attend to the next token); threshold ours",
    reads=REPEATED,
    null="the same rows' attention to a key drawn at random",
    threshold=0.4,
    margin=0.2,
    rank=3,
    statistics=_statistics,
    combine=score_and_null,
    encoder_only=True,
    serves="repeated",
)
