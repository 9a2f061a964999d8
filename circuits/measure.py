"""A metric of one task on one model: its value on clean and corrupted prompts, and values in between."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from interp import metrics
from interp.data.pairs import Pairs
from interp.errors import BadInput, unknown
from interp.models.model import Model

log = logging.getLogger("interp")

Logits = Float[Tensor, "n d_vocab"]

METRICS: dict[str, tuple[str, Callable[[Logits, Pairs, Logits], Tensor]]] = {
    "logit_diff": (
        "logits",
        lambda logits, pairs, clean: metrics.logit_diff(logits, pairs.answers, pairs.wrong),
    ),
    "prob_diff": (
        "probability",
        lambda logits, pairs, clean: metrics.prob_diff(logits, pairs.answers, pairs.wrong),
    ),
    "kl": ("nats", lambda logits, pairs, clean: metrics.kl(clean.to(logits.device), logits)),
    "loss": ("nats", lambda logits, pairs, clean: metrics.answer_loss(logits, pairs.answers)),
}
"""Unit and `(logits, pairs, clean logits) -> [n]` of every metric, read at the last position."""


@dataclass(frozen=True)
class Measure:
    """A metric with its two ends, so that any value can be told raw and normalised.

    Attributes:
        pairs, metric, unit: what is measured.
        clean, corrupted: the metric on either side, [n]. clean_logits: [n d_vocab], last position.
        notes: what a reader must know (a model that does not do the task).
    """

    pairs: Pairs
    metric: str
    unit: str
    clean: Float[Tensor, " n"]
    corrupted: Float[Tensor, " n"]
    clean_logits: Logits
    notes: tuple[str, ...] = ()

    def __call__(self, logits: Float[Tensor, "n d_vocab"]) -> Float[Tensor, " n"]:
        """The metric of each pair at these last-position logits; differentiable."""
        return METRICS[self.metric][1](logits, self.pairs, self.clean_logits)

    def rows(self, rows: slice) -> Measure:
        """The measure of some of the pairs."""
        return replace(
            self,
            pairs=self.pairs.rows(rows),
            clean=self.clean[rows],
            corrupted=self.corrupted[rows],
            clean_logits=self.clean_logits[rows],
        )

    def normalised(self, values: Float[Tensor, "*variants n"]) -> Float[Tensor, "*variants"]:
        """0 where corrupted, 1 where clean: a ratio of means over the pairs, not a mean of ratios."""
        low, high = self.corrupted.mean(), self.clean.mean()
        return (values.mean(-1) - low) / (high - low)


@torch.no_grad()
def measure(model: Model, pairs: Pairs, metric: str = "logit_diff") -> Measure:
    """The metric of `pairs` with the model's values on both sides (two forwards, last position only).

    Raises:
        BadInput: an unknown metric; a metric that is not finite, or the same on both sides.

    >>> pairs = Pairs.of([[5, 6, 7]], [[5, 9, 7]], answers=[3], wrong=[4])
    >>> found = measure(tiny_model(), pairs)
    >>> found.normalised(torch.stack([found.corrupted, found.clean]))
    tensor([0., 1.])
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    read = torch.tensor([pairs.end])
    sides = []
    for batch in (pairs.clean_batch, pairs.corrupted_batch):
        logits = model.run(batch, logits=read).logits
        assert logits is not None
        sides.append(logits[:, -1].float())
    return measure_of(pairs, metric, *sides)


def measure_of(
    pairs: Pairs, metric: str, clean_logits: Logits, corrupted_logits: Logits
) -> Measure:
    """`measure` where the logits of the last position are known already."""
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    unit, function = METRICS[metric]
    clean, corrupted = (
        function(logits, pairs, clean_logits) for logits in (clean_logits, corrupted_logits)
    )
    for side, values in (("clean", clean), ("corrupted", corrupted)):
        if not torch.isfinite(values).all():
            bad = int((~torch.isfinite(values)).nonzero()[0])
            raise BadInput(
                f"{metric} of task '{pairs.name}' is {float(values[bad])} on {side} prompt {bad}: "
                "nothing can be compared with it; check the model's logits and the answers"
            )
    if float((clean.mean() - corrupted.mean()).abs()) < 1e-6:
        raise BadInput(
            f"{metric} of task '{pairs.name}' is {float(clean.mean()):.4f} {unit} on the clean and on the "
            "corrupted prompts alike: the corruption changes nothing that this metric sees"
        )
    prefers = metrics.logit_diff(clean_logits, pairs.answers, pairs.wrong)
    notes = []
    if int((prefers <= 0).sum()):
        notes.append(
            f"the model does not prefer the answer on {int((prefers <= 0).sum())} of {len(pairs)} clean "
            f"prompts (mean logit difference {float(prefers.mean()):+.2f} logits)"
        )
        log.warning("task '%s': %s", pairs.name, notes[0])
    return Measure(pairs, metric, unit, clean, corrupted, clean_logits, tuple(notes))
