"""The loss of a training step: one small function a kind of sparse autoencoder, and the loss of dead latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.saes.model import SAE
from probes.saes.options import Options
from probes.saes.sparse import Codes, batch_top_k, decode, encode_at, top_k


class Pass(NamedTuple):
    """One pass of a kind in training: reconstructions (one a prefix), S, and who was active."""

    reconstructions: list[Float[Tensor, "rows d_in"]]
    penalty: Tensor
    fired: Int[Tensor, " d_sae"]


def _top_k_pass(sae: SAE, x: Tensor, options: Options) -> Pass:
    return _sparse_pass(sae, x, options, top_k)


def _batch_top_k_pass(sae: SAE, x: Tensor, options: Options) -> Pass:
    return _sparse_pass(sae, x, options, batch_top_k)


def _sparse_pass(sae: SAE, x: Tensor, options: Options, choose: Callable[..., Codes]) -> Pass:
    c = sae.config
    centred = sae.centred(x)
    with torch.no_grad():
        dtype = getattr(torch, options.precision)
        codes = choose(centred, sae.encoder, sae.b_enc, c.k, dtype)
        if c.activation == "batchtopk" and len(codes.value):
            # What is judged later is one threshold for all rows: the batches' smallest values.
            sae.threshold.lerp_(codes.value.min().expand_as(sae.threshold), _threshold_weight(sae))
    codes = encode_at(centred, sae.encoder, sae.b_enc, codes)
    parts = [
        codes if width == c.d_sae else codes.with_value(codes.value * (codes.latent < width))
        for width in c.prefixes or (c.d_sae,)
    ]
    made = [decode(part, sae.W_dec) + sae.b_dec for part in parts]
    return Pass(made, x.new_zeros(()), codes.fired())


def _threshold_weight(sae: SAE) -> float:
    """Of a new threshold in the running mean; the first one counts whole."""
    return 1.0 if float(sae.threshold.detach()[0]) == 0 else 0.02


def _relu_pass(sae: SAE, x: Tensor, options: Options) -> Pass:
    f = sae.encode(x)
    return Pass([sae.decode(f)], options.sparsity * f.sum(-1).mean(), (f > 0).sum(0))


def _gated_pass(sae: SAE, x: Tensor, options: Options) -> Pass:
    product = sae.centred(x) @ sae.W_enc
    gate = product + sae.b_enc
    f = (product * sae.r_mag.exp() + sae.b_mag).relu() * (gate > 0)
    opened = gate.relu()
    # The gate learns by reconstructing alone, through a decoder that does not learn from it.
    alone = opened @ sae.W_dec.detach() + sae.b_dec.detach()
    penalty = options.sparsity * opened.sum(-1).mean() + (x - alone).square().sum(-1).mean()
    return Pass([sae.decode(f)], penalty, (f > 0).sum(0))


def _jump_relu_pass(sae: SAE, x: Tensor, options: Options) -> Pass:
    pre = sae.pre_activations(x).relu()
    f, active = _JumpReLU.apply(pre, sae.threshold)  # type: ignore[misc]
    l0 = active.sum(-1).mean()
    penalty = options.sparsity * x.shape[1] * (l0 / (sae.config.k or 1) - 1).abs()
    return Pass([sae.decode(f)], penalty, (f > 0).sum(0))


BANDWIDTH = 0.5
"""Width of the window in which a pre-activation moves its latent's threshold, in scaled units."""


class _JumpReLU(torch.autograd.Function):
    """(pre · [pre > θ], [pre > θ]); θ learns from pre-activations within half a bandwidth of it."""

    @staticmethod
    def forward(ctx, pre, threshold):
        active = (pre > threshold).to(pre.dtype)
        ctx.save_for_backward(pre, threshold, active)
        return pre * active, active

    @staticmethod
    def backward(ctx, *grads):
        pre, threshold, active = ctx.saved_tensors
        g_f, g_active = grads
        near = ((pre - threshold).abs() < BANDWIDTH / 2) / BANDWIDTH
        g_threshold = -(near * (threshold * g_f + g_active)).sum(0)
        return g_f * active, g_threshold


PASSES: dict[str, Callable[[SAE, Tensor, Options], Pass]] = {
    "relu": _relu_pass,
    "gated": _gated_pass,
    "topk": _top_k_pass,
    "batchtopk": _batch_top_k_pass,
    "jumprelu": _jump_relu_pass,
}


def auxiliary_loss(
    sae: SAE,
    x: Float[Tensor, "rows d_in"],
    error: Float[Tensor, "rows d_in"],
    dead: Bool[Tensor, " d_sae"],
) -> Tensor:
    """E‖e − ê‖² of the error e reconstructed by the dead latents with the largest pre-activations.

    Half of d_in of them a row, at most; not rectified, so that all of these learn.
    """
    where = dead.nonzero()[:, 0]
    k = min(len(where), x.shape[1] // 2 or 1)
    pre = sae.centred(x).detach() @ sae.encoder[where].T + sae.b_enc[where]
    if k < len(where):
        best = pre.topk(k, dim=-1, sorted=False)
        pre = torch.zeros_like(pre).scatter(-1, best.indices, best.values)
    made = pre @ sae.W_dec[where]
    share = min(1.0, len(where) / (x.shape[1] / 2))
    return share * (error - made).square().sum(-1).mean()
