"""Attention over blocks and bands of keys: every site over all pairs of positions, against attention by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

import circuits
from circuits.heads.evidence import Evidence, evidence_patterns
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.models.pieces import pieces
from interp.run.batch import Batch
from interp.run.edits import Edit
from interp.run.statistics import Entropy, Mass

ROUNDING = 1e-5
"""A few float32 roundings, three blocks deep."""
BLOCK, LENGTH = 4, 14
SITES = ["q", "k", "v", "scores", "pattern", "z"]
T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 97,
    "local_radius": BLOCK - 1,
    "global_block_size": 4,
}
WRITES = ["resid_pre", "attn_out", "attn_write", "resid_mid"]
WRITES += ["mlp_post", "mlp_out", "mlp_write", "resid_post"]
BAND: dict[str, Any] = {"attention_window": 2 * BLOCK, "vocab_size": 97}


def randomised(module: Any) -> Any:
    assert sum(parameter.numel() for parameter in module.parameters()) < 100_000
    with torch.no_grad():
        for parameter in module.parameters():
            noise = 0.2 * torch.randn_like(parameter)
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return module.eval()


@cache
def local() -> Model:
    """LongT5: blocks of 4 positions, each position sees 3 to either side."""
    return _long_t5("local")


@cache
def with_globals() -> Model:
    """LongT5: the same, and one more key for every 4 positions, their normed sum."""
    return _long_t5("transient-global")


def _long_t5(kind: str) -> Model:
    torch.manual_seed(0)
    config = transformers.LongT5Config(encoder_attention_type=kind, **T5)
    return Model(randomised(transformers.LongT5EncoderModel(config)), id=kind)


@cache
def banded() -> Model:
    """Longformer: a band of four keys to either side."""
    torch.manual_seed(0)
    config = transformers.LongformerConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        **BAND,
    )
    return Model(
        randomised(transformers.LongformerModel(config, add_pooling_layer=False)), id="banded"
    )


@cache
def led() -> Model:
    torch.manual_seed(0)
    config = transformers.LEDConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
        **BAND,
    )
    return Model(randomised(transformers.LEDModel(config)).get_encoder(), id="led")


MODELS = [local, with_globals, banded, led]


def ids(length: int = LENGTH) -> Tensor:
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(length))


def length_of(model: Any) -> int:
    """Longformer pads to whole windows before its blocks: tests of it give as much."""
    return LENGTH if model in (local, with_globals) else 16


def off(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


def seen_by(reach: int, length: int) -> Tensor:
    place = torch.arange(length)
    return (place[:, None] - place[None]).abs() <= reach


def normed(model: Model, layer: int, batch: Batch, name: str) -> Tensor:
    """What a module of a block returns in a plain forward."""
    kept: list[Tensor] = []
    module = model.blocks[layer].get_submodule(name)
    hook = module.register_forward_hook(lambda module, args, out: kept.append(out.clone()))
    with torch.no_grad():
        model.module(**batch.inputs)
    hook.remove()
    return kept[0]


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, 8)).transpose(1, 2)


@torch.no_grad()
def t5_by_hand(model: Model, layer: int, batch: Batch) -> dict[str, Tensor]:
    """pattern, v and z of one layer over all pairs, from its weights and the normed stream."""
    part: Any = model.blocks[layer].layer[0]  # type: ignore[index]
    x = normed(model, layer, batch, "layer.0.layer_norm")
    with_globals = hasattr(part, "TransientGlobalSelfAttention")
    name = "TransientGlobalSelfAttention" if with_globals else "LocalSelfAttention"
    attention = getattr(part, name)
    first = getattr(model.blocks[0].layer[0], name)  # type: ignore[index]
    n = x.shape[1]
    place = torch.arange(n)
    bias = first.relative_attention_bias(
        first._relative_position_bucket(place[None] - place[:, None])
    )
    bias = bias.permute(2, 0, 1).masked_fill(~seen_by(BLOCK - 1, n), -torch.inf)
    keys = x
    if with_globals:  # the last ones, which fill no block, go with the block before
        block = (place // 4).clamp_max(n // 4 - 1)
        sums = torch.stack([x[:, block == i].sum(1) for i in range(n // 4)], 1)
        keys = torch.cat([x, attention.global_input_layer_norm(sums)], 1)
        far = first._relative_position_bucket(torch.arange(n // 4)[None] - block[:, None])
        more = first.global_relative_attention_bias(far).permute(2, 0, 1)
        bias = torch.cat([bias, more], -1)
    q, k, v = heads(attention.q(x)), heads(attention.k(keys)), heads(attention.v(keys))
    pattern = (q @ k.mT + bias).softmax(-1)
    z = (pattern @ v).transpose(1, 2)
    return {"pattern": pattern, "q": q.transpose(1, 2), "v": v.transpose(1, 2), "z": z}


@torch.no_grad()
def band_by_hand(model: Model, layer: int, batch: Batch) -> dict[str, Tensor]:
    x = model.run(batch, capture=[f"resid_pre.{layer}"]).cache[f"resid_pre.{layer}"]
    name = model.spec.blocks[layer].attention
    attention: Any = model.module.get_submodule(name or "")
    q, k, v = (heads(f(x)) for f in (attention.query, attention.key, attention.value))
    scores = q @ k.mT / 8**0.5
    pattern = scores.masked_fill(~seen_by(BLOCK, x.shape[1]), -torch.inf).softmax(-1)
    return {"pattern": pattern, "v": v.transpose(1, 2), "z": (pattern @ v).transpose(1, 2)}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layer", range(2))
def test_every_site_is_that_of_attention_over_all_pairs(model: Any, layer: int) -> None:
    by_hand = t5_by_hand if model in (local, with_globals) else band_by_hand
    batch, model = Batch.of_ids(ids(length_of(model))), model()
    assert not {*SITES, "attn_out", "attn_write"} & set(model.spec.refused)
    assert all(check.passed for check in model.spec.checks)
    cache = model.run(batch, capture=SITES).cache
    for name, wanted in by_hand(model, layer, batch).items():
        assert off(cache[f"{name}.{layer}"], wanted) < ROUNDING, name
    unseen = cache[f"pattern.{layer}"] == 0
    assert unseen.any() and (cache[f"scores.{layer}"][unseen] < -1e9).all()
    scores = cache[f"scores.{layer}"].softmax(-1)
    assert off(scores, cache[f"pattern.{layer}"]) < ROUNDING


def test_a_band_is_what_the_model_returns_of_it() -> None:
    """Hugging Face gives a column for each key from 4 before a query to 4 behind it."""
    model, batch = banded(), Batch.of_ids(ids(16))
    with torch.no_grad():
        bands = model.module(**batch.inputs, output_attentions=True).attentions
    for layer, band in enumerate(bands):
        pattern = model.run(batch, capture=["pattern"]).cache[f"pattern.{layer}"]
        for query in range(16):
            for column in range(2 * BLOCK + 1):
                key = query + column - BLOCK
                found = band[:, :, query, column]
                wanted = pattern[:, :, query, key] if 0 <= key < 16 else torch.zeros_like(found)
                assert torch.equal(found, wanted)


@pytest.mark.parametrize("model", MODELS)
def test_heads_and_writes_sum_to_the_stream(model: Any) -> None:
    batch, model = Batch.of_ids(ids(length_of(model))), model()
    cache = model.run(
        batch, capture=["z", "attn_out", "attn_write", "resid_pre", "resid_mid"]
    ).cache
    for layer, block in enumerate(model.spec.blocks):
        made = torch.einsum("bphd,hdm->bpm", cache[f"z.{layer}"], model.W_O(layer))
        assert off(made + model.b_O(layer), cache[f"attn_out.{layer}"]) < ROUNDING
        mid = cache[f"resid_pre.{layer}"] + cache[f"attn_write.{layer}"]
        if block.norm_mid:
            mid = model.module.get_submodule(block.norm_mid)(mid)
        assert off(mid, cache[f"resid_mid.{layer}"]) < ROUNDING


@pytest.mark.parametrize("model", MODELS)
def test_edits_reach_the_positions_they_name(model: Any) -> None:
    batch, model = Batch.of_ids(ids(length_of(model))), model()
    clean = model.run(batch, capture=[*SITES, "attn_out"]).cache
    n, n_keys = clean["pattern.1"].shape[2:]

    def seen(edit: Edit, *sites: str) -> Any:
        return model.run(batch, capture=sites, edits=[edit]).cache

    out = seen(Edit.zero("z.1.0", positions=[5]), "attn_out.1")["attn_out.1"]
    less = clean["z.1"][:, 5, 0] @ model.W_O(1)[0]
    assert off(out[:, 5], clean["attn_out.1"][:, 5] - less) < ROUNDING
    rest = [p for p in range(n) if p != 5]
    assert off(out[:, rest], clean["attn_out.1"][:, rest]) < ROUNDING

    to_itself = Edit.apply("pattern.1", lambda x, seen: torch.eye(n, n_keys).expand_as(x).clone())
    assert off(seen(to_itself, "z.1")["z.1"], clean["v.1"][:, :n]) < ROUNDING

    if bool(clean["scores.1"].isinf().any()):  # no block holds such a pair
        even = Edit.apply("pattern.1", lambda x, seen: torch.full_like(x, 1 / n_keys))
        with pytest.raises(BadInput, match="values where queries see no key"):
            seen(even)

    for key in (5, n_keys - 1):  # a position's, and a global one where there are such
        sees = clean["pattern.1"][0, 0, :, key] > 0
        assert sees.any()
        found = seen(Edit.zero("k.1", positions=[key]), "pattern.1", "scores.1")
        moved = (found["pattern.1"] - clean["pattern.1"]).abs().amax((0, 1, 3)) > 0
        assert torch.equal(moved, sees)
        less = torch.einsum("bqhd,bhd->bhq", clean["q.1"], clean["k.1"][:, key])
        fall = clean["scores.1"][..., key] - found["scores.1"][..., key]
        scale = 1.0 if n == LENGTH else 8**-0.5
        assert off(fall[..., sees], scale * less[..., sees]) < ROUNDING

        without = seen(Edit.zero("v.1", positions=[key]), "z.1")["z.1"]
        part = torch.einsum("bhq,bhd->bqhd", clean["pattern.1"][..., key], clean["v.1"][:, key])
        assert off(without, clean["z.1"] - part) < ROUNDING

        at = torch.tensor([key])
        hide = Edit.apply("scores.1", lambda x, seen, at=at: x.index_fill(-1, at, -torch.inf))
        hidden = seen(hide, "pattern.1")["pattern.1"]
        wanted = clean["pattern.1"].index_fill(-1, at, 0.0)
        assert off(hidden, wanted / wanted.sum(-1, keepdim=True)) < ROUNDING

    moved = seen(Edit.zero("q.1", positions=[5]), "scores.1")["scores.1"] != clean["scores.1"]
    assert torch.equal(moved.any(-1).any(1)[0], torch.arange(n) == 5)


@pytest.mark.parametrize("model", MODELS)
def test_edits_of_several_sites_are_what_edits_of_the_last_one_are(model: Any) -> None:
    """Each is made of what the ones before it have made."""
    batch, model = Batch.of_ids(ids(length_of(model))), model()
    halves = [Edit.scale(site, 0.5) for site in ("q.1", "v.1", "pattern.1", "z.1.2")]
    sites = ["scores.1", "pattern.1", "z.1", "attn_out.1"]
    made = model.run(batch, capture=["v.1", *sites], edits=halves).cache
    again = model.run(batch, capture=sites, edits=[Edit.scale("q.1", 0.5)]).cache
    assert torch.equal(made["scores.1"], again["scores.1"])
    assert off(made["pattern.1"], again["pattern.1"] / 2) < ROUNDING
    z = torch.einsum("bhqk,bkhd->bqhd", made["pattern.1"], made["v.1"])
    z[:, :, 2] = z[:, :, 2] / 2
    assert off(made["z.1"], z) < ROUNDING
    out = torch.einsum("bphd,hdm->bpm", z, model.W_O(1)) + model.b_O(1)
    assert off(made["attn_out.1"], out) < ROUNDING


@pytest.mark.parametrize("model", MODELS)
def test_an_edit_that_changes_nothing_changes_nothing(model: Any) -> None:
    batch, model = Batch.of_ids(ids(length_of(model))), model()
    clean = model.run(batch).logits
    assert clean is not None
    edits = [Edit.apply(name, lambda x, seen: x.clone()) for name in SITES]
    same = model.run(batch, edits=edits).logits
    assert same is not None and torch.equal(same, clean)


@pytest.mark.parametrize("site", ["z.1", "pattern.1", "k.0"])
@pytest.mark.parametrize("model", [with_globals, banded])
def test_a_replay_is_a_rerun(model: Any, site: str) -> None:
    batch, model = Batch.of_ids(ids(length_of(model))), model()
    run = model.run(batch, capture=["resid_pre"])
    edits = [[Edit.scale(site, factor)] for factor in (0.5, 2.0)]
    replayed = model.replay(run, edits, lambda variant: variant.logits)
    for edit, logits in zip(edits, replayed, strict=True):
        rerun = model.run(batch, edits=edit).logits
        assert off(logits, rerun) < ROUNDING < 10 * ROUNDING < off(rerun, run.logits)


@pytest.mark.parametrize("model", [with_globals, banded])
def test_gradients_are_of_the_positions(model: Any) -> None:
    """The derivative along the gradient is the slope of what an edit along it does.

    To a percent: norms and softmax of these models compute in float32 whatever they are given.
    """
    batch, model = Batch.of_ids(ids(length_of(model))), model()
    sites = ["q.1", "k.1", "pattern.1", "v.1", "z.1", "attn_out.1"]
    double = Model(model.module.double(), id="double")
    try:
        run = double.run(batch, capture=sites, grad=True)
        assert run.logits is not None
        weights = torch.randn_like(run.logits)  # a plain sum of what a norm returns is always 0
        target = (run.logits * weights).sum()
        for site in sites:
            gradient = run.gradients(target, site)
            slope = gradient.norm()
            direction = gradient / slope

            def moved(by: float, site: str = site, along: Tensor = direction) -> Tensor:
                edit = Edit.apply(site, lambda x, seen: x + by * along)
                logits = double.run(batch, edits=[edit]).logits
                assert logits is not None
                return (logits * weights).sum()

            step = 1e-3
            found = float((moved(step) - moved(-step)) / (2 * step))
            assert found == pytest.approx(float(slope), rel=1e-2), site
    finally:
        model.module.float()


# --- other inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [local, banded])
def test_padded_rows_attend_as_they_do_alone(model: Any) -> None:
    model = model()
    long, short = ids(16), ids(8)
    padded = torch.cat([short, torch.zeros(2, 8, dtype=torch.long)], 1)
    mask = torch.ones(4, 16, dtype=torch.bool)
    mask[2:, 8:] = False
    both = model.run(Batch.of_ids(torch.cat([long, padded]), mask), capture=["pattern", "z"]).cache
    for batch, rows in ((long, slice(0, 2)), (short, slice(2, 4))):
        alone, n = model.run(Batch.of_ids(batch), capture=["pattern", "z"]).cache, batch.shape[1]
        for layer in range(2):
            pattern = both[f"pattern.{layer}"][rows, :, :n, :n]
            assert off(pattern, alone[f"pattern.{layer}"]) < ROUNDING
            assert off(both[f"z.{layer}"][rows, :n], alone[f"z.{layer}"]) < ROUNDING


def test_what_a_model_pads_itself_stands_behind_the_positions() -> None:
    """Longformer adds two positions to 14; no one sees them."""
    model = banded()
    cache = model.run(Batch.of_ids(ids()), capture=["pattern", "resid_post"]).cache
    assert cache["resid_post.1"].shape[1] == 16
    assert (cache["pattern"][..., LENGTH:] == 0).all()


@cache
def language_model() -> Model:
    torch.manual_seed(0)
    config = transformers.LongformerConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=160,
        **BAND,
    )
    return Model(randomised(transformers.LongformerForMaskedLM(config)), id="language model")


def test_logits_are_those_of_the_tokens_and_not_of_what_a_model_pads() -> None:
    model = language_model()
    run = model.run(ids(), capture=["resid_post"])
    assert run.logits is not None and run.logits.shape[1] == LENGTH
    made = model.unembed(run.cache["resid_post.1"])
    assert off(made[:, :LENGTH], run.logits) < ROUNDING


@pytest.mark.parametrize("model", [language_model, with_globals])
def test_statistics_are_of_tokens_alone(model: Any) -> None:
    model, n = model(), LENGTH
    keys, rows = torch.randint(n, (2, n, 3)), torch.rand(2, n) < 0.5
    visible = torch.full((2, n), n)
    statistics = {"mass": Mass(keys, rows), "entropy": Entropy(rows, visible)}
    run = model.run(ids(), capture=["pattern"], statistics=statistics, logits=False)
    for layer in range(2):
        pattern = run.cache[f"pattern.{layer}"][:, :, :n, :n]
        picked = pattern.gather(-1, keys[:, None].expand(-1, 4, -1, -1)).sum(-1)
        entropy = torch.special.entr(pattern).sum(-1) / torch.tensor(float(n)).log()
        for name, wanted in (("mass", picked), ("entropy", entropy)):
            mean = (wanted * rows[:, None]).sum(-1) / rows.sum(-1, keepdim=True)
            assert off(run.statistics[name][:, layer], mean) < ROUNDING


@pytest.mark.parametrize("model", [language_model, with_globals])
def test_heads_are_classified_by_their_patterns_over_tokens(model: Any) -> None:
    model = model()
    assert len(circuits.classify_heads(model, prompts=4, progress=False).table) == 8
    prompt = Evidence("a prompt", Batch.of_ids(ids()[:1]), model.tokens(ids()[0].tolist()))
    shown = evidence_patterns(model, [prompt])
    pattern = model.run(prompt.batch, capture=["pattern.1"]).cache["pattern.1"]
    wanted = (255 * pattern[0, :, :LENGTH, :LENGTH].sqrt()).round()
    assert shown.shape == (1, 2, 4, LENGTH, LENGTH)
    assert torch.equal(torch.from_numpy(shown[0, 1]).float(), wanted)


# --- blocks that are staggered, with global tokens that have a stream of their own --------------------

GLOBAL, TOKENS = 3, 10


@cache
def staggered(n_global: int = GLOBAL) -> Model:
    """Pegasus-X: blocks of 4, those of every second layer begin two positions earlier; 10 tokens are padded to 12."""
    torch.manual_seed(0)
    config = transformers.PegasusXConfig(
        d_model=32,
        encoder_layers=3,
        decoder_layers=1,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        vocab_size=97,
        block_size=BLOCK,
        num_global_tokens=n_global,
        max_position_embeddings=64,
    )
    return Model(randomised(transformers.PegasusXModel(config)).get_encoder(), id="staggered")


def in_blocks(layer: int) -> Tensor:
    """Which of 12 positions (two are padding) share a block."""
    block = (torch.arange(12) + 2 * (layer % 2)) // BLOCK
    return (block[:, None] == block[None]) & (torch.arange(12) < TOKENS)


@pytest.mark.parametrize("layer", range(3))
def test_staggered_blocks_are_attention_of_positions(layer: int) -> None:
    """Padding stands behind the positions, and the global tokens' keys behind that."""
    model, batch = staggered(), Batch.of_ids(ids(TOKENS))
    assert not {*SITES, "attn_out"} & set(model.spec.refused)
    cache = model.run(batch, capture=[*SITES, "attn_out"]).cache
    attention: Any = model.blocks[layer].self_attn
    x = normed(model, layer, batch, "self_attn_layer_norm")
    of_all = normed(model, layer, batch, "global_self_attn_layer_norm")
    with torch.no_grad():
        q = heads(attention.q_proj(x)) / 8**0.5
        k, v = (
            torch.cat([heads(f(x)), heads(f(of_all))], 2)
            for f in (attention.k_proj, attention.v_proj)
        )
        sees = torch.cat([in_blocks(layer), torch.ones(12, GLOBAL).bool()], 1)
        pattern = (q @ k.mT).masked_fill(~sees, -torch.inf).softmax(-1)
        out = attention.out_proj((pattern @ v).transpose(1, 2).flatten(2))
    n_padding = 4 * (layer % 2)
    shown = [*range(12), *range(12 + n_padding, 12 + n_padding + GLOBAL)]
    found = cache[f"pattern.{layer}"]
    assert found.shape == (2, 4, 12, 12 + n_padding + GLOBAL)
    assert off(found[..., shown], pattern) < ROUNDING
    assert (found[..., 12 : 12 + n_padding] == 0).all()
    assert off(cache[f"v.{layer}"][:, shown], v.transpose(1, 2)) < ROUNDING
    assert off(cache[f"k.{layer}"][:, shown], k.transpose(1, 2)) < ROUNDING
    assert off(cache[f"z.{layer}"], (pattern @ v).transpose(1, 2)) < ROUNDING
    assert off(cache[f"attn_out.{layer}"], out) < ROUNDING


