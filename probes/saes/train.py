"""Sparse autoencoders trained on stored activations, with a report of how the training went."""

from __future__ import annotations

import datetime
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.data.activations import Activations
from interp.errors import BadInput, unknown
from interp.report import SCHEMA_VERSION, Report
from interp.run.progress import Progress
from interp.run.store import MemoryRows, Rows
from probes.saes.evaluate import reconstruction
from probes.saes.model import SAE, SAEConfig
from probes.saes.options import Options
from probes.saes.training import Training, run_training

REVIVALS = ("auxk", "resample", "none")
PRECISIONS = ("auto", "float32", "bfloat16")
INITS = ("data", "random")
SPARSITY = {"relu": 2.0, "gated": 5.0, "jumprelu": 1.0}
_log = logging.getLogger("interp")


def train_sae(
    data: Activations | Rows | Float[Tensor, "rows d_in"],
    *,
    d_sae: int | None = None,
    activation: str = "topk",
    k: int = 32,
    prefixes: tuple[int, ...] = (),
    sparsity: float | None = None,
    epochs: float = 4,
    batch_size: int = 4096,
    lr: float = 2e-3,
    warmup: float = 0.05,
    decay: float = 0.3,
    init: str = "random",
    encoder_scale: float = 0.1,
    revive: str = "auxk",
    aux: float = 1 / 2,
    dead_after: int | None = None,
    precision: str = "auto",
    seed: int = 0,
    checkpoint: Path | None = None,
    checkpoint_every: int = 64,
    resume: bool = False,
    progress: bool | None = None,
) -> tuple[SAE, Report]:
    """A sparse autoencoder of stored activations, with its loss curve and what it reconstructs.

    With inputs scaled so that their mean norm is √d_in, and V their variance summed over
    coordinates, Adam lowers

        L = (E‖x − x̂‖² + S) / V

    S is 0 for topk and batchtopk (averaged over prefixes for Matryoshka); sparsity · ‖f‖₁ for relu;
    sparsity · ‖relu(gate)‖₁ + E‖x − x̂_gate‖² for gated; sparsity · d_in · |L0/k − 1| with a
    straight-through threshold for jumprelu. Decoder rows keep norm 1. Latents that were not active
    for `dead_after` rows are revived: "auxk" lets them reconstruct the error, "resample" points them
    at badly reconstructed inputs. A good loss does not say that the latents mean anything: compare
    with `probes.saes.evaluate.controls`.

    Args:
        data: what `collect_activations` returns (then the report judges held-out documents), one
            store, or a tensor.
        d_sae: latents; by default 8 d_in.
        activation: "relu", "gated", "topk", "batchtopk" or "jumprelu".
        k: latents active in a row: exactly, on average, or aimed at (jumprelu); unused for relu and
            gated.
        prefixes: widths of nested dictionaries (Matryoshka), the last one d_sae.
        sparsity: weight of S; by default 2 (relu), 5 (gated), 1 (jumprelu).
        epochs: how often every row is seen; may be a fraction.
        batch_size: rows a step.
        lr: highest learning rate. warmup: share of the steps over which it rises. decay: share of
            the steps at the end over which it falls to zero.
        init: "data": decoder rows are inputs, centred and of norm 1; "random": random directions.
            b_dec is the geometric median of the inputs either way.
        encoder_scale: W_enc starts as this times W_decᵀ.
        revive: "auxk", "resample" or "none". aux: weight of the dead latents' loss (Gao et al. take
            1/32: with as few steps as here, several times as many latents then never wake).
        dead_after: rows without being active after which a latent counts as dead; by default a
            32nd of all rows seen.
        precision: of the product that chooses active latents (topk, batchtopk): "float32",
            "bfloat16", or "auto": bfloat16 where the processor multiplies it natively.
        seed: of everything.
        checkpoint: folder that keeps the state of training. checkpoint_every: steps between.
        resume: go on from the checkpoint there.
        progress: show a progress bar.

    Returns: the SAE, of inputs as they are stored (the scale is folded into its biases), and a
        Report "sae_train": table "sae_train" (one row, see `evaluate.reconstruction`), table "curve" (one row a step:
        rows seen, loss, FVU of the batch, L0, share of dead latents, learning rate), array "density".

    Raises:
        BadInput: k over d_sae, unknown choices, too few rows, not enough memory (says how much is
            needed), a checkpoint of other options. Diverged: the loss is not a number.

    Source: Gao et al. 2024, arXiv 2406.04093 (TopK, AuxK); Bussmann et al. 2024, arXiv 2412.06410
    (BatchTopK) and 2025, arXiv 2503.17547 (Matryoshka); Rajamanoharan et al. 2024, arXiv 2404.16014
    (gated) and 2407.14435 (JumpReLU); Bricken et al. 2023 (resampling). All rows of one loss are
    scaled by 1/V here, so that `sparsity` means the same on every site.

    >>> x = torch.eye(8).repeat(100, 1)
    >>> options = {"d_sae": 16, "k": 1, "batch_size": 100, "epochs": 20, "init": "data"}
    >>> sae, report = train_sae(x, **options, progress=False)
    >>> len(report.tables["curve"]), bool(report.table["fvu"][0] < 0.1)
    (160, True)
    """
    started = time.perf_counter()
    train, held_out = _sources(data)
    key = dict(train.key)
    if d_sae is None:
        d_sae = 8 * train.width
    config = SAEConfig(
        d_in=train.width,
        d_sae=d_sae,
        activation=activation,
        k=None if activation in ("relu", "gated") else k,
        prefixes=tuple(prefixes),
        site=str(key.get("site", "")),
        heads=int(key.get("heads", 0)),
        model=str(key.get("model", {}).get("id", "")),
        sha256=str(key.get("model", {}).get("sha256", "")),
    )
    check_options(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        warmup=warmup,
        decay=decay,
        init=init,
        revive=revive,
        precision=precision,
    )
    size = min(batch_size, train.n_rows)
    rows = max(size, round(epochs * train.n_rows))
    options = Options(
        rows=rows,
        batch_size=size,
        lr=lr,
        warmup=warmup,
        decay=decay,
        sparsity=SPARSITY.get(activation, 0.0) if sparsity is None else sparsity,
        init=init,
        encoder_scale=encoder_scale,
        revive=revive,
        aux=aux,
        dead_after=max(size, rows // 32) if dead_after is None else dead_after,
        precision=_precision(precision),
        seed=seed,
    )
    needed = check_memory(config, size)
    training = Training(config, options, train, checkpoint, resume=resume)
    with Progress(progress) as bars:
        run_training(training, bars, checkpoint_every)
    sae = training.finished()
    judged = train if held_out is None else held_out
    evaluation, density = reconstruction(sae, judged)
    judged_on = "training" if held_out is None else "held-out documents"
    meta = {
        "schema_version": SCHEMA_VERSION,
        "model": key.get("model", {}),
        "data": {name: value for name, value in key.items() if name != "model"},
        "sae": asdict(config),
        "options": asdict(options),
        "seed": seed,
        "versions": {"torch": torch.__version__},
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "memory_estimate_mb": round(needed / 1e6),
        "rows_per_s": training.rows_per_s,
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    tables = {
        "sae_train": pd.DataFrame([{"rows_of": judged_on, **evaluation}]),
        "curve": training.curve,
    }
    return sae, Report("sae_train", tables, {"density": density}, meta)


def check_options(
    *,
    epochs: float = 4,
    batch_size: int = 4096,
    lr: float = 2e-3,
    warmup: float = 0.05,
    decay: float = 0.3,
    init: str = "random",
    revive: str = "auxk",
    precision: str = "auto",
    **_: Any,
) -> None:
    """Raise BadInput for options that no data could satisfy."""
    for what, got, known in (
        ("init", init, INITS),
        ("revival", revive, REVIVALS),
        ("precision", precision, PRECISIONS),
    ):
        if got not in known:
            raise unknown(what, got, known)
    if epochs <= 0 or batch_size < 1 or lr <= 0:
        raise BadInput(f"epochs={epochs}, batch_size={batch_size}, lr={lr}: all must be above 0")
    if warmup < 0 or decay < 0 or warmup + decay > 1:
        raise BadInput(
            f"warmup={warmup} and decay={decay} are shares of the steps: at most 1 together"
        )


def memory_needed(config: SAEConfig, batch_size: int) -> int:
    """Bytes that training takes: weights, gradients, Adam's two moments, a checkpoint, a batch."""
    weights = 2 * config.d_sae * config.d_in
    dense = config.activation in ("relu", "gated", "jumprelu")
    latents = batch_size * config.d_sae * (6 if dense else 0) + 512 * config.d_sae
    entries = 0 if dense else 8 * batch_size * (config.k or 0)
    return 4 * (7 * weights + latents + entries + 8 * batch_size * config.d_in)


def check_memory(config: SAEConfig, batch_size: int) -> int:
    """The estimate in bytes, logged; BadInput if that is more than the machine has free."""
    needed, free = memory_needed(config, batch_size), _free_memory()
    _log.info("training d_sae=%d takes about %d MB", config.d_sae, needed / 1e6)
    if free is not None and needed > free:
        raise BadInput(
            f"training d_sae={config.d_sae} on d_in={config.d_in} takes about {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free: give a smaller d_sae or batch_size"
        )
    return needed


def _free_memory() -> int | None:
    """Bytes that can still be had, where the system tells."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _precision(precision: str) -> str:
    """bfloat16 only where its products are native: elsewhere they are slower than float32."""
    if precision != "auto":
        return precision
    can = torch.cpu.get_capabilities()
    return "bfloat16" if can.get("avx512_bf16") or can.get("amx_bf16") else "float32"


def _sources(data: Activations | Rows | Tensor) -> tuple[Rows, Rows | None]:
    if isinstance(data, Activations):
        return data.train, data.held_out
    rows = MemoryRows(data) if isinstance(data, Tensor) else data
    if rows.n_rows < 2:
        raise BadInput(f"there are {rows.n_rows} rows to train on: give at least 2")
    return rows, None
