"""Heads of models compared by their weights: what a fine-tune changed, and which head is which."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import interp
from circuits.heads.changes import HEADS, SCORES, changes_by_head, changes_of_claims
from circuits.heads.claims import MIN_PROMPTS, Claim, claims
from circuits.heads.detector import choose
from circuits.heads.head_weights import HeadWeights, head_weights
from circuits.heads.low_rank import changes, cosines
from circuits.heads.matching import ALPHA
from circuits.heads.prompt_sets import TOKENS
from circuits.heads.scan import Sets, prompt_sets, scan
from circuits.heads.usable import usable
from circuits.heads.weight_matching import features_by_head, match_by_features, match_in_layers
from interp.errors import BadInput
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, combined_provenance, provenance
from interp.run.progress import Progress
from interp.run.resume import Checkpoint

COLUMNS = ["model", "layer", "head", "qk_cosine", "qk_change", "ov_cosine", "ov_change"]
COLUMNS += ["weights_changed", *HEADS[2:]]
MATCHES = ["model", "layer_a", "head_a", "layer_b", "head_b", "likeness", "distance", "chance"]
MATCHES += ["effect", "p", "matched"]


def check_options(
    *,
    detectors: Sequence[str] | None = None,
    prompts: int = 8,
    tokens: int = TOKENS,
    alpha: float = ALPHA,
) -> None:
    """Raise BadInput for options that no models could satisfy."""
    choose(detectors)
    if prompts and prompts < MIN_PROMPTS:
        raise BadInput(
            f"prompts={prompts}: a claim about a head needs at least {MIN_PROMPTS} prompts; 0 compares "
            "weights alone"
        )
    if not 0 < alpha < 1:
        raise BadInput(f"alpha={alpha}: a significance level lies between 0 and 1, such as {ALPHA}")


def most_changed(report: Report) -> pd.DataFrame:
    """The heads of each model that changed most from the first model's, by weights."""
    if not len(report.table):
        return report.tables["matches"].head(15)
    rows: Any = report.table[report.table["weights_changed"]]
    columns = [
        "model",
        "layer",
        "head",
        "qk_change",
        "ov_change",
        "gained",
        "lost",
        "clearest",
        "change",
    ]
    shown = rows.assign(size=rows[["qk_change", "ov_change"]].max(axis=1))
    shown = shown.sort_values(["model", "size"], ascending=[True, False], kind="stable")
    return shown[columns].head(15)


