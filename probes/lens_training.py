"""Affine maps to the final residual trained by the KL of what they read: one loop for layers and heads.

All units (`lens_inputs`) learn from the same forward. What costs is the unembedding of every unit's
every row, so a step looks at a part of the vocabulary: the tokens the final distributions of its rows
think likeliest, and a weighted sample of the others (`part_of_vocabulary`).

Everything a step does is a function of the maps, the seed and the step's number, so that training
which was killed goes on from its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.lens_text import Parts
from interp.ridge_lens import TOKENS_PER_FORWARD
from interp.run.files import check_writable
from interp.run.progress import Progress
from interp.unembedding import Unembedding
from probes.lens_inputs import Inputs, Maps
from probes.lens_rows import Rows, choosing_kl
from probes.lens_start import Start
from probes.part_of_vocabulary import PartOfVocabulary, part_for
from probes.training import Diverged, read_state, write_state

STATE = "training.safetensors"
OPTIMISERS = ("adam", "sgd")
CURVE = ("step", "layer", "head", "kl", "best_kl", "loss")


@dataclass(frozen=True)
class Options:
    """How lenses are trained; see `probes.lenses.tune_lens`. All are part of a checkpoint's key."""

    kind: str
    rank: int | None
    steps: int
    batch_size: int
    vocabulary: int
    optimiser: str
    lr: float
    weight_decay: float
    clip: float
    checks: int
    patience: int
    seed: int


