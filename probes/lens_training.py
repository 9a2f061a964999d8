"""Affine maps to the final residual trained by the KL of what they read: one loop for layers and heads.

A unit is one map: of a block's input (tuned lens) or of one head's z (Attention Lens). All units learn
from the same forward. What costs is the unembedding of every unit's every row, so a step looks at a
part of the vocabulary: the tokens the final distributions of its rows think likeliest, and a weighted
sample of the others (`PartOfVocabulary`).

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
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import BadInput, Refused
from interp.lens_text import Parts
from interp.models.calls import at_home
from interp.models.model import Model
from interp.models.weights import linear_map
from interp.ridge_lens import TOKENS_PER_FORWARD
from interp.run.files import check_writable
from interp.run.progress import Progress
from interp.unembedding import Unembedding
from probes.training import Diverged, read_state, under, write_state

STATE = "training.safetensors"
OPTIMISERS = ("adam", "sgd")
CHUNK_ROWS = 128
"""Rows whose logits over the whole vocabulary exist at once."""

LIKELIEST = 16
"""Tokens of every row's final distribution that a step always looks at, where there is room."""

CURVE = ("step", "layer", "head", "kl", "best_kl", "loss")
Maps = dict[str, Tensor]
"""A and b, or U, V and b, of all units: [n_layers units ...]."""


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


# --- what is read -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Which activations a kind of lens reads: every unit is one of a layer's `units`.

    Attributes:
        kind: "layers" (block inputs, one unit a layer) or "heads" (z, one unit a head).
        layers: the layers of the first axis of all maps. units: of each layer. d_in: width of one.
    """

    model: Model
    kind: str
    layers: tuple[int, ...]
    units: int
    d_in: int

    @staticmethod
    def of(model: Model, kind: str, layers: Sequence[int]) -> Inputs:
        """The inputs of these layers; Refused where heads have none, or write through a norm."""
        if kind == "layers":
            return Inputs(model, kind, tuple(layers), 1, model.spec.d_model)
        known = model.layers_with("z")
        layers = [layer for layer in layers if layer in known]
        if not layers:
            raise Refused(f"{model.id} has no heads in the layers named; they are in {known}")
        blocks = [model.spec.blocks[layer] for layer in layers]
        for layer, block in zip(layers, blocks, strict=True):
            if not block.direct:
                raise Refused(
                    f"{model.id} normalises what attention writes at layer {layer}, so one head's "
                    "write is not its own; a lens of kind 'layers' can be trained"
                )
        shapes = {(block.n_heads, block.d_head) for block in blocks}
        if len(shapes) > 1:
            raise Refused(
                f"heads of {model.id} differ in shape between layers: {sorted(shapes)} (n_heads, "
                "d_head); name layers that are alike"
            )
        return Inputs(model, kind, tuple(layers), *shapes.pop())

    def read(
        self, ids: Int[Tensor, "n pos"], places: slice | Tensor, only: Sequence[int] | None = None
    ) -> tuple[dict[int, Float[Tensor, "units rows d_in"]], Float[Tensor, "rows d_model"]]:
        """(activations by place in `layers`, final residuals) at these positions of every window.

        `only`: places in `layers` that are wanted. Every window's rows stand together.
        """
        wanted = range(len(self.layers)) if only is None else only
        name = "resid_pre" if self.kind == "layers" else "z"
        last = f"resid_post.{self.model.n_layers - 1}"
        sites = {place: f"{name}.{self.layers[place]}" for place in wanted}
        cache = self.model.run(ids, capture=[*sites.values(), last], logits=False).cache
        read: dict[int, Tensor] = {}
        for place, site in sites.items():
            x = cache[site][:, places].float().flatten(0, 1)
            read[place] = x[None] if self.kind == "layers" else x.transpose(0, 1).contiguous()
        return read, cache[last][:, places].flatten(0, 1)

    def plainly(
        self, place: int, x: Float[Tensor, "units rows d_in"]
    ) -> Float[Tensor, "units rows d_model"]:
        """What the logit lens unembeds: the residual itself, or what each head writes."""
        base = self.base(place)
        return x if base is None else x @ base

    def base(self, place: int) -> Float[Tensor, "units d_in d_model"] | None:
        """The map of the logit lens: None for the identity, else each head's slice of W_O."""
        if self.kind == "layers":
            return None
        layer = self.layers[place]
        write = self.model.spec.blocks[layer].attn_write
        return self.model.W_O(layer).float() * (1.0 if write is None else write.scale)

    def translated(
        self, maps: Mapping[str, Tensor], place: int, x: Float[Tensor, "units rows d_in"]
    ) -> Float[Tensor, "units rows d_model"]:
        """x A + b; of a low rank, x U V + b, for layers added to x itself."""
        at = {name: value[place].to(x.device) for name, value in maps.items()}
        if "A" in at:
            return torch.baddbmm(at["b"][:, None], x, at["A"])
        y = torch.baddbmm(at["b"][:, None], x @ at["U"], at["V"])
        return x + y if self.kind == "layers" else y


