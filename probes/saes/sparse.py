"""Active latents of a batch, and products that cost what the active ones cost.

With k of d_sae latents active in a row, decoding is a weighted sum of k decoder rows, and neither
weight's gradient needs more than the active entries:

    x̂_b = Σ_j f_bj W_dec[j],   ∂/∂f_bj = g_b · W_dec[j],   ∂/∂W_dec[j] = Σ_b f_bj g_b,
    ∂/∂W_enc[j] = Σ_b (∂/∂f_bj) x_b          (j active in row b; g = ∂/∂x̂)

Sums over rows are made by sorting the entries by latent. Only the encoder's product stays dense: it
is what tells which latents are active.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

ROWS_AT_ONCE = 512
"""Rows of pre-activations that exist at once while active latents are looked for."""


@dataclass(frozen=True, eq=False)
class Codes:
    """Active latents of rows: row b has entries `starts[b]:starts[b + 1]` of `latent` and `value`.

    >>> codes = Codes.of_dense(torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 4.0]]))
    >>> codes.latent.tolist(), codes.value.tolist(), codes.starts.tolist()
    ([1, 0, 2], [2.0, 3.0, 4.0], [0, 1, 3])
    >>> codes.dense().tolist()
    [[0.0, 2.0, 0.0], [3.0, 0.0, 4.0]]
    """

    latent: Int[Tensor, " n"]
    value: Float[Tensor, " n"]
    starts: Int[Tensor, " rows_and_end"]
    d_sae: int

    @staticmethod
    def of_dense(f: Float[Tensor, "rows d_sae"]) -> Codes:
        """The non-zero entries of dense latents."""
        row, latent = f.nonzero(as_tuple=True)
        starts = torch.zeros(len(f) + 1, dtype=torch.long, device=f.device)
        starts[1:] = torch.bincount(row, minlength=len(f)).cumsum(0)
        return Codes(latent, f[row, latent], starts, f.shape[1])

    def with_value(self, value: Float[Tensor, " n"]) -> Codes:
        """The same entries with other values."""
        codes = Codes(self.latent, value, self.starts, self.d_sae)
        if "by_latent" in self.__dict__:
            codes.__dict__["by_latent"] = self.by_latent
        return codes

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1

    @cached_property
    def row(self) -> Int[Tensor, " n"]:
        """The row of every entry."""
        rows = torch.arange(self.n_rows, device=self.starts.device)
        return rows.repeat_interleave(self.starts.diff(), output_size=len(self.latent))

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """(order of the entries sorted by latent, their rows, where each latent starts)."""
        order = self.latent.argsort(stable=True)
        counts = torch.bincount(self.latent, minlength=self.d_sae)
        return order, self.row[order], counts.cumsum(0) - counts

    def fired(self) -> Int[Tensor, " d_sae"]:
        """In how many rows each latent is active."""
        return torch.bincount(self.latent[self.value != 0], minlength=self.d_sae)

    def dense(self) -> Float[Tensor, "rows d_sae"]:
        """All latents, zeros included."""
        out = self.value.new_zeros(self.n_rows, self.d_sae)
        out[self.row, self.latent] = self.value
        return out


def top_k(
    x: Float[Tensor, "rows d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    k: int,
    dtype: torch.dtype = torch.float32,
) -> Codes:
    """The k largest pre-activations of each row, those below zero as zeros.

    dtype: of the product that chooses. With bfloat16 the values are computed anew in float32, so
        that only the choice between nearly equal latents is rounded.
    """
    latents, values = [], []
    weight, b = encoder.to(dtype).T, bias.to(dtype)
    for rows in x.to(dtype).split(ROWS_AT_ONCE):
        value, latent = torch.addmm(b, rows, weight).topk(k, dim=-1, sorted=False)
        latents.append(latent)
        values.append(value)
    starts = torch.arange(0, len(x) * k + 1, k, device=x.device)
    latent = torch.cat(latents).flatten()
    if dtype == encoder.dtype:
        value = torch.cat(values).flatten()
    else:
        empty = Codes(latent, encoder.new_zeros(()), starts, len(encoder))
        value = products(empty, x, encoder) + bias[latent]
    return Codes(latent, value.relu(), starts, len(encoder))


def batch_top_k(
    x: Float[Tensor, "rows d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    k: int,
    dtype: torch.dtype = torch.float32,
) -> Codes:
    """The k · rows largest positive pre-activations of the whole batch.

    Few rows have more than 4 k of them, so only so many are looked for in each; where that was too
    few for some row, again with four times as many.
    """
    width = min(4 * k, len(encoder))
    while True:
        found = top_k(x, encoder, bias, width, dtype)
        value = found.value.view(-1, width)
        best = value.flatten().topk(min(k * len(x), value.numel()), sorted=False)
        bar = best.values.min().clamp_min(torch.finfo(value.dtype).tiny)
        if width == len(encoder) or not bool((value.min(1).values >= bar).any()):
            break
        width = min(4 * width, len(encoder))
    keep = torch.zeros(value.numel(), dtype=torch.bool, device=value.device)
    keep[best.indices] = True
    keep &= value.flatten() > 0
    starts = torch.zeros(len(x) + 1, dtype=torch.long, device=value.device)
    starts[1:] = keep.view(-1, width).sum(1).cumsum(0)
    return Codes(found.latent[keep], found.value[keep], starts, len(encoder))


def products(
    codes: Codes, g: Float[Tensor, "rows d"], W: Float[Tensor, "d_sae d"]
) -> Float[Tensor, " n"]:
    """g[row] · W[latent] of every entry, and of no other."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            codes.starts,
            codes.latent,
            torch.zeros(len(codes.latent), dtype=W.dtype, device=W.device),
            (codes.n_rows, codes.d_sae),
            check_invariants=False,
        )
    return torch.sparse.sampled_addmm(pattern, g.contiguous(), W.T, beta=0.0).values()


