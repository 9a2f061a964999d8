"""One tiny random model of every covered Hugging Face family, and what we expect to see of it.

The tests of `identities/` run over this table, and the README's list of families is made from it:
`python -m tests.families` writes it. A new family is one entry here and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
TEXT = {**SHAPE, "vocab_size": 97, "max_position_embeddings": 64}
GROUPED = {**TEXT, "num_key_value_heads": 2}
IMAGE = {**SHAPE, "image_size": 32, "patch_size": 8}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
FOUR_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK_EXPERTS = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
GRANITE = {
    "residual_multiplier": 0.22,
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "attention_multiplier": 0.2,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 97, "n_positions": 64}

PARALLEL = frozenset({"resid_mid"})
EXPERTS = frozenset({"mlp_post"})
TRANSFORM = frozenset({"unembedding"})
SEVERAL_STREAMS = frozenset({"attn_write", "mlp_write", "resid_mid"})
NO_WINDOW = frozenset(
    [
        "q",
        "k",
        "v",
        "scores",
        "pattern",
        "z",
        "attn_out",
        "attn_write",
        "mlp_out",
        "mlp_post",
        "mlp_write",
        "resid_mid",
    ]
)

NOT_A_SUM = {"norm after adding", "hybrid", "layer scale as a parameter", "a third write"}
NOT_A_SUM |= {
    "several streams",
    "several stacks",
    "gated attention",
    "norm between z and W_O",
    "convolution behind attention",
    "rescaled stream",
}
"""Traits of models whose final residual is something else than embedding, heads' and MLPs' writes."""


@dataclass(frozen=True)
class Family:
    """A recipe for a tiny model, its traits, and the sites that it is right to refuse.

    Attributes:
        model, config: names of the transformers classes. options: of the config.
        traits: "decoder", "encoder" or "vision" first, then what is special about it.
        refused: sites (and "unembedding") that this architecture does not have.
    """

    model: str
    config: str
    options: dict[str, Any]
    traits: tuple[str, ...]
    refused: frozenset[str] = frozenset()

    @property
    def expected(self) -> str:
        """ "full", "partly" or "no window"."""
        if "z" in self.refused:
            return "no window"
        absent = PARALLEL | EXPERTS | TRANSFORM
        absent |= SEVERAL_STREAMS if "several streams" in self.traits else frozenset()
        return "full" if self.refused <= absent else "partly"

    @property
    def sums(self) -> bool:
        """Whether the final residual is embedding plus what heads (linear in z) and MLPs write."""
        return not NOT_A_SUM & set(self.traits)

    def __call__(self) -> nn.Module:
        """The model, the same at every call, in eval mode.

        Matrices get a standard deviation of 0.2, wide enough for patterns that are far from uniform;
        gains, biases, sinks and other vectors are moved off their trivial values.
        """
        config = getattr(transformers, self.config)(**self.options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = getattr(transformers, self.model)(config).eval()
            with torch.no_grad():
                for parameter in module.parameters():
                    noise = torch.randn_like(parameter)
                    if parameter.ndim < 2:
                        parameter.add_(0.1 * noise)
                    else:
                        parameter.copy_(0.2 * noise)
        n_parameters = sum(parameter.numel() for parameter in module.parameters())
        assert n_parameters < 1_000_000, f"{self.model} is not tiny: {n_parameters:,} parameters"
        return module


def _text(
    stem: str, options: dict[str, Any], *traits: str, config: str = "", refused: Iterable[str] = ()
) -> Family:
    return Family(
        f"{stem}ForCausalLM",
        config or f"{stem}Config",
        options,
        ("decoder", *traits),
        frozenset(refused),
    )


def _masked(stem: str, options: dict[str, Any], *traits: str) -> Family:
    refused = TRANSFORM if "head with a transform" in traits else frozenset()
    return Family(f"{stem}ForMaskedLM", f"{stem}Config", options, ("encoder", *traits), refused)


HEAD_8 = {"head_dim": 8}
WINDOW_4 = {"sliding_window": 4}
BERT_LIKE = ("norm after adding", "head with a transform")

FAMILIES: dict[str, Family] = {
    # --- decoders ------------------------------------------------------------------------------
    "arcee": _text("Arcee", GROUPED, "grouped heads"),
    "beam": _text(
        "Beam",
        {**GROUPED, **HEAD_8, "mlp_layer_types": ["dense"] * 3},
        "grouped heads",
        "rescaled stream",
        "scaled residual",
        "gated attention",
    ),
    "bitnet": _text("BitNet", GROUPED, "grouped heads", "norm between z and W_O"),
    "biogpt": _text("BioGpt", TEXT, "learned positions"),
    "blenderbot_small": _text(
        "BlenderbotSmall",
        {
            "d_model": 32,
            "decoder_ffn_dim": 48,
            "decoder_layers": 3,
            "decoder_attention_heads": 4,
            "vocab_size": 97,
            "max_position_embeddings": 64,
        },
        "norm after adding",
        "learned positions",
        "positions are not told",
    ),
    "cohere": _text(
        "Cohere", {**GROUPED, "logit_scale": 0.25}, "grouped heads", "parallel", refused=PARALLEL
    ),
    "cohere2": _text(
        "Cohere2",
        {**GROUPED, **WINDOW_4, "logit_scale": 0.25},
        "grouped heads",
        "parallel",
        "sliding window",
        refused=PARALLEL,
    ),
    "deepseek_v2": _text("DeepseekV2", {**TEXT, **DEEPSEEK_EXPERTS, **LATENT}, "MLA", "MoE"),
    "deepseek_v3": _text("DeepseekV3", {**TEXT, **DEEPSEEK_EXPERTS, **LATENT}, "MLA", "MoE"),
    "deepseek_v32": _text(
        "DeepseekV32",
        {
            **TEXT,
            **DEEPSEEK_EXPERTS,
            **LATENT,
            "index_topk": 3,
            "index_n_heads": 8,
            "index_head_dim": 8,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        "MLA",
        "indexer",
        "MoE",
    ),
    "deepseek_v4": _text(
        "DeepseekV4",
        {
            **TEXT,
            **DEEPSEEK_EXPERTS,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "q_lora_rank": 16,
            "o_lora_rank": 8,
            "o_groups": 2,
            "hc_mult": 3,
            "sliding_window": 4,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_topk": 2,
            "layer_types": [
                "sliding_attention",
                "compressed_sparse_attention",
                "heavily_compressed_attention",
            ],
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
        },
        "grouped heads",
        "several streams",
        "compressed keys",
        "sinks",
        "sliding window",
        "MoE",
        "head with a transform",
        refused=SEVERAL_STREAMS | EXPERTS | TRANSFORM,
    ),
    "doge": _text("Doge", GROUPED, "grouped heads", "rescaled stream"),
    "dots1": _text("Dots1", {**GROUPED, **DEEPSEEK_EXPERTS}, "grouped heads", "MoE"),
    "ernie4_5": _text("Ernie4_5", {**GROUPED, **HEAD_8}, "grouped heads"),
    "exaone4": _text(
        "Exaone4",
        {**GROUPED, **HEAD_8, **WINDOW_4},
        "grouped heads",
        "post-norm",
        "sliding window",
    ),
    "falcon_h1": _text(
        "FalconH1",
        {
            **GROUPED,
            **HEAD_8,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 4,
        },
        "grouped heads",
        "hybrid",
    ),
    "gemma": _text("Gemma", {**GROUPED, **HEAD_8}, "grouped heads"),
    "gemma2": _text(
        "Gemma2",
        {**GROUPED, **HEAD_8, **WINDOW_4, "query_pre_attn_scalar": 8},
        "grouped heads",
        "post-norm",
        "sliding window",
        "softcap",
    ),
    "gemma3": _text(
        "Gemma3",
        {**GROUPED, **HEAD_8, **WINDOW_4, "query_pre_attn_scalar": 8},
        "grouped heads",
        "post-norm",
        "sliding window",
        config="Gemma3TextConfig",
    ),
    "gemma4": _text(
        "Gemma4",
        {
            **GROUPED,
            **HEAD_8,
            **WINDOW_4,
            "global_head_dim": 8,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        "grouped heads",
        "post-norm",
        "sliding window",
        "a third write",
        config="Gemma4TextConfig",
    ),
    "gemma3n": _text(
        "Gemma3n",
        {
            **GROUPED,
            **HEAD_8,
            **WINDOW_4,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "altup_num_inputs": 3,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0],
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        "grouped heads",
        "several streams",
        "sliding window",
        "softcap",
        "head with a transform",
        config="Gemma3nTextConfig",
        refused=SEVERAL_STREAMS | TRANSFORM,
    ),
    "glm": _text("Glm", {**GROUPED, **HEAD_8, "pad_token_id": 0}, "grouped heads"),
    "glm4": _text("Glm4", {**GROUPED, **HEAD_8, "pad_token_id": 0}, "grouped heads", "post-norm"),
    "gpt2": Family(
        "GPT2LMHeadModel", "GPT2Config", GPT2, ("decoder", "fused qkv", "learned positions")
    ),
    "gpt_bigcode": _text("GPTBigCode", GPT2, "grouped heads", "fused qkv", "learned positions"),
    "gpt_neox": _text("GPTNeoX", TEXT, "parallel", "fused qkv", refused=PARALLEL),
    "gpt_oss": _text(
        "GptOss",
        {**GROUPED, **HEAD_8, **WINDOW_4, **FOUR_EXPERTS},
        "grouped heads",
        "sinks",
        "sliding window",
        "MoE",
        refused=EXPERTS,
    ),
    "granite": _text("Granite", {**GROUPED, **GRANITE}, "grouped heads", "scaled residual"),
    "granitemoe": _text(
        "GraniteMoe",
        {**GROUPED, **GRANITE, **FOUR_EXPERTS},
        "grouped heads",
        "scaled residual",
        "MoE",
        refused=EXPERTS,
    ),
    "helium": _text("Helium", {**GROUPED, **HEAD_8}, "grouped heads"),
    "hrm_text": _text(
        "HrmText",
        {**TEXT, "num_hidden_layers": 2, "head_dim": 8, "H_cycles": 2, "L_cycles": 2},
        "several stacks",
        "shared layers",
        "gated attention",
    ),
    "hy_v4": _text(
        "HYV4",
        {
            **TEXT,
            **DEEPSEEK_EXPERTS,
            **LATENT,
            "hc_mult": 3,
            "index_topk": 3,
            "index_head_dim": 8,
            "index_n_heads": 8,
            "pad_token_id": 0,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        "several streams",
        "gated attention",
        "MLA",
        "indexer",
        "sinks",
        "MoE",
        "head with a transform",
        refused=SEVERAL_STREAMS | TRANSFORM,
    ),
    "inkling": _text(
        "Inkling",
        {
            **GROUPED,
            **HEAD_8,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "sliding_window_size": 4,
            "d_rel": 8,
            "rel_extent": 16,
            "unpadded_vocab_size": 97,
            "layer_types": ["hybrid_sliding", "hybrid", "hybrid"],
            "mlp_layer_types": ["dense", "dense", "dense"],
        },
        "grouped heads",
        "sliding window",
        "position bias",
        "convolution behind attention",
        refused=EXPERTS,
        config="InklingTextConfig",
    ),
    "inkling2": _text(
        "Inkling2",
        {
            **GROUPED,
            **HEAD_8,
            "num_hidden_layers": 4,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "sliding_window_size": 4,
            "d_rel": 8,
            "rel_extent": 16,
            "unpadded_vocab_size": 97,
            "eos_token_id": 1,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
            "n_layers_per_attn_res_block": 2,
        },
        "grouped heads",
        "sliding window",
        "position bias",
        "no SDPA",
        "MoE",
        "gated attention",
        "convolution behind attention",
        "rescaled stream",
        refused=EXPERTS | {"unembedding"},
        config="Inkling2TextConfig",
    ),
    "lfm2": _text(
        "Lfm2",
        {**GROUPED, "full_attn_idxs": [1]},
        "grouped heads",
        "hybrid",
    ),
    "llama": _text("Llama", GROUPED, "grouped heads"),
    "minimax": _text(
        "MiniMax",
        {
            **GROUPED,
            **HEAD_8,
            **FOUR_EXPERTS,
            "layer_types": ["full_attention"] * 3,
            "full_attn_alpha_factor": 0.9,
            "full_attn_beta_factor": 1.2,
            "mlp_alpha_factor": 1.1,
            "mlp_beta_factor": 0.8,
        },
        "grouped heads",
        "MoE",
        "norm after adding",
        "rescaled stream",
        "scaled residual",
        refused=EXPERTS,
    ),
    "ministral": _text(
        "Ministral", {**GROUPED, **HEAD_8, **WINDOW_4}, "grouped heads", "sliding window"
    ),
    "mistral": _text("Mistral", {**GROUPED, **WINDOW_4}, "grouped heads", "sliding window"),
    "mixtral": _text(
        "Mixtral", {**GROUPED, "num_local_experts": 4}, "grouped heads", "MoE", refused=EXPERTS
    ),
    "muse_spark": Family(
        "MuseSparkTextModel",
        "MuseSparkTextConfig",
        {
            **GROUPED,
            **HEAD_8,
            "mlp_layer_types": ["dense"] * 3,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        ("decoder", "grouped heads", "norm between z and W_O", "rescaled stream", "no head"),
    ),
    "nanochat": _text("NanoChat", {**GROUPED, **HEAD_8}, "grouped heads", "softcap"),
    "nemotron": _text("Nemotron", {**GROUPED, **HEAD_8}, "grouped heads"),
    "olmo": _text("Olmo", GROUPED, "grouped heads", "norm without weights"),
    "olmo2": _text("Olmo2", GROUPED, "grouped heads", "post-norm"),
    "olmo3": _text(
        "Olmo3", {**GROUPED, **WINDOW_4}, "grouped heads", "post-norm", "sliding window"
    ),
    "olmoe": _text(
        "Olmoe",
        {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
        "grouped heads",
        "MoE",
        refused=EXPERTS,
    ),
    "opt": _text(
        "OPT",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "vocab_size": 97,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
        "flattened MLP",
        "learned positions",
    ),
    "persimmon": _text("Persimmon", TEXT, "fused qkv"),
    "phi": _text("Phi", TEXT, "parallel", refused=PARALLEL),
    "phi3": _text("Phi3", {**GROUPED, "pad_token_id": 0}, "grouped heads", "fused qkv"),
    "phimoe": _text("Phimoe", {**GROUPED, **FOUR_EXPERTS}, "grouped heads", "MoE", refused=EXPERTS),
    "qwen2": _text("Qwen2", GROUPED, "grouped heads"),
    "qwen2_moe": _text(
        "Qwen2Moe",
        {
            **GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        "grouped heads",
        "MoE",
        refused=EXPERTS,
    ),
    "qwen3": _text("Qwen3", {**GROUPED, **HEAD_8}, "grouped heads"),
    "qwen3_moe": _text(
        "Qwen3Moe",
        {
            **GROUPED,
            **HEAD_8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
        "grouped heads",
        "MoE",
        refused=EXPERTS,
    ),
    "qwen3_next": _text(
        "Qwen3Next",
        {
            **GROUPED,
            **HEAD_8,
            "num_hidden_layers": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "grouped heads",
        "hybrid",
        "gated attention",
        "MoE",
        refused=EXPERTS,
    ),
    "qwen4_exp": _text(
        "Qwen4Exp",
        {
            **GROUPED,
            **HEAD_8,
            "hc_count": 3,
            "hc_lowrank": 16,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
            "layer_types": ["indexed_attention", "linear_attention", "indexed_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "grouped heads",
        "several streams",
        "hybrid",
        "gated attention",
        "MoE",
        "head with a transform",
        config="Qwen4ExpTextConfig",
        refused=SEVERAL_STREAMS | EXPERTS | TRANSFORM,
    ),
    "seed_oss": _text("SeedOss", {**GROUPED, **HEAD_8}, "grouped heads"),
    "smollm3": _text("SmolLM3", {**GROUPED, "pad_token_id": 0}, "grouped heads"),
    "stablelm": _text("StableLm", GROUPED, "grouped heads"),
    "starcoder2": _text("Starcoder2", GROUPED, "grouped heads"),
    "zaya": _text(
        "Zaya",
        {
            **{name: size for name, size in GROUPED.items() if name != "intermediate_size"},
            **HEAD_8,
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "router_hidden_size": 16,
        },
        "grouped heads",
        "MoE",
        "rescaled stream",
        refused=EXPERTS,
    ),
    "clip_text": Family("CLIPTextModel", "CLIPTextConfig", TEXT, ("decoder", "no head")),
    # --- encoders ------------------------------------------------------------------------------
    "albert": _masked("Albert", {**TEXT, "embedding_size": 16}, "shared layers", *BERT_LIKE),
    "bert": _masked("Bert", TEXT, *BERT_LIKE),
    "distilbert": _masked(
        "DistilBert",
        {
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 3,
            "n_heads": 4,
            "vocab_size": 97,
            "max_position_embeddings": 64,
        },
        *BERT_LIKE,
    ),
    "electra": _masked("Electra", {**TEXT, "embedding_size": 32}, *BERT_LIKE),
    "modernbert": _masked(
        "ModernBert",
        {**TEXT, "pad_token_id": 0, "local_attention": 4},
        "sliding window",
        "fused qkv",
        "head with a transform",
    ),
    "roberta": _masked("Roberta", {**TEXT, "pad_token_id": 1}, *BERT_LIKE),
    "splinter": Family(
        "SplinterModel",
        "SplinterConfig",
        TEXT,
        ("encoder", "norm after adding", "no head", "no SDPA"),
    ),
    "siglip_text": Family("SiglipTextModel", "SiglipTextConfig", TEXT, ("encoder", "no head")),
    "t5_encoder": Family(
        "T5EncoderModel",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "vocab_size": 97},
        ("encoder", "position bias", "no head"),
    ),
    "funnel": Family(
        "FunnelForMaskedLM",
        "FunnelConfig",
        {
            "vocab_size": 97,
            "block_sizes": [1, 2],
            "num_decoder_layers": 1,
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 48,
            "num_labels": 2,
        },
        ("encoder", "norm after adding", "no SDPA", "pooled queries"),
    ),
    "xlnet": Family(
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"vocab_size": 97, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48},
        ("encoder", "positions first", "norm after adding", "no SDPA", "positions are not told"),
    ),
    # --- vision --------------------------------------------------------------------------------
    "beit": Family("BeitModel", "BeitConfig", IMAGE, ("vision", "layer scale as a parameter")),
    "clip_vision": Family("CLIPVisionModel", "CLIPVisionConfig", IMAGE, ("vision",)),
    "deit": Family("DeiTModel", "DeiTConfig", IMAGE, ("vision",)),
    "dinov2": Family(
        "Dinov2Model",
        "Dinov2Config",
        {name: value for name, value in IMAGE.items() if name != "intermediate_size"},
        ("vision", "layer scale"),
    ),
    "dinov3": Family(
        "DINOv3ViTModel", "DINOv3ViTConfig", IMAGE, ("vision", "layer scale", "rotary")
    ),
    "mlcd": Family("MLCDVisionModel", "MLCDVisionConfig", IMAGE, ("vision", "position first")),
    "sam_vision": Family(
        "SamVisionModel",
        "SamVisionConfig",
        {**IMAGE, "output_channels": 16, "window_size": 3, "global_attn_indexes": [1]},
        ("vision", "rows and columns", "windows"),
    ),
    "siglip_vision": Family("SiglipVisionModel", "SiglipVisionConfig", IMAGE, ("vision",)),
    "vit": Family("ViTForImageClassification", "ViTConfig", IMAGE, ("vision",)),
    # --- attention in the model's own code, not through the attention interface -------------------
    "bloom": _text(
        "Bloom",
        {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 97},
        "ALiBi",
    ),
    "codegen": _text("CodeGen", {**GPT2, "rotary_dim": 8}, "parallel", refused=PARALLEL),
    "falcon": _text(
        "Falcon",
        {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 97},
        "parallel",
        "grouped heads",
        refused=PARALLEL,
    ),
    "gpt_neo": _text(
        "GPTNeo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "num_heads": 4,
            "vocab_size": 97,
            "max_position_embeddings": 64,
        },
        "learned positions",
    ),
    "mamba": _text(
        "Mamba",
        {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 97, "state_size": 4},
        "state-space layers",
        refused=NO_WINDOW,
    ),
    "gptj": _text("GPTJ", {**GPT2, "rotary_dim": 8}, "parallel", refused=PARALLEL),
}

WINDOWED = [name for name, family in FAMILIES.items() if family.expected != "no window"]


def readme_table() -> str:
    """The covered families as a Markdown table: name, traits, what is seen of it, what is refused."""
    rows = ["| family | kind | traits | seen | refused |", "|---|---|---|---|---|"]
    for name, family in sorted(FAMILIES.items(), key=lambda item: (item[1].traits[0], item[0])):
        kind, *traits = family.traits
        if family.expected == "no window":
            refused = "everything but resid_pre, resid_post and logits"
        else:
            refused = ", ".join(f"`{site}`" for site in sorted(family.refused))
        seen = {"full": "everything", "partly": "partly", "no window": "residual stream only"}
        rows.append(
            f"| {name} | {kind} | {', '.join(traits)} | {seen[family.expected]} | {refused} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    readme = Path(__file__).parent.parent / "README.md"
    before, rest = readme.read_text().split("<!-- families -->")
    _, after = rest.split("<!-- /families -->")
    table = f"<!-- families -->\n{readme_table()}\n<!-- /families -->"
    readme.write_text(before + table + after)
