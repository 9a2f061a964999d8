"""When in training does each head's role appear, and what happens to the loss then?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from circuits.emergence.clamping import Clamps
from circuits.emergence.measures import measure, meta_of
from circuits.emergence.onset import Onset, onset
from circuits.emergence.series import CheckpointAt, Series, find_series, open_checkpoint
from circuits.heads.claims import claims, heads_table, resampling
from circuits.heads.classify import check_options as check_heads
from circuits.heads.detector import Detector, choose
from circuits.heads.massive import SINK
from circuits.heads.prompt_sets import TOKENS
from circuits.heads.scan import Scores
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.registry import analysis, require_kind
from interp.report import Report, combined_provenance
from interp.resampling import INTERVAL
from interp.run.files import read_utf8
from interp.run.progress import Progress
from interp.run.resume import Checkpoint

DETECTORS = ("previous_token", "duplicate_token", "induction")
CURVES = {"accuracy": 0.25, "loss_repeated": 0.5, "icl": 0.2, "uas": 0.1}
"""Curves that are searched for an onset, and the least change that is called one: shares, and nats a token
for loss_repeated and icl."""


def check_options(
    *,
    detectors: Sequence[str] | None = None,
    prompts: int = 16,
    tokens: int = TOKENS,
    text: Path | None = None,
    **others: Any,
) -> None:
    """Raise BadInput for options that no series could satisfy."""
    check_heads(detectors=detectors or DETECTORS, prompts=prompts, tokens=tokens)
    if text is not None and not Path(text).is_file():
        raise BadInput(f"no file '{text}': give a text file, one sample a line")


def summary(report: Report) -> pd.DataFrame:
    """Every onset, the earliest first."""
    table: Any = report.tables["onsets"]
    columns = ["series", "quantity", "layer", "head", "low", "step", "high", "before", "after"]
    return table[table["step"].notna()].sort_values("step")[columns].head(20).round(2)


@analysis(
    name="emergence",
    source="Olsson et al. 2022, In-context Learning and Induction Heads; Singh et al. 2024, What needs to go "
    "right for an induction head?; Zhai et al. 2023 (entropy); Sun et al. 2024 (massive activations); Chen et "
    "al. 2024, Sudden Drops in the Loss (syntax)",
    example="interp emergence SERIES --out onsets",
    figure="trajectories",
    validate=check_options,
    summary=summary,
    reads="models",
)
def emergence(
    series: Sequence[str],
    *,
    detectors: Sequence[str] | None = None,
    prompts: int = 16,
    tokens: int = TOKENS,
    text: Path | None = None,
    syntax: bool = False,
    alpha: float = 0.01,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """When in training each head's role, and in-context learning, appear: onsets with intervals.

    Every checkpoint is opened by itself and measured on the same prompts: head scores as `interp heads`
    gives them; accuracy and loss on the second copy of repeated random tokens; loss of a text, and its
    in-context-learning score (loss in the last tenth of the context minus loss about its first tenth);
    attention entropy; massive activations. A plateau, a ramp and a plateau are fitted to a trajectory over
    log2(1 + step); the onset's interval is from the last checkpoint before the ramp to the first behind
    it, widened by a bootstrap over prompts. A head has an onset if it is labelled at a checkpoint from the
    interval's start on and its score changed by the detector's margin.

    Several series are told side by side, a clamped training beside a free one. A series' `training.json`
    may name clamps: it is measured with them held. The interval is about prompts and checkpoints, not about
    trainings: another seed may differ by more. That two things appear at once does not show that one makes
    the other; a clamp does.

    Args:
        series: folders with `step-<n>` checkpoints in them, checkpoints, or `org/name@revision`.
        detectors: as in `interp heads`; previous_token, duplicate_token and induction by default.
        prompts: of each set. tokens: of a prompt, where n_ctx allows.
        text: a file, one sample a line, that loss, in-context-learning score and entropy are measured on; by
            default `held_out.txt` in the series' folder where there is one, else English prose.
        syntax: whether syntactic attention structure is measured, on parsed English sentences; for models of
            English with a tokenizer.
        alpha: corrected significance level of a label.
        seed: of prompts and bootstrap.
        checkpoint: folder for finished checkpoints, so that an interrupted call can be resumed.
        resume: go on from what is there.
        progress: show a progress bar; by default in a terminal or a notebook.

    Returns: a Report. Table "emergence", one row a (series, step, head), columns as in a heads report, and
        entropy (share of the largest possible). Table "curves", one row a (series, step): accuracy (share),
        loss_repeated, loss and icl (nats a token) with _low and _high (95 %, over prompts), entropy_min and
        entropy_mean over heads, largest (|x| of the stream), times_median (over its layer's), massive (entries
        over both thresholds of `interp massive`; all three means over texts in the layer that has most),
        sink_rate (share of heads with more than 0.3 of their attention on the first token); with `syntax`,
        uas and uas_distance (share of arcs that each relation's best head, or distance, finds).
        Table "onsets": series, quantity (detector or curve), layer and head, low, step (where the ramp is
        half way), high, before, after, change with interval, explained (share of variance), shift (log2 of
        step over the earliest onset of that quantity in the first series). low to high are empty where
        there is no onset.

    Raises:
        BadInput: no checkpoints, steps that do not increase, checkpoints of different shape, a text
            for models without tokenizer. Refused: no causal language model.

    >>> emergence(["no/such/folder"])
    Traceback (most recent call last):
    interp.errors.BadInput: no folder 'no/such/folder': give a folder of step-<n> folders
    """
    started = time.perf_counter()
    check_options(detectors=detectors, prompts=prompts, tokens=tokens, text=text)
    found = find_series(series)
    chosen = choose(detectors or DETECTORS)
    given = None if text is None else read_utf8(Path(text))
    options = {
        "detectors": [d.name for d in chosen],
        "prompts": prompts,
        "tokens": tokens,
        "text": None if text is None else str(text),
        "syntax": syntax,
        "alpha": alpha,
    }
    key = {"series": [_key(series) for series in found], "options": options, "seed": seed}
    units = Checkpoint(checkpoint, key, resume=resume)
    parts: dict[str, list[pd.DataFrame]] = {"emergence": [], "curves": [], "onsets": []}
    sources, notes, described = [], [], []
    with Progress(progress) as bars:
        advance = bars.stage("Measuring checkpoints", sum(len(s.checkpoints) for s in found))
        for training in found:
            held, words = Clamps(training.clamps()), training.held_out if given is None else given
            ask = partial(
                measure, prompts=prompts, tokens=tokens, text=words, seed=seed, syntax=syntax
            )
            seen = []
            for at in training.checkpoints:
                unit = partial(_measured, at, held, chosen, ask, syntax or given is not None)
                seen.append(units.part(training.name).compute(at.name, unit))
                _check_shape(training, at, seen)
                advance(1)
            sources += [{"model": meta_of(unit)} for unit in seen]
            notes += _notes(training, seen, words)
            for name, table in _tables(training, seen, chosen, alpha, seed).items():
                table.insert(0, "series", training.name)
                parts[name].append(table)
            described.append(
                {
                    "name": training.name,
                    "steps": [at.step for at in training.checkpoints],
                    "clamps": training.clamps(),
                }
            )
    tables = {name: pd.concat(tables, ignore_index=True) for name, tables in parts.items()}
    places = ["layer", "head"]
    tables["onsets"][places] = tables["onsets"][places].astype("Int64")
    tables["onsets"]["shift"] = _shifts(tables["onsets"], found[0].name)
    meta = combined_provenance(sources, options=options, seed=seed)
    meta |= {
        "series": described,
        "detectors": [d.declaration() for d in chosen],
        "notes": notes,
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    return Report("emergence", tables, {}, meta)


def _key(series: Series) -> dict[str, Any]:
    """What a series' measures depend on, known before a checkpoint is opened."""
    return {
        "checkpoints": [[at.name, at.step, at.fingerprint()] for at in series.checkpoints],
        "clamps": series.clamps(),
        "held_out": series.held_out,
    }


def _measured(
    at: CheckpointAt,
    held: Clamps,
    chosen: Sequence[Detector],
    ask: Callable[..., dict[str, np.ndarray]],
    reads_text: bool,
) -> dict[str, np.ndarray]:
    model = open_checkpoint(at, held)
    _check_model(model, chosen, reads_text)
    return ask(model, chosen)


def _check_model(model: Model, chosen: Sequence[Detector], reads_text: bool) -> None:
    require_kind(model, "emergence", "text")
    model.layers_with("pattern")
    if not model.spec.causal or model.spec.unembedding is None:
        raise Refused(
            f"{model.id} is no causal language model: repeats and in-context learning need one; "
            "`interp heads` reads each checkpoint"
        )
    if model.tokenizer is not None:
        return
    needy = [d.name for d in chosen if d.needs_text or (d.reads is not None and d.reads.needs_text)]
    if reads_text or needy:
        what = f"detector {needy[0]} needs" if needy else "text= or syntax= needs"
        raise BadInput(
            f"{model.id} has no tokenizer, and {what} one: save it beside the weights, or leave this out"
        )


def _check_shape(
    series: Series, at: CheckpointAt, seen: Sequence[Mapping[str, np.ndarray]]
) -> None:
    first, this = (meta_of(dict(unit)) for unit in (seen[0], seen[-1]))
    for name in ("family", "n_layers", "n_heads", "d_model", "d_vocab"):
        if first[name] != this[name]:
            raise BadInput(
                f"{at.name} has {name} {this[name]}, {series.checkpoints[0].name} has {first[name]}: a series "
                "is one model in training"
            )


def _notes(
    series: Series, seen: Sequence[Mapping[str, np.ndarray]], words: str | None
) -> list[str]:
    notes = []
    if "loss" not in seen[0]:
        notes.append(
            f"{series.name} has no tokenizer: loss and in-context learning are not measured, and entropy is "
            "that of random tokens."
        )
    elif words is None:
        notes.append(f"{series.name}: loss, in-context learning and entropy are those of prose.")
    if held := series.clamps():
        notes.append(
            f"{series.name} was trained, and is measured, under clamps: {', '.join(held)}."
        )
    return notes


def _tables(
    series: Series,
    seen: Sequence[Mapping[str, np.ndarray]],
    chosen: Sequence[Detector],
    alpha: float,
    seed: int,
) -> dict[str, pd.DataFrame]:
    steps = [at.step for at in series.checkpoints]
    meta = meta_of(dict(seen[0]))
    heads = [tuple(head) for head in meta["heads"]]
    layer, head = np.array(heads).T
    by_step, curves = [], []
    for step, unit in zip(steps, seen, strict=True):
        scores = [Scores(d, unit[f"{d.name}.score"], unit[f"{d.name}.null"]) for d in chosen]
        table = heads_table(claims(scores, alpha=alpha, seed=seed), heads, meta["kv_groups"])
        table.insert(0, "step", step)
        table["entropy"] = unit["entropy"].mean(0)[layer, head]
        by_step.append(table)
        curves.append({"step": step} | _curve_row(unit, table["entropy"], seed))
    together = pd.concat(by_step, ignore_index=True)
    rows = []
    for detector in chosen:
        if not detector.labels:
            continue
        every = np.stack([unit[f"{detector.name}.score"] for unit in seen])
        for place in heads:
            mine = together[(together["layer"] == place[0]) & (together["head"] == place[1])]
            labelled = [
                step
                for step, labels in zip(mine["step"], mine["labels"], strict=True)
                if detector.name in labels.split(",")
            ]
            found = onset(steps, every[:, :, *place], seed=seed)
            risen = any(step >= found.low for step in labelled)
            risen &= detector.side * found.change >= detector.margin
            rows.append(_onset_row(detector.name, found, risen, place))
    for name, least in CURVES.items():
        if name in seen[0]:
            found = onset(steps, np.stack([unit[name] for unit in seen]), seed=seed)
            certain = found.change_low * found.change_high > 0
            rows.append(_onset_row(name, found, certain and abs(found.change) >= least))
    return {"emergence": together, "curves": pd.DataFrame(curves), "onsets": pd.DataFrame(rows)}


def _curve_row(unit: Mapping[str, np.ndarray], entropy: Any, seed: int) -> dict[str, float]:
    row = {}
    shown = ["accuracy", "loss_repeated", "loss", "icl"]
    for name in shown + [name for name in ("uas", "uas_distance") if name in unit]:
        values = unit.get(name)
        if values is None:
            row |= {name: np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan}
            continue
        low, high = np.quantile(resampling(len(values), seed) @ values, INTERVAL)
        row |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
    heads = unit["first_token"].mean(0)
    return row | {
        "entropy_min": float(entropy.min()),
        "entropy_mean": float(entropy.mean()),
        "largest": float(unit["largest"].mean(0).max()),
        "times_median": float(unit["times_median"].mean(0).max()),
        "massive": float(unit["massive"].mean(0).max()),
        "sink_rate": float((heads[~np.isnan(heads)] > SINK).mean()),
    }


def _onset_row(
    quantity: str, found: Onset, is_one: bool, place: tuple[int, int] | None = None
) -> dict[str, Any]:
    """A row of "onsets"; steps are empty where the change is none to speak of."""
    row: dict[str, Any] = {"quantity": quantity}
    row |= (
        {"layer": pd.NA, "head": pd.NA}
        if place is None
        else dict(zip(("layer", "head"), place, strict=True))
    )
    row |= {name: getattr(found, name) for name in Onset.__dataclass_fields__}
    if not is_one:
        row |= {"low": np.nan, "step": np.nan, "high": np.nan}
    return row


def _shifts(onsets: pd.DataFrame, reference: str) -> pd.Series:
    """log2 of every onset's step over the earliest one of its quantity in the reference series."""
    first: Any = onsets[onsets["series"] == reference].groupby("quantity")["step"].min()
    shift: Any = np.log2((1 + onsets["step"]) / (1 + onsets["quantity"].map(first)))
    return shift
