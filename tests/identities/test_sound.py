"""Models that read sound, video or cut patches: the probe finds an input, and the identities hold on others.

The inputs of the tests are of other lengths than the probe's, where a model takes any. Tolerance: float32,
three blocks deep, as in `test_families`.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from benchmarks.architectures import runs
from benchmarks.tiny_configs import tiny_model
from interp.errors import BadInput, Refused
from interp.lens import logit_lens, read
from interp.models.attention import implementation
from interp.models.calls import call_model, output_tensor
from interp.models.inputs import numbers_taken
from interp.models.model import Model
from interp.models.probe import probe_batch
from interp.run.batch import Batch
from interp.run.edits import Edit
from interp.sites import AXES, Site

ROUNDING = 1e-5
MADE: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "waves": ("wav2vec2", "Wav2Vec2ForCTC", (3, 5000)),
    "waves, norm after adding": ("hubert", "HubertModel", (3, 5000)),
    "frames": ("parakeet_ctc", "ParakeetForCTC", (3, 90, 80)),
    "frames, bins of no common name": ("pix2struct", "Pix2StructVisionModel", ()),
    "frames, a fixed number": (
        "audio-spectrogram-transformer",
        "ASTForAudioClassification",
        (),
    ),
    "video": ("vjepa2", "VJEPA2ForVideoClassification", ()),
    "frames to text": ("speech_to_text", "Speech2TextForConditionalGeneration", (3, 90, 80)),
    "fixed frames to text": ("whisper", "WhisperForConditionalGeneration", ()),
    "waves to text": ("moonshine", "MoonshineForConditionalGeneration", (3, 5000)),
    "waves to text, two models": (
        "speech-encoder-decoder",
        "SpeechEncoderDecoderModel",
        (3, 5000),
    ),
}
TO_TEXT = [name for name in MADE if "to text" in name]
every = pytest.mark.parametrize("name", MADE)
to_text = pytest.mark.parametrize("name", TO_TEXT)


@cache
def model_of(name: str) -> Model:
    of, model, _ = MADE[name]
    kind = "encoder-decoder" if name in TO_TEXT else ""
    return Model(tiny_model(of, model, partial(runs, kind=kind, strict=True)), id=name)


def inputs(name: str) -> dict[str, Tensor]:
    """Three rows, longer or shorter than the probe's two where the model takes any length."""
    generator = torch.Generator().manual_seed(3)
    model = model_of(name)
    main = str(model.module.main_input_name)
    shape = MADE[name][2] or (3, *probe_batch(model.module).inputs[main].shape[1:])
    x = torch.randn(shape, generator=generator)
    given = {main: x.abs() if x.ndim == 3 else x}
    if name in TO_TEXT:
        given["decoder_input_ids"] = torch.randint(10, 97, (3, 7), generator=generator)
    return given


