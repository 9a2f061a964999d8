"""SAE: one module for every kind of sparse autoencoder; a kind is a function from inputs to latents.

    f = activation(W_enc (x − b_dec) + b_enc),   x̂ = f W_dec + b_dec

Kinds: "relu" (L1), "gated", "topk", "batchtopk" and "jumprelu"; a Matryoshka SAE is a topk or batchtopk
one whose first latents were trained to do alone (`prefixes`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.data.activations import site_shape
from interp.errors import BadInput, Refused, unknown
from interp.models.load import model_sha256
from interp.models.model import Model
from interp.sites import Site
from probes.saes.sparse import Codes, decode, top_k

UNIT_NORM = 1e-8
"""Smallest norm that a decoder row is divided by."""


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is and what it was trained on.

    Attributes:
        d_in, d_sae: widths of the input and of the latents.
        activation: a name in `ACTIVATIONS`.
        k: active latents a row: exactly ("topk"), on average ("batchtopk"), or aimed at ("jumprelu").
        prefixes: widths of the nested dictionaries of a Matryoshka SAE, the last one d_sae.
        centre: whether b_dec is subtracted from the input.
        site: such as "z.12". heads: how many heads lie side by side in a row (0: none, or not known).
        model, sha256: of the model it was trained on; "" where that is not known.
    """

    d_in: int
    d_sae: int
    activation: str = "topk"
    k: int | None = None
    prefixes: tuple[int, ...] = ()
    centre: bool = True
    site: str = ""
    heads: int = 0
    model: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise unknown("SAE activation", self.activation, ACTIVATIONS)
        if self.d_in < 1 or self.d_sae < 1:
            raise BadInput(f"d_in={self.d_in}, d_sae={self.d_sae}: both must be at least 1")
        if self.activation in ("topk", "batchtopk") and self.k is None:
            raise BadInput(f"activation '{self.activation}' needs k, the number of active latents")
        if self.k is not None and not 1 <= self.k <= self.d_sae:
            raise BadInput(f"k={self.k} latents cannot be active of d_sae={self.d_sae}")
        if self.prefixes:
            if self.activation not in ("topk", "batchtopk"):
                raise BadInput(f"prefixes need 'topk' or 'batchtopk', not '{self.activation}'")
            if sorted({*self.prefixes}) != [*self.prefixes] or self.prefixes[0] < 1:
                raise BadInput(f"prefixes={list(self.prefixes)} must grow from at least 1")
            if self.prefixes[-1] != self.d_sae:
                raise BadInput(
                    f"the last of prefixes={list(self.prefixes)} must be d_sae={self.d_sae}"
                )


