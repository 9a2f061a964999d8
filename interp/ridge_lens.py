"""The ridge lens: the best affine map from any layer's residual stream to the final one, in closed form.

The logit lens unembeds an early residual as if it were the final one, and is far off in most models.
The best affine map h_l → h_L in squared error needs only Xᵀ X and Xᵀ Y of one pass over some text: no
gradients, no stored activations. It is fitted once a model and kept in the user's cache
(`interp.affine_lens`).
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import product

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.affine_lens import FORMAT, AffineLens, affine, lens_path
from interp.errors import BadInput
from interp.lens_text import (
    ROWS_PER_WINDOW,
    TESTING_ROWS,
    evenly,
    ids_of,
    one_text,
    parts_of,
)
from interp.metrics import kl
from interp.models.load import model_sha256
from interp.models.model import Model
from interp.quiet_direction import quiet_direction
from interp.run.progress import Progress
from interp.unembedding import Unembedding

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Ridge penalties tried for every layer, in units of each coordinate's own variance."""
STRETCHES = (1.0, 1.3, 1.6)
"""Factors tried for every layer on a prediction's distance from the mean final residual."""
QUIETS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Lengths along the quiet direction tried for every layer, in units of the final residual's mean length."""

TOKENS_PER_FORWARD = 1024
STATISTICS_BYTES = 4 << 30
"""Memory for Xᵀ X and Xᵀ Y; a model that needs more is fitted in several passes, some layers in each."""


