"""Training of sparse autoencoders on stored activations: one loop, one small function a kind.

Everything a step does is a function of the weights, the seed and the step's number, so that training
which was killed goes on from its last checkpoint with the same losses, bit for bit.
"""

from __future__ import annotations

import datetime
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.data.activations import Activations
from interp.errors import BadInput, unknown
from interp.report import SCHEMA_VERSION, Report
from interp.run.files import check_writable
from interp.run.progress import Progress
from interp.run.store import MemoryRows, Rows
from probes.saes.evaluate import reconstruction
from probes.saes.model import SAE, SAEConfig
from probes.saes.sparse import Codes, batch_top_k, decode, encode_at, top_k
from probes.training import Diverged, read_state, under, write_state

CHECKPOINT = "training.safetensors"
SAMPLE_ROWS = 8192
"""Rows from which scale, bias and first directions are taken."""

AUX_ROWS = 1024
"""Rows of a batch on which dead latents learn the error: what they need costs more than the rest."""

CURVE = ("step", "rows", "loss", "fvu", "l0", "dead", "lr")
REVIVALS = ("auxk", "resample", "none")
PRECISIONS = ("auto", "float32", "bfloat16")
INITS = ("data", "random")
SPARSITY = {"relu": 2.0, "gated": 5.0, "jumprelu": 1.0}
_log = logging.getLogger("interp")


