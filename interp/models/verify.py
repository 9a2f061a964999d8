"""Identities that vouch for a map: what fails is refused by name, with the size of the error."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from interp.errors import BadInput
from interp.models.calls import unembed
from interp.models.recording import Recording
from interp.models.spec import Check, Spec
from interp.models.weights import linear_map

RELATIVE_TOLERANCE = {
    torch.float64: 1e-9,  # depth × eps, with room for ill-conditioned random weights
    torch.float32: 2e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}


def verify(spec: Spec, seen: Recording, plain: Tensor) -> Spec:
    """The map with every identity tried; sites whose identity fails are refused."""
    checks, refused = [], dict(spec.refused)
    dtype = seen.output.dtype
    relative = RELATIVE_TOLERANCE.get(dtype, 6e-2)

    def check(
        name: str, got: Tensor, wanted: Tensor, detail: str, sites: tuple[str, ...] = ()
    ) -> bool:
        error, note = relative_error(got, wanted)
        passed = error <= relative
        checks.append(Check(name, passed, error, relative, detail))
        for site in sites if not passed else ():
            refused.setdefault(
                site, f"not so on the probe that {detail}: off by {error:.1e} of its size{note}"
            )
        return passed

    if not torch.isfinite(plain).all():
        raise BadInput(
            f"{type(seen.module).__name__} returns NaN or infinite values on the probe: check its weights"
        )
    if spec.attention_layers:
        check(
            "window",
            seen.output,
            plain,
            "logits under the window equal the model's own",
            ("q", "k", "v", "scores", "pattern", "z"),
        )
    calls = {seen.names[call.module]: call for call in seen.attention}
    outs, sums = [], []
    for block in spec.blocks:
        if block.attention and block.W_O:
            z = calls[block.attention].tensors["z"]
            W, b = linear_map(
                seen.module.get_submodule(block.W_O), block.n_heads * block.d_head, z.device
            )
            heads = torch.einsum(
                "bphd,hdm->bpm", z.double(), W.double().reshape(block.n_heads, block.d_head, -1)
            )
            out = seen.once(block.W_O)
            assert out is not None and out.output is not None
            outs.append(out.output.reshape(heads.shape))
            sums.append(heads + b.double())
    if outs:
        check(
            "heads",
            torch.cat(sums, -1),
            torch.cat(outs, -1),
            "head outputs plus bias sum to the attention output",
            ("attn_out",),
        )
    outs, sums = [], []
    for block in spec.blocks:
        if block.W_out:
            call = seen.call(block.W_out)
            assert call.output is not None
            post = call.inputs[0].reshape(-1, block.d_mlp).double()
            W, b = linear_map(seen.module.get_submodule(block.W_out), block.d_mlp, post.device)
            outs.append(call.output.reshape(len(post), -1))
            sums.append(post @ W.double() + b.double())
    if outs:
        check(
            "neurons",
            torch.cat(sums, -1),
            torch.cat(outs, -1),
            "neurons times W_out plus bias sum to the MLP's output",
            ("mlp_post",),
        )
    calls_of = [seen.call(block.name) for block in spec.blocks]
    links = [(a.output, b.inputs[0]) for a, b in pairwise(calls_of) if a.output is not None]
    final = calls_of[-1].output
    assert final is not None
    linked = True
    if links:
        linked = check(
            "stream",
            torch.stack([a for a, _ in links]),
            torch.stack([b for _, b in links]),
            "each block reads what the one before it returned",
        )
    total = _sum_of_writes(spec, seen)
    if total is not None and linked:
        check(
            "writes",
            total,
            final,
            "embedding plus writes equals the final residual",
            ("attn_write", "mlp_write", "resid_mid"),
        )
    if spec.unembedding is not None:
        logits = unembed(spec, seen.module, final)
        check(
            "unembedding",
            logits,
            seen.output,
            "unembedding the normed final residual gives the logits",
            ("unembedding",),
        )
    return replace(spec, checks=tuple(checks), refused=refused)


def _sum_of_writes(spec: Spec, seen: Recording) -> Tensor | None:
    """Embedding plus all writes; None where some block's writes are unknown."""
    first = seen.once(spec.blocks[0].name)
    assert first is not None
    total = first.inputs[0].double()
    for block in spec.blocks:
        writes = [write for write in (block.attn_write, block.mlp_write) if write is not None]
        if not writes:
            return None
        for write in writes:
            call = seen.once(write.module)
            assert call is not None and call.output is not None
            total = total + write.scale * call.output.double().reshape(total.shape)
    return total


def relative_error(got: Tensor, wanted: Tensor) -> tuple[float, str]:
    """Largest error of a vector over its own largest entry, and a note if the shapes already differ.

    Each position is measured against itself: one position's massive activations hide no other's error.
    """
    if got.shape != wanted.shape:
        return float("inf"), f" (shapes {tuple(got.shape)} and {tuple(wanted.shape)})"
    error = (got.double() - wanted.double()).abs().amax(-1)
    return float((error / wanted.double().abs().amax(-1).clamp_min(1e-6)).max()), ""
