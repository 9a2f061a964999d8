"""Models whose blocks work in stages, on streams of several widths and lengths, one after the other."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.edits import Edit
from interp.sites import ranges
from interp.terminal import print_map
from tests.families import FAMILIES

BATCH = Batch(
    {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
)
ROUNDING = 1e-5
"""A few float32 roundings, four blocks deep."""
STAGED = ("segformer", "swin")


@cache
def staged(name: str, depth: int = 2) -> Model:
    """Two stages of `depth` blocks: widths 16 and 32, 2 and 4 heads; 64 and 16 positions, or 256 and 64."""
    torch.manual_seed(0)
    depths = [depth, depth]
    config: Any
    if name == "segformer":  # keys of the first stage are 4 × 4 positions each
        config = transformers.SegformerConfig(
            num_encoder_blocks=2,
            depths=depths,
            hidden_sizes=[16, 32],
            num_attention_heads=[2, 4],
            sr_ratios=[4, 1],
            patch_sizes=[7, 3],
            strides=[4, 2],
            mlp_ratios=[2, 2],
        )
        module: Any = transformers.SegformerModel(config)
    else:
        config = transformers.SwinConfig(
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=depths,
            num_heads=[2, 4],
            window_size=4,
        )
        module = transformers.SwinModel(config)
    assert sum(parameter.numel() for parameter in module.parameters()) < 100_000
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return Model(module.eval(), id=name)


def off(got: Tensor | None, wanted: Tensor | None) -> float:
    assert got is not None and wanted is not None and got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def called(model: Model, modules: list[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """What each of the modules is called with and returns in a plain forward."""
    kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        kept[module] = (
            args[0].clone(),
            (output[0] if isinstance(output, tuple) else output).clone(),
        )

    hooks = [module.register_forward_hook(keep) for module in modules]
    model.module(**BATCH.inputs)
    for hook in hooks:
        hook.remove()
    return [kept[module] for module in modules]


@pytest.mark.parametrize("name", STAGED)
def test_each_stage_has_a_stream_of_its_own_shape(name: str) -> None:
    model = staged(name)
    spec = model.spec
    assert [list(stage) for stage in spec.stages] == [[0, 1], [2, 3]]
    assert [block.d_model for block in spec.blocks] == [16, 16, 32, 32] and spec.d_model == 32
    assert not spec.refused
    assert all(check.passed for check in spec.checks)
    cache = model.run(BATCH, capture=["resid_pre", "resid_post", "mlp_out"]).cache
    for layer, (given, returned) in enumerate(called(model, model.blocks)):
        assert torch.equal(cache[f"resid_pre.{layer}"], given)
        assert torch.equal(cache[f"resid_post.{layer}"], returned)
        assert cache[f"mlp_out.{layer}"].shape == given.shape
    assert not torch.equal(
        cache["resid_post.1"].flatten()[:100], cache["resid_pre.2"].flatten()[:100]
    )


@pytest.mark.parametrize("name", STAGED)
def test_a_stage_of_one_block_is_a_stage(name: str) -> None:
    """The list of stages, whose members return another shape than they read, is not the list of blocks."""
    spec = staged(name, depth=1).spec
    assert [block.d_model for block in spec.blocks] == [16, 32]
    assert spec.blocks[1].starts_stage and "resid_post" not in spec.refused


def test_the_printed_map_has_each_stage_s_width(capsys: pytest.CaptureFixture[str]) -> None:
    print_map(staged("swin"))
    blocks = capsys.readouterr().out.split("\nblocks ")[1:]
    for part, width, windows in zip(blocks, ("16", "32"), ("16", "4"), strict=True):
        rows = [line.replace("│", " ").split() for line in part.splitlines()]
        assert ["d_model", width] in rows and ["n_windows", windows] in rows


def test_the_writes_of_a_stage_sum_to_its_stream() -> None:
    model = staged("segformer")
    assert not model.spec.refused
    sites = ["resid_pre", "resid_post", "attn_write", "mlp_write", "resid_mid"]
    cache = model.run(BATCH, capture=sites).cache
    for stage in model.spec.stages:
        total = cache[f"resid_pre.{stage[0]}"]
        for layer in stage:
            total = total + cache[f"attn_write.{layer}"]
            assert off(total, cache[f"resid_mid.{layer}"]) < ROUNDING
            total = total + cache[f"mlp_write.{layer}"]
        assert off(total, cache[f"resid_post.{stage[-1]}"]) < ROUNDING


@pytest.mark.parametrize("name", STAGED)
def test_what_needs_one_stream_says_so(name: str) -> None:
    with pytest.raises(Refused, match="in stages, on streams of widths 16, 32"):
        staged(name).require_sum("this test")


@pytest.mark.parametrize("name", STAGED)
def test_a_replay_starts_in_any_stage(name: str) -> None:
    model = staged(name)
    run = model.run(BATCH, capture=["resid_pre"])
    calls: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda module, args, layer=layer: calls.append(layer))  # type: ignore
        for layer, block in enumerate(block.mlp for block in model.blocks)  # type: ignore
    ]
    try:
        for layer in range(model.n_layers):
            edit = Edit.zero(f"mlp_out.{layer}", positions=[3])
            rerun = model.run(BATCH, edits=[edit]).logits
            assert rerun is not None and run.logits is not None
            calls.clear()
            # two variants a forward, the second of which changes nothing
            edits = [[edit], [Edit.scale(f"mlp_out.{layer}", 1.0)]]
            first, second = model.replay(run, edits, lambda variant: variant.logits)
            assert calls == list(range(layer, model.n_layers))
            assert off(first, rerun) < ROUNDING < 100 * ROUNDING < off(rerun, run.logits)
            assert off(second, run.logits) < ROUNDING
    finally:
        for hook in hooks:
            hook.remove()


# --- fewer keys than queries -----------------------------------------------------------------------


@torch.no_grad()
def by_hand(attention: Any, x: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """(pattern, z) of one head of a plain attention over keys that are pooled first, from its weights."""
    keys = x
    if attention.sequence_reduction_ratio > 1:
        reduce = attention.sequence_reduction
        grid = x.mT.reshape(len(x), -1, 8, 8)
        keys = reduce.layer_norm(reduce.sequence_reduction(grid).flatten(2).mT)
    columns = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
    q, k, v = (
        part(given)[..., columns]
        for part, given in (
            (attention.q_proj, x),
            (attention.k_proj, keys),
            (attention.v_proj, keys),
        )
    )
    pattern = (q @ k.mT / attention.head_dim**0.5).softmax(-1)
    return pattern, pattern @ v


def test_pooled_keys_are_the_pattern_s_last_axis() -> None:
    model = staged("segformer")
    assert not model.spec.causal
    cache = model.run(BATCH, capture=["pattern", "scores", "z", "k"]).cache
    shapes = [cache[f"pattern.{layer}"].shape for layer in range(4)]
    assert shapes == [(2, 2, 64, 4)] * 2 + [(2, 4, 16, 16)] * 2
    assert cache["k.0"].shape == (2, 4, 2, 8)
    attentions = [block.attention for block in model.blocks]
    for layer, (x, _) in enumerate(called(model, attentions)):  # type: ignore[arg-type]
        pattern, z = by_hand(attentions[layer], x, 1)
        assert off(cache[f"pattern.{layer}.1"], pattern) < ROUNDING
        assert off(cache[f"z.{layer}.1"], z) < ROUNDING


def test_v_of_pooled_keys_is_no_map_of_the_stream() -> None:
    model = staged("segformer")
    with pytest.raises(Refused, match="not read from the normed residual stream"):
        model.W_V(0)
    assert model.W_V(2).shape == (4, 32, 8) and model.W_O(0).shape == (2, 8, 16)


def test_a_key_of_many_positions_can_be_taken_away() -> None:
    """-inf for a key's scores is the softmax over the others."""
    model = staged("segformer")
    clean = model.run(BATCH, capture=["pattern.0", "v.0"]).cache

    def without(x: Tensor, seen: Any) -> Tensor:
        return x.index_fill(-1, torch.tensor([2]), -torch.inf)

    cut = model.run(BATCH, capture=["z.0"], edits=[Edit.apply("scores.0", without)]).cache["z.0"]
    pattern = clean["pattern.0"].index_fill(-1, torch.tensor([2]), 0.0)
    pattern = pattern / pattern.sum(-1, keepdim=True)
    wanted = torch.einsum("bhqk,bkhd->bqhd", pattern, clean["v.0"])
    assert off(cut, wanted) < ROUNDING


