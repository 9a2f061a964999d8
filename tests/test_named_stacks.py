"""Models of several stacks of blocks, one of which is named: BridgeTower's four, CLIP-like towers, towers that feed."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartEncoderLayer

import interp
from benchmarks.architectures import runs
from benchmarks.tiny_configs import tiny_model
from interp.errors import BadInput, Refused
from interp.generate import generate
from interp.models.calls import call_model, output_tensor
from interp.models.discover import discover
from interp.models.kernels import in_float64
from interp.models.load import weights_sha256
from interp.models.model import Model
from interp.models.named import last_returned
from interp.models.probe import probe_batch
from interp.models.recording import record
from interp.models.verify import verify
from interp.report import provenance
from interp.run.edits import Edit
from interp.sites import AXES
from probes.controls import random_weights
from probes.saes.model import SAE, SAEConfig
from tests.families import FAMILIES

ROUNDING = 1e-5
"""A few float32 roundings, three blocks deep."""
STACKS = {
    "text_model.encoder.layer": "text_model.encoder.layer.{}.attention.output.dense",
    "cross_modal_text_layers": "cross_modal_text_layers.{}.attention.output.dense",
    "cross_modal_image_layers": "cross_modal_image_layers.{}.attention.output.dense",
}
"""Of a BridgeTower, and where the output projection of a layer's attention is. PyTorch's own attention of the
fourth calls none."""
IMAGES = "vision_model.visual.transformer.resblocks"
every_stack = pytest.mark.parametrize("stack", [*STACKS, IMAGES])


def off(got: Tensor | None, wanted: Tensor | None) -> float:
    assert got is not None and wanted is not None and got.shape == wanted.shape
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


@cache
def bridge() -> nn.Module:
    module = tiny_model("bridgetower", "BridgeTowerModel", runs)
    assert sum(x.numel() for x in module.parameters()) < 1_000_000
    return module


@cache
def opened(stack: str) -> Model:
    return interp.load(bridge(), stack=stack)


def inputs(padded: bool = False) -> dict[str, Tensor]:
    config: Any = bridge().config
    generator = torch.Generator().manual_seed(7)
    side = config.vision_config.image_size
    given = {
        "input_ids": torch.randint(10, 90, (2, 6), generator=generator),
        "pixel_values": torch.randn(2, 3, side, side, generator=generator),
    }
    if padded:
        given["attention_mask"] = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    return given


def plain(module: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return module(**given)[0]


def heard(module: nn.Module, name: str, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What a block is called with and what it returns, in a plain forward."""
    kept: list[Tensor] = []

    def keep(block: nn.Module, args: tuple, output: Any) -> None:
        kept.extend((args[0], output if isinstance(output, Tensor) else output[0]))

    hook = module.get_submodule(name).register_forward_hook(keep)
    plain(module, given)
    hook.remove()
    return kept[0], kept[1]


# --- each stack of one model ----------------------------------------------------------------------


@every_stack
def test_the_layers_are_those_of_the_stack_that_is_named(stack: str) -> None:
    model = opened(stack)
    assert model.spec.stack == stack and model.spec.named and model.n_layers == 3
    assert set(model.spec.refused) == model.spec.absent
    failed = {check.name for check in model.spec.checks if not check.passed}
    assert failed == ({"stream"} if "cross_modal" in stack else set())  # link towers stand between
    sites = [site for site in AXES if site not in model.spec.refused and model.layers_with(site)]
    assert ("cross_pattern" in sites) == ("cross_modal" in stack)
    given = inputs(padded=True)
    run = model.run(given, capture=sites)
    assert off(run.logits, plain(model.module, given)) < ROUNDING
    for layer in range(3):
        read, returned = heard(model.module, f"{stack}.{layer}", given)
        turned = stack == IMAGES  # held as [pos batch d_model]
        for site, x in (("resid_pre", read), ("resid_post", returned)):
            wanted = x.transpose(0, 1) if turned else x
            assert off(run.cache[f"{site}.{layer}"], wanted) < ROUNDING
    same = [Edit.apply(site, lambda x, seen: x) for site in sites]
    assert off(model.run(given, edits=same).logits, run.logits) < ROUNDING


