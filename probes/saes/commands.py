"""An SAE from a text and back: trained and judged by the name of a text source and of a folder.

What `sae_train` leaves in its folder is all that the others need:

    activations/  the stores `train` and `held_out`     training/  the checkpoint
    sae/          the SAE in SAELens' format             report.*   the report
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from interp.data.activations import Activations, collect_activations, site_shape
from interp.data.texts import SUFFIXES, documents
from interp.errors import BadInput, unknown
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.store import DTYPES, INDEX
from interp.sites import Site
from probes.saes.evaluate import evaluate_sae
from probes.saes.interop import load_sae, save_sae
from probes.saes.model import SAE, SAEConfig
from probes.saes.train import check_memory, check_options, train_sae

ACTIVATIONS, TRAINING, TRAINED = "activations", "training", "sae"
"""Folders that `sae_train` makes."""

_log = logging.getLogger("interp")


def check_text(text: object, field: str = "text") -> None:
    """Raise BadInput for a file or folder of text that is missing, unreadable or empty."""
    if not isinstance(text, (str, Path)) or not str(text):
        return
    path = Path(text).expanduser()
    if is_store(path):
        return
    if path.exists() or path.suffix.lower() in SUFFIXES:
        next(documents(text, field=field))


def check_training(
    *,
    text: object,
    site: str | None = None,
    d_sae: int | None = None,
    expansion: int = 8,
    k: int = 32,
    activation: str = "topk",
    prefixes: Sequence[int] | None = None,
    tokens: int = 262_144,
    epochs: float = 4,
    batch_size: int = 4096,
    lr: float = 2e-3,
    precision: str = "auto",
    revive: str = "auxk",
    store_dtype: str = "float16",
    field: str = "text",
) -> None:
    """Raise BadInput for options that no model and no text could satisfy."""
    if isinstance(text, str) and not text.strip():
        raise BadInput("no text is named: give a file, a folder, 'wikipedia' or a dataset's name")
    if expansion < 1 or tokens < 1:
        raise BadInput(f"expansion={expansion}, tokens={tokens}: both must be at least 1")
    if store_dtype not in DTYPES:
        raise unknown("dtype of a store", store_dtype, DTYPES)
    if site is not None:
        Site.parse(site)
    nested = tuple(prefixes or ())
    width = d_sae if d_sae is not None else nested[-1] if nested else max(k, 1)
    SAEConfig(d_in=1, d_sae=width, activation=activation, k=k, prefixes=nested)
    check_options(epochs=epochs, batch_size=batch_size, lr=lr, precision=precision, revive=revive)
    check_text(text, field)


def _lines(numbers: dict[str, Any]) -> pd.DataFrame:
    """Numbers by name, one a line."""
    values = [value if isinstance(value, str) else f"{value:.4g}" for value in numbers.values()]
    return pd.DataFrame({"what": list(numbers), "value": values})


def _reconstructed(report: Report) -> pd.DataFrame:
    """What the trained SAE reconstructs."""
    return _lines({str(name): value for name, value in report.table.iloc[0].items()})


@analysis(
    name="sae_train",
    source="Gao et al. 2024, arXiv 2406.04093 (TopK, AuxK); Kissane et al. 2024, arXiv 2406.17759 "
    "(attention outputs)",
    example="interp sae train smollm2-135m wikipedia --site z.12 --d-sae 4608 --k 32 --out z12",
    figure="curve",
    validate=check_training,
    summary=_reconstructed,
)
def sae_train(
    model: Model,
    text: str | Path | Sequence[str] | Sequence[Tensor],
    *,
    site: str | None = None,
    d_sae: int | None = None,
    expansion: int = 8,
    k: int = 32,
    activation: str = "topk",
    prefixes: Sequence[int] | None = None,
    sparsity: float | None = None,
    tokens: int = 262_144,
    epochs: float = 4,
    batch_size: int = 4096,
    lr: float = 2e-3,
    precision: str = "auto",
    revive: str = "auxk",
    context: int = 128,
    held_out: float = 0.15,
    store_dtype: str = "float16",
    shard_mb: float = 256,
    field: str = "text",
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """A sparse autoencoder of one site's activations on a text, and what it reconstructs of held-out documents.

    The text is run once as far as the site, its activations are kept on disk, and the SAE is trained
    on them (see `probes.train_sae` for the losses). What it takes of memory and disk is said, and
    compared with what is free, before anything is computed. A low FVU does not say that the
    features mean anything: judge them with `interp sae eval` and read them with `interp sae features`.

    Args:
        text: a .txt, .jsonl or .parquet file, a folder of such files, "wikipedia" (articles that the
            package gensim carries), or the name of a Hugging Face dataset; in Python also texts, or
            token ids, one tensor a document.
        site: where to read, such as z.12 (all heads side by side) or resid_post.5; by default z of
            the layer two fifths up.
        d_sae: features; by default `expansion` times the site's width.
        expansion: features for each number of the activation, where d_sae is not given.
        k: features active at a token: exactly (topk), on average (batchtopk), aimed at (jumprelu).
        activation: topk, batchtopk, jumprelu, gated or relu.
        prefixes: widths of nested dictionaries (Matryoshka), the last one d_sae.
        sparsity: weight of the sparsity term, for relu, gated and jumprelu.
        tokens: activations to train on, at most.
        epochs: how often each is seen; may be a fraction.
        batch_size: activations a step.
        lr: highest learning rate.
        precision: float32, bfloat16 or auto, of the product that finds the active features.
        revive: auxk, resample or none: what is done about dead features.
        context: tokens of a window.
        held_out: share of the documents that is not trained on.
        store_dtype: float16, bfloat16 or float32, of the activations on disk.
        shard_mb: size of a file of activations, in MB.
        field: which field of .jsonl, .parquet or a dataset holds the text.
        seed: of everything.
        out: folder that keeps activations, checkpoint and SAE; without it they are not kept, and
            only the report is given back.
        resume: go on from the checkpoint in `out`. Activations that are there are kept either way.
        progress: show a progress bar.

    Returns: the Report of `probes.train_sae` on held-out documents: table "sae_train" (one row),
        table "curve" (one row a step), array "density" [d_sae].

    Raises:
        BadInput: k over d_sae; no text, or less than one context; not enough memory or disk; other
            activations in `out`. Refused: the model has not got the site. Diverged: a loss that is
            not a number; the last good checkpoint is kept.

    >>> text = [torch.randint(97, (60,), generator=torch.Generator().manual_seed(i)) for i in range(12)]
    >>> report = sae_train(tiny_model(), text, site="z.1", d_sae=64, k=4, tokens=300, context=24,
    ...                    batch_size=100, progress=False)
    >>> report.table[["rows", "l0"]].values.tolist()
    [[45.0, 4.0]]
    """
    check_training(
        text=text, site=site, d_sae=d_sae, expansion=expansion, k=k, activation=activation,
        prefixes=prefixes, tokens=tokens, epochs=epochs, batch_size=batch_size, lr=lr,
        precision=precision, revive=revive, store_dtype=store_dtype, field=field,
    )  # fmt: skip
    place = Site("z", model.n_layers * 2 // 5) if site is None else Site.parse(site)
    width, _ = site_shape(model, place)
    nested = tuple(prefixes or ())
    features = d_sae or (nested[-1] if nested else expansion * width)
    config = SAEConfig(width, features, activation, k, nested)
    memory = check_memory(config, batch_size)
    out = None if out is None else Path(out)
    with _folder(out) as folder:
        disk = check_disk(
            config, round(tokens * (1 + held_out)), DTYPES[store_dtype].itemsize, folder
        )
        data = collect_activations(
            model,
            text,
            folder / ACTIVATIONS,
            site=place,
            tokens=tokens,
            held_out=held_out,
            context=context,
            dtype=store_dtype,
            shard_mb=shard_mb,
            field=field,
            seed=seed,
            progress=progress,
        )
        sae, report = train_sae(
            data,
            d_sae=features,
            activation=activation,
            k=k,
            prefixes=nested,
            sparsity=sparsity,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            precision=precision,
            revive=revive,
            seed=seed,
            checkpoint=None if out is None else folder / TRAINING,
            resume=resume,
            progress=progress,
        )
        if out is not None:
            save_sae(sae, folder / TRAINED)
            report.meta["notes"] = [f"the SAE is in {folder / TRAINED}, in SAELens' format"]
    report.meta["versions"] = provenance(model, options={}, seed=seed)["versions"]
    report.meta["memory_estimate_mb"] = round(memory / 1e6)
    report.meta["disk_estimate_mb"] = round(disk / 1e6)
    return report


def check_evaluation(
    *, text: object = "", site: str | None = None, tokens: int = 65_536, field: str = "text"
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if tokens < 1:
        raise BadInput(f"tokens={tokens}: wanted at least 1")
    if site is not None:
        Site.parse(site)
    check_text(text, field)


def _judged(report: Report) -> pd.DataFrame:
    """Reconstruction and losses, each beside its baselines."""
    sae, control = (row for _, row in report.table.iterrows())
    loss = report.tables["loss"].set_index("condition")
    found = {"L0": sae["l0"], "FVU": sae["fvu"], "FVU, shuffled weights": control["fvu"]}
    found |= {f"{name}, share of features": sae[name] for name in ("dead", "dense")}
    found |= {f"loss, {name}": f"{value:.4f} nats" for name, value in loss["loss"].items()}
    for name in ("zero", "mean"):
        found[f"recovered against {name}"] = f"{loss.loc['sae', f'recovered_vs_{name}']:.1%}"
    return _lines(found)


@analysis(
    name="sae_eval",
    source="Gao et al. 2024, arXiv 2406.04093 (FVU, loss); Gurnee et al. 2023, arXiv 2305.01610 "
    "(sparse probing)",
    example="interp sae eval smollm2-135m z12",
    figure="loss",
    validate=check_evaluation,
    summary=_judged,
)
def sae_eval(
    model: Model,
    sae: str | Path | SAE,
    text: str | Path | Sequence[str] | Sequence[Tensor] | Activations = "",
    *,
    site: str | None = None,
    windows: int = 64,
    tasks: int = 16,
    tokens: int = 65_536,
    context: int = 128,
    field: str = "text",
    seed: int = 0,
    progress: bool | None = None,
) -> Report:
    """How well an SAE reconstructs, what the model loses by it, and what controls reach.

    Judged on held-out documents, with the numbers of `probes.evaluate_sae`. A low FVU and a small loss
    say that little is lost on the way; they do not say that the features mean anything.

    Args:
        sae: folder or file of the SAE (SAELens, sparsify, dictionary_learning, Kissane et al.), or
            the folder that `interp sae train` has left.
        text: as for `interp sae train`; by default the activations kept there.
        site: where the SAE reads, for files that do not say so.
        windows: how many windows the loss is measured on.
        tasks: how many tokens are probed for.
        tokens: activations to collect of a text, half of them of held-out documents.
        context: tokens of a window.
        field: which field of .jsonl, .parquet or a dataset holds the text.
        seed: of the windows, of the shuffled control and of the rows that are probed.
        progress: show a progress bar.

    Returns: the Report of `probes.evaluate_sae`.

    Raises:
        BadInput: no such SAE, or one of another model or site; no text.

    >>> from probes.saes.model import SAEConfig
    >>> text = [torch.randint(97, (60,), generator=torch.Generator().manual_seed(i)) for i in range(12)]
    >>> sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="z.1", heads=4))
    >>> report = sae_eval(tiny_model(), sae, text, tokens=300, context=24, progress=False)
    >>> report.tables["loss"]["condition"].tolist()
    ['clean', 'sae', 'zero', 'mean']
    """
    check_evaluation(text=text, site=site, tokens=tokens, field=field)
    opened = opened_sae(sae, model.device, site)
    with activations_of(
        model, opened, sae, text, tokens=tokens // 2 or 1, held_out=0.5, context=context,
        field=field, seed=seed, progress=progress,
    ) as data:  # fmt: skip
        report = evaluate_sae(
            model, opened, data, windows=windows, tasks=tasks, seed=seed,
            progress=progress,
        )  # fmt: skip
    report.meta["sae"] = asdict(opened.config)
    return report


# --- folders and texts -----------------------------------------------------------------------------


def is_store(folder: Path) -> bool:
    """Whether `collect_activations` has left its stores there."""
    return (folder / "train" / INDEX).exists()


def opened_sae(sae: str | Path | SAE, device: torch.device, site: str | None = None) -> SAE:
    """The SAE itself, of a folder, or of the folder that `sae_train` has left; on the model's device."""
    if isinstance(sae, SAE):
        return sae if sae.encoder.device == device else copy.deepcopy(sae).to(device)
    folder = Path(sae).expanduser()
    inner = folder / TRAINED
    return load_sae(inner if inner.is_dir() else folder, site=site or "").to(device)


