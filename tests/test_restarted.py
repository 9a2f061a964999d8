"""Blocks that rescale the residual stream, or start it anew, before they add to it."""

import torch

from interp.models.model import Model
from interp.run.edits import Edit
from tests.families import FAMILIES

IDS = torch.randint(10, 97, (2, 9), generator=torch.Generator().manual_seed(1))


def test_heads_of_a_stream_rescaled_by_numbers_have_writes_of_their_own() -> None:
    """Σ_h z_h W_O + b_O is the write, and what a head adds is what the middle moves by."""
    model = Model(FAMILIES["doge"](), None, "doge")
    assert any(block.rescales for block in model.spec.blocks)
    assert all(block.direct for block in model.spec.blocks)
    run = model.run(IDS, capture=["z", "attn_write", "resid_mid"])
    for layer, block in enumerate(model.spec.blocks):
        z, W_O = run.cache[f"z.{layer}"], model.W_O(layer)
        heads = torch.einsum("bphd,hdm->bphm", z, W_O) * block.attn_write.scale
        made = heads.sum(2) + model.b_O(layer) * block.attn_write.scale
        torch.testing.assert_close(made, run.cache[f"attn_write.{layer}"], rtol=1e-4, atol=1e-5)
    without = z.clone()
    without[:, :, 1] = 0
    edited = model.run(IDS, capture=["resid_mid"], edits=[Edit.patch(f"z.{layer}", without)])
    moved = run.cache[f"resid_mid.{layer}"] - edited.cache[f"resid_mid.{layer}"]
    torch.testing.assert_close(moved, heads[:, :, 1], rtol=1e-4, atol=1e-5)
