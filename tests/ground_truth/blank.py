"""What the hand-built models begin with: a GPT-2 of zeros, and directions that a LayerNorm lets through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel


def blank_gpt2(**shape: Any) -> GPT2LMHeadModel:
    """A GPT-2 in eval mode, without dropout, whose parameters are all 0 but the norms'."""
    config = GPT2Config(
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        **shape,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" not in name:
                parameter.zero_()
    return model


def slot(start: int, width: int, d_model: int) -> Tensor:
    """[width d_model]: feature i of a slot as a ± pair, whose mean is 0."""
    out = torch.zeros(width, d_model)
    i = torch.arange(width)
    out[i, 2 * (start + i)], out[i, 2 * (start + i) + 1] = 1.0, -1.0
    return out
