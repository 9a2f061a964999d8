"""Training of a sparse autoencoder: one loop for all kinds.

Everything a step does is a function of the weights, the seed and the step's number, so that training
which was killed goes on from its last checkpoint with the same losses, bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.errors import BadInput
from interp.run.files import check_writable
from interp.run.progress import Progress
from interp.run.store import Rows
from probes.saes.losses import PASSES, auxiliary_loss
from probes.saes.model import SAE, SAEConfig
from probes.saes.options import Options
from probes.training import Diverged, read_state, under, write_state

_log = logging.getLogger("interp")

CHECKPOINT = "training.safetensors"

SAMPLE_ROWS = 8192
"""Rows from which scale, bias and first directions are taken."""

AUX_ROWS = 1024
"""Rows of a batch on which dead latents learn the error: what they need costs more than the rest."""

CURVE = ("step", "rows", "loss", "fvu", "l0", "dead", "lr")


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


def run_training(training: Training, bars: Progress, checkpoint_every: int) -> None:
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
