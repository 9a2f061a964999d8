"""Vision models whose blocks hold, list or cut their positions in ways of their own: sites against plain weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from benchmarks.tiny_configs import tiny_model
from interp.errors import Refused
from interp.models.images import PLACES, random_images
from interp.models.model import Model
from interp.models.probe import probe_batch
from interp.run.batch import Batch
from interp.run.edits import Edit
from tests.test_windows import ROUNDING, UNSEEN, WINDOW, images, off, randomised, together

SITES = ["q", "k", "v", "pattern", "z", "attn_out", "attn_write", "resid_pre", "resid_mid"]


def linear(module: Any, x: Tensor, n_heads: int) -> Tensor:
    """What a linear layer makes of x, [batch pos heads d_head]."""
    with torch.no_grad():
        return module(x).unflatten(-1, (n_heads, -1))


def seen_whole(model: Model, side: int) -> dict[str, Any]:
    """The cache of images, once every identity has passed and heads, writes and logits are the model's own."""
    assert not set(model.spec.refused) - model.spec.absent
    assert all(check.passed for check in model.spec.checks)
    run = model.run(images(side), capture=SITES)
    for layer in range(model.n_layers):
        heads = torch.einsum("bphd,hdm->bpm", run.cache[f"z.{layer}"], model.W_O(layer))
        assert off(heads + model.b_O(layer), run.cache[f"attn_out.{layer}"]) < ROUNDING
        mid = run.cache[f"resid_pre.{layer}"] + run.cache[f"attn_write.{layer}"]
        assert off(mid, run.cache[f"resid_mid.{layer}"]) < ROUNDING
    return {name: run.cache[name] for name in (f"{s}.{i}" for s in SITES for i in range(4))}