@analysis(
    name="compare_weights",
    source="W_QK and W_OV: Elhage et al. 2021; comparison by products of low rank, and nulls: ours",
    example="interp compare-weights base fine-tuned --out reports/changes",
    figure="changes",
    validate=check_options,
    summary=most_changed,
    reads="models",
)
def compare_weights(
    models: Sequence[str],
    *,
    detectors: Sequence[str] | None = None,
    prompts: int = 8,
    tokens: int = TOKENS,
    alpha: float = ALPHA,
    seed: int = 0,
    progress: bool | None = None,
) -> Report:
    """What changed from the first model to each other one, head by head: W_QK, W_OV, scores, labels.

        qk_change = ‖W_QK' − W_QK‖_F / ‖W_QK‖_F,   qk_cosine = ⟨W_QK, W_QK'⟩ / ‖W_QK‖ ‖W_QK'‖,   likewise W_OV

    with W_QK over three distances of the key, norms' gains folded in, by [d_head d_head] products. Weights that
    changed need not change what a head does, and a head whose weights did not change may do something else
    because of heads before it. Where shapes agree, each head is also matched within its layer to the head whose
    circuits are most like its own (has the layer been rearranged?), against circuits written on shuffled axes
    of the residual stream. Where they do not, heads are matched by what no basis changes (spectra, signs of
    eigenvalues, symmetry): a weak likeness, which many pairs of heads share by chance.

    Args:
        models: the base, then its fine-tuned versions or checkpoints: names as for `interp.load`, or Models.
        detectors: whose scores are compared: names as `interp detectors` lists them, "fast" or "all".
        prompts: how many of each set, the same for all models; 0 compares weights alone.
        tokens: of a prompt.
        alpha: corrected significance level of changes, labels and matches.
        seed: of prompts, bootstrap and null.
        progress: show progress bars.

    Returns: a Report with tables
        "compare_weights": a row a head of each model of the base's shape: model, layer, head, qk_cosine, qk_change,
            ov_cosine, ov_change, weights_changed, and, unknown without prompts, labels_before, labels_after,
            gained, lost, changed_scores, clearest (score), its change, low, high.
        "score_changes": a row a head and score, paired over prompts (`circuits.heads.changes`); none without.
        "matches": a row a pair of heads: model, layer_a, head_a, layer_b, head_b, likeness (mean cosine) or,
            between shapes, distance and effect; chance, p, matched.
        "features": a row a head of every model: what no basis changes (`circuits.heads.low_rank`).
        meta["notes"] says what a model could not give.

    Raises:
        BadInput: fewer than two models, bad options. Refused: no head of a model has weights that can be read.

    >>> report = compare_weights([tiny_model(), tiny_model()], prompts=0, progress=False)
    >>> int(report.table["weights_changed"].sum()), bool(report.tables["matches"]["matched"].all())
    (0, True)
    """
    started = time.perf_counter()
    check_options(detectors=detectors, prompts=prompts, tokens=tokens, alpha=alpha)
    if isinstance(models, str) or len(models) < 2:
        raise BadInput(
            f"compare_weights was given {models!r}: wanted at least two models, the base first"
        )
    notes: list[str] = []
    rows, scored, matched, features = [], [], [], []
    with Progress(progress) as bars:
        advance = bars.stage("Comparing models", len(models))
        base: _Read | None = None
        sources = []
        names = _distinct(models)
        for name, source in zip(names, models, strict=True):
            model = source if isinstance(source, Model) else interp.load(source)
            read = _read(model, name, base, detectors, prompts, tokens, alpha, seed)
            sources.append(read.source)
            notes += [f"{name}: {note}" for note in read.notes]
            features.append(read.features.assign(model=name)[["model", *read.features]])
            if base is None:
                base = read
            else:
                pair, moved = _compared(base, read, alpha, seed)
                rows += [] if pair is None else [pair]
                scored += [] if moved is None else [moved]
                match = match_in_layers if base.shape == read.shape else match_by_features
                pairs = match(base.weights, read.weights, alpha=alpha, seed=seed)
                matched.append(pairs.assign(model=name).reindex(columns=MATCHES))
                if base.shape != read.shape:
                    notes.append(
                        f"{name} has another shape than {base.name}: heads are matched by what no basis "
                        "changes, and changes are not given."
                    )
            advance(1)
    tables = {
        "compare_weights": pd.concat(rows, ignore_index=True)
        if rows
        else pd.DataFrame(columns=COLUMNS),
        "score_changes": pd.concat(scored, ignore_index=True)
        if scored
        else pd.DataFrame(columns=["model", *SCORES]),
        "matches": pd.concat(matched, ignore_index=True)[MATCHES],
        "features": pd.concat(features, ignore_index=True),
    }
    options = {"prompts": prompts, "tokens": tokens, "alpha": alpha}
    options["detectors"] = None if detectors is None else list(detectors)
    meta = combined_provenance(sources, options=options, seed=seed)
    meta |= {"notes": list(dict.fromkeys(notes)), "base": names[0]}
    meta["wall_time_s"] = round(time.perf_counter() - started, 2)
    return Report("compare_weights", tables, {}, meta)


@dataclass(frozen=True)
class _Read:
    """What is kept of a model when the next one is opened; `sets` are the base's prompts for all."""

    name: str
    source: dict[str, Any]
    shape: tuple[Any, ...]
    heads: pd.DataFrame
    weights: HeadWeights
    features: pd.DataFrame
    claims: list[Claim] | None
    sets: Sets | None
    has_tokenizer: bool
    notes: list[str]


