"""Models that accelerate keeps on disk in part: captured in place, their weights on "meta" between forwards."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import circuits
from circuits.circuit_find import circuit_find
from circuits.decomposition import decompose
from circuits.edges import edge_attribution
from interp.data.pairs import Pairs
from interp.generate import generate
from interp.models.load import weights_sha256
from interp.models.model import Model
from interp.run.edits import Edit
from tests.ground_truth.induction_model import character_tokenizer

IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
SITES = ["z", "pattern", "resid_mid", "mlp_post", "resid_post"]
PAIRS = Pairs.of(
    [[2, 3, 4, 5, 6, 3], [7, 8, 9, 10, 11, 8]],
    [[2, 7, 4, 5, 6, 3], [7, 1, 9, 10, 11, 8]],
    answers=[4, 9],
    wrong=[8, 2],
)


def gpt2() -> tuple[Any, dict[str, str]]:
    config = GPT2Config(
        vocab_size=58,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    kept = dict.fromkeys(
        ("transformer.wte", "transformer.wpe", "transformer.h.0", "lm_head"), "cpu"
    )
    away = dict.fromkeys(("transformer.h.1", "transformer.h.2", "transformer.ln_f"), "disk")
    return GPT2LMHeadModel(config), kept | away | {"transformer.drop": "cpu"}


def llama() -> tuple[Any, dict[str, str]]:
    config = LlamaConfig(
        vocab_size=58,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    kept = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm")
    away = ("model.layers.1", "model.layers.2", "lm_head")
    return LlamaForCausalLM(config), dict.fromkeys(kept, "cpu") | dict.fromkeys(away, "disk")


@pytest.fixture(scope="module", params=[gpt2, llama])
def both(request, tmp_path_factory) -> tuple[Model, Model]:
    """A model in memory, and the same one with its later blocks on disk."""
    torch.manual_seed(0)
    module, places = request.param()
    with torch.no_grad():
        for parameter in module.parameters():  # biases that are not zero
            parameter.add_(0.05 * torch.randn(parameter.shape))
    folder: Path = tmp_path_factory.mktemp("offloaded")
    module.eval().save_pretrained(folder)
    away = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=folder / "disk"
    )
    assert sum(p.is_meta for p in away.parameters()) > 10
    return Model(module, character_tokenizer()), Model(away.eval(), character_tokenizer())


def test_what_is_captured_is_the_same(both) -> None:
    mine, theirs = (m.run(IDS, capture=SITES, edits=[Edit.zero("z.1.2")]) for m in both)
    assert torch.equal(mine.logits, theirs.logits)
    for site in SITES:
        assert torch.equal(mine.cache[site], theirs.cache[site])
    here, there = both
    assert there.spec.refused == here.spec.refused
    assert weights_sha256(there.module) == weights_sha256(here.module)


def test_weights_are_read_in_place(both) -> None:
    for read in (
        lambda m: m.W_O(1),
        lambda m: m.W_V(2),
        lambda m: m.W_out(1),
        lambda m: m.W_U,
        lambda m: m.W_E,
        lambda m: m.final_norm.gain,
    ):
        mine, theirs = map(read, both)
        torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-6)  # asked on the identity


def test_replays_gradients_and_text_are_the_same(both) -> None:
    def seen(m: Model):
        run = m.run(IDS, capture=["resid_pre", "z"], grad=True)
        slopes = run.gradients(run.logits[0, -1, 3], "z")
        clean = m.run(IDS, capture=["resid_pre"])
        variants = [[Edit.zero("z.1.2")], [Edit.zero("z.2.1")]]
        replayed = torch.stack(m.replay(clean, variants, lambda v: v.logits))
        return slopes, replayed, generate(m, IDS, max_new_tokens=4).ids

    for mine, theirs in zip(*map(seen, both), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "analysis",
    [
        lambda m: (
            circuits.classify_heads(
                m, prompts=4, detectors=["induction", "copying_eigenvalues"], progress=False
            ).tables
        ),
        lambda m: edge_attribution(m, PAIRS, steps=2, progress=False).tables,
        lambda m: circuit_find(m, PAIRS, edges=20, progress=False).tables,
        lambda m: decompose(m, PAIRS, progress=False).tables,
    ],
    ids=["heads", "edges", "circuit_find", "decompose"],
)
def test_analyses_find_the_same(analysis, both) -> None:
    mine, theirs = map(analysis, both)
    for name in mine:
        # Weights asked on the identity, and rounding of the sums behind: float32, three blocks.
        pd.testing.assert_frame_equal(theirs[name], mine[name], rtol=1e-3, atol=1e-5)
