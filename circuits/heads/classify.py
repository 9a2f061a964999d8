"""The main job: what every attention head of a model does, how sure we are, and whether it matters."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from circuits.heads.ablation import ablation_columns, ablation_effects, plan_ablations
from circuits.heads.claims import MIN_PROMPTS, Claim, agreement, claims, heads_table
from circuits.heads.clusters import head_clusters
from circuits.heads.detector import Detector, choose
from circuits.heads.evidence import (
    Evidence,
    evidence_images,
    evidence_patterns,
    evidence_prompts,
)
from circuits.heads.judge import judge_of
from circuits.heads.power import power_notes, power_table
from circuits.heads.prompt_sets import IMAGES, TOKENS
from circuits.heads.scan import Sets, passes, prompt_sets, scan
from circuits.heads.summary import strongest_heads
from circuits.heads.usable import usable
from circuits.weights import ov_tokens
from interp.data.images import Images, image_prompts, reads_images
from interp.data.prompts import Prompts, frame, lead_notes, text_tokens
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.progress import Progress
from interp.run.resume import Checkpoint

MIN_TOKENS = 16
ABLATION_PROMPTS, ABLATION_TOKENS = 4, 64
"""Prompts a head is ablated on, and how many of prose's tokens each keeps after its lead."""
JUDGED_ON = ("repeated", "text", IMAGES.name)
"""Prompt sets on which heads are ablated."""