def test_windows_cut_from_what_a_block_reads() -> None:
    """Blocks that norm after attention hand the stream itself to it: v, q and k are made of resid_pre."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    config = transformers.Swinv2Config(image_size=32, patch_size=2, window_size=WINDOW, **sizes)
    model = Model(randomised(transformers.Swinv2Model(config)), id="post-norm")
    cache = seen_whole(model, 32)
    for layer, side in enumerate((16, 16, 8, 8)):
        pattern, z, v = (cache[f"{name}.{layer}"] for name in ("pattern", "z", "v"))
        assert torch.equal((pattern > UNSEEN).all((0, 1)), together(side, (0, 2)[layer % 2]))
        attention: Any = model.blocks[layer].attention.self  # type: ignore[union-attr]
        resid, heads = cache[f"resid_pre.{layer}"], (2, 4)[layer // 2]
        assert off(v, linear(attention.value, resid, heads)) < ROUNDING
        q = nn.functional.normalize(linear(attention.query, resid, heads), dim=-1)
        k = nn.functional.normalize(linear(attention.key, resid, heads), dim=-1)
        assert off(cache[f"q.{layer}"], q) < ROUNDING and off(cache[f"k.{layer}"], k) < ROUNDING
        assert off(z, torch.einsum("bhqk,bkhd->bqhd", pattern, v)) < ROUNDING


def test_a_projection_beside_the_attention_is_in_the_one_shifted_window_too() -> None:
    """4 × 4 positions of the second stage fill one window, shifted by 2 × 2 in its second block."""
    torch.manual_seed(0)
    config = transformers.MaskFormerSwinConfig(
        image_size=16,
        patch_size=2,
        window_size=WINDOW,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
    )
    model = Model(randomised(transformers.MaskFormerSwinModel(config)), id="beside")
    cache = seen_whole(model, 16)
    for layer, side in enumerate((8, 8, 4, 4)):
        shift = (0, 2)[layer % 2]
        seen = (cache[f"pattern.{layer}"] > UNSEEN).all((0, 1))
        assert torch.equal(seen, together(side, shift))
    edits = [Edit.zero("attn_out.3", positions=[5])]
    rerun = model.run(images(16), edits=edits, capture=["resid_pre", "resid_mid"])
    same = rerun.cache["resid_mid.3"] == rerun.cache["resid_pre.3"]
    assert torch.equal(same.all(-1)[0], torch.arange(16) == 5)


def test_blocks_in_a_sequential_are_a_stack() -> None:
    torch.manual_seed(0)
    config = transformers.MgpstrConfig(
        image_size=[8, 16],
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_token_length=5,
        num_character_labels=7,
        num_bpe_labels=8,
        num_wordpiece_labels=9,
    )
    module = randomised(transformers.MgpstrForSceneTextRecognition(config))
    model = Model(module, id="sequential")
    assert model.spec.stack == "mgp_str.encoder.blocks" and model.n_layers == 4
    assert isinstance(module.mgp_str.encoder.blocks, nn.Sequential)
    assert not set(model.spec.refused) - model.spec.absent
    pixels = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    cache = model.run(Batch({"pixel_values": pixels}), capture=["pattern", "resid_post"]).cache
    with torch.no_grad():
        own = module(pixels, output_attentions=True, output_hidden_states=True)
    for layer in range(4):
        assert off(cache[f"pattern.{layer}"], own.attentions[layer]) < ROUNDING
        assert off(cache[f"resid_post.{layer}"], own.hidden_states[layer + 1]) < ROUNDING


def channels_first(side: int, width: int = 32, **options: Any) -> Model:
    """Four blocks of [batch, channels, height, width]; all but the last attend in windows of 4 × 4 patches."""
    torch.manual_seed(0)
    config = transformers.VitDetConfig(
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=side,
        pretrain_image_size=side,
        patch_size=4,
        window_size=WINDOW,
        window_block_indices=[0, 1, 2],
        **options,
    )
    return Model(randomised(transformers.VitDetModel(config)), id="channels first")


@pytest.mark.parametrize(
    ("side", "width"),
    [(32, 32), (24, 32), (64, 16)],
    ids=["windows", "padded", "as many columns as channels"],
)
def test_streams_with_channels_before_rows_and_columns(side: int, width: int) -> None:
    model, n = channels_first(side, width), side // 4
    spec = model.spec
    assert spec.hidden_axes == ("batch", "d_model", "height", "width")
    assert (spec.d_model, spec.n_heads) == (width, 4)
    cache = seen_whole(model, side)
    with torch.no_grad():
        states = model.module(**images(side).inputs, output_hidden_states=True).hidden_states
    for layer in range(4):
        resid, pattern = cache[f"resid_pre.{layer}"], cache[f"pattern.{layer}"]
        assert torch.equal(resid, states[layer].flatten(2).mT)
        block: Any = model.blocks[layer]
        with torch.no_grad():
            q, k, v = block.attention.qkv(block.norm1(resid)).unflatten(-1, (3, 4, -1)).unbind(2)
        assert off(cache[f"v.{layer}"][:, : n * n], v) < ROUNDING
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / (width / 4) ** 0.5
        if layer == 3:
            assert off(pattern, scores.softmax(-1)) < ROUNDING
        elif side % (4 * WINDOW) == 0:
            hidden = ~together(n, 0)
            assert off(pattern, scores.masked_fill(hidden, -torch.inf).softmax(-1)) < ROUNDING


def test_edits_and_replays_of_channels_first_streams() -> None:
    model, batch = channels_first(32, residual_block_indices=[2]), images(32)
    run = model.run(batch, capture=["resid_pre", "resid_post"])
    edit = Edit.zero("resid_post.1", positions=[9])
    rerun = model.run(batch, edits=[edit], capture=["resid_pre"])
    changed = (rerun.cache["resid_pre.2"] != run.cache["resid_pre.2"]).any(-1)
    assert torch.equal(changed, (torch.arange(64) == 9).expand(2, 64))
    (replayed,) = model.replay(run, [[edit]], lambda variant: variant.logits)
    assert rerun.logits is not None and off(replayed, rerun.logits) < ROUNDING


def test_convolutions_are_refused_with_what_they_lack() -> None:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 2], num_stages=2)
    with pytest.raises(Refused, match=r"no softmax attention.* of shape \(2, 8, 28, 28\)"):
        Model(transformers.ConvNextModel(config).eval(), id="convolutions")


def test_patches_that_are_cut_already() -> None:
    """Images of 2 × 3 and 4 × 2 patches: the first has two positions of padding, which no query sees."""
    torch.manual_seed(0)
    config = transformers.Siglip2VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        patch_size=4,
        num_patches=16,
    )
    module = randomised(transformers.Siglip2VisionModel(config))
    assert random_images(module)["pixel_values"].shape == (2, 16, 48)
    model = Model(module, id="patches")
    assert not set(model.spec.refused) - model.spec.absent
    inputs = {
        "pixel_values": torch.randn(2, 8, 48, generator=torch.Generator().manual_seed(0)),
        "spatial_shapes": torch.tensor([[2, 3], [4, 2]]),
        "pixel_attention_mask": torch.tensor([[1] * 6 + [0] * 2, [1] * 8]),
    }
    cache = model.run(inputs, capture=["pattern"]).cache
    module.set_attn_implementation("eager")
    with torch.no_grad():
        own = module(**inputs, output_attentions=True).attentions
    for layer in range(4):
        assert off(cache[f"pattern.{layer}"], own[layer]) < ROUNDING
        assert not cache[f"pattern.{layer}"][0, :, :, 6:].any()


def test_images_of_no_given_size_are_as_large_as_the_model_needs() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 100)
            self.config = transformers.PreTrainedConfig()

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.convolution(pixel_values)

    assert random_images(Picky())["pixel_values"].shape == (2, 3, 128, 128)


def detector(name: str) -> Model:
    """A tiny detector of objects: a convolutional backbone, two encoder layers, two decoder layers of 6 queries."""
    torch.manual_seed(0)
    stem = {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "embedding_size": 8}
    config = getattr(transformers, f"{name}Config")(
        use_timm_backbone=False,
        backbone_config=transformers.ResNetConfig(**stem, out_features=["stage4"]),
        d_model=32,
        hidden_size=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=6,
        num_feature_levels=1,
    )
    module = randomised(getattr(transformers, f"{name}Model")(config))
    model = Model(module, id=name)
    assert "decoder.layers" in model.spec.stack
    assert not set(model.spec.refused) - model.spec.absent
    return model


def test_projections_beside_the_attention_to_a_source_tell_it_from_the_other() -> None:
    """Queries and keys of both attentions are projected outside of the modules that attend."""
    model = detector("DabDetr")
    cache = model.run(images(96), capture=["pattern", "cross_pattern", "cross_k"]).cache
    model.module.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        own = model.module(**images(96).inputs, output_attentions=True)
    for layer in range(2):
        assert off(cache[f"pattern.{layer}"], own.decoder_attentions[layer]) < ROUNDING
        assert off(cache[f"cross_pattern.{layer}"], own.cross_attentions[layer]) < ROUNDING
        assert cache[f"cross_k.{layer}"].shape[-1] == 16  # content and place, 8 each


def test_a_norm_before_what_else_a_block_reads_of_an_image() -> None:
    """resid_mid = norm(norm(resid_pre + attention) + what is sampled of the image), no attention to a source."""
    model = detector("DeformableDetr")
    block: Any = model.blocks[1]
    returned: list[Tensor] = []
    hook = block.encoder_attn.register_forward_hook(lambda m, a, out: returned.append(out[0]))
    names = ["resid_pre", "attn_write", "resid_mid", "mlp_write", "resid_post"]
    cache = model.run(images(96), capture=names).cache
    hook.remove()
    pre, write, mid, mlp, post = (cache[f"{name}.1"] for name in names)
    with torch.no_grad():
        first = block.self_attn_layer_norm(pre + write)
        assert off(mid, block.encoder_attn_layer_norm(first + returned[0])) < ROUNDING
        assert off(post, block.final_layer_norm(mid + mlp)) < ROUNDING
    assert model.spec.blocks[1].cross is None


def test_stages_whose_blocks_are_of_two_classes_are_one_model() -> None:
    """The last block of a stage but one attends with every second row and column; an activation stands before W_O."""
    torch.manual_seed(0)
    config = transformers.LevitConfig(
        image_size=64,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 3, 4],
        key_dim=[8, 8, 8],
        depths=[1, 1, 1],
    )
    module = transformers.LevitModel(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():  # patterns and activations far from trivial
            parameter.add_(0.2 * torch.randn_like(parameter))
    model = Model(module, id="stages")
    stack = ", ".join(f"encoder.stages.{i}.layers" for i in range(3))
    assert model.spec.stack == stack
    attends = model.spec.attention_layers
    assert [model.spec.blocks[i].n_heads for i in attends] == [2, 2, 3, 3, 4]
    assert {model.spec.blocks[i].between for i in attends} <= {"function", ""}
    cache = model.run(images(64), capture=["pattern", "v", "z", "resid_pre"]).cache
    for i, n_queries, n_keys in zip(attends, (16, 4, 4, 1, 1), (16, 16, 4, 4, 1), strict=True):
        pattern = cache[f"pattern.{i}"]
        assert pattern.shape[2:] == (n_queries, n_keys)
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, cache[f"v.{i}"])
        assert off(cache[f"z.{i}"], z) < ROUNDING
    with torch.no_grad():
        block: Any = model.blocks[attends[0]].module
        attend = block.activation(cache[f"z.{attends[0]}"].flatten(2))
        post = cache[f"resid_pre.{attends[0]}"] + block.projection(attend)
    assert off(cache[f"resid_pre.{attends[0] + 1}"], post) < ROUNDING


def test_stages_that_keep_their_blocks_in_a_sequential() -> None:
    """Two stages of an image; keys and values of every second row and column, products written as einsum."""
    torch.manual_seed(0)
    config = transformers.CvtConfig(
        patch_sizes=[7, 3],
        patch_stride=[4, 2],
        patch_padding=[2, 1],
        embed_dim=[16, 24],
        num_heads=[2, 3],
        depth=[1, 2],
        mlp_ratio=[2.0, 2.0],
        attention_drop_rate=[0.0, 0.0],
        drop_rate=[0.0, 0.0],
        drop_path_rate=[0.0, 0.1],
        qkv_bias=[True, True],
        cls_token=[False, True],
        qkv_projection_method=["dw_bn", "dw_bn"],
        kernel_qkv=[3, 3],
        padding_kv=[1, 1],
        stride_kv=[2, 2],
        padding_q=[1, 1],
        stride_q=[1, 1],
    )
    model = Model(randomised(transformers.CvtModel(config)), id="sequential stages")
    assert model.spec.stack == "encoder.stages.0.layers, encoder.stages.1.layers"
    assert [block.n_heads for block in model.spec.blocks] == [2, 3, 3]
    assert not set(model.spec.refused) - model.spec.absent
    cache = model.run(images(32), capture=["q", "k", "v", "pattern", "z", "resid_post"]).cache
    for layer, (n, n_keys, width) in enumerate([(64, 16, 16), (17, 5, 24), (17, 5, 24)]):
        q, k = (cache[f"{name}.{layer}"] for name in ("q", "k"))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * width**-0.5  # the model's scale
        assert cache[f"pattern.{layer}"].shape[2:] == (n, n_keys)
        assert off(cache[f"pattern.{layer}"], scores.softmax(-1)) < ROUNDING
        z = torch.einsum("bhqk,bkhd->bqhd", cache[f"pattern.{layer}"], cache[f"v.{layer}"])
        assert off(cache[f"z.{layer}"], z) < ROUNDING
    with torch.no_grad():
        last = model.module(**images(32).inputs).last_hidden_state
    assert off(cache["resid_post.2"][:, 1:], last.flatten(2).mT) < ROUNDING


def test_parts_that_are_named_read_what_a_model_reads() -> None:
    """Their encoders are models too, of hidden states: no one could run them on an image."""
    wanted = r"part of the model: `model.encoder.patch_encoder.model` or `model.encoder.image_encoder.model`; or"
    with pytest.raises(Refused, match=wanted):
        Model(tiny_model("depth_pro", "DepthProModel", random_images), id="parts")


def test_patches_that_are_told_their_places_may_come_in_any_order() -> None:
    """Gemma 4's tower reads cut patches and the column and row of each: moved with them, all sites move along."""
    module = tiny_model(
        "gemma4_vision", "Gemma4VisionModel", lambda module: module(**random_images(module))
    )
    model = Model(module, id="told places")
    assert not set(model.spec.refused) - model.spec.absent
    inputs = random_images(module)
    order = torch.randperm(inputs[PLACES].shape[1], generator=torch.Generator().manual_seed(0))
    assert not torch.equal(inputs[PLACES][:, order], inputs[PLACES])
    plain = model.run(inputs, capture=["resid_post", "pattern"])
    sites = ["resid_post", "pattern"]
    moved = model.run({name: x[:, order] for name, x in inputs.items()}, capture=sites)
    for layer in range(model.n_layers):
        resid, pattern = (plain.cache[f"{site}.{layer}"] for site in ("resid_post", "pattern"))
        assert off(moved.cache[f"resid_post.{layer}"], resid[:, order]) < ROUNDING
        assert off(moved.cache[f"pattern.{layer}"], pattern[:, :, order][..., order]) < ROUNDING
    assert plain.logits is not None and moved.logits is not None
    assert off(moved.logits, plain.logits) < ROUNDING  # pooled by place
    apart = model.run({"pixel_values": inputs["pixel_values"][:, order], PLACES: inputs[PLACES]})
    assert apart.logits is not None and off(apart.logits, plain.logits) > 0.01


def test_numbers_of_a_task_beside_the_image_are_as_many_as_the_config_says() -> None:
    module: Any = tiny_model("oneformer", "OneFormerModel", probe_batch)
    model = Model(module, id="task")
    assert not set(model.spec.refused) - model.spec.absent
    inputs = probe_batch(module).inputs
    assert inputs["task_inputs"].shape[1] == module.config.task_seq_len
