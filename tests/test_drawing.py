"""Models that draw random numbers in every forward: their generator is put back before each run."""

from typing import Any

import pytest
import torch
import transformers

from interp.models.calls import drawing
from interp.models.model import Model
from interp.run.edits import Edit

PIXELS = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


@pytest.fixture(scope="module")
def masked() -> Model:
    """An autoencoder that sees a random quarter of each image's patches."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.ViTMAEConfig(
        **sizes, num_hidden_layers=2, image_size=32, patch_size=4, mask_ratio=0.75
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(transformers.ViTMAEModel(config).eval(), None, "masked")


def test_what_it_returns_without_us_differs_from_call_to_call(masked: Model) -> None:
    calls = [masked.module(**PIXELS).last_hidden_state for _ in range(2)]
    assert not torch.allclose(*calls, atol=1e-3)


def test_it_verifies_in_full_and_says_what_is_held(masked: Model) -> None:
    assert not masked.spec.refused and all(check.passed for check in masked.spec.checks)
    assert any("seed 0" in note for note in masked.notes)


def test_two_runs_are_the_same_and_an_empty_edit_changes_no_bit(masked: Model) -> None:
    run = masked.run(PIXELS, capture=["resid_pre"])
    again = masked.run(PIXELS, capture=["resid_pre"], edits=[Edit.zero("z", heads=[])])
    for name in ("resid_pre.0", "resid_pre.1"):
        assert torch.equal(run.cache[name], again.cache[name])
    assert run.cache["resid_pre"].shape == (
        2,
        17,
        2,
        32,
    )  # by layer: a class token and 16 of 64 patches


def test_a_replay_of_an_edit_equals_a_run_with_it(masked: Model) -> None:
    """Also of the first layer, and of several variants at once: the patches are those of the run."""
    run = masked.run(PIXELS, capture=["resid_pre"])
    edits = [Edit.zero("z", heads=[(layer, 1)]) for layer in (0, 1)]
    for edit, got in zip(
        edits, masked.replay(run, [[e] for e in edits], lambda v: v.logits), strict=True
    ):
        torch.testing.assert_close(
            got, masked.run(PIXELS, edits=[edit]).logits, rtol=1e-4, atol=1e-5
        )


def test_the_generator_of_the_caller_is_left_alone(masked: Model) -> None:
    state = torch.get_rng_state()
    masked.run(PIXELS)
    assert torch.equal(torch.get_rng_state(), state)


def test_masks_of_ones_own_are_kept(masked: Model) -> None:
    """Given `noise`, the model draws nothing: other patches, and the same as without us."""
    noise = torch.rand(2, 64, generator=torch.Generator().manual_seed(3))
    given: dict[str, Any] = {**PIXELS, "noise": noise}
    run = masked.run(given, capture=["resid_pre.0"])
    assert torch.equal(run.logits, masked.module(**given).last_hidden_state)
    other = masked.run(PIXELS, capture=["resid_pre.0"])
    assert not torch.allclose(run.cache["resid_pre.0"], other.cache["resid_pre.0"])


def test_what_draws_little_is_found_too() -> None:
    """Noise of a thousandth, which no identity notices: two runs are the same bit for bit all the same."""
    from tests.families import FAMILIES

    module = FAMILIES["gpt2"]()
    module.transformer.wte.register_forward_hook(
        lambda wte, args, out: out + 1e-6 * torch.randn_like(out)
    )
    model, ids = Model(module), torch.tensor([[5, 6, 7]])
    assert "seed 0" in " ".join(model.notes)
    assert torch.equal(model.run(ids).logits, model.run(ids).logits)


def test_a_model_that_draws_nothing_is_called_as_it_is(tiny_model: Any) -> None:
    model = tiny_model()
    assert model.module not in drawing and not model.notes