def check_options(
    *, detectors: Sequence[str] | None = None, prompts: int = 32, tokens: int = TOKENS
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    choose(detectors)
    if prompts < MIN_PROMPTS:
        raise BadInput(
            f"prompts={prompts}: a claim about a head needs at least {MIN_PROMPTS} prompts"
        )
    if tokens < MIN_TOKENS:
        raise BadInput(f"tokens={tokens}: a prompt needs at least {MIN_TOKENS}")


@analysis(
    name="heads",
    source="Elhage et al. 2021; Olsson et al. 2022; Wang et al. 2022; Clark et al. 2019; Gu et al. 2024; "
    "Dosovitskiy et al. 2021; Darcet et al. 2024",
    example="interp heads smollm2-135m",
    figure="map",
    validate=check_options,
    summary=strongest_heads,
    takes="one stack",
)
def classify_heads(
    model: Model,
    *,
    detectors: Sequence[str] | None = None,
    prompts: int = 32,
    tokens: int = TOKENS,
    images: str | Path | Tensor | None = None,
    seed: int = 0,
    alpha: float = 0.01,
    ablate: bool = True,
    evidence: int = 4,
    seeds: int = 1,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """Every attention head's roles, with intervals, nulls, corrected p-values and ablation effects.

    One pass over each prompt set (repeated random tokens, their control, English prose) feeds all
    detectors. A label needs effect size and significance; each labelled head is then mean-ablated on
    the loss its role should serve. Labels describe these prompts: on other text a head may differ. Nor
    do they say that nothing else could do its job.

    An encoder gets its texts with CLS and separators as its tokenizer puts them; a model of images gets
    images, and its heads are read on the grid of their patches. Where a model predicts no next token, the
    loss is that of masked tokens, or how far class probabilities move (KL); without such a head nothing is
    ablated. Detectors that make no sense on a model are listed as skipped, with the reason.

    Args:
        model: from `interp.load`.
        detectors: names as `interp detectors` lists them, "fast" (the default) or "all".
        prompts: prompts in each set; at least 4.
        tokens: of a prompt, after its lead; up to n_ctx. Longer prompts need more time and little more
            memory: patterns are never kept whole. Detectors that bring their own prompts, evidence and
            ablations keep their own lengths.
        images: for a model of images: a folder of pictures, or (in Python) a tensor [n channels height
            width] of numbers 0 to 1; `prompts` of them are taken. By default drawn from the seed
            (gratings, blobs, shapes, noise with a natural spectrum): photographs may show other roles.
        seed: of prompts, bootstrap and controls.
        alpha: corrected significance level of a label.
        ablate: whether labelled heads are ablated.
        evidence: how many prompts' patterns the report keeps.
        seeds: labels are made again with the next seeds, this many in all; meta["stability"] says how
            far they agree.
        checkpoint: folder for finished units, so that an interrupted call can be resumed.
        resume: go on from what is there.
        progress: show progress bars; by default in a terminal or a notebook.

    Returns: a Report with tables "heads" (one row a head), "clusters" (heads whose scores are alike:
        `circuits.heads.clusters`), "power" (whether the prompts were enough: `circuits.heads.power`),
        "ov_tokens", and array "pattern".

    Raises:
        BadInput: unknown detector, too few prompts. Refused: the model's patterns cannot be seen.

    >>> report = classify_heads(tiny_model(), prompts=4, ablate=False, progress=False)
    >>> len(report.table), float(report.table["previous_token"].max()) < 0.4
    (8, True)
    """
    started = time.perf_counter()
    check_options(detectors=detectors, prompts=prompts, tokens=tokens)
    if not reads_images(model):
        _check_room(model, tokens)
    model.layers_with("pattern")
    chosen, skipped = usable(model, choose(detectors), named=detectors or ())
    given = _given(model, images, prompts)
    sets = prompt_sets(model, chosen, prompts, seed, tokens, given)
    options: dict[str, Any] = {
        "detectors": [d.name for d in chosen],
        "prompts": prompts,
        "tokens": tokens,
        "alpha": alpha,
        "ablate": ablate,
        "evidence": evidence,
        "seeds": seeds,
    }
    if given:
        options["images"] = {"from": _origin(images), "sha256": _pixels_sha256(given)}
    source = provenance(model, options=options, seed=seed)
    units = Checkpoint(
        checkpoint, {"model": source["model"], "options": options, "seed": seed}, resume=resume
    )

    with Progress(progress) as bars:
        advance = bars.stage("Scanning prompts", passes(chosen, sets, prompts))
        found = scan(model, chosen, sets, prompts, seed, units, advance)
        verdicts = claims(found, alpha=alpha, seed=seed)
        heads = model.spec.heads
        table = heads_table(verdicts, heads, [model.spec.kv_group(*head) for head in heads])
        if ablate:
            usual = sets if tokens <= TOKENS else prompt_sets(model, chosen, ABLATION_PROMPTS, seed)
            table = _ablated(model, table, chosen, usual, units, seed, bars)
        shown: list[Evidence] = []
        patterns = None
        if evidence:
            advance = bars.stage("Collecting evidence", evidence)
            shown = _evidence(model, sets, evidence, seed)
            patterns = evidence_patterns(model, shown) if shown else None
            shown = shown[: 0 if patterns is None else len(patterns)]
            advance(evidence)
        draws = 1 if given else seeds
        stability = _stability(model, verdicts, prompts, tokens, seed, draws, alpha, units, bars)
    power = power_table(verdicts, alpha)
    notes = _notes(model, sets, tokens) + power_notes(power) + _stability_notes(stability)
    table["cluster"], clusters = head_clusters(table, [d.name for d in chosen])
    tables = {"heads": table} | ({"clusters": clusters} if len(clusters) else {})
    tables |= {"power": power} if len(power) else {}
    tables |= _ov_tables(model, notes)
    for scores in found:
        if scores.detector.tables is not None:
            tables |= scores.detector.tables(scores.seen)
        if scores.detector.notes is not None:
            notes += scores.detector.notes(scores.seen)
    meta: dict[str, Any] = source | {
        "detectors": [d.declaration() for d in chosen],
        "skipped": skipped,
        "notes": list(dict.fromkeys(notes)),
        "stability": stability,
        "causal": model.spec.causal,
        "prompts": [{"title": prompt.title, "tokens": prompt.tokens} for prompt in shown],
    }
    arrays = {} if patterns is None or not len(patterns) else {"pattern": patterns}
    meta["wall_time_s"] = round(time.perf_counter() - started, 2)
    return Report("heads", tables, arrays, meta)


def _check_room(model: Model, tokens: int) -> None:
    """Longer prompts than usual are refused where they would not fit, and not cut."""
    room, around = model.spec.n_ctx, sum(map(len, frame(model)))
    if tokens > TOKENS and room is not None and tokens + around > room:
        raise BadInput(
            f"tokens={tokens}: with the lead token {model.id} reads at most {room} (n_ctx); give at most "
            f"{room - around}"
        )


def _given(model: Model, images: str | Path | Tensor | None, prompts: int) -> Sets:
    """The images that the user brings."""
    if images is None:
        return {}
    if not reads_images(model):
        raise BadInput(f"images were given, and {model.id} reads text; leave them out")
    found = image_prompts(model, prompts, images=images)
    if len(found) < MIN_PROMPTS:
        raise BadInput(
            f"{len(found)} images were given: a claim about a head needs at least {MIN_PROMPTS}"
        )
    return {found.name: (found, None)}


def _origin(images: str | Path | Tensor | None) -> str:
    return "a tensor" if isinstance(images, Tensor) else str(images)


def _pixels_sha256(given: Sets) -> str:
    """What tells these images from others: a run that is resumed must have the same ones."""
    digest = hashlib.sha256()
    for prompts, _ in given.values():
        if isinstance(prompts, Images):
            digest.update(prompts.pixels.float().numpy().tobytes())
    return digest.hexdigest()


def _evidence(model: Model, sets: Sets, n: int, seed: int) -> list[Evidence]:
    """Prompts that show what heads do: short texts, or the first images that were scanned."""
    if not reads_images(model):
        return evidence_prompts(model, n, seed)
    scanned = [prompts for prompts, _ in sets.values() if isinstance(prompts, Images)]
    return evidence_images(scanned[0], n) if scanned else []


def _stability(
    model: Model,
    first: Sequence[Claim],
    prompts: int,
    tokens: int,
    seed: int,
    seeds: int,
    alpha: float,
    units: Checkpoint,
    bars: Progress,
) -> dict[str, Any] | None:
    """How far labels agree when prompts are drawn anew; detectors that observe by themselves left out."""
    shared = [c.scores.detector for c in first if c.scores.detector.reads is not None]
    if seeds < 2 or not shared:
        return None
    all_claims = [[claim for claim in first if claim.scores.detector.reads is not None]]
    for other in range(seed + 1, seed + seeds):
        sets = prompt_sets(model, shared, prompts, other, tokens)
        advance = bars.stage(f"Scanning again, seed {other}", passes(shared, sets, 0))
        found = scan(model, shared, sets, prompts, other, units.part(f"seed.{other}"), advance)
        all_claims.append(claims(found, alpha=alpha, seed=other))
    return {"seeds": seeds, **agreement(all_claims)}


def _stability_notes(stability: dict[str, Any] | None) -> list[str]:
    if stability is None:
        return []
    return [
        f"Labels were made {stability['seeds']} times on prompts drawn anew: {stability['in_all']} of "
        f"{stability['labels']} came back every time; mean agreement of two draws "
        f"{stability['agreement']:.2f} (shared labels over all that either gave)."
    ]


def _ablated(
    model: Model,
    table: pd.DataFrame,
    chosen: Sequence[Detector],
    sets: Sets,
    units: Checkpoint,
    seed: int,
    bars: Progress,
) -> pd.DataFrame:
    few: dict[str, Prompts | Images] = {
        name: sets[name][0].rows(slice(ABLATION_PROMPTS)) for name in JUDGED_ON if name in sets
    }
    if isinstance(text := few.get("text"), Prompts) and text.causal:
        few["text"] = text.first(text.lead + ABLATION_TOKENS)
    judges = {name: judge for name, part in few.items() if (judge := judge_of(model, part))}
    on_images = reads_images(model)
    serves = {d.name: IMAGES.name if on_images else d.serves for d in chosen}
    plans = plan_ablations(table, serves, judges, seed)
    advance = bars.stage(
        "Ablating heads", sum(len(p.labelled) + len(p.controls) for p in plans.values())
    )
    effects = {
        metric: ablation_effects(
            model, plan.judge, plan.labelled + plan.controls, checkpoint=units, advance=advance
        )
        for metric, plan in plans.items()
    }
    return ablation_columns(table, plans, effects, seed)


def _ov_tables(model: Model, notes: list[str]) -> dict[str, pd.DataFrame]:
    if reads_images(model):  # no words to read them as
        return {}
    try:
        words = ov_tokens(model)
    except Refused as refusal:
        notes.append(f"OV circuits are not read as words: {refusal}")
        return {}
    return {"ov_tokens": words} if len(words) else {}


def _notes(model: Model, sets: Sets, tokens: int) -> list[str]:
    notes = list(model.notes)
    if any(isinstance(prompts, Prompts) for prompts, _ in sets.values()):
        notes += lead_notes(model)
    for prompts, _ in sets.values():
        if isinstance(prompts, Images):
            height, width = prompts.grid.places.shape
            notes.append(
                f"Images are read as {height} × {width} patches and {len(prompts.grid.others)} other positions."
            )
            notes += [prompts.note] if prompts.note else []
    period = sets["repeated"][0].period if "repeated" in sets else tokens // 2
    if "text" in sets and len(sets["text"][0]) * tokens > len(text_tokens(model)):
        notes.append(
            "Windows of prose overlap: intervals on prose are narrower than they should be."
        )
    if period < tokens // 2:
        notes.append(
            f"Repeated sequences are {period} tokens twice ({tokens // 2} where there is room)."
        )
    return notes
