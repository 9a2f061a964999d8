"""Path patching: what a sender does through one receiver, everything else as in the clean run.

Wang et al.: (A) the corrupted run is cached; (B) the clean run is cached; (C) the clean run again, every
head's q, k and v held at their clean values and the sender's output replaced by its corrupted one: the
receiver's input is recorded; (D) the clean run with the receiver reading that input: the metric is read.
In (C) MLPs are recomputed from what reaches them, or held too: two definitions, which differ (for 20.0 →
23.0.q of the default model −0.3 and −0.6 logits), so every row says which it is.

`naive=True` does just that (`path_plain.py`), two or three full forwards a path. The fast engine
(`path_effects.py`) does the same arithmetic where something changes and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path as Folder
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.columns import as_mask, columns_of
from circuits.heads_alone import require_heads_alone
from circuits.measure import METRICS, Measure, measure_of
from circuits.path_effects import Senders, as_array, exact_effects
from circuits.path_names import PARTS, Names, Path, parsed, paths_of, split_names
from circuits.path_plain import naive_forwards, plain_effect
from circuits.path_replay import SITES, PathReplay
from circuits.path_screen import screened_changes
from circuits.tasks import as_pairs
from interp.data.pairs import Pairs
from interp.errors import BadInput, Refused, unknown
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.cache import Run
from interp.run.progress import Progress
from interp.run.resume import Checkpoint

DEFINITIONS = ("recompute", "frozen")
CONFIRM = 50
"""Strongest screened paths of a full sweep that are computed exactly."""


def check_options(
    *,
    senders: Names | None = None,
    receiver: Names = "logits",
    mlps: str = "recompute",
    metric: str = "logit_diff",
    confirm: int | None = None,
    n: int = 32,
) -> None:
    """What can be judged without a model."""
    if mlps not in DEFINITIONS:
        raise unknown("definition (mlps)", mlps, DEFINITIONS)
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if confirm is not None and confirm < 0:
        raise BadInput(
            f"confirm={confirm}: give how many of the strongest paths to compute exactly"
        )
    if n < 1:
        raise BadInput(f"n={n}: give at least one pair of prompts")
    for name in split_names(receiver):
        if name not in ("logits", "all"):
            parsed(name, receiver=True)
    for name in split_names(senders or "heads"):
        if name not in ("heads", "mlps"):
            parsed(name, receiver=False)


def summary(report: Report) -> pd.DataFrame:
    """The strongest exact paths."""
    columns = ["sender", "receiver", "change", "normalised", "definition"]
    return report.table.query("exact").loc[:, columns].head(15)


@analysis(
    name="path_patch",
    source="Wang et al. 2022, Interpretability in the Wild, §3.1 (path patching)",
    example="interp path-patch smollm2-135m ioi --receiver 23.0.q --positions end",
    figure="map",
    validate=check_options,
    summary=summary,
    takes="text",
)
def path_patch(
    model: Model,
    task: Pairs | str,
    *,
    senders: Names | None = None,
    receiver: Names = "logits",
    positions: Names | None = None,
    mlps: str = "recompute",
    metric: str = "logit_diff",
    confirm: int | None = None,
    n: int = 32,
    seed: int = 0,
    naive: bool = False,
    checkpoint: Folder | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """Change of the metric when one path, sender to receiver, carries the corrupted prompt's activation.

    change = metric(clean run in which the receiver reads x + δ) − metric(clean run), where δ is what the
    sender's corrupted output changes at the receiver's input x with every head's q, k, v (and so z)
    held. mlps="recompute" lets norms and MLPs between the two answer to it; mlps="frozen" holds the MLPs
    too: x + δ = x + Δz W_O. After the receiver everything is recomputed. A negative change: the path
    supports the answer.

    A path's effect is not its share: paths interact, so changes do not add up to the effect of patching
    the sender (they do in a linear model). It says nothing of other corruptions than this task's.

    Args:
        task: pairs of prompts, or the name of a task.
        senders: "23.0" (layer.head), "mlp.5", "heads" or "mlps", several of them; by default all heads.
        receiver: "logits", "23.0.q" (layer.head and q, k or v), "mlp.5", several of them; or "all": q, k
            and v of every head.
        positions: named positions of the task at which the receiver's input is replaced; by default all.
            The logits are always read at the last position.
        mlps: "recompute" or "frozen", the two definitions.
        metric: logit_diff, prob_diff, kl or loss.
        confirm: screen all paths into q, k and v to first order with MLPs frozen, and compute so many of
            the strongest exactly; by default 50 for receiver "all", and no screen otherwise.
        n: pairs of prompts, where the task is given by name.
        naive: compute every path by full forwards, in the plainest way.
        checkpoint: folder for finished units, so that an interrupted call can be resumed.
        resume: go on from what is there.
        progress: show progress bars; by default in a terminal or a notebook.

    Returns: a Report. Table "path_patch", one row for each path, strongest first: sender, layer, head (−1:
        an MLP), receiver, receiver_layer, receiver_head, part (q, k, v, mlp, logits), change (the metric's
        unit, mean over pairs), normalised (change / (clean − corrupted): −1 undoes everything), exact,
        definition (of `change`), screened (first-order change, where it was screened). meta["forwards"]:
        work in units of a plain forward over the pairs, ours and the plain way's (two forwards a path).

    Raises:
        BadInput: unknown names, no sender before the receiver, a metric that is not finite or does not
        move. Refused: heads are not seen, or positions interact outside of attention.

    >>> pairs = Pairs.of([[5, 6, 7]], [[5, 9, 7]], answers=[3], wrong=[4])
    >>> fast = path_patch(tiny_model(), pairs, receiver="1.2.k", progress=False)
    >>> plain = path_patch(tiny_model(), pairs, receiver="1.2.k", naive=True, progress=False)
    >>> sorted(fast.table["sender"]), np.allclose(fast.table["change"], plain.table["change"], atol=1e-5)
    (['0.0', '0.1', '0.2', '0.3'], True)
    """
    started = time.perf_counter()
    check_options(
        senders=senders, receiver=receiver, mlps=mlps, metric=metric, confirm=confirm, n=n
    )
    _check_model(model)
    pairs = as_pairs(model, task, n=n, seed=seed)
    require_heads_alone(model, "paths", pairs)
    confirm = CONFIRM if confirm is None and "all" in split_names(receiver) else confirm
    paths = paths_of(model, senders, receiver, mlps)
    named = [pairs.position(name) for name in split_names(positions or [])]
    mask = _reached(model, pairs, as_mask(named, len(pairs), pairs.length))
    options = {
        "task": pairs.name,
        "senders": ",".join(split_names(senders or "heads")),
        "receiver": ",".join(split_names(receiver)),
        "positions": None if positions is None else ",".join(split_names(positions)),
        "mlps": mlps,
        "metric": metric,
        "confirm": confirm,
        "n": len(pairs),
        "naive": naive,
    }
    source = provenance(model, options=options, seed=seed)
    key = {"model": source["model"], "options": options, "pairs": pairs.digest}
    units = Checkpoint(checkpoint, key, resume=resume)
    clean, corrupted, measure = both_runs(model, pairs, metric, paths)
    notes = list(measure.notes)
    replay, fault = None, None
    if not naive:
        replay, fault = _engine(model, clean, corrupted, measure, paths, mask, mlps)
        if fault is not None:
            notes.append(f"every path was computed by full forwards: {fault}")
    with Progress(progress) as bars:
        if replay is None:
            ends = bars.stage("Patching paths", len(paths))
            exact, screened = dict.fromkeys(paths, 0.0), {}
            for path in paths:
                value = units.compute(
                    f"{path}",
                    lambda path=path: {
                        "change": as_array(
                            plain_effect(model, clean, corrupted, measure, path, mask, mlps)
                        )
                    },
                )
                exact[path] = float(value["change"].mean())
                ends(1)
        else:
            exact, screened = _fast(
                Senders(replay, corrupted, mlps),
                paths,
                mask,
                confirm,
                units,
                bars,
            )
    table = _table(paths, exact, screened, measure, mlps)
    plain = 2 * len(paths) + 2
    ours = naive_forwards(paths) if replay is None else 2 + replay.forwards()
    if confirm is not None and replay is not None:
        ours += 2  # the backward pass and its own forward
    meta: dict[str, Any] = source | {
        "unit": measure.unit,
        "clean": float(measure.clean.mean()),
        "corrupted": float(measure.corrupted.mean()),
        "definition": mlps,
        "engine": "plain" if replay is None else "replay",
        "forwards": {"ours": round(float(ours), 2), "plain": plain},
        "notes": notes,
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    return Report("path_patch", {"path_patch": table}, {}, meta)


def _reached(model: Model, pairs: Pairs, mask: Bool[Tensor, "n pos"]) -> Bool[Tensor, "n pos"]:
    """The mask without positions before the first token that differs: in a causal model nothing moves there."""
    if not model.spec.causal:
        return mask
    later = mask.clone()
    later[:, : int((pairs.clean != pairs.corrupted).any(0).int().argmax())] = False
    return later if bool(later.any()) else mask


def _check_model(model: Model) -> None:
    """Refused where heads are not seen or cannot be held, or something else moves things between positions."""
    model.layers_with("z")
    without = [layer for layer, block in enumerate(model.spec.blocks) if block.attention is None]
    if without:
        raise Refused(
            f"layer {without[0]} of {model.id} has no attention heads: what it moves between positions "
            "cannot be held, so a path is not defined; activation patching still works"
        )
    require_heads_alone(model, "paths")


# --- the two runs -----------------------------------------------------------------------------------


def both_runs(
    model: Model, pairs: Pairs, metric: str, paths: Sequence[Path]
) -> tuple[Run, Run, Measure]:
    """(B) and (A): the clean and the corrupted run with what the paths need, and the metric's two ends."""
    refused, spec = model.spec.refused, model.spec
    capture = [s for s in (*SITES, "mlp_write") if s not in refused and model.layers_with(s)]
    if "attn_write" not in refused and not all(block.direct for block in spec.blocks):
        capture.append("attn_write")
    there = ["z"] + ["mlp_write"] * any(sender.kind == "mlp" for sender, _ in paths)
    last = torch.tensor([pairs.end])
    with torch.no_grad():
        clean = model.run(
            pairs.clean_batch, [*capture, f"resid_post.{model.n_layers - 1}"], logits=last
        )
        corrupted = model.run(pairs.corrupted_batch, there, logits=last)
    ends = []
    for run in (clean, corrupted):
        assert run.logits is not None
        ends.append(run.logits[:, -1].float())
    return clean, corrupted, measure_of(pairs, metric, *ends)


