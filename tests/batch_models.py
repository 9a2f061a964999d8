"""Tiny checkpoints on disk, as a series that a plan reads, and the analyses of `batch_probe` while a test runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from interp.registry import ANALYSES

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 31,
    "max_position_embeddings": 32,
}


def save_series(folder: Path, n: int) -> Path:
    """`folder` with step-0, step-1, …: a random Llama each, without a tokenizer."""
    with torch.random.fork_rng(devices=[]):
        for step in range(n):
            torch.manual_seed(step)
            LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder / f"step-{step}")
    return folder


@contextmanager
def registered() -> Iterator[None]:
    """The analyses of `batch_probe`, registered; taken out at the end, as other tests go through all."""
    sys.modules.pop("tests.batch_probe", None)
    import tests.batch_probe

    try:
        yield
    finally:
        for name in tests.batch_probe.NAMES:
            ANALYSES.pop(name)
