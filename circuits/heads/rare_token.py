"""Rare-token heads: attention to the least frequent tokens of a text."""

from circuits.heads.detector import Detector, score_and_null
from circuits.heads.prompt_sets import TEXT
from circuits.heads.tokens import attention_to, rare

RARE_TOKEN = Detector(
    name="rare_token",
    title="Rare token",
    letter="W",
    description="Mean attention on prose to the rarest tokens, those that together make up 5 % of the "
    "text. Rare tokens carry more of a text's content; the score does not show that it is used.",
    source="Voita et al. 2019, Analyzing Multi-Head Self-Attention, §5 (rare-token heads attend to the one "
    "least frequent token; ours to the rarest 5 %); threshold ours",
    reads=TEXT,
    null="the same rows' attention to as many other positions drawn at random",
    threshold=0.3,
    margin=0.2,
    rank=10,
    statistics=attention_to(rare),
    combine=score_and_null,
)