def _engine(
    model: Model,
    clean: Run,
    corrupted: Run,
    measure: Measure,
    paths: Sequence[Path],
    mask: Bool[Tensor, "n pos"],
    mlps: str,
) -> tuple[PathReplay | None, str | None]:
    """The replay engine, or what of this model it does not reproduce."""
    if "attn_out" in model.spec.refused:
        return None, model.spec.refused["attn_out"]
    if model.spec.not_a_sum:
        return None, model.spec.not_a_sum
    replay = PathReplay(model, clean, measure)
    kinds = {receiver.kind for _, receiver in paths}
    end = torch.zeros_like(mask)
    end[:, -1] = True
    fault = None
    with torch.no_grad():
        if mlps == "frozen" or any(receiver.kind in PARTS for _, receiver in paths):
            fault = Senders(replay, corrupted, mlps).fault()
        if fault is None and "logits" in kinds:
            fault = replay.verify(columns_of(end), blocks=mlps == "recompute", attention=False)
        if fault is None and kinds - {"logits"}:
            fault = replay.verify(columns_of(mask), blocks=True, attention=True)
    return (None, fault) if fault else (replay, None)


# --- fast ---------------------------------------------------------------------------------------------


def _fast(
    senders: Senders,
    paths: Sequence[Path],
    mask: Bool[Tensor, "n pos"],
    confirm: int | None,
    units: Checkpoint,
    bars: Progress,
) -> tuple[dict[Path, float], dict[Path, float]]:
    """(exact, screened) mean change of each path; with `confirm`, q, k and v receivers are screened."""
    screened: dict[Path, float] = {}
    chosen = list(paths)
    if confirm is not None:
        of_heads = [path for path in paths if path[1].kind in PARTS]
        screened = screened_changes(senders, of_heads, mask, units, bars)
        strongest = sorted(screened, key=lambda path: -abs(screened[path]))[:confirm]
        kept = set(strongest)
        chosen = [path for path in paths if path in kept or path not in screened]
    advance = bars.stage("Patching paths", len(chosen))
    values = exact_effects(senders, chosen, mask, units=units, advance=advance)
    return dict(zip(chosen, values.mean(1).tolist(), strict=True)), screened


# --- the table ---------------------------------------------------------------------------------------


def _table(
    paths: Sequence[Path],
    exact: dict[Path, float],
    screened: dict[Path, float],
    measure: Measure,
    mlps: str,
) -> pd.DataFrame:
    """One row a path: exact ones first, the strongest first."""
    span = float(measure.clean.mean() - measure.corrupted.mean())
    rows = []
    for sender, receiver in paths:
        known = (sender, receiver) in exact
        change = exact[sender, receiver] if known else screened[sender, receiver]
        rows.append(
            {
                "sender": sender.name,
                "layer": sender.layer,
                "head": sender.head,
                "receiver": receiver.name,
                "receiver_layer": receiver.layer,
                "receiver_head": receiver.head,
                "part": receiver.kind,
                "change": change,
                "normalised": change / span,
                "exact": known,
                "definition": mlps if known else "frozen",
                "screened": screened.get((sender, receiver), float("nan")),
            }
        )
    table = pd.DataFrame(rows)
    order = table.assign(size=-table["change"].abs(), late=~table["exact"])
    order = order.sort_values(["late", "size"], kind="stable").index
    return table.loc[order].reset_index(drop=True)
