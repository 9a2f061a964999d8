"""Identities that vouch for a map: what fails is refused by name, with the size of the error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from interp.errors import BadInput
from interp.models.calls import unembed
from interp.models.recording import Recording
from interp.models.spec import Check, Spec, Write
from interp.models.stack import Layer, layers_of
from interp.models.weights import linear_map

Check_ = Callable[..., bool]
"""Tries one identity: (name, got, wanted, detail, the sites it vouches for)."""

RELATIVE_TOLERANCE = {
    torch.float64: 1e-9,  # depth × eps, with room for ill-conditioned random weights
    torch.float32: 2e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}


def verify(spec: Spec, seen: Recording, plain: Tensor) -> Spec:
    """The map with every identity tried; sites whose identity fails are refused."""
    checks, refused = [], dict(spec.refused)
    layers = layers_of(seen, spec.stack)
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
    outs, sums = [], []
    for layer, block in zip(layers, spec.blocks, strict=True):
        if block.W_O and block.between == "":
            assert layer.attention is not None
            z = layer.attention.tensors["z"]
            W, b = linear_map(
                seen.module.get_submodule(block.W_O), block.n_heads * block.d_head, z.device
            )
            heads = torch.einsum(
                "bphd,hdm->bpm", z.double(), W.double().reshape(block.n_heads, block.d_head, -1)
            )
            out = layer.inside.call(block.attn_out or block.W_O).output
            assert out is not None
            outs.append(out.reshape(heads.shape))
            sums.append(heads + b.double())
    if outs:
        check(
            "heads",
            _joined(sums),
            _joined(outs),
            "head outputs plus bias sum to the attention output",
            ("attn_out",),
        )
    _check_linear(spec, layers, check)
    linked = True
    if len(layers) > 1:
        links = [(a.call.output, b.hidden(spec.hidden)) for a, b in pairwise(layers)]
        linked = check(
            "stream",
            _joined([a for a, _ in links if a is not None]),
            _joined([b for _, b in links]),
            "each block reads what the one before it returned",
        )
    _check_writes(spec, layers, linked, check)
    if spec.readout or (spec.unembedding is not None and "unembedding" not in refused):
        final = layers[-1].call.output
        assert final is not None
        passed = check(
            "unembedding",
            unembed(spec, seen.module, final),
            seen.output,
            "unembedding the final residual gives the logits",
            ("unembedding",),
        )
        if spec.readout and not passed:
            spec = replace(spec, readout=(), absent=spec.absent - {"unembedding"})
    return replace(spec, checks=tuple(checks), refused=refused)


def _check_linear(spec: Spec, layers: list[Layer], check: Check_) -> None:
    """Linear layers that read something else than z: neurons, and z times a gate."""
    for name, detail, site in (
        ("gated heads", "gated head outputs plus bias sum to the attention output", "attn_out"),
        ("neurons", "neurons times W_out plus bias sum to the MLP's output", "mlp_post"),
    ):
        outs, sums = [], []
        for layer, block in zip(layers, spec.blocks, strict=True):
            gated = site == "attn_out" and block.between != ""
            module = block.W_O if gated else block.W_out if site == "mlp_post" else None
            if module is None:
                continue
            call = layer.inside.call(module)
            assert call.output is not None
            width = block.n_heads * block.d_head if gated else block.d_mlp
            x = call.inputs[0].reshape(-1, width).double()
            W, b = linear_map(layer.inside.module.get_submodule(module), width, x.device)
            outs.append(call.output.reshape(len(x), -1))
            sums.append(x @ W.double() + b.double())
        if outs:
            check(name, _joined(sums), _joined(outs), detail, (site,))


def _check_writes(spec: Spec, layers: list[Layer], linked: bool, check: Check_) -> None:
    """What the blocks write makes the stream: all of it at once, or through the norms of each block."""
    if not all(block.writes for block in spec.blocks):
        return
    sites = ("attn_write", "mlp_write", "resid_mid")
    final = layers[-1].call.output
    assert final is not None
    if not any(block.norm_mid or block.norm_post for block in spec.blocks):
        total = layers[0].hidden(spec.hidden).double()
        for layer, block in zip(layers, spec.blocks, strict=True):
            total = _added(total, layer, block.writes)
        if linked:
            check("writes", total, final, "embedding plus writes equals the final residual", sites)
        return
    made, wanted = [], []
    for layer, block in zip(layers, spec.blocks, strict=True):
        x, before = layer.hidden(spec.hidden), block.before_mid
        if block.norm_mid is not None:
            x = _normed(layer, block.norm_mid, _added(x.double(), layer, before).to(x))
        else:
            before = ()
        rest = tuple(write for write in block.writes if write not in before)
        out = _added(x.double(), layer, rest)
        if block.norm_post is not None:
            out = _normed(layer, block.norm_post, out.to(x))
        assert layer.call.output is not None
        made.append(out.double())
        wanted.append(layer.call.output)
    check(
        "writes",
        _joined(made),
        _joined(wanted),
        "each block's writes, through its norms, give what it returns",
        sites,
    )


def _added(total: Tensor, layer: Layer, writes: tuple[Write, ...]) -> Tensor:
    for write in writes:
        out = layer.inside.call(write.module).output
        assert out is not None
        factor = write.factor(layer.inside.module)
        total = total + (out.double().reshape(total.shape) * factor).to(total.device)
    return total


def _joined(parts: list[Tensor]) -> Tensor:
    """Tensors of all layers side by side; layers may lie on several devices."""
    return torch.cat([part.to(parts[0].device) for part in parts], -1)


def _normed(layer: Layer, name: str, x: Tensor) -> Tensor:
    call = layer.inside.call(name)
    made = layer.inside.module.get_submodule(name)(x.reshape(call.inputs[0].shape))
    return made.reshape(x.shape)


def relative_error(got: Tensor, wanted: Tensor) -> tuple[float, str]:
    """Largest error of a vector over its own largest entry, and a note if the shapes already differ.

    Each position is measured against itself: one position's massive activations hide no other's error.
    """
    if got.shape != wanted.shape:
        return float("inf"), f" (shapes {tuple(got.shape)} and {tuple(wanted.shape)})"
    error = (got.double() - wanted.double()).abs().amax(-1)
    return float((error / wanted.double().abs().amax(-1).clamp_min(1e-6)).max()), ""
