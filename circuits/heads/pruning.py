"""Pruning curves: the loss as heads are removed one batch after another, the least missed first.

Each batch is chosen by ablating every head that is left, exactly, in the model that is left: a head whose
work another one does is free to remove until the other is gone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from circuits.heads.claims import INTERVAL, resampling
from circuits.heads.game import PROMPTS, Base, Game, Head, prompts_of
from circuits.heads.shapley import layer_relative
from interp.errors import BadInput, unknown
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.progress import Progress
from interp.run.resume import Checkpoint

DRAWS = 3
"""Random orders behind the curve to compare with."""


def check_options(
    *, data: str = "repeated", prompts: int = 4, step: float = 0.1, most: float = 0.6, **_: Any
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if data not in PROMPTS:
        raise unknown("kind of prompts", data, PROMPTS)
    if prompts < 1:
        raise BadInput(f"prompts={prompts}: give at least 1")
    for name, value in (("step", step), ("most", most)):
        if not 0 < value <= 1:
            raise BadInput(f"{name}={value}: give a share of all heads, above 0 and at most 1")
    if step > most:
        raise BadInput(f"step={step} is more than most={most}: nothing would be removed")


@analysis(
    name="prune",
    source="Michel et al. 2019, §4.1 (iterative pruning; ours by exact ablation, measured again)",
    example="interp prune smollm2-135m",
    figure="curve",
    validate=check_options,
    summary=lambda report: report.table,
    takes="text",
)
def prune_heads(
    model: Model,
    *,
    data: str = "repeated",
    prompts: int = 4,
    length: int = 64,
    step: float = 0.1,
    most: float = 0.6,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """Loss against the number of heads removed, greedily by exact ablation re-measured at every step.

    "greedy": at each step the heads whose removal raises the loss least, in the model as it is by then.
    "once": the order of the first measurement throughout. "random": the mean of three random orders.
    Removed heads are replaced by their means over these prompts: a curve says what these prompts need, and
    heads chosen and judged on the same prompts look a little freer than they are.

    Args:
        model: from `interp.load`.
        data: "repeated" random tokens (loss on the second copy) or "text" (prose).
        prompts: how many.
        length: random tokens before they repeat, or tokens of prose, in each prompt.
        step: share of all heads removed between two measurements.
        most: share of all heads removed in the end.
        seed: of prompts and random orders.
        checkpoint: folder for finished steps, so that an interrupted call can be resumed.
        resume: go on from what is there.
        progress: show progress bars.

    Returns: a Report with table "prune" (a row for each order and number of heads removed: loss, low, high,
        nats a token), "order" (heads in the order of their removal, with the loss each cost then) and "alone" (every
        head's cost removed alone, and layer_relative: that over the root of its layer's sum of squares).

    Raises:
        BadInput: options as above. Refused: the model predicts no next token.

    >>> report = prune_heads(tiny_model(), step=0.25, most=0.5, progress=False)
    >>> report.table.groupby("order")["removed"].max().tolist(), len(report.tables["order"])
    ([4, 4, 4], 4)

    Source: Michel et al. 2019, §4.1 (iterative pruning by a gradient score; ours by the ablation itself)
    """
    started = time.perf_counter()
    check_options(data=data, prompts=prompts, step=step, most=most)
    options = {"data": data, "prompts": prompts, "length": length, "step": step, "most": most}
    meta = provenance(model, options=options, seed=seed)
    units = Checkpoint(
        checkpoint, {"model": meta["model"], "options": options, "seed": seed}, resume=resume
    )
    game = Game.of(model, prompts_of(model, data, prompts, seed, length))
    n = len(game.heads)
    size = max(1, round(step * n))
    steps = sorted({*range(0, round(most * n) + 1, size), round(most * n)})
    base = game.base()
    with Progress(progress) as bars:
        todo = sum(n - removed for removed in steps[:-1])
        ranked, costs, alone, losses = _greedy(
            game, base, steps, units, bars.stage("Ablating what is left", todo)
        )
    first = [game.heads[i] for i in alone.argsort(stable=True).tolist()]
    generator = np.random.default_rng(seed)
    curves = {"greedy": losses, "once": _curve(game, base, first, steps)}
    drawn = [
        _curve(game, base, [game.heads[i] for i in generator.permutation(n)], steps)
        for _ in range(DRAWS)
    ]
    curves["random"] = torch.stack(drawn).mean(0)
    weights = resampling(prompts, seed)
    rows = []
    for order, values in curves.items():
        low, high = np.quantile(values.numpy() @ weights.T, INTERVAL, axis=1)
        rows += [
            (order, removed, removed / n, float(values[i].mean()), low[i], high[i])
            for i, removed in enumerate(steps)
        ]
    table = pd.DataFrame(rows, columns=["order", "removed", "share", "loss", "low", "high"])
    layer, head = (np.array(axis) for axis in zip(*game.heads, strict=True))
    alone_table = pd.DataFrame({"layer": layer, "head": head, "cost": alone.double().numpy()})
    alone_table["layer_relative"] = layer_relative(alone_table["cost"].to_numpy(), layer)
    order_table = pd.DataFrame(
        [(i + 1, *head, cost) for i, (head, cost) in enumerate(zip(ranked, costs, strict=True))],
        columns=["removed", "layer", "head", "cost"],
    )
    meta["wall_time_s"] = round(time.perf_counter() - started, 2)
    return Report("prune", {"prune": table, "order": order_table, "alone": alone_table}, {}, meta)


def _greedy(
    game: Game, base: Base, steps: Sequence[int], units: Checkpoint, advance
) -> tuple[list[Head], list[float], Tensor, Tensor]:
    """Heads in order of removal, what each cost when chosen, every head's cost alone, the loss at each step."""
    removed: list[Head] = []
    costs: list[float] = []
    alone: Tensor | None = None
    losses = [base.losses]
    for count in steps[1:]:
        left = [head for head in game.heads if head not in set(removed)]

        def measure(base: Base = base, left: list[Head] = left) -> dict[str, np.ndarray]:
            return {"effect": game.toggled(base, left, advance).mean(1).numpy()}

        effects = torch.from_numpy(units.compute(f"step.{count}", measure)["effect"])
        ranking = effects.argsort(stable=True).tolist()
        alone = effects if alone is None else alone
        chosen = ranking[: count - len(removed)]
        removed += [left[i] for i in chosen]
        costs += [float(effects[i]) for i in chosen]
        base = game.base(game.mask(removed))
        losses.append(base.losses)
    assert alone is not None  # there is at least one step
    return removed, costs, alone, torch.stack(losses)


def _curve(game: Game, base: Base, order: Sequence[Head], steps: Sequence[int]) -> Tensor:
    """Loss of each prompt [steps n] with the first heads of an order removed."""
    return game.losses(base, [game.mask(order[:count]) for count in steps])