def plain(model: Model, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return output_tensor(call_model(model.module, Batch.of_inputs(given)))


def close(got: Tensor, wanted: Tensor) -> bool:
    assert got.shape == wanted.shape
    got, wanted = got.detach(), wanted.detach()
    return float((got - wanted).abs().max()) < ROUNDING * max(1.0, float(wanted.abs().max()))


@every
def test_it_verifies_in_full(name: str) -> None:
    spec = model_of(name).spec
    assert not set(spec.refused) - set(spec.absent)
    failed = {check.name for check in spec.checks if not check.passed}
    # The video model's last blocks pool what the others return, behind a norm.
    assert failed == ({"stream"} if name == "video" else set())
    assert {"window", "heads"} <= {check.name for check in spec.checks}
    assert len(spec.attention_layers) == spec.n_layers > 1
    assert all(bool(block.cross) == (name in TO_TEXT) for block in spec.blocks)


@every
def test_looking_and_touching_change_nothing(name: str) -> None:
    model, given = model_of(name), inputs(name)
    sites = [s for s in AXES if s not in model.spec.refused and model.layers_with(s)]
    run = model.run(given, capture=sites)
    assert close(run.logits, plain(model, given))
    touched = [Edit.apply(site, lambda x, seen: x) for site in sites]
    assert close(model.run(given, edits=touched).logits, run.logits)
    n_pos = run.cache["resid_post.0"].shape[1]
    for site in sites:
        shape = run.cache[Site(site, 0)].shape
        for axis, size in zip(AXES[site], shape, strict=True):
            assert axis not in ("pos", "query_pos", "key_pos") or size == n_pos, site


@every
def test_a_head_writes_z_times_W_O(name: str) -> None:
    model, given = model_of(name), inputs(name)
    site = "cross" if name in TO_TEXT else "attn"
    cross, z = site == "cross", "cross_z" if site == "cross" else "z"
    cache = model.run(given, capture=[f"{z}.1", f"{site}_out.1"]).cache
    without = model.run(given, capture=[f"{site}_out.1"], edits=[Edit.zero(z, heads=[(1, 2)])])
    head = cache[f"{z}.1"][:, :, 2] @ model.W_O(1, cross=cross)[2]
    assert close(cache[f"{site}_out.1"] - without.cache[f"{site}_out.1"], head)
    assert not close(without.logits, plain(model, given))


@pytest.mark.parametrize("name", [name for name in MADE if name not in ("frames", "video")])
def test_patterns_are_those_of_hugging_face(name: str) -> None:
    model, given, module = model_of(name), inputs(name), model_of(name).module
    sites = ["pattern", *(["cross_pattern"] if name in TO_TEXT else [])]
    cache = model.run(given, capture=sites).cache
    with torch.no_grad(), implementation(module, "eager"):
        theirs = call_model(module, Batch.of_inputs(given), output_attentions=True)
    own = theirs.decoder_attentions if name in TO_TEXT else theirs.attentions
    for layer in range(model.n_layers):
        assert close(cache[f"pattern.{layer}"], own[layer])
        if name in TO_TEXT:
            assert close(cache[f"cross_pattern.{layer}"], theirs.cross_attentions[layer])


@to_text
def test_sound_alone_is_read_by_a_decoder_that_begins(name: str) -> None:
    model, given = model_of(name), inputs(name)
    sound = {key: x for key, x in given.items() if not key.startswith("decoder")}
    if name == "waves to text, two models":
        with pytest.raises(BadInput, match="decoder_start_token_id"):
            model.run(sound)
        return
    run = model.run(sound, capture=["cross_pattern"])
    start = model.module.config.decoder_start_token_id
    assert run.batch.ids.tolist() == [[start]] * 3
    begun = {**sound, "decoder_input_ids": torch.full((3, 1), start)}
    assert close(run.logits, plain(model, begun))


def test_padding_in_samples_is_no_mask_of_positions() -> None:
    """Wav2Vec2 reads a mask of samples and has one position in 320: a mean over positions is not guessed."""
    model, given = model_of("waves"), inputs("waves")
    mask = torch.ones(3, 5000, dtype=torch.long)
    whole = model.run({**given, "attention_mask": mask}, edits=[Edit.mean("z.1")])
    assert close(whole.logits, model.run(given, edits=[Edit.mean("z.1")]).logits)
    mask[1, 3000:] = 0
    padded = {**given, "attention_mask": mask}
    run = model.run(padded, capture=["pattern"])
    assert close(run.logits, plain(model, padded))
    assert (run.cache["pattern.0"][1, ..., -1] == 0).all() and run.cache["pattern.0"][0].all()
    with pytest.raises(BadInput, match="mask of 5000 samples or frames"):
        model.run(padded, edits=[Edit.mean("z.1")])


def test_padding_of_a_spoken_source_is_no_mask_of_positions() -> None:
    model, given = model_of("frames to text"), inputs("frames to text")
    mask = torch.ones(3, 90, dtype=torch.long)
    mask[1, 40:] = 0
    padded = {**given, "attention_mask": mask}
    run = model.run(padded, capture=["cross_pattern"])
    assert close(run.logits, plain(model, padded))
    assert not run.cache["cross_pattern.0"][1, ..., 12:].any()
    with pytest.raises(BadInput, match="give rows of one length"):
        model.run(padded, edits=[Edit.mean("cross_v.1")])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.randn(2, 5000), r'given input_ids: model.run\({"input_values": …}\)'),
        ("words", "was given text"),
        ({"input_features": torch.randn(2, 5000)}, "was given input_features"),
        ({"input_values": torch.randn(2, 80, 30)}, "2 axes, such as"),
        ({"input_values": torch.ones(2, 5000, dtype=torch.long)}, "floating-point numbers"),
    ],
)
def test_what_is_given_is_checked(given: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        model_of("waves").run(given)
    if not isinstance(given, dict):
        with pytest.raises(BadInput, match="decoder_input_ids"):
            model_of("frames to text").run(given)


def test_what_the_model_fails_on_is_told_with_what_it_takes() -> None:
    waves, frames = model_of("waves"), model_of("frames")
    before = n_hooks(waves.module)
    with pytest.raises(BadInput, match=r"shape \(2, 100\).*works on shape \(2, 6400\)"):
        waves.run({"input_values": torch.randn(2, 100)})
    with pytest.raises(BadInput, match=r"\(2, 90, 64\).*works on shape \(2, 72, 80\)"):
        frames.run({"input_features": torch.randn(2, 90, 64)})
    with pytest.raises(BadInput, match=r"type torch.float64.*type torch.float32"):
        waves.run({"input_values": torch.randn(2, 5000, dtype=torch.float64)})

    def wrong(x: Tensor, seen: Any) -> Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):  # the edit's own fault stays what it is
        waves.run(inputs("waves"), edits=[Edit.apply("z.1", wrong)])
    assert n_hooks(waves.module) == before


