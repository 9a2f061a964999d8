"""The smallest sum: what was added is found in every dtype, what was not is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from interp.models.solve import smallest_sum

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
