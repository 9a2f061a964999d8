"""Affine lenses from any layer's residual stream to the final one, and the ridge lens in closed form.

The logit lens unembeds an early residual as if it were the final one, and is far off in most models.
The best affine map h_l → h_L in squared error needs only Xᵀ X and Xᵀ Y of one pass over some text: no
gradients, no stored activations. It is fitted once a model and kept in the user's cache. A tuned lens
(`probes.lenses`) is the same map trained on by gradients, kept in the same place and read in the same way.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from interp.data.english import Document, documents, recipe
from interp.data.prompts import lead_token
from interp.errors import BadInput
from interp.metrics import kl
from interp.models.load import weights_sha256
from interp.models.model import Model
from interp.models.sources.embedded import cache_folder
from interp.quiet_direction import quiet_direction
from interp.run.files import write_atomically
from interp.run.progress import Progress
from interp.unembedding import Unembedding

FORMAT = 3
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Ridge penalties tried for every layer, in units of each coordinate's own variance."""
STRETCHES = (1.0, 1.3, 1.6)
"""Factors tried for every layer on a prediction's distance from the mean final residual."""
QUIETS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Lengths along the quiet direction tried for every layer, in units of the final residual's mean length."""

TOKENS_PER_FORWARD = 1024
STATISTICS_BYTES = 4 << 30
"""Memory for Xᵀ X and Xᵀ Y; a model that needs more is fitted in several passes, some layers in each."""

MIN_WINDOWS = 10
CHOOSING_ROWS, TESTING_ROWS, ROWS_PER_WINDOW = 256, 1024, 16
FIT_TOKENS = 40_000
"""How much of the text at hand a lens is fitted on; a caller's own text is used whole."""
SHARED_WORDS = 8
MOST_SHARED = 0.1
"""A text to test on is left out if more than this share of its 8-word sequences was fitted on."""
_log = logging.getLogger("interp")


@dataclass(frozen=True, eq=False)
class AffineLens:
    """h_L ≈ h_l A_l + b_l for the input h_l of every block l.

    Attributes:
        A: [n_layers d_model d_model]; None for a lens of low rank, h_L ≈ h_l + h_l U_l V_l + b_l.
        b: [n_layers d_model]. U: [n_layers d_model rank]. V: [n_layers rank d_model].
        about: kind ("ridge": least squares, "tuned": trained on the KL), model id and weights hash,
            text, numbers of tokens, and for every layer the held-out KL (nats) of this lens and of
            the simpler ones. Layers that were left out have A = I: the logit lens.
    """

    A: Float[Tensor, "n_layers d_model d_model"] | None
    b: Float[Tensor, "n_layers d_model"]
    about: dict[str, Any]
    U: Float[Tensor, "n_layers d_model rank"] | None = None
    V: Float[Tensor, "n_layers rank d_model"] | None = None

    def __call__(
        self, residual: Float[Tensor, "*rows d_model"], layer: int
    ) -> Float[Tensor, "*rows d_model"]:
        """The final residual predicted from `resid_pre.<layer>`; at layer n_layers, the final one, itself."""
        if layer == len(self.b):
            return residual
        if self.A is not None:
            return affine(residual, self.A[layer], self.b[layer])
        assert self.U is not None and self.V is not None
        x = residual.float()
        return x + affine(x @ self.U[layer].to(x.device), self.V[layer], self.b[layer])

    @property
    def kind(self) -> str:
        """ "ridge" or "tuned"."""
        return self.about.get("kind", "ridge")

    @property
    def held_out(self) -> pd.DataFrame:
        """One row a (kind of text, layer): KL(final ‖ lens), nats, on documents it was not fitted on."""
        return pd.DataFrame(self.about["held_out"])

    def save(self, path: Path) -> None:
        """Write the lens as one safetensors file, whole or not at all."""
        tensors = {"A": self.A, "b": self.b, "U": self.U, "V": self.V}
        save_maps(path, {name: x for name, x in tensors.items() if x is not None}, self.about)

    @staticmethod
    def load(path: Path, model: Model, sha256: str | None = None) -> AffineLens:
        """A saved lens; BadInput if it is damaged or was fitted on other weights than `model`'s."""
        tensors, about = load_maps(path, model, sha256)
        if tensors["b"].shape != (model.n_layers, model.spec.d_model):
            raise BadInput(
                f"{path} is no lens of residual streams: its b is {list(tensors['b'].shape)}"
            )
        return AffineLens(tensors.get("A"), tensors["b"], about, tensors.get("U"), tensors.get("V"))


