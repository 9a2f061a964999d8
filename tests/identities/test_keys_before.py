"""Keys of a context that stand before a model's own: a draft model, which reads what another model computed.

Tolerance: float32, five blocks deep, as in `test_families`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from interp.errors import BadInput, Refused
from interp.models.probe import probe_batch
from interp.run.statistics import Mass
from tests.identities.test_marked_padding import check_all_sites, model_of


def drafted(n: int) -> dict[str, Tensor]:
    """n positions of which the draft is made, behind five of the model's that it drafts for."""
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(2, n, 64, generator=generator)
    return {
        "noise_embeds": noise,
        "context_hidden_states": torch.randn(2, 5, 320, generator=generator),
    }


def test_a_draft_model_s_identities_on_several_positions() -> None:
    model = model_of("muse_glimmer_assistant", "MuseGlimmerAssistantModel")
    assert not model.spec.refused and model.spec.attention_layers == list(range(5))
    known = {name: tuple(x.shape) for name, x in probe_batch(model.module).inputs.items()}
    assert known == {"noise_embeds": (2, 72, 64), "context_hidden_states": (2, 74, 320)}
    check_all_sites(model, drafted(9))
    pattern = model.run(drafted(9), capture=["pattern.1"]).cache["pattern.1"]
    assert pattern.shape[2:] == (9, 14)


def test_row_statistics_where_keys_are_not_numbered_as_positions_are_refused() -> None:
    """Its own keys stand behind those of the context: position 0's is the sixth."""
    model = model_of("muse_glimmer_assistant", "MuseGlimmerAssistantModel")
    itself = Mass(torch.arange(9).expand(2, 9)[..., None], torch.ones(2, 9, dtype=torch.bool))
    with pytest.raises(Refused, match="14 keys for 9 positions"):
        model.run(drafted(9), statistics={"itself": itself})


def test_more_positions_than_its_window_are_refused_with_its_own_failure() -> None:
    model = model_of("muse_glimmer_assistant", "MuseGlimmerAssistantModel")
    with pytest.raises(BadInput, match=r"\(2, 150, 64\).*tensor a \(155\).*it works on"):
        model.run(drafted(150))
