"""Models that several test files use. Nothing here needs a network (see the conftest.py above)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import interp
from interp.models.model import Model


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """Two threads for the default model; in tiny ones they would only wait for each other."""
    torch.set_num_threads(2 if "smollm" in request.fixturenames else 1)


@pytest.fixture
def tiny(tiny_model: Callable[..., Model]) -> Model:
    """A fresh tiny random Llama (2 layers, 4 heads, 2 kv heads, d_model 32, 97 tokens)."""
    return tiny_model()


@pytest.fixture(scope="session")
def smollm() -> Model:
    """The embedded default model."""
    return interp.load("smollm2-135m")
