"""Current-token heads: attention of each token to itself."""

from circuits.heads.detector import Detector, offset_key, random_key, score_and_null
from circuits.heads.prompt_sets import IMAGES, REPEATED
from interp.data.images import Images
from interp.data.prompts import Prompts
from interp.models.model import Model
from interp.run.statistics import Mass


def _statistics(model: Model, prompts: Prompts | Images) -> dict[str, Mass]:
    rows = prompts.positions >= 1
    return {"score": Mass(offset_key(prompts, 0), rows), "null": Mass(random_key(prompts), rows)}


CURRENT_TOKEN = Detector(
    name="current_token",
    title="Current token",
    letter="C",
    description="Mean of A[q, q] on random tokens (on images: of every patch to itself): the head reads "
    "the token it stands on.",
    source="Clark et al. 2019, What Does BERT Look At, §3; threshold ours",
    reads=REPEATED,
    sees=IMAGES,
    null="the same rows' attention to a visible key drawn at random",
    threshold=0.4,
    margin=0.2,
    rank=5,
    statistics=_statistics,
    combine=score_and_null,
)
