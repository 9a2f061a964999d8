"""What every feature of an SAE is evidence for: contexts, densities, logits, heads, and its removal's cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.data.activations import Activations, origins, windows
from interp.errors import BadInput, Refused
from interp.metrics import token_loss
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.batch import Batch
from interp.run.cache import Run
from interp.run.edits import Edit
from interp.run.progress import Progress
from interp.run.resume import Checkpoint
from interp.run.store import ActivationStore
from interp.sites import Site, has_heads
from probes.saes.attribute import head_weights
from probes.saes.commands import activations_of, check_evaluation, opened_sae
from probes.saes.evaluate import (
    DENSE,
    check_store,
    density_histogram,
    loss_recovered,
    reconstruction,
)
from probes.saes.evidence import Found, one_pass
from probes.saes.model import SAE
from probes.saes.written import feature_writes, write_logits

TOKENS_PER_FORWARD = 1024
"""Logits of a forward are rows times the vocabulary in float32: 200 MB of 49,152 tokens."""

ABLATED_CONTEXTS = 4
RESIDUAL = ("attn_write", "mlp_write", "resid_pre", "resid_mid", "resid_post", "embed")


def check_features(
    *,
    text: object = "",
    site: str | None = None,
    features: Sequence[int] | None = None,
    contexts: int = 8,
    around: int = 12,
    words: int = 8,
    ablate: int = 32,
    split: str = "train",
    tokens: int = 262_144,
    field: str = "text",
) -> None:
    """Raise BadInput for options that no SAE could satisfy."""
    check_evaluation(text=text, site=site, tokens=tokens, field=field)
    if contexts < 1 or around < 0 or words < 1 or ablate < 0:
        raise BadInput(
            f"contexts={contexts}, around={around}, words={words}, ablate={ablate}: wanted at least "
            "1, 0, 1 and 0"
        )
    if split not in ("train", "held_out"):
        raise BadInput(f"split '{split}' is neither 'train' nor 'held_out'")
    if features is not None and (not len(features) or min(features) < 0):
        raise BadInput(f"features={list(features)}: wanted numbers from 0 on")


def _telling(report: Report) -> pd.DataFrame:
    """The features whose removal costs most; where none was removed, those that are most active."""
    table = report.table
    by = "ablation_effect" if table["ablation_effect"].notna().to_numpy().any() else "mean"
    columns = ["feature", "density", "max", "top_token", "up", "head", "head_share", by]
    columns = [name for name in dict.fromkeys(columns) if name in table]
    told = table.dropna(subset=[by]).sort_values(by, ascending=False, kind="stable")
    return told.head(15).loc[:, columns]


@analysis(
    name="sae_features",
    source="Bricken et al. 2023 (feature dashboards); Kissane et al. 2024, arXiv 2406.17759 "
    "(decoder norms by head)",
    example="interp sae features smollm2-135m z12",
    figure="density",
    validate=check_features,
    summary=_telling,
)
@torch.no_grad()
def sae_features(
    model: Model,
    sae: str | Path | SAE,
    text: str | Path | Sequence[str] | Sequence[Tensor] | Activations = "",
    *,
    site: str | None = None,
    features: Sequence[int] | None = None,
    contexts: int = 8,
    around: int = 12,
    words: int = 8,
    ablate: int = 32,
    split: str = "train",
    loss_windows: int = 32,
    tokens: int = 262_144,
    context: int = 128,
    field: str = "text",
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """What every feature of an SAE reacts to, writes and is worth, with the contexts that show it.

    For feature i with activations f_i and decoder row d_i:

        density        share of tokens with f_i > 0
        head share     ‖d_i[slice of head h]‖ / Σ_h' ‖d_i[slice of head h']‖
        logits         ((d_i W_O) ∘ gain of the final norm) W_U: of one unit of f_i, times the final
                       norm's scale
        ablation       rise of the loss, summed over a context's window, when x ← x − f_i d_i at all
                       of its tokens, averaged over the four best contexts; the rest of the
                       activation, the reconstruction's error included, stays

    Contexts are the strongest ones, of distinct documents (of distinct windows where there are
    fewer documents than contexts). They show what the largest activations have in common, not what
    most activations do, and logits only the direct path to the end.

    Args:
        sae: folder or file of the SAE (SAELens, sparsify, dictionary_learning, Kissane et al.), or
            the folder that `interp sae train` has left.
        text: as for `interp sae train`; by default the activations kept there.
        site: where the SAE reads, for files that do not say so.
        features: only these; by default all.
        contexts: strongest contexts kept of each feature.
        around: tokens shown on either side of the strongest one.
        words: tokens kept that a feature raises, and that it lowers.
        ablate: how many features to remove in turn, those with the largest summed activation; all
            that are named in `features`. Elsewhere the effect is NaN.
        split: train or held_out: the documents that contexts are looked for in.
        loss_windows: windows the loss with the SAE spliced in is measured on; 0: not measured.
        tokens: activations to collect of a text.
        context: tokens of a window of a text.
        field: which field of .jsonl, .parquet or a dataset holds the text.
        seed: of the windows drawn from a text.
        checkpoint: folder for what is finished. resume: go on from there.
        progress: show a progress bar.

    Returns: a Report with tables
        "sae_features": a row a feature: density, fired (tokens), mean and max of its activations
            where it is active, dense, top_token (of the strongest context), up and down (strongest
            tokens), head and head_share (its largest), ablation_effect and ablation_at_peak (rise
            of the loss of the window, and of the token behind the peak, nats).
        "contexts": a row a context: feature, rank, activation, document, token (its number in the
            document), window, position, start and length (of the tokens shown, in array
            "text_ids"), peak (which of them), ablation_effect (nats).
        "overview" (`reconstruction` of held-out documents), "loss" (`loss_recovered`), "histogram"
            (`density_histogram`), "curve" (of training, where the SAE's folder has it), "tokens"
            (token_id, text).
        Arrays: "histogram" [features 32] with "histogram_exponent" e [features] (bins from 0 to 2^e),
        "heads" [features n_heads], "up_ids", "up_logits", "down_ids", "down_logits" [features words],
        "context_activations" [contexts tokens], "text_ids", "text_document", "text_token" [tokens].

    Raises:
        BadInput: no such SAE or feature, an SAE of another model or site, no text.

    >>> from probes.saes.model import SAEConfig
    >>> text = [torch.randint(97, (60,), generator=torch.Generator().manual_seed(i)) for i in range(12)]
    >>> sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="z.1", heads=4))
    >>> report = sae_features(tiny_model(), sae, text, tokens=300, context=24, ablate=2, progress=False)
    >>> len(report.table), int(report.table["ablation_effect"].notna().sum())
    (64, 2)
    """
    started = time.perf_counter()
    check_features(
        text=text, site=site, features=features, contexts=contexts, around=around, words=words,
        ablate=ablate, split=split, tokens=tokens, field=field,
    )  # fmt: skip
    opened = opened_sae(sae, model.device, site)
    place = opened.site(model)
    chosen = _chosen(opened, features)
    options = {
        "site": str(place), "features": None if features is None else chosen.tolist(),
        "contexts": contexts, "around": around, "words": words, "ablate": ablate, "split": split,
        "loss_windows": loss_windows, "tokens": tokens, "context": context,
    }  # fmt: skip
    with activations_of(
        model, opened, sae, text, tokens=tokens, held_out=0.2, context=context, field=field,
        seed=seed, progress=progress, folder=checkpoint, resume=resume,
    ) as data:  # fmt: skip
        store = data.train if split == "train" else data.held_out
        for kept in (data.train, data.held_out):
            check_store(opened, kept)
        meta = provenance(model, options=options, seed=seed)
        key = {"sae": asdict(opened.config), "data": store.key, "options": options,
               "decoder": float(opened.W_dec.cpu().double().sum())}  # fmt: skip
        units = Checkpoint(None if checkpoint is None else checkpoint / "units", key, resume=resume)
        numbers, density = reconstruction(opened, data.held_out)
        loss = None
        if loss_windows and model.spec.unembedding is not None:
            loss = loss_recovered(
                model, opened, data.held_out, windows=loss_windows, progress=progress
            )
        with Progress(progress) as bars:
            found, distinct = one_pass(opened, store, chosen, contexts, around, units, bars)
            table = _feature_table(found, chosen, store.n_rows)
            shown = _contexts(store, found, around)
            arrays = _arrays(store, found, shown, chosen, around)
            if opened.config.heads:
                arrays["heads"] = head_weights(opened)[chosen].detach().cpu().numpy()
            skipped = {}
            try:
                arrays |= feature_words(model, opened, chosen, words, bars)
            except Refused as error:
                skipped["logits"] = str(error)
            many = len(chosen) if features is not None else ablate
            removed = _most_active(found, chosen, many)
            shown = _ablated(model, opened, store, shown, removed, units, bars, skipped)
    table = _completed(table, shown, arrays, store, model)
    meta |= {
        "sae": asdict(opened.config), "text": store.key["text"], "data": {"split": split},
        "distinct": distinct, "ablated": len(removed), "ablated_contexts": ABLATED_CONTEXTS,
        "skipped": skipped, "wall_time_s": round(time.perf_counter() - started, 2),
    }  # fmt: skip
    tables = {
        "sae_features": table,
        "contexts": shown,
        "overview": pd.DataFrame([numbers]),
        "histogram": density_histogram(density).replace(-np.inf, -99.0),
        "tokens": _token_table(model, arrays),
    }
    if loss is not None:
        tables["loss"] = loss
    if (curve := _curve_of(sae)) is not None:
        tables["curve"] = curve
    return Report("sae_features", tables, arrays, meta)


# --- what was found, as tables and arrays ----------------------------------------------------------


def _chosen(sae: SAE, features: Sequence[int] | None) -> Int[Tensor, " features"]:
    """The features that are looked at, in order."""
    if features is None:
        return torch.arange(sae.config.d_sae)
    if max(features) >= sae.config.d_sae:
        raise BadInput(
            f"no feature {max(features)}: this SAE has features 0 to {sae.config.d_sae - 1}"
        )
    return torch.tensor(sorted({*features}))


def _feature_table(found: Found, chosen: Tensor, rows: int) -> pd.DataFrame:
    fired = found["fired"]
    largest = np.full(len(chosen), np.nan)
    best = np.unique(found["feature"], return_index=True)
    largest[best[0]] = found["value"][best[1]]
    return pd.DataFrame(
        {
            "feature": chosen.numpy(),
            "density": fired / rows,
            "fired": fired,
            "mean": np.where(fired > 0, found["total"] / np.maximum(fired, 1), np.nan),
            "max": largest,
            "dense": fired > DENSE * rows,
        }
    )


def _contexts(store: ActivationStore, found: Found, around: int) -> pd.DataFrame:
    """One line a context, without the place of its text. "place" is the feature's line."""
    feature = found["feature"]
    rank = np.arange(len(feature)) - np.searchsorted(feature, feature)
    table = origins(store, torch.from_numpy(found["row"]))
    lead, length = int(store.key["lead"]), store.extras["length"].numpy()
    position, window = table["position"].to_numpy(), table["window"].to_numpy()
    left = np.minimum(around, position - lead)
    right = np.minimum(around, length[window] - 1 - position)
    return pd.DataFrame(
        {
            "place": feature,
            "rank": rank,
            "activation": found["value"],
            "document": table["document"],
            "token": table["token"],
            "window": window,
            "position": position,
            "row": found["row"],
            "length": left + right + 1,
            "peak": left,
        }
    )