@pytest.mark.parametrize("stack", STACKS)
def test_a_head_without_output_is_a_plain_forward_without_it(stack: str) -> None:
    model, given = opened(stack), inputs()
    d_head = model.spec.d_head

    def without(module: nn.Module, args: tuple) -> tuple:
        x = args[0].clone()
        x[..., 2 * d_head : 3 * d_head] = 0
        return (x,)

    hook = model.module.get_submodule(STACKS[stack].format(1)).register_forward_pre_hook(without)
    wanted = plain(model.module, given)
    hook.remove()
    edit = Edit.zero("z", heads=[(1, 2)])
    got = model.run(given, edits=[edit]).logits
    assert off(got, wanted) < ROUNDING < off(got, plain(model.module, given)) / 10
    clean = model.run(given, capture=["resid_pre"])
    (again, other) = model.replay(clean, [[edit], []], lambda run: run.logits)
    assert off(again, wanted) < ROUNDING and off(other, clean.logits) < ROUNDING


@pytest.mark.parametrize(
    "site",
    [
        "text_model.encoder.layer:resid_pre.2",
        "cross_modal_text_layers:embed",
        f"{IMAGES}:attn_out.1",
    ],
)
def test_a_gradient_is_that_of_what_an_edit_changes(site: str) -> None:
    """In float64. What a block returned is read by links between towers, too, which the next block's input is not."""
    stack, site = site.split(":")
    exact, batch = in_float64(bridge(), probe_batch(bridge()))
    model = Model(exact, stack=stack)
    generator = torch.Generator().manual_seed(5)

    def drawn(x: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=x.dtype, generator=generator)

    run = model.run(batch, capture=[site], grad=True)
    at, of = drawn(run.cache[site]), drawn(run.logits)
    along = float((run.gradients((run.logits * of).sum(), site) * at).sum())
    step = 1e-5
    ends = [
        model.run(batch, edits=[Edit.apply(site, lambda x, seen, by=by: x + by * at)]).logits
        for by in (step, -step)
    ]
    difference = float(((ends[0] - ends[1]) * of).sum()) / (2 * step)
    assert abs(difference) > 1e-3 and abs(along - difference) < 1e-4 * abs(difference)


def test_a_stack_of_which_the_output_is_not_made_says_so() -> None:
    """What the model returns first says nothing of it: what its last block returns is compared instead."""
    segmenter = Model(tiny_model("maskformer", "MaskFormerModel", runs))  # first its backbone's map
    for model in (segmenter, opened("cross_modal_image_layers")):
        (note,) = (note for note in model.notes if "run.logits, is not made of" in note)
        assert model.spec.blocks[-1].name in note
        assert "stack" in {check.name for check in model.spec.checks}
        last = f"resid_post.{model.n_layers - 1}"
        batch, edit = probe_batch(model.module), Edit.zero(last)
        clean, edited = model.run(batch), model.run(batch, capture=[last], edits=[edit])
        assert torch.equal(edited.logits, clean.logits) and not edited.cache[last].any()
    assert opened("cross_modal_text_layers").spec.heard and not opened(IMAGES).spec.unheard


def test_a_stack_with_attention_of_its_own_code_beside_others_that_call_the_interface() -> None:
    model, given = opened(IMAGES), inputs()
    attention = model.module.get_submodule(f"{IMAGES}.1.attn")
    bias = attention.out_proj.bias  # all that is left of an output without heads
    hook = attention.register_forward_hook(
        lambda module, args, out: (bias.expand_as(out[0]), *out[1:])
    )
    wanted = plain(model.module, given)
    hook.remove()
    got = model.run(given, edits=[Edit.zero("z.1")]).logits
    assert off(got, wanted) < ROUNDING < off(got, plain(model.module, given)) / 10
    pattern = model.run(given, capture=["pattern"]).cache["pattern.2"]
    assert pattern.shape[-1] == 17 and off(pattern.sum(-1), torch.ones(pattern.shape[:-1])) < 1e-5