def test_a_block_that_reads_another_width_than_it_returns_begins_the_stream() -> None:
    """Fun-ASR's encoder: the first block reads stacked frames of width 160, and returns 32: what it writes itself."""
    torch.manual_seed(0)
    config = transformers.FunAsrNanoEncoderConfig(
        num_mel_bins=80,
        num_stacked_frames=2,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_timestamp_prediction_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = Model(transformers.FunAsrNanoEncoder(config).eval(), id="widening")
    assert not model.spec.refused and all(check.passed for check in model.spec.checks)
    assert [block.d_model for block in model.spec.blocks][:2] == [160, 32]
    assert model.spec.chained and [list(stage) for stage in model.spec.stages] == [[0], [1, 2]]
    x = torch.randn(2, 9, 160, generator=torch.Generator().manual_seed(1))
    batch = Batch({"input_features": x, "input_features_mask": torch.ones(2, 9, dtype=torch.long)})
    sites = ["resid_pre", "z", "attn_out", "attn_write", "resid_mid", "mlp_write", "resid_post"]
    run = model.run(batch, capture=sites)
    cache = run.cache
    for layer, width in ((0, 160), (1, 32)):
        assert cache[f"resid_pre.{layer}"].shape == (2, 9, width)
        made: Any = model.blocks[layer].get_submodule("self_attn.o_proj")
        assert off(cache[f"attn_out.{layer}"], made(cache[f"z.{layer}"].flatten(2))) < ROUNDING
    # Attention's write is all of the stream there is then: with the memory of values beside its heads.
    assert off(cache["attn_write.0"], cache["resid_mid.0"]) < ROUNDING
    assert off(cache["resid_mid.0"] + cache["mlp_write.0"], cache["resid_post.0"]) < ROUNDING
    assert off(cache["attn_out.0"], cache["attn_write.0"]) > 0.01
    assert torch.equal(cache["resid_post.0"], cache["resid_pre.1"])
    for site in ("attn_write.0", "resid_mid.0", "mlp_write.0"):
        edits = [Edit.scale(site, 0.5, positions=[3])]
        half = model.run(batch, capture=sites, edits=edits)
        wanted = cache["resid_post.0"] - 0.5 * cache["mlp_write.0"]
        if site != "mlp_write.0":
            wanted = half.cache["mlp_write.0"] + 0.5 * cache["resid_mid.0"]
        assert off(half.cache["resid_post.0"][:, 3], wanted[:, 3]) < ROUNDING
        (replayed,) = model.replay(run, [edits], lambda variant: variant.logits)
        assert off(replayed, half.logits) < ROUNDING < off(half.logits, run.logits)


def test_a_block_that_is_attention_alone_may_return_another_shape() -> None:
    """LeViT's between two stages: a quarter of the positions, what attention writes and nothing else."""
    torch.manual_seed(0)
    config = transformers.LevitConfig(
        image_size=64,
        hidden_sizes=[16, 24],
        num_attention_heads=[2, 3],
        depths=[1, 1],
        key_dim=[4, 4],
        mlp_ratio=[2, 2],
        attention_ratio=[2, 2],
    )
    config.down_ops = [["Subsample", 4, 4, 4, 2, 2]]
    module = transformers.LevitModel(config).eval()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d):  # some begin at 0, and let nothing through
                part.weight.copy_(1 + 0.1 * torch.randn_like(part.weight))
    model = Model(module, id="shrinking")
    assert model.spec.refused.keys() == model.spec.absent == {"resid_mid"}
    assert model.layers_with("mlp_post") == [1, 3, 5]  # before the norm that the MLP ends with
    assert "neurons" in {check.name for check in model.spec.checks if check.passed}
    assert [len(stage) for stage in model.spec.stages] == [3, 3]
    assert model.layers_with("attn_write") == [0, 2, 4] and model.layers_with("mlp_write") == [
        1,
        3,
        5,
    ]
    batch = Batch({"pixel_values": torch.randn(2, 3, 64, 64)})
    cache = model.run(batch, capture=["resid_pre", "resid_post", "attn_write"]).cache
    assert cache["resid_pre.2"].shape == (2, 16, 16) and cache["attn_write.2"].shape == (2, 4, 24)
    assert torch.equal(cache["attn_write.2"], cache["resid_post.2"])
    halved = model.run(batch, capture=["resid_pre"], edits=[Edit.scale("attn_write.2", 0.5)]).cache
    assert off(halved["resid_pre.3"], 0.5 * cache["resid_pre.3"]) < ROUNDING