def _arrays(
    store: ActivationStore, found: Found, shown: pd.DataFrame, chosen: Tensor, around: int
) -> dict[str, np.ndarray]:
    """Histograms, the text of all contexts once, and the activations on it; `shown` gets `start`."""
    first = (shown["row"] - shown["peak"]).to_numpy()
    length = shown["length"].to_numpy()
    rows = np.unique(_ranges(first, length))
    text = origins(store, torch.from_numpy(rows))
    shown["start"] = np.searchsorted(rows, first)
    column = np.arange(2 * around + 1)[None] + (around - shown["peak"].to_numpy())[:, None]
    near = np.take_along_axis(found["near"], np.minimum(column, 2 * around), axis=1)
    near *= np.arange(2 * around + 1)[None] < length[:, None]
    shown.insert(0, "feature", chosen.numpy()[shown["place"]])
    return {
        "histogram": found["histogram"].astype(np.int32),
        "histogram_exponent": found["exponent"].astype(np.int16),
        "context_activations": near.astype(np.float32),
        "text_ids": text["token_id"].to_numpy(np.int32),
        "text_document": text["document"].to_numpy(np.int32),
        "text_token": text["token"].to_numpy(np.int32),
    }


def _ranges(first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """All numbers of first, first + 1, …, first + length − 1, range after range."""
    ends = length.cumsum()
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - length), length)