@contextmanager
def activations_of(
    model: Model,
    opened: SAE,
    sae: str | Path | SAE,
    text: str | Path | Sequence[str] | Sequence[Tensor] | Activations,
    *,
    tokens: int,
    held_out: float,
    context: int,
    field: str,
    seed: int,
    progress: bool | None,
    folder: Path | None = None,
    resume: bool = False,
) -> Iterator[Activations]:
    """Activations at the SAE's site: those kept beside it, or of a text, in `folder` or for the time being.

    What an earlier call has left in `folder` is used with `resume`, and removed without.
    """
    site = opened.site(model)
    if isinstance(text, Activations):
        yield text
        return
    if isinstance(text, (str, Path)) and (not str(text) or is_store(Path(text).expanduser())):
        kept = _kept_beside(sae) if not str(text) else Path(text).expanduser()
        yield Activations.open(kept)
        return
    with _folder(folder) as place:
        if not resume:
            shutil.rmtree(place / ACTIVATIONS, ignore_errors=True)
        yield collect_activations(
            model,
            text,
            place / ACTIVATIONS,
            site=site,
            tokens=tokens,
            held_out=held_out,
            context=context,
            field=field,
            seed=seed,
            progress=progress,
        )


def _kept_beside(sae: str | Path | SAE) -> Path:
    """Where `sae_train` has kept the activations of this SAE."""
    if isinstance(sae, SAE):
        raise BadInput("give a text: an SAE that is not a folder has no activations beside it")
    folder = Path(sae).expanduser()
    for place in (folder / ACTIVATIONS, folder.parent / ACTIVATIONS):
        if is_store(place):
            return place
    raise BadInput(
        f"no activations beside {folder}: give a text to read, such as a .txt file or 'wikipedia'"
    )


@contextmanager
def _folder(folder: Path | None) -> Iterator[Path]:
    """`folder`, or one that is removed afterwards."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with TemporaryDirectory(prefix="interp-sae-") as temporary:
        yield Path(temporary)


def disk_needed(config: SAEConfig, rows: int, itemsize: int) -> int:
    """Bytes on disk: activations, weights with Adam's two moments (twice while written), the SAE."""
    weights = 2 * config.d_sae * config.d_in
    return rows * config.d_in * itemsize + 4 * weights * (3 * 2 + 1)


def check_disk(config: SAEConfig, rows: int, itemsize: int, folder: Path) -> int:
    """The estimate in bytes, logged; BadInput if that is more than is free in `folder`."""
    needed, free = disk_needed(config, rows, itemsize), shutil.disk_usage(folder).free
    _log.info("activations, checkpoint and SAE take up to %d MB on disk", needed / 1e6)
    if needed > free:
        raise BadInput(
            f"{rows:,} activations and an SAE of {config.d_sae} features take up to {needed / 1e9:.1f} GB "
            f"on disk, {free / 1e9:.1f} GB are free in {folder}: give fewer tokens, or another --out"
        )
    return needed
