"""Activation patching: what the metric becomes when one activation is replaced, for every place in turn.

Every variant replays the blocks from its own on, many variants in one forward, and unembeds the last
position alone (`circuits.patch_sweep`). A screen estimates all of them to first order and computes the
largest exactly.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.measure import METRICS
from circuits.patch_sweep import ALL, HEADS, NEURONS, Place, Sweep
from circuits.tasks import as_pairs, check_task
from interp.data.pairs import Pairs
from interp.errors import BadInput, Refused, unknown
from interp.models.model import Model
from interp.registry import analysis, leading
from interp.report import Report, provenance
from interp.run.progress import Progress
from interp.run.resume import Checkpoint

RESIDUAL = ("resid_pre", "resid_mid", "resid_post")
WRITES = ("attn_out", "attn_write", "mlp_out", "mlp_write")
SITES = (*HEADS, *RESIDUAL, *WRITES, NEURONS)

DIRECTIONS = ("denoise", "noise")
KINDS = ("patch", "zero", "mean", "resample")
EACH = "each"

CONFIRMED = 30.0
"""What a screen spends on exact values, in passes over all blocks: one of layer l costs 1 - l / n_layers."""
NEURON_ROWS = 1000
"""Rows of the table where there are too many places to list them all: the largest estimates."""


def check_options(
    *,
    task: Pairs | str | None = None,
    site: str = "z",
    direction: str = "denoise",
    kind: str = "patch",
    metric: str = "logit_diff",
    screen: bool = False,
    naive: bool = False,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    for what, got, known in (
        ("site to patch", site, SITES),
        ("direction", direction, DIRECTIONS),
        ("kind of patch", kind, KINDS),
        ("metric", metric, METRICS),
    ):
        if got not in known:
            raise unknown(what, got, known)
    if isinstance(task, str):
        check_task(task)
    if (screen or site == NEURONS) and metric == "kl" and direction == "noise":
        raise BadInput(
            "kl has no first-order effect at the clean run (its gradient is 0 there): screen with "
            "metric='logit_diff', or denoise"
        )
    if screen and naive:
        raise BadInput("naive=True computes every place exactly: leave out screen, or naive")


def strongest(report: Report) -> pd.DataFrame:
    """The fifteen rows with the largest effect."""
    order = np.argsort(-report.table["effect"].abs().to_numpy(), kind="stable")
    return leading(
        report.table.iloc[order[:15]], "layer", "head", "position", "effect", "exact", "change"
    )


@analysis(
    name="patch",
    source="Vig et al. 2020; Meng et al. 2022; Wang et al. 2022; Nanda 2023 for the first-order screen",
    example="interp patch smollm2-135m ioi",
    figure="map",
    validate=check_options,
    summary=strongest,
    takes="text",
)
@torch.no_grad()
def patch(
    model: Model,
    task: Pairs | str,
    *,
    site: str = "z",
    direction: str = "denoise",
    kind: str = "patch",
    metric: str = "logit_diff",
    positions: Sequence[str] | None = None,
    n: int = 32,
    seed: int = 0,
    screen: bool = False,
    naive: bool = False,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """Effect on the metric of replacing each head, each layer and position, or each neuron.

    The base run is the corrupted prompt (denoise) or the clean one (noise), the source run the other.
    For each place: value = metric(base run with this one activation replaced), change = value -
    metric(base run), normalised = (value - corrupted) / (clean - corrupted), of means over the pairs.

    It does not show by which route an effect comes, nor that a place without effect is not used: others
    may stand in for it (noise), or it may need others (denoise). Zero and mean put in activations that
    the model may never have seen.

    Args:
        task: Pairs, a task's name ("ioi", "ioi:s2"), or a file (see `circuits.tasks.as_pairs`).
        site: heads: "z", "q", "k", "v", "pattern" (k and v as one query head sees them); the residual
            stream: "resid_pre", "resid_mid", "resid_post"; a layer's outputs: "attn_write",
            "mlp_write", "attn_out", "mlp_out"; neurons: "mlp_post".
        direction: "denoise" (clean activations into the corrupted run) or "noise" (the reverse).
        kind: what is put there: "patch", the source run's activation of the same pair; "resample", of
            another pair; "mean", its mean over the pairs, each position by itself; "zero".
        metric: "logit_diff", "prob_diff", "kl" or "loss", read after the last position.
        positions: names of the task's positions or their numbers, each patched by itself; "each" for every
            one; "all" for all at once. By default all at once, and each for the residual stream, all of which would
            make it the source run. For "pattern" they are query positions.
        n: how many pairs of a shipped task; a file's first n.
        seed: of the shipped pairs, and of resampling.
        screen: estimate every place by gradient · difference at the base run (one backward), and compute
            only the largest exactly. Always so for neurons.
        naive: plain full forwards, one place each; slow, and what the fast engine is tested against.
        checkpoint: folder for finished layers, so that an interrupted call can be resumed.
        resume: go on from what is there.
        progress: show progress bars; by default in a terminal or a notebook.

    Returns: a Report with table "patch", one row a place: layer, head or neuron (where there are),
        position, value and change (the metric's unit), se (standard error of the change over pairs),
        normalised, effect (the change of normalised), estimate (first order, the metric's unit), exact.
        Rows that are not exact hold the estimate. Neurons: the largest estimates, and array "estimate"
        [n_layers, d_mlp].

    Raises:
        BadInput: unknown names; a metric that is not finite or the same on both sides.
        Refused: the model cannot give the site, or has no next-token logits.

    >>> report = patch(tiny_model(), "induction", n=4, progress=False)
    >>> len(report.table), bool(report.table["exact"].all())
    (8, True)
    """
    started = time.perf_counter()
    check_options(
        task=task,
        site=site,
        direction=direction,
        kind=kind,
        metric=metric,
        screen=screen,
        naive=naive,
    )
    if not model.layers_with(site):
        raise Refused(f"no layer of {model.id} has '{site}'")
    pairs = as_pairs(model, task, n=n, seed=seed)
    names = _position_names(pairs, site, positions)
    options = {
        "task": pairs.name,
        "site": site,
        "direction": direction,
        "kind": kind,
        "metric": metric,
        "positions": names,
        "n": len(pairs),
        "screen": screen or site == NEURONS,
        "naive": naive,
    }
    with Progress(progress) as bars:
        sweep = Sweep.of(model, pairs, site, direction, kind, metric, names, seed, naive)
        places = sweep.places()
        source = provenance(model, options=options | {"naive": sweep.naive}, seed=seed)
        key = {"model": source["model"], "options": source["options"], "pairs": pairs.digest}
        units = Checkpoint(checkpoint, key | {"seed": seed}, resume=resume)
        estimates = sweep.estimates(places) if options["screen"] else None
        chosen = _largest(estimates, places, model.n_layers)
        exact = sweep.exact([places[i] for i in chosen], units, bars.stage("Patching", len(chosen)))
    table = _table(sweep, places, estimates, chosen, exact)
    meta = source | _described(model, sweep)
    meta["wall_time_s"] = round(time.perf_counter() - started, 2)
    arrays = {} if site != NEURONS else {"estimate": _grid(estimates, places, model.n_layers)}
    return Report("patch", {"patch": table}, arrays, meta)


# --- places ----------------------------------------------------------------------------------


def _position_names(pairs: Pairs, site: str, positions: Sequence[str] | None) -> list[str]:
    """The positions that rows of the table are about, each patched by itself."""
    if positions is None:
        positions = [EACH] if site in RESIDUAL else [ALL]
    if isinstance(positions, (str, int)):
        positions = [name.strip() for name in str(positions).split(",")]
    names = []
    for name in map(str, positions):
        if name == EACH:
            names += [str(place) for place in range(pairs.length)]
        elif name == ALL:
            names.append(ALL)
        elif name.isdigit() and int(name) < pairs.length:
            names.append(str(int(name)))
        elif name in pairs.positions:
            names.append(name)
        else:
            raise unknown(f"position of task '{pairs.name}'", name, [*pairs.positions, EACH, ALL])
    if not names:
        raise BadInput(
            f"positions is empty: name some of {', '.join(pairs.positions)}, or leave it out"
        )
    return list(dict.fromkeys(names))


def _largest(estimates: np.ndarray | None, places: Sequence[Place], n_layers: int) -> list[int]:
    """The places to compute exactly: by estimate, as many as CONFIRMED pays for; all without estimates."""
    if estimates is None:
        return list(range(len(places)))
    chosen, spent = [], 0.0
    for i in np.argsort(-np.abs(estimates), kind="stable").tolist():
        spent += 1 - places[i].layer / n_layers
        if spent > CONFIRMED and chosen:
            break
        chosen.append(i)
    return sorted(chosen)


# --- the report ------------------------------------------------------------------------------


def _table(
    sweep: Sweep,
    places: Sequence[Place],
    estimates: np.ndarray | None,
    chosen: Sequence[int],
    exact: Float[np.ndarray, "places n"],
) -> pd.DataFrame:
    base = sweep.base_values.cpu().numpy()
    low, high = float(sweep.measure.corrupted.mean()), float(sweep.measure.clean.mean())
    changes = exact - base
    change = np.full(len(places), np.nan) if estimates is None else estimates.copy()
    se, certain = np.full(len(places), np.nan), np.zeros(len(places), bool)
    change[chosen], certain[chosen] = changes.mean(1), True
    if len(base) > 1:
        se[chosen] = changes.std(1, ddof=1) / np.sqrt(len(base))
    table = pd.DataFrame({"layer": [place.layer for place in places]})
    if places[0].unit is not None:
        table["neuron" if sweep.site == NEURONS else "head"] = [place.unit for place in places]
    table["position"] = [place.position for place in places]
    table["value"], table["change"], table["se"] = base.mean() + change, change, se
    table["normalised"] = (table["value"] - low) / (high - low)
    table["effect"] = change / (high - low)
    table["estimate"] = np.nan if estimates is None else estimates
    table["exact"] = certain
    if sweep.site == NEURONS:
        order = np.argsort(-np.abs(table["estimate"].to_numpy()), kind="stable")[:NEURON_ROWS]
        table = table.iloc[np.sort(order)].reset_index(drop=True)
    return table


def _grid(
    estimates: np.ndarray | None, places: Sequence[Place], n_layers: int
) -> Float[np.ndarray, "n_layers d_mlp"]:
    """Estimates of all neurons, summed over the positions asked for."""
    assert estimates is not None
    width = max(place.unit or 0 for place in places) + 1
    grid = np.zeros((n_layers, width), np.float32)
    where = np.array([(place.layer, place.unit or 0) for place in places])
    np.add.at(grid, (where[:, 0], where[:, 1]), estimates)
    return grid


def _described(model: Model, sweep: Sweep) -> dict[str, Any]:
    """What a reader and the figure must know beside the table."""
    measure, pairs = sweep.measure, sweep.pairs
    rows = {name: where.tolist() for name, where in pairs.positions.items()}
    return {
        "task": {"name": pairs.name, "pairs": len(pairs), "tokens": pairs.length},
        "unit": measure.unit,
        "clean": float(measure.clean.mean()),
        "corrupted": float(measure.corrupted.mean()),
        "notes": [*model.notes, *sweep.notes],
        "example": {
            "clean": model.tokens(pairs.clean[0].tolist()),
            "corrupted": model.tokens(pairs.corrupted[0].tolist()),
            "answers": model.tokens(i for i in pairs.answers[0].tolist() if i >= 0),
            "wrong": model.tokens(i for i in pairs.wrong[0].tolist() if i >= 0),
        },
        "position_labels": [
            _label(model, pairs.clean[:, place], [n for n, w in rows.items() if set(w) == {place}])
            for place in range(pairs.length)
        ],
    }


def _label(model: Model, ids: Tensor, names: Sequence[str]) -> str:
    """What stands at a position in every prompt: its token, or its name, or nothing."""
    same = model.tokens([int(ids[0])])[0] if bool((ids == ids[0]).all()) else ""
    return same or "/".join(names)
