"""Models opened on an example of their inputs: what is no tensor is copied for every forward, and stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

import interp
from benchmarks.sessions import example_of
from interp import Edit, Model
from interp.errors import BadInput, Refused
from interp.models.calls import call_model, output_tensor
from interp.models.examples import all_in_float64
from interp.models.kernels import in_float64
from interp.run.batch import Batch
from interp.run.cache import Run

SIDE, LAST = 64, 2
MEMORY, DECODER, IMAGE = (
    "memory_attention.layers",
    "mask_decoder.transformer.layers",
    "vision_encoder",
)


@cache
def tracker() -> nn.Module:
    """A tracker of objects in videos: 128 wide, since its memories of 64 have to be narrower."""
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=16,
        num_attention_heads=1,
        image_size=[SIDE, SIDE],
        blocks_per_stage=[1, 1, 2, 2],
        embed_dim_per_stage=[16, 32, 48, 64],
        num_attention_heads_per_stage=[1, 2, 4, 4],
        window_size_per_stage=[4, 2, 4, 2],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    )
    config = transformers.Sam2VideoConfig(
        vision_config=transformers.Sam2VisionConfig(
            backbone_config=backbone,
            backbone_channel_list=[64, 48, 32, 16],
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
            fpn_hidden_size=128,
        ),
        prompt_encoder_config={"hidden_size": 128, "image_size": SIDE, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 128, "mlp_dim": 48, "num_attention_heads": 4},
        image_size=SIDE,
        memory_attention_hidden_size=128,
        memory_attention_num_layers=2,
        memory_attention_feed_forward_hidden_size=48,
        memory_attention_rope_feat_sizes=[4, 4],
        memory_encoder_hidden_size=128,
        mask_downsampler_embed_dim=128,
        memory_fuser_embed_dim=128,
        memory_fuser_intermediate_dim=48,
        memory_fuser_num_layers=1,
    )
    torch.manual_seed(0)
    module = transformers.Sam2VideoModel(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim < 2:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(
                    (0.2 if parameter.ndim < 4 else 2 / parameter[0].numel() ** 0.5) * noise
                )
        module.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(9.0)  # the object is in sight
    return module


def session(n_objects: int = 1, tracked: int = LAST) -> Sam2VideoInferenceSession:
    """A session in which the first frames were tracked, after a mask of each object on the first of them."""
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(LAST + 1, 3, SIDE, SIDE, generator=generator)
    made = Sam2VideoInferenceSession(video, SIDE, SIDE, dtype=torch.float32)
    for number in range(n_objects):
        mask = (torch.rand(1, 1, SIDE, SIDE, generator=generator) < 0.5).float()
        made.add_mask_inputs(made.obj_id_to_idx(number), 0, mask)
        made.obj_with_new_inputs.append(number)
    for frame in range(tracked):
        tracker()(made, frame_idx=frame)
    return made


@cache
def example() -> dict[str, Any]:
    return {"inference_session": session(), "frame_idx": LAST}


@cache
def opened(stack: str) -> Model:
    return interp.load(tracker(), stack=stack, example=example())


def logits(run: Run) -> Tensor:
    assert run.logits is not None
    return run.logits


def tensors(x: Any) -> Iterator[Tensor]:
    """All tensors in an object, in order."""
    if isinstance(x, Tensor):
        yield x
        return
    inside = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else []
    for part in vars(x).values() if hasattr(x, "__dict__") else inside:
        yield from tensors(part)


@pytest.mark.parametrize("stack", [MEMORY, DECODER, IMAGE])
def test_every_stack_of_a_tracker_is_verified(stack: str) -> None:
    model = opened(stack)
    assert sum(parameter.numel() for parameter in model.module.parameters()) < 3_000_000
    assert model.spec.checks and all(check.passed for check in model.spec.checks)
    assert not {site for site in model.spec.refused if site not in model.spec.absent}
    assert len(model.spec.attention_layers) == model.n_layers


def test_heads_of_the_attention_to_memories_make_what_it_writes() -> None:
    model = opened(MEMORY)
    sites = ["z", "attn_out", "cross_z", "cross_out", "pattern", "cross_pattern"]
    run = model.run(example(), capture=sites)
    with torch.no_grad():
        plain = output_tensor(tracker()(**copy.deepcopy(example())))
    torch.testing.assert_close(run.logits, plain, rtol=0, atol=2e-4 * float(plain.abs().max()))
    for layer in range(model.n_layers):
        for z, out, cross in (("z", "attn_out", 0), ("cross_z", "cross_out", 1)):
            heads = torch.einsum(
                "bphd,hdm->bpm", run.cache[f"{z}.{layer}"], model.W_O(layer, cross=cross)
            )
            made = heads + model.b_O(layer, cross=cross)
            torch.testing.assert_close(made, run.cache[f"{out}.{layer}"], rtol=1e-4, atol=1e-5)
    # Two memories of 4 × 4 places, and two pointers to the object, each of two vectors.
    assert run.cache["cross_pattern"].shape == (1, 2, 1, 16, 2 * 16 + 2 * 2)
    for site in ("pattern", "cross_pattern"):
        rows = run.cache[site].sum(-1)
        torch.testing.assert_close(rows, torch.ones_like(rows))


def test_an_edit_is_what_a_hook_of_ones_own_does() -> None:
    model = opened(MEMORY)
    edited = logits(model.run(example(), edits=[Edit.zero("cross_out.1")]))
    module: Any = tracker()
    hook = module.memory_attention.layers[1].cross_attn_image.register_forward_hook(
        lambda attention, args, output: (torch.zeros_like(output[0]), *output[1:])
    )
    try:
        with torch.no_grad():
            wanted = output_tensor(module(**copy.deepcopy(example())))
    finally:
        hook.remove()
    assert torch.equal(edited, wanted)
    assert not torch.equal(edited, logits(model.run(example())))


def test_the_session_stays_as_it_was_and_runs_are_equal() -> None:
    model, given = opened(MEMORY), session()
    before = copy.deepcopy(given)
    inputs = {"inference_session": given, "frame_idx": LAST}
    first = model.run(inputs, capture=["resid_pre"], edits=[Edit.zero("attn_out.0")])
    clean = model.run(inputs, capture=["resid_pre"])
    again = model.run(clean.batch, capture=["resid_pre"])
    assert torch.equal(logits(clean), logits(again))
    assert not torch.equal(logits(first), logits(clean))
    assert given.output_dict_per_obj[0].keys() == before.output_dict_per_obj[0].keys()
    assert list(given.frames_tracked_per_obj[0]) == list(before.frames_tracked_per_obj[0]) == [1]
    pairs = list(zip(tensors(given), tensors(before), strict=True))
    assert pairs and all(torch.equal(a, b) for a, b in pairs)
    tracker()(given, frame_idx=LAST)  # and another state afterwards is no run's
    assert torch.equal(logits(model.run(clean.batch)), logits(clean))


def test_a_replay_is_a_run() -> None:
    model = opened(MEMORY)
    clean = model.run(example(), capture=["resid_pre"])
    variants = [[Edit.zero("cross_z", heads=[(layer, 0)])] for layer in range(model.n_layers)]
    replayed = model.replay(clean, variants, logits)
    for variant, got in zip(variants, replayed, strict=True):
        torch.testing.assert_close(got, logits(model.run(example(), edits=variant)))


def test_several_objects_and_first_frames_are_refused_where_layers_are_called_otherwise() -> None:
    two = {"inference_session": session(n_objects=2), "frame_idx": LAST}
    asked: dict[str, Any]
    for stack in (MEMORY, DECODER):
        for asked in ({"capture": ["z"]}, {"edits": [Edit.zero("attn_out")]}):
            with pytest.raises(Refused, match="is called more often than on the probe"):
                opened(stack).run(two, **asked)
    first = {"inference_session": session(tracked=0), "frame_idx": 0}
    for asked in ({"capture": ["resid_post.1"]}, {"edits": [Edit.zero("z")]}):
        with pytest.raises(Refused, match="is not called on these inputs"):
            opened(MEMORY).run(first, **asked)
    assert opened(DECODER).run(first, capture=["z"]).cache["z"].shape[0] == 1


def test_what_an_example_does_not_serve_is_refused() -> None:
    module, given = tracker(), session()
    with pytest.raises(Refused, match=r"example=\{'inference_session': …\}"):
        interp.load(module)
    with pytest.raises(BadInput, match=r"fails on the example .*: KeyError: 99"):
        interp.load(module, example={"inference_session": given, "frame_idx": 99})
    with pytest.raises(BadInput, match="no inputs were given"):
        interp.load(module, example={})
    model = opened(MEMORY)
    with pytest.raises(BadInput, match=r"'frame_id'; did you mean 'frame_idx'\?"):
        model.run({"inference_session": given, "frame_id": LAST})
    with pytest.raises(BadInput, match="KeyError: 99; it works on the example"):
        model.run({"inference_session": given, "frame_idx": 99})
    with pytest.raises(BadInput, match="reads 'inference_session' and was given text"):
        model.run("a cat")
    with pytest.raises(Refused, match="inference_mode"):
        model.run(example(), capture=["z"], grad=True)
    with pytest.raises(BadInput, match="is no tensor, was asked for 2 copies"):
        model.run(example()).batch.repeat(2)
    with pytest.raises(BadInput, match="'frame_idx' is a int"):  # of a model without an example
        Batch.of_inputs({"frame_idx": LAST})  # type: ignore


class Held(nn.Module):
    """The state of a session that is no leaf of a graph: it cannot be copied."""

    x = torch.ones(2, requires_grad=True) * 2


def test_what_cannot_be_copied_is_named() -> None:
    given = Held()
    given.held = Held.x
    with pytest.raises(
        BadInput, match=r"'inference_session' is a Held that cannot be copied.*no_grad"
    ):
        interp.load(tracker(), example={"inference_session": given, "frame_idx": LAST})


class Kept:
    """What a forward may take: tensors wherever they are, and a dtype."""

    def __init__(self, x: Any = None) -> None:
        self.x, self.held = torch.ones(2), {"a": [torch.arange(3), x]}
        self.dtype, self.whole = torch.float32, torch.int64


def test_an_object_has_a_copy_in_float64() -> None:
    kept = Kept(torch.zeros(2, dtype=torch.bfloat16))
    made = all_in_float64("kept", kept)
    assert [x.dtype for x in tensors(made)] == [torch.float64, torch.int64, torch.float64]
    assert (made.dtype, made.whole) == (torch.float64, torch.int64)
    assert [x.dtype for x in tensors(kept)] == [torch.float32, torch.int64, torch.bfloat16]
    exact, batch = in_float64(tracker(), opened(MEMORY).probed)
    assert output_tensor(call_model(exact, batch)).dtype == torch.float64
    with pytest.raises(BadInput, match="'kept' is a Kept of which no copy in float64 can be made"):
        all_in_float64("kept", Kept(lambda: None))


def test_the_sweep_makes_a_session_of_what_the_signature_says(
    tiny_model: Callable[..., Model],
) -> None:
    made = example_of(tracker())
    assert made is not None and made["frame_idx"] == 2
    assert list(made["inference_session"].frames_tracked_per_obj[0]) == [1]
    assert all(check.passed for check in Model(tracker(), example=made).spec.checks)
    assert example_of(tiny_model().module) is None


def test_of_an_example_of_one_row_more_rows_are_refused(tiny_model: Callable[..., Model]) -> None:
    module = tiny_model().module
    ids = torch.tensor([[5, 6, 7, 8, 9, 3]])
    one = interp.load(module, example={"input_ids": ids})
    assert all(check.passed for check in one.spec.checks) and one.spec.together
    assert torch.equal(logits(one.run(ids)), output_tensor(call_model(module, Batch.of_ids(ids))))
    with pytest.raises(Refused, match="example of one row and is given 2"):
        one.run(ids.repeat(2, 1))
    two = interp.load(module, example={"input_ids": torch.cat([ids, ids.flip(1)])})
    assert not two.spec.together and len(logits(two.run(ids.repeat(3, 1)))) == 3
