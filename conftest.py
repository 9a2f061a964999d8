"""What every test and doctest shares: no network, two threads, one tiny random model."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is first imported


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """tiny_model(seed=0): a random Llama as an interp.Model, without a tokenizer.

    2 layers, 4 heads in 2 kv groups, d_model 32, 97 tokens. Gains are not 1 and weights are wide
    enough that patterns are far from uniform, so that a forgotten gain or a swapped head shows.
    """

    def make(seed: int = 0, **config: Any) -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from interp.models.model import Model

        shape = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 97,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = LlamaForCausalLM(LlamaConfig(**{**shape, **config}))
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        return Model(module, id="tiny")

    return make


@pytest.fixture(autouse=True, scope="session")
def _session(doctest_namespace: dict[str, Any], tiny_model: Callable[..., Any]) -> None:
    import numpy as np
    import torch

    torch.set_num_threads(2)
    doctest_namespace.update(torch=torch, np=np, tiny_model=tiny_model)