@pytest.mark.parametrize(("to", "own"), [("text", 6), ("image", 17)])
def test_attention_to_the_other_tower_is_cross_attention(to: str, own: int) -> None:
    """Each stack reads the other, and of a padded text the padding is not read."""
    name = f"cross_modal_{to}_layers"
    model, given = opened(name), inputs(padded=True)
    cache = model.run(given, capture=["cross_pattern", "cross_z", "cross_out", "cross_k"]).cache
    pattern = cache["cross_pattern.0"]
    assert pattern.shape == (2, model.spec.n_heads, own, 23 - own)
    assert off(pattern.sum(-1), torch.ones(pattern.shape[:-1])) < 1e-5
    if to == "image":
        assert not pattern[1, ..., 4:].any() and pattern[0].all()
    heads = torch.einsum("bphd,hdm->bpm", cache["cross_z.1"], model.W_O(1, cross=True))
    assert off(heads + model.b_O(1, cross=True), cache["cross_out.1"]) < ROUNDING

    d_head = model.spec.d_head

    def without(module: nn.Module, args: tuple) -> tuple:
        x = args[0].clone()
        x[..., :d_head] = 0
        return (x,)

    part = model.module.get_submodule(f"{name}.1.crossattention.output.dense")
    hook = part.register_forward_pre_hook(without)
    wanted = plain(model.module, given)
    hook.remove()
    got = model.run(given, edits=[Edit.zero("cross_z", heads=[(1, 0)])]).logits
    assert off(got, wanted) < ROUNDING < off(got, plain(model.module, given)) / 10


def test_what_one_stack_alone_would_be_is_refused() -> None:
    for stack in (*STACKS, IMAGES):  # link towers read what their blocks return besides
        with pytest.raises(Refused, match="read by more than the block after"):
            opened(stack).require_sum("this test")
        with pytest.raises(Refused, match="no language-model head"):
            _ = opened(stack).W_U
    words = bridge().get_submodule("text_model.embeddings.word_embeddings")
    assert opened("text_model.encoder.layer").W_E is words.weight
    for stack in ("cross_modal_text_layers", IMAGES):
        with pytest.raises(Refused, match="no token embedding where its stack begins"):
            _ = opened(stack).W_E


def test_a_head_behind_one_of_the_stacks_is_its_unembedding_alone() -> None:
    module = tiny_model("bridgetower", "BridgeTowerForMaskedLM", runs)
    text, words = (
        Model(module, stack=f"bridgetower.{name}")
        for name in ("cross_modal_text_layers", "text_model")
    )
    run = text.run(inputs(), capture=["resid_post.2"])
    assert run.logits is not None and run.logits.shape[-1] == text.spec.d_vocab
    assert off(text.unembed(run.cache["resid_post.2"]), run.logits) < ROUNDING
    with pytest.raises(Refused, match="cannot be unembedded"):
        words.unembed(torch.zeros(1, 64))


@torch.no_grad()
def test_a_window_that_changes_what_the_output_is_not_made_of_is_found_out() -> None:
    """The text's features say nothing of the image's last layer: what its blocks return is compared besides."""
    module, called = bridge(), "cross_modal_image_layers"
    batch = probe_batch(module)
    seen, want = record(module, batch), output_tensor(call_model(module, batch))
    mapped = discover(seen, batch, called)
    (end,) = last_returned(mapped, module, batch)
    for ends, refused in (([end], set()), ([end + 0.1], {"z", "pattern", "resid_post"})):
        spec = verify(mapped, seen, want, ends=ends)
        assert refused <= set(spec.refused) - spec.absent
        assert bool(refused) == bool(set(spec.refused) - spec.absent)
        assert next(c for c in spec.checks if c.name == "window").passed


# --- names ----------------------------------------------------------------------------------------


def test_names_that_are_none_are_told_what_there_is() -> None:
    with pytest.raises(Refused, match=r"4 stacks of attention blocks.*stack='vision_model\.vis"):
        Model(bridge())
    with pytest.raises(BadInput, match=r"did you mean 'cross_modal_text_layers'\?.*resblocks"):
        Model(bridge(), stack="cross_modal_text_layer")
    module = tiny_model("bridgetower", "BridgeTowerForMaskedLM", runs)
    with pytest.raises(BadInput, match="'bridgetower' holds several stacks"):
        Model(module, stack="bridgetower")


def test_a_model_s_own_stack_may_be_named_and_nothing_is_another() -> None:
    module = FAMILIES["gpt2"]()
    without = Model(module, id="tiny")
    for name in ("transformer.h", "transformer"):
        model = Model(module, id="tiny", stack=name)
        assert not model.spec.named and model.id == "tiny" and model.spec.stack == "transformer.h"
        assert (
            provenance(model, options={}, seed=0)["model"]
            == (provenance(without, options={}, seed=0)["model"])
        )
    with pytest.raises(BadInput, match=r"no stack of GPT2\w+ 'transformer.wte'.*transformer\.h"):
        Model(module, stack="transformer.wte")


