"""What becomes of a config's field in a tiny model, by what the field is called; and the ways to shrink."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HIDDEN, HEADS, D_HEAD, D_MLP, VOCAB, POSITIONS, LAYERS = 64, 4, 16, 96, 97, 64, 3
WINDOW, WIDE_WINDOW = 4, 128
"""Windows that a prompt is longer than, or shorter: without its cache a draft model masks too few keys."""
IN_SIXTHS = 96
"""A hidden size of which a sixth is whole: boxes on a page have six numbers, with a part of it for each."""
WIDE = 256
"""A hidden size that is more than the 64 of a tracker's memories, which are in its code."""
MANY_CHANNELS = 512
"""Channels that are as few as the hidden size where what failures say is heeded."""
MOST_PATCH = 64
"""Sides of patches that are longer are an image's: each patch is an image to a model inside."""


@dataclass(frozen=True)
class Variant:
    """One way to shrink: later ones are tried where a model cannot be built or called so small."""

    image: int = 32
    kv_heads: int = 2
    layers: int = LAYERS
    of_each_kind: int = 1
    rebuilt: bool = True
    """Whether the config is made anew from its fields, or its default one is changed in place."""
    sections: bool = False
    """Whether rotary sections (of time, height and width) are named where the default names none."""
    patch: int = 8
    """The largest side of a patch."""
    stages: bool = True
    """Whether the widths of stages are cut: some lists of them must fit each other."""
    common: bool = False
    """Whether the parts of a config share one scale: one that is twice as wide as another stays so."""
    filled: bool = False
    """Whether fields get a value that the default config leaves open, as checkpoints do not."""
    divided: bool = False
    """Whether all widths of stages are divided by one number, so that they fit each other."""
    hidden: int = HIDDEN
    """The hidden size; where it is not HIDDEN, sizes that are whole parts of it stay those parts."""
    parts: bool = False
    """Whether the sizes of maps are divided with the image's, and with widths the hidden sizes of parts, of HIDDEN."""
    sliding: int = WINDOW
    """The longest sliding window; another than WINDOW is tried only where the config names one."""
    gain: float = 2.0
    """About how many times as large as what it reads a convolution makes it: many that add to it overflow."""
    told: bool = False
    """Whether what a failure says of sizes is heeded, what a class works out is worked out anew, and many channels are
    as few as the hidden size."""


VARIANTS = (
    Variant(),
    Variant(sliding=WIDE_WINDOW),
    Variant(64, HEADS, 4, of_each_kind=2),
    Variant(64, HEADS, 4, of_each_kind=2, rebuilt=False),
    Variant(64, HEADS, 4, sections=True),
    Variant(64, HEADS, 4, rebuilt=False, sections=True),
    Variant(224, HEADS, 4),
    Variant(64, HEADS, 4, patch=16, stages=False),
    Variant(64, HEADS, 4, common=True),
    Variant(64, HEADS, 4, hidden=IN_SIXTHS),
    Variant(filled=True),
    Variant(64, HEADS, 4, of_each_kind=2, filled=True),
    Variant(64, HEADS, 4, rebuilt=False, filled=True),
    Variant(64, HEADS, 4, sections=True, filled=True),
    Variant(64, HEADS, divided=True),
    Variant(224, HEADS, filled=True, divided=True),
    Variant(224, HEADS, patch=16, divided=True, parts=True),
    Variant(64, HEADS, 4, patch=16, filled=True),
    Variant(224, HEADS, patch=16, divided=True, parts=True, hidden=WIDE),
    Variant(256, HEADS, patch=16, divided=True, parts=True, hidden=WIDE),
    Variant(224, HEADS, patch=16, divided=True, parts=True, gain=1.0),
    Variant(64, HEADS, filled=True, told=True),
    Variant(64, HEADS, 4, rebuilt=False, filled=True, told=True),
)

