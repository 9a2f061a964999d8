"""The smallest sum: what was added is found in every dtype, what was not is not; so are rescalings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from interp.models.rescaled import fitted_channels
from interp.models.solve import rounding, smallest_sum

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def drawn(seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, 7, 64, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_write_beside_a_massive_activation(dtype: torch.dtype) -> None:
    """As in deep models: one entry of the stream is thousands of times larger than what is written elsewhere."""
    pre = drawn(0, dtype)
    pre[:, 0, 3] = 3000
    attention, mlp = drawn(1, dtype, 0.05), drawn(2, dtype, 0.5)
    post = (pre + attention) + mlp
    others = [drawn(seed, dtype) for seed in range(3, 9)]
    found = smallest_sum(pre, post, [others[0], mlp, *others[1:], attention], dtype)
    assert found == [(1, 1.0), (7, 1.0)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_multipliers(dtype: torch.dtype) -> None:
    """The estimate of a multiplier is as good as the mean over 896 roundings."""
    pre, a, b = (drawn(seed, dtype) for seed in range(3))
    post = (pre + a * 0.22) + b * 0.22
    found = smallest_sum(pre, post, [a, b, drawn(3, dtype)], dtype)
    assert found is not None and [i for i, _ in found] == [0, 1]
    for _, scale in found:
        assert scale == pytest.approx(0.22, rel=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_is_not_there(dtype: torch.dtype) -> None:
    pre, a, b, hidden = (drawn(seed, dtype) for seed in range(4))
    assert smallest_sum(pre, (pre + a) + hidden, [a, b], dtype) is None
    assert smallest_sum(pre, pre + a, [], dtype) is None


def test_three_writes_and_no_more() -> None:
    pre, a, b, c, d = (drawn(seed, torch.float32) for seed in range(5))
    found = smallest_sum(pre, pre + a + b + c, [d, c, b, a], torch.float32)
    assert found == [(1, 1.0), (2, 1.0), (3, 1.0)]


def test_two_that_sum_to_a_third() -> None:
    """A module that returns the sum of both writes explains the block by itself."""
    pre, a, b = (drawn(seed, torch.float32) for seed in range(3))
    assert smallest_sum(pre, pre + (a + b), [a, b, a + b], torch.float32) == [(2, 1.0)]


def channels(seed: int, dtype: torch.dtype, mean: float = 1.0) -> Tensor:
    """Numbers a channel [64], none near 0."""
    generator = torch.Generator().manual_seed(seed)
    return (mean + 0.2 * torch.rand(64, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_carry_a_gain_and_a_shift_of_each_channel(dtype: torch.dtype) -> None:
    """Each is found to about the rounding of one addition; what is 1 or nothing is said to be so."""
    pre, a, b = (drawn(seed, dtype) for seed in range(3))
    c, g, shift = (channels(seed, dtype, mean) for seed, mean in ((3, 0.7), (4, 0.5), (5, -0.3)))
    others = [drawn(seed, dtype) for seed in range(6, 9)]
    room = 8 * rounding(dtype)
    for post, gain, moved in (
        (c * pre + a, None, None),
        (c * pre + g * a, g, None),
        (c * pre + a + shift, None, shift),
        (c * pre + g * a + shift, g, shift),
    ):
        index, carry, gains = fitted_channels(pre, post, [*others, a], dtype)
        assert index == (3,)
        torch.testing.assert_close(carry.factor, c, rtol=0, atol=room)
        for found, wanted in ((gains[0], gain), (carry.shift, moved)):
            assert (found is None) == (wanted is None)
            if wanted is not None:
                torch.testing.assert_close(found, wanted, rtol=0, atol=room)
        torch.testing.assert_close(
            carry(pre) + a * (1 if gains[0] is None else gains[0]), post, rtol=0, atol=4 * room
        )
    two, _, gains = fitted_channels(pre, c * pre + a + b, [b, *others, a], dtype)
    assert two == (0, 4) and gains == [None, None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fit_to_a_few_positions_or_of_nothing_is_none(dtype: torch.dtype) -> None:
    """What each channel can be fitted with must leave equations over, and every part must be needed."""
    pre, a, hidden = (drawn(seed, dtype) for seed in range(3))
    c, shift = channels(3, dtype), channels(4, dtype)
    assert fitted_channels(pre, c * pre + a * hidden, [a], dtype) is None
    assert fitted_channels(pre, c * pre + hidden + shift, [a], dtype) is None
    assert (
        fitted_channels(hidden, c * pre + a, [pre, a], dtype) is None
    )  # carries nothing of hidden
    few = [x[:, :2] for x in (pre, c * pre + a * shift, a)]
    assert fitted_channels(few[0], few[1], [few[2]], dtype) is None
