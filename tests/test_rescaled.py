"""Sums with numbers a channel: which of many candidates make them, and which are tried at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interp.errors import Refused
from interp.models import rescaled
from interp.models.model import Model
from interp.models.other_inputs import fitted
from interp.models.rescaled import fitted_channels
from tests.families import FAMILIES

WIDTH, POSITIONS, MANY = 24, 60, 12


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("dtype", "larger"), [(torch.float32, 1.0), (torch.float32, 30.0), (torch.bfloat16, 1.0)]
)
def test_two_of_many_are_found_with_the_numbers_that_they_were_added_with(
    dtype: torch.dtype, larger: float
) -> None:
    """Also where what is added is far larger than the sum, which keeps its roundings."""
    base = drawn(2, POSITIONS, WIDTH, seed=0)
    values = [drawn(2, POSITIONS, WIDTH, seed=1 + i) for i in range(MANY)]
    values[7] = larger * values[7]
    values[3] = drawn(2, POSITIONS, WIDTH, seed=99) - values[7]
    base, values = base.to(dtype), [value.to(dtype) for value in values]
    carry = (1 + 0.3 * drawn(WIDTH, seed=50)).to(dtype)
    target = carry * base + values[3] + values[7]
    found = fitted_channels(base, target, values, dtype)
    assert found is not None
    index, made, gains = found
    assert index == (3, 7) and gains == [None, None] and made.shift is None
    assert isinstance(made.factor, Tensor)
    near = 64 * torch.finfo(dtype).eps * larger
    torch.testing.assert_close(made.factor, carry, rtol=near, atol=near)


def test_where_nothing_fits_hardly_any_is_tried_in_every_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[Any] = []
    fit = rescaled._fit
    monkeypatch.setattr(rescaled, "_fit", lambda *given: tried.append(given) or fit(*given))
    base, *values = (drawn(2, POSITIONS, WIDTH, seed=i) for i in range(1 + MANY))
    assert fitted_channels(base, drawn(2, POSITIONS, WIDTH, seed=77), values, base.dtype) is None
    assert not tried


# --- numbers that hold on other inputs -------------------------------------------------------------------

IDS = torch.tensor([[5, 6, 7, 8, 9]])
OPENED = 1 + 0.3 * drawn(32, seed=3)


def gated_forward(
    block: Any, gate: Callable[[Tensor], Tensor], x: Tensor, **options: Any
) -> Tensor:
    """A Llama block whose MLP is multiplied channel by channel before it is added."""
    x = x + block.self_attn(block.input_layernorm(x), **options)[0]
    return x + gate(x) * block.mlp(block.post_attention_layernorm(x))


def gated_model(tiny_model: Callable[[], Model], gate: Callable[[Tensor], Tensor]) -> Model:
    module: nn.Module = tiny_model().module
    for block in module.model.layers:  # type: ignore[union-attr]
        block.forward = partial(gated_forward, block, gate)
    return Model(module)


def test_numbers_a_channel_that_hold_on_other_inputs_are_the_blocks_own(tiny_model) -> None:
    model = gated_model(tiny_model, lambda x: OPENED)
    run = model.run(IDS, capture=["mlp_write.0", "mlp_out.0", "resid_mid.0", "resid_post.0"])
    wrote = run.cache["mlp_write.0"]
    torch.testing.assert_close(wrote, OPENED * run.cache["mlp_out.0"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run.cache["resid_mid.0"] + wrote, run.cache["resid_post.0"])


def test_numbers_a_channel_that_are_those_of_the_probe_are_refused(tiny_model) -> None:
    """What is multiplied is computed of the batch as a whole: one number a channel on any one input."""
    model = gated_model(tiny_model, lambda x: x.std((0, 1)))
    for site in ("attn_write", "mlp_write", "resid_mid"):
        with pytest.raises(Refused, match="of its parts on the probe do not on other inputs"):
            model.run(IDS, capture=[site])
    run = model.run(IDS, capture=["resid_pre", "resid_post", "z", "mlp_out"])
    assert torch.equal(run.logits, model.module(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["doge", "muse_spark", "zaya"])
def test_blocks_that_rescale_hold_on_other_inputs_in_any_type(family: str, dtype) -> None:
    """Zaya keeps its stream in float32, made of weights in bfloat16."""
    spec = Model(FAMILIES[family]().to(dtype)).spec
    assert all(map(fitted, spec.blocks))
    assert not {"attn_write", "mlp_write", "resid_mid"} & {s.split(".")[0] for s in spec.refused}