# --- a block that is no sum ------------------------------------------------------------------------


def test_one_block_that_is_no_sum_refuses_its_own_writes_alone() -> None:
    module = FAMILIES["llama"]()
    whole = Model(module, id="whole").spec
    layer = 1
    assert whole.n_layers > layer + 1 and not whole.refused
    block = module.get_submodule(whole.blocks[layer].name)
    block.register_forward_hook(lambda module, args, out: out.tanh())
    model = Model(module, id="bent")
    others = [i for i in range(model.n_layers) if i != layer]
    writes = ("attn_write", "mlp_write", "mlp_out", "mlp_post", "resid_mid")
    assert model.spec.refused.keys() == {f"{site}.{layer}" for site in writes}
    assert all(model.layers_with(site) == others for site in writes) and not model.spec.absent
    assert all(check.passed for check in model.spec.checks)
    (check,) = (check for check in model.spec.checks if check.name == "writes")
    assert f"layers {ranges(others)} read plus their writes" in check.detail
    with pytest.raises(Refused, match=r"no outputs inside .*\.1' sum to resid_post"):
        model.run(torch.tensor([[5, 6, 7]]), capture=["mlp_write.1"])
    with pytest.raises(Refused, match=r"no outputs inside .*\.1' sum to resid_post"):
        model.require_sum("this test")