def _completed(
    table: pd.DataFrame,
    shown: pd.DataFrame,
    arrays: dict[str, np.ndarray],
    store: ActivationStore,
    model: Model,
) -> pd.DataFrame:
    """The feature table with what contexts, words, heads and removal add; drops helper columns of `shown`."""
    first = shown[shown["rank"] == 0]
    ids = arrays["text_ids"][first["start"] + first["peak"]]
    table["top_token"] = ""
    table.loc[first["place"], "top_token"] = model.tokens(ids)
    for side in ("up", "down"):
        if f"{side}_ids" in arrays:
            table[side] = model.tokens(arrays[f"{side}_ids"][:, 0])
    if "heads" in arrays:
        table["head"] = arrays["heads"].argmax(1)
        table["head_share"] = arrays["heads"].max(1)
    names = ["ablation_effect", "ablation_at_peak"]
    means = shown.groupby("place").agg(dict.fromkeys(names, "mean"))
    for name in names:
        table[name] = means[name].reindex(range(len(table))).to_numpy()
    shown.drop(columns=["place", "row"], inplace=True)
    return table


def _token_table(model: Model, arrays: dict[str, np.ndarray]) -> pd.DataFrame:
    ids = [arrays[name].ravel() for name in ("text_ids", "up_ids", "down_ids") if name in arrays]
    unique = np.unique(np.concatenate(ids))
    return pd.DataFrame({"token_id": unique, "text": model.tokens(unique)})


