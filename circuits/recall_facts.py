"""Facts to explain: those that a model knows, each with a counterfactual, and one clean run of them all.

A fact's counterfactual is another fact of the same template, so patching from it is patching from
another row of the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from circuits.heads.claims import INTERVAL, resampling
from interp.data.facts import Fact, FactPrompts
from interp.errors import BadInput
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.cache import Run

MIN_FACTS = 8
ALPHA = 0.01
"""Significance of a label, corrected over everything tested beside it (Benjamini & Hochberg 1995)."""


@dataclass(frozen=True)
class Asked:
    """The facts used, what each is compared with, and the weights of the bootstrap.

    Attributes:
        other: for every row, a row with another answer: its counterfactual.
        shuffled: for every row, a row whose answer and counterfactual answer are both not its own:
            measured with that row's answers, a quantity shows what it is worth without the fact.
        draws: [resample n], every row sums to 1.
    """

    prompts: FactPrompts
    other: Int[Tensor, " n"]
    shuffled: Int[Tensor, " n"]
    draws: np.ndarray

    @property
    def answers(self) -> Int[Tensor, " n"]:
        return self.prompts.answers

    @property
    def batch(self) -> Batch:
        return Batch.of_ids(self.prompts.ids)

    def interval(self, values: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean over facts, and the bootstrap interval of it, of values [n ...]."""
        values = np.asarray(values, dtype=float)
        low, high = np.quantile(np.tensordot(self.draws, values, 1), INTERVAL, axis=0)
        return values.mean(0), low, high

    def named(self, name: str, values: Any) -> dict[str, float]:
        """The mean of values [n] and its interval, as columns."""
        mean, low, high = self.interval(values)
        return {name: float(mean), f"{name}_low": float(low), f"{name}_high": float(high)}


# --- which facts ---------------------------------------------------------------------------------


def parsed(facts: Sequence[str]) -> list[Fact]:
    """Facts from "subject=answer"."""
    found = []
    for text in facts:
        subject, sign, answer = (part.strip() for part in text.partition("="))
        if not (subject and sign and answer):
            raise BadInput(
                f"fact {text!r} is not of the form 'subject=answer', as in 'France=Paris'"
            )
        found.append(Fact(subject, answer))
    if len(found) < MIN_FACTS:
        raise BadInput(
            f"{len(found)} facts: intervals over facts need at least {MIN_FACTS} of them"
        )
    return found


@torch.no_grad()
def ask(
    model: Model, candidates: FactPrompts, template: str, *, n: int, known_rank: int, seed: int
) -> tuple[Asked, list[dict[str, Any]]]:
    """The facts that the model knows, n of them, each with its counterfactual; and what became of all."""
    end = torch.tensor([candidates.end])
    logits = []
    for start in range(0, len(candidates), 64):
        ids = candidates.ids[start : start + 64]
        found = model.run(Batch.of_ids(ids), logits=end).logits
        assert found is not None
        logits.append(found[:, -1].float().cpu())
    last = torch.cat(logits)
    answer = last.gather(1, candidates.answers[:, None])
    ranks = (last > answer).sum(1)
    chances = (answer[:, 0] - last.logsumexp(1)).exp()
    tops = model.tokens(last.argmax(1).tolist())
    known = (ranks <= known_rank).nonzero()[:, 0]
    if len(known) < MIN_FACTS:
        said = ", ".join(
            f"{fact.subject}: {top!r} for {fact.answer!r}"
            for fact, top, rank in zip(candidates.facts, tops, ranks, strict=True)
            if rank > known_rank
        )
        raise BadInput(
            f"{model.id} knows {len(known)} of {len(candidates)} facts (answer at rank {known_rank} or "
            f"better); {MIN_FACTS} are needed. It answered {said[:200]} …: try another relation or template, "
            "or a larger known_rank"
        )
    order = np.random.default_rng(seed).permutation(len(known))[:n]
    chosen = known[torch.from_numpy(np.sort(order))]
    prompts = candidates.rows(chosen.tolist())
    if len(set(prompts.answers.tolist())) < 3:
        raise BadInput(
            "the known facts have fewer than 3 different answers: nothing to compare them with"
        )
    other, shuffled = _counterfactuals(prompts.answers.numpy(), seed)
    used, all_known = set(chosen.tolist()), set(known.tolist())
    about = [
        fact_row(
            fact,
            template,
            "used" if i in used else "known, not drawn" if i in all_known else "not known",
            rank=int(ranks[i]),
            probability=float(chances[i]),
            top=tops[i],
        )
        for i, fact in enumerate(candidates.facts)
    ]
    return Asked(prompts, other, shuffled, resampling(len(prompts), seed)), about


def _counterfactuals(answers: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
    """For every row, one with another answer; and one whose pair of answers has nothing of its own."""
    draw = np.random.default_rng(seed)
    other = np.array([draw.choice(np.flatnonzero(answers != answer)) for answer in answers])
    shuffled = []
    for answer in answers:
        fits = (answers != answer) & (answers[other] != answer)
        shuffled.append(draw.choice(np.flatnonzero(fits if fits.any() else answers != answer)))
    return torch.from_numpy(other), torch.tensor(shuffled)


def fact_row(
    fact: Fact,
    template: str,
    status: str,
    *,
    reason: str = "",
    rank: int = -1,
    probability: float = np.nan,
    top: str = "",
) -> dict[str, Any]:
    """One row of table "facts"; rank −1 where the model was not asked."""
    return {
        "prompt": template.format(subject=fact.subject),
        "subject": fact.subject,
        "answer": fact.answer,
        "rank": rank,
        "probability": probability,
        "top_token": top,
        "known": status in ("used", "known, not drawn"),
        "status": status,
        "reason": reason,
    }


# --- the runs ------------------------------------------------------------------------------------


def clean_run(model: Model, asked: Asked) -> Run:
    """One run with everything that is read at the end, and what a replay starts from."""
    sites = ["resid_pre", "resid_post", "z", "mlp_write"]
    if "resid_mid" not in model.spec.refused:
        sites.append("resid_mid")
    sites += [
        f"attn_out.{layer}"
        for layer, block in enumerate(model.spec.blocks)
        if block.attn_write is not None and not block.direct
    ]
    return model.run(asked.batch, capture=sites, logits=torch.tensor([asked.prompts.end]))


def _at_end(run: Run) -> Float[Tensor, "n d_vocab"]:
    assert run.logits is not None
    return run.logits[:, -1].float().cpu()


def log_odds(run: Run, asked: Asked) -> Float[Tensor, " n"]:
    """m: logit of the answer less logit of the counterfactual's answer, at the end."""
    logits, rows = _at_end(run), torch.arange(len(asked.answers))
    return logits[rows, asked.answers] - logits[rows, asked.answers[asked.other]]


def log_p(run: Run, asked: Asked) -> Float[Tensor, " n"]:
    """log p(answer) at the end, nats."""
    return _at_end(run).log_softmax(-1)[torch.arange(len(asked.answers)), asked.answers]


def corrected_p(values: Float[np.ndarray, "n tests"], *, sides: int) -> Float[np.ndarray, " tests"]:
    """p of t-tests over facts against 0, corrected over the tests; one-sided: is the mean above 0?

    1 where all values are 0.
    """
    mean, spread = values.mean(0), values.std(0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = mean / (spread / np.sqrt(len(values)))
    p = stats.t.sf(t, df=len(values) - 1) if sides == 1 else 2 * stats.t.sf(abs(t), len(values) - 1)
    return stats.false_discovery_control(np.where(np.isnan(p), 1.0, p))
