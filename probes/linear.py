"""Linear probes: what a site's activations say about a label, where, and how much of that is the probe's own doing."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from interp.data.labelled import LabelledTexts, labelled_texts
from interp.errors import BadInput, unknown
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.progress import Progress
from interp.run.resume import Checkpoint
from probes.balanced import balanced_accuracy, group_interval
from probes.captured import Feature, features_of, position_list, site_list
from probes.estimators import METHODS, STRENGTHS, sweep_of
from probes.folds import Task, check_folds
from probes.held_features import HeldFeatures
from probes.mdl import NUMBERS, mdl_table
from probes.ridge_sweep import NO_INNER_FOLDS

BLOCK = 32
"""Sites of one ridge sweep, which is what a resumed run does not repeat."""
SCORES = ("accuracy", "shuffled", "control", "random_model")


def check_options(
    *,
    data: LabelledTexts | str | Path = "sentiment",
    sites: str | Sequence[str] = "resid_post",
    method: str = "ridge",
    position: str = "last",
    folds: int = 5,
    alphas: Sequence[float] | None = None,
    mdl: int = 0,
    **others: Any,
) -> None:
    """Raise BadInput for data and options that no model could satisfy."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if alphas is not None and method not in STRENGTHS:
        raise BadInput(f"method '{method}' has no penalty: leave out alphas")
    if alphas is not None and not (len(alphas) and all(0 < a < np.inf for a in alphas)):
        raise BadInput(f"alphas={list(alphas)}: wanted one or more numbers above 0")
    if folds == 2 and len(STRENGTHS.get(method, ()) if alphas is None else alphas) > 1:
        raise BadInput(f"folds=2: {NO_INNER_FOLDS}")
    if mdl < 0:
        raise BadInput(f"mdl={mdl}: give the number of sites whose codes are wanted, or 0")
    site_list(sites)
    places = position_list(position)
    texts = _opened(data)
    if "word" in places and texts.words is None:
        raise BadInput(
            f"position 'word': {texts.name} does not say which word each text is asked about; give a "
            "column 'word', or position last or mean"
        )
    check_folds(texts, folds)


def _opened(data: LabelledTexts | str | Path) -> LabelledTexts:
    return data if isinstance(data, LabelledTexts) else labelled_texts(data)


def _best(report: Report) -> pd.DataFrame:
    """The best sites beside their controls."""
    told = report.table.assign(site=report.meta["keys"])
    columns = ["site", "accuracy", "low", "high", "shuffled", "control"]
    columns += ["random_model"] if told["random_model"].notna().to_numpy().any() else []
    told = told.sort_values("accuracy", ascending=False, kind="stable").head(15)
    return told.loc[:, columns]


