"""A model that reads hashed characters, and makes one position of several in its middle stage (CANINE)."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from torch import Tensor

from interp.errors import Refused
from interp.models.model import Model
from interp.models.probe import probe_batch
from interp.run.edits import Edit

BEYOND = 60_000
"""Characters are hashed: any number is one, though there are 512 vectors."""


@cache
def characters() -> Model:
    torch.manual_seed(0)
    config = transformers.CanineConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=256,
        num_hash_buckets=512,
    )
    module = transformers.CanineModel(config).eval()
    assert sum(parameter.numel() for parameter in module.parameters()) < 100_000
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return Model(module, id="characters")


def ids() -> Tensor:
    return torch.randint(BEYOND, (2, 29), generator=torch.Generator().manual_seed(1))


def test_characters_of_any_number_are_read_and_every_site_verifies() -> None:
    model = characters()
    assert [len(stage) for stage in model.spec.stages] == [1, 2, 1]
    assert set(model.spec.refused) <= set(model.spec.absent) and model.spec.d_vocab is None
    run = model.run(ids(), capture=["pattern"])
    assert run.logits is not None
    with torch.no_grad():
        assert torch.equal(run.logits, model.module(ids()).last_hidden_state)
    keys = [pattern.shape[-1] for pattern in run.cache.by_layer("pattern").values()]
    assert keys == [29, 7, 7, 29]


def test_the_probe_reads_enough_for_several_positions_after_they_are_made_one() -> None:
    model = characters()
    run = model.run(probe_batch(model.module), capture=["pattern.1"])
    assert run.cache["pattern.1"].shape[-1] > 5


def test_a_replay_runs_what_a_later_stage_reads_of_an_earlier_one_besides() -> None:
    model = characters()
    assert "read by more than the block after them" in model.spec.bypassed
    run = model.run(ids(), capture=["resid_pre"])
    variants = [[Edit.zero("z", heads=[(layer, 1)])] for layer in range(model.n_layers)]
    replayed = model.replay(run, variants, lambda variant: variant.logits)
    for variant, logits in zip(variants, replayed, strict=True):
        wanted = model.run(ids(), edits=variant).logits
        assert logits is not None and wanted is not None and run.logits is not None
        assert (
            float((logits - wanted).abs().max()) < 1e-5 < float((wanted - run.logits).abs().max())
        )


def test_attention_piece_by_piece_is_refused_where_its_pieces_would_be_seen() -> None:
    """The outer stages attend within 128 characters: a longer text is read by two calls, of which one was shown."""
    model, longer = characters(), ids().repeat(1, 5)
    for capture, edits in ((["pattern.0"], []), ([], [Edit.zero("z", heads=[(0, 1)])])):
        with pytest.raises(Refused, match="attends more often than on the probe"):
            model.run(longer, capture=capture, edits=edits)
    run = model.run(longer, capture=["resid_post", "attn_out", "pattern.1"])
    assert run.cache["attn_out.0"].shape[1] == longer.shape[1]
    assert model.run(ids(), capture=["pattern.0"]).cache["pattern.0"].shape[-1] == 29
