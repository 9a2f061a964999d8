"""Blocks that gate what they add by what they compute, as diffusion transformers do: known gates, by hand."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import interp
from benchmarks.tiny_configs import build
from interp import Edit, Model
from interp.errors import Refused
from interp.models.gate import THROUGH, Gate
from interp.nnsight import addresses
from interp.sites import Site

D_MODEL = 32
IDS = torch.randint(10, 97, (2, 9), generator=torch.Generator().manual_seed(1))
CLOSED = 3
"""A channel whose gate is 0 in the model that has one."""


class Gated(nn.Module):
    """A block of Llama's parts, shifted, scaled and gated by what one linear layer makes of the block's input.

    The input is each position's own, or the first one's for all; or its gates are one module's output each.
    """

    def __init__(self, inner: nn.Module, by: str, through: str):
        super().__init__()
        self.inner, self.by, self.through = inner, by, through
        self.adaLN = nn.Linear(D_MODEL, 6 * D_MODEL)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        chunks = self.adaLN(nn.functional.silu(x if self.by == "position" else x[:, 0]))
        if chunks.ndim == 2:
            chunks = chunks[:, None]
        shift, scale, gate, shift2, scale2, gate2 = chunks.chunk(6, dim=-1)
        gate, gate2 = THROUGH[self.through](gate), THROUGH[self.through](gate2)
        read = self.inner.input_layernorm(x) * (1 + scale) + shift
        x = x + gate * self.inner.self_attn(read, *args, **kwargs)[0]
        read = self.inner.post_attention_layernorm(x) * (1 + scale2) + shift2
        return x + gate2 * self.inner.mlp(read)


def module_of(by: str, through: str, closed: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=D_MODEL,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    module = build(transformers.LlamaForCausalLM, config)
    torch.manual_seed(0)
    layers = [Gated(layer, by, through) for layer in module.model.layers]
    module.model.layers = nn.ModuleList(layers)
    if closed:
        with torch.no_grad():
            for layer in layers:
                layer.adaLN.weight[2 * D_MODEL + CLOSED] = 0
                layer.adaLN.bias[2 * D_MODEL + CLOSED] = 0
    return module.eval()


@cache
def gated(by: str = "row", through: str = "", closed: bool = False) -> Model:
    return interp.load(module_of(by, through, closed))


def gate_of(model: Model, layer: int, resid_pre: Tensor, chunk: int) -> Tensor:
    """The gate that a layer's own linear makes of what the layer read."""
    block = model.module.get_submodule(f"model.layers.{layer}")
    read = resid_pre if block.by == "position" else resid_pre[:, :1]
    with torch.no_grad():
        made = block.adaLN(nn.functional.silu(read))
    return THROUGH[block.through](made[..., chunk * D_MODEL : (chunk + 1) * D_MODEL])


@pytest.mark.parametrize(("by", "through"), list(product(("row", "position"), THROUGH)))
def test_writes_are_what_the_gates_let_through(by: str, through: str) -> None:
    model = gated(by, through)
    assert not model.spec.refused and all(check.passed for check in model.spec.checks)
    for layer, block in enumerate(model.spec.blocks):
        name = f"model.layers.{layer}.adaLN"
        assert block.attn_write is not None and block.mlp_write is not None
        assert block.attn_write.gate == Gate(name, 2, through)
        assert block.mlp_write.gate == Gate(name, 5, through) and not block.direct
    outs, writes = ("attn_out", "mlp_out"), ("attn_write", "mlp_write")
    sites = [*outs, *writes, "resid_pre", "resid_mid", "resid_post"]
    run = model.run(IDS, capture=sites)
    alone = model.run(IDS, capture=["mlp_write"])  # no other hook sees the gate
    torch.testing.assert_close(alone.cache["mlp_write"], run.cache["mlp_write"])
    for layer in range(2):
        seen = {site: run.cache[f"{site}.{layer}"] for site in sites}
        for out, write, chunk in zip(outs, writes, (2, 5), strict=True):
            gate = gate_of(model, layer, seen["resid_pre"], chunk)
            torch.testing.assert_close(seen[write], gate * seen[out])
        torch.testing.assert_close(seen["resid_mid"], seen["resid_pre"] + seen["attn_write"])
        torch.testing.assert_close(seen["resid_post"], seen["resid_mid"] + seen["mlp_write"])


@pytest.mark.parametrize("by", ["row", "position"])
def test_an_edited_write_is_what_goes_on(by: str) -> None:
    model, wanted = gated(by), torch.randn(2, 9, D_MODEL)
    run = model.run(IDS, capture=["resid_pre", "resid_mid", "attn_out"])
    for site in ("attn_write", "resid_mid"):
        before = run.cache["resid_pre.1"] if site == "attn_write" else 0
        edits = [Edit.patch(f"{site}.1", wanted)]
        edited = model.run(IDS, edits=edits, capture=["resid_mid", "mlp_write", "resid_post"])
        mid = edited.cache["resid_mid.1"]
        torch.testing.assert_close(mid, before + wanted, rtol=1e-4, atol=1e-4)
        post = mid + edited.cache["mlp_write.1"]
        torch.testing.assert_close(edited.cache["resid_post.1"], post, rtol=1e-4, atol=1e-4)
    without = model.run(IDS, edits=[Edit.zero("attn_write.0")], capture=["resid_pre", "resid_mid"])
    torch.testing.assert_close(without.cache["resid_mid.0"], without.cache["resid_pre.0"])


def test_gradients_of_writes_are_those_by_differences() -> None:
    model, step = gated("position"), 1e-2
    run = model.run(IDS, capture=["attn_write"], grad=True)
    slope = run.gradients(run.logits[0, -1, 5], "attn_write.0")[0, 4]
    write = run.cache["attn_write.0"].detach()
    for channel in (0, 7):
        moved = []
        for sign in (1, -1):
            new = write.clone()
            new[0, 4, channel] += sign * step
            moved.append(model.run(IDS, edits=[Edit.patch("attn_write.0", new)]).logits[0, -1, 5])
        differences = float(moved[0] - moved[1]) / (2 * step)
        assert float(slope[channel]) == pytest.approx(differences, rel=2e-2, abs=1e-3)


def test_through_a_closed_gate_nothing_can_be_written() -> None:
    model = gated("position", closed=True)
    run = model.run(IDS, capture=["attn_write"])
    written = run.cache["attn_write.1"]
    assert not written[..., CLOSED].any() and written.any()
    same = model.run(IDS, edits=[Edit.patch("attn_write.1", written)]).logits
    torch.testing.assert_close(same, run.logits, rtol=1e-4, atol=1e-4)
    doubled = Edit.patch("attn_write.1", 2 * written)  # which is 0 where the gate is closed
    assert not torch.allclose(model.run(IDS, edits=[doubled]).logits, run.logits)
    with pytest.raises(Refused, match=r"'model.layers.1.adaLN'\) is closed \(0\) in 18 entries"):
        model.run(IDS, edits=[Edit.patch("attn_write.1", written + 1)])
    with pytest.raises(Refused, match="no gradient leads there"):
        model.run(IDS, capture=["attn_write"], grad=True)


def test_a_gated_write_is_no_sum_of_heads_and_no_module_s_output() -> None:
    model = gated()
    with pytest.raises(Refused, match=r"gates what it writes by what it computes .*adaLN"):
        model.require_sum("a sum of writes")
    with pytest.raises(Refused, match="no one module's input or output is this site"):
        addresses(model)[Site("attn_write", 0)]