@dataclass(frozen=True)
class Options:
    """How an SAE is trained; see `train_sae`. All are part of a checkpoint's key."""

    rows: int
    batch_size: int
    lr: float
    warmup: float
    decay: float
    sparsity: float
    init: str
    encoder_scale: float
    revive: str
    aux: float
    dead_after: int
    precision: str
    seed: int

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return max(1, self.rows // self.batch_size)


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
        _run(training, bars, checkpoint_every)
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


# --- a step's loss: one function a kind ------------------------------------------------------------


class Pass(NamedTuple):
    """One pass of a kind in training: reconstructions (one a prefix), S, and who was active."""

    reconstructions: list[Float[Tensor, "rows d_in"]]
    penalty: Tensor
    fired: Int[Tensor, " d_sae"]


def _top_k_pass(sae: SAE, x: Tensor, options: Options) -> Pass:
    return _sparse_pass(sae, x, options, top_k)


def _batch_top_k_pass(sae: SAE, x: Tensor, options: Options) -> Pass:
    return _sparse_pass(sae, x, options, batch_top_k)


def _sparse_pass(sae: SAE, x: Tensor, options: Options, choose: Callable[..., Codes]) -> Pass:
    c = sae.config
    centred = sae.centred(x)
    with torch.no_grad():
        dtype = getattr(torch, options.precision)
        codes = choose(centred, sae.encoder, sae.b_enc, c.k, dtype)
        if c.activation == "batchtopk" and len(codes.value):
            # What is judged later is one threshold for all rows: the batches' smallest values.
            sae.threshold.lerp_(codes.value.min().expand_as(sae.threshold), _threshold_weight(sae))
    codes = encode_at(centred, sae.encoder, sae.b_enc, codes)
    parts = [
        codes if width == c.d_sae else codes.with_value(codes.value * (codes.latent < width))
        for width in c.prefixes or (c.d_sae,)
    ]
    made = [decode(part, sae.W_dec) + sae.b_dec for part in parts]
    return Pass(made, x.new_zeros(()), codes.fired())


def _threshold_weight(sae: SAE) -> float:
    """Of a new threshold in the running mean; the first one counts whole."""
    return 1.0 if float(sae.threshold.detach()[0]) == 0 else 0.02


def _relu_pass(sae: SAE, x: Tensor, options: Options) -> Pass:
    f = sae.encode(x)
    return Pass([sae.decode(f)], options.sparsity * f.sum(-1).mean(), (f > 0).sum(0))


def _gated_pass(sae: SAE, x: Tensor, options: Options) -> Pass:
    product = sae.centred(x) @ sae.W_enc
    gate = product + sae.b_enc
    f = (product * sae.r_mag.exp() + sae.b_mag).relu() * (gate > 0)
    opened = gate.relu()
    # The gate learns by reconstructing alone, through a decoder that does not learn from it.
    alone = opened @ sae.W_dec.detach() + sae.b_dec.detach()
    penalty = options.sparsity * opened.sum(-1).mean() + (x - alone).square().sum(-1).mean()
    return Pass([sae.decode(f)], penalty, (f > 0).sum(0))


def _jump_relu_pass(sae: SAE, x: Tensor, options: Options) -> Pass:
    pre = sae.pre_activations(x).relu()
    f, active = _JumpReLU.apply(pre, sae.threshold)  # type: ignore[misc]
    l0 = active.sum(-1).mean()
    penalty = options.sparsity * x.shape[1] * (l0 / (sae.config.k or 1) - 1).abs()
    return Pass([sae.decode(f)], penalty, (f > 0).sum(0))


BANDWIDTH = 0.5
"""Width of the window in which a pre-activation moves its latent's threshold, in scaled units."""


class _JumpReLU(torch.autograd.Function):
    """(pre · [pre > θ], [pre > θ]); θ learns from pre-activations within half a bandwidth of it."""

    @staticmethod
    def forward(ctx, pre, threshold):
        active = (pre > threshold).to(pre.dtype)
        ctx.save_for_backward(pre, threshold, active)
        return pre * active, active

    @staticmethod
    def backward(ctx, *grads):
        pre, threshold, active = ctx.saved_tensors
        g_f, g_active = grads
        near = ((pre - threshold).abs() < BANDWIDTH / 2) / BANDWIDTH
        g_threshold = -(near * (threshold * g_f + g_active)).sum(0)
        return g_f * active, g_threshold


PASSES: dict[str, Callable[[SAE, Tensor, Options], Pass]] = {
    "relu": _relu_pass,
    "gated": _gated_pass,
    "topk": _top_k_pass,
    "batchtopk": _batch_top_k_pass,
    "jumprelu": _jump_relu_pass,
}


def auxiliary_loss(
    sae: SAE,
    x: Float[Tensor, "rows d_in"],
    error: Float[Tensor, "rows d_in"],
    dead: Bool[Tensor, " d_sae"],
) -> Tensor:
    """E‖e − ê‖² of the error e reconstructed by the dead latents with the largest pre-activations.

    Half of d_in of them a row, at most; not rectified, so that all of these learn.
    """
    where = dead.nonzero()[:, 0]
    k = min(len(where), x.shape[1] // 2 or 1)
    pre = sae.centred(x).detach() @ sae.encoder[where].T + sae.b_enc[where]
    if k < len(where):
        best = pre.topk(k, dim=-1, sorted=False)
        pre = torch.zeros_like(pre).scatter(-1, best.indices, best.values)
    made = pre @ sae.W_dec[where]
    share = min(1.0, len(where) / (x.shape[1] / 2))
    return share * (error - made).square().sum(-1).mean()


# --- the loop --------------------------------------------------------------------------------------


class Training:
    """The state of training: weights, Adam's moments, when each latent was last active, the curve.

    `step()` is one optimiser step; `save` and loading on creation keep everything in one file.
    """

    def __init__(
        self,
        config: SAEConfig,
        options: Options,
        rows: Rows,
        folder: Path | None = None,
        *,
        resume: bool = False,
    ):
        self.options, self.source = options, rows
        self.folder = None if folder is None else Path(folder)
        self.key = {"sae": asdict(config), "options": asdict(options), "data": dict(rows.key)}
        self.sae = SAE(config, seed=options.seed)
        self.done = 0
        self.last_active = torch.zeros(config.d_sae, dtype=torch.long)
        self._curve: list[tuple[float, ...]] = []
        self._seconds = 0.0
        # Adam moves a number by lr a step; thresholds lie on the scale of latents, √d_in, not of weights.
        faster = {"threshold": math.sqrt(config.d_in)}
        learnt = [(n, p) for n, p in self.sae.named_parameters() if p.requires_grad]
        groups = [{"params": [p], "times": faster.get(n, 1.0)} for n, p in learnt]
        self.optimiser = torch.optim.Adam(groups, lr=options.lr, fused=True)
        sample = next(iter(rows.batches(SAMPLE_ROWS, seed=options.seed, epoch=-1)))
        self.scale = math.sqrt(config.d_in) / float(sample.norm(dim=1).mean().clamp_min(1e-12))
        sample = sample * self.scale
        self.variance = float(sample.var(0, unbiased=False).sum())
        if not math.isfinite(self.scale) or not math.isfinite(self.variance) or not self.variance:
            raise BadInput("the activations are all the same, or not all numbers: nothing to learn")
        self._initialise(sample)
        if self.folder is not None:
            check_writable(self.folder)
            if resume and (self.folder / CHECKPOINT).exists():
                self._load(self.folder / CHECKPOINT)
            else:
                self.save()

    @torch.no_grad()
    def _initialise(self, sample: Tensor) -> None:
        sae, generator = self.sae, torch.Generator().manual_seed(self.options.seed)
        sae.b_dec.copy_(geometric_median(sample))
        if self.options.init == "data":
            picks = torch.randint(len(sample), (sae.config.d_sae,), generator=generator)
            rows = sample[picks] - sae.b_dec
            # A row drawn twice, or one that is the median, gets a direction of its own.
            spread = rows.norm(dim=1).mean() / math.sqrt(rows.shape[1])
            sae.W_dec.copy_(rows + 0.1 * spread * torch.randn(rows.shape, generator=generator))
        sae.normalise_decoder()
        sae.encoder.copy_(self.options.encoder_scale * sae.W_dec)
        if sae.config.activation == "jumprelu":
            sae.threshold.fill_(0.01)

    @property
    def curve(self) -> pd.DataFrame:
        """One row a step."""
        table = pd.DataFrame(self._curve, columns=list(CURVE))
        return table.astype({"step": int, "rows": int})

    @property
    def rows_per_s(self) -> float:
        """Rows trained on a second, since this object was made."""
        steps = len(self._curve) - getattr(self, "_resumed_at", 0)
        return steps * self.options.batch_size / self._seconds if self._seconds else 0.0

    @property
    def dead(self) -> Bool[Tensor, " d_sae"]:
        """Latents that were not active for `dead_after` rows."""
        return self.done * self.options.batch_size - self.last_active >= self.options.dead_after

    def step(self, x: Float[Tensor, "rows d_in"]) -> None:
        """One optimiser step on a batch of stored activations."""
        started = time.perf_counter()
        o, sae = self.options, self.sae
        x = x * self.scale
        found = PASSES[sae.config.activation](sae, x, o)
        errors = [x - made for made in found.reconstructions]
        squares = [error.square().sum(-1).mean() for error in errors]
        loss = (torch.stack(squares).mean() + found.penalty) / self.variance
        dead = self.dead
        n_dead = int(dead.sum())
        if n_dead and o.revive == "auxk":
            rows = slice(AUX_ROWS)
            aux = auxiliary_loss(sae, x[rows], errors[-1][rows].detach(), dead)
            loss = loss + o.aux * aux / self.variance
        if not math.isfinite(value := float(loss.detach())):
            raise Diverged(
                f"the loss of step {self.done + 1} is {value}; {self._kept()}; try a smaller lr than {o.lr}"
            )
        self.optimiser.zero_grad()
        loss.backward()
        self._update()
        seen = (self.done + 1) * o.batch_size
        self.last_active[found.fired > 0] = seen
        if n_dead and o.revive == "resample" and self._resample_now():
            self._resample(x, errors[-1].detach(), dead)
        self.done += 1
        fvu = float(squares[-1].detach()) / self.variance
        l0 = float(found.fired.sum()) / len(x)
        share = n_dead / sae.config.d_sae
        self._curve.append((self.done, seen, value, fvu, l0, share, self._lr()))
        self._seconds += time.perf_counter() - started

    @torch.no_grad()
    def _update(self) -> None:
        """Adam, with decoder rows that stay on the unit sphere."""
        W, g = self.sae.W_dec, self.sae.W_dec.grad
        assert g is not None
        g.addcmul_(W, torch.linalg.vecdot(g, W)[:, None], value=-1)
        for group in self.optimiser.param_groups:
            group["lr"] = self._lr() * group["times"]
        self.optimiser.step()
        self.sae.normalise_decoder()
        if self.sae.config.activation == "jumprelu":
            self.sae.threshold.clamp_(min=0)

    def _lr(self) -> float:
        """Learning rate of the step after `done`: up linearly, then level, then down to zero."""
        o, step = self.options, self.done + 1
        up = step / max(1.0, o.warmup * o.steps)
        down = (o.steps - step + 1) / max(1.0, o.decay * o.steps)
        return o.lr * min(1.0, up, down)

    def _resample_now(self) -> bool:
        """Once every `dead_after` rows, until the learning rate falls."""
        o = self.options
        every = max(1, o.dead_after // o.batch_size)
        return (self.done + 1) % every == 0 and self.done + 1 < (1 - o.decay) * o.steps

    @torch.no_grad()
    def _resample(self, x: Tensor, error: Tensor, dead: Tensor) -> None:
        """Dead latents take the direction of errors drawn by their squared loss.

        With encoders as long as the others' where latents compete (a short one is never chosen), and
        a fifth as long elsewhere, where a long one would fire everywhere.
        """
        sae = self.sae
        where = dead.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(self.options.seed + 1_000_003 * (self.done + 1))
        chance = error.square().sum(-1).square().cpu().double()
        picks = torch.multinomial(chance, len(where), replacement=True, generator=generator)
        rows = torch.nn.functional.normalize(error[picks])
        alive = sae.encoder[~dead].norm(dim=1)
        size = float(alive.mean()) if len(alive) else 1.0
        size *= 1.0 if sae.config.activation in ("topk", "batchtopk") else 0.2
        sae.W_dec[where], sae.encoder[where], sae.b_enc[where] = rows, size * rows, 0.0
        for parameter in (sae.W_dec, sae.encoder, sae.b_enc):
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimiser.state[parameter][moment][where] = 0.0
        self.last_active[where] = (self.done + 1) * self.options.batch_size

    def finished(self) -> SAE:
        """The SAE of unscaled inputs."""
        sae = SAE(self.sae.config)
        sae.load_state_dict(self.sae.state_dict())
        sae.fold_input_scale(self.scale)
        return sae.eval()

    # --- checkpoints -------------------------------------------------------------------------------

    def save(self) -> None:
        """Write weights, moments and curve as one file, whole or not at all; never weights that are NaN."""
        if self.folder is None:
            return
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        if not all(bool(value.isfinite().all()) for value in tensors.values()):
            raise Diverged(f"the weights after step {self.done} are not numbers; {self._kept()}")
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in state.items()}
        tensors["last_active"] = self.last_active
        tensors["curve"] = torch.tensor(self._curve, dtype=torch.double).reshape(-1, len(CURVE))
        write_state(self.folder / CHECKPOINT, tensors, self.key, done=str(self.done))

    def _load(self, path: Path) -> None:
        tensors, about = read_state(path, self.key)
        self.done = int(about["done"])
        self.sae.load_state_dict(under("sae.", tensors))
        state = self.optimiser.state_dict()
        adam: dict[int, dict[str, Tensor]] = {}
        for name, value in under("adam.", tensors).items():
            index, moment = name.split(".")
            adam.setdefault(int(index), {})[moment] = value
        self.optimiser.load_state_dict({**state, "state": adam})
        self.last_active = tensors["last_active"]
        self._curve = [tuple(row) for row in tensors["curve"].tolist()]
        self._resumed_at = len(self._curve)

    def _kept(self) -> str:
        if self.folder is None:
            return "no checkpoint was kept (give checkpoint=)"
        return f"the last good checkpoint is {self.folder / CHECKPOINT}"


def _run(training: Training, bars: Progress, checkpoint_every: int) -> None:
    """All steps that are left; the bar's stages tell how training stands."""
    o, source = training.options, training.source
    per_epoch = max(1, source.n_rows // o.batch_size)
    per_stage = max(1, -(-o.steps // 8))
    advance: Callable[[int], None] = lambda _: None  # noqa: E731
    while training.done < o.steps:
        epoch, skip = divmod(training.done, per_epoch)
        for x in source.batches(o.batch_size, seed=o.seed, epoch=epoch, skip=skip):
            if training.done % per_stage == 0 or not training._seconds:
                left = min(per_stage - training.done % per_stage, o.steps - training.done)
                advance = bars.stage(_standing(training), left)
            training.step(x)
            advance(1)
            if training.done % checkpoint_every == 0 or training.done == o.steps:
                training.save()
            if training.done == o.steps:
                break


def _standing(training: Training) -> str:
    """How training stands: explained variance, L0, dead share, rows a second."""
    if not training._curve:
        return "Training"
    last = dict(zip(CURVE, training._curve[-1], strict=True))
    speed = f" · {training.rows_per_s:,.0f} rows/s" if training.rows_per_s else ""
    standing = f"EV {1 - last['fvu']:.3f} · L0 {last['l0']:.1f} · dead {last['dead']:.1%}{speed}"
    _log.info("step %d: %s", training.done, standing)
    return f"Training · {standing}"


@torch.no_grad()
def geometric_median(
    x: Float[Tensor, "rows d"], *, steps: int = 50, tolerance: float = 1e-5
) -> Float[Tensor, " d"]:
    """The point whose summed distance to all rows is smallest (Weiszfeld's iteration).

    >>> geometric_median(torch.tensor([[0.0], [1.0], [2.0], [1000.0], [1.5]])).round(decimals=2)
    tensor([1.5000])
    """
    found = x.mean(0)
    for _ in range(steps):
        weight = 1 / (x - found).norm(dim=1).clamp_min(1e-6)
        new = (weight[:, None] * x).sum(0) / weight.sum()
        if float((new - found).norm()) <= tolerance * float(found.norm() + 1e-12):
            return new
        found = new
    return found