def mixers(kernel: int) -> Model:
    """MobileCLIP's text encoder: the blocks at both ends mix positions in [batch channels 1 pos]."""
    torch.manual_seed(0)
    config = transformers.Sam3LiteTextTextConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=8,
        repmixer_kernel_size=kernel,
        use_repmixer_blocks=True,
    )
    module = transformers.Sam3LiteTextTextModel(config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(part in name for part in ("layer_scale", "batchnorm", "conv", "embedding")):
                parameter.copy_(torch.randn_like(parameter))
    return Model(module, id="mixers")


def test_writes_of_convolutions_have_channels_first() -> None:
    model = mixers(kernel=3)
    spec = model.spec
    assert not spec.refused and all(check.passed for check in spec.checks)
    for layer in (0, 3):
        name, block = spec.blocks[layer].name, spec.blocks[layer]
        mixer = f"{name}.token_mixer"
        wanted = {
            (f"{mixer}.mixer", 1.0, f"{mixer}.layer_scale"),
            (f"{mixer}.reference_batchnorm", -1.0, f"{mixer}.layer_scale"),
            (f"{name}.conv_feed_forward", 1.0, f"{name}.layer_scale"),
        }
        assert {(w.module, round(w.scale, 5), w.gain) for w in block.others} == wanted
        assert block.turned == {module for module, _, _ in wanted} and len(block.writes) == 3
    assert model.layers_with("mlp_write") == model.layers_with("attn_write") == [1, 2]
    assert "embedding plus writes" in next(c.detail for c in spec.checks if c.name == "writes")
    with pytest.raises(Refused, match="besides attention and MLP"):
        model.require_sum("this test")


@torch.no_grad()
def test_a_site_of_a_convolution_has_channels_behind_positions() -> None:
    """Kernels of one position: what comes first of the block works by position, as an MLP does."""
    model = mixers(kernel=1)
    assert model.layers_with("mlp_write") == [0, 1, 2, 3] and 0 not in model.layers_with("mlp_post")
    ids = torch.randint(10, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    block: Any = model.blocks[0]
    run = model.run(ids, capture=["resid_pre", "mlp_write", "mlp_out"])
    made = block.token_mixer.mixer(run.cache["resid_pre.0"].mT[:, :, None])[:, :, 0].mT
    gain = block.token_mixer.layer_scale.flatten()
    assert off(run.cache["mlp_out.0"], made) < ROUNDING
    assert off(run.cache["mlp_write.0"], gain * made) < ROUNDING

    def without(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        return out.index_fill(3, torch.tensor([4]), 0.0)

    hook = block.token_mixer.mixer.register_forward_hook(without)
    wanted = model.module(input_ids=ids).last_hidden_state
    hook.remove()
    edit = Edit.zero("mlp_write.0", positions=[4])
    assert off(model.run(ids, edits=[edit]).logits, wanted) < ROUNDING < off(run.logits, wanted)