@pytest.mark.parametrize("layer", range(3))
def test_edits_of_staggered_blocks_reach_the_positions_they_name(layer: int) -> None:
    model, batch = staggered(), Batch.of_ids(ids(TOKENS))
    clean = model.run(batch, capture=[*SITES, "attn_out"]).cache
    pattern, v = clean[f"pattern.{layer}"], clean[f"v.{layer}"]

    def seen(edit: Edit, site: str) -> Tensor:
        return model.run(batch, capture=[site], edits=[edit]).cache[site]

    out = seen(Edit.zero(f"z.{layer}", positions=[5]), f"attn_out.{layer}")
    rest = [p for p in range(12) if p != 5]
    assert (out[:, 5] == 0).all() and torch.equal(out[:, rest], clean[f"attn_out.{layer}"][:, rest])
    for key in (5, pattern.shape[-1] - 1):
        moved = seen(Edit.zero(f"k.{layer}", positions=[key]), f"pattern.{layer}") != pattern
        assert torch.equal(moved.any(-1).any(1)[0], pattern[0, 0, :, key] > 0)
        less = torch.einsum("bhq,bhd->bqhd", pattern[..., key], v[:, key])
        z = seen(Edit.zero(f"v.{layer}", positions=[key]), f"z.{layer}")
        assert off(z, clean[f"z.{layer}"] - less) < ROUNDING
    eye = torch.eye(*pattern.shape[2:])
    to_itself = Edit.apply(f"pattern.{layer}", lambda x, seen: eye.expand_as(x).clone())
    assert off(seen(to_itself, f"z.{layer}"), v[:, :12]) < ROUNDING
    same = [Edit.apply(site, lambda x, seen: x.clone()) for site in (*SITES, "attn_out")]
    plain, edited = model.run(batch).logits, model.run(batch, edits=same).logits
    assert plain is not None and edited is not None and torch.equal(plain, edited)


