"""Inputs that the probe makes up where nothing but a failure, or an input's place in the signature, tells of them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from benchmarks.architectures import runs
from benchmarks.tiny_configs import Unbuildable, tiny_model
from interp.errors import BadInput, Refused
from interp.models.companions import with_companions
from interp.models.images import otherwise_cut
from interp.models.inputs import numbers_taken
from interp.models.model import Model
from interp.models.probe import probe_batch
from interp.models.wants import SAMPLES
from interp.run.batch import Batch


class Counting(nn.Module):
    """Reads tokens, and how many options and samples each row has; fails where there are too many options."""

    main_input_name = "input_ids"

    def __init__(self, most: int) -> None:
        super().__init__()
        self.config = PreTrainedConfig(vocab_size=50)
        self.most, self.embedding = most, nn.Embedding(50, 8)

    def forward(self, input_ids: Tensor, n_options: Tensor, sample_lengths: Tensor) -> Tensor:
        if int(n_options.max()) > self.most:
            raise ValueError("that many options are not known")
        assert int(sample_lengths.min()) > 100
        return self.embedding(input_ids) * n_options[:, None, None]


def test_of_what_only_the_signature_tells_each_row_has_one_and_lengths_are_a_wave_s() -> None:
    given = probe_batch(Counting(1)).inputs
    assert given["n_options"].tolist() == [1, 1]
    assert given["sample_lengths"].tolist() == [SAMPLES, SAMPLES]


def test_a_refusal_says_why_a_forward_fails_with_all_that_it_requires() -> None:
    with pytest.raises(Refused, match="that many options are not known"):
        Model(Counting(0))


def test_what_reads_no_tokens_reads_vectors_in_their_place() -> None:
    """Qwen3-Omni's code predictor embeds tokens by its step of generation, and says that it expects no token ids."""
    name = "Qwen3OmniMoeTalkerCodePredictorModel"
    model_type = "qwen3_omni_moe_talker_code_predictor"
    with pytest.raises(Unbuildable, match="works on vectors in place of tokens alone"):
        tiny_model(model_type, name, partial(runs, strict=True))  # a model is made so last
    module = tiny_model(model_type, name, runs)
    model = Model(module)
    assert {n: x.shape for n, x in probe_batch(module).inputs.items()} == {
        "inputs_embeds": (2, 7, 64)
    }
    assert not set(model.spec.refused) - model.spec.absent
    with pytest.raises(BadInput, match=r"expected to be `None`; it works with 'inputs_embeds'"):
        model.run({"input_ids": torch.tensor([[3, 4]])})


class Joined(nn.Module):
    """Puts a vector of its own before those that it reads; or reads spectrograms of one channel, and says so."""

    main_input_name = "hidden_states"

    def __init__(self, spectrogram: bool) -> None:
        super().__init__()
        self.config = PreTrainedConfig(num_mel_bins=24)
        self.spectrogram = spectrogram
        self.first = nn.Parameter(torch.randn(1, 1, 12))

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.spectrogram:
            return hidden_states.transpose(1, 3)[..., 0]
        return torch.cat([self.first.expand(len(hidden_states), 1, -1), hidden_states], 1)


def test_numbers_are_as_wide_as_what_they_are_put_together_with_or_of_one_channel() -> None:
    (x,) = numbers_taken(Joined(spectrogram=False), "hidden_states", {}).values()
    assert x.shape == (2, 72, 12)
    (x,) = numbers_taken(Joined(spectrogram=True), "hidden_states", {}).values()
    assert x.shape == (2, 1, 72, 24)


class Patched(nn.Module):
    """Reads an image as a row of patches."""

    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__()
        self.config = PreTrainedConfig(image_size=8, patch_size=4)
        self.linear = nn.Linear(48, 8)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.linear(pixel_values)


def test_an_image_is_cut_into_patches_row_by_row_channels_last() -> None:
    image = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    (patches,) = otherwise_cut(Patched(), image)
    assert torch.equal(patches[1, 1], image[1, :, :4, 4:].permute(1, 2, 0).flatten())
    made = with_companions(Patched(), Batch({"pixel_values": image})).inputs["pixel_values"]
    assert torch.equal(made, patches)
    (frames,) = otherwise_cut(Patched(), image[None])
    assert torch.equal(frames, image)
