"""A tiny random model of any model type: its default config, shrunk by what its fields are called.

Nothing here knows a model type. A field's new value follows from its name (sizes, heads, layers,
experts, vocabulary, image), lists with one entry a layer keep every kind of layer that they name, and
special token ids move into the small vocabulary.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.field_rules import (
    D_HEAD,
    HIDDEN,
    MANY_CHANNELS,
    POSITIONS,
    RULES,
    SIZE,
    UNSET,
    VARIANTS,
    WIDTHS,
    WINDOW,
    Tokens,
    Variant,
)
from benchmarks.open_fields import (
    filled,
    fitting,
    of_every_kind,
    of_layers,
    of_library,
    rope_of_types,
    spelt,
    supplied,
    towered,
)
from benchmarks.stage_widths import declared, divided, image_sizes, of_image, return_stages, widths
from benchmarks.told_sizes import fitted, part_told

MOST_LAYERS = 8
MOST_TOLD = 4
"""How many fields of a default config are set at most, as its validator asks for one after the other."""
FAST = 64.0
"""A frame or so for each token that is spoken."""
SWITCH = re.compile(r"^(use_|add_|with_)?(self_)?(attn|attention)$")
MOST_PARAMETERS = 28_000_000


class Unbuildable(Exception):
    """No tiny model of this type could be built, for the reason given."""


def tiny_model(
    model_type: str, class_name: str, check: Callable[[nn.Module], Any], **switched: bool
) -> nn.Module:
    """A tiny random model of a class, in eval mode: the first variant that builds and passes `check`.

    Args:
        switched: fields of the default config that are set first.

    Raises:
        Unbuildable: no variant does; the reason of the first that the probe refuses, else of the first.
    """
    reasons = []
    for variant in VARIANTS:
        try:
            default = default_config(model_type, **switched)
            model_class = _class(class_name, default)
            config = _of_class(default, model_class.config_class)
            window = vars(config).get("sliding_window")
            if variant.sliding != WINDOW and not isinstance(window, int):
                continue
            make = partial(_checked, model_class, variant, check)
            small = shrunk(config, variant)
            return fitted(make, small) if variant.told else make(small)
        except Exception as error:  # noqa: BLE001 - any model's own code: anything may be raised
            text = " ".join(str(error).split())
            named = "" if isinstance(error, Unbuildable) else f"{type(error).__name__}: "
            reasons.append(needed_libraries(error) or f"{named}{text}"[:160])
    raise Unbuildable(next((x for x in reasons if x.startswith("Refused")), reasons[0]))


def needed_libraries(error: Exception) -> str:
    """ "needs" and the libraries that are not installed, where that is why a model is not built; else ""."""
    names = re.findall(r"requires the (\S+) library", str(error))
    told = isinstance(error, ImportError) and names
    return f"needs {' and '.join(dict.fromkeys(names))}" if told else ""


def _checked(
    model_class: type, variant: Variant, check: Callable[[nn.Module], Any], config: PreTrainedConfig
) -> nn.Module:
    """The model of this config, which passes `check`."""
    made = partial(build, model_class, gain=variant.gain)
    module = supplied(made, config) if variant.filled else made(config)
    check(module)
    return module


def default_config(model_type: str, **switched: bool) -> PreTrainedConfig:
    """The default config; one that names a backbone has transformers' own, which needs no other library.

    One that its own validator refuses has parts with the values that the validator asks for.
    """
    of = CONFIG_MAPPING[model_type]
    settings: dict[str, Any] = {**switched}
    for _ in range(MOST_TOLD):
        try:
            config = of(**settings)
            break
        except Exception as error:  # whatever a config's class raises
            if not (told := part_told(of, str(error))):
                raise
            for part, fields in told.items():
                settings[part] = {**settings.get(part, {}), **fields}
    else:
        config = of(**settings)
    if getattr(config, "backbone_config", None) is None:
        return config
    return of(use_timm_backbone=False, **settings)


def attention_switches(config: PreTrainedConfig) -> list[str]:
    """Fields that say attention by their name, and that are off."""
    return [name for name, value in vars(config).items() if value is False and SWITCH.search(name)]


def _class(name: str, config: PreTrainedConfig) -> Any:
    """The model class of this name; one that transformers does not show is in the file beside its config's."""
    if hasattr(transformers, name):
        return getattr(transformers, name)
    beside = type(config).__module__.replace(".configuration_", ".modeling_")
    return getattr(importlib.import_module(beside), name)


