"""Separator heads: attention to [SEP] (</s>), wherever it stands."""

from circuits.heads.detector import Detector, score_and_null
from circuits.heads.encoder import no_separator
from circuits.heads.prompt_sets import PAIRS
from circuits.heads.tokens import as_many
from interp.data.prompts import Prompts
from interp.models.model import Model
from interp.run.statistics import Expected


def _statistics(model: Model, prompts: Prompts) -> dict[str, Expected]:
    assert prompts.separators is not None
    others = as_many(prompts.separators, prompts)
    return {
        "score": Expected(prompts.separators.float(), prompts.content),
        "null": Expected(others.float(), prompts.content),
    }


SEPARATOR = Detector(
    name="separator",
    title="Separator",
    letter="s",
    description="Mean of Σ A[q, k] over the separators k, on passages of prose that the tokenizer joins as "
    "two texts, cut at another place in every prompt; q are ordinary tokens. In BERT it mostly means that "
    "the head has nothing to do there (a no-op); this score alone does not show that.",
    source="Clark et al. 2019, What Does BERT Look At, §3.2; Kovaleva et al. 2019, Revealing the Dark Secrets of "
    "BERT, §4.1 (vertical patterns); threshold ours",
    reads=PAIRS,
    null="the same rows' attention to as many ordinary tokens drawn at random",
    threshold=0.4,
    margin=0.25,
    rank=8,
    statistics=_statistics,
    combine=score_and_null,
    encoder_only=True,
    unfit=no_separator,
)