def test_the_encoder_of_an_encoder_decoder_is_opened_on_its_own() -> None:
    module = tiny_model("bart", "BartForConditionalGeneration", runs)
    own = Model(module).spec.stack
    assert Model(module, stack=own).spec.stack == own
    with pytest.raises(Refused, match=r"no part of the decoder.*get_encoder\(\)"):
        Model(module, stack=own.replace("decoder", "encoder"))


# --- what is kept of a model ----------------------------------------------------------------------


def test_two_stacks_of_one_model_share_nothing_that_is_kept() -> None:
    text, image = opened("cross_modal_text_layers"), opened("cross_modal_image_layers")
    one, other = (provenance(x, options={}, seed=0)["model"] for x in (text, image))
    assert text.id == "BridgeTowerModel:cross_modal_text_layers"
    assert {"sha256", "id", "stack"} <= {name for name in one if one[name] != other[name]}
    assert one["sha256"] != weights_sha256(bridge())
    sae = SAE(SAEConfig(d_in=64, d_sae=128, k=4, site="resid_post.1", sha256=one["sha256"]))
    assert sae.site(text).layer == 1
    with pytest.raises(BadInput, match="was trained on"):
        sae.site(image)


def test_random_weights_are_of_the_same_stack() -> None:
    towers = clip()
    blank = random_weights(Model(towers, stack="vision_model"))
    assert blank.spec.named and blank.spec.stack == "vision_model.encoder.layers"


# --- towers that are models of their own ----------------------------------------------------------


@cache
def clip() -> nn.Module:
    text = {"vocab_size": 97, "max_position_embeddings": 16, "eos_token_id": 96, "bos_token_id": 0}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    config = transformers.CLIPConfig(
        text_config=transformers.CLIPTextConfig(**text, **sizes),
        vision_config=transformers.CLIPVisionConfig(image_size=32, patch_size=8, **sizes),
        projection_dim=16,
    )
    torch.manual_seed(0)
    return transformers.CLIPModel(config).eval()


def of_clip() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 96, (2, 7), generator=generator)
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}


@pytest.mark.parametrize("tower", ["text_model", "vision_model"])
def test_a_tower_of_the_whole_is_the_tower_and_reaches_the_similarities(tower: str) -> None:
    whole, part = interp.load(clip(), stack=tower), Model(clip().get_submodule(tower))
    assert whole.spec.stack == f"{tower}.{part.spec.stack}" and not whole.spec.refused
    given = of_clip()
    mine = {name: x for name, x in given.items() if (name == "input_ids") == (tower[0] == "t")}
    sites = ["resid_post", "pattern", "attn_write"]
    run, alone = whole.run(given, capture=sites), part.run(mine, capture=sites)
    for site in sites:
        assert off(run.cache[f"{site}.1"], alone.cache[f"{site}.1"]) < ROUNDING
    whole.require_sum("this test")  # nothing but the next block reads what a block returns
    assert off(run.logits, plain(clip(), given)) < ROUNDING
    assert (tower == "text_model") == (whole.spec.embedding is not None)


def test_variants_of_rows_that_are_compared_with_each_other_are_replayed_apart() -> None:
    """Similarities of all images with all texts: four variants at once would be compared with each other's."""
    for tower in ("text_model", "vision_model"):
        model = interp.load(clip(), stack=tower)
        clean = model.run(of_clip(), capture=["resid_pre"])
        variants = [[Edit.zero("z", heads=[(layer, 1)])] for layer in (0, 1, 2, 2)]
        replayed = model.replay(clean, variants, lambda run: run.logits)
        for edits, got in zip(variants, replayed, strict=True):
            wanted = model.run(of_clip(), edits=edits).logits
            assert off(got, wanted) < ROUNDING < off(wanted, clean.logits)


def test_stages_are_one_stack() -> None:
    module = tiny_model("groupvit", "GroupViTModel", runs)
    whole, part = Model(module, stack="vision_model"), Model(module.get_submodule("vision_model"))
    assert [list(stage) for stage in whole.spec.stages] == [[0, 1], [2, 3], [4, 5]]
    assert whole.spec.n_layers == part.spec.n_layers and not whole.spec.refused
    with pytest.raises(BadInput, match=r"known: vision_model\.encoder\.stages, text_model"):
        Model(module, stack="vision")