def _read(
    model: Model,
    name: str,
    base: _Read | None,
    detectors: Sequence[str] | None,
    prompts: int,
    tokens: int,
    alpha: float,
    seed: int,
) -> _Read:
    """Circuits, features and, for prompts, scores of a model."""
    spec = model.spec
    shape = (
        spec.family,
        spec.d_model,
        spec.d_head,
        *((b.n_heads, b.n_kv_heads) for b in spec.blocks),
    )
    weights = head_weights(model)
    notes = list(weights.notes)
    heads = pd.DataFrame(spec.heads, columns=["layer", "head"])
    found, sets = None, None
    if prompts and base is None:
        chosen, skipped = usable(model, choose(detectors), named=detectors or ())
        notes += [f"{detector} is not compared: {why}" for detector, why in skipped.items()]
        sets = prompt_sets(model, chosen, prompts, seed, tokens)
        found = claims(
            scan(model, chosen, sets, prompts, seed, Checkpoint()), alpha=alpha, seed=seed
        )
    elif base is not None and base.claims is not None and base.shape == shape:
        # the base's detectors on the base's prompts: another tokenizer would draw others
        same = [claim.scores.detector for claim in base.claims]
        if spec.d_vocab != base.source["model"]["d_vocab"]:
            notes.append("scores are not compared: it has another vocabulary than the base")
        elif model.tokenizer is None and base.has_tokenizer:
            notes.append("scores are not compared: it was loaded without a tokenizer")
        else:
            seen = scan(model, same, base.sets or {}, prompts, seed, Checkpoint())
            found = claims(seen, alpha=alpha, seed=seed)
    return _Read(
        name,
        provenance(model, options={}, seed=seed),
        shape,
        heads,
        weights,
        features_by_head(weights),
        found,
        sets,
        model.tokenizer is not None,
        notes,
    )


def _distinct(models: Sequence[Any]) -> list[str]:
    ids = [
        str(model)
        if isinstance(model, (str, Path))
        else str(getattr(model, "id", type(model).__name__))
        for model in models
    ]
    return [
        name if ids.count(name) == 1 else f"{name} ({1 + ids[:place].count(name)})"
        for place, name in enumerate(ids)
    ]


def _compared(
    a: _Read, b: _Read, alpha: float, seed: int
) -> tuple[pd.DataFrame | None, pd.DataFrame | None]:
    """Rows of heads in the same place, and of their scores; None where shapes differ."""
    if a.shape != b.shape:
        return None, None
    table = a.heads.copy()
    for (kind, mine), (_, theirs) in zip(a.weights.kinds, b.weights.kinds, strict=True):
        table[f"{kind}_cosine"] = np.nan
        table[f"{kind}_change"] = np.nan
        for layer in mine.keys() & theirs.keys():
            at = table["layer"] == layer
            table.loc[at, f"{kind}_cosine"] = (
                cosines(mine[layer], theirs[layer]).diagonal().double().numpy()
            )
            table.loc[at, f"{kind}_change"] = changes(mine[layer], theirs[layer]).numpy()
    table["weights_changed"] = (table[["qk_change", "ov_change"]].fillna(0) > 0).any(axis=1)
    table.insert(0, "model", b.name)
    if a.claims is None or b.claims is None:
        return table.reindex(columns=COLUMNS), None
    moved = changes_of_claims(a.claims, b.claims, a.heads, alpha=alpha, seed=seed)
    by_head = changes_by_head(moved, _labels(a), _labels(b)).drop(columns=["layer", "head"])
    moved.insert(0, "model", b.name)
    return pd.concat([table, by_head], axis=1).reindex(columns=COLUMNS), moved


def _labels(read: _Read) -> list[str]:
    """The labels of every head, as a report on heads writes them."""
    assert read.claims is not None
    labelling = [c for c in read.claims if c.scores.detector.labels]
    return [
        ",".join(c.scores.detector.name for c in labelling if c.label[layer, head])
        for layer, head in read.heads.itertuples(index=False)
    ]
