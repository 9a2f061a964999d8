"""A map that is wrong in one place is refused, however deep the model and however coarse its dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from interp.errors import BadInput
from interp.models.block_map import Write
from interp.models.calls import call_model, output_tensor
from interp.models.probe import probe, probe_batch
from interp.models.recording import record
from interp.models.verify import verify
from tests.families import FAMILIES, GROUPED

DEEP = 24


@pytest.fixture(scope="module")
def deep():
    """A tiny Llama of 24 layers in bfloat16, its map, and what a probe forward saw."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**{**GROUPED, "num_hidden_layers": DEEP})
        module = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim == 2:
                    parameter.copy_(0.2 * torch.randn_like(parameter))
    batch = probe_batch(module)
    with torch.no_grad():
        return probe(module), record(module, batch), output_tensor(call_model(module, batch))


def test_roundings_of_many_layers_are_allowed_for(deep) -> None:
    spec, _, _ = deep
    assert "attn_write" not in spec.refused
    (writes,) = [check for check in spec.checks if check.name == "writes"]
    assert writes.passed and writes.allowed == 2 * 2**-7 * (2 * DEEP) ** 0.5


@pytest.mark.parametrize("layer", [0, DEEP // 2, DEEP - 1])
@pytest.mark.parametrize("scale", [1.05, 0.0])
def test_one_wrong_write_of_many_is_refused(deep, layer: int, scale: float) -> None:
    """Beside 47 right ones, what it leaves out of the sum may be less than their rounding."""
    spec, seen, plain = deep
    right = spec.blocks[layer].mlp_write
    wrong = replace(spec.blocks[layer], mlp_write=Write(right.module, scale))
    blocks = (*spec.blocks[:layer], wrong, *spec.blocks[layer + 1 :])
    with torch.no_grad():
        again = verify(replace(spec, blocks=blocks, checks=()), seen, plain)
    assert {"attn_write", "mlp_write", "resid_mid"} <= set(again.refused)
    assert "entry by entry" in again.refused["mlp_write"]


@pytest.mark.parametrize("name", ["gpt2", "granite"])
def test_a_forward_that_gives_nan_is_told_before_anything_is_solved_for(name: str) -> None:
    module = FAMILIES[name]()
    with torch.no_grad():
        for parameter in list(module.parameters())[4:]:
            parameter.fill_(torch.inf)
    with pytest.raises(BadInput, match="returns NaN or infinite values on the probe"):
        probe(module)


def test_a_site_said_to_be_absent_is_refused_where_the_sum_fails() -> None:
    """That attention writes nothing is only as sure as that the other writes are all there is."""
    module = FAMILIES["llama"]()
    spec, batch = probe(module), probe_batch(module)
    blocks = tuple(replace(block, attn_write=None) for block in spec.blocks)
    with torch.no_grad():
        plain = output_tensor(call_model(module, batch))
        told = replace(spec, blocks=blocks, absent=spec.absent | {"attn_write"}, checks=())
        told = replace(told, refused={"attn_write": "absent"})
        again = verify(told, record(module, batch), plain)
    assert "attn_write" not in again.absent and again.refused["attn_write"] != "absent"