RULES: tuple[tuple[str, int | Callable[[int], int]], ...] = (
    (r"pad_vocab|multiple_of|divisible", lambda v: min(v, 8)),
    (r"vocab|(?<!num_)buckets_size", lambda v: min(v, VOCAB)),
    (
        r"(experts?_per_to|top_?k_experts|moe_top_?k|^top_?k$|num_selected|moe_k$)",
        lambda v: min(v, 2),
    ),
    (r"topk_group", 1),
    (r"(^n_group|num_expert_group)", lambda v: min(v, 2)),
    (r"shared_experts?$|zero_expert", lambda v: min(v, 1)),
    (r"(experts?$|experts_num|num_experts)", lambda v: min(v, 4)),
    (r"index_topk|indexer_topk|index_block", 4),
    (r"linear_num_key_heads", 2),
    (r"qk_(rope|nope)_head_dim", 8),
    (r"mamba_(n_heads|num_heads)|mamba_nheads", 2 * HIDDEN // D_HEAD),
    (r"mamba_d_ssm", 2 * HIDDEN),
    (r"^base_channels$|latent_channels$", lambda v: min(v, 32)),
    (r"^num_filters$", lambda v: min(v, 4)),
    (r"^encoder_hidden_size$", lambda v: 8 if v < HIDDEN else HIDDEN),  # of a codec: doubled often
    (r"^d_latents$", HIDDEN),
    (r"self_attends_per_block$", lambda v: -2),
    (r"(state_size|d_state|time_step_rank|dt_rank)", 8),
    (r"chunk", lambda v: min(v, 8)),
    (r"mask_time|mask_feature", lambda v: v),
    (r"(key_value_heads|kv_heads|num_query_groups|key_value_groups)(_per_layer)?$", lambda v: -1),
    (r"(head_dim|d_kv|d_head|kv_channels|dim_head|key_dim|headdim|head_size)$", D_HEAD),
    (r"rotary_dim", 8),
    (r"rope_pairs", 1),
    (r"^atom_feature_dim$", lambda v: v),  # of numbers of kinds, which stay
    (r"rank$", 16),
    (r"latent_query_num", lambda v: min(v, 8)),
    (r"^n_window", lambda v: v),
    (r"(window|local_attention$|landmarks|segment_means)", lambda v: min(v, WINDOW)),
    (r"(attention_heads|n_heads?|num_heads|linear_num_value_heads)", lambda v: min(v, HEADS)),
    (r"^num_groups$", lambda v: min(v, 8)),
    (r"(period|interval|every|pattern$)", lambda v: min(v, 2)),
    (r"(layer_offset|period_offset)", lambda v: min(v, 1)),
    (
        r"(first_k_dense|dense_layers|num_dense|layer_start|layer_freq|kv_shared|nextn)",
        lambda v: min(v, 1),
    ),
    (r"layer_end_index", lambda v: -2),
    (r"max_window_layers", lambda v: -2),
    (
        r"(hidden_layers|num_layers|n_layers?$|encoder_layers|decoder_layers|^depth$|layers_per_stack)",
        lambda v: -2,
    ),
    (r"(expansion|expand|ratio)", lambda v: v),
    (r"max_2d_position", lambda v: v),  # thousandths of a page
    (r"max_num_objects", 1),  # blocks of a tracker are called once an object
    (r"keypoint_decoder_dim", lambda v: v),  # cells of an image and one besides
    (r"(temporal_patch|tubelet)", lambda v: v),
    (r"patch_size", lambda v: -4 if v <= MOST_PATCH else -3),
    (r"^spec_size$", lambda v: min(v, 128)),  # the last of four stages has as many rows as a window
    (r"image_size|pretrain_image|encoder_stride|crop_size", lambda v: -3),
    (r"num_frames", lambda v: min(v, 4)),
    (r"(max_source_positions|source_positions)", POSITIONS),
    (r"(position|n_ctx|max_seq|context_length|max_length|seq_len)", lambda v: min(v, POSITIONS)),
    (
        r"(intermediate|ffn|d_ff|dff|dim_ff|feed_forward|inner|^hidden_dim$|mlp_dim)",
        lambda v: min(v, D_MLP),
    ),
    (
        r"(bucket|distance|labels|queries|group|kernel|stride|channels$|frames|mels|token_type)",
        lambda v: v,
    ),
)
"""What an integer becomes by its name, first match first; -1, -2, -3 and -4 stand for the variant's number
of kv heads, the number of layers, the variant's image size and its largest patch."""

UNSET = (
    (r"experts_per_tok$", 2),
    (r"(routed|local)_experts$", 4),
    (r"shared_experts$", 1),
    (r"^vocab_size$", VOCAB),
    (r"^context_length$", 12),
    (r"^prediction_length$", 8),
    (r"^num_key_value_heads$", HEADS),
    (r"attn_layer_indices", [1]),
    (r"^(image|video)_token_(index|id)$", 9),
)
"""What becomes of a field that the default config leaves open, and that no model can leave open."""

WIDTHS = re.compile(r"(hidden_sizes|embed_dim|dims$|widths|stage_.*channels)")
SIZE = re.compile(r"(hidden|d_model|n_embd|emb|dim|width|size|channels|features)")


class Tokens:
    """Special token ids made small, different ones staying different."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}

    def of(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self.of(each) for each in value]
        if not isinstance(value, int) or value < 0:
            return value
        return self.known.setdefault(value, len(self.known) % 10)
