"""Broad heads: attention spread over most of what can be seen, yet not evenly."""

import torch

from circuits.heads.detector import Detector, visible_keys
from circuits.heads.prompt_sets import IMAGES, TEXT
from interp.data.images import Images
from interp.data.prompts import Prompts
from interp.models.model import Model
from interp.run.statistics import Entropy


def _statistics(model: Model, prompts: Prompts | Images) -> dict[str, Entropy]:
    rows = prompts.positions >= 1 if prompts.causal else prompts.positions >= 0
    return {"score": Entropy(rows, visible_keys(prompts))}


def _combine(seen, control):
    return seen["score"], torch.ones_like(seen["score"])


BROAD = Detector(
    name="broad",
    title="Broad",
    letter="B",
    description="Entropy of attention on prose (or images) as a share of the largest possible: the head spreads over "
    "most of what it sees. A head without any preference (over 0.97; untrained heads reach 0.99) gets "
    "no label.",
    source="Clark et al. 2019, What Does BERT Look At, §3.1 (broad heads); normalisation, band and threshold ours",
    reads=TEXT,
    sees=IMAGES,
    null="a head without preference: attention to all visible keys alike (entropy share 1)",
    threshold=0.8,
    margin=0.03,
    side=-1,
    rank=7,
    unit="share of maximal entropy",
    statistics=_statistics,
    combine=_combine,
)
