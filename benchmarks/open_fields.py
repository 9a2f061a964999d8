"""What a default config leaves open or forgets, though no model can be built without it, by its name.

Checkpoints name these fields, the defaults of the config classes do not. As in `tiny_configs` no model
type is known here.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from transformers import PreTrainedConfig
from transformers.configuration_utils import ALLOWED_ATTN_LAYER_TYPES, ALLOWED_MLP_LAYER_TYPES

Made = TypeVar("Made")

LIBRARY_SMALLEST = "test_vit"
"""The smallest transformer of images that timm lists."""

TOWER: Mapping[str, Any] = {"architecture": LIBRARY_SMALLEST, "model_args": {"embed_dim": 64}}
"""A tower of images that timm makes, beside a text model: names of its fields do not shrink it."""

OPEN: tuple[tuple[str, Any], ...] = (
    (r"^head_dim$|^indexer_head_dim$", 16),
    (r"^indexer_n_heads$", 4),
    (r"^indexer_kv_heads$", 1),
    (r"^indexer_budget$", 4),
    (r"^indexer_compress_ratio$", 2),
    (r"^num_experts$", 4),
    (r"^top_k_experts$", 2),
    (r"expert_intermediate_size$|moe_intermediate_size$", 96),
    (r"^sliding_window$", 4),
    (r"^(pad|mask)_token_id$", 1),
    (r"^clip_qkv$", 8.0),
    (r"^downsample_rate$", "1/2"),
    (r"^vocabulary_map$", {"<image>": 3}),
    (r"^deepstack_layer_map$", [[0, 0]]),
    (r"_scale_factors$", [1.0]),
    (r"^class_thresholds$", [0.5, 0.5]),
    (r"^class_order$", [0, 1]),
    (r"^backbone$", LIBRARY_SMALLEST),
    (r"^model_args$", {"channel_multiplier": 1 / 16}),  # timm's name for the widths of all stages
)
"""What becomes of a field left open, where nothing else about the config tells."""

ALIKE = 0.9
"""How alike two names are of which one is the other but for a slip."""

ROTATED = 32
"""Numbers of a head that are rotated at the least, where a config has nothing but a flag for it."""

FORGOTTEN: Mapping[str, Any] = {
    "rope_theta": 10_000.0,
    "num_key_value_heads": 4,
    "dropout_rate": 0.0,
    "initializer_range": 0.02,
    "shared_expert_intermediate_size": 96,
}
"""What a model asks of a config whose class does not have it."""


def filled(name: str, fields: Mapping[str, Any], n_layers: int, config: PreTrainedConfig) -> Any:
    """A value for a field that is None: of lists with an entry a layer, every kind in turn.

    A default of several (`default_language`) is the first of them (`languages`).
    """
    if name in ("layer_types", "mlp_layer_types"):
        kinds = _kinds(config, name)
        return [kinds[layer % len(kinds)] for layer in range(n_layers)] if kinds else None
    several = fields.get(name.removeprefix("default_") + "s")
    if name.startswith("default_") and isinstance(several, (list, tuple)) and several:
        return several[0]
    return next((value for pattern, value in OPEN if re.search(pattern, name)), None)


def of_every_kind(value: Any, config: PreTrainedConfig) -> Any:
    """Kinds of layers with attention among them, where all are without by default and the model knows others."""
    kinds = _kinds(config, "layer_types")
    if not isinstance(value, (list, tuple)) or set(value) != {"linear_attention"}:
        return value
    return [kinds[layer % len(kinds)] for layer in range(len(value))] if len(kinds) > 1 else value


def _kinds(config: PreTrainedConfig, name: str) -> list[str]:
    """The kinds of layers that the model's own file speaks of, of those that transformers knows.

    Of the two kinds of MLP it may name one, and mean the other by whatever is not that.
    """
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    spoken = set(re.findall(r'"(\w+)"', inspect.getsource(importlib.import_module(module))))
    if name.startswith("mlp"):
        return list(ALLOWED_MLP_LAYER_TYPES) if spoken.intersection(ALLOWED_MLP_LAYER_TYPES) else []
    return [kind for kind in ALLOWED_ATTN_LAYER_TYPES if kind in spoken]


def rope_of_types(layer_types: Any, rope: Any) -> Any:
    """Rotary settings for each kind of layer, where the default has none at all."""
    if rope or not isinstance(layer_types, (list, tuple)):
        return rope
    return {kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in set(layer_types)}


def fitting(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The number of heads that make up the widened stream, where that held and no longer does.

    Heads whose rotary angles are made for several at once (a rotated part of over 1 of each) stay as many. A
    window of pixels, cut into patches of which some are merged, is two merged patches high and wide. A text
    projected to the width in which a tower of images ends still is. A spectrogram folded to a square still is one.
    Heads of which a flag says that they are rotated, and no field how much of each, are wide enough for the least.
    A part that ended in the width of the whole still does. Layers that all get their keys from elsewhere still do.
    """
    _end_alike(old, new)
    shared, layers = "num_kv_shared_layers", "num_hidden_layers"
    if old.get(shared) and old[shared] == old.get(layers) and shared in new and layers in new:
        return {shared: new[layers]}
    if made := _joined(old, new) or _window(old, new) or _last_stage(old, new) or _folded(old, new):
        return made
    rope = old.get("rope_parameters")
    if isinstance(rope, Mapping) and (rope.get("partial_rotary_factor") or 0) > 1:
        same = ("num_attention_heads", "num_key_value_heads")
        return {name: old[name] for name in same if isinstance(old.get(name), int)}
    if old.get("use_rotary_embedding") and isinstance(new.get("hidden_size"), int):
        return {"num_attention_heads": max(1, new["hidden_size"] // ROTATED)}
    names = ("hidden_size", "expand", "num_heads", "head_dim")
    if not all(isinstance(fields.get(name), int) for name in names for fields in (old, new)):
        return {}
    if old["hidden_size"] * old["expand"] != old["num_heads"] * old["head_dim"]:
        return {}
    return {"num_heads": new["hidden_size"] * new["expand"] // new["head_dim"]}


def _end_alike(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Set the width in which parts end to that of the whole, where it was."""
    for name, part in old.items():
        width = getattr(part, "output_dim", None) if isinstance(part, PreTrainedConfig) else None
        if width is not None and width == old.get("hidden_size"):
            new[name].output_dim = new["hidden_size"]


def _joined(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The width of what a part ends in with other features beside it, as many as by default."""
    part, whole = old.get("atom_encoder"), old.get("single_inputs_size")
    if whole is None or part is None:
        return {}
    return {"single_inputs_size": whole - part.output_dim + new["atom_encoder"].output_dim}


def _window(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The window of pixels that makes up several merged patches, where the default one does."""
    names = ("window_size", "patch_size", "spatial_merge_size")
    if not all(isinstance(old.get(name), int) for name in names):
        return {}
    merged = old["patch_size"] * old["spatial_merge_size"]
    if old["window_size"] % merged or old["window_size"] < 2 * merged:
        return {}
    return {"window_size": 2 * new["patch_size"] * new["spatial_merge_size"]}


def _last_stage(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The width in which the last stage of a part ends, of the default config's projection to it."""
    before, part = old.get("vision_config"), new.get("vision_config")
    ends = [
        int(of.out_channels[-1] * of.width_coefficient)
        for of in (before, part)
        if isinstance(getattr(of, "width_coefficient", None), float)
    ]
    known = len(ends) == 2 and old.get("projection_dim") == ends[0]
    return {"projection_dim": ends[1]} if known else {}


def _folded(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The bins of a spectrogram that is folded as often, to the square that is read as an image."""
    names = ("spec_size", "num_mel_bins")
    if not all(isinstance(fields.get(name), int) for name in names for fields in (old, new)):
        return {}
    return {"num_mel_bins": new["spec_size"] // (old["spec_size"] // old["num_mel_bins"])}


def spelt(config: PreTrainedConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields; one that the class does not declare, named like one that it does but for a slip, is that one."""
    names = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    known, slips = {**fields}, set(fields) - names - {*config.attribute_map}
    for slip in sorted(slips):
        as_long = sorted(name for name in names if len(name) == len(slip))
        if meant := difflib.get_close_matches(slip, as_long, n=1, cutoff=ALIKE):
            known[meant[0]] = known.pop(slip)
    return known


def of_library(fields: Mapping[str, Any]) -> bool:
    """Whether another library makes a part, by the name of an architecture: that fixes the widths of its stages."""
    return any(
        hasattr(x, "architecture") for x in fields.values() if isinstance(x, PreTrainedConfig)
    )


def towered(name: str, part: PreTrainedConfig) -> PreTrainedConfig:
    """The part; one for images that names another library's architecture names that library's smallest."""
    if name == "vision_config" and hasattr(part, "architecture"):
        for field, value in TOWER.items():
            setattr(part, field, value)
    return part


def of_layers(config: PreTrainedConfig, picks: list[int]) -> dict[int, dict[str, Any]]:
    """What single layers have otherwise than the rest, of the layers that are kept, numbered anew."""
    spec = getattr(config, "_heterogeneity_spec", None)
    overrides = spec.per_layer_overrides if spec is not None else {}
    return {new: overrides[old] for new, old in enumerate(picks) if old in overrides}


def supplied(make: Callable[[PreTrainedConfig], Made], config: PreTrainedConfig) -> Made:
    """What is made of a config, which is given the fields that the model asks for and its class forgot."""
    for _ in FORGOTTEN:
        try:
            return make(config)
        except AttributeError as error:
            if not isinstance(error.obj, PreTrainedConfig) or error.name not in FORGOTTEN:
                raise
            for part in _parts(config):
                if type(part) is type(error.obj):
                    setattr(part, error.name, FORGOTTEN[error.name])
    return make(config)


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            yield from _parts(part)