def test_what_is_given_of_staggered_blocks_is_of_positions_and_not_of_global_tokens() -> None:
    """Its MLP and its output projection are called for the global tokens besides."""
    model, batch = staggered(), Batch.of_ids(ids(TOKENS))
    assert not model.spec.refused and all(check.passed for check in model.spec.checks)
    cache = model.run(batch, capture=WRITES).cache
    for layer in range(3):
        mid = cache[f"resid_pre.{layer}"] + cache[f"attn_write.{layer}"]
        assert off(cache[f"resid_mid.{layer}"], mid) < ROUNDING
        post = mid + cache[f"mlp_write.{layer}"]
        assert off(cache[f"resid_post.{layer}"], post) < ROUNDING
        neurons = cache[f"mlp_post.{layer}"] @ model.W_out(layer) + model.b_out(layer)
        assert off(neurons, cache[f"mlp_out.{layer}"]) < ROUNDING
        edit = Edit.zero(f"mlp_post.{layer}", positions=[5])
        rest = [p for p in range(12) if p != 5]
        site = f"mlp_out.{layer}"
        out = model.run(batch, capture=[site], edits=[edit]).cache[site]
        assert off(out[:, 5], model.b_out(layer).expand(2, -1)) < ROUNDING
        assert torch.equal(out[:, rest], cache[site][:, rest])
    same = [Edit.apply(site, lambda x, seen: x.clone()) for site in WRITES]
    plain, edited = model.run(batch).logits, model.run(batch, edits=same).logits
    assert plain is not None and edited is not None and off(edited, plain) < ROUNDING


