"""A video model whose last blocks run once a frame (VidEoMT) is seen on clips of one frame, and refused on others.

Tolerance: float32, three blocks deep.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from benchmarks.architectures import runs
from benchmarks.tiny_configs import tiny_model
from interp.errors import Refused
from interp.models.frames import require_one_frame
from interp.models.inputs import numbers_taken
from interp.models.model import Model
from interp.models.probe import probe_batch
from interp.run.batch import Batch
from interp.run.cache import Run
from interp.run.edits import Edit
from interp.run.statistics import Mass
from interp.sites import AXES

ROUNDING = 1e-5
VIDEOS = "pixel_values_videos"


@cache
def model() -> Model:
    made = tiny_model("videomt", "VideomtForUniversalSegmentation", partial(runs, strict=True))
    return Model(made, id="videomt")


def clips(frames: int, rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(frames)
    return {VIDEOS: torch.randn(rows, frames, 3, 32, 32, generator=generator)}


def sites() -> list[str]:
    return [site for site in AXES if model().layers_with(site)]


def own(given: dict[str, Tensor]) -> tuple[Tensor, dict[int, list[Tensor]]]:
    """The model's own last hidden state, and what each block returned, call by call."""
    kept: dict[int, list[Tensor]] = {}
    blocks = list(model().module.get_submodule("layers").children())
    hooks = [
        block.register_forward_hook(lambda m, args, out, i=i: kept.setdefault(i, []).append(out))
        for i, block in enumerate(blocks)
    ]
    try:
        return model().module(**given).last_hidden_state, kept
    finally:
        for hook in hooks:
            hook.remove()


def off(got: Tensor | None, wanted: Tensor) -> float:
    assert got is not None and got.shape == wanted.shape
    return float(((got - wanted).abs().max() / wanted.abs().max()).detach())


# --- one frame ------------------------------------------------------------------------------------


def test_one_frame_is_tried_last_and_verifies_in_full() -> None:
    spec = model().spec
    assert not set(spec.refused) - spec.absent
    assert all(check.passed for check in spec.checks)
    assert probe_batch(model().module).inputs[VIDEOS].shape == (2, 1, 3, 32, 32)
    (note,) = (note for note in model().notes if "one frame" in note)
    assert "returns (6, 221, 64) for 2 rows, and calls layers 2 once a frame" in note


def test_a_clip_of_one_frame_is_the_models_own() -> None:
    given = clips(1)
    with torch.no_grad():
        logits, returned = own(given)
    run = model().run(given, capture=sites())
    assert off(run.logits, logits) < ROUNDING
    for layer, (wanted,) in returned.items():
        assert off(run.cache[f"resid_post.{layer}"], wanted) < ROUNDING
    same = [Edit.apply(site, lambda x, seen: x) for site in sites()]
    assert off(model().run(given, edits=same).logits, logits) < ROUNDING


def test_a_replay_of_one_frame_is_a_rerun() -> None:
    clean = model().run(clips(1), capture=["resid_pre"])
    edits = [
        edit
        for layer in range(model().n_layers)
        for edit in (
            Edit.zero("z", heads=[(layer, 1)]),
            Edit.scale(f"mlp_post.{layer}", 0.3),
            Edit.zero(f"pattern.{layer}.1", positions=[0, 2]),
            Edit.scale(f"resid_mid.{layer}", 1.5),
        )
    ]
    replayed = model().replay(clean, [[edit] for edit in edits], lambda run: run.logits)
    assert clean.logits is not None
    for edit, got in zip(edits, replayed, strict=True):
        wanted = model().run(clips(1), edits=[edit]).logits
        assert wanted is not None and off(got, wanted) < ROUNDING, edit.site
        assert off(wanted, clean.logits) > 10 * ROUNDING, f"{edit.site} has no effect"


def test_gradients_of_one_frame_are_the_models_own() -> None:
    logits, returned = own(clips(1))
    run = model().run(clips(1), capture=["resid_post"], grad=True)
    assert run.logits is not None
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(6))
    for layer in range(model().n_layers):
        got = run.gradients((run.logits * weights).sum(), f"resid_post.{layer}")
        (wanted,) = torch.autograd.grad(
            (logits * weights).sum(), returned[layer][0], retain_graph=True
        )
        assert off(got, wanted) < 10 * ROUNDING, layer


# --- more frames ----------------------------------------------------------------------------------


def test_two_frames_are_more_than_the_map_says() -> None:
    """Why they are refused: rows of frames in the first blocks, a call a frame in the last, rows of frames behind."""
    logits, returned = own(clips(2))
    assert [len(calls) for calls in returned.values()] == [1, 1, 2]
    assert returned[0][0].shape[0] == logits.shape[0] == 6
    of_one, _ = own({VIDEOS: clips(2)[VIDEOS][:, 1:]})
    assert off(logits[3:], of_one) > 100 * ROUNDING  # the second frame knows of the first


MASS = Mass(torch.zeros(3, 21, 1, dtype=torch.long), torch.ones(3, 21, dtype=torch.bool))
WITH_TWO: dict[str, Callable[[Model, Batch], object]] = {
    "a plain run": lambda m, two: m.run(two),
    "by name": lambda m, two: m.run(dict(two.inputs)),
    "a capture that stops before the last block": lambda m, two: m.run(
        two, capture=["resid_pre.0"], logits=False
    ),
    "an edit": lambda m, two: m.run(two, edits=[Edit.zero("z.0.1")]),
    "a statistic": lambda m, two: m.run(two, statistics={"first": MASS}),
    "a gradient": lambda m, two: m.run(two, capture=["resid_post.0"], grad=True),
    "a replay": lambda m, two: m.replay(Run(two), [[Edit.zero("z.2.1")]], lambda run: run.logits),
    "hooks": lambda m, two: m.hooked(two, capture=["z"]).__enter__(),
}


@pytest.mark.parametrize("what", WITH_TWO)
def test_two_frames_are_refused(what: str) -> None:
    with pytest.raises(Refused, match=r"has 2 frames.*of one frame alone.*\(6, 221, 64\)"):
        WITH_TWO[what](model(), Batch(clips(2)))


def test_two_frames_are_refused_at_every_site() -> None:
    for site in (f"{name}.{layer}" for name in sites() for layer in model().layers_with(name)):
        with pytest.raises(Refused, match="has 2 frames"):
            model().run(clips(2), capture=[site])
        with pytest.raises(Refused, match="has 2 frames"):
            model().run(clips(2), edits=[Edit.zero(site)])


class Behind(nn.Module):
    """Frames behind channels; one row for each frame."""

    main_input_name = "clips"

    def __init__(self) -> None:
        super().__init__()
        self.config = PreTrainedConfig(image_size=16, num_frames=4)
        self.linear = nn.Linear(16, 16)

    def forward(self, clips: Tensor) -> Tensor:
        assert clips.shape[1] == 3, "channels first"
        return self.linear(clips).transpose(1, 2).flatten(0, 1)


def test_frames_may_lie_behind_channels() -> None:
    module = Behind()
    assert numbers_taken(module, "clips", {})["clips"].shape == (2, 3, 1, 16, 16)
    require_one_frame(module, Batch({"clips": torch.zeros(5, 3, 1, 16, 16)}))
    with pytest.raises(Refused, match=r"has 4 frames.*returns \(8, 3, 16, 16\) for 2 rows"):
        require_one_frame(module, Batch({"clips": torch.zeros(5, 3, 4, 16, 16)}))
