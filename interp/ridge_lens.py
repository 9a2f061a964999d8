"""The ridge lens: the affine map from any layer's residual stream to the final one, in closed form.

The logit lens unembeds an early residual as if it were the final one, and is far off in most models.
The best affine map h_l → h_L in squared error needs only Xᵀ X and Xᵀ Y of one pass over some text: no
gradients, no stored activations. It is fitted once a model and kept in the user's cache.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from interp.data.prompts import lead_token, prose
from interp.errors import BadInput
from interp.metrics import kl
from interp.models.load import weights_sha256
from interp.models.model import Model
from interp.models.sources.embedded import cache_folder
from interp.run.files import write_atomically
from interp.run.progress import Progress
from interp.unembedding import Unembedding

FORMAT = 1
PENALTIES = (1e-3, 1e-2, 5e-2, 2e-1)
"""Ridge penalties tried for every layer, in units of each coordinate's own variance."""

TOKENS_PER_FORWARD = 1024
STATISTICS_BYTES = 4 << 30
"""Memory for Xᵀ X and Xᵀ Y; a model that needs more is fitted in several passes, some layers in each."""

MIN_WINDOWS = 10
CHOOSING_ROWS, TESTING_ROWS = 256, 512
_log = logging.getLogger("interp")


@dataclass(frozen=True, eq=False)
class RidgeLens:
    """h_L ≈ h_l A_l + b_l for the input h_l of every block l.

    Attributes:
        A: [n_layers d_model d_model]. b: [n_layers d_model].
        about: model id and weights hash, text, numbers of tokens, and for every layer the penalty
            chosen and the held-out KL (nats) of this lens and of the logit lens.
    """

    A: Float[Tensor, "n_layers d_model d_model"]
    b: Float[Tensor, "n_layers d_model"]
    about: dict[str, Any]

    def __call__(
        self, residual: Float[Tensor, "*rows d_model"], layer: int
    ) -> Float[Tensor, "*rows d_model"]:
        """The final residual predicted from `resid_pre.<layer>`; at layer n_layers, the final one, itself."""
        if layer == len(self.A):
            return residual
        return affine(residual, self.A[layer], self.b[layer])

    @property
    def held_out(self) -> pd.DataFrame:
        """One row a layer: KL(final ‖ lens) in nats on text it was not fitted on, both lenses."""
        return pd.DataFrame(self.about["held_out"])

    def save(self, path: Path) -> None:
        """Write the lens as one safetensors file, whole or not at all."""
        tensors = {"A": self.A.contiguous(), "b": self.b.contiguous()}
        write_atomically(path, save(tensors, {"about": json.dumps(self.about)}))

    @staticmethod
    def load(path: Path, model: Model, sha256: str | None = None) -> RidgeLens:
        """A saved lens; BadInput if it is damaged or was fitted on other weights than `model`'s."""
        again = "fit it again with interp.ridge_lens.fit_ridge_lens(model)"
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["about"])
                A, b = file.get_tensor("A"), file.get_tensor("b")
        except FileNotFoundError as error:
            raise BadInput(f"no lens at {path}; {again}") from error
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise BadInput(f"{path} is damaged: {error}; {again}") from error
        if about.get("format") != FORMAT:
            raise BadInput(f"{path} has format {about.get('format')}, wanted {FORMAT}; {again}")
        wanted = sha256 or weights_sha256(model.module)
        if about["model"]["sha256"] != wanted:
            raise BadInput(
                f"{path} was fitted on {about['model']['id']} with weights "
                f"{about['model']['sha256'][:16]}, {model.id} has {wanted[:16]}; {again}"
            )
        return RidgeLens(A, b, about)


def lens_path(sha256: str) -> Path:
    """Where the lens of the weights with this hash is kept."""
    return cache_folder() / "lenses" / sha256[:16] / "ridge.safetensors"


def cached_ridge_lens(model: Model, sha256: str | None = None) -> RidgeLens | None:
    """The lens that was fitted on these weights before; None if there is none that is sound."""
    sha256 = sha256 or weights_sha256(model.module)
    path = lens_path(sha256)
    if not path.exists():
        return None
    try:
        return RidgeLens.load(path, model, sha256)
    except BadInput as error:
        _log.warning("%s", error)
        return None