def test_as_many_global_tokens_as_positions_are_refused() -> None:
    """An MLP that is called for both could be taken for either."""
    model = staggered(4)
    assert model.run(Batch.of_ids(ids(4)), capture=["z", "resid_post"]).logits is not None
    with pytest.raises(Refused, match="is called several times on tensors of the residual stream"):
        model.run(Batch.of_ids(ids(4)), capture=["mlp_write"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("model", [*MODELS, staggered])
def test_every_dtype_is_understood(model: Any, dtype: torch.dtype) -> None:
    module = model().module
    try:
        other = Model(module.to(dtype), id="other")
        assert not {*SITES, "attn_out"} & set(other.spec.refused)
        cache = other.run(Batch.of_ids(ids(16)), capture=["pattern", "z"]).cache
    finally:
        module.float()
    wanted = model().run(Batch.of_ids(ids(16)), capture=["pattern.0"]).cache["pattern.0"]
    assert cache["z.0"].dtype == dtype
    assert torch.equal(cache["pattern.0"] > 0, wanted > 0)


def test_global_tokens_are_refused_by_name() -> None:
    model = banded()
    mask = torch.zeros(2, 16, dtype=torch.long)
    mask[:, 0] = 1
    batch = Batch.of_inputs({"input_ids": ids(16), "global_attention_mask": mask})
    assert model.run(batch, capture=["resid_post"]).logits is not None
    with pytest.raises(
        Refused, match="LongformerSelfAttention did not attend as it did on the probe"
    ):
        model.run(batch, capture=["z"])


def test_values_in_another_order_are_still_told_apart() -> None:
    """Which key an entry is of follows from what it is multiplied with, and from nothing the module says."""

    class Rolled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.roll(1, 1)

    torch.manual_seed(0)
    config = transformers.LongT5Config(encoder_attention_type="local", **T5)
    module = randomised(transformers.LongT5EncoderModel(config))
    for block in module.encoder.block:
        attention = block.layer[0].LocalSelfAttention
        attention.v = nn.Sequential(attention.v, Rolled())
    model, batch = Model(module, id="rolled"), Batch.of_ids(ids())
    pattern = model.run(batch, capture=["pattern", "v", "z"]).cache
    made = torch.einsum("bhqk,bkhd->bqhd", pattern["pattern.0"], pattern["v.0"])
    assert off(made, pattern["z.0"]) < ROUNDING
    # Scores are then of no one's keys: entry by entry, keys stand one position behind their values.
    assert {"q", "k"} <= set(model.spec.refused) and "pattern" not in model.spec.refused


def test_a_model_that_replaces_its_own_modules_says_so() -> None:
    """BigBird attends to everything from its first short input on, and is seen doing so."""
    config = transformers.BigBirdConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        block_size=4,
        num_random_blocks=1,
        vocab_size=97,
    )
    model = Model(randomised(transformers.BigBirdModel(config)), id="big bird")
    (note,) = model.notes
    assert "put BigBirdSelfAttention in place of BigBirdBlockSparseAttention in 2 of" in note
    cache = model.run(Batch.of_ids(ids(40)), capture=["pattern"]).cache
    assert (cache["pattern.0"] > 0).all()
    assert not local().notes


def test_only_modules_that_need_it_are_looked_at_this_way() -> None:
    plain = transformers.T5EncoderModel(
        transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=97)
    )
    Model(randomised(plain), id="t5")
    assert not any(part in pieces for part in plain.modules())
    assert sum(part in pieces for part in banded().module.modules()) == 2


def test_a_part_that_returns_no_tensor_of_its_own_has_no_attention_in_pieces() -> None:
    """What is read of its softmax is read by code outside it, in an output with names (a table's decoder)."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(8, 1)

        def forward(self, x: Tensor) -> BaseModelOutput:
            weights = self.score(x).softmax(1)  # one score a position, for no query
            return BaseModelOutput(last_hidden_state=(weights * x).sum(1, keepdim=True))  # type: ignore[arg-type]

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(16, 8), Attends()

        def forward(self, input_ids: Tensor) -> BaseModelOutput:
            return self.head(self.embed(input_ids))

    module = Whole()
    module.config = PreTrainedConfig(vocab_size=16)  # type: ignore[assignment]
    with pytest.raises(Refused, match="has no softmax attention"):
        Model(module.eval(), id="pooled")
