"""Who writes the residual stream and who reads it: the linear maps on both sides of every head.

A head writes z_h W_O^h. It reads q, k and v from columns of linear layers that read the normed stream
(`circuits.reads` finds them). Where a head's q depends on more than its own columns (a norm over all heads,
latent attention) the layer is marked as not `split`, and callers run the block itself on every receiver's
input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuits.graph import Graph
from interp.errors import Refused
from interp.models.calls import at_home
from interp.models.model import Model
from interp.models.weights import FrozenNorm, linear_map

KINDS = ("q", "k", "v")


# --- norms in closed form -----------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """norm(x) = gain · c(x) / σ(x) + bias with σ(x)² = mean c(x)² + eps; c takes out the mean, or nothing.

    With `live=False` there is no norm: σ = 1.
    """

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool
    eps: float
    live: bool = True

    @staticmethod
    @torch.no_grad()
    def of(module: nn.Module | None, d_model: int, device: torch.device) -> Norm:
        """The norm that a module computes; whether it has this form is for the caller to verify."""
        frozen = FrozenNorm(module, d_model, device)
        if module is None:
            return Norm(frozen.gain, frozen.bias, False, 0.0, live=False)
        small = 1e-3
        sign = torch.ones_like(frozen.gain)
        sign[1::2] = -1
        inner = (frozen.gain * sign).cpu().double() * small
        made = (at_home(module, sign[None] * small)[0] - frozen.bias).cpu().double()
        # At mean square small² the norm multiplies by ratio · gain, with ratio² = 1 / (small² + eps).
        ratio = float((inner * made).sum() / (inner * inner).sum()) ** 2
        # A module that keeps its input's size would pass for a norm with a huge epsilon.
        eps = 1 / ratio - small**2 if ratio > 1 else 0.0
        return Norm(frozen.gain.float(), frozen.bias.float(), frozen.centred, max(eps, 0.0))

    def centre(self, x: Tensor) -> Tensor:
        """x less its mean, where the norm takes it out."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def sigma(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows"]:
        """σ(x) of every row; 1 where there is no norm."""
        if not self.live:
            return torch.ones_like(x[..., 0])
        if self.centred:
            return (x.var(-1, correction=0) + self.eps).sqrt()
        square = torch.linalg.vector_norm(x, dim=-1).square() / x.shape[-1]
        return (square + self.eps).sqrt()

    def __call__(self, x: Tensor) -> Tensor:
        """norm(x)."""
        return self.gain * self.centre(x) / self.sigma(x)[..., None] + self.bias


# --- readers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """q, k or v of a layer's heads before positions are applied: columns of a linear layer's output.

    columns: [heads width], heads being kv heads for k and v. width: of the whole output.
    """

    module: str
    columns: Int[Tensor, "heads width"]
    width: int


@dataclass(frozen=True)
class Reads:
    """How the heads and the MLP of one block read the residual stream.

    Attributes:
        norm: what stands between the stream and q, k and v.
        projections: of "q", "k", "v"; empty where the layer could not be split (see `why`).
        mlp_entries: modules whose first input is the MLP's: the stream itself, or `mlp_norm` of it.
        why: the reason for what is not split.
    """

    norm: Norm | None = None
    projections: dict[str, Projection] = field(default_factory=dict)
    mlp_entries: tuple[str, ...] = ()
    mlp_norm: str | None = None
    why: str = ""

    @property
    def split(self) -> bool:
        """Whether every head's q, k and v come from columns of their own."""
        return bool(self.projections)


def own_columns(
    x: Tensor, columns: Int[Tensor, "heads width"]
) -> Float[Tensor, "*rows heads width"]:
    """The columns of each head; without a copy where heads lie side by side."""
    first, n = int(columns[0, 0]), columns.numel()
    if torch.equal(columns.reshape(-1), torch.arange(first, first + n)):
        return x[..., first : first + n].unflatten(-1, tuple(columns.shape))
    return x[..., columns.to(x.device)]


def _folded(model: Model, reads: Reads, kind: str) -> tuple[Tensor, Tensor]:
    projection = reads.projections[kind]
    linear = model.module.get_submodule(projection.module)
    W, b = linear_map(linear, model.spec.d_model, model.device)
    return W.float(), b.float()


def head_weights(model: Model, reads: Reads, kind: str) -> Float[Tensor, "heads d_model width"]:
    """W with leaf output = (x @ W) / σ(x) + `head_bias`: the norm's gain and centring are folded in."""
    assert reads.norm is not None
    W, _ = _folded(model, reads, kind)
    W = own_columns(reads.norm.gain.to(W)[:, None] * W, reads.projections[kind].columns)
    if reads.norm.centred:
        W = W - W.mean(0)
    return W.transpose(0, 1)


def head_bias(model: Model, reads: Reads, kind: str) -> Float[Tensor, "heads width"]:
    """What the linear layer adds to each head's columns whatever the stream is."""
    assert reads.norm is not None
    W, b = _folded(model, reads, kind)
    return own_columns(reads.norm.bias.to(W) @ W + b, reads.projections[kind].columns)


