"""A Llama whose second layer holds a head that copies, one that suppresses, and two that do neither.

W_E = W_U, gains are 1, the MLPs write nothing, and heads are as wide as the stream: one W_OV is the
identity, one its negative, and two move every coordinate to the next (they write as much, of nothing they
read). The last one's queries are its keys. All other weights are random.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

COPY, SUPPRESS, ELSEWHERE, MATCH = (1, 0), (1, 1), (1, 2), (1, 3)
D_MODEL = 32


def copying_model(seed: int = 0) -> LlamaForCausalLM:
    """The model, in eval mode."""
    config = LlamaConfig(
        hidden_size=D_MODEL,
        head_dim=D_MODEL,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=97,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.ones_like(parameter) if "norm" in name else 0.3 * torch.randn_like(parameter)
            )
        body = model.model
        model.lm_head.weight.copy_(body.embed_tokens.weight)
        for layer in body.layers:
            layer.mlp.down_proj.weight.zero_()
        attention, eye = body.layers[1].self_attn, torch.eye(D_MODEL)
        writes = [eye, -eye, eye.roll(1, dims=0), eye.roll(1, dims=0)]
        attention.v_proj.weight.copy_(torch.cat([eye] * 4))
        attention.o_proj.weight.copy_(torch.cat(writes, dim=1))
        attention.q_proj.weight[3 * D_MODEL :].copy_(eye)
        attention.k_proj.weight[3 * D_MODEL :].copy_(eye)
    return model


def looking_at_their_own_token() -> LlamaForCausalLM:
    """The same, all heads of the second layer attending to the token they stand on; the first writes little."""
    model = copying_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(1e-3)
        attention = model.model.layers[1].self_attn
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.copy_(3 * torch.cat([torch.eye(D_MODEL)] * 4))
    return model
