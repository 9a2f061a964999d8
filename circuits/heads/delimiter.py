"""Delimiter heads: attention to punctuation and line breaks."""

from circuits.heads.detector import Detector, score_and_null
from circuits.heads.prompt_sets import TEXT
from circuits.heads.tokens import as_many, delimiters
from interp.data.prompts import Prompts
from interp.models.model import Model
from interp.run.statistics import Expected


def _statistics(model: Model, prompts: Prompts) -> dict[str, Expected]:
    rows = prompts.positions >= prompts.length // 4
    keys = delimiters(model, prompts)
    return {
        "score": Expected(keys.float(), rows),
        "null": Expected(as_many(keys, prompts).float(), rows),
    }


DELIMITER = Detector(
    name="delimiter",
    title="Delimiter",
    letter="M",
    description="Mean attention on prose to tokens that are punctuation or line breaks. It does not show "
    "whether the head reads something there or only rests there.",
    source="Clark et al. 2019, What Does BERT Look At, §3.2 (separators and punctuation); threshold ours",
    reads=TEXT,
    null="the same rows' attention to as many other positions drawn at random",
    threshold=0.4,
    margin=0.25,
    rank=9,
    statistics=_statistics,
    combine=score_and_null,
)
