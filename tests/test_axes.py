"""Streams with other axes than [batch pos d_model]: every site in these, against rows picked out by hand.

FSMT holds positions before rows of the batch. VideoPrism's first blocks have a row for each frame, the next
ones a row for each place in a frame. Tolerance: float32, a few blocks deep, as in `identities`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CpmAntConfig,
    CpmAntForCausalLM,
    FSMTConfig,
    FSMTForConditionalGeneration,
)
from transformers.models.videoprism.configuration_videoprism import VideoPrismVisionConfig
from transformers.models.videoprism.modeling_videoprism import (
    VideoPrismVideoModel,
    VideoPrismVisionModel,
)

import circuits
from circuits.explain import explain
from interp.errors import Refused
from interp.models.attention import implementation
from interp.models.calls import call_model
from interp.models.hooks import hidden_of
from interp.models.layout import (
    ACROSS,
    PARTS,
    PLAIN,
    POSITIONS_FIRST,
    held,
    held_inside,
    shown,
    with_others_ahead,
)
from interp.models.model import Model
from interp.models.probe import probe
from interp.run.batch import Batch
from interp.run.edits import Edit
from interp.run.statistics import Mass
from interp.sites import AXES, Site

ROUNDING = 1e-5
FRAMES, PLACES = 4, 6
"""Six places: two rows of three in an image of 24 × 24."""
STEP = 1e-2
"""Of a difference quotient in float32 (FSMT's masks are made in no other type): good to about a percent."""
SITES = (
    "resid_pre",
    "attn_out",
    "mlp_post",
    "mlp_out",
    "resid_mid",
    "resid_post",
    "z",
    "q",
    "k",
    "v",
)


def randomised(module: nn.Module) -> Any:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in module.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(0.1 * noise) if parameter.ndim < 2 else parameter.copy_(0.2 * noise)
    return module.eval()


def video_config(**options: Any) -> VideoPrismVisionConfig:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    depth = {"num_spatial_layers": 2, "num_temporal_layers": 2, "num_auxiliary_layers": 1}
    shape = {"image_size": 24, "num_frames": FRAMES, "tubelet_size": [1, 12, 8]}
    return VideoPrismVisionConfig(**{**sizes, **depth, **shape, **options})


@cache
def video_model() -> Model:
    return Model(randomised(VideoPrismVisionModel(video_config())), id="video")


def videos(n: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch({"pixel_values_videos": torch.randn(n, FRAMES, 3, 24, 24, generator=generator)})


@cache
def translator() -> Model:
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = FSMTConfig(
        langs=["en", "de"],
        src_vocab_size=97,
        tgt_vocab_size=97,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        **special,
    )
    return Model(randomised(FSMTForConditionalGeneration(config)), id="translator")


def sentences(n: int, length: int) -> Batch:
    ids = torch.randint(10, 97, (n, 9 + length), generator=torch.Generator().manual_seed(n))
    return Batch.of_inputs({"input_ids": ids[:, :9], "decoder_input_ids": ids[:, 9:]})


def off(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


def by_hand(x: Tensor, layer: int, n: int) -> Tensor:
    """[videos, frame after frame, width] of what VideoPrism has as [videos·frames places width], or …·places frames."""
    rows = []
    for video in range(n):
        for frame in range(FRAMES):
            for place in range(PLACES):
                spatial = x[video * FRAMES + frame, place] if layer < 2 else None
                rows.append(x[video * PLACES + place, frame] if spatial is None else spatial)
    return torch.stack(rows).reshape(n, FRAMES * PLACES, *x.shape[2:])


def together(layer: int) -> Tensor:
    """Whether two positions [query key] may attend to each other: of one frame, or of one place."""
    at = torch.arange(FRAMES * PLACES)
    of = at // PLACES if layer < 2 else at % PLACES
    return of[:, None] == of


@torch.no_grad()
def returned(model: Model, batch: Batch, name: str) -> tuple[Tensor, Tensor]:
    """What a module reads and returns, as it is."""
    kept: list[Any] = []
    hook = model.module.get_submodule(name).register_forward_hook(
        lambda module, args, kwargs, out: kept.append(
            (
                args[0] if args else next(iter(kwargs.values())),
                out[0] if isinstance(out, tuple) else out,
            )
        ),
        with_kwargs=True,
    )
    call_model(model.module, batch)
    hook.remove()
    return kept[0]


# --- rows that are frames, or places ------------------------------------------------------------------


def test_videos_verify_in_full_and_their_axes_are_told() -> None:
    spec = video_model().spec
    assert not spec.refused and all(check.passed for check in spec.checks)
    assert [block.axes for block in spec.blocks] == [PARTS, PARTS, ACROSS, ACROSS]
    assert spec.stages == [range(2), range(2, 4)]
    assert "stages" in spec.not_a_sum


@pytest.mark.parametrize("n", [1, 2, 4])  # as many videos as frames, too
def test_sites_are_the_rows_of_frames_and_places(n: int) -> None:
    model, batch = video_model(), videos(n)
    cache = model.run(batch, capture=SITES).cache
    for layer, block in enumerate(model.spec.blocks):
        read, out = returned(model, batch, block.name)
        assert torch.equal(cache[f"resid_pre.{layer}"], by_hand(read, layer, n))
        assert torch.equal(cache[f"resid_post.{layer}"], by_hand(out, layer, n))
        for site, name in (("attn_out", block.W_O), ("mlp_out", block.W_out)):
            read, out = returned(model, batch, name or "")
            assert torch.equal(cache[f"{site}.{layer}"], by_hand(out, layer, n))
            site, heads = ("z", (4, 8)) if site == "attn_out" else ("mlp_post", (48,))
            wanted = by_hand(read, layer, n).unflatten(-1, heads)
            assert torch.equal(cache[f"{site}.{layer}"], wanted)
        for site in "qkv":
            _, out = returned(model, batch, f"{block.attention}.{site}_proj")
            assert torch.equal(
                cache[f"{site}.{layer}"], by_hand(out, layer, n).unflatten(-1, (4, 8))
            )


@torch.no_grad()
def test_patterns_are_those_of_hugging_face_frame_by_frame_and_place_by_place() -> None:
    model, batch = video_model(), videos()
    run = model.run(batch, capture=["pattern", "scores"])
    with implementation(model.module, "eager"):
        theirs = model.module(**batch.inputs, output_attentions=True)
    assert off(run.logits, theirs.last_hidden_state) < ROUNDING
    for layer, wanted in enumerate(theirs.attentions):
        pattern = run.cache[f"pattern.{layer}"]
        assert not pattern[..., ~together(layer)].any()
        assert run.cache[f"scores.{layer}"][..., ~together(layer)].isneginf().all()
        for video in range(2):
            for frame in range(FRAMES):
                for place in range(PLACES):
                    row = pattern[
                        video, :, frame * PLACES + place, together(layer)[frame * PLACES + place]
                    ]
                    of_frame = wanted[video * FRAMES + frame, :, place] if layer < 2 else None
                    of_place = wanted[video * PLACES + place, :, frame] if layer >= 2 else None
                    assert off(row, of_frame if of_place is None else of_place) < ROUNDING


@pytest.mark.parametrize("layer", range(4))
def test_an_edit_of_a_position_is_of_one_frame_and_place(layer: int) -> None:
    model, batch = video_model(), videos()
    frame, place = 2, 4
    edit = Edit.zero(f"resid_post.{layer}", positions=[frame * PLACES + place])

    def zero(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        out = out.clone()
        for video in range(2):
            spatial = (video * FRAMES + frame, place)
            out[spatial if layer < 2 else (video * PLACES + place, frame)] = 0
        return out

    hook = model.blocks[layer].register_forward_hook(zero)
    wanted = model.run(batch).logits
    hook.remove()
    clean = model.run(batch).logits
    assert clean is not None and wanted is not None and off(clean, wanted) > 100 * ROUNDING
    assert torch.equal(model.run(batch, edits=[edit]).logits, wanted)
    one = model.run(batch, edits=[edit.on_rows(slice(1, 2))]).logits
    assert one is not None and torch.equal(one[0], clean[0]) and torch.equal(one[1], wanted[1])


@pytest.mark.parametrize(
    "make", [lambda: (video_model(), videos(3)), lambda: (translator(), sentences(3, 5))]
)
def test_every_row_is_as_it_is_alone(make: Any) -> None:
    """The rows of the batch are told apart right: each has what it has when it is the only one."""
    model, batch = make()
    sites = [site for site in AXES if model.layers_with(site)]
    joint = model.run(batch, capture=sites)
    for row in range(3):
        alone = model.run(batch.rows(slice(row, row + 1)), capture=sites)
        assert off(joint.logits[row], alone.logits[0]) < ROUNDING
        for site in sites:
            for layer, x in alone.cache.by_layer(site).items():
                x, y = (
                    each.nan_to_num(neginf=0.0)
                    for each in (x[0], joint.cache[Site(site, layer)][row])
                )
                assert off(y.clamp_min(-1e9), x.clamp_min(-1e9)) < 10 * ROUNDING, site


@pytest.mark.parametrize(
    "make", [lambda: (video_model(), videos()), lambda: (translator(), sentences(2, 5))]
)
def test_a_replay_is_a_rerun(make: Any) -> None:
    model, batch = make()
    clean = model.run(batch, capture=["resid_pre"])
    vector = torch.randn(32, generator=torch.Generator().manual_seed(5))
    edits = []
    for layer in range(model.n_layers):
        edits += [
            Edit.zero("z", heads=[(layer, 1)]),
            Edit.add(f"resid_post.{layer}", vector, positions=[1, 3]),
            Edit.add(f"resid_mid.{layer}", vector),
            Edit.scale(f"mlp_post.{layer}", 0.3),
            Edit.zero(f"pattern.{layer}.1", positions=[0, 2]),
            Edit.zero(f"v.{layer}.2"),
            Edit.scale(f"attn_write.{layer}", 0.5),
        ]
    replayed = model.replay(clean, [[edit] for edit in edits], lambda run: run.logits)
    for edit, got in zip(edits, replayed, strict=True):
        wanted = model.run(batch, edits=[edit]).logits
        assert off(got, wanted) < ROUNDING, edit.site
        assert off(wanted, clean.logits) > 100 * ROUNDING, f"{edit.site} has no effect"


@pytest.mark.parametrize("site", ["resid_post", "z", "mlp_out", "pattern"])
@pytest.mark.parametrize(
    "make", [lambda: (video_model(), videos()), lambda: (translator(), sentences(2, 5))]
)
def test_gradients_are_of_the_entries_shown(make: Any, site: str) -> None:
    """∂ Σ (logits · w) of the strongest entry of row 1 against the change when it is moved."""
    model, batch = make()
    run = model.run(batch, capture=[f"{site}.0"], grad=True)
    assert run.logits is not None
    weights = torch.randn(run.logits.shape, generator=torch.Generator().manual_seed(6))
    (gradient,) = torch.autograd.grad((run.logits * weights).sum(), run.cache[f"{site}.0"])
    at = (1, *torch.unravel_index(gradient[1].abs().argmax(), gradient[1].shape))

    def moved(by: float) -> Tensor:
        change = torch.zeros_like(gradient)
        change[at] = by
        edit = Edit.apply(f"{site}.0", lambda x, seen: x + change)
        logits = model.run(batch, edits=[edit]).logits
        assert logits is not None
        return (logits * weights).double().sum()

    numeric = float(moved(STEP) - moved(-STEP)) / (2 * STEP)
    assert abs(numeric - float(gradient[at])) < 2e-2 * abs(numeric)


def test_a_last_stage_may_have_all_frames_in_one_row() -> None:
    """Three stages: rows are frames, then places, then videos; the last one's positions are frame after frame."""
    module = randomised(VideoPrismVideoModel(video_config(num_auxiliary_layers=2)))
    model, batch = Model(module, id="video"), videos()
    assert [block.axes for block in model.spec.blocks] == [PARTS] * 2 + [ACROSS] * 2 + [PLAIN] * 2
    assert [len(stage) for stage in model.spec.stages] == [2, 2, 2]
    cache = model.run(batch, capture=["resid_post"]).cache
    norm = module.vision_model.layernorm2
    with torch.no_grad():
        made = norm(cache["resid_post.3"])
    assert off(model.run(batch, capture=["resid_pre.4"]).cache["resid_pre.4"], made) < ROUNDING


def test_rows_that_are_nobodys_are_refused() -> None:
    """Frames of all videos side by side, in no order of the batch; or rows made of both videos."""

    class Other(nn.Module):
        def __init__(self, inner: nn.Module, order: Any) -> None:
            super().__init__()
            self.inner, self.order = inner, order

        def forward(self, *args: Any, **named: Any) -> Tensor:
            return self.order(self.inner(*args, **named))

    for order in (
        lambda x: x.unflatten(0, (-1, FRAMES)).transpose(0, 1).flatten(0, 1),
        lambda x: x.flip(0),
        lambda x: x + x.flip(0),
    ):
        module = randomised(VideoPrismVisionModel(video_config()))
        module.spatial_embeddings = Other(module.spatial_embeddings, order)
        with pytest.raises(Refused, match="8 rows for 2 of the input: which of them are whose"):
            probe(module)


# --- positions first -------------------------------------------------------------------------------


def test_positions_first_is_told_and_verified() -> None:
    spec = translator().spec
    assert not spec.refused and all(check.passed for check in spec.checks)
    assert {block.axes for block in spec.blocks} == {POSITIONS_FIRST}
    assert spec.unembedding == "model.decoder.output_projection"


@pytest.mark.parametrize(("n", "length"), [(2, 5), (5, 5), (6, 3), (1, 4), (4, 1)])
def test_sites_have_rows_of_the_batch_first(n: int, length: int) -> None:
    """Also with as many rows as positions, and with more rows than positions."""
    model, batch = translator(), sentences(n, length)
    cache = model.run(
        batch, capture=["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_post", "z"]
    ).cache
    for layer, block in enumerate(model.spec.blocks):
        read, _ = returned(model, batch, block.name)
        assert read.shape == (length, n, 32)
        for site, name, i in (
            ("resid_pre", block.name, 0),
            ("resid_post", block.name, 1),
            ("attn_out", block.W_O, 1),
            ("z", block.W_O, 0),
            ("mlp_post", block.W_out, 0),
            ("resid_mid", block.norm_mid, 1),
        ):
            wanted = returned(model, batch, name or "")[i].transpose(0, 1)
            got = cache[f"{site}.{layer}"]
            assert torch.equal(got.flatten(2), wanted), site


@pytest.mark.parametrize("n", [2, 5])
def test_an_edit_of_one_row_and_position_is_that_entry(n: int) -> None:
    model, batch = translator(), sentences(n, 5)
    clean = model.run(batch).logits
    for site, module in (
        ("resid_post.0", model.spec.blocks[0].name),
        ("attn_out.0", model.spec.blocks[0].W_O),
        ("mlp_out.1", model.spec.blocks[1].W_out),
    ):

        def zero(module: nn.Module, args: tuple, out: Any) -> Any:
            x = (out[0] if isinstance(out, tuple) else out).clone()
            x[3, 1] = 0  # position 3 of row 1
            return (x, *out[1:]) if isinstance(out, tuple) else x

        hook = model.module.get_submodule(module or "").register_forward_hook(zero)
        wanted = model.run(batch).logits
        hook.remove()
        edit = Edit.zero(site, positions=[3]).on_rows(slice(1, 2))
        got = model.run(batch, edits=[edit]).logits
        assert got is not None and clean is not None and wanted is not None
        assert torch.equal(got, wanted) and not torch.equal(got[1, 3], clean[1, 3])
        assert torch.equal(got[0], clean[0]) and torch.equal(got[:, :3], clean[:, :3])


# --- positions of the model's own before the tokens' --------------------------------------------------


AHEAD = 5
WORDS = torch.randint(10, 97, (2, 9), generator=torch.Generator().manual_seed(2))


@cache
def prompted() -> Any:
    """A model that puts five learnt prompts before every text."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48}
    config = CpmAntConfig(
        vocab_size=99, num_hidden_layers=2, prompt_length=AHEAD, prompt_types=4, **sizes
    )
    return Model(randomised(CpmAntForCausalLM(config)), id="prompted")


def test_tokens_come_first_and_what_a_model_puts_before_them_behind_them() -> None:
    model, n = prompted(), WORDS.shape[1]
    assert not model.spec.refused and model.spec.hidden_axes == with_others_ahead(AHEAD)
    sites = ["resid_pre", "resid_post", "resid_mid", "attn_write", "mlp_write", "pattern", "z"]
    run = model.run(WORDS, capture=sites)
    with torch.no_grad():
        own = model.module(WORDS, output_attentions=True, output_hidden_states=True)
        raw = model.module.cpmant.input_embedding.weight
        raw = raw[torch.arange(99 + 2 * AHEAD, 99 + 3 * AHEAD)]
        raw = raw + model.module.cpmant.segment_embedding.weight[0]
    assert torch.equal(run.logits, own.logits) and run.logits.shape == (2, n, 99)
    assert off(run.cache["resid_pre.0"][0, n:], raw) < ROUNDING
    total = run.cache["resid_pre.0"].double()
    for layer in range(2):
        assert run.cache[f"resid_pre.{layer}"].shape == (2, n + AHEAD, 32)
        assert torch.equal(run.cache[f"resid_pre.{layer}"][:, :n], own.hidden_states[layer])
        theirs = own.attentions[layer]
        assert off(run.cache[f"pattern.{layer}"][:, :, :n, :n], theirs) < ROUNDING
        total = total + run.cache[f"attn_write.{layer}"] + run.cache[f"mlp_write.{layer}"]
    assert off(total, run.cache["resid_post.1"]) < ROUNDING
    assert off(model.unembed(run.cache["resid_post.1"][:, :n]), run.logits) < ROUNDING
    same = [Edit.apply(site, lambda x, seen: x) for site in sites]
    assert torch.equal(model.run(WORDS, edits=same).logits, run.logits)


@pytest.mark.parametrize("site", ["attn_out", "mlp_out", "resid_post", "z"])
def test_an_edit_of_a_position_is_of_that_token(site: str) -> None:
    model, columns = prompted(), slice(8, 16) if site == "z" else slice(None)
    block = model.spec.blocks[0]
    name = {"attn_out": block.attn_out, "mlp_out": block.mlp_out, "z": block.W_O}.get(
        site, block.name
    )

    def zero(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, AHEAD + 3, columns] = 0
        return x

    def before(module: nn.Module, args: tuple) -> tuple:
        return (zero(args[0]), *args[1:])

    def after(module: nn.Module, args: tuple, out: Any) -> Any:
        return (zero(out[0]), *out[1:]) if isinstance(out, tuple) else zero(out)

    module = model.module.get_submodule(name)
    hook = (
        module.register_forward_pre_hook(before)
        if site == "z"
        else module.register_forward_hook(after)
    )
    with torch.no_grad():
        wanted = model.module(WORDS).logits
    hook.remove()
    heads = [(0, 1)] if site == "z" else None
    edit = Edit.zero("z" if heads else f"{site}.0", heads=heads, positions=[3])
    run = model.run(WORDS, capture=["resid_pre"])
    (replayed,) = model.replay(run, [[edit]], lambda variant: variant.logits)
    for got in (model.run(WORDS, edits=[edit]).logits, replayed):
        assert off(got, wanted) < ROUNDING < off(run.logits, wanted)


def test_statistics_are_of_the_tokens() -> None:
    model, n = prompted(), WORDS.shape[1]
    keys = torch.arange(n)[None, :, None].expand(2, n, 1)
    mass = Mass(keys, torch.ones(2, n, dtype=torch.bool))
    run = model.run(WORDS, capture=["pattern"], statistics={"own": mass})
    for layer in range(2):
        wanted = run.cache[f"pattern.{layer}"][..., :n, :n].diagonal(dim1=-2, dim2=-1).mean(-1)
        assert off(run.statistics["own"][:, layer], wanted) < ROUNDING


def test_what_takes_positions_for_tokens_is_refused() -> None:
    for analysis in (circuits.information_flow, explain):
        with pytest.raises(Refused, match="puts 5 positions of its own before every text"):
            analysis(prompted(), WORDS[0])


# --- the layout itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [POSITIONS_FIRST, PARTS, ACROSS])
def test_what_is_held_is_the_inverse_of_what_is_shown(axes: tuple[str, ...]) -> None:
    x = torch.randn(6, 2, 5) if axes == POSITIONS_FIRST else torch.randn(6, 4, 5)
    y = shown(x, axes, 2)
    assert y.shape == ((2, 6, 5) if axes == POSITIONS_FIRST else (2, 12, 5))
    assert torch.equal(held(y, axes, x.shape), x) and torch.equal(held_inside(y, axes, x.shape), x)
    rows = held(y.repeat(3, 1, 1), axes, x.shape)
    assert torch.equal(shown(rows, axes, 6), y.repeat(3, 1, 1))


def test_what_calls_blocks_on_its_own_is_refused() -> None:
    spec = translator().spec
    with pytest.raises(Refused, match=r"holds its stream as \[pos, batch, d_model\]"):
        hidden_of((torch.zeros(5, 2, 32),), {}, spec, 0)