def n_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_frames_that_are_rows_of_their_own_are_shown_in_the_batch_s() -> None:
    """A factorised video model: first the patches of each frame, then the frames of each patch."""
    module = tiny_model(
        "videoprism_vision_model", "VideoPrismVisionModel", partial(runs, strict=True)
    )
    model = Model(module)
    run = model.run(probe_batch(module), capture=["resid_pre", "pattern"])
    for layer in range(model.n_layers):
        assert run.cache[f"resid_pre.{layer}"].shape[0] == 2
        assert run.cache[f"pattern.{layer}"].shape[0] == 2
    assert not model.spec.refused


class Toy(nn.Module):
    """Reads a spectrogram [batch ... 13] or [batch 13 ...]; its config names no size."""

    main_input_name = "bands"

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.config, self.first = PreTrainedConfig(), first

    def forward(self, bands: Tensor) -> tuple[Tensor]:
        assert bands.ndim == 3, "a spectrogram has three axes"
        return (self.first(bands),)


@pytest.mark.parametrize(
    ("first", "axis"), [(nn.Linear(13, 4), 2), (nn.Conv1d(13, 4, 3), 1), (nn.LayerNorm(13), 2)]
)
def test_the_layer_that_failed_says_what_it_wanted(first: nn.Module, axis: int) -> None:
    toy = Toy(first)
    x = numbers_taken(toy, "bands", {})["bands"]
    assert x.ndim == 3 and x.shape[axis] == 13
    assert torch.equal(x, numbers_taken(toy, "bands", {})["bands"])
    assert n_hooks(toy) == 0


def test_a_forward_that_works_with_nothing_is_refused() -> None:
    with pytest.raises(Refused, match=r"takes 'bands'.*none of the \d shapes.*\(2, 6400\)"):
        numbers_taken(Toy(nn.Bilinear(3, 3, 3)), "bands", {})


def test_letters_are_read_off_any_layer() -> None:
    """A CTC head is an unembedding: linear in the final residual, and the lens of the last layer is the model."""
    model, given = model_of("waves"), inputs("waves")
    run = model.run(given, capture=["resid_post"])
    last = run.cache["resid_post.2"]
    assert close(model.unembed(last), run.logits)
    normed = (
        last
        if model.spec.final_norm is None
        else model.module.get_submodule(model.spec.final_norm)(last)
    )
    assert close(normed @ model.W_U + model.module.lm_head.bias, run.logits)
    layers = run.cache["resid_post"].permute(2, 0, 1, 3).flatten(1, 2)
    reading = read(model, layers, final=layers[-1], top_k=3)
    assert reading.kl is not None and not reading.kl[-1].any() and reading.kl[0].min() > 1e-3
    assert torch.equal(reading.top_ids[-1, :, 0].view(3, -1), run.logits.argmax(-1))
    assert model_of("frames").spec.final_norm is None  # its head is a convolution, and no norm
    with pytest.raises(Refused, match="reads no tokens"):
        logit_lens(model, given)
    with pytest.raises(Refused, match="no language-model head"):
        model_of("frames, a fixed number").unembed(last)


@pytest.mark.parametrize("name", ["waves", "video", "frames to text"])
def test_a_replay_is_a_run_anew(name: str) -> None:
    model, given = model_of(name), inputs(name)
    clean = model.run(given, capture=["resid_pre"])
    variants = [[Edit.zero("z", heads=[(1, 2)])], [Edit.resample("resid_mid.1")], []]
    replayed = model.replay(clean, variants, lambda run: run.logits)
    for logits, edits in zip(replayed, variants, strict=True):
        assert close(logits, model.run(given, edits=edits).logits)
    assert not close(replayed[0], replayed[2])


# --- half of the MLP first, a norm last ---------------------------------------------------------------


def test_what_a_block_returns_is_no_part_of_the_sum_before_its_last_norm() -> None:
    """Gemma 4's sound: half an MLP, attention, a convolution, half an MLP, and a norm of what they add up to.

    With the norm's output for a write, two more that take the stream away would make a sum, too.
    """
    module = tiny_model("gemma4_audio", "Gemma4AudioModel", partial(runs, strict=True))
    model = Model(module)
    assert not model.spec.refused and all(check.passed for check in model.spec.checks)
    block = model.spec.blocks[1]
    assert block.norm_post == "layers.1.norm_out" and len(block.writes) == 4
    batch, kept = probe_batch(module), dict[str, Tensor]()
    hooks = [
        module.get_submodule(f"layers.1.{name}").register_forward_hook(
            lambda part, args, out, name=name: kept.update({name: out.detach().clone()})
        )
        for name in ("feed_forward1", "norm_post_attn")
    ]
    sites = ["resid_pre", "mlp_write", "resid_mid", "attn_write", "resid_post"]
    cache = model.run(batch, capture=[f"{site}.1" for site in sites]).cache
    for hook in hooks:
        hook.remove()
    assert close(cache["resid_pre.1"] + cache["mlp_write.1"], cache["resid_mid.1"])
    assert close(cache["resid_mid.1"], kept["feed_forward1"])
    assert close(cache["attn_write.1"], kept["norm_post_attn"])
