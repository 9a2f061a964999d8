"""What each head alone is worth to the loss, exactly, on as many prompts as its mean needs.

Effects of most heads hardly vary from prompt to prompt, those of a few vary much. After some prompts for
every head, only heads whose standard error is still too large see more of them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from circuits.heads.game import PROMPTS, Game, prompts_of
from circuits.heads.shapley import value_table
from interp.errors import BadInput, unknown
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.progress import Progress
from interp.run.resume import Checkpoint

FIRST = 8
"""Prompts that every head is ablated on: fewer would often look alike by chance."""


def check_options(
    *, data: str = "repeated", prompts: int = 64, error: float = 0.02, **_: Any
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if data not in PROMPTS:
        raise unknown("kind of prompts", data, PROMPTS)
    if prompts < FIRST:
        raise BadInput(f"prompts={prompts}: give at least {FIRST}, or no spread can be told")
    if not 0 < error < 1:
        raise BadInput(f"error={error}: give a share of the largest effect, above 0 and below 1")


@analysis(
    name="ablate",
    source="mean ablation as in Wang et al. 2022, §2; stops as Chow & Robbins 1965",
    example="interp ablate smollm2-135m",
    figure="map",
    validate=check_options,
    summary=lambda report: report.table.sort_values("value", ascending=False).head(15),
    takes="text",
)
def ablate_heads(
    model: Model,
    *,
    data: str = "repeated",
    prompts: int = 64,
    length: int = 32,
    error: float = 0.02,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """Every head's exact effect on the loss when it alone is removed, in nats a token, with standard error.

    value = mean over prompts of loss(z of the head replaced by its mean) − loss. After 8 prompts for every
    head, the number is doubled for those whose standard error is over `error` times the largest |value|,
    until there is none or `prompts` are used up. Positive: the head lowers the loss. It does not say what a
    head is worth to the others: one can make up for another (`interp shapley`, `interp prune`).

    Args:
        model: from `interp.load`.
        data: "repeated" random tokens (loss on the second copy) or "text" (prose).
        prompts: how many at most; the means that take the heads' place are of all of them.
        length: random tokens before they repeat, or tokens of prose, in each prompt.
        error: largest standard error wanted, as a share of the largest |value|.
        seed: of prompts.
        checkpoint: folder for finished rounds, so that an interrupted call can be resumed.
        resume: go on from what is there.
        progress: show progress bars.

    Returns: a Report with table "ablate", one row a head: value, error, low, high (±1.96 errors),
        layer_relative (value / root of the layer's sum of squares), prompts. meta["ablation"]: loss with all
        heads, the largest error, whether it is within what was wanted, prompts in all (heads × prompts), and
        what as many for every head as the hardest took would have been.

    Raises:
        BadInput: options as above. Refused: the model predicts no next token.

    >>> report = ablate_heads(tiny_model(), prompts=8, progress=False)
    >>> len(report.table), report.table["prompts"].unique().tolist()
    (8, [8])

    Source: mean ablation as in Wang et al. 2022, §2. Stopping where the standard error is small enough:
        Chow & Robbins 1965; it makes the errors slightly too small, the more the fewer prompts there are.
    """
    started = time.perf_counter()
    check_options(data=data, prompts=prompts, error=error)
    options = {"data": data, "prompts": prompts, "length": length, "error": error}
    meta = provenance(model, options=options, seed=seed)
    units = Checkpoint(
        checkpoint, {"model": meta["model"], "options": options, "seed": seed}, resume=resume
    )
    game = Game.of(model, prompts_of(model, data, prompts, seed, length))
    n = len(game.heads)
    seen = np.full((n, prompts), np.nan)
    clean: list[np.ndarray] = []
    todo, start, stop = np.arange(n), 0, FIRST
    with Progress(progress) as bars:
        while len(todo) and start < prompts:
            advance = bars.stage(
                f"Ablating {len(todo)} heads, prompt {start + 1} to {stop}", len(todo)
            )

            def ablate(
                rows=slice(start, stop), todo=todo, advance=advance
            ) -> dict[str, np.ndarray]:
                few = game.rows(rows)
                base = few.base()
                effects = few.toggled(base, [game.heads[i] for i in todo], advance)
                return {"effect": effects.numpy(), "clean": base.losses.numpy()}

            found = units.compute(f"round.{start}", ablate)
            clean.append(found["clean"])
            seen[todo, start:stop] = found["effect"]
            value, errors = _means(seen)
            todo = np.nonzero(errors > error * np.abs(value).max())[0]
            start, stop = stop, min(2 * stop, prompts)
    used = (~np.isnan(seen)).sum(1)
    table = value_table(game, value, errors).assign(prompts=used)
    meta["ablation"] = {
        "loss_all": float(np.concatenate(clean).mean()),
        "largest": float(np.abs(value).max()),
        "largest_error": float(errors.max()),
        "within": not len(todo),
        "heads_times_prompts": int(used.sum()),
        "all_as_the_hardest": int(n * used.max()),
    }
    meta["wall_time_s"] = round(time.perf_counter() - started, 2)
    return Report("ablate", {"ablate": table}, {}, meta)


def _means(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each head's mean over the prompts it saw, and its standard error."""
    counts = (~np.isnan(seen)).sum(1)
    return np.nanmean(seen, 1), np.nanstd(seen, 1, ddof=1) / np.sqrt(counts)
