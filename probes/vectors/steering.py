"""Steering vectors: the difference between two kinds of text, and how much of it moves the model how far.

The vector is the difference of two means of activations. Added to the residual stream while the model
reads or writes, it moves what is said towards one kind; what else it moves is seen as the KL divergence on
beginnings that have nothing to do with it, and random vectors of equal norm show what any vector would do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.data.contrasts import CONTRASTS, Contrast, contrast
from interp.errors import BadInput, unknown
from interp.metrics import kl
from interp.models.model import Model
from interp.registry import analysis, intervals
from interp.report import Report, provenance
from interp.run.cache import Run
from interp.run.edits import Edit
from interp.run.progress import Progress
from interp.sites import Site
from probes.vectors.answers import interval
from probes.vectors.injection import injection, random_vectors, residual_site

READ = {"last": "at each text's last token", "mean": "averaged over each text's tokens"}


@torch.no_grad()
def steering_vector(
    model: Model,
    positive: Sequence[str] | Tensor,
    negative: Sequence[str] | Tensor,
    site: str | Site,
    *,
    read: str = "last",
) -> Float[Tensor, " d_model"]:
    """Mean activation of the positive texts minus that of the negative ones.

    Add it with `injection(model, vector, site, strength=...)`; a strength of 1 moves as far as the
    two kinds of text lie apart.

    Args:
        positive, negative: texts, or token ids [n pos]; best alike but for what is meant.
        site: one layer's, as wide as the residual stream, such as resid_post.12.
        read: "last" (each text's last token) or "mean" (over its tokens).

    Raises:
        BadInput: no texts, another `read`, a site without a layer or of another width. Refused: a site
            that the model has not got.

    Source: Rimsky et al. 2024, arXiv 2312.06681 (difference of means); Turner et al. 2023,
        arXiv 2308.10248.

    >>> steering_vector(tiny_model(), torch.tensor([[5, 6]]), torch.tensor([[7, 8]]), "resid_post.1").shape
    torch.Size([32])
    """
    place = residual_site(model, site)
    if read not in READ:
        raise unknown("way to read texts", read, READ)
    means = []
    for side, texts in (("positive", positive), ("negative", negative)):
        if len(texts) == 0:
            raise BadInput(f"no {side} texts: give at least one")
        if not isinstance(texts, Tensor):
            texts = model.tokenize(list(texts), padding_side="left").to(model.device)
        run = model.run(texts, capture=[place], logits=False)
        x = run.cache[place].float()
        if read == "last":
            means.append(x[:, -1].mean(0))
        else:
            mask = torch.ones(x.shape[:2]) if run.batch.mask is None else run.batch.mask
            share = mask.to(x) / mask.to(x).sum(1, keepdim=True)
            means.append((x * share[..., None]).sum(1).mean(0))
    return means[0] - means[1]


def contrast_of(data: str | Path | Contrast) -> Contrast:
    """A shipped contrast, one from a .json file with its fields, or your own.

    >>> contrast_of("french").name
    'french'
    """
    if isinstance(data, Contrast):
        return data
    path = Path(data).expanduser()
    if path.suffix.lower() != ".json":
        return contrast(str(data))
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"no file {path}: shipped contrasts are {', '.join(CONTRASTS)}") from error
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} is not JSON: {error}") from error
    wanted = ("positive", "negative", "prompts", "towards", "away")
    if not isinstance(fields, dict) or (missing := [name for name in wanted if name not in fields]):
        name = missing[0] if isinstance(fields, dict) else wanted[0]
        raise BadInput(f"{path} has no '{name}': wanted lists called {', '.join(wanted)}")
    known = (*wanted, "neutral")
    return Contrast(path.stem, **{name: tuple(fields[name]) for name in known if name in fields})


def check_options(
    *,
    contrast: object = "sentiment",
    strengths: Sequence[float] = (1.0,),
    random: int = 5,
    positions: str = "all",
    read: str = "last",
    site: str | None = None,
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if isinstance(contrast, (str, Path)):
        contrast_of(contrast)
    if not strengths or not all(np.isfinite(strengths)):
        raise BadInput(f"strengths={list(strengths)}: wanted one or more finite numbers")
    if random < 2:
        raise BadInput(f"random={random}: an interval over random vectors needs 2 or more")
    if positions not in ("all", "last"):
        raise unknown("choice of positions", positions, ("all", "last"))
    if read not in READ:
        raise unknown("way to read texts", read, READ)
    if site is not None:
        Site.parse(site)


def of_strengths(report: Report) -> pd.DataFrame:
    """Log-odds and side effect of every strength, beside those of random vectors."""
    columns = ["vector", "strength", "log_odds", "kl_neutral", "prompts"]
    shown = pd.DataFrame(report.table, columns=columns)
    shown.insert(3, "95 %", intervals(report.table, "log_odds"))
    return shown


@analysis(
    name="vector_steer",
    source="Rimsky et al. 2024, Contrastive Activation Addition, arXiv 2312.06681; Turner et al. 2023, "
    "Activation Addition, arXiv 2308.10248",
    example="interp vector steer smollm2-135m sentiment --site resid_post.12",
    figure="dose",
    validate=check_options,
    summary=of_strengths,
    takes="text",
)
@torch.no_grad()
def vector_steer(
    model: Model,
    contrast: str | Contrast,
    *,
    site: str | None = None,
    strengths: Sequence[float] = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0),
    positions: str = "all",
    read: str = "last",
    random: int = 5,
    seed: int = 0,
    progress: bool | None = None,
) -> Report:
    """How far a steering vector moves the next word, at every strength, beside random vectors of equal norm.

        log-odds = log Σ_w∈towards p(w) − log Σ_w∈away p(w)

    at the end of beginnings that the vector was not made from; and KL(unsteered ‖ steered) at the end of
    neutral beginnings: what is moved that should not be. A response says that the direction is enough to
    move these words; not that the model uses it, nor that longer texts stay sensible.

    Args:
        contrast: sentiment or french; a .json file with lists positive, negative, prompts, towards, away
            (and neutral); in Python also a `Contrast`.
        site: where the vector is read and added; by default resid_post of the layer two fifths up.
        strengths: how much of the vector is added.
        positions: all or last: where it is added.
        read: last or mean: how texts are read for the vector.
        random: random vectors of equal norm.
        seed: of the random vectors.

    Returns: a Report. Table "vector_steer", one row a strength and vector ("steering", "random"): log_odds
        (nats, mean over beginnings; for random also over vectors) with log_odds_low and log_odds_high
        (95 %, bootstrap over beginnings; for random the lowest and highest vector), change (against
        strength 0, nats), p_towards, p_away, kl_neutral (nats), prompts. Arrays: "vector" [d_model],
        "log_odds" [1 + random, strengths, prompts].

    Raises:
        BadInput: unknown contrast, words of which none is one token, a site without a layer or of another
            width, options out of range. Refused: the model has not got the site, or no unembedding.

    >>> check_options(contrast="sentimnet")
    Traceback (most recent call last):
    interp.errors.BadInput: no contrast 'sentimnet'; did you mean 'sentiment'? known: sentiment, french
    """
    check_options(
        contrast=contrast, strengths=strengths, random=random, positions=positions, read=read,
        site=site,
    )  # fmt: skip
    started = time.perf_counter()
    chosen = contrast_of(contrast)
    site = f"resid_post.{model.n_layers * 2 // 5}" if site is None else site
    place = residual_site(model, site)
    sides = [_single_tokens(model, words) for words in (chosen.towards, chosen.away)]
    if shared := set(sides[0]) & set(sides[1]):
        token = model.tokens([min(shared)])[0]
        raise BadInput(f"contrast '{chosen.name}': {token!r} is in both towards and away")
    vector = steering_vector(model, chosen.positive, chosen.negative, place, read=read)
    vectors = [vector, *random_vectors(vector, random, seed)]
    doses = [(v, by) for v in range(len(vectors)) for by in strengths]
    with Progress(progress) as bars:
        advance = bars.stage("Strengths", 2 * (len(doses) + 1))

        def ends(texts: Sequence[str]) -> list[Tensor]:
            batch = model.as_batch(model.tokenize(list(texts), padding_side="left"))
            end = batch.ids.shape[1] - 1
            where = None if positions == "all" else [end]
            variants: list[list[Edit]] = [[]]
            variants += [
                [injection(model, vectors[v], place, strength=by, positions=where)]
                for v, by in doses
            ]
            clean = model.run(batch, capture=["resid_pre"], logits=False)
            return model.replay(
                clean, variants, _last, logits=torch.tensor([end]), progress=advance
            )

        plain, *steered = (_class_odds(logits, sides) for logits in ends(chosen.prompts))
        unsteered, *moved = ends(chosen.neutral)
        divergence = [float(kl(unsteered, logits).mean()) for logits in moved]
    shape = (len(vectors), len(strengths))
    odds = np.stack([one[0] for one in steered]).reshape(*shape, -1)
    p = np.array([one[1:] for one in steered]).reshape(*shape, 2)
    nats = np.array(divergence).reshape(shape)
    rows = []
    for i, by in enumerate(strengths):
        low, high = interval(odds[0, i], seed)
        drawn = odds[1:, i].mean(-1)
        for kind, own, mean, ends_at in (
            ("steering", slice(0, 1), odds[0, i].mean(), (low, high)),
            ("random", slice(1, None), drawn.mean(), (drawn.min(), drawn.max())),
        ):
            rows.append(
                {
                    "vector": kind, "strength": by, "log_odds": mean, "log_odds_low": ends_at[0],
                    "log_odds_high": ends_at[1], "change": mean - plain[0].mean(),
                    "p_towards": p[own, i, 0].mean(), "p_away": p[own, i, 1].mean(),
                    "kl_neutral": nats[own, i].mean(), "prompts": odds.shape[-1],
                }
            )  # fmt: skip
    options = {
        "contrast": chosen.name, "site": str(place), "strengths": list(strengths),
        "positions": positions, "read": read, "random": random,
    }  # fmt: skip
    meta = provenance(model, options=options, seed=seed) | {
        "norm": float(vector.norm()),
        "towards": model.tokens(sides[0]),
        "away": model.tokens(sides[1]),
        "unsteered": float(plain[0].mean()),
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    arrays = {"vector": vector.cpu().numpy(), "log_odds": odds}
    return Report("vector_steer", {"vector_steer": pd.DataFrame(rows)}, arrays, meta)


def _last(run: Run) -> Float[Tensor, "n d_vocab"]:
    assert run.logits is not None
    return run.logits[:, -1].float()


def _class_odds(
    logits: Float[Tensor, "n d_vocab"], sides: Sequence[Sequence[int]]
) -> tuple[np.ndarray, float, float]:
    """Log-odds of the two sides for each prompt, and both sides' mean probabilities."""
    logp = logits.log_softmax(-1)
    towards, away = (logp[:, list(side)].logsumexp(-1) for side in sides)
    p = [float(side.exp().mean()) for side in (towards, away)]
    return (towards - away).cpu().numpy(), p[0], p[1]


def _single_tokens(model: Model, words: Sequence[str]) -> list[int]:
    """The words that are one token, after a space or as they stand."""
    if model.tokenizer is None:
        raise BadInput(f"{model.id} was loaded without a tokenizer: contrasts are words")
    found = []
    strange = getattr(model.tokenizer, "unk_token_id", None)
    for word in words:
        for text in (f" {word}", word):
            ids = list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
            if len(ids) == 1 and ids[0] != strange:
                found.append(int(ids[0]))
                break
    if not found:
        raise BadInput(
            f"none of {', '.join(map(repr, words))} is one token of {model.id}: give other words"
        )
    return list(dict.fromkeys(found))
