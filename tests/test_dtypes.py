"""16 bits: the same map, the same analyses, and the findings of float32 as far as rounding lets them be.

In 64 bits identities hold to 1e-9: nothing on the way to them may be in float32 but what the model itself has there.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import circuits
import interp
from circuits.contextual import Decomposition
from circuits.frozen import Frozen
from interp.data.pairs import Pairs
from interp.models.model import Model
from interp.models.probe import probe
from interp.models.weights import FrozenNorm
from interp.registry import ANALYSES
from tests.contracts.test_analyses import ARGUMENTS, PROMPT
from tests.families import FAMILIES
from tests.ground_truth.induction_model import character_tokenizer, induction_model

for _entry in entry_points(group="interp.analyses"):
    _entry.load()
NAMES = sorted(name for name, analysis in ANALYSES.items() if analysis.reads == "model")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", params=HALVES, ids=str)
def half(request: Any) -> Model:
    return Model(induction_model().to(request.param), character_tokenizer())


@pytest.mark.parametrize("name", NAMES)
def test_every_analysis_runs(name: str, half: Model) -> None:
    positional, options = ARGUMENTS.get(name, ((PROMPT,), {}))
    report = ANALYSES[name].function(half, *positional, **options)
    assert report.meta["model"]["sha256"] and len(report.table.columns)
    assert all(array.dtype != np.float16 for array in report.arrays.values())


@pytest.mark.parametrize("name", ["attribute", "decompose", "flow", "recall"])
def test_in_64_bits_analyses_give_the_numbers_of_32(name: str) -> None:
    positional, options = ARGUMENTS.get(name, ((PROMPT,), {}))
    wanted, found = (
        ANALYSES[name].function(
            Model(induction_model().to(dtype), character_tokenizer()), *positional, **options
        )
        for dtype in (torch.float32, torch.float64)
    )
    numbers = wanted.table.select_dtypes("number").astype(float)
    other = found.table.select_dtypes("number").astype(float)
    assert numbers.shape == other.shape
    assert np.allclose(numbers, other, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2", "nanochat"])
def test_in_64_bits_norms_are_held_and_flow_is_drawn(name: str) -> None:
    """RMSNorms of transformers compute in float32 whatever they are given; LayerNorms do not."""
    model, single = Model(FAMILIES[name]().double(), id=name), Model(FAMILIES[name]())
    ids = torch.arange(10, 17)[None]
    frozen = Frozen(model, ids)
    assert frozen.held == Frozen(single, ids).held and frozen.held
    assert frozen.error < (1e-14 if name == "gpt2" else 1e-5)
    circuits.information_flow(model, ids, max_flow=False)


def test_what_a_norm_computes_in_is_tried() -> None:
    double = torch.float64
    assert FrozenNorm(torch.nn.LayerNorm(8).double(), 8).dtype == double
    assert FrozenNorm(LlamaRMSNorm(8).double(), 8).dtype == torch.float32
    assert FrozenNorm(LlamaRMSNorm(8), 8).dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_parts_of_a_run_in_16_bits_are_subtracted_in_32(dtype: torch.dtype) -> None:
    """Their difference has more digits than either: in 16 bits it would be rounded once more."""
    model = Model(FAMILIES["llama"]().to(dtype))
    pairs = Pairs.of([[2, 3, 4, 5]], [[2, 7, 4, 5]], answers=[4], wrong=[8])
    whole = Decomposition(model, pairs, baseline="zero", capture=["resid_post.1"])
    (part,) = whole.split([["0.1"]], capture=["resid_post.1"])
    relevant, rest = (cache["resid_post.1"] for cache in (part.relevant, part.irrelevant))
    assert bool(relevant.any()) and rest.dtype == dtype
    assert torch.equal(relevant + rest.float(), whole.clean["resid_post.1"].float())


def test_the_planted_heads_are_labelled(half: Model) -> None:
    """The hand-built model: L0H1 looks one back, L1H2 does induction, in 16 bits as in 32."""
    report = circuits.classify_heads(half, prompts=8, ablate=False, evidence=0, progress=False)
    labels = report.table.set_index(["layer", "head"])["labels"]
    assert "previous_token" in labels[0, 1] and "induction" in labels[1, 2]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_seen_as_in_32_bits(name: str) -> None:
    """Experts too, where the rounding of a kernel may send a token elsewhere."""
    module: Any = FAMILIES[name]().to(torch.bfloat16)
    kept = getattr(module, "_keep_in_fp32_modules_strict", None) or ()
    for path, parameter in module.named_parameters():
        if any(part in path for part in kept):  # as `from_pretrained` leaves it
            parameter.data = parameter.data.float()
    assert set(probe(module).refused) == FAMILIES[name].refused


def test_a_stream_in_32_bits_beside_weights_in_16_is_unembedded() -> None:
    """It is rounded before the final norm reads it; the lens at the last layer is then the logits, bit for bit."""
    model = Model(FAMILIES["zaya"]().to(torch.bfloat16), None, "zaya")
    run = model.run(torch.arange(10, 19)[None], capture=["resid_post"])
    last = run.cache[f"resid_post.{model.n_layers - 1}"]
    assert last.dtype == torch.float32 and model.spec.final_norm is not None
    assert torch.equal(model.unembed(last), run.logits)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_default_model_verifies_in_full(dtype: str) -> None:
    """What a layer writes can be less than a massive activation's rounding: the map is float32's anyway."""
    model = interp.load("smollm2-135m", dtype=dtype)
    assert not model.spec.refused and all(check.passed for check in model.spec.checks)
    writes = [write for block in model.spec.blocks for write in (block.attn_write, block.mlp_write)]
    assert len(writes) == 60 and all(write and write.scale == 1 for write in writes)
    assert [block.W_out for block in model.spec.blocks] == [
        f"model.layers.{layer}.mlp.down_proj" for layer in range(30)
    ]