# --- writers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadWrites:
    """What each head of a layer adds to the stream: (z_h W_h + share) / σ, σ = 1 without a post-norm.

    With a norm after attention its scale σ is that of the whole attention output in the same run, so
    the heads' parts and `constant` sum to what is written; `share` is then each head's part of W_O's
    bias. `constant` is what the layer's attention writes whatever its heads do.
    """

    W: Float[Tensor, "heads d_head d_model"]
    share: Float[Tensor, " d_model"]
    constant: Float[Tensor, " d_model"]
    norm: Norm | None

    def parts(
        self,
        z: Float[Tensor, "batch pos heads d_head"],
        sigma: Float[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "heads batch pos d_model"]:
        """Every head's write; `sigma` is the post-norm's scale, where there is one."""
        rows = z.float().permute(2, 0, 1, 3)
        if sigma is not None:
            rows = rows / sigma[..., None]
        flat = rows.reshape(len(rows), -1, rows.shape[-1])
        out = torch.bmm(flat, self.W).reshape(*rows.shape[:3], -1)
        return out if sigma is None else out + self.share / sigma[..., None]


@dataclass
class Writes:
    """What was written in one run, kept narrow: heads as z (and the scale of a norm after attention)."""

    embed: Float[Tensor, "batch pos d_model"]
    z: dict[int, Float[Tensor, "batch pos heads d_head"]] = field(default_factory=dict)
    sigma: dict[int, Float[Tensor, "batch pos"]] = field(default_factory=dict)
    mlp: dict[int, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict)

    def heads(self, writers: Mapping[int, HeadWrites], layer: int) -> Tensor:
        """Writes of one layer's heads [heads batch pos d_model]."""
        return writers[layer].parts(self.z[layer], self.sigma.get(layer))

    def zero(self) -> Writes:
        """Nothing written by anyone (the share of W_O's bias included)."""
        return Writes(
            torch.zeros_like(self.embed),
            {layer: torch.zeros_like(z) for layer, z in self.z.items()},
            {layer: torch.full_like(s, torch.inf) for layer, s in self.sigma.items()},
            {layer: torch.zeros_like(write) for layer, write in self.mlp.items()},
        )

    @staticmethod
    def mean(several: Sequence[Writes]) -> Writes:
        """Every sender's mean write over all rows, position by position; one row."""

        def over(values: list[Tensor]) -> Tensor:
            return torch.cat(values).float().mean(0, keepdim=True)

        layers, mlps = list(several[0].z), list(several[0].mlp)
        sigma = {
            layer: 1 / over([1 / each.sigma[layer] for each in several])
            for layer in several[0].sigma
        }
        z = {}
        for layer in layers:
            if layer in sigma:  # the mean of z / σ, which is what a write is linear in
                scaled = over(
                    [each.z[layer] / each.sigma[layer][..., None, None] for each in several]
                )
                z[layer] = scaled * sigma[layer][..., None, None]
            else:
                z[layer] = over([each.z[layer] for each in several])
        return Writes(
            over([each.embed for each in several]),
            z,
            sigma,
            {layer: over([each.mlp[layer] for each in several]) for layer in mlps},
        )

    def expand(self, n: int) -> Writes:
        """n copies of a single row."""

        def copies(values: dict[int, Tensor]) -> dict[int, Tensor]:
            return {layer: x.expand(n, *x.shape[1:]) for layer, x in values.items()}

        return Writes(
            self.embed.expand(n, *self.embed.shape[1:]),
            copies(self.z),
            copies(self.sigma),
            copies(self.mlp),
        )

    def less(
        self, other: Writes, graph: Graph, writers: Mapping[int, HeadWrites]
    ) -> Float[Tensor, "n_senders batch pos d_model"]:
        """Every sender's write here, minus its write in `other`."""
        out = torch.empty(graph.shape[0], *self.embed.shape, device=self.embed.device)
        torch.sub(self.embed, other.embed, out=out[0])
        for layer in sorted({*self.z, *self.mlp}):
            rows = graph.rows(layer)
            n_heads = self.z[layer].shape[2] if layer in self.z else 0
            if n_heads:
                heads = slice(rows.start, rows.start + n_heads)
                if layer in self.sigma:
                    out[heads] = self.heads(writers, layer) - other.heads(writers, layer)
                else:
                    out[heads] = writers[layer].parts(self.z[layer] - other.z[layer])
            if layer in self.mlp:
                torch.sub(self.mlp[layer], other.mlp[layer], out=out[rows.stop - 1])
        return out


def head_writers(model: Model, graph: Graph) -> dict[int, HeadWrites]:
    """By layer, the map from z to what each head writes.

    Raises: Refused: something other than a norm stands between attention and the stream.
    """
    return {
        layer: _head_writer(model, layer)
        for layer in sorted({s.layer for s in graph.senders if s.kind == "head"})
    }


def _head_writer(model: Model, layer: int) -> HeadWrites:
    block = model.spec.blocks[layer]
    assert block.attn_write is not None
    W = model.W_O(layer).float()
    if block.attn_write.scale != 1:
        W = W * block.attn_write.scale
    bias = model.b_O(layer).to(W) * block.attn_write.scale
    if block.direct:
        return HeadWrites(W, torch.zeros_like(bias), bias, None)
    module = model.module.get_submodule(block.attn_write.module)
    norm = Norm.of(module, model.spec.d_model, model.device)
    probe = torch.randn(8, model.spec.d_model, generator=torch.Generator().manual_seed(0)).to(W)
    with torch.no_grad():
        wanted = at_home(module, probe.to(model.dtype)).float()
        off = (norm(probe) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)
    if float(off) > rounding_of(model.dtype):
        raise Refused(
            f"layer {layer} of {model.id}: what stands between attention and the residual stream "
            f"('{block.attn_write.module}') is not a norm, so no head has a write of its own"
        )
    gain, scale = norm.gain.to(W), block.attn_write.scale
    share = norm.centre(bias) * gain / block.n_heads
    return HeadWrites(norm.centre(W) * gain, share, norm.bias.to(W) * scale, norm)


def rounding_of(dtype: torch.dtype) -> float:
    """Rounding of one projection and one norm, relative to the largest entry."""
    return {torch.float32: 2e-4, torch.float64: 2e-4}.get(dtype, 6e-2)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient, so that graphs keep no activations for them."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