class Training:
    """Maps in training, with the best of each unit so far.

    Attributes:
        done: steps taken. best: plain maps of the best check of each unit. best_kl, best_step:
            [n_layers units]. active: units still in training.
    """

    def __init__(
        self,
        inputs: Inputs,
        options: Options,
        start: Start,
        parts: Parts,
        choose: Mapping[str, Rows],
        *,
        train: Sequence[int],
        key: Mapping[str, Any],
        folder: Path | None = None,
        resume: bool = False,
    ):
        self.inputs, self.options, self.start = inputs, options, start
        self.model, self.unembed = inputs.model, Unembedding(inputs.model)
        self.fit, self.choose, self.folder = parts.fit, choose, folder
        self.key = {"options": asdict(options), **key}
        # Contiguous, as a checkpoint gives them back: another layout adds in another order.
        self.inner = {name: x.contiguous() for name, x in start.inward(start.maps).items()}
        kept = self.inner if options.weight_decay else {}
        self.begun = {name: value.clone() for name, value in kept.items()}
        moments = ("m", "v") if options.optimiser == "adam" else ("m",)
        self.moments = {
            (which, name): torch.zeros_like(value)
            for which in moments
            for name, value in self.inner.items()
        }
        self.best = {name: value.clone() for name, value in start.maps.items()}
        shape = (len(inputs.layers), inputs.units)
        self.best_kl = torch.full(shape, math.inf).double()
        self.best_step = torch.zeros(shape, dtype=torch.long)
        self.waited = torch.zeros(shape, dtype=torch.long)
        self.waited[[i for i in range(shape[0]) if i not in set(train)]] = options.patience
        self.trained = self.waited < options.patience
        self.done, self._curve = 0, []
        self._loss = torch.zeros(shape).double()
        self._since = 0
        if folder is not None:
            check_writable(folder)
        if folder is not None and resume and (folder / STATE).exists():
            self._load(folder / STATE)
        else:
            self.check()
            self.save()

    @property
    def active(self) -> Bool[Tensor, "n_layers units"]:
        """Units that have got better in one of the last `patience` checks."""
        return self.waited < self.options.patience

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or no unit gets better any more."""
        return self.done >= self.options.steps or not bool(self.active.any())

    @property
    def curve(self) -> pd.DataFrame:
        """One row a check and unit: held-out KL now and at its best, and the training loss, nats."""
        table = pd.DataFrame(self._curve, columns=list(CURVE))
        return table.astype({"step": int, "layer": int, "head": int})

    def lr(self) -> float:
        """Learning rate of the next step: falls linearly to zero."""
        return self.options.lr * (1 - self.done / self.options.steps)

    def run(self, bars: Progress) -> None:
        """All steps that are left, with a check and a checkpoint every so often."""
        o = self.options
        every = max(1, math.ceil(o.steps / max(1, o.checks)))
        advance: Callable[[int], None] = lambda _: None  # noqa: E731
        begun = True
        for x, final in self._batches():
            if begun or self.done % every == 0:
                left = min(every - self.done % every, o.steps - self.done)
                advance, begun = bars.stage(self._standing(), left), False
            self.step(x, final)
            advance(1)
            if self.done % every == 0 or self.done == o.steps:
                self.check()
                self.save()
                if self.finished:
                    break

    def _batches(self) -> Iterator[tuple[dict[int, Tensor], Tensor]]:
        """Rows of each step that is left: a forward of some windows gives several steps."""
        o, windows = self.options, self.fit
        at_once = max(1, min(len(windows), TOKENS_PER_FORWARD // windows.shape[1]))
        positions = at_once * (windows.shape[1] - 1)
        size = min(o.batch_size, positions)
        steps, forwards = positions // size, max(1, len(windows) // at_once)
        while not self.finished:
            forward, begin = divmod(self.done, steps)
            epoch, place = divmod(forward, forwards)
            generator = torch.Generator().manual_seed(o.seed + 1_000_003 * epoch)
            order = torch.randperm(len(windows), generator=generator)
            rows = windows[order[place * at_once : (place + 1) * at_once]]
            only = self.active.any(1).nonzero()[:, 0].tolist()
            x, final = self.inputs.read(rows, slice(1, None), only)
            generator = torch.Generator().manual_seed(o.seed + 7_919 * (forward + 1))
            picks = torch.randperm(positions, generator=generator).split(size)
            for pick in picks[begin:steps]:
                if self.finished:
                    return
                yield {i: value[:, pick] for i, value in x.items()}, final[pick]

    def step(
        self,
        x: Mapping[int, Float[Tensor, "units rows d_in"]],
        final: Float[Tensor, "rows d_model"],
    ) -> None:
        """One optimiser step of every active layer's units on the same rows."""
        o = self.options
        generator = torch.Generator().manual_seed(o.seed + 15_485_863 * (self.done + 1))
        part = part_for(self.model, final, self.start.frequency, o.vocabulary, generator)
        target = part.target(final)
        active = self.active
        for place, value in x.items():
            if not bool(active[place].any()):
                continue
            grads, loss = self._gradients(part, target, place, value)
            if not bool(loss.isfinite().all()):
                raise Diverged(
                    f"the loss of step {self.done + 1} is {float(loss.sum())}; {self._kept()}; "
                    f"try a smaller lr than {o.lr}"
                )
            self._loss[place] += loss
            self._update(place, grads)
        self.done += 1
        self._since += 1

    @torch.no_grad()
    def _gradients(
        self, part: PartOfVocabulary, target: tuple[Tensor, Tensor], place: int, x: Tensor
    ) -> tuple[Maps, Float[Tensor, " units"]]:
        """(gradients of the mean KL of each unit, the KL) in standardised coordinates."""
        s, inner = self.start, {name: value[place] for name, value in self.inner.items()}
        size = s.size.to(x.device)
        mean, spread = (value[place].to(x.device)[:, None] for value in (s.mean, s.spread))
        z = (x - mean) / spread
        inside = {name: value.to(x.device) for name, value in inner.items()}
        low = "U" in inside
        hidden = z @ inside["U"] if low else z
        out = torch.baddbmm(inside["b"][:, None], hidden, inside["V" if low else "A"])
        y = out * size + (x if low and self.inputs.kind == "layers" else 0)
        pairs = [part(rows, target) for rows in y]
        loss = torch.stack([kl for kl, _ in pairs]).cpu().double().mean(1)
        back = torch.stack([g for _, g in pairs]) * (size / x.shape[1])
        last = hidden.transpose(1, 2) @ back
        grads = {"V" if low else "A": last, "b": back.sum(1)}
        if low:
            grads["U"] = z.transpose(1, 2) @ (back @ inside["V"].transpose(1, 2))
        norm = torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()
        shrink = (self.options.clip / norm.clamp_min(1e-12)).clamp(max=1.0)
        clipped = {
            name: (g * shrink.reshape(-1, *[1] * (g.ndim - 1))).to(inner[name].device)
            for name, g in grads.items()
        }
        return clipped, loss

    @torch.no_grad()
    def _update(self, place: int, grads: Mapping[str, Tensor]) -> None:
        """Adam, or gradient descent with Nesterov's momentum; weights decay towards their start."""
        o, lr, t = self.options, self.lr(), self.done + 1
        for name, g in grads.items():
            w, m = self.inner[name][place], self.moments["m", name][place]
            if o.weight_decay:
                w.lerp_(self.begun[name][place], min(1.0, lr * o.weight_decay))
            if o.optimiser == "sgd":
                m.mul_(0.9).add_(g)
                w.sub_(g + 0.9 * m, alpha=lr)
                continue
            v = self.moments["v", name][place]
            m.lerp_(g, 0.1)
            v.lerp_(g.square(), 0.01)
            scale = math.sqrt(1 - 0.99**t) / (1 - 0.9**t)
            w.addcdiv_(m, v.sqrt().add_(1e-9), value=-lr * scale)

    def check(self) -> None:
        """Exact KL of all active units on the rows to choose on; the best maps of each are kept."""
        self._refuse_nan()
        only = self.active.any(1).nonzero()[:, 0].tolist()
        maps = self.start.maps if self.done == 0 else self.start.outward(self.inner)
        found = choosing_kl(self.inputs, self.unembed, maps, self.choose, only)
        better = (found < self.best_kl) & self.active
        for name, value in maps.items():
            self.best[name][better] = value[better]
        self.best_step[better] = self.done
        self.waited = torch.where(better | ~self.active, self.waited * ~better, self.waited + 1)
        self.best_kl = torch.where(better, found, self.best_kl)
        loss = self._loss / self._since if self._since else torch.full_like(self._loss, math.nan)
        for place in only:
            for unit in range(self.inputs.units):
                head = -1 if self.inputs.kind == "layers" else unit
                numbers = (found, self.best_kl, loss)
                row = [float(number[place, unit]) for number in numbers]
                self._curve.append((self.done, self.inputs.layers[place], head, *row))
        self._loss.zero_()
        self._since = 0

    def _refuse_nan(self) -> None:
        if not all(bool(value.isfinite().all()) for value in self.inner.values()):
            raise Diverged(
                f"the maps after step {self.done} are not numbers; {self._kept()}; try a smaller "
                f"lr than {self.options.lr}"
            )

    def _standing(self) -> str:
        """How training stands: held-out KL at the start and now, units that still learn."""
        known = self.trained
        if not bool(known.any()) or not self._curve:
            return "Training"
        table = self.curve
        first = table.loc[table["step"] == 0, "kl"].mean()
        best = float(self.best_kl[known].mean())
        return (
            f"Training · held-out KL {best:.3f} (start {first:.3f}) · "
            f"{int(self.active.sum())} of {int(known.sum())} still learn"
        )

    # --- checkpoints ------------------------------------------------------------------------------

    def save(self) -> None:
        """Write maps, moments and curve as one file, whole or not at all."""
        if self.folder is None:
            return
        tensors = {f"inner.{name}": value for name, value in self.inner.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {f"{which}.{name}": value for (which, name), value in self.moments.items()}
        for name in ("best_kl", "best_step", "waited"):
            tensors[name] = getattr(self, name)
        tensors["curve"] = torch.tensor(self._curve, dtype=torch.double).reshape(-1, len(CURVE))
        write_state(self.folder / STATE, tensors, self.key, done=str(self.done))

    def _load(self, path: Path) -> None:
        tensors, about = read_state(path, self.key)
        self.done = int(about["done"])
        for name in self.inner:
            self.inner[name] = tensors[f"inner.{name}"]
            self.best[name] = tensors[f"best.{name}"]
        for which, name in self.moments:
            self.moments[which, name] = tensors[f"{which}.{name}"]
        for name in ("best_kl", "best_step", "waited"):
            setattr(self, name, tensors[name])
        self._curve = [tuple(row) for row in tensors["curve"].tolist()]

    def _kept(self) -> str:
        if self.folder is None or not (self.folder / STATE).exists():
            return "no checkpoint was kept"
        return f"the last good checkpoint is {self.folder / STATE}"
