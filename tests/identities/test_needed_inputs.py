"""Models whose forward needs more than one tensor: the probe finds the others, and a real call passes them all.

Tolerance: float32, three blocks deep, as in `test_families`.
"""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from benchmarks.architectures import examine, runs
from benchmarks.tiny_configs import tiny_model
from interp.errors import BadInput, Refused
from interp.models.calls import call_model, output_tensor
from interp.models.inputs import numbers_taken
from interp.models.model import Model
from interp.models.probe import probe_batch
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
    return float((got - wanted).detach().abs().max()) < ROUNDING * max(
        1.0, float(wanted.abs().max())
    )


def check_all_sites(model: Model, given: dict[str, Tensor]) -> None:
    """Capturing every site, and editing it to itself, leaves the model's output as it is."""
    sites = [s for s in AXES if s not in model.spec.refused and model.layers_with(s)]
    assert {"q", "k", "v", "z", "pattern", "resid_post"} <= set(sites)
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


def test_a_mask_that_the_signature_leaves_open_and_the_forward_needs() -> None:
    model = model_of("audioflamingo3_encoder", "AudioFlamingo3Encoder")
    assert not model.spec.refused
    known = probe_batch(model.module).inputs
    assert set(known) == {"input_features", "input_features_mask"}
    mask = known["input_features_mask"].clone()
    mask[1, mask.shape[1] // 2 :] = 0
    given = {"input_features": known["input_features"].flip(0), "input_features_mask": mask}
    check_all_sites(model, given)
    pattern = model.run(given, capture=["pattern.1"]).cache["pattern.1"]
    assert not pattern[1, ..., -1].any() and pattern[0].all()


def test_a_mask_that_is_missing_is_asked_for() -> None:
    model, given = model_of("fun_asr_nano_encoder", "FunAsrNanoEncoder"), spectrogram()
    with pytest.raises(BadInput, match=r"besides 'input_features_mask', such as \(2, \d+\)"):
        model.run({"input_features": given["input_features"]})


def test_a_mask_of_sound_beside_tokens_is_no_mask_of_tokens() -> None:
    sound = spectrogram()
    batch = Batch.of_inputs({"input_ids": words(2, 7), **sound})
    assert batch.mask is not None and batch.mask.shape == (2, 7) and batch.mask.all()
    alone = Batch.of_inputs(sound).mask
    assert alone is not None and alone.sum(1).tolist() == [30, 20]


def test_what_is_known_follows_the_type_of_the_weights() -> None:
    module = tiny_model("fun_asr_nano_encoder", "FunAsrNanoEncoder", runs)
    given = [numbers_taken(module, "input_features", {})]
    given += [numbers_taken(module.bfloat16(), "input_features", {})]
    assert [x["input_features"].dtype for x in given] == [torch.float32, torch.bfloat16]
    assert given[0]["input_features_mask"].dtype == torch.long


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


class Averaged(Folded):
    """The same, of all rows together."""

    def forward(self, bands: Tensor, bands_mask: Tensor) -> tuple[Tensor]:
        return (super().forward(bands, bands_mask)[0].mean(0, keepdim=True),)


def test_what_returns_no_row_for_a_row_is_refused_with_what_it_returns() -> None:
    with pytest.raises(Refused, match=r"\(2, 72, 48\): returns \(1, 36, 5\) for 2 rows"):
        numbers_taken(Averaged(), "bands", {})


@pytest.mark.parametrize(
    ("model_type", "name", "shape"),
    [
        ("mimi_encoder", "MimiEncoderModel", (2, 1, 6400)),  # convolutions with tensors for sizes
        ("patchtst", "PatchTSTModel", (2, 32, 1)),  # a time series: as long as the context
    ],
)
def test_waves_and_time_series_are_found(
    model_type: str, name: str, shape: tuple[int, ...]
) -> None:
    """In float64: series are scaled by their own spread, which makes up to 2e-5 of a float32 rounding."""
    model = Model(tiny_model(model_type, name, partial(runs, strict=True)).double(), id=name)
    (given,) = probe_batch(model.module).inputs.values()
    assert given.shape == shape
    main, generator = str(model.module.main_input_name), torch.Generator().manual_seed(3)
    x = torch.randn(3, *shape[1:], generator=generator, dtype=torch.float64)
    check_all_sites(model, {main: x})


@pytest.mark.parametrize(
    ("model_type", "name", "shapes"),
    [
        (
            "decision_transformer",
            "DecisionTransformerModel",
            {
                "states": (2, 72, 17),
                "actions": (2, 72, 4),
                "returns_to_go": (2, 72, 1),
                "timesteps": (2, 72),
            },
        ),
        (
            "timesfm",
            "TimesFmModel",
            {"past_values": (2, 6400), "past_values_padding": (2, 6400), "freq": (2, 1)},
        ),
        (
            "blip_2_qformer",
            "Blip2QFormerModel",
            {"query_embeds": (2, 72, 64), "encoder_hidden_states": (2, 74, 64)},
        ),
        (  # with the future, without which its decoder has one position
            "informer",
            "InformerModel",
            {
                "past_values": (2, 19),
                "past_observed_mask": (2, 19),
                "past_time_features": (2, 19, 0),
                "future_values": (2, 8),
                "future_time_features": (2, 8, 0),
            },
        ),
    ],
)
def test_layers_without_input_tell_what_the_forward_needs(
    model_type: str, name: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    model = model_of(model_type, name)
    given = probe_batch(model.module).inputs
    assert {each: tuple(x.shape) for each, x in given.items()} == shapes
    check_all_sites(model, given)


def test_what_a_forward_hands_on_to_its_layers_is_found_by_the_layer_that_is_given_none() -> None:
    """Voxtral's text model: its layers read a condition that its own signature does not name."""
    model = model_of("voxtral_realtime_text", "VoxtralRealtimeTextModel")
    assert not set(model.spec.refused) - model.spec.absent
    known = probe_batch(model.module).inputs
    assert {name: tuple(x.shape) for name, x in known.items()} == {
        "input_ids": (2, 7),
        "t_cond": (2, 7, 64),
    }
    given = {"input_ids": words(3, 9), "t_cond": 3 * torch.ones(3, 1, 64)}  # one for all positions
    check_all_sites(model, given)
    with torch.no_grad():
        assert close(model.run(given).logits, model.module(**given).last_hidden_state)
    assert not close(
        model.run({**given, "t_cond": 0 * given["t_cond"]}).logits, plain(model, given)
    )
    with pytest.raises(BadInput, match=r"fails on input_ids.*it works with.*'t_cond' \(2, 7, 64\)"):
        model.run({"input_ids": given["input_ids"]})


def test_what_a_forward_does_not_take_is_not_handed_on() -> None:
    """A tokenizer returns token types to any model: one that has no use for them is not given them."""
    model, ids = model_of("llama", "LlamaForCausalLM"), words(2, 9)
    besides = {"input_ids": ids, "token_type_ids": ids, "t_cond": torch.ones(2, 1, 64)}
    assert close(model.run(besides).logits, plain(model, {"input_ids": ids}))


def test_a_mask_of_booleans_says_what_one_of_whole_numbers_does() -> None:
    model, ids = model_of("llama", "LlamaForCausalLM"), words(2, 9)
    for mask in (MASK, MASK.flip(1), torch.ones_like(MASK)):
        as_numbers, as_booleans = (
            model.run({"input_ids": ids, "attention_mask": each}, capture=["pattern"])
            for each in (mask, mask.bool())
        )
        assert torch.equal(as_numbers.logits, as_booleans.logits)
        assert torch.equal(as_numbers.cache["pattern"], as_booleans.cache["pattern"])


def test_a_wave_is_as_long_as_the_failure_says() -> None:
    module = tiny_model("muse_spark_audio", "MuseSparkAudioModel", partial(runs, strict=True))
    (wave,) = numbers_taken(module, "input_values", {}).values()
    assert wave.shape == (2, 7680)  # four times 1920


class Joined(nn.Module):
    """Reads waves [batch 1 sample], a position every 320, and to each position five numbers besides."""

    main_input_name = "sound"

    def __init__(self, added: bool) -> None:
        super().__init__()
        self.config = PreTrainedConfig()
        self.added, self.linear = added, nn.Linear(5, 3)
        self.conv, self.longest = nn.Conv1d(1, 3, 320, stride=320), 0

    def forward(self, sound: Tensor, features: Tensor) -> tuple[Tensor]:
        self.longest = max(self.longest, features.shape[1])
        x, y = self.conv(sound).mT, self.linear(features)
        return (x + y if self.added else torch.cat([x, y], -1),)


@pytest.mark.parametrize("added", [True, False])
def test_numbers_beside_a_wave_are_as_long_as_what_they_are_put_together_with(added: bool) -> None:
    module = Joined(added)
    given = numbers_taken(module, "sound", {})
    shapes = {name: tuple(x.shape) for name, x in given.items()}
    assert shapes == {"sound": (2, 1, 6400), "features": (2, 6400 // 320, 5)}
    assert module.longest < 100  # and none as long as a wave has samples: a block would be slow


def test_sound_is_tried_beside_tokens_in_the_bins_that_the_config_tells() -> None:
    module = tiny_model("clvp", "ClvpModelForConditionalGeneration", partial(runs, strict=True))
    inputs = probe_batch(module).inputs
    assert set(inputs) == {"input_ids", "input_features"}
    bins = module.config.decoder_config.feature_size  # type: ignore
    assert inputs["input_features"].shape == (2, bins, 7)


def test_a_model_without_a_forward_is_refused_with_its_parts() -> None:
    module = tiny_model("bark", "BarkModel", runs)
    with pytest.raises(Refused, match=r"no forward of its own.*`model.semantic`, `model.coarse_"):
        Model(module)
    spec = Model(module.get_submodule("semantic")).spec
    assert not set(spec.refused) - spec.absent


def test_two_streams_are_told_apart_by_their_lengths() -> None:
    """LXMERT's blocks attend four times, over words, objects, and from each to the other: sites are of the words."""
    model = model_of("lxmert", "LxmertModel")
    given = probe_batch(model.module).inputs
    assert given["visual_feats"].shape == (2, 9, 64) and given["visual_pos"].shape == (2, 9, 4)
    run = model.run(given, capture=["resid_post", "cross_pattern"])
    n_words = run.cache["resid_post"].shape[1]
    assert n_words != 9 and run.cache["cross_pattern"].shape[-2:] == (n_words, 9)
    assert close(run.logits, plain(model, given))


def test_bins_behind_a_convolution_and_a_mask_are_found() -> None:
    made = numbers_taken(Folded(), "bands", {})
    frames = made["bands"].shape[1]
    assert made["bands"].shape[2] == 48 and made["bands_mask"].shape == (2, frames)


# --- several inputs -------------------------------------------------------------------------------

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])


def words(*shape: int) -> Tensor:
    return torch.randint(10, 97, shape, generator=torch.Generator().manual_seed(5))


def marked(n: int, length: int) -> Tensor:
    """1 at n positions behind the first."""
    return (
        torch.cat([torch.zeros(1), torch.ones(n), torch.zeros(length - n - 1)]).long().expand(2, -1)
    )


def boxes(n: int) -> Tensor:
    return (
        torch.rand(2, n, 2, 2, generator=torch.Generator().manual_seed(6)).sort(2).values.flatten(2)
    )


def placed(n: int) -> Tensor:
    """Nine tokens, of which n behind the first stand for an image."""
    ids = words(2, 9)
    ids[:, 1 : 1 + n] = 9
    return ids


SOUND = torch.randn(2, 128, 72, generator=torch.Generator().manual_seed(7))
WITH_IMAGES: dict[str, tuple[str, str, dict[str, Tensor]]] = {
    "image and text": (
        "blip",
        "BlipForConditionalGeneration",
        {"pixel_values": IMAGES, "input_ids": words(2, 9), "attention_mask": MASK},
    ),
    "several images a row": (
        "idefics",
        "IdeficsForVisionText2Text",
        {
            "pixel_values": torch.stack([IMAGES, IMAGES.flip(0)], 1),
            "image_attention_mask": torch.ones(2, 9, 2, dtype=torch.long),
            "input_ids": words(2, 9),
            "attention_mask": MASK,
        },
    ),
    "an image in place of tokens": (
        "kosmos-2",
        "Kosmos2ForConditionalGeneration",
        {
            "pixel_values": IMAGES,
            "image_embeds_position_mask": marked(8, 12),
            "input_ids": words(2, 12),
            "attention_mask": torch.tensor([[1] * 12, [1] * 10 + [0] * 2]),
        },
    ),
    "boxes of tokens": (
        "udop",
        "UdopForConditionalGeneration",
        {
            "input_ids": words(2, 9),
            "attention_mask": MASK,
            "bbox": boxes(9),
            "decoder_input_ids": words(2, 4),
        },
    ),
    "sound added to tokens": (
        "voxtral_realtime",
        "VoxtralRealtimeForConditionalGeneration",
        {"input_ids": words(2, 9), "attention_mask": MASK, "input_features": SOUND},
    ),
}
every = pytest.mark.parametrize("name", WITH_IMAGES)


def with_images(name: str) -> tuple[Model, dict[str, Tensor]]:
    of, model, given = WITH_IMAGES[name]
    return model_of(of, model, "encoder-decoder" if "decoder_input_ids" in given else ""), given


def real(logits: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Logits of the positions that are no padding."""
    mask = given["attention_mask"]
    return logits.flatten(0, 1) if "decoder_input_ids" in given else logits[mask.bool()]


@every
def test_a_call_with_all_that_a_processor_makes(name: str) -> None:
    model, given = with_images(name)
    assert not set(model.spec.refused) - model.spec.absent
    sites = [s for s in AXES if s not in model.spec.refused and model.layers_with(s)]
    assert {"z", "pattern", "mlp_post", "mlp_write", "resid_mid"} <= set(sites)
    run = model.run(given, capture=sites)
    with torch.no_grad():
        plain = output_tensor(model.module(**given, use_cache=False))
    assert close(real(run.logits, given), real(plain, given))
    same = [Edit.apply(site, lambda x, seen: x) for site in sites]
    assert close(model.run(given, edits=same).logits, run.logits)
    without = model.run(given, edits=[Edit.zero("z", heads=[(1, 2)])])
    assert not close(real(without.logits, given), real(plain, given))
    clean = model.run(given, capture=["resid_pre"])
    (replayed,) = model.replay(clean, [[Edit.zero("z", heads=[(1, 2)])]], lambda r: r.logits)
    assert close(real(replayed, given), real(without.logits, given))


@every
def test_a_head_writes_z_times_W_O(name: str) -> None:
    model, given = with_images(name)
    if model.spec.blocks[1].between:
        with pytest.raises(Refused, match="only through a function of it"):  # a norm
            model.W_O(1)
        return
    cache = model.run(given, capture=["z.1", "attn_out.1"]).cache
    without = model.run(given, capture=["attn_out.1"], edits=[Edit.zero("z", heads=[(1, 2)])])
    head = cache["z.1"][:, :, 2] @ model.W_O(1)[2]
    assert close(cache["attn_out.1"] - without.cache["attn_out.1"], head.detach())


def test_a_decoder_attends_to_the_image() -> None:
    """BLIP's text model: its writes are attention's, that to the image, and the MLP's, each behind a norm."""
    model, given = with_images("image and text")
    assert all(block.cross and len(block.writes) == 3 for block in model.spec.blocks)
    run = model.run(given, capture=["cross_pattern", "mlp_write.1", "mlp_out.1"])
    assert run.cache["cross_pattern.0"].shape[2:] == (9, 17)
    torch.testing.assert_close(run.cache["mlp_write.1"], run.cache["mlp_out.1"])
    other = {**given, "pixel_values": IMAGES.flip(0)}
    assert not close(model.run(other).logits, run.logits)


@every
def test_what_is_missing_is_asked_for(name: str) -> None:
    model, given = with_images(name)
    left_out = next(key for key in given if key not in ("input_ids", "attention_mask"))
    rest = {key: x for key, x in given.items() if key != left_out}
    wanted = rf"(fails on .*it works with|requires besides) .*'{left_out}'(, such as)? \(2, "
    with pytest.raises(BadInput, match=wanted):
        model.run(rest)


# --- towers that feed -----------------------------------------------------------------------------


def test_the_stack_behind_the_towers_is_the_models_own() -> None:
    """A vision tower, a Q-former and the language model: what the language model's blocks return is all there is."""
    model = model_of("blip-2", "Blip2ForConditionalGeneration")
    assert model.spec.stack.startswith("language_model.") and not model.spec.refused
    given = {
        "pixel_values": IMAGES,
        "input_ids": torch.cat([torch.full((2, 32), 9), words(2, 5)], 1),
    }
    run = model.run(given, capture=["resid_pre"])
    with torch.no_grad():
        assert close(run.logits, model.module(**given).logits)
    other = model.run({**given, "pixel_values": IMAGES.flip(0)}, capture=["embed"])
    changed = (other.cache["embed"] - run.cache["resid_pre.0"]).abs().amax(-1) > 0
    assert changed[:, :32].all() and not changed[:, 32:].any()
    assert close(
        model.unembed(model.run(given, capture=["resid_post.2"]).cache["resid_post.2"]), run.logits
    )


def test_streams_that_attend_to_each_other_have_no_own_stack() -> None:
    module = tiny_model("bridgetower", "BridgeTowerModel", partial(runs, strict=True))
    with pytest.raises(Refused, match="4 stacks of attention blocks"):
        Model(module)


# --- a robot's policy -----------------------------------------------------------------------------


def policy_inputs() -> dict[str, Tensor]:
    """Nine tokens, as many as there are positions of state and actions; two images a row, one of them padding."""
    seen = torch.tensor([[True, True], [True, False]])
    return {
        "state": torch.randn(2, 32, generator=torch.Generator().manual_seed(8)),
        "input_ids": words(2, 9),
        "attention_mask": MASK,
        "pixel_values": torch.stack([IMAGES, IMAGES.flip(0)], 1),
        "pixel_attention_mask": seen,
    }


def test_a_policy_s_blocks_read_state_and_actions_and_attend_to_the_prompt() -> None:
    model, given = model_of("pi0", "PI0ForConditionalGeneration"), policy_inputs()
    assert not model.spec.refused and "draws random numbers" in model.notes[0]
    sites = [s for s in AXES if model.layers_with(s)]
    run = model.run(given, capture=sites)
    assert run.cache["pattern.1"].shape == (2, 4, 9, 18)  # the prompt's keys before its own
    assert not run.cache["pattern.1"][1, ..., 6:9].any()
    assert run.cache["pattern.1"][0, :, 1:].all()  # the state sees no action
    torch.manual_seed(0)
    with torch.no_grad():
        assert close(run.logits, model.module(**given).logits)
    told = {"noise": torch.randn(2, 8, 32), "timestep": torch.tensor([0.2, 0.7])}
    with torch.no_grad():
        plain = model.module(**given, **told).logits
    assert close(model.run({**given, **told}, capture=sites).logits, plain)


def test_a_mask_of_the_prompt_is_no_mask_of_actions() -> None:
    model, given = model_of("pi0", "PI0ForConditionalGeneration"), policy_inputs()
    z = model.run(given, capture=["z.1"]).cache["z.1"]
    mean = Edit.apply("z.1", lambda x, seen: z.mean((0, 1)).expand_as(x))
    with_mean = model.run(given, edits=[Edit.mean("z.1")]).logits
    assert close(with_mean, model.run(given, edits=[mean]).logits)
    with pytest.raises(Refused, match="no token embedding"):
        _ = model.W_E
    with pytest.raises(BadInput, match=r"fails on 'state'.*'pixel_attention_mask' \(2, 1\)"):
        model.run({"state": given["state"]})


# --- tokens by two names --------------------------------------------------------------------------


def test_tokens_may_be_given_by_the_name_for_inputs_of_any_kind() -> None:
    """Perceiver's blocks hold latents, not tokens; its logits are those of the longest input's positions."""
    model = model_of("perceiver", "PerceiverForMaskedLM")
    ids = torch.randint(6, 97, (3, 9), generator=torch.Generator().manual_seed(2))
    assert set(model.spec.refused) == model.spec.absent == {"unembedding"}
    check_all_sites(model, {"input_ids": ids})
    check_all_sites(model, {"inputs": ids})
    first, same, other = (
        model.run(x, capture=["resid_post.0"])
        for x in ({"inputs": ids}, {"input_ids": ids}, {"inputs": ids.flip(1)})
    )
    assert torch.equal(first.cache["resid_post.0"], same.cache["resid_post.0"])
    assert not torch.equal(first.cache["resid_post.0"], other.cache["resid_post.0"])


def test_the_sweep_tries_every_stack_side_by_side_as_a_model_or_by_its_name() -> None:
    row = examine("altclip", "", ["AltCLIPModel"])
    assert row is not None and (row.kind, row.outcome) == ("multimodal", "in full")
    assert row.reason.endswith("vision_model, text_model.roberta")
    row = examine("bridgetower", "", ["BridgeTowerModel"])
    assert row is not None and (row.outcome, row.n_layers) == ("in full", 12)
    left = "resblocks, cross_modal_text_layers, cross_modal_image_layers"
    assert "model of its own: text_model; by stack=" in row.reason and row.reason.endswith(left)


# --- images beside images -------------------------------------------------------------------------


def test_a_model_that_matches_two_images_reads_them_in_pairs() -> None:
    model = model_of("lightglue", "LightGlueForKeypointMatching", "vision")
    known = probe_batch(model.module).inputs
    assert set(known) == {"pixel_values"} and known["pixel_values"].shape[1:3] == (2, 3)
    given = {"pixel_values": known["pixel_values"].flip(0)}
    run = model.run(given, capture=["pattern", "resid_post"])
    assert run.logits.is_floating_point() and close(run.logits, plain(model, given))
    one = model.run({"pixel_values": given["pixel_values"][:1]}, capture=["pattern", "resid_post"])
    for site in ("pattern.0", "resid_post.0"):  # a row is a pair, whatever else is in the batch
        assert close(run.cache[site][:1], one.cache[site])
    with pytest.raises(BadInput, match="pixel_values"):
        model.run({"pixel_values": given["pixel_values"][:, 0]})


def test_a_prompt_s_image_and_masks_are_of_the_image_s_shape() -> None:
    module = tiny_model("seggpt", "SegGptModel", partial(runs, strict=True))
    inputs = probe_batch(module).inputs
    assert set(inputs) == {"pixel_values", "prompt_pixel_values", "prompt_masks"}
    assert {x.shape for x in inputs.values()} == {(2, 3, 32, 32)}


def test_what_a_forward_requires_besides_is_named_where_it_is_left_out() -> None:
    """Gemma 4's tower of images is told the place of each patch; its own forward raises a TypeError."""
    model = model_of("gemma4_vision", "Gemma4VisionModel")
    given = probe_batch(model.module).inputs
    assert set(given) == {"pixel_values", "pixel_position_ids"}
    for name, x in given.items():
        (left,) = set(given) - {name}
        wanted = rf"requires besides '{left}', such as \({', '.join(map(str, given[left].shape))}\)"
        for capture in ([], ["pattern"]):
            with pytest.raises(BadInput, match=wanted):
                model.run({name: x}, capture=capture)


class Codec(nn.Module):
    """What no random input fits; around a model, or nothing."""

    main_input_name = "pixel_values_videos"

    def __init__(self, part: nn.Module | None = None) -> None:
        super().__init__()
        self.config = PreTrainedConfig(image_size=16)
        self.inner, self.linear = nn.ModuleList([part] if part else []), nn.Linear(2, 2)

    def forward(self, pixel_values_videos: Tensor) -> Tensor:
        assert pixel_values_videos.ndim == 5, "5 axes are wanted"
        return pixel_values_videos.flatten(0, 2)


def test_where_no_shape_works_the_parts_that_are_models_are_named() -> None:
    part = model_of("gemma4_vision", "Gemma4VisionModel").module
    tried = r"of \(2, 3, 3, 16, 16\): returns \(18, 16, 16\) for 2 rows\); wanted: one with a row for each"
    with pytest.raises(
        Refused, match=rf"{tried}.* pass a part that is a model of its own: inner.0$"
    ):
        Model(Codec(part))
    with pytest.raises(Refused, match=rf"{tried}.*no part of it is a model"):
        Model(Codec())


class Session:
    """What a video has been found to hold so far."""


class Tracker(PreTrainedModel):
    """Reads no tensor; around a model that does."""

    config_class = PreTrainedConfig
    main_input_name = "pixel_values"

    def __init__(self, part: nn.Module) -> None:
        super().__init__(PreTrainedConfig())
        self.tower = part

    def forward(self, session: Session, frame: int | None = None) -> Tensor:
        return self.tower(session.pixels)  # type: ignore


def test_an_input_that_is_no_tensor_is_named_with_the_parts_that_read_tensors() -> None:
    part = model_of("gemma4_vision", "Gemma4VisionModel").module
    wanted = "Tracker takes 'session', which by its signature is no tensor but Session; .*: "
    with pytest.raises(Refused, match=rf"^{wanted}tower$"):
        Model(Tracker(part))
    with pytest.raises(
        Refused, match=rf"^{wanted}tower.tower$"
    ):  # another is passed no more easily
        Model(Tracker(Tracker(part)))