def _of_class(config: PreTrainedConfig, wanted: type | None) -> PreTrainedConfig:
    """The config itself, or the part of it that the model class takes (a multimodal model's text)."""
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [part for part in vars(config).values() if isinstance(part, wanted)]
    return parts[0] if parts else config


def build(model_class: type, config: PreTrainedConfig, gain: float = 2.0) -> nn.Module:
    """A random model: matrices with a standard deviation of 0.2, vectors moved off their trivial values.

    Kernels of convolutions make what they read about `gain` times as large.
    """
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > MOST_PARAMETERS:
        raise Unbuildable(f"{size:,} parameters after shrinking")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = model_class(config).float().eval()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d) and part.affine:
                part.weight.fill_(1.0)  # some begin near 0, and let nothing through
        for parameter in module.parameters():
            if parameter.is_floating_point():
                noise = torch.randn_like(parameter)
                if parameter.ndim < 2:
                    parameter.add_(0.1 * noise)
                elif parameter.ndim > 3:  # deep stacks of convolutions neither fade nor overflow
                    parameter.copy_(gain * noise / parameter[0].numel() ** 0.5)
                else:
                    parameter.copy_(0.2 * noise)
    return module


def shrunk(
    config: PreTrainedConfig,
    variant: Variant,
    narrowest: int = 0,
    wide: set[int] | None = None,
    image: int = 0,
) -> PreTrainedConfig:
    """A small config of the same class and kind.

    `narrowest` is the hidden size that becomes HIDDEN; `wide` are the widths of stages that the whole names, and
    `image` is the side of its images.
    """
    fields = {
        name: value
        for name, value in vars(config).items()
        if not name.startswith("_")
        and name not in ("transformers_version", "dtype", "ignore_keys_at_rope_validation")
    }
    fields = spelt(config, fields)
    if variant.divided or variant.told:
        fields = declared(config, fields)
    if variant.divided:
        wide = widths(config, variant.parts and variant.hidden == HIDDEN) if wide is None else wide
        image = image or max(image_sizes(config), default=0)
    n_layers, picks, total = _layers(fields, variant)
    hidden = narrowest or _hidden(fields)
    if variant.common and not narrowest:
        sizes = {_hidden(vars(x)) for x in fields.values() if isinstance(x, PreTrainedConfig)} - {0}
        narrowest = min((x for x in sizes if any(y > x and y % x == 0 for y in sizes)), default=0)
    tokens, by_name = Tokens(), of_library(fields)
    new: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            new[name] = towered(name, shrunk(value, variant, narrowest, wide, image))
        elif value is None or value == ():
            new[name] = next((v for pattern, v in UNSET if re.search(pattern, name)), value)
            if not new[name] and variant.filled:
                made = filled(name, fields, n_layers, config)
                new[name] = value if made is None else made
        elif isinstance(value, float) and re.search(r"(width|depth)_coefficient$", name):
            new[name] = min(value, 1.0)
        elif (
            name == "speaking_rate"
        ):  # random durations are long, and each frame is hundreds of samples
            new[name] = max(value, FAST)
        elif name == "hidden_dim" and fields.get("width_coefficient"):
            new[name] = int(value / max(fields["width_coefficient"], 1.0))  # the last width, of 1
        elif isinstance(value, (bool, str, float)):
            new[name] = value
        elif re.search(r"token_id$|token_index$|pad_idx$|pad_id$", name):
            new[name] = tokens.of(value)
        elif variant.parts and image and name.endswith(("feature_sizes", "feat_sizes")):
            new[name] = of_image(value, image, variant.image)
        elif by_name and isinstance(value, (list, tuple)) and "channel" in name:
            new[name] = value
        elif wide and (less := divided(name, value, wide)) != value:
            new[name] = less
        elif (part := name.removesuffix("attention_head_dim")) not in ("", name) and (
            value == fields.get(f"{part}hidden_size")
        ):  # a single head, as wide as what it reads
            new[name] = _number(f"{part}hidden_size", value, variant, n_layers, hidden)
        elif name == "head_dim" and value == fields.get("qk_rope_head_dim"):
            new[name] = 8
        elif isinstance(value, int):
            new[name] = _number(name, value, variant, n_layers, hidden)
        elif isinstance(value, Mapping):
            new[name] = _mapping(value, fields, variant)
        elif isinstance(value, (list, tuple)):
            new[name] = _list(name, value, variant, n_layers, picks, total, hidden)
        else:
            new[name] = value
    made_anew = ("id2label", "label2id", "stage_names")
    new = {name: value for name, value in new.items() if name not in made_anew}
    new |= fitting(fields, new)
    if "layer_types" in new:
        new["layer_types"] = of_every_kind(new["layer_types"], config)
    if narrowest and isinstance(
        new.get("num_attention_heads"), int
    ):  # as wide as in the narrowest part
        new["num_attention_heads"] *= max(1, _hidden(new) // HIDDEN)
    if variant.filled:  # and what is a tuple in a class is a list in the file of a checkpoint
        new = {name: list(v) if type(v) is tuple else v for name, v in new.items()}
        new |= _layerwise(config, new, variant, picks, hidden)
    if variant.rebuilt:
        made = type(config)(**new)
    else:
        made = config
        for name, value in new.items():
            setattr(made, name, value)
    made.use_cache = False
    return_stages(made, config, alone=not variant.divided)
    return made


def _hidden(fields: Mapping[str, Any]) -> int:
    """The hidden size that a config names, 0 if it names none."""
    names = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim")
    return next((v for n in names if isinstance(v := fields.get(n), int)), 0)


def _layerwise(
    config: PreTrainedConfig,
    new: Mapping[str, Any],
    variant: Variant,
    picks: list[int],
    hidden: int,
) -> dict[str, Any]:
    """Fields that hold for single layers, or for the layers of a kind."""
    rope = rope_of_types(new.get("layer_types"), new.get("rope_parameters"))
    made = (
        {}
        if rope is new.get("rope_parameters")
        else {"rope_parameters": _mapping(rope, new, variant)}
    )
    own = of_layers(config, picks)
    if own:
        made["per_layer_config"] = {
            layer: {
                name: _number(name, value, variant, len(picks), hidden)
                if type(value) is int
                else value
                for name, value in fields.items()
            }
            for layer, fields in own.items()
        }
    return made


def _layers(fields: Mapping[str, Any], variant: Variant) -> tuple[int, list[int], int]:
    """Number of layers to keep, which of the old ones they are, and how many there were.

    One layer of every kind that lists with an entry a layer (or lists of layers) tell apart.
    """
    names = (
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "encoder_layers",
        "decoder_layers",
    )
    total = next((fields[n] for n in names if isinstance(fields.get(n), int) and fields[n]), 0)
    lists = [
        value
        for value in fields.values()
        if isinstance(value, (list, tuple))
        and len(value) == total
        and total > 4
        and not all(isinstance(x, float) for x in value)
    ]
    lists += [
        [layer in value for layer in range(total)]
        for name, value in fields.items()
        if _of_layers(name, value, total)
    ]
    kinds: dict[str, list[int]] = {}
    for layer in range(total):
        kinds.setdefault(str([each[layer] for each in lists]), []).append(layer)
    shared = bool(fields.get("num_kv_shared_layers"))  # its kind comes among those before it too
    several = max(variant.of_each_kind, 1 + shared) if len(kinds) > 1 else 1
    picks = sorted(layer for same in kinds.values() for layer in same[:several])[:MOST_LAYERS]
    rest = (layer for layer in range(total) if layer not in picks)
    while len(picks) < min(variant.layers, total or variant.layers):
        picks.append(next(rest, len(picks)))
    return len(picks), sorted(picks), total


def _of_layers(name: str, value: Any, total: int) -> bool:
    return (
        re.search(r"(idxs|indices|layer_ids|_layers)$", name) is not None
        and isinstance(value, (list, tuple))
        and len(value) != total
        and bool(value)
        and all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < total for x in value)
    )


