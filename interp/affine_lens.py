"""Affine lenses from any layer's residual stream to the final one, their files, and the user's cache of them.

The ridge lens (`interp.ridge_lens`, least squares) and the tuned lens (`probes.lenses`, trained on the KL)
are such maps, kept in the same place and read in the same way.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from interp.data.english import recipe
from interp.errors import BadInput
from interp.models.load import model_sha256
from interp.models.model import Model
from interp.models.sources.embedded import cache_folder
from interp.run.files import write_atomically

FORMAT = 3
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
        save_maps(path, {"A": self.A, "b": self.b, "U": self.U, "V": self.V}, self.about)

    @staticmethod
    def load(path: Path, model: Model, sha256: str | None = None) -> AffineLens:
        """A saved lens; BadInput if it is damaged or was fitted on other weights than `model`'s."""
        tensors, about = load_maps(path, model, sha256)
        if tensors["b"].shape != (model.n_layers, model.spec.d_model):
            raise BadInput(
                f"{path} is no lens of residual streams: its b is {list(tensors['b'].shape)}"
            )
        return AffineLens(tensors.get("A"), tensors["b"], about, tensors.get("U"), tensors.get("V"))


def save_maps(path: Path, tensors: Mapping[str, Tensor | None], about: Mapping[str, Any]) -> None:
    """Write what a lens has of these and what is known about it as one safetensors file, or nothing."""
    plain = {name: x.detach().cpu().contiguous() for name, x in tensors.items() if x is not None}
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
    wanted = sha256 or model_sha256(model)
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
    sha256 = sha256 or model_sha256(model)
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


def affine(x: Float[Tensor, "*rows d_model"], A: Tensor, b: Tensor) -> Tensor:
    """x A + b in float32, on x's device."""
    return x.float() @ A.to(x.device) + b.to(x.device)
