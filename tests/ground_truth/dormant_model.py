"""The zoo of heads with values: one head rests on a token that has none, one rests there in prose alone.

Each head has a value for every token but two, for which <bos> has none: the sink, and the one that attends
evenly. In the place of the rare-token head stands one that parks on <bos> unless there is an unknown
character to look at, as in code and in numbered lists. W_O is random: every head writes.
"""

from __future__ import annotations

import torch
from transformers import GPT2LMHeadModel

from tests.ground_truth.head_zoo import D_HEAD, D_VOCAB, POSITION, ZOO, head_zoo

SINK, PREVIOUS, SWITCHING, EVEN = (
    list(ZOO).index(name) for name in ("first_token_sink", "previous_token", "rare_token", "")
)
"""Heads of layer 0."""
UNKNOWN = 1
"""The token of what the character tokenizer does not know: digits, brackets, underscores."""


def dormant_model() -> GPT2LMHeadModel:
    """The model, in eval mode."""
    module = head_zoo()
    width = module.config.n_embd
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        weight = module.transformer.h[0].attn.c_attn.weight
        for part in (0, 1):
            sink, mine = (part * width + head * D_HEAD for head in (SINK, SWITCHING))
            weight[:, mine : mine + D_HEAD] = weight[:, sink : sink + D_HEAD]
        for sign in (0, 1):
            weight[2 * UNKNOWN + sign, mine] = 1.5 * weight[2 * POSITION + sign, mine]
        for head in range(len(ZOO)):
            first = 2 * width + head * D_HEAD
            for token in range(D_VOCAB):
                if token > 0 or head not in (SINK, EVEN):
                    weight[2 * token, first + token] = 1.0
                    weight[2 * token + 1, first + token] = -1.0
        module.transformer.h[0].attn.c_proj.weight.copy_(torch.randn(width, width) * 1e-3)
        module.lm_head.weight.copy_(torch.randn_like(module.lm_head.weight))
    return module