def _number(name: str, value: int, variant: Variant, n_layers: int, hidden: int) -> int:
    if name == "sliding_window":
        return min(value, variant.sliding)
    if variant.told and re.search(r"channels?$", name) and value >= MANY_CHANNELS:
        return variant.hidden
    if "group" in name and value == hidden:  # a convolution of every channel on its own
        return variant.hidden
    if variant.filled and name == "num_queries":  # a part may give each a position, and the ends
        return min(value, POSITIONS - 2)
    if variant.hidden != HIDDEN and hidden and SIZE.search(name):
        if 8 <= value < hidden and hidden % value == 0 and variant.hidden * value % hidden == 0:
            return variant.hidden * value // hidden
    for pattern, rule in RULES:
        if re.search(pattern, name):
            new = rule if isinstance(rule, int) else rule(value)
            if new == -1:
                return min(value, variant.kv_heads)
            if new == -2:
                return min(value, n_layers)
            if new == -4:
                return min(value, variant.patch)
            return variant.image if new == -3 else new
    if SIZE.search(name) and value >= 32:
        if hidden and value % hidden == 0 and value > hidden:  # twice the hidden size and the like
            return variant.hidden * min(value // hidden, 4)
        return min(value, variant.hidden)
    return value


def _mapping(
    value: Mapping[Any, Any], fields: Mapping[str, Any], variant: Variant
) -> dict[Any, Any]:
    """Rotary settings: sections that add up to half the rotated part of a head."""
    new = {
        key: _mapping(x, fields, variant) if isinstance(x, Mapping) else x
        for key, x in value.items()
    }
    if "original_max_position_embeddings" in new:
        new["original_max_position_embeddings"] = POSITIONS
    if "mrope_section" in new or (variant.sections and "rope_theta" in new):
        part = new.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0
        half = int(D_HEAD * part) // 2
        third, rest = half // 3, half - 2 * (half // 3)
        new["mrope_section"] = [third, third, rest] if variant.filled else [rest, third, third]
    return new


def _list(
    name: str,
    value: Any,
    variant: Variant,
    n_layers: int,
    picks: list[int],
    total: int,
    hidden: int,
) -> Any:
    """Per-layer lists cut to the kept layers; sizes of stages scaled together."""
    kind = type(value) if type(value) in (list, tuple) else list
    if total > 4 and len(value) == total:
        kept = [value[layer] for layer in picks]
        if all(isinstance(x, int) and not isinstance(x, bool) for x in kept):
            return kind(_number(name, x, variant, n_layers, hidden) for x in kept)
        return kind(kept)
    if _of_layers(name, value, total):
        return kind(picks.index(layer) for layer in value if layer in picks)
    if not value or not all(isinstance(x, int) and not isinstance(x, bool) for x in value):
        return value
    if sum(value) == hidden and all(HIDDEN * x % hidden == 0 for x in value):
        return kind(HIDDEN * x // hidden for x in value)  # parts of the hidden size
    if "image_size" in name:
        least = min(value)  # twice as high as wide stays so
        return kind(variant.image * (x // least if x % least == 0 else 1) for x in value)
    if "channels" in name and set(value) == {hidden}:  # what reads or makes the stream itself
        return kind([min(hidden, HIDDEN)] * len(value))
    if re.search(r"depth|num_blocks|block_repeats", name):
        return kind(min(x, max(2, variant.layers - 1)) for x in value)
    if re.search(r"hook_ids$", name):  # layers whose outputs are read
        return kind(min(x, variant.layers - 1) for x in value)
    if "heads" in name:
        return kind(max(1, x // min(value)) for x in value)
    if variant.stages and WIDTHS.search(name):
        return kind(8 * max(1, -(-2 * x // min(value))) for x in value)
    return value
