"""A detector whose decoder attends to its queries, to a text and, by sampling, to an image (Grounding DINO)."""

from __future__ import annotations

from functools import cache

import torch
from transformers import BertConfig, GroundingDinoConfig, GroundingDinoModel, SwinConfig

from interp.models.model import Model
from interp.models.probe import probe_batch
from interp.run.edits import Edit

N_QUERIES, N_HEADS = 12, 4


@cache
def grounding() -> Model:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    text = BertConfig(vocab_size=97, num_hidden_layers=1, num_attention_heads=N_HEADS, **sizes)
    image = SwinConfig(
        image_size=64,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )
    config = GroundingDinoConfig(
        backbone_config=image,
        text_config=text,
        d_model=32,
        num_queries=N_QUERIES,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=N_HEADS,
        decoder_attention_heads=N_HEADS,
        max_text_len=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(GroundingDinoModel(config))


def test_four_norms_and_what_each_follows_are_found() -> None:
    model = grounding()
    assert not model.spec.refused
    assert not any("own eager" in note for note in model.notes)  # its parts' is another one
    for block in model.spec.blocks:
        firsts = [(of.norm, [write.module for write in of.writes]) for of in block.firsts]
        assert firsts == [
            (f"{block.name}.self_attn_layer_norm", [f"{block.name}.self_attn"]),
            (f"{block.name}.encoder_attn_text_layer_norm", [f"{block.name}.encoder_attn_text"]),
        ]
        assert [write.module for write in block.others] == [f"{block.name}.encoder_attn"]
        assert block.norm_mid == f"{block.name}.encoder_attn_layer_norm"


def test_its_source_is_the_text_and_edits_of_what_it_writes_there_are_replayed() -> None:
    model = grounding()
    batch = probe_batch(model.module)
    sites = ["cross_pattern", "cross_write", "resid_pre", "resid_post"]
    run = model.run(batch, capture=sites)
    n_words = batch.inputs["input_ids"].shape[1]
    assert run.cache["cross_pattern.0"].shape == (2, N_HEADS, N_QUERIES, n_words)
    edit = Edit.zero("cross_write.1")
    changed = model.run(batch, capture=["resid_post"], edits=[edit]).cache["resid_post.1"]
    assert not torch.allclose(changed, run.cache["resid_post.1"], atol=1e-3)
    (again,) = model.replay(
        run, [[edit]], lambda of: of.cache["resid_post.1"], capture=["resid_post"]
    )
    torch.testing.assert_close(again, changed)