@torch.no_grad()
def fit_ridge_lens(
    model: Model,
    *,
    text: str | Int[Tensor, " tokens"] | None = None,
    text_name: str = "",
    window: int = 128,
    penalties: Sequence[float] = PENALTIES,
    layers: Sequence[int] | None = None,
    keep: bool = True,
    progress: bool | None = None,
) -> AffineLens:
    """The best affine map from every block's input to the final residual, and how good it is elsewhere.

    With X the residuals before block l, Y the final ones and Δ = A_l − I,

        Δ = (XᵀX + λ diag(XᵀX))⁻¹ Xᵀ(Y − X),   b_l = mean Y − mean X · A_l,      (X, Y centred)

    so that a large λ leads back to the logit lens with a bias. Regression draws what it predicts
    towards the mean, and the final norm, which gives every vector one size, makes a sure prediction of
    an unsure one. Two numbers a layer mend that: predictions are stretched from the mean by s, and moved
    by c along the direction that the unembedding hears least, which takes size from all the rest
    (`interp.quiet_direction`): mean Y + s (x A_l + b_l − mean Y) + c v. λ, then c, then s are chosen
    for each layer by the KL on other documents, and the KL reported is measured on a third set, once
    for each kind of text. The map fits squared error, not KL: a gradient-tuned lens can be better.

    The first position of a window is used nowhere: its activations are hundreds of times larger in
    many models and always the same after a BOS token. What the lens says there is an extrapolation.

    Args:
        text: one text, or token ids, in parts of which it is fitted, chosen and tested. By default the
            English at hand (`interp.data.english`): the shipped prose, docstrings, Python's language
            reference, readmes, licences; whole documents are then held out. Other kinds of text read
            differently: give one like what you will read, and as long as you can.
        text_name: what to call it in reports.
        window: tokens in one context, after the lead token.
        penalties: values of λ to choose from.
        layers: only these blocks' inputs; the others are left to the logit lens.
        keep: put the lens into the cache, where `lens="best"` finds it; never one of some layers.

    Raises:
        BadInput: too little text, no tokenizer, a layer that is not there. Refused: the model cannot be unembedded.

    Source: ours; the logit lens is nostalgebraist 2020, "interpreting GPT: the logit lens"; affine
    translators fitted by gradients on the KL are Belrose et al. 2023, arXiv 2303.08112.

    >>> ids = torch.randint(97, (1200,), generator=torch.Generator().manual_seed(0))
    >>> lens = fit_ridge_lens(tiny_model(), text=ids, window=32, keep=False, progress=False)
    >>> lens.A.shape, list(lens.held_out)[:4]
    (torch.Size([2, 32, 32]), ['text', 'layer', 'kl_ridge', 'kl_logit'])
    """
    started = time.perf_counter()
    unembed = Unembedding(model)
    if not penalties or min(penalties) < 0:
        raise BadInput(f"penalties={list(penalties)}: give at least one, none below 0")
    chosen = check_layers(model, layers)
    parts, shown = parts_of(model, text, text_name, window)
    d, n = model.spec.d_model, model.n_layers
    at_once = max(1, STATISTICS_BYTES // (2 * 8 * d * d))
    groups = [chosen[i : i + at_once] for i in range(0, len(chosen), at_once)]
    A, b, held_out = torch.eye(d).repeat(n, 1, 1), torch.zeros(n, d), []
    with Progress(progress) as bars:
        reading = len(parts.fit) + sum(map(len, [*parts.choose.values(), *parts.test.values()]))
        advance = bars.stage("Reading text", len(groups) * reading)
        solve = bars.stage("Solving", len(chosen))
        for group in groups:
            moments = Moments(d, group)
            _stream(model, parts.fit, group, moments.add, advance)
            choosing, testing = (
                {kind: _some_rows(model, rows, group, advance) for kind, rows in part.items()}
                for part in (parts.choose, parts.test)
            )
            to_choose, to_test = (
                {kind: unembed(seen[n]) for kind, seen in part.items()}
                for part in (choosing, testing)
            )

            finals = torch.cat([seen[n].float().cpu() for seen in choosing.values()])
            quiet = quiet_direction(model, towards=finals.mean(0)) * finals.norm(dim=-1).mean()
            for layer in group:
                loss = partial(_summed_kl, unembed, to_choose, choosing, layer)
                solved = partial(moments.solve, layer)
                found, numbers = _best(solved, loss, penalties, quiet)
                A[layer], b[layer] = found
                for kind, seen in testing.items():
                    ridge = _mean_kl(unembed, to_test[kind], affine(seen[layer], *found))
                    logit = _mean_kl(unembed, to_test[kind], seen[layer])
                    held_out.append(
                        {"text": kind, "layer": layer, "kl_ridge": ridge, "kl_logit": logit}
                        | numbers
                    )
                solve(1)
    used = parts.fit.shape[0] * (parts.fit.shape[1] - 1)
    about = {
        "format": FORMAT,
        "kind": "ridge",
        "layers": chosen,
        "model": {"id": model.id, "sha256": model_sha256(model)},
        "text": shown,
        "fit_positions": used,
        "held_out_positions": sum(len(wanted) for wanted in to_test.values()),
        "window": window,
        "held_out": [row for kind in parts.test for row in held_out if row["text"] == kind],
        "versions": {"torch": torch.__version__},
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "wall_time_s": round(time.perf_counter() - started, 1),
    }
    if used < 10 * d:
        about["note"] = f"fitted on {used} positions for {d} coordinates: give more text"
    lens = AffineLens(A, b, about)
    if keep and len(chosen) == n:
        lens.save(lens_path(about["model"]["sha256"], shown["recipe"] or shown["sha256"]))
    return lens


def check_layers(model: Model, layers: Sequence[int] | None) -> list[int]:
    """The layers named, in order and each once, or all; BadInput for one that is not there."""
    for layer in layers or ():
        if not 0 <= layer < model.n_layers:
            raise BadInput(
                f"layer {layer}: {model.id} has blocks 0 to {model.n_layers - 1}, and the input of "
                "each is a layer of the lens"
            )
    if layers is not None and not len(layers):
        raise BadInput("layers is empty: leave it out, or name at least one")
    return sorted(set(layers)) if layers is not None else list(range(model.n_layers))


def _best(
    solve: Callable[..., tuple[Tensor, Tensor]],
    loss: Callable[[tuple[Tensor, Tensor]], float],
    penalties: Sequence[float],
    quiet: Float[Tensor, " d_model"],
) -> tuple[tuple[Tensor, Tensor], dict[str, float]]:
    """The map of the smallest loss and its numbers, chosen one after the other."""

    def tried(penalty: float, stretch: float, length: float) -> tuple[Tensor, Tensor]:
        A, b = solve(penalty, stretch)
        return A, b + length * quiet

    @cache
    def cost(penalty: float, stretch: float, length: float) -> float:
        return loss(tried(penalty, stretch, length))

    penalty = min(penalties, key=lambda p: cost(p, 1.0, QUIETS[0]))
    length = QUIETS[0]
    for longer in QUIETS[1:]:  # the loss falls with the length, then it rises
        if cost(penalty, 1.0, longer) >= cost(penalty, 1.0, length):
            break
        length = longer
    pairs = product(STRETCHES, (QUIETS[0], length))
    stretch, length = min(pairs, key=lambda pair: cost(penalty, *pair))
    numbers = {"penalty": penalty, "stretch": stretch, "quiet": length}
    return tried(penalty, stretch, length), numbers


@torch.no_grad()
def held_out_kl(
    model: Model, lens: AffineLens, text: str | Int[Tensor, " tokens"], *, window: int = 128
) -> pd.DataFrame:
    """Mean KL(final ‖ lens), nats, of this and the logit lens on another text: one row a layer.

    At most 1024 positions, spread evenly over the text; never the first of a window.
    """
    unembed = Unembedding(model)
    windows = one_text(model, ids_of(model, text), window)
    n, rows = model.n_layers, []
    seen = _some_rows(model, evenly(windows, TESTING_ROWS), range(n), lambda _: None)
    wanted = unembed(seen[n])
    for layer in range(n):
        own = _mean_kl(unembed, wanted, lens(seen[layer], layer))
        logit = _mean_kl(unembed, wanted, seen[layer])
        rows.append({"layer": layer, f"kl_{lens.kind}": own, "kl_logit": logit})
    return pd.DataFrame(rows)


class Moments:
    """Sums over positions of x, y, xᵀx and xᵀy for every layer, in float64; y is the final residual.

    x is as wide as y unless `d_in` says otherwise (one head's z).

    >>> x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double()
    >>> moments = Moments(4, [0])
    >>> moments.add({0: x, 1: 2 * x + 1})
    >>> A, b = moments.solve(0, penalty=0)
    >>> torch.allclose(A, 2 * torch.eye(4)), torch.allclose(b, torch.ones(4))
    (True, True)
    """

    def __init__(self, d_model: int, layers: Sequence[int], d_in: int | None = None):
        d_in = d_model if d_in is None else d_in
        self.n, self.y = 0, torch.zeros(d_model).double()
        self.x = {layer: torch.zeros(d_in).double() for layer in layers}
        self.xx = {layer: torch.zeros(d_in, d_in).double() for layer in layers}
        self.xy = {layer: torch.zeros(d_in, d_model).double() for layer in layers}

    def add(self, residuals: Mapping[int, Float[Tensor, "rows d_model"]]) -> None:
        """Take in rows of every layer; the highest key holds the final residual."""
        y = residuals[max(residuals)].cpu().double()
        self.n += len(y)
        self.y += y.sum(0)
        for layer in self.x:
            x = residuals[layer].cpu().double()
            self.x[layer] += x.sum(0)
            self.xx[layer].addmm_(x.T, x)
            self.xy[layer].addmm_(x.T, y)

    def solve(
        self, layer: int, penalty: float, stretch: float = 1.0, towards: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(A, b) in float32 of y ≈ x A + b with ridge `penalty`, shrunk towards A = I or `towards`.

        Predictions lie `stretch` times as far from the mean of y as those of least squares.
        """
        mean_x, mean_y = self.x[layer] / self.n, self.y / self.n
        xx = self.xx[layer] / self.n - torch.outer(mean_x, mean_x)
        xy = self.xy[layer] / self.n - torch.outer(mean_x, mean_y)
        # In units of each coordinate's deviation; one that never varies (but for rounding) keeps Δ = 0.
        spread, size = xx.diagonal(), self.xx[layer].diagonal() / self.n
        still = spread <= 1e-10 * size
        unit = torch.where(still, 1.0, spread).sqrt()
        gram = xx / unit[:, None] / unit + torch.diag(still + penalty + 1e-12)
        base = torch.eye(len(xx), dtype=torch.float64) if towards is None else towards.double()
        left = xy - (xx if towards is None else xx @ base)
        wanted = torch.where(still[:, None], 0.0, left / unit[:, None])
        delta = torch.linalg.solve(gram, wanted) / unit[:, None]
        A = stretch * (delta + base)
        return A.float(), (mean_y - mean_x @ A).float()


def _mean_kl(unembed: Unembedding, wanted: Tensor, residual: Tensor) -> float:
    """Mean KL in nats of the distributions `wanted` (as logits) to those of `residual`."""
    return float(kl(wanted, unembed(residual)).mean())


def _summed_kl(
    unembed: Unembedding,
    wanted: Mapping[str, Tensor],
    seen: Mapping[str, Mapping[int, Tensor]],
    layer: int,
    found: tuple[Tensor, Tensor],
) -> float:
    """The KL of a map from this layer, summed over kinds of text, each counting the same."""
    return sum(
        _mean_kl(unembed, wanted[kind], affine(rows[layer], *found)) for kind, rows in seen.items()
    )


def _stream(
    model: Model,
    windows: Tensor,
    layers: Sequence[int],
    take: Callable[[dict[int, Tensor]], None],
    advance: Callable[[int], None],
) -> None:
    """Give `take` the block inputs and the final residual, key n_layers, of every window's positions."""
    final = model.n_layers
    capture = [f"resid_pre.{layer}" for layer in layers] + [f"resid_post.{final - 1}"]
    per_forward = max(1, TOKENS_PER_FORWARD // windows.shape[1])
    for rows in windows.split(per_forward):
        cache = model.run(rows, capture=capture, logits=False).cache
        seen = {layer: cache[f"resid_pre.{layer}"] for layer in layers}
        seen[final] = cache[f"resid_post.{final - 1}"]
        take({layer: x[:, 1:].flatten(0, 1) for layer, x in seen.items()})
        advance(len(rows))


def _some_rows(
    model: Model, windows: Tensor, layers: Sequence[int], advance: Callable[[int], None]
) -> dict[int, Float[Tensor, "rows d_model"]]:
    """ROWS_PER_WINDOW positions of every window, evenly spread, by layer."""
    width = windows.shape[1] - 1
    places = (torch.arange(min(ROWS_PER_WINDOW, width)) + 0.5) * width / min(ROWS_PER_WINDOW, width)
    kept: dict[int, list[Tensor]] = {}

    def take(seen: dict[int, Tensor]) -> None:
        for layer, x in seen.items():
            kept.setdefault(layer, []).append(
                x.unflatten(0, (-1, width))[:, places.long()].flatten(0, 1)
            )

    _stream(model, windows, layers, take, advance)
    return {layer: torch.cat(parts) for layer, parts in kept.items()}
