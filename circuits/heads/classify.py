"""The main job: what every attention head of a model does, how sure we are, and whether it matters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from circuits.heads.ablation import METRICS, ablation_columns, ablation_effects, plan_ablations
from circuits.heads.claims import MIN_PROMPTS, claims, heads_table
from circuits.heads.detector import Detector, choose
from circuits.heads.evidence import evidence_patterns, evidence_prompts
from circuits.heads.scan import passes, scan
from circuits.heads.summary import strongest_heads
from circuits.weights import ov_tokens
from interp.data.prompts import Prompts, repeated_tokens, text_windows
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.progress import Progress
from interp.run.resume import Checkpoint
from interp.sites import Site

ABLATION_PROMPTS, ABLATION_TOKENS = 4, 64
"""Prompts a head is ablated on, and how many of prose's tokens each keeps after its lead."""


def check_options(*, detectors: Sequence[str] | None = None, prompts: int = 32) -> None:
    """Raise BadInput for options that no model could satisfy."""
    choose(detectors)
    if prompts < MIN_PROMPTS:
        raise BadInput(
            f"prompts={prompts}: a claim about a head needs at least {MIN_PROMPTS} prompts"
        )


@analysis(
    name="heads",
    source="Elhage et al. 2021; Olsson et al. 2022; Wang et al. 2022; Clark et al. 2019; Gu et al. 2024",
    example="interp heads smollm2-135m",
    figure="map",
    validate=check_options,
    summary=strongest_heads,
)
def classify_heads(
    model: Model,
    *,
    detectors: Sequence[str] | None = None,
    prompts: int = 32,
    seed: int = 0,
    alpha: float = 0.01,
    ablate: bool = True,
    evidence: int = 4,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """Every attention head's roles, with intervals, nulls, corrected p-values and ablation effects.

    One pass over each prompt set (repeated random tokens, their control, English prose) feeds all
    detectors. A label needs effect size and significance; each labelled head is then mean-ablated on
    the loss its role should serve. Labels describe these prompts: on other text a head may differ.

    Args:
        model: from `interp.load`.
        detectors: names out of `circuits.heads.detector.catalogue()`; all by default.
        prompts: prompts in each set; at least 4.
        seed: of prompts, bootstrap and controls.
        alpha: corrected significance level of a label.
        ablate: whether labelled heads are ablated.
        evidence: how many prompts' patterns the report keeps.
        checkpoint: folder for finished units, so that an interrupted call can be resumed.
        resume: go on from what is there.
        progress: show progress bars; by default in a terminal or a notebook.

    Returns: a Report with table "heads" (one row a head), "ov_tokens", and array "pattern".

    Raises:
        BadInput: unknown detector, too few prompts. Refused: the model's patterns cannot be seen.

    >>> report = classify_heads(tiny_model(), prompts=4, ablate=False, progress=False)
    >>> len(report.table), float(report.table["previous_token"].max()) < 0.4
    (8, True)
    """
    started = time.perf_counter()
    check_options(detectors=detectors, prompts=prompts)
    model.layers_with("pattern")
    chosen, skipped = _usable(model, choose(detectors))
    sets = _prompt_sets(model, chosen, prompts, seed)
    options = {
        "detectors": [d.name for d in chosen],
        "prompts": prompts,
        "alpha": alpha,
        "ablate": ablate,
        "evidence": evidence,
    }
    source = provenance(model, options=options, seed=seed)
    units = Checkpoint(
        checkpoint, {"model": source["model"], "options": options, "seed": seed}, resume=resume
    )

    with Progress(progress) as bars:
        found = scan(
            model, chosen, sets, units, bars.stage("Scanning prompts", passes(chosen, sets))
        )
        verdicts = claims(found, alpha=alpha, seed=seed)
        heads = model.spec.heads
        table = heads_table(verdicts, heads, [model.spec.kv_group(*head) for head in heads])
        if ablate:
            table = _ablated(model, table, chosen, sets, units, seed, bars)
        shown, patterns = [], None
        if evidence:
            advance = bars.stage("Collecting evidence", evidence)
            shown = evidence_prompts(model, evidence, seed)
            patterns = evidence_patterns(model, shown)
            shown = shown[: len(patterns)]
            advance(evidence)
    notes = _notes(model, sets)
    meta: dict[str, Any] = source | {
        "detectors": [d.declaration() for d in chosen],
        "skipped": skipped,
        "notes": notes,
        "causal": model.spec.causal,
        "prompts": [{"title": title, "tokens": model.tokens(ids.tolist())} for title, ids in shown],
    }
    tables = {"heads": table} | _ov_tables(model, notes)
    arrays = {} if patterns is None or not len(patterns) else {"pattern": patterns}
    meta["wall_time_s"] = round(time.perf_counter() - started, 2)
    return Report("heads", tables, arrays, meta)


def _usable(model: Model, chosen: Sequence[Detector]) -> tuple[list[Detector], dict[str, str]]:
    """The detectors that make sense on this model, and why the others do not."""
    skipped = {}
    n_layers = len(model.spec.attention_layers)
    for detector in chosen:
        if detector.causal_only and not model.spec.causal:
            skipped[detector.name] = "needs a model that reads left to right"
        elif n_layers < detector.min_layers:
            skipped[detector.name] = (
                f"needs {detector.min_layers} attention layers, the model has {n_layers}"
            )
        elif detector.reads == "text" and model.tokenizer is None:
            skipped[detector.name] = "needs text, and the model was loaded without a tokenizer"
        elif detector.measure is not None:
            try:
                for site in detector.captures(model):
                    model.layers_with(Site.parse(site).name)
                _ = model.W_U
            except Refused as refusal:
                skipped[detector.name] = str(refusal)
    usable = [detector for detector in chosen if detector.name not in skipped]
    if not usable:
        raise BadInput(
            f"no detector is left for {model.id}: "
            + "; ".join(f"{k} {v}" for k, v in skipped.items())
        )
    return usable, skipped


def _prompt_sets(model: Model, chosen: Sequence[Detector], n: int, seed: int) -> dict[str, Prompts]:
    sets: dict[str, Prompts] = {}
    read = {detector.reads for detector in chosen}
    if "repeated" in read:
        sets["repeated"], sets["unrepeated"] = repeated_tokens(model, n, seed=seed)
    if "text" in read:
        sets["text"] = text_windows(model, n, seed=seed)
    return sets


def _ablated(
    model: Model,
    table: pd.DataFrame,
    chosen: Sequence[Detector],
    sets: dict[str, Prompts],
    units: Checkpoint,
    seed: int,
    bars: Progress,
) -> pd.DataFrame:
    few = {name: sets[name].rows(slice(ABLATION_PROMPTS)) for name in METRICS if name in sets}
    if "text" in few:
        few["text"] = few["text"].first(few["text"].lead + ABLATION_TOKENS)
    causal_lm = (
        model.spec.causal and model.spec.d_vocab is not None and model.spec.unembedding is not None
    )
    plans = (
        plan_ablations(table, {d.name: d.serves for d in chosen}, few, seed) if causal_lm else {}
    )
    advance = bars.stage(
        "Ablating heads", sum(len(p.labelled) + len(p.controls) for p in plans.values())
    )
    effects = {
        metric: ablation_effects(
            model, plan.prompts, plan.labelled + plan.controls, checkpoint=units, advance=advance
        )
        for metric, plan in plans.items()
    }
    return ablation_columns(table, plans, effects, seed)


def _ov_tables(model: Model, notes: list[str]) -> dict[str, pd.DataFrame]:
    try:
        words = ov_tokens(model)
    except Refused as refusal:
        notes.append(f"OV circuits are not read as words: {refusal}")
        return {}
    return {"ov_tokens": words} if len(words) else {}


def _notes(model: Model, sets: dict[str, Prompts]) -> list[str]:
    notes = list(model.notes)
    if any(prompts.lead == 0 for prompts in sets.values()):
        notes.append(
            "The tokenizer has no BOS, CLS or EOS token: prompts begin with ordinary text."
        )
    repeated = sets.get("repeated")
    if repeated is not None and repeated.period < 64:
        notes.append(
            f"Repeated sequences are {repeated.period} tokens twice (64 where there is room)."
        )
    return notes