def _curve_of(sae: str | Path | SAE) -> pd.DataFrame | None:
    """The training curve that lies beside an SAE's folder."""
    if isinstance(sae, SAE):
        return None
    for folder in (Path(sae), Path(sae).parent):
        if (folder / "curve.parquet").exists() and (folder / "report.json").exists():
            report = Report.load(folder)
            if report.analysis == "sae_train":
                return report.tables["curve"]
    return None


# --- what a feature writes -------------------------------------------------------------------------


def residual_writes(model: Model, sae: SAE) -> Float[Tensor, "d_sae d_model"]:
    """What one unit of every feature adds to the residual stream.

    Raises:
        Refused: the site does not reach the residual stream by one linear map.
    """
    site, W = sae.site(model), sae.W_dec.detach()
    if site.name == "z":
        return feature_writes(model, sae, torch.arange(sae.config.d_sae))
    if site.name not in RESIDUAL:
        raise Refused(f"features of '{site}' are not read as tokens: no linear map to the logits")
    return W


def feature_words(
    model: Model, sae: SAE, features: Int[Tensor, " n"], words: int, bars: Progress
) -> dict[str, np.ndarray]:
    """The tokens that one unit of each feature raises and lowers most, and by how much.

    Returns: "up_ids", "up_logits", "down_ids", "down_logits" [n words], strongest first; in logits
        times the final norm's scale, as `probes.saes.written.feature_logits`.
    """
    writes = residual_writes(model, sae)[features]
    words = min(words, model.W_U.shape[1])
    advance = bars.stage("Logits", len(features))
    parts: dict[str, list[Tensor]] = {}
    for some in writes.split(256):
        logits = write_logits(model, some)
        for side, sign in (("up", 1), ("down", -1)):
            best = (sign * logits).topk(words, dim=-1)
            parts.setdefault(f"{side}_ids", []).append(best.indices.int())
            parts.setdefault(f"{side}_logits", []).append(sign * best.values)
        advance(len(some))
    return {name: torch.cat(column).cpu().numpy() for name, column in parts.items()}


