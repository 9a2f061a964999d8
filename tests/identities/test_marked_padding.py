"""Masks that are True at padding: found by trying, and turned wherever a batch says what is real.

Tolerance: float32, three blocks deep, as in `test_families`.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.architectures import runs
from benchmarks.tiny_configs import tiny_model
from interp.errors import BadInput
from interp.models.inputs import numbers_taken
from interp.models.model import Model
from interp.models.probe import probe_batch
from interp.run.batch import Batch
from interp.run.edits import Edit
from interp.sites import AXES

ROUNDING = 1e-5
FRAMES = 30


@cache
def model_of(model_type: str, name: str) -> Model:
    return Model(tiny_model(model_type, name, partial(runs, strict=True)), id=name)


def close(got: Tensor, wanted: Tensor) -> bool:
    return float((got - wanted).abs().max()) < ROUNDING * max(1.0, float(wanted.abs().max()))


def check_all_sites(model: Model, given: dict[str, Tensor]) -> None:
    """Capturing every site, and editing it to itself, leaves what the model returns as it is, bit for bit or so."""
    with torch.no_grad():
        plain = model.module(**given).last_hidden_state
    sites = [s for s in AXES if s not in model.spec.refused and model.layers_with(s)]
    run = model.run(given, capture=sites)
    assert "resid_post" in sites and close(run.logits, plain)
    same = [Edit.apply(site, lambda x, seen: x) for site in sites]
    assert close(model.run(given, edits=same).logits, plain)


# --- Gemma 3n's audio encoder ---------------------------------------------------------------------


def sound(padding: bool) -> dict[str, Tensor]:
    """Two rows of 72 frames; of the second, the last 32 marked as padding if there is any."""
    x = torch.randn(2, 72, 64, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(2, 72, dtype=torch.bool)
    mask[1, 40:] = padding
    return {"audio_mel": x, "audio_mel_mask": mask}


@pytest.mark.parametrize("padding", [False, True])
def test_identities_of_an_encoder_whose_mask_is_true_at_padding(padding: bool) -> None:
    model = model_of("gemma3n_audio", "Gemma3nAudioEncoder")
    mask = probe_batch(model.module).inputs["audio_mel_mask"]
    assert mask.dtype == torch.bool and not mask.any()
    check_all_sites(model, sound(padding))


def test_frames_that_are_marked_are_the_padding_of_the_batch() -> None:
    model = model_of("gemma3n_audio", "Gemma3nAudioEncoder")
    assert model.as_batch(sound(padding=False)).mask is None
    given = sound(padding=True)
    for data in (given, Batch.of_inputs(given), model.as_batch(given)):
        mask = model.as_batch(data).mask
        assert mask is not None and mask.sum(1).tolist() == [72, 40]
    run = model.run(given)
    other = {**given, "audio_mel": given["audio_mel"].clone()}
    other["audio_mel"][1, 48:] += 1.0
    assert torch.equal(model.run(other).logits, run.logits) and run.logits[1].any()
    other["audio_mel"][1, :20] += 1.0
    changed = model.run(other).logits
    assert torch.equal(changed[0], run.logits[0]) and not close(changed[1], run.logits[1])


def test_a_mean_of_positions_of_several_frames_needs_rows_of_one_length() -> None:
    model, mean = model_of("gemma3n_audio", "Gemma3nAudioEncoder"), Edit.mean("resid_post.1")
    given = sound(padding=False)
    x = model.run(given, capture=["resid_post.1"]).cache["resid_post.1"]
    by_hand = Edit.apply("resid_post.1", lambda y, seen: x.mean((0, 1)).expand_as(y))
    run = model.run(given, edits=[mean])
    assert close(run.logits, model.run(given, edits=[by_hand]).logits)
    with pytest.raises(BadInput, match=r"18 positions .* of a mask of 72 samples or frames"):
        model.run(sound(padding=True), edits=[mean])


def test_a_mask_of_nothing_but_padding_is_refused() -> None:
    model, given = model_of("gemma3n_audio", "Gemma3nAudioEncoder"), sound(padding=False)
    given["audio_mel_mask"][:] = True
    with pytest.raises(BadInput, match=r"'audio_mel_mask' is True .* throughout a row"):
        model.run(given)


# --- a mask of positions --------------------------------------------------------------------------


def turned() -> tuple[Model, Model]:
    """An encoder whose mask is 1 at what is real, and the same that takes it to be True at padding."""
    build = partial(tiny_model, "fun_asr_nano_encoder", "FunAsrNanoEncoder")
    modules = [build(lambda module: None) for _ in range(2)]  # no input of theirs is known yet
    of: Any = type(modules[1])

    class Turned(of):
        def forward(self, input_features: Tensor, input_features_mask: Tensor) -> Any:
            made = super().forward(input_features, (~input_features_mask).long())
            made.last_hidden_state = made.last_hidden_state.masked_fill(
                input_features_mask[..., None], 0.0
            )
            return made

    modules[1].__class__ = Turned
    return Model(modules[0]), Model(modules[1])


def test_a_mean_leaves_out_what_is_marked() -> None:
    model, other = turned()
    x = torch.randn(2, FRAMES, 560, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, FRAMES, dtype=torch.bool)
    mask[1, 20:] = False
    of_real = {"input_features": x, "input_features_mask": mask.long()}
    of_padding = {"input_features": x, "input_features_mask": ~mask}
    for edits in ([], [Edit.mean("z.1")], [Edit.mean("resid_pre.2")]):
        wanted = model.run(of_real, edits=edits)
        got = other.run(of_padding, edits=edits)
        assert torch.equal(got.batch.mask, mask)
        assert close(got.logits[mask], wanted.logits[mask])


class Silent(nn.Module):
    """Returns zeros whatever it reads: its mask says nothing of padding."""

    main_input_name = "input_features"

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.out = config, nn.Linear(560, 8)

    def forward(self, input_features: Tensor, input_features_mask: Tensor) -> tuple[Tensor]:
        return (0 * self.out(input_features) * input_features_mask[..., None],)


def test_a_mask_that_is_not_told_stays_one_of_what_is_real() -> None:
    config = model_of("fun_asr_nano_encoder", "FunAsrNanoEncoder").module.config
    assert numbers_taken(Silent(config), "input_features", {})["input_features_mask"].all()