@analysis(
    name="probe",
    source="Alain & Bengio 2017; Hewitt & Liang 2019 (control tasks, selectivity); Marks & Tegmark 2023 "
    "(mass-mean probes)",
    example="interp probe smollm2-135m sentiment",
    figure="map",
    validate=check_options,
    summary=_best,
)
def linear_probes(
    model: Model,
    data: LabelledTexts | str | Path,
    *,
    sites: str | Sequence[str] = "resid_post",
    method: str = "ridge",
    position: str = "last",
    folds: int = 5,
    alphas: Sequence[float] | None = None,
    random_model: bool = True,
    mdl: int = 0,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """How well a linear probe tells the labels from every site's activation, beside its controls.

    Accuracies are balanced (the mean over classes of the share that is right) and cross-validated: a
    text is judged by a probe that saw no text of its group. Scaling, class weights and the penalty's
    strength are set inside the training folds. Beside it stand, at the same site:

        majority      of a probe that always says one class: 1 / classes
        shuffled      for labels permuted between groups: chance
        control       for a label drawn once for each word (each group,
                      where no word recurs), with folds that split the
                      items of a word: what memorising words gives
        selectivity   accuracy − control (Hewitt & Liang)
        random_model  with random weights in the same architecture:
                      what tokens and positions give unlearned

    A probe shows what can be read from an activation, not that the model reads it: see
    `interp probe-causal`.

    Args:
        data: sentiment, language, tense, number, part_of_speech; or a .csv, .jsonl or .parquet file with
            columns text and label and, if wanted, group (never split between folds) and word.
        sites: such as resid_post (every layer), mlp_out.5, z (every head), z.5.1.
        method: ridge, logistic, mean_difference or mass_mean.
        position: last (token), word (the last token of the text's word), mean (over tokens), or
            whole numbers such as -1,-2; several with commas between.
        folds: of the cross-validation, by group; two where `alphas` is one number only.
        alphas: strengths of the penalty to choose from (logistic: C = 1 / alpha).
        random_model: probe the architecture with random weights too, which reads the texts again.
        mdl: how many of the best sites get a description length too (`probes.mdl`), beside those of
            shuffled labels and of the random weights.
        seed: of the folds, the controls, the random weights and the intervals.
        checkpoint: folder for finished sites, so that an interrupted call can be resumed.
        resume: go on from what is there.
        progress: show progress bars; by default in a terminal or a notebook.

    Returns: a Report. Table "probe", one row a site, layer, head and position: accuracy and its 95 %
        interval low to high (items resampled by group, probes fixed: it leaves out what other
        training texts would change), the columns above, p (one-sided, accuracy over majority, normal
        approximation with groups as units), q (p corrected over all rows, Benjamini–Hochberg), and
        alpha (the median over folds). Arrays "direction.KEY" [outputs width] and "intercept.KEY"
        [outputs] of the probe fitted on all texts: score = intercept + direction · activation, over 0
        for the second of two classes, else largest for the class; meta["classes"] has their order,
        meta["keys"] the KEY of every row. Table "mdl", where asked for: `probes.mdl.mdl_table`.

    Raises:
        BadInput: one class; fewer items, groups or groups of a class than folds; unknown site, method or
            position (with the nearest name); a position outside the shortest text; all before any
            forward. A site whose activation is the same for all texts, or not finite: after it.
        Refused: a site that this model cannot give.

    >>> linear_probes(tiny_model(), "sentiment", method="rigde")
    Traceback (most recent call last):
    interp.errors.BadInput: no method 'rigde'; did you mean 'ridge'? known: ridge, logistic, mean_difference, mass_mean
    """
    started = time.perf_counter()
    texts = _opened(data)
    check_options(
        data=texts,
        sites=sites,
        method=method,
        position=position,
        folds=folds,
        alphas=alphas,
        mdl=mdl,
    )
    features = features_of(model, sites, position)
    options = {
        "data": texts.name,
        "sites": sites if isinstance(sites, str) else ",".join(sites),
        "method": method,
        "position": position,
        "folds": folds,
        "alphas": list(STRENGTHS.get(method, ()) if alphas is None else alphas),
        "random_model": random_model,
        "mdl": mdl,
    }
    meta = provenance(model, options=options, seed=seed)
    told = hashlib.sha256(
        repr((texts.texts, texts.labels, texts.groups, texts.words)).encode()
    ).hexdigest()
    key = {"model": meta["model"], "options": options, "seed": seed, "texts": told}
    units = Checkpoint(checkpoint, key, resume=resume)
    task = Task.of(texts, folds, seed)
    notes = [*model.notes, *task.notes]
    with Progress(progress) as bars:
        held = HeldFeatures(model, texts, sites, position, bars, random_model, seed)
        blocks = _blocks(model, features, BLOCK if method == "ridge" else 1)
        advance = bars.stage("Fitting probes", len(features))
        found: dict[str, dict[str, np.ndarray]] = {}
        for block in blocks:

            def fitted(block: list[str] = block) -> dict[str, np.ndarray]:
                return _fitted(held, block, task, method, options["alphas"], model.device)

            result = units.compute(",".join(block), fitted)
            for place, name in enumerate(block):
                found[name] = {what: values[place] for what, values in result.items()}
            advance(len(block))
        table = _table(features, found, task, seed)
        tables = {"probe": table}
        if mdl:
            best = np.argsort(-table["accuracy"].to_numpy(), kind="stable")[:mdl].tolist()
            advance = bars.stage("Description lengths", len(best))
            codes = [
                _code(held, list(features)[place], texts, units, seed, advance) for place in best
            ]
            tables["mdl"] = pd.concat(codes, ignore_index=True)
    # a resumed run may not have read the texts again
    if random_model and all(np.all(part["random_model"] < 0) for part in found.values()):
        notes.append(f"No random weights were probed: {held.refusal or 'they could not be drawn'}")
    arrays = {}
    for name, part in found.items():
        arrays[f"direction.{name}"] = part["directions"].astype(np.float32)
        arrays[f"intercept.{name}"] = part["intercepts"].astype(np.float32)
    meta |= {
        "classes": task.classes,
        "counts": {name: texts.labels.count(name) for name in task.classes},
        "groups": len(set(texts.groups)),
        "keys": list(features),
        "unit": "balanced accuracy",
        "notes": notes,
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    return Report("probe", tables, arrays, meta)


def _code(
    held: HeldFeatures,
    key: str,
    data: LabelledTexts,
    units: Checkpoint,
    seed: int,
    advance: Callable[[int], None],
) -> pd.DataFrame:
    """One site's row of `mdl_table`."""

    def unit() -> dict[str, np.ndarray]:
        random = None if held.random is None else {key: held.random[key]}
        trained = {key: held.trained[key]}
        found = mdl_table(
            trained, np.array(data.labels), data.groups, random_features=random, seed=seed
        )
        return {name: found[name].to_numpy(dtype=float) for name in NUMBERS}

    row = held.features[key]._asdict() | {"items": len(data)}
    numbers = units.compute(f"mdl.{key}", unit)
    advance(1)
    found = pd.DataFrame([row | {name: float(numbers[name][0]) for name in NUMBERS}])
    return found.astype({"layer": "Int64", "head": "Int64"})


# --- fitting ---------------------------------------------------------------------------------------


def _blocks(model: Model, features: Mapping[str, Feature], size: int) -> list[list[str]]:
    """Keys in blocks whose features have one width."""
    by_width: dict[Any, list[str]] = {}
    for key, feature in features.items():
        block = model.spec.blocks[feature.layer]
        width = (block.d_head if feature.head is not None else 0, block.d_mlp)
        by_width.setdefault((feature.site, *width), []).append(key)
    return [keys[i : i + size] for keys in by_width.values() for i in range(0, len(keys), size)]


def _fitted(
    held: HeldFeatures,
    keys: list[str],
    task: Task,
    method: str,
    alphas: Sequence[float],
    device: torch.device,
) -> dict[str, np.ndarray]:
    """For sites of one width: predicted classes [sites items] for each of SCORES (−1: not probed)."""
    sweep = sweep_of(method)
    x = np.stack([held.trained[key] for key in keys])
    labels = np.stack([task.labels, task.shuffled])
    main = sweep(x, labels, task.folds, alphas, None, True, device)
    control = sweep(
        x, task.control[None], task.control_folds, alphas, main.alpha, False, device
    ).predicted[:, 0]
    random = np.full_like(control, -1)
    if held.random is not None:
        x = np.stack([held.random[key] for key in keys])
        random = sweep(x, labels[:1], task.folds, alphas, None, False, device).predicted[:, 0]
    return {
        "accuracy": main.predicted[:, 0],
        "shuffled": main.predicted[:, 1],
        "control": control,
        "random_model": random,
        "alpha": main.alpha,
        "directions": main.directions,
        "intercepts": main.intercepts,
    }


# --- the table -------------------------------------------------------------------------------------


def _table(
    features: Mapping[str, Feature],
    found: Mapping[str, Mapping[str, np.ndarray]],
    task: Task,
    seed: int,
) -> pd.DataFrame:
    """One row a site, layer, head and position."""
    from scipy.stats import false_discovery_control, norm

    right = np.stack([found[key]["accuracy"] == task.labels for key in features])
    low, high, error = group_interval(right, task.labels, task.groups, seed)
    chance = 1 / len(task.classes)
    truths = {"shuffled": task.shuffled, "control": task.control}
    rows = []
    for key, feature in features.items():
        part = found[key]
        row: dict[str, Any] = feature._asdict()
        for score in SCORES:
            truth = truths.get(score, task.labels)
            row[score] = (
                float("nan") if part[score][0] < 0 else balanced_accuracy(part[score], truth)
            )
        row["alpha"] = float(np.median(part["alpha"]))
        rows.append(row)
    table = pd.DataFrame(rows)
    table["head"] = table["head"].astype("Int64")
    table["majority"], table["low"], table["high"] = chance, low, high
    table["selectivity"] = table["accuracy"] - table["control"]
    # At least the error of a guess with one trial a group, so that no few right answers are certain.
    of_class = [len(np.unique(task.groups[task.labels == c])) for c in range(len(task.classes))]
    guess = chance * np.sqrt(sum(chance * (1 - chance) / count for count in of_class))
    table["p"] = norm.sf((table["accuracy"] - chance) / np.maximum(error, guess))
    table["q"] = false_discovery_control(table["p"])
    columns = ["site", "layer", "head", "position", "accuracy", "low", "high", "majority"]
    columns += ["shuffled", "control", "selectivity", "random_model", "p", "q", "alpha"]
    return pd.DataFrame(table, columns=columns)
