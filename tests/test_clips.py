"""Clips and images of sizes that no config tells: a part that reads images tells them, or the forward's own failure.

The Perceptual Encoders' towers are timm's by default; any classifier of images does, here a ViT. Tolerance: float32,
three blocks deep.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PeAudioVideoConfig, PeVideoEncoderConfig, ViTConfig

from benchmarks.tiny_configs import build
from interp.models.images import random_images
from interp.models.inputs import numbers_taken
from interp.models.model import Model
from interp.models.probe import probe_batch
from interp.run.edits import Edit
from interp.sites import AXES

ROUNDING = 1e-5
SIDE, VIDEOS = 24, "pixel_values_videos"
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def image_config(**of: Any) -> ViTConfig:
    return ViTConfig(**SMALL, image_size=SIDE, patch_size=8, num_labels=16, **of)


def video_config() -> PeVideoEncoderConfig:
    rope = {"rope_type": "default", "rope_theta": 20_000.0}
    return PeVideoEncoderConfig(
        **SMALL, head_dim=16, vision_config=image_config(), rope_parameters=rope
    )


@cache
def video() -> Model:
    return Model(build(transformers.PeVideoEncoder, video_config()), id="video")


def given(frames: int, rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(frames)
    return {VIDEOS: torch.randn(rows, frames, 3, SIDE, SIDE, generator=generator)}


def off(got: Tensor | None, wanted: Tensor) -> float:
    assert got is not None and got.shape == wanted.shape
    return float(((got - wanted).abs().max() / wanted.abs().max()).detach())


def hidden(module: Any) -> Any:
    """The module, whose configs say no longer how large images are."""
    for part in module.modules():
        if isinstance(getattr(part, "config", None), ViTConfig):
            part.config.image_size = 0
    return module


def test_a_clip_is_as_large_as_the_tower_of_images_takes_it() -> None:
    spec = video().spec
    assert not set(spec.refused) - spec.absent and all(check.passed for check in spec.checks)
    assert (spec.stack, spec.n_layers) == ("layers", 2)
    assert probe_batch(video().module).inputs[VIDEOS].shape == (2, 3, 3, SIDE, SIDE)


def test_a_clip_of_another_number_of_frames_is_the_model_s_own() -> None:
    """One position of the class's and one a frame; patterns are those of the eager attention."""
    model, clip = video(), given(5)
    sites = [site for site in AXES if model.layers_with(site)]
    run = model.run(clip, capture=sites)
    module: Any = model.module
    with torch.no_grad():
        assert off(run.logits, module(**clip).last_hidden_state) < ROUNDING
        module.set_attn_implementation("eager")
        own = module(**clip, output_attentions=True).attentions
        module.set_attn_implementation("sdpa")
    for layer in range(2):
        assert own[layer].shape == (3, 2, 6, 6)
        assert off(run.cache[f"pattern.{layer}"], own[layer]) < ROUNDING
    same = [Edit.apply(site, lambda x, seen: x) for site in sites]
    assert run.logits is not None and off(model.run(clip, edits=same).logits, run.logits) < ROUNDING


def test_where_no_config_tells_a_size_the_failure_of_the_forward_does() -> None:
    tower = hidden(build(transformers.ViTForImageClassification, image_config()))
    assert random_images(tower)["pixel_values"].shape == (2, 3, SIDE, SIDE)
    whole = hidden(build(transformers.PeVideoEncoder, video_config()))
    assert numbers_taken(whole, VIDEOS, {})[VIDEOS].shape == (2, 3, 3, SIDE, SIDE)
    oblong = image_config()
    oblong.image_size = (16, SIDE)
    tower = hidden(build(transformers.ViTForImageClassification, oblong))
    assert random_images(tower)["pixel_values"].shape == (2, 3, 16, SIDE)


def test_an_image_is_as_large_as_those_that_a_checkpoint_says_it_was_trained_on() -> None:
    class Fixed(torch.nn.Module):
        """A table of places for one size, of which its failure says nothing in pixels."""

        def __init__(self, side: int, **of: Any) -> None:
            super().__init__()
            self.convolution = torch.nn.Conv2d(3, 4, 16, 16)
            self.places = torch.nn.Parameter(torch.zeros((side // 16) ** 2, 4))
            self.config = transformers.PreTrainedConfig(**of)

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.convolution(pixel_values).flatten(2).mT + self.places

    told = Fixed(48, pretrained_cfg={"input_size": [3, 48, 48], "tag": "a1"})
    assert random_images(told)["pixel_values"].shape == (2, 3, 48, 48)
    assert random_images(Fixed(224))["pixel_values"].shape == (2, 3, 224, 224)


def test_all_inputs_that_a_failure_names_are_given_together() -> None:
    """The model wants two of three, and calls the encoder that it is named for with all three alone."""
    text = {"model_type": "modernbert", **SMALL, "vocab_size": 60, "pad_token_id": 0}
    video = video_config().to_dict()
    sound = transformers.PeAudioEncoderConfig(
        **SMALL,
        head_dim=16,
        rope_parameters=video["rope_parameters"],
        dac_config={
            "encoder_hidden_size": 4,
            "downsampling_ratios": [2, 4],
            "hidden_size": 16,
            "codebook_dim": 4,
        },
    )
    both = {**SMALL, "head_dim": 16, "rope_parameters": video["rope_parameters"]}
    config = PeAudioVideoConfig(
        text_config=text,
        audio_video_config={**both, "audio_config": sound, "video_config": video_config()},
    )
    module = build(transformers.PeAudioVideoModel, config)
    assert set(probe_batch(module).inputs) == {"input_ids", VIDEOS, "input_values"}


def test_attention_of_another_library_is_seen_whatever_size_its_images_have() -> None:
    for library in ("timm", "PIL", "torchvision"):
        pytest.importorskip(library)
    sized = {"embed_dim": 32, "depth": 2, "img_size": 48, "dynamic_img_size": False}
    config = transformers.TimmWrapperConfig(architecture="test_vit", model_args=sized, num_labels=4)
    module: Any = build(transformers.TimmWrapperForImageClassification, config)
    model = Model(module, id="timm")
    assert not set(model.spec.refused) - model.spec.absent
    assert probe_batch(module).inputs["pixel_values"].shape == (2, 3, 48, 48)
    pixels = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    run = model.run({"pixel_values": pixels}, capture=["pattern"])
    rows: list[Tensor] = []
    for block in module.timm_model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, args, out: rows.append(args[0]))
    with torch.no_grad():
        assert off(run.logits, module(pixels).logits) < ROUNDING
    for layer, own in enumerate(rows):
        assert off(run.cache[f"pattern.{layer}"], own) < ROUNDING
    assert len(rows) == 2
