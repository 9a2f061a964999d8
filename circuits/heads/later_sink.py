"""Later sinks: attention parked on one token that is not the first."""

import torch

from circuits.heads.detector import Detector, PerPrompt, random_key
from circuits.heads.prompt_sets import TEXT
from circuits.heads.tokens import delimiters, rare
from interp.data.prompts import Prompts
from interp.models.model import Model
from interp.run.statistics import Expected, Mass, PeakColumn, Statistic

ROWS = 32
"""A key counts only if this many rows come after it."""


def _statistics(model: Model, prompts: Prompts) -> dict[str, Statistic]:
    first = max(prompts.lead, 1)
    rows = prompts.positions >= first
    late = min(ROWS, prompts.length // 2)
    keys = rows & (prompts.positions < prompts.length - late)
    kinds = {"delimiters": delimiters(model, prompts), "rare": rare(model, prompts)}
    return {
        "score": PeakColumn(keys, rows),
        "random": Mass(random_key(prompts, lowest=first), prompts.positions > first),
        **{name: Expected(chosen.float(), rows) for name, chosen in kinds.items()},
    }


def _combine(seen, control) -> tuple[PerPrompt, PerPrompt]:
    null = torch.stack([seen[name] for name in ("random", "delimiters", "rare")]).amax(0)
    return seen["score"], null


LATER_SINK = Detector(
    name="later_sink",
    title="Later sink",
    letter="L",
    description="Largest mean attention on prose that one token after the first gets from all tokens "
    "after it, where no kind of token (punctuation, rare ones) explains it. Which token it is differs "
    "between prompts.",
    source="after Hidden Attention Sinks and Gu et al. 2024 (their score, at positions after the first); "
    "threshold as theirs, 0.3",
    reads=TEXT,
    null="the largest of the same rows' attention to a random key, to all punctuation, to all rare tokens",
    threshold=0.3,
    margin=0.2,
    rank=11,
    statistics=_statistics,
    combine=_combine,
    causal_only=True,
)