@torch.no_grad()
def fit_ridge_lens(
    model: Model,
    *,
    text: str | Int[Tensor, " tokens"] | None = None,
    text_name: str = "",
    window: int = 128,
    penalties: Sequence[float] = PENALTIES,
    keep: bool = True,
    progress: bool | None = None,
) -> RidgeLens:
    """The best affine map from every block's input to the final residual, and how good it is elsewhere.

    With X the residuals before block l, Y the final ones and Δ = A_l − I,

        Δ = (XᵀX + λ diag(XᵀX))⁻¹ Xᵀ(Y − X),   b_l = mean Y − mean X · A_l,      (X, Y centred)

    so that a large λ leads back to the logit lens with a bias. λ is chosen for each layer by the KL
    on a second part of the text, and the KL reported is measured on a third; parts are consecutive,
    a window apart. It fits squared error, not KL: a gradient-tuned lens can be better.

    The first position of a window is used nowhere: its activations are hundreds of times larger in
    many models and always the same after a BOS token. What the lens says there is an extrapolation.

    Args:
        text: any text, or token ids; the shipped prose (English, 1813) by default. Other kinds of
            text read differently: give one like what you will read, and as long as you can.
        text_name: what to call it in reports.
        window: tokens in one context, after the lead token.
        penalties: values of λ to choose from.
        keep: put the lens into the cache, where `lens="best"` finds it.

    Raises:
        BadInput: too little text, no tokenizer. Refused: the model cannot be unembedded.

    Source: ours; the logit lens is nostalgebraist 2020, "interpreting GPT: the logit lens"; affine
    translators fitted by gradients on the KL are Belrose et al. 2023, arXiv 2303.08112.

    >>> ids = torch.randint(97, (1200,), generator=torch.Generator().manual_seed(0))
    >>> lens = fit_ridge_lens(tiny_model(), text=ids, window=32, keep=False, progress=False)
    >>> lens.A.shape, list(lens.held_out)[:3]
    (torch.Size([2, 32, 32]), ['layer', 'kl_ridge', 'kl_logit'])
    """
    started = time.perf_counter()
    unembed = Unembedding(model)
    if not penalties or min(penalties) < 0:
        raise BadInput(f"penalties={list(penalties)}: give at least one, none below 0")
    ids, shown = _token_stream(model, text, text_name)
    fit, choose, test = _parts(_windows(model, ids, window))
    d, n = model.spec.d_model, model.n_layers
    at_once = max(1, STATISTICS_BYTES // (2 * 8 * d * d))
    groups = [range(i, min(n, i + at_once)) for i in range(0, n, at_once)]
    A, b, held_out = torch.empty(n, d, d), torch.empty(n, d), []
    with Progress(progress) as bars:
        advance = bars.stage("Reading text", len(groups) * (len(fit) + len(choose) + len(test)))
        solve = bars.stage("Solving", n)
        for group in groups:
            moments = Moments(d, group)
            _stream(model, fit, group, moments.add, advance)
            choosing = _some_rows(model, choose, group, CHOOSING_ROWS, advance)
            testing = _some_rows(model, test, group, TESTING_ROWS, advance)
            to_choose, to_test = unembed(choosing[n]), unembed(testing[n])
            for layer in group:
                best = (float("inf"), penalties[0])
                for penalty in penalties:
                    found = moments.solve(layer, penalty)
                    loss = _mean_kl(unembed, to_choose, affine(choosing[layer], *found))
                    if loss < best[0]:
                        best, A[layer], b[layer] = (loss, penalty), *found
                ridge = _mean_kl(unembed, to_test, affine(testing[layer], A[layer], b[layer]))
                logit = _mean_kl(unembed, to_test, testing[layer])
                held_out.append(
                    {"layer": layer, "kl_ridge": ridge, "kl_logit": logit, "penalty": best[1]}
                )
                solve(1)
    used = fit.shape[0] * (fit.shape[1] - 1)
    about = {
        "format": FORMAT,
        "model": {"id": model.id, "sha256": weights_sha256(model.module)},
        "text": shown | {"tokens": len(ids)},
        "fit_positions": used,
        "held_out_positions": len(testing[n]),
        "window": window,
        "held_out": held_out,
        "versions": {"torch": torch.__version__},
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "wall_time_s": round(time.perf_counter() - started, 1),
    }
    if used < 10 * d:
        about["note"] = f"fitted on {used} positions for {d} coordinates: give more text"
    lens = RidgeLens(A, b, about)
    if keep:
        lens.save(lens_path(about["model"]["sha256"]))
    return lens


@torch.no_grad()
def held_out_kl(
    model: Model, lens: RidgeLens, text: str | Int[Tensor, " tokens"], *, window: int = 128
) -> pd.DataFrame:
    """Mean KL(final ‖ lens), nats, of both lenses on another text: one row a layer.

    At most 512 positions, spread evenly over the text; never the first of a window.
    """
    unembed = Unembedding(model)
    windows = _windows(model, _token_stream(model, text, "")[0], window)
    n, rows = model.n_layers, []
    if len(windows) > TESTING_ROWS // 8:
        windows = windows[:: len(windows) // (TESTING_ROWS // 8)]
    seen = _some_rows(model, windows, range(n), TESTING_ROWS, lambda _: None)
    wanted = unembed(seen[n])
    for layer in range(n):
        ridge = _mean_kl(unembed, wanted, lens(seen[layer], layer))
        logit = _mean_kl(unembed, wanted, seen[layer])
        rows.append({"layer": layer, "kl_ridge": ridge, "kl_logit": logit})
    return pd.DataFrame(rows)


class Moments:
    """Sums over positions of x, y, xᵀx and xᵀy for every layer, in float64; y is the final residual.

    >>> x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double()
    >>> moments = Moments(4, [0])
    >>> moments.add({0: x, 1: 2 * x + 1})
    >>> A, b = moments.solve(0, penalty=0)
    >>> torch.allclose(A, 2 * torch.eye(4)), torch.allclose(b, torch.ones(4))
    (True, True)
    """

    def __init__(self, d_model: int, layers: Sequence[int]):
        self.n, self.y, self._d = 0, torch.zeros(d_model).double(), d_model
        self.x = {layer: torch.zeros(d_model).double() for layer in layers}
        self.xx = {layer: torch.zeros(d_model, d_model).double() for layer in layers}
        self.xy = {layer: torch.zeros(d_model, d_model).double() for layer in layers}

    def add(self, residuals: Mapping[int, Float[Tensor, "rows d_model"]]) -> None:
        """Take in rows of every layer; the highest key holds the final residual."""
        y = residuals[max(residuals)].double().cpu()
        self.n += len(y)
        self.y += y.sum(0)
        for layer in self.x:
            x = residuals[layer].double().cpu()
            self.x[layer] += x.sum(0)
            self.xx[layer].addmm_(x.T, x)
            self.xy[layer].addmm_(x.T, y)

    def solve(self, layer: int, penalty: float) -> tuple[Tensor, Tensor]:
        """(A, b) in float32 of y ≈ x A + b with ridge `penalty`, shrunk towards A = I."""
        mean_x, mean_y = self.x[layer] / self.n, self.y / self.n
        xx = self.xx[layer] / self.n - torch.outer(mean_x, mean_x)
        xy = self.xy[layer] / self.n - torch.outer(mean_x, mean_y)
        # In units of each coordinate's deviation; one that never varies (but for rounding) keeps Δ = 0.
        spread, size = xx.diagonal(), self.xx[layer].diagonal() / self.n
        still = spread <= 1e-10 * size
        unit = torch.where(still, 1.0, spread).sqrt()
        gram = xx / unit[:, None] / unit + torch.diag(still + penalty + 1e-12)
        wanted = torch.where(still[:, None], 0.0, (xy - xx) / unit[:, None])
        delta = torch.linalg.solve(gram, wanted) / unit[:, None]
        A = delta + torch.eye(self._d, dtype=torch.float64)
        return A.float(), (mean_y - mean_x @ A).float()


def affine(x: Float[Tensor, "*rows d_model"], A: Tensor, b: Tensor) -> Tensor:
    """x A + b in float32, on x's device."""
    return x.float() @ A.to(x.device) + b.to(x.device)


def _mean_kl(unembed: Unembedding, wanted: Tensor, residual: Tensor) -> float:
    """Mean KL in nats of the distributions `wanted` (as logits) to those of `residual`."""
    return float(kl(wanted, unembed(residual)).mean())


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
    model: Model, windows: Tensor, layers: Sequence[int], n: int, advance: Callable[[int], None]
) -> dict[int, Tensor]:
    """At most n positions of these windows, evenly spread: by layer [rows d_model]."""
    step = max(1, len(windows) * (windows.shape[1] - 1) // n)
    kept: dict[int, list[Tensor]] = {}
    done = 0

    def take(seen: dict[int, Tensor]) -> None:
        nonlocal done
        for layer, x in seen.items():
            kept.setdefault(layer, []).append(x[-done % step :: step].clone())
        done += len(x)

    _stream(model, windows, layers, take, advance)
    return {layer: torch.cat(parts)[:n] for layer, parts in kept.items()}


def _token_stream(
    model: Model, text: str | Tensor | None, name: str
) -> tuple[Tensor, dict[str, Any]]:
    """Token ids of the text and how reports call it."""
    if isinstance(text, Tensor):
        digest = hashlib.sha256(text.cpu().numpy().tobytes()).hexdigest()
        return text.flatten().long(), {"name": name or "token ids", "sha256": digest}
    if model.tokenizer is None:
        raise BadInput(
            f"{model.id} was loaded without a tokenizer: pass text= as token ids, or load with tokenizer="
        )
    shown = name or ("the shipped prose" if text is None else "text of the caller")
    text = prose() if text is None else text
    ids = torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids.long(), {"name": shown, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _windows(model: Model, ids: Tensor, window: int) -> Int[Tensor, "n pos"]:
    lead = lead_token(model)
    width = min(window, (model.spec.n_ctx or window + 1) - len(lead))
    if window < 2 or len(ids) < MIN_WINDOWS * width:
        raise BadInput(
            f"the text has {len(ids)} tokens in windows of {window}; wanted at least {MIN_WINDOWS} "
            "windows of 2 or more tokens: give more text"
        )
    rows = ids[: len(ids) // width * width].reshape(-1, width)
    return torch.cat([lead.expand(len(rows), -1), rows], dim=1)


def _parts(windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Consecutive parts to fit on (80 %), choose on and test on (10 % each), one window apart."""
    tenth = max(2, len(windows) // 10)
    return windows[: -2 * tenth], windows[-2 * tenth + 1 : -tenth], windows[-tenth + 1 :]