# --- how good a map is --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Held-out rows: activations by place, final residuals, the tokens that follow (−1: unknown)."""

    x: dict[int, Float[Tensor, "units rows d_in"]]
    final: Float[Tensor, "rows d_model"]
    following: Int[Tensor, " rows"]

    @staticmethod
    def of(inputs: Inputs, windows: Int[Tensor, "n pos"], each: int, advance=None) -> Rows:
        """`each` positions of every window, evenly spread; never the first, never the last."""
        width = windows.shape[1] - 2
        if width < 1:
            raise BadInput("windows of held-out text have fewer than 3 tokens: give a wider window")
        each = min(each, width)
        places = 1 + ((torch.arange(each) + 0.5) * width / each).long()
        parts, finals = {}, []
        for rows in windows.split(max(1, TOKENS_PER_FORWARD // windows.shape[1])):
            x, final = inputs.read(rows, places)
            for place, value in x.items():
                parts.setdefault(place, []).append(value)
            finals.append(final)
            if advance is not None:
                advance(len(rows))
        joined = {place: torch.cat(values, 1) for place, values in parts.items()}
        following = windows[:, places + 1].flatten()
        return Rows(joined, torch.cat(finals), following)


@torch.no_grad()
def judged(
    unembed: Unembedding,
    stack: Float[Tensor, "lens rows d_model"],
    final: Float[Tensor, "rows d_model"],
    following: Int[Tensor, " rows"] | None = None,
) -> dict[str, Float[Tensor, " lens"]]:
    """Means over rows of KL(final ‖ lens) and the loss, nats, and how often the top tokens agree.

    KL(p ‖ q) = (Σ p·l_p − lse_p) − (Σ p·l_q − lse_q), exact over the vocabulary, in chunks of rows.
    """
    sums = {name: torch.zeros(len(stack)).double() for name in ("kl", "loss", "agreement")}
    for start in range(0, len(final), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        logits = unembed(final[rows])
        lse, top = logits.logsumexp(-1), logits.argmax(-1)
        p = (logits - lse[:, None]).exp()
        own = torch.linalg.vecdot(p, logits) - lse
        for i, x in enumerate(stack[:, rows]):
            read = unembed(x)
            lse = read.logsumexp(-1)
            gap = own - (torch.linalg.vecdot(p, read) - lse)
            sums["kl"][i] += float(gap.clamp_min(0).sum())  # below 0 by rounding only
            sums["agreement"][i] += float((read.argmax(-1) == top).sum())
            if following is not None:
                at = read.gather(-1, following[rows, None].to(read.device))[:, 0]
                sums["loss"][i] += float((lse - at).sum())
    return {name: value / len(final) for name, value in sums.items()}


def choosing_kl(
    inputs: Inputs, unembed: Unembedding, maps: Mapping[str, Tensor], choose: Mapping[str, Rows],
    only: Sequence[int],
) -> Float[Tensor, "n_layers units"]:  # fmt: skip
    """Exact KL of every unit on the rows to choose on, kinds of text counting the same; NaN elsewhere."""
    found = torch.full((len(inputs.layers), inputs.units), math.nan).double()
    if only:
        by_kind = []
        for rows in choose.values():
            read = torch.cat([inputs.translated(maps, place, rows.x[place]) for place in only])
            by_kind.append(judged(unembed, read, rows.final)["kl"])
        found[list(only)] = torch.stack(by_kind).mean(0).unflatten(0, (len(only), inputs.units))
    return found


# --- the loss of a step -------------------------------------------------------------------------------


class PartOfVocabulary:
    """KL(p̂ ‖ q̂) over some tokens and its gradient, p̂ and q̂ the softmax of logits − log π.

    π is the chance with which a token was taken in, so Σ exp(l)/π estimates the whole partition
    function without bias; its logarithm, and with it the loss, is then a little too small (half the
    estimate's relative variance). Whatever is taken in, the loss is 0 where q = p and positive
    elsewhere, so it has the same minimum. With all tokens it is the exact KL.

    Args:
        tokens: ids taken in, or None for all. chance: π of each.
    """

    def __init__(self, model: Model, tokens: Tensor | None, chance: Tensor | None):
        spec = model.spec
        self.model, self.cap, self.scale = model, spec.logit_softcap, spec.logit_scale
        self.norm = None if spec.final_norm is None else model.module.get_submodule(spec.final_norm)
        module = model.module.get_submodule(spec.unembedding or "")
        W, b = linear_map(module, spec.d_model, model.device)
        self.W = (W.T if tokens is None else W.T[tokens.to(W.device)]).float()
        b = (b if tokens is None else b[tokens.to(b.device)]).float()
        self.b, self.correction = b, None if chance is None else -chance.log().to(b.device)

    def _logits(self, normed: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weighted logits, and d logit / d product where it is not `scale` everywhere."""
        logits = torch.addmm(self.b, normed.float(), self.W.T)
        if self.scale != 1.0:
            logits *= self.scale
        slope = None
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap)
            slope = 1 - logits.square()
            logits *= self.cap
        return logits if self.correction is None else logits + self.correction, slope

    @torch.no_grad()
    def target(self, final: Float[Tensor, "rows d_model"]) -> tuple[Tensor, Tensor]:
        """(p̂ [rows tokens], Σ p̂ log p̂ [rows]) of the final residuals."""
        final = final.to(self.model.dtype)
        logits, _ = self._logits(final if self.norm is None else at_home(self.norm, final))
        logp = logits.log_softmax(-1)
        p = logp.exp()
        return p, torch.linalg.vecdot(p, logp)

    def __call__(
        self, y: Float[Tensor, "rows d_model"], target: tuple[Tensor, Tensor]
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows d_model"]]:
        """(KL of each row, its gradient at y)."""
        leaf = y.detach().to(self.model.dtype).requires_grad_()
        with torch.enable_grad():
            normed = leaf if self.norm is None else at_home(self.norm, leaf)
        p, own = target
        with torch.no_grad():
            logits, slope = self._logits(normed.detach())
            lse = logits.logsumexp(-1)
            kl = own + lse - torch.linalg.vecdot(p, logits)
            g = logits.sub_(lse[:, None]).exp_().sub_(p)
            if slope is not None:
                g *= slope
            back = (g @ self.W) * self.scale
        if self.norm is None:
            return kl, back
        (grad,) = torch.autograd.grad(normed, leaf, back.to(normed.dtype))
        return kl, grad.float()


def part_for(
    model: Model,
    final: Float[Tensor, "rows d_model"],
    frequency: Float[Tensor, " d_vocab"],
    size: int,
    generator: torch.Generator,
) -> PartOfVocabulary:
    """About `size` tokens for a step (0: all): the likeliest of its rows for sure, the others by their weight.

    The others are taken in each on its own, with a chance in proportion to the mean of their
    `frequency` and of an even share.
    """
    d_vocab = len(frequency)
    if not 0 < size < d_vocab:
        return PartOfVocabulary(model, None, None)
    k = max(1, min(LIKELIEST, size // (2 * len(final))))
    likely = [
        model.unembed(x.to(model.dtype)).float().topk(k).indices.flatten().cpu()
        for x in final.split(CHUNK_ROWS)
    ]
    certain = torch.cat(likely).unique()
    weight = (frequency + 1 / d_vocab) / 2
    chance = (weight * max(1, size - len(certain))).clamp(max=1.0)
    chance[certain] = 1.0
    taken = torch.rand(d_vocab, generator=generator) < chance
    taken[certain] = True
    tokens = taken.nonzero()[:, 0]
    return PartOfVocabulary(model, tokens, chance[tokens])


# --- the start, in units of each coordinate's deviation --------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Where training begins, and what makes its steps independent of the model's scale.

    Attributes:
        maps: of all units. frequency: the final distribution, averaged over a sample.
        mean, spread: of every unit's inputs [n_layers units d_in]. size: deviation of every
            coordinate of the final residual [d_model].
    """

    maps: Maps
    mean: Tensor
    spread: Tensor
    size: Tensor
    frequency: Tensor

    def inward(self, maps: Mapping[str, Tensor]) -> Maps:
        """Maps from and to standardised coordinates: y = size · (x̂ Ã + b̃), x̂ = (x − mean) / spread."""
        first = maps["A"] if "A" in maps else maps["U"]
        moved = torch.einsum("lui,luio->luo", self.mean, first)
        if "A" in maps:
            A = self.spread[..., None] * maps["A"] / self.size
            return {"A": A, "b": (maps["b"] + moved) / self.size}
        moved = torch.einsum("lur,luro->luo", moved, maps["V"])
        return {
            "U": self.spread[..., None] * maps["U"],
            "V": maps["V"] / self.size,
            "b": (maps["b"] + moved) / self.size,
        }

    def outward(self, inner: Mapping[str, Tensor]) -> Maps:
        """The maps of plain coordinates again."""
        b = inner["b"] * self.size
        if "A" in inner:
            A = inner["A"] / self.spread[..., None] * self.size
            return {"A": A, "b": b - torch.einsum("lui,luio->luo", self.mean, A)}
        U, V = inner["U"] / self.spread[..., None], inner["V"] * self.size
        moved = torch.einsum("lui,luir->lur", self.mean, U)
        return {"U": U, "V": V, "b": b - torch.einsum("lur,luro->luo", moved, V)}

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for a file."""
        rest = {name: getattr(self, name) for name in ("mean", "spread", "size", "frequency")}
        return rest | {f"maps.{name}": value for name, value in self.maps.items()}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Start:
        """What `tensors` gave."""
        rest = {name: tensors[name] for name in ("mean", "spread", "size", "frequency")}
        return Start(under("maps.", tensors), **rest)


def spread_of(x: Float[Tensor, "*batch rows width"]) -> Float[Tensor, "*batch width"]:
    """Each coordinate's deviation; 1 where it never varies."""
    found = x.std(-2, unbiased=False)
    return torch.where(found <= 1e-5 * x.abs().mean(-2), 1.0, found)


# --- training -----------------------------------------------------------------------------------------------


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