# --- what a feature is worth -----------------------------------------------------------------------


def _most_active(found: Found, chosen: Tensor, n: int) -> np.ndarray:
    """Lines of the features with the largest summed activation, of those that are active."""
    order = np.argsort(-found["total"], kind="stable")[:n]
    return np.sort(order[found["fired"][order] > 0])


def _ablated(
    model: Model,
    sae: SAE,
    store: ActivationStore,
    shown: pd.DataFrame,
    removed: np.ndarray,
    units: Checkpoint,
    bars: Progress,
    skipped: dict[str, str],
) -> pd.DataFrame:
    """Contexts with the rise of the loss where their feature is taken out."""
    shown = shown.assign(ablation_effect=np.nan, ablation_at_peak=np.nan)
    wanted = shown["place"].isin(removed.tolist()) & (shown["rank"] < ABLATED_CONTEXTS)
    if not wanted.to_numpy().any():
        return shown
    if model.spec.unembedding is None:
        skipped["ablation"] = f"{model.id} has no language-model head: it has no loss"
        return shown
    lines = shown.loc[wanted].sort_values(["window", "feature"], kind="stable")
    length = store.extras["length"].numpy()[lines["window"]]
    lines = lines.iloc[np.argsort(-length, kind="stable")]
    advance = bars.stage("Removing features", len(lines))
    for start, some in _together(lines, np.sort(length)[::-1]):
        effects = units.compute(
            f"ablation {start}", lambda some=some: _effects(model, sae, store, some)
        )
        for name, values in effects.items():
            shown.loc[some.index, name] = values
        advance(len(some))
    return shown


def _together(lines: pd.DataFrame, length: np.ndarray) -> Iterator[tuple[int, pd.DataFrame]]:
    """Lines, longest window first, as many at once as one forward takes."""
    start = 0
    while start < len(lines):
        stop = start + max(1, TOKENS_PER_FORWARD // int(length[start]))
        yield start, lines.iloc[start:stop]
        start = stop


def _effects(model: Model, sae: SAE, store: ActivationStore, lines: pd.DataFrame) -> Found:
    """Rise of the loss of each line's window (summed), and of the token behind its peak, in nats."""
    site, lead = sae.site(model), int(store.key["lead"])
    rows = [windows(store, slice(w, w + 1))[0] for w in lines["window"].tolist()]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    batch = Batch.of_ids(ids, mask)
    run = model.run(batch, capture=[f"resid_pre.{site.layer}", site])
    x = run.cache[site].to(sae.encoder)
    x = x.flatten(2) if has_heads(site.name) and site.head is None else x
    feature = torch.tensor(lines["feature"].tolist())
    takes = torch.stack([sae.encode(one)[:, j] for one, j in zip(x, feature, strict=True)])
    where = mask.clone()
    where[:, :lead] = False
    part = (takes * where.to(takes))[..., None] * sae.W_dec[feature][:, None].to(takes)
    edit = without(site, part)
    judged, peaks = where[:, :-1] & where[:, 1:], torch.tensor(lines["position"].tolist())

    def losses(run: Run) -> Tensor:
        assert run.logits is not None
        return token_loss(run.logits[:, :-1], ids[:, 1:]).cpu() * judged

    (changed,) = model.replay(run, [[edit]], losses, tokens_per_forward=TOKENS_PER_FORWARD)
    rise = (changed - losses(run)).double()
    at = peaks.clamp_max(rise.shape[1] - 1)[:, None]
    peak = rise.gather(1, at)[:, 0]
    peak[~judged.gather(1, at)[:, 0]] = torch.nan
    return {"ablation_effect": rise.sum(1).numpy(), "ablation_at_peak": peak.numpy()}


def without(site: Site, part: Float[Tensor, "batch pos d_in"]) -> Edit:
    """An edit that takes `part` away from the activation at an SAE's site."""

    def edit(x: Tensor, seen: Any) -> Tensor:
        if site.head is not None:
            return x - part.to(x)[:, :, None]
        return x - part.to(x).reshape(x.shape)

    return Edit.apply(site, edit)
