"""Modules that read some of the positions: tokens of another kind go elsewhere, and which went where is not known."""

from functools import partial

import pytest
import torch

from benchmarks.architectures import runs
from benchmarks.tiny_configs import tiny_model
from interp.errors import Refused
from interp.models.model import Model
from interp.run.edits import Edit


@pytest.mark.parametrize("site", ["mlp_post.0", "mlp_write.0", "mlp_out.1"])
def test_an_mlp_of_some_tokens_is_refused_and_not_cut_into_rows(site: str) -> None:
    """Tokens of text and of sound have an MLP each; 14 of one kind are no two rows of 7."""
    name = "HiggsAudioV2ForConditionalGeneration"
    model = Model(tiny_model("higgs_audio_v2", name, partial(runs, strict=True)))
    text = torch.randint(10, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    mixed = text.clone()
    mixed[0, 2:4] = model.module.config.audio_token_id
    assert model.run(text, capture=[site]).cache[site].shape[:2] == (2, 8)
    with pytest.raises(Refused, match="sees 14 of the 16 positions"):
        model.run(mixed, capture=[site])
    with pytest.raises(Refused, match="sees 14 of the 16 positions"):
        model.run(mixed, edits=[Edit.zero(site)])
    assert model.run(mixed, capture=["z", "resid_post"]).cache["resid_post"].shape[:2] == (2, 8)
