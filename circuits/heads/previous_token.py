"""Previous-token heads: attention from each token to the one before it."""

from circuits.heads.detector import Detector, offset_key, random_key, score_and_null
from circuits.heads.prompt_sets import REPEATED
from interp.data.prompts import Prompts
from interp.models.model import Model
from interp.run.statistics import Mass


def _statistics(model: Model, prompts: Prompts) -> dict[str, Mass]:
    rows = prompts.positions >= max(prompts.lead + 1, 1)
    return {"score": Mass(offset_key(prompts, 1), rows), "null": Mass(random_key(prompts), rows)}


PREVIOUS_TOKEN = Detector(
    name="previous_token",
    title="Previous token",
    letter="P",
    description="Mean of A[q, q-1] on random tokens: the head looks one token back whatever stands "
    "there. It does not show that what it moves is used.",
    source="Elhage et al. 2021, A Mathematical Framework, induction heads; threshold ours",
    reads=REPEATED,
    null="the same rows' attention to a visible key drawn at random",
    threshold=0.4,
    margin=0.2,
    rank=3,
    statistics=_statistics,
    combine=score_and_null,
    serves="repeated",
)
