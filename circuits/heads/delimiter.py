"""Delimiter heads: attention to punctuation and line breaks."""

from circuits.heads.detector import Detector, score_and_null
from circuits.heads.prompt_sets import TEXT
from circuits.heads.tokens import attention_to, delimiters

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
    statistics=attention_to(delimiters),
    combine=score_and_null,
)