class Tracker(nn.Module):
    """An encoder, a decoder that the output is made of, and layers that sum up both for the next frame."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.first = first
        size = {"decoder_attention_heads": 4, "encoder_attention_heads": 4}
        self.config = transformers.BartConfig(
            d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, **size
        )
        self.config._attn_implementation = "sdpa"
        self.queries, self.latents = (nn.Parameter(torch.randn(1, n, 32)) for n in (5, 4))
        self.encoder = nn.ModuleList(BartEncoderLayer(self.config) for _ in range(2))
        self.decoder = nn.ModuleList(BartDecoderLayer(self.config, i) for i in range(2))
        self.summary = nn.ModuleList(BartDecoderLayer(self.config, i) for i in range(2))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        x = features
        for layer in self.encoder:
            x = layer(x, None)
        out, kept = (each.expand(len(x), -1, -1) for each in (self.queries, self.latents))
        for layer in self.decoder:
            out = layer(out, encoder_hidden_states=x)
        for layer in self.summary:
            kept = layer(kept, encoder_hidden_states=torch.cat([x, out], 1))
        return (out, kept) if self.first == "decoder" else (kept, out)


@pytest.mark.parametrize(("own", "other"), [("decoder", "summary"), ("summary", "decoder")])
def test_of_two_decoders_the_one_that_is_heard_in_what_is_returned_first(own, other) -> None:
    torch.manual_seed(0)
    tracker, features = Tracker(own).eval(), {"features": torch.randn(2, 9, 32)}
    model = Model(tracker, example=features)
    assert model.spec.stack == own and model.spec.heard and not model.spec.named
    run = model.run(features, capture=["resid_post.1"])
    assert torch.equal(run.logits, run.cache["resid_post.1"])
    assert Model(tracker, stack=other, example=features).spec.stack == other


def test_a_tower_that_text_alone_does_not_reach_is_a_model_of_its_own() -> None:
    module = tiny_model("llava", "LlavaForConditionalGeneration", runs)
    with pytest.raises(
        BadInput, match=r"not called on input_ids.*load\(model\.model\.vision_tower\)"
    ):
        Model(module, stack="model.vision_tower")
    assert Model(module.get_submodule("model.vision_tower")).n_layers == 3


def test_a_tower_that_feeds_generates_nothing() -> None:
    model = Model(tiny_model("blip-2", "Blip2ForConditionalGeneration", runs), stack="vision_model")
    assert model.spec.named and set(model.spec.refused) == {"unembedding"}
    with pytest.raises(Refused, match="one stack of several"):
        generate(model, torch.full((2, 5), 7))


# --- from a shell ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("towers") / "clip"
    clip().save_pretrained(path)
    return path


def test_commands_take_the_name_of_a_stack(run, checkpoint: Path) -> None:
    code, text, _ = run("inspect", checkpoint, "--stack", "text_model", "--json")
    told = json.loads(text)
    assert code == 0 and told["stack"] == "text_model.encoder.layers" and told["causal"]
    code, text, _ = run("inspect", checkpoint, "--json")  # as before: the part that reads images
    assert code == 0 and json.loads(text)["stack"] is None
    code, _, err = run("inspect", checkpoint, "--stack", "text_model.encoder.layer")
    assert code == 2 and "did you mean 'text_model.encoder.layers'?" in err


def test_a_mask_of_frames_stays_where_no_tokens_stand_beside() -> None:
    """Of a model of several stacks that reads no tokens, the rows' real positions are as for its parts."""
    module = tiny_model("nemotron3_5_transcribe_audio", "Nemotron3_5TranscribeAudioModel", runs)
    spec = Model(module, stack="asr_encoder").spec
    assert spec.named and not spec.beside and opened("cross_modal_image_layers").spec.beside


def test_units_of_two_stacks_are_two(checkpoint: Path, tmp_path: Path) -> None:
    from interp.batch.run import lay_out

    models = [{"name": str(checkpoint), "stack": name} for name in ("text_model", "vision_model")]
    laid = lay_out({"models": models, "analyses": ["massive"], "out": str(tmp_path)})
    one, other = laid.units
    assert one.id != other.id and one.source.key != other.source.key
