"""Fixed-offset heads: attention to the token exactly k back (in an encoder also ahead), k from 2 to 8."""

from circuits.heads.detector import Detector, offset_key, strongest
from circuits.heads.prompt_sets import TEXT
from interp.data.prompts import Prompts
from interp.models.model import Model
from interp.run.statistics import Mass

OFFSETS = range(2, 9)
CONTROL_OFFSETS = range(12, 19)  # as many, so that choosing the best of them favours neither


def _statistics(model: Model, prompts: Prompts) -> dict[str, Mass]:
    reach = CONTROL_OFFSETS.stop
    rows = prompts.positions >= min(prompts.lead + reach, prompts.length - 1)
    offsets = [*OFFSETS, *CONTROL_OFFSETS]
    if not prompts.causal:
        middle = prompts.length // 2
        rows = prompts.positions >= min(prompts.lead + reach, middle)
        rows &= prompts.positions <= max(prompts.length - 1 - reach, middle)
        offsets += [-k for k in offsets]
    return {str(k): Mass(offset_key(prompts, k), rows) for k in offsets}


def _combine(seen, _):
    best, control = (
        strongest([value for k, value in seen.items() if abs(int(k)) in which])
        for which in (OFFSETS, CONTROL_OFFSETS)
    )
    return best, control


FIXED_OFFSET = Detector(
    name="fixed_offset",
    title="Fixed offset",
    letter="F",
    description="Largest over k = 2…8 of the mean of A[q, q-k] on prose: the head looks a fixed "
    "number of tokens back. In an encoder also ahead, k = -2…-8. The tokens just before and after have "
    "roles of their own.",
    source="Clark et al. 2019, What Does BERT Look At, §3 (broad offsets); range and threshold ours",
    reads=TEXT,
    null="the best of as many offsets further away (12…18) on the same rows",
    threshold=0.3,
    margin=0.2,
    rank=4,
    statistics=_statistics,
    combine=_combine,
)
