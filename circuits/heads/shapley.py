"""Shapley values of heads: each head's fair share of what all heads together are worth to the loss.

v(S) is minus the loss with only the heads of S left, the others replaced by their means. A head's value is
its marginal v(S ∪ i) − v(S), averaged over the sizes of S and over all S of each size. Two estimates:

- "owen": the same average as ∫₀¹ E[marginal | every other head is removed with probability p] dp, by strata
  of p. One base run a stratum serves every head: a head is toggled in it, and layers before it are not run
  again. Small p, where heads matter most, get more samples (p = u², weight 2u); heads whose error is small
  enough already are left out of later rounds.
- "permutations": heads are removed one after another in random orders and their reverses. The values of each
  order sum to v(all) − v(none) exactly when it is not cut short.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from circuits.heads.game import PROMPTS, Game, prompts_of
from interp.errors import BadInput, unknown
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.progress import Progress
from interp.run.resume import Checkpoint

ESTIMATORS = ("owen", "permutations")
PILOT_ROUNDS = 4
LEVELS = 8
"""Shares of removed heads at which truncation is decided."""
BASE_COST = 2.0
"""A base run in replays of one head: a replay starts half-way up on average."""
BLOCK = 8
"""Steps of a permutation that are run together before it is asked whether to go on."""


@dataclass(frozen=True)
class Values:
    """Estimates of one value a head.

    Attributes:
        value, error: estimate and standard error [heads], nats a token. samples: marginals
            behind each [heads]. cost: in exact ablation sweeps. cut: share of removed heads from which
            marginals are taken to be 0; 1 where nothing is.
    """

    value: Float[np.ndarray, " heads"]
    error: Float[np.ndarray, " heads"]
    samples: np.ndarray
    cost: float
    cut: float


def check_options(
    *,
    data: str = "repeated",
    prompts: int = 8,
    estimator: str = "owen",
    truncate: float = 0.05,
    tolerance: float = 0.05,
    budget: float = 10.0,
    permutations: int = 8,
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if data not in PROMPTS:
        raise unknown("kind of prompts", data, PROMPTS)
    if estimator not in ESTIMATORS:
        raise unknown("estimator", estimator, ESTIMATORS)
    if prompts < 2:
        raise BadInput(f"prompts={prompts}: strata need at least 2, one prompt each")
    if permutations < 4 or permutations % 2:
        raise BadInput(
            f"permutations={permutations}: give an even number of at least 4 (each order goes with its reverse)"
        )
    for name, value in (("truncate", truncate), ("tolerance", tolerance)):
        if not 0 <= value < 1:
            raise BadInput(f"{name}={value}: give a share from 0 to below 1")
    if budget <= 0:
        raise BadInput(f"budget={budget}: give a positive number of exact ablation sweeps")


@analysis(
    name="shapley",
    source="Held & Yang 2023, Shapley Head Pruning; Okhrati & Lipani 2021, multilinear sampling",
    example="interp shapley smollm2-135m",
    figure="map",
    validate=check_options,
    summary=lambda report: report.table.sort_values("value", ascending=False).head(15),
    takes="text",
)
def shapley_values(
    model: Model,
    *,
    data: str = "repeated",
    prompts: int = 8,
    length: int = 32,
    estimator: str = "owen",
    truncate: float = 0.05,
    tolerance: float = 0.05,
    budget: float = 10.0,
    permutations: int = 8,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """Every head's Shapley value for the loss, in nats a token, with standard error.

    φ_i = mean over |S| and S of v(S ∪ i) − v(S), v = −loss with the heads outside S replaced by their mean.
    Positive: the head lowers the loss. It does not say which heads work together, and it counts states of
    the model, most heads gone, that never occur.

    Args:
        model: from `interp.load`.
        data: "repeated" random tokens (loss on the second copy) or "text" (prose).
        prompts: how many; with "owen" also how many strata a round has.
        length: random tokens before they repeat, or tokens of prose, in each prompt.
        estimator: "owen" (default) or "permutations".
        truncate: marginals count as 0 once the loss is within this share of (none − all) of the loss with
            no head left. 0: never, and the values of "permutations" sum to v(all) − v(none) exactly.
        tolerance: "owen" stops where every standard error is below this share of the largest value.
        budget: at most this much, in exact ablation sweeps (every head alone, all these prompts).
        permutations: orders for "permutations", each with its reverse.
        seed: of prompts and sampling.
        checkpoint: folder for finished rounds, so that an interrupted call can be resumed.
        resume: go on from what is there.
        progress: show progress bars.

    Returns: a Report with table "shapley", one row a head: value, error, low, high (±1.96 errors),
        layer_relative (value / root of the layer's sum of squares), samples. meta["game"]: loss with all
        heads, with none, what the values should sum to and do, cost in sweeps, whether tolerance was met.

    Raises:
        BadInput: options as above. Refused: the model predicts no next token.

    >>> report = shapley_values(tiny_model(), prompts=4, progress=False)
    >>> len(report.table), bool((report.table["error"] >= 0).all())
    (8, True)

    Source: Shapley Head Pruning (Held & Yang 2023: truncated Monte-Carlo over permutations); "owen" after
        Okhrati & Lipani 2021, multilinear sampling. Stopping heads one by one makes their errors slightly
        too small: it stops where chance made them look small.
    """
    started = time.perf_counter()
    check_options(
        data=data,
        prompts=prompts,
        estimator=estimator,
        truncate=truncate,
        tolerance=tolerance,
        budget=budget,
        permutations=permutations,
    )
    options = {
        "data": data,
        "prompts": prompts,
        "length": length,
        "estimator": estimator,
        "truncate": truncate,
        "tolerance": tolerance,
        "budget": budget,
        "permutations": permutations,
    }
    meta = provenance(model, options=options, seed=seed)
    units = Checkpoint(
        checkpoint, {"model": meta["model"], "options": options, "seed": seed}, resume=resume
    )
    game = Game.of(model, prompts_of(model, data, prompts, seed, length))
    full, none = (float(game.base(game.mask(heads)).losses.mean()) for heads in ((), game.heads))
    with Progress(progress) as bars:
        if estimator == "owen":
            most = max(round(budget), PILOT_ROUNDS) * len(game.heads)
            advance = bars.stage("Toggling heads", most)
            found = owen_values(
                game,
                truncate=truncate,
                tolerance=tolerance,
                budget=budget,
                seed=seed,
                units=units,
                advance=advance,
            )
        else:
            advance = bars.stage("Removing heads", permutations * len(game.heads))
            found = permutation_values(
                game, permutations, truncate=truncate, seed=seed, units=units, advance=advance
            )
    table = value_table(game, found.value, found.error).assign(samples=found.samples)
    largest = float(np.abs(found.value).max())
    meta["game"] = {
        "loss_all": full,
        "loss_none": none,
        "should_sum_to": none - full,
        "sum": float(found.value.sum()),
        "sum_error": float(np.sqrt((found.error**2).sum())),
        "largest": largest,
        "largest_error": float(found.error.max()),
        "within_tolerance": bool(found.error.max() <= tolerance * largest),
        "cost_in_sweeps": round(found.cost, 2),
        "cut": found.cut,
    }
    meta["wall_time_s"] = round(time.perf_counter() - started, 2)
    return Report("shapley", {"shapley": table}, {}, meta)


def value_table(
    game: Game, value: Float[np.ndarray, " heads"], error: Float[np.ndarray, " heads"]
) -> pd.DataFrame:
    """One row a head: value, error, low and high (±1.96 errors), layer_relative."""
    layer, head = (np.array(axis) for axis in zip(*game.heads, strict=True))
    return pd.DataFrame(
        {
            "layer": layer,
            "head": head,
            "value": value,
            "error": error,
            "low": value - 1.96 * error,
            "high": value + 1.96 * error,
            "layer_relative": layer_relative(value, layer),
        }
    )


def layer_relative(
    values: Float[np.ndarray, " heads"], layers: np.ndarray
) -> Float[np.ndarray, " heads"]:
    """Each value over the root of its layer's sum of squares; 0 in a layer of zeros.

    Layers differ in how much their heads move the loss, so a ranking over the whole model can empty one.
    Source: Michel et al. 2019, §4.1 (after Molchanov et al. 2017).

    >>> layer_relative(np.array([3.0, 4.0, 2.0]), np.array([0, 0, 1]))
    array([0.6, 0.8, 1. ])
    """
    squares = pd.Series(np.square(values)).groupby(np.asarray(layers)).transform("sum").to_numpy()
    return np.divide(values, np.sqrt(squares), out=np.zeros(len(values)), where=squares > 0)


# --- by strata of the share of removed heads -------------------------------------------------------


def owen_values(
    game: Game,
    *,
    truncate: float = 0.05,
    tolerance: float = 0.05,
    budget: float = 10.0,
    seed: int = 0,
    units: Checkpoint | None = None,
    advance=lambda n: None,
) -> Values:
    """Values by toggling heads in random base runs, as many strata of p as prompts, one row each at first.

    After four rounds over all heads, rows go to strata by the spread seen there (Neyman), and only heads over
    the tolerance (a share of the largest value) are toggled. It stops when there is none, or before the budget
    (exact sweeps of these prompts) is spent.
    """
    units = Checkpoint() if units is None else units
    generator = torch.Generator().manual_seed(seed)
    n_heads, strata = len(game.heads), len(game.prompts)
    sweep = n_heads * strata
    cut, spent = _cut(game, truncate, generator)
    u_max = float(np.sqrt(cut))
    sums, counts = np.zeros((2, strata, n_heads)), np.zeros((strata, n_heads), int)
    active = np.arange(n_heads)
    share = np.full(strata, 1 / strata)
    for number in count():
        # each row's stratum: evenly spaced points on the strata laid side by side, rows in random order
        points = (torch.arange(strata) + torch.rand(1, generator=generator)) / strata
        stratum = np.searchsorted(share.cumsum()[:-1], points.numpy(), side="right")
        stratum = stratum[torch.randperm(strata, generator=generator).numpy()]
        within = torch.rand(strata, generator=generator)
        u = u_max * (torch.from_numpy(stratum) + within) / strata
        gone = torch.rand(strata, n_heads, generator=generator) < (u**2)[:, None]

        def toggle(gone=gone, active=active) -> dict[str, np.ndarray]:
            chosen = [game.heads[i] for i in active]
            return {"marginal": game.toggled(game.base(gone), chosen, advance).numpy()}

        marginal = units.compute(f"round.{number}", toggle)["marginal"]
        drawn = (u_max * 2 * u.numpy() * marginal).T  # [rows active]
        at = stratum[:, None], active[None]
        np.add.at(sums[0], at, drawn)
        np.add.at(sums[1], at, drawn**2)
        np.add.at(counts, at, 1)
        spent += strata * (BASE_COST + len(active))
        if counts.max() < PILOT_ROUNDS:
            continue
        value, error, spread = _estimate(sums, counts)
        active = np.nonzero(error > tolerance * np.abs(value).max())[0]
        cost = strata * (BASE_COST + len(active))
        if not len(active) or (spent + cost) > budget * sweep:
            break
        share = np.sqrt((spread[:, active] ** 2).mean(1))
        # a stratum whose spread looks small by chance is still visited now and then
        share = share + 0.2 * share.mean() + 1e-12
        share = share / share.sum()
    return Values(value, error, counts.sum(0), spent / sweep, cut)


def _estimate(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over strata of their means, its standard error, and the spread within strata [strata heads]."""
    mean = sums[0] / counts
    variance = (sums[1] / counts - mean**2).clip(min=0) * counts / (counts - 1)
    error = np.sqrt((variance / counts).sum(0)) / len(mean)
    return mean.mean(0), error, np.sqrt(variance)


def _cut(game: Game, truncate: float, generator: torch.Generator) -> tuple[float, float]:
    """The share of removed heads after which the loss stays near that of no head at all, and the cost."""
    if truncate == 0:
        return 1.0, 0.0
    shares = torch.arange(LEVELS + 1) / LEVELS
    shape = (len(game.prompts), len(game.heads))
    losses = torch.stack(
        [
            game.base(torch.rand(shape, generator=generator) < share).losses.mean()
            for share in shares
        ]
    )
    away = (losses - losses[-1]).abs() > truncate * (losses[0] - losses[-1]).abs()
    last = int(away.nonzero().max()) if bool(away.any()) else 0
    return float(shares[min(last + 1, LEVELS)]), BASE_COST * len(shares) * shape[0]


# --- by permutations -------------------------------------------------------------------------------


def permutation_values(
    game: Game,
    permutations: int = 8,
    *,
    truncate: float = 0.05,
    seed: int = 0,
    units: Checkpoint | None = None,
    advance=lambda n: None,
) -> Values:
    """Values by removing heads in random orders and their reverses, each cut short where nothing is left."""
    units = Checkpoint() if units is None else units
    generator = np.random.default_rng(seed)
    n_heads = len(game.heads)
    base = game.base()
    full, none = base.losses.mean().item(), game.base(game.mask(game.heads)).losses.mean().item()
    near = truncate * abs(none - full)

    def walk(order: np.ndarray) -> dict[str, np.ndarray]:
        marginals, before = np.zeros(n_heads), full
        for start in range(0, n_heads, BLOCK):
            ends = range(start + 1, min(start + BLOCK, n_heads) + 1)
            variants = [game.mask([game.heads[i] for i in order[:end]]) for end in ends]
            losses = game.losses(base, variants).double().mean(1).numpy()
            advance(len(ends))
            marginals[order[start : ends[-1]]] = np.diff(losses, prepend=before)
            before = float(losses[-1])
            if abs(before - none) < near:
                break
        return {"marginals": marginals, "steps": np.array([ends[-1]])}

    walks = []
    for pair in range(permutations // 2):
        forth = generator.permutation(n_heads)
        for way, order in (("forth", forth), ("back", forth[::-1])):
            walks.append(units.compute(f"walk.{pair}.{way}", lambda order=order: walk(order)))
    marginals = np.stack([found["marginals"] for found in walks])
    pairs = marginals.reshape(-1, 2, n_heads).mean(1)
    error = pairs.std(0, ddof=1) / np.sqrt(len(pairs))
    # nearly every step touches the first layers, so it costs a whole run
    cost = BASE_COST * sum(int(found["steps"][0]) for found in walks) / n_heads
    samples = np.full(n_heads, permutations)
    return Values(marginals.mean(0), error, samples, cost, 1.0)
