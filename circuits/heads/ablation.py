"""Does it matter: the change in loss when a head's output is replaced by its mean, by zero, or by another prompt's.

Each labelled head is mean-ablated on the prompts its role serves, beside as many unlabelled heads of
the same layers. Blocks before the head are not computed again, and all heads of a layer share forwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from circuits.heads.claims import INTERVAL, resampling
from circuits.heads.judge import Judge, judge_of
from interp.data.images import Images
from interp.data.prompts import Prompts
from interp.errors import Refused, unknown
from interp.models.model import Model
from interp.run.cache import Run
from interp.run.edits import Edit
from interp.run.resume import Checkpoint

Head = tuple[int, int]

KINDS = {"mean": Edit.mean, "zero": Edit.zero, "resample": Edit.resample}
"""What stands in place of a head's z: its mean over prompts and positions, zero, or z of another prompt."""

TOKENS_PER_FORWARD = 8192
"""All heads of a layer together where the prompts are few: large products cost less a token than small ones."""


@dataclass(frozen=True)
class Plan:
    """Which heads are ablated on one prompt set, and which of them are controls."""

    judge: Judge
    labelled: tuple[Head, ...]
    controls: tuple[Head, ...]


def matched_heads(
    every: Iterable[Head], heads: Sequence[Head], generator: np.random.Generator
) -> list[Head]:
    """As many heads of the same layers, drawn at random from `every` without `heads`.

    Fewer where a layer has not as many others.

    >>> matched_heads([(0, 0), (0, 1), (1, 0)], [(0, 0), (1, 0)], np.random.default_rng(0))
    [(0, 1)]
    """
    others = [head for head in every if head not in set(heads)]
    drawn: list[Head] = []
    for layer, count in sorted(Counter(layer for layer, _ in heads).items()):
        pool = [head for head in others if head[0] == layer]
        drawn += sorted(pool[i] for i in generator.permutation(len(pool))[:count])
    return drawn


def plan_ablations(
    table: pd.DataFrame, serves: dict[str, str], sets: dict[str, Judge], seed: int
) -> dict[str, Plan]:
    """For each metric, the labelled heads whose role it serves, and their controls.

    `serves` maps detector names to prompt sets; a head with roles of both kinds is tried on repeated
    tokens. Controls are as many heads of the same layers, unlabelled where there are enough, else
    filled up with heads that have no label of this metric (in many models nearly every head is a sink
    on prose, which says nothing about repeats).
    """
    roles = {
        (int(layer), int(head)): [role for role in labels.split(",") if role]
        for layer, head, labels in zip(table["layer"], table["head"], table["labels"], strict=True)
    }
    kinds = {head: {serves[role] for role in mine} for head, mine in roles.items()}
    plans = {}
    for metric, judge in sets.items():
        heads = [
            head
            for head, kind in kinds.items()
            if (
                metric in kind
                and (metric == "repeated" or "repeated" not in kind or "repeated" not in sets)
            )
        ]
        generator = np.random.default_rng(seed)
        controls: list[Head] = []
        for layer, wanted in sorted(Counter(layer for layer, _ in heads).items()):
            pool = [head for head, kind in kinds.items() if head[0] == layer and metric not in kind]
            pool = [pool[i] for i in generator.permutation(len(pool))]
            pool.sort(key=lambda head: len(roles[head]) > 0)  # unlabelled first
            controls += sorted(pool[:wanted])
        if heads:
            plans[metric] = Plan(judge, tuple(heads), tuple(controls))
    return plans


def ablation_effects(
    model: Model,
    prompts: Prompts | Images | Judge,
    heads: Sequence[Head],
    *,
    kind: str = "mean",
    checkpoint: Checkpoint | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """Change in each prompt's loss when a head's z is replaced: exact, every head alone.

    Args:
        prompts: repeated tokens (loss on the second half), text (loss on all of it), images (KL of class
            probabilities), or what else judges (`circuits.heads.judge`).
        heads: (layer, head) pairs.
        kind: "mean" over all prompts and positions, "zero", or "resample": the same positions of another
            prompt, drawn so that every prompt gets another's.

    Returns: [len(heads) n_prompts], nats (a token); positive where the head lowers the loss.

    Raises:
        BadInput: an unknown kind. Refused: a model without a loss to judge by.

    What it does not show: that other heads could not make up for this one (a small effect), or that
    its role is why it matters (a large one).
    """
    if kind not in KINDS:
        raise unknown("kind of ablation", kind, list(KINDS))
    judge = prompts if isinstance(prompts, Judge) else judge_of(model, prompts)
    if judge is None:
        raise Refused(f"{model.id} predicts neither tokens nor classes: nothing to judge heads by")
    checkpoint = Checkpoint() if checkpoint is None else checkpoint
    if not heads:
        return np.zeros((0, len(judge)))
    layers = sorted({layer for layer, _ in heads})

    def measure(run: Run) -> Tensor:
        assert run.logits is not None
        return judge.score(run.logits).cpu()

    @cache
    def clean() -> tuple[Run, Tensor]:
        """The clean run and its loss, made only if some unit is not stored yet."""
        sites = [f"resid_pre.{layer}" for layer in layers]
        run = model.run(judge.batch, capture=sites, logits=judge.read)
        return run, measure(run)

    effects = np.empty((len(heads), len(judge)))
    for layer in layers:
        places = [i for i, (at, _) in enumerate(heads) if at == layer]

        def unit(places: list[int] = places) -> dict[str, np.ndarray]:
            run, clean_loss = clean()
            variants = [[KINDS[kind]("z", heads=[heads[i]])] for i in places]
            losses = model.replay(
                *(run, variants, measure),
                logits=judge.read,
                tokens_per_forward=TOKENS_PER_FORWARD,
            )
            return {"effect": (torch.stack(losses) - clean_loss).numpy()}

        names = "-".join(str(heads[i][1]) for i in places)
        done = checkpoint.compute(f"ablate.{kind}.{judge.name}.{layer}.{names}", unit)
        effects[places] = done["effect"]
        advance(len(places))
    return effects


def ablation_columns(
    table: pd.DataFrame, plans: dict[str, Plan], effects: dict[str, np.ndarray], seed: int
) -> pd.DataFrame:
    """The table with each labelled head's effect, interval, and the mean effect of its controls."""
    table = table.copy()
    table["ablation_metric"] = pd.Series([None] * len(table), dtype="str")
    for name in ("effect", "low", "high", "control"):
        table[f"ablation_{name}"] = np.nan
    row_of = {
        (layer, head): row
        for row, (layer, head) in enumerate(zip(table["layer"], table["head"], strict=True))
    }
    for metric, plan in plans.items():
        effect = effects[metric]
        draws = resampling(effect.shape[1], seed)
        low, high = np.quantile(effect @ draws.T, INTERVAL, axis=1)
        mean = effect.mean(1)
        n = len(plan.labelled)
        for i, (layer, _) in enumerate(plan.labelled):
            row = row_of[plan.labelled[i]]
            same = [mean[n + j] for j, (at, _) in enumerate(plan.controls) if at == layer]
            values = (mean[i], low[i], high[i], np.mean(same) if same else np.nan)
            table.loc[row, "ablation_metric"] = plan.judge.title
            table.loc[
                row, ["ablation_effect", "ablation_low", "ablation_high", "ablation_control"]
            ] = values
    return table
