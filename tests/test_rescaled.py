"""Sums with numbers a channel: which of many candidates make them, and which are tried at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interp.models import rescaled
from interp.models.rescaled import fitted_channels

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
