"""Models whose forward needs more than one tensor: the probe finds the others, and a real call passes them all.

Tolerance: float32, three blocks deep, as in `test_families`.
"""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from benchmarks.architectures import runs
from benchmarks.tiny_configs import tiny_model
from interp.errors import BadInput
from interp.models.calls import call_model, output_tensor
from interp.models.inputs import numbers_taken
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.edits import Edit
from interp.sites import AXES

ROUNDING = 1e-5


@cache
def model_of(model_type: str, name: str, kind: str = "") -> Model:
    return Model(tiny_model(model_type, name, partial(runs, kind=kind, strict=True)), id=name)


def plain(model: Model, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return output_tensor(call_model(model.module, Batch.of_inputs(given)))


def close(got: Tensor, wanted: Tensor) -> bool:
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max()) < ROUNDING * max(1.0, float(wanted.abs().max()))


def check_all_sites(model: Model, given: dict[str, Tensor]) -> None:
    """Capturing every site, and editing it to itself, leaves the model's output as it is."""
    sites = [s for s in AXES if s not in model.spec.refused and model.layers_with(s)]
    assert {"q", "k", "v", "z", "pattern", "mlp_write"} <= set(sites)
    run = model.run(given, capture=sites)
    assert close(run.logits, plain(model, given))
    same = [Edit.apply(site, lambda x, seen: x) for site in sites]
    assert close(model.run(given, edits=same).logits, run.logits)


# --- masks ----------------------------------------------------------------------------------------


def spectrogram() -> dict[str, Tensor]:
    """Two rows, the second 20 frames long."""
    x = torch.randn(2, 30, 560, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 20:] = 0
    return {"input_features": x, "input_features_mask": mask}


def test_a_mask_that_the_forward_requires_is_the_batch_s_own() -> None:
    model, given = model_of("fun_asr_nano_encoder", "FunAsrNanoEncoder"), spectrogram()
    check_all_sites(model, given)
    run = model.run(given, capture=["pattern", "z.1"])
    assert not run.cache["pattern.1"][1, ..., 20:].any() and run.cache["pattern.1"][0].all()
    mask = run.batch.mask
    assert mask is not None and mask.sum(1).tolist() == [30, 20]
    real = torch.cat([run.cache["z.1"][0], run.cache["z.1"][1, :20]])
    means = Edit.apply("z.1", lambda x, seen: real.mean(0).expand_as(x))
    assert close(
        model.run(given, edits=[Edit.mean("z.1")]).logits, model.run(given, edits=[means]).logits
    )


def test_a_mask_that_is_missing_is_asked_for() -> None:
    model, given = model_of("fun_asr_nano_encoder", "FunAsrNanoEncoder"), spectrogram()
    with pytest.raises(
        BadInput, match=r"'input_features_mask'.*with 'input_features_mask' \(2, \d+\)"
    ):
        model.run({"input_features": given["input_features"]})


class Folded(nn.Module):
    """Reads spectrograms [batch frames 48]: a convolution halves the bins, and its channels become one axis."""

    main_input_name = "bands"

    def __init__(self) -> None:
        super().__init__()
        self.config = PreTrainedConfig()
        self.conv, self.out = nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.Linear(6 * 24, 5)

    def forward(self, bands: Tensor, bands_mask: Tensor) -> tuple[Tensor]:
        assert bands_mask.shape == bands.shape[:2]
        x = self.conv((bands * bands_mask[..., None])[:, None])
        return (self.out(x.transpose(1, 2).flatten(2)),)


def test_bins_behind_a_convolution_and_a_mask_are_found() -> None:
    made = numbers_taken(Folded(), "bands", {})
    frames = made["bands"].shape[1]
    assert made["bands"].shape[2] == 48 and made["bands_mask"].shape == (2, frames)
