"""The Attention Lens: per head an affine map of its z to the final residual."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.affine_lens import load_maps, save_maps
from interp.errors import BadInput
from interp.models.model import Model


@dataclass(frozen=True, eq=False)
class HeadLens:
    """h_L ≈ z_h A_h + b_h for every head h of some layers.

    Attributes:
        A: [n_layers n_heads d_head d_model]; None for a low rank, h_L ≈ z_h U_h V_h + b_h.
        b: [n_layers n_heads d_model].
        about: the model, its hash, the text, how it was trained; "layers" are those of the first axis.
    """

    A: Float[Tensor, "n_layers n_heads d_head d_model"] | None
    b: Float[Tensor, "n_layers n_heads d_model"]
    about: dict[str, Any]
    U: Float[Tensor, "n_layers n_heads d_head rank"] | None = None
    V: Float[Tensor, "n_layers n_heads rank d_model"] | None = None

    def __call__(
        self, z: Float[Tensor, "*rows n_heads d_head"], layer: int
    ) -> Float[Tensor, "*rows n_heads d_model"]:
        """The final residual that each head's z alone predicts; read it with `interp.lens.read`."""
        layers = self.about["layers"]
        if layer not in layers:
            raise BadInput(f"this lens has no heads of layer {layer}: it has layers {layers}")
        i, z = layers.index(layer), z.float()
        if self.A is not None:
            y = torch.einsum("...hd,hdm->...hm", z, self.A[i].to(z.device))
        else:
            assert self.U is not None and self.V is not None
            hidden = torch.einsum("...hd,hdr->...hr", z, self.U[i].to(z.device))
            y = torch.einsum("...hr,hrm->...hm", hidden, self.V[i].to(z.device))
        return y + self.b[i].to(z.device)

    @property
    def held_out(self) -> pd.DataFrame:
        """One row a (kind of text, layer, head): KL(final ‖ lens), nats."""
        return pd.DataFrame(self.about["held_out"])

    def save(self, path: Path) -> None:
        """Write the lens as one safetensors file, whole or not at all."""
        save_maps(path, {"A": self.A, "b": self.b, "U": self.U, "V": self.V}, self.about)

    @staticmethod
    def load(path: Path, model: Model) -> HeadLens:
        """A saved lens; BadInput if it is damaged, of other weights, or of layers."""
        tensors, about = load_maps(path, model)
        if about.get("kind") != "attention":
            raise BadInput(f"{path} is a {about.get('kind')} lens of layers: load it as AffineLens")
        return HeadLens(tensors.get("A"), tensors["b"], about, tensors.get("U"), tensors.get("V"))