def row_sums(codes: Codes, W: Float[Tensor, "d_sae d"]) -> Float[Tensor, "rows d"]:
    """Σ_j value_bj W[j] of every row b."""
    if not len(codes.latent):
        return W.new_zeros(codes.n_rows, W.shape[1])
    return embedding_bag(
        codes.latent, W, codes.starts[:-1], mode="sum", per_sample_weights=codes.value
    )


def latent_sums(codes: Codes, x: Float[Tensor, "rows d"]) -> Float[Tensor, "d_sae d"]:
    """Σ_b value_bj x[b] of every latent j."""
    if not len(codes.latent):
        return x.new_zeros(codes.d_sae, x.shape[1])
    order, rows, starts = codes.by_latent
    return embedding_bag(rows, x, starts, mode="sum", per_sample_weights=codes.value[order])


class _Encode(torch.autograd.Function):
    """relu(x W_enc + b_enc) at given entries, whose values were computed while looking for them."""

    @staticmethod
    def forward(ctx, x, encoder, bias, codes: Codes):
        ctx.save_for_backward(x, encoder)
        ctx.codes = codes
        return codes.value.clone()

    @staticmethod
    def backward(ctx, *grads):
        x, encoder = ctx.saved_tensors
        codes = ctx.codes.with_value(grads[0] * (ctx.codes.value > 0))
        g_x = row_sums(codes, encoder) if ctx.needs_input_grad[0] else None
        g_encoder = latent_sums(codes, x) if ctx.needs_input_grad[1] else None
        g_bias = None
        if ctx.needs_input_grad[2]:
            g_bias = x.new_zeros(codes.d_sae).index_add_(0, codes.latent, codes.value)
        return g_x, g_encoder, g_bias, None


class _Decode(torch.autograd.Function):
    """Σ_j f_j W_dec[j] over the active latents."""

    @staticmethod
    def forward(ctx, value, W_dec, codes: Codes):
        ctx.save_for_backward(value, W_dec)
        ctx.codes = codes
        return row_sums(codes.with_value(value), W_dec)

    @staticmethod
    def backward(ctx, *grads):
        value, W_dec = ctx.saved_tensors
        g, codes = grads[0].contiguous(), ctx.codes
        g_value = products(codes, g, W_dec) if ctx.needs_input_grad[0] else None
        g_W = latent_sums(codes.with_value(value), g) if ctx.needs_input_grad[1] else None
        return g_value, g_W, None


def encode_at(
    x: Float[Tensor, "rows d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    codes: Codes,
) -> Codes:
    """`codes` with values through which gradients reach x, encoder and bias."""
    codes.by_latent  # noqa: B018  sorted once; both weight gradients use it
    value = _Encode.apply(x, encoder, bias, codes)
    return codes.with_value(value)  # type: ignore[arg-type]


def decode(codes: Codes, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "rows d_in"]:
    """Σ_j f_j W_dec[j], with gradients to the values and to W_dec."""
    return _Decode.apply(codes.value, W_dec, codes)  # type: ignore[return-value]