class SAE(nn.Module):
    """A sparse autoencoder. Rows may have any leading axes: [..., d_in].

    Parameters: `encoder` and `W_dec` [d_sae d_in] (`W_enc` is the encoder as the field writes it,
    [d_in d_sae]), `b_enc` [d_sae], `b_dec` [d_in]; `threshold` [d_sae] for jumprelu and batchtopk;
    `r_mag` and `b_mag` [d_sae] for gated, whose gate has the bias `b_enc`.

    >>> sae = SAE(SAEConfig(d_in=8, d_sae=32, k=4))
    >>> x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    >>> f = sae.encode(x)
    >>> f.shape, int((f != 0).sum(-1).max())
    (torch.Size([2, 5, 32]), 4)
    >>> torch.allclose(sae.decode(f), sae(x), atol=1e-6)
    True
    """

    def __init__(self, config: SAEConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        self._compared: tuple = ()
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(config.d_sae, config.d_in, generator=generator)
        self.W_dec = nn.Parameter(nn.functional.normalize(directions))
        self.encoder = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        if config.activation in ("jumprelu", "batchtopk"):
            learnt = config.activation == "jumprelu"
            self.threshold = nn.Parameter(torch.zeros(config.d_sae), requires_grad=learnt)
        if config.activation == "gated":
            self.r_mag = nn.Parameter(torch.zeros(config.d_sae))
            self.b_mag = nn.Parameter(torch.zeros(config.d_sae))

    def extra_repr(self) -> str:
        c = self.config
        return f"{c.d_in} → {c.d_sae}, {c.activation}, k={c.k}, site={c.site or '?'}"

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """The encoder as the field writes it; a view."""
        return self.encoder.T

    def centred(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        """What the encoder multiplies: x − b_dec, or x where the SAE does not centre."""
        x = x.to(self.encoder.dtype)
        return x - self.b_dec if self.config.centre else x

    def pre_activations(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]:
        """W_enc (x − b_dec) + b_enc."""
        return nn.functional.linear(self.centred(x), self.encoder, self.b_enc)

    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]:
        """The latents, zeros included."""
        return ACTIVATIONS[self.config.activation](self, x)

    def codes(self, x: Float[Tensor, "rows d_in"]) -> Codes:
        """The active latents alone; without gradients."""
        with torch.no_grad():
            if self.config.activation == "topk":
                assert self.config.k is not None
                return top_k(self.centred(x), self.encoder, self.b_enc, self.config.k)
            return Codes.of_dense(self.encode(x))

    def decode(self, f: Float[Tensor, "*rows d_sae"] | Codes) -> Float[Tensor, "*rows d_in"]:
        """f W_dec + b_dec, of dense latents or of codes."""
        if isinstance(f, Codes):
            return decode(f, self.W_dec) + self.b_dec
        return f @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        """The reconstruction of x."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Divide every decoder row by its norm; what the SAE does changes."""
        norm = torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True)
        self.W_dec.div_(norm.clamp_min(UNIT_NORM))

    @torch.no_grad()
    def fold_decoder_norms(self) -> None:
        """Unit decoder rows with the same reconstruction: latents take the norms up.

        Not for topk and batchtopk, where larger latents would be chosen differently.
        """
        if self.config.activation in ("topk", "batchtopk"):
            raise BadInput(
                f"folding decoder norms changes which latents of a '{self.config.activation}' SAE are active"
            )
        norm = torch.linalg.vector_norm(self.W_dec, dim=1).clamp_min(UNIT_NORM)
        self.W_dec.div_(norm[:, None])
        self.encoder.mul_(norm[:, None])
        for name in ("b_enc", "b_mag", "threshold"):
            if hasattr(self, name):
                getattr(self, name).mul_(norm)

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        """Make an SAE of scaled inputs one of the inputs themselves: afterwards sae(x) = sae(scale · x) / scale.

        All kinds are homogeneous in the input and their biases together, so biases and thresholds
        are divided and no weight changes; latents come out divided by the scale.
        """
        for name in ("b_enc", "b_dec", "b_mag", "threshold"):
            if hasattr(self, name):
                getattr(self, name).div_(scale)

    def site(self, model: Model) -> Site:
        """The site of `model` that this SAE reads, after comparing width, heads and weights.

        Raises:
            BadInput: the SAE is of another model or another site, or does not say its site.
        """
        c = self.config
        if not c.site:
            raise BadInput("this SAE does not say its site: load it with site=, such as 'z.12'")
        site = Site.parse(c.site)
        if site.layer is None or site.layer >= model.n_layers:
            raise BadInput(
                f"this SAE is of '{c.site}'; {model.id} has layers 0 to {model.n_layers - 1}"
            )
        if site.layer not in model.layers_with(site.name):
            raise Refused(f"{model.id} has no '{c.site}', which this SAE reads")
        width, heads = site_shape(model, site)
        if c.d_in != width or c.heads not in (0, heads):
            of = f" of {c.heads} heads" if c.heads else ""
            raise BadInput(
                f"this SAE reads {c.d_in} numbers{of} at '{c.site}' of {c.model or 'some model'}; "
                f"{model.id} has {width}{f' of {heads} heads' if heads else ''} there: the SAE is of "
                "another model or site"
            )
        if self.encoder.device != model.device:
            raise BadInput(
                f"this SAE is on {self.encoder.device}, {model.id} on {model.device}: move it with "
                "sae.to(model.device)"
            )
        # Every edit asks; all weights are read once, and again when one was replaced or written to.
        weights = ((w.data_ptr(), w._version) for w in model.module.parameters())
        stamp = (model.spec.stack, *weights)
        if c.sha256 and stamp != self._compared:
            found = model_sha256(model)
            if c.sha256 != found:
                raise BadInput(
                    f"this SAE was trained on {c.model or 'a model'} with weights {c.sha256[:16]}, "
                    f"{model.id} has {found[:16]}: load the model it was trained on"
                )
            self._compared = stamp
        return site


# --- the kinds: dense latents of rows --------------------------------------------------------------


def _relu(sae: SAE, x: Tensor) -> Tensor:
    """max(0, pre)."""
    return sae.pre_activations(x).relu()


def _top_k(sae: SAE, x: Tensor) -> Tensor:
    """The k largest pre-activations of a row that are above zero."""
    pre = sae.pre_activations(x)
    best = pre.topk(sae.config.k or 1, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())


def _jump_relu(sae: SAE, x: Tensor) -> Tensor:
    """pre where it is above the threshold. A trained batchtopk SAE is one with a single threshold."""
    pre = sae.pre_activations(x)
    return pre.relu() * (pre > sae.threshold)


def _gated(sae: SAE, x: Tensor) -> Tensor:
    """The gate W_enc x + b_enc > 0 opens a magnitude max(0, exp(r_mag) W_enc x + b_mag)."""
    product = sae.centred(x) @ sae.W_enc
    return (product * sae.r_mag.exp() + sae.b_mag).relu() * (product + sae.b_enc > 0)


ACTIVATIONS: dict[str, Callable[[SAE, Tensor], Tensor]] = {
    "relu": _relu,
    "gated": _gated,
    "topk": _top_k,
    "batchtopk": _jump_relu,
    "jumprelu": _jump_relu,
}
"""Latents of inputs, by the kind's name: what an SAE does once trained."""