def save_maps(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a lens's tensors and what is known about them as one safetensors file, or nothing."""
    plain = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    write_atomically(path, save(plain, {"about": json.dumps(about)}))


def load_maps(
    path: Path, model: Model, sha256: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, about) of a saved lens of this model's weights.

    Raises:
        BadInput: no such file, a damaged one, or a lens of other weights (says of which).
    """
    again = "fit it again with interp.ridge_lens.fit_ridge_lens(model) or probes.lenses.tune_lens(model)"
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if "b" not in tensors:
            raise KeyError("b")
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
    return tensors, about


def lens_path(sha256: str, text: str, kind: str = "ridge") -> Path:
    """Where the lens of the weights with this hash is kept that was fitted on the text with that one.

    The text at hand goes by its recipe (`interp.data.english.recipe`): a new one makes a new lens, a
    new version of an installed package does not.
    """
    return cache_folder() / "lenses" / sha256[:16] / f"{kind}-{text[:16]}.safetensors"


def cached_lens(model: Model, kind: str = "ridge", sha256: str | None = None) -> AffineLens | None:
    """The latest lens of a kind fitted on these weights, on a caller's text or on today's text at hand.

    None if there is none that is sound.
    """
    sha256 = sha256 or weights_sha256(model.module)
    folder = lens_path(sha256, "").parent
    paths = sorted(folder.glob(f"{kind}-*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    for path in reversed(paths):
        try:
            lens = AffineLens.load(path, model, sha256)
        except BadInput as error:
            _log.warning("%s", error)
            continue
        if lens.about["text"]["recipe"] in (None, recipe()):
            return lens
        _log.info("%s was fitted on an earlier choice of text", path)
    return None


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
        "model": {"id": model.id, "sha256": weights_sha256(model.module)},
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
    windows = _one_text(model, _ids_of(model, text), window)
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


def affine(x: Float[Tensor, "*rows d_model"], A: Tensor, b: Tensor) -> Tensor:
    """x A + b in float32, on x's device."""
    return x.float() @ A.to(x.device) + b.to(x.device)


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


# --- text: what is fitted on, chosen on and tested on -------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Token windows [n pos]: to fit on, and by kind of text to choose and to test on."""

    fit: Tensor
    choose: dict[str, Tensor]
    test: dict[str, Tensor]


def parts_of(
    model: Model, text: str | Tensor | None, name: str, window: int
) -> tuple[Parts, dict[str, Any]]:
    """The parts of a caller's text or of the English at hand, and how reports call it."""
    if text is not None:
        ids = _ids_of(model, text)
        fit, choose, test = _consecutive(_one_text(model, ids, window))
        kind = name or ("token ids" if isinstance(text, Tensor) else "text of the caller")
        content = text.encode() if isinstance(text, str) else text.cpu().numpy().tobytes()
        shown = {"name": kind, "sha256": hashlib.sha256(content).hexdigest(), "recipe": None}
        return (
            Parts(fit, {kind: evenly(choose, CHOOSING_ROWS)}, {kind: evenly(test, TESTING_ROWS)}),
            shown | {"tokens": len(ids)},
        )
    _require_tokenizer(model)
    found = documents()
    digest = hashlib.sha256("\n\n".join(document.text for document in found).encode())
    parts = _held_out_by_document(model, found, window)
    shown = {
        "name": name or "English at hand: " + ", ".join(parts.test),
        "sha256": digest.hexdigest(),
        "recipe": recipe(),
        "documents": len(found),
    }
    return parts, shown | {"tokens": parts.fit.numel()}


def _held_out_by_document(model: Model, found: Sequence[Document], window: int) -> Parts:
    """Of every kind, one document in eight to choose on and one to test on; the others to fit on."""
    roles: dict[str, dict[str, list[Document]]] = {"fit": {}, "choose": {}, "test": {}}
    counted: dict[str, int] = {}
    for document in found:
        i = counted[document.kind] = counted.get(document.kind, -1) + 1
        role = {3: "choose", 7: "test"}.get(i % 8, "fit")
        roles[role].setdefault(document.kind, []).append(document)
    fitted = {s for group in roles["fit"].values() for doc in group for s in _sequences(doc.text)}
    kinds = len(roles["fit"])
    parts: dict[str, dict[str, Tensor]] = {}
    for role, rows in (("choose", CHOOSING_ROWS), ("test", TESTING_ROWS)):
        parts[role] = {}
        for kind, group in roles[role].items():
            fresh = [doc for doc in group if role == "choose" or not _known(doc.text, fitted)]
            windows = _windows(model, [doc.text for doc in fresh], window)
            if len(windows):
                parts[role][kind] = evenly(windows, rows // kinds)
    texts = [doc.text for group in roles["fit"].values() for doc in group]
    fit = _windows(model, texts, window)
    if len(fit) < MIN_WINDOWS or not parts["choose"] or not parts["test"]:
        raise BadInput(f"only {len(fit)} windows of text are at hand: pass text=")
    return Parts(evenly(fit, FIT_TOKENS, each=fit.shape[1] - 1), parts["choose"], parts["test"])


def _sequences(text: str) -> set[int]:
    """Every run of SHARED_WORDS words, as a number."""
    words = text.split()
    return {hash(tuple(words[i : i + SHARED_WORDS])) for i in range(len(words) - SHARED_WORDS + 1)}


def _known(text: str, fitted: set[int]) -> bool:
    """Whether much of a text (boilerplate, a licence in another copy) was fitted on."""
    own = _sequences(text)
    return len(own & fitted) > MOST_SHARED * len(own)


def evenly(windows: Tensor, rows: int, each: int = ROWS_PER_WINDOW) -> Tensor:
    """Evenly spread windows, as many as give `rows` rows with `each` from a window."""
    wanted = max(1, rows // each)
    if len(windows) <= wanted:
        return windows
    return windows[torch.linspace(0, len(windows) - 1, wanted).long()]


def _require_tokenizer(model: Model) -> None:
    if model.tokenizer is None:
        raise BadInput(
            f"{model.id} was loaded without a tokenizer: pass text= as token ids, or load with tokenizer="
        )


def _ids_of(model: Model, text: str | Tensor) -> Int[Tensor, " tokens"]:
    if isinstance(text, Tensor):
        return text.flatten().long().cpu()
    _require_tokenizer(model)
    return torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"]).long()


def _windows(model: Model, texts: Sequence[str], window: int) -> Int[Tensor, "n pos"]:
    """All whole windows of these texts, none across two of them."""
    rows = [_rows_of(model, _ids_of(model, text), window) for text in texts]
    return torch.cat(rows) if rows else torch.empty(0, window, dtype=torch.long)


def _one_text(model: Model, ids: Tensor, window: int) -> Int[Tensor, "n pos"]:
    """The windows of one text, enough to be split."""
    rows = _rows_of(model, ids, window)
    if len(rows) < MIN_WINDOWS:
        raise BadInput(
            f"the text has {len(ids)} tokens in windows of {window}; wanted at least {MIN_WINDOWS} "
            "windows of 2 or more tokens: give more text"
        )
    return rows


def _rows_of(model: Model, ids: Tensor, window: int) -> Int[Tensor, "n pos"]:
    """Consecutive windows of the ids, each behind the lead token."""
    lead = lead_token(model)
    width = min(window, (model.spec.n_ctx or window + 1) - len(lead))
    if width < 2:
        raise BadInput(f"window={window}: wanted 2 or more tokens")
    rows = ids[: len(ids) // width * width].reshape(-1, width)
    return torch.cat([lead.expand(len(rows), -1), rows], dim=1)


def _consecutive(windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Consecutive parts to fit on (80 %), choose on and test on (10 % each), one window apart."""
    tenth = max(2, len(windows) // 10)
    return windows[: -2 * tenth], windows[-2 * tenth + 1 : -tenth], windows[-tenth + 1 :]
