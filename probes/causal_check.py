"""Is what a probe finds used? The direction is erased, added and swapped, and the next token is watched.

A property can be read off an activation without the model ever reading it. So the direction found on some
groups of texts is changed on others, and what that does to the model's next token is compared with the
same change along random directions, and with what it does to prompts that have nothing to do with it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from interp.data.labelled import labelled_texts
from interp.data.prompts import text_windows
from interp.errors import BadInput, Refused, unknown
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.progress import Progress
from interp.sites import Site
from probes.captured import capture_features, features_of
from probes.causal_effects import effect_row, told_apart
from probes.directions import (
    DIRECTIONS,
    RANDOM_FROM,
    bench_of,
    direction_of,
    interventions,
    random_directions,
    with_turned,
)
from probes.two_classes import Data, answer_ids, batch_at, split, two_classes

WINDOW = 16
"""Tokens of a control prompt."""


def check_options(
    *,
    data: Any = None,
    sites: Sequence[str] | None = None,
    directions: Sequence[str] = ("mean",),
    position: str | None = None,
    classes: Sequence[str] | None = None,
    answers: Sequence[str] | None = None,
    template: str = "{text}",
    doses: Sequence[float] = (1.0,),
    draws: int = 10,
    random_from: str = "sphere",
    items: int = 32,
    control_prompts: int = 12,
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if isinstance(data, (str, Path)):
        labelled_texts(data)
    for text in sites or ():
        Site.parse(text)
    if not list(directions):
        raise BadInput(f"no direction: name at least one of {', '.join(DIRECTIONS)}")
    for name in directions:
        if name not in DIRECTIONS:
            raise unknown("direction", name, DIRECTIONS)
    if position not in (None, "last", "word"):
        raise unknown("position", position, ("last", "word"))
    if random_from not in RANDOM_FROM:
        raise unknown("kind of random direction", random_from, RANDOM_FROM)
    if classes is not None and len(set(classes)) != 2:
        raise BadInput(f"classes {list(classes)}: name two, such as --classes french,english")
    for answer in answers or ():
        if not re.fullmatch(r"[^=]+=.+", answer):
            raise BadInput(f"answer '{answer}': write label=word, such as singular=is")
    if template.count("{text}") != 1:
        raise BadInput(f"template {template!r}: say once, with {{text}}, where the text goes")
    if not list(doses) or not all(np.isfinite(dose) and dose != 0 for dose in doses):
        raise BadInput(f"doses {list(doses)}: give numbers other than 0, in class distances")
    if draws < 2:
        raise BadInput(f"draws={draws}: give at least two random directions")
    if items < 4:
        raise BadInput(f"items={items}: give at least four texts to measure on")
    if control_prompts < 1:
        raise BadInput(f"control_prompts={control_prompts}: give at least one")


def summary(report: Report) -> pd.DataFrame:
    """What the command line prints: every intervention's effect with its interval, beside the random ones'."""

    def short(x: float) -> str:
        return f"{x:.1f}" if abs(x) >= 1 else f"{x:.2g}"

    rows = []
    for row in report.table.to_dict("records"):
        place = [str(row[x]) for x in ("site", "layer", "head") if not pd.isna(row[x])]
        dose = "" if pd.isna(row["dose"]) else f" {row['dose']:+g}"
        rows.append(
            {
                "site": ".".join(place),
                "direction": row["direction"],
                "change": row["intervention"] + dose,
                "effect": short(row["effect"]),
                "95 %": f"{short(row['low'])} to {short(row['high'])}",
                "random": f"{short(row['random_low'])} to {short(row['random_high'])}",
                "p": f"{row['p']:.2f}",
            }
        )
    told = pd.DataFrame(rows)
    several = len(set(told["direction"])) > 1
    return told if several else told.drop(columns="direction")


@analysis(
    name="probe_causal",
    source="Elazar et al. 2021, amnesic probing; Belrose et al. 2023, LEACE; Ravichander et al. 2021",
    example="interp probe-causal smollm2-135m number --until-word --answers singular=is,plural=are",
    figure="doses",
    validate=check_options,
    summary=summary,
    takes="text",
)
@torch.no_grad()
def probe_causal(
    model: Model,
    data: Data,
    *,
    sites: Sequence[str] | None = None,
    directions: Sequence[str] = ("mean",),
    position: str | None = None,
    classes: Sequence[str] | None = None,
    answers: Sequence[str] | None = None,
    template: str = "{text}",
    until_word: bool = False,
    doses: Sequence[float] = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0),
    draws: int = 10,
    random_from: str = "sphere",
    items: int = 32,
    control_prompts: int = 12,
    seed: int = 0,
    progress: bool | None = None,
) -> Report:
    """Effect on the next token of erasing, adding and swapping a probe's direction, beside random ones.

    With centre c midway between the class means, the direction's (read, write) factors, P = read @ write,
    and Δ = (mean of class 2 − mean of class 1) P:

        erase: x − (x − c) P      swap: x − 2 (x − c) P      add: x + dose · Δ

    A direction is found on two thirds of the groups and judged on texts of the others. With answers, what is
    measured is their log-odds, logit[answers of class 2] − logit[answers of class 1]: how much it moves
    when something is added, and how much its gap between texts of the two classes changes when the direction
    is erased (−gap: nothing is left of it) or swapped (−2 gap: it is reversed). Without answers it is the
    KL divergence of the next-token distribution from the clean one.

    Random directions get the same change, item by item as large and of the same sign. An effect within
    their range says nothing of this direction. An effect beyond it shows that the model reads it *there*; no effect
    does not show that the property is unused, for it may be held elsewhere too. A dose well above 1 is
    further than the texts ever are.

    Args:
        data: a shipped set ("number"), a file with columns text and label, LabelledTexts, or two lists
            of texts by class.
        sites: where the direction is read and changed, such as resid_post.12 or z.5.1; by default the
            residual stream after the middle block.
        directions: mean (difference of the class means), ridge (weights of a ridge probe), leace (the
            subspace that LEACE erases).
        position: last (token) or word; by default word where the data have words.
        classes: the two labels to compare, the first as class 1; needed where there are more.
        answers: label=word for both classes, several words a class allowed: the next tokens whose
            log-odds are measured.
        template: a frame for each text, such as "{text} It was a".
        until_word: end each text at its word, so that the next token is the one after it.
        doses: what is added, in distances of the class means along the direction.
        draws: random directions for every change.
        random_from: sphere (any direction alike) or data (as the activations vary within classes).
        items: at most so many texts are measured on.
        control_prompts: windows of English prose on which the off-target divergence is taken.
        seed: of the split, the random directions and the bootstrap.
        progress: show a progress bar; by default in a terminal or a notebook.

    Returns: a Report. Table "probe_causal", one row a site, direction and intervention: effect with a
        95 % interval (bootstrap over groups); mean, 2.5 % and 97.5 % quantile of the random directions'
        effects; p, the share of draws (this one counted) with an effect as large; clean, the value before;
        unit (logits or nats). kl and off_target_kl: nats, on the texts and on control prompts, with
        random_kl and random_off_target_kl. accuracy of the direction on the texts (threshold at c)
        with shuffled_accuracy and majority; class_distance |Δ|; size, the mean norm of the change.
        Table "draws": every random direction's effect, kl and off_target_kl.

    Raises:
        BadInput: unknown site, label, answer or option; not two classes; fewer than six groups; one class
            only on a side of the split; classes with the same mean. Refused: the model predicts no next token.

    >>> probe_causal(tiny_model(), {"up": ["a", "b"], "down": ["c"]})
    Traceback (most recent call last):
    interp.errors.BadInput: tiny was loaded without a tokenizer: texts need one; load it with tokenizer=
    """
    started = time.perf_counter()
    check_options(
        sites=sites,
        directions=directions,
        position=position,
        classes=classes,
        answers=answers,
        template=template,
        doses=doses,
        draws=draws,
        random_from=random_from,
        items=items,
        control_prompts=control_prompts,
    )
    _check_model(model)
    texts, pair = two_classes(data, classes, template, until_word)
    where = position or ("last" if texts.words is None or until_word else "word")
    if where == "word" and texts.words is None:
        raise BadInput(f"position word: {texts.name} has no words; give a column 'word', or last")
    sites = [f"resid_post.{model.n_layers // 2}"] if sites is None else list(sites)
    features = features_of(model, sites, where)
    words = answer_ids(model, answers, pair)
    y = np.array([label == pair[1] for label in texts.labels])
    train, test = split(texts, y, items, seed)
    found = capture_features(
        model, texts.rows(train.tolist()), sites, positions=where, progress=progress
    )
    texts_here = texts.rows(test.tolist())
    here = bench_of(model, batch_at(model, texts_here, where), features, words)
    control = text_windows(model, control_prompts, length=WINDOW, seed=seed).batch
    last = torch.full((control.size,), control.ids.shape[1] - 1)
    away = bench_of(model, (model.as_batch(control), last), features, None)
    rows: list[dict[str, Any]] = []
    drawn: list[dict[str, Any]] = []
    with Progress(progress) as bars:
        each = (len(doses) + 2) * (1 + draws)
        advance = bars.stage("Changing directions", 2 * len(features) * len(directions) * each)
        for key, feature in features.items():
            x = found[key].astype(np.float64)
            site = Site(feature.site, feature.layer, feature.head)
            seen, beside = here.vectors(site), away.vectors(site)
            random = random_directions(x, y[train], draws, random_from, seed)
            for name in directions:
                direction = direction_of(x, y[train], name)
                if not np.linalg.norm(direction.step) > 1e-9 * np.abs(x).max():
                    raise BadInput(
                        f"both classes have the same mean at {key}: nothing was found there"
                    )
                told = told_apart(direction, name, x, seen, texts, y, train, test, seed)
                made = interventions(direction, seen, doses)
                changes = [c for _, _, c in made for c in with_turned(c, direction, random)]
                effects = here.measured(site, changes, advance)
                changes = [
                    c
                    for _, _, made_there in interventions(direction, beside, doses)
                    for c in with_turned(made_there, direction, random)
                ]
                leaks = away.measured(site, changes, advance)[..., 1].mean(1)
                for i, (kind, dose, change) in enumerate(made):
                    part = slice(i * (1 + draws), (i + 1) * (1 + draws))
                    row, others = effect_row(
                        kind, effects[part], leaks[part], here, y[test], texts_here.groups, seed
                    )
                    about = {**feature._asdict(), "direction": name, "intervention": kind}
                    about["dose"] = dose
                    size = float(np.linalg.norm(change, axis=1).mean())
                    rows.append({**about, **row, **told, "size": size})
                    drawn += [{**about, "draw": j, **other} for j, other in enumerate(others)]
    options = {
        "data": texts.name,
        "sites": sites,
        "directions": list(directions),
        "position": where,
        "classes": list(pair),
        "answers": None if answers is None else list(answers),
        "template": template,
        "until_word": until_word,
        "doses": list(doses),
        "draws": draws,
        "random_from": random_from,
        "items": items,
        "control_prompts": control_prompts,
    }
    meta = provenance(model, options=options, seed=seed) | {
        "classes": list(pair),
        "items": {"found on": len(train), "measured on": len(test)},
        "notes": list(model.notes),
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    kinds = {"layer": "Int64", "head": "Int64"}
    tables = {
        "probe_causal": pd.DataFrame(rows).astype(kinds),
        "draws": pd.DataFrame(drawn).astype(kinds),
    }
    return Report("probe_causal", tables, {}, meta)


def _check_model(model: Model) -> None:
    """It reads texts and predicts a next token."""
    if model.tokenizer is None:
        raise BadInput(
            f"{model.id} was loaded without a tokenizer: texts need one; load it with tokenizer="
        )
    if not model.spec.causal or model.spec.unembedding is None:
        raise Refused(
            f"{model.id} predicts no next token, which is what the effect is measured on; probe it "
            "with `interp probe` instead"
        )
