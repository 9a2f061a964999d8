"""What a forward needs besides its main input: tokens, an image, sound, boxes or masks, by the names of its parameters.

Parameters that its signature requires are given; of those that it leaves open as few as make it work,
found by trying. Text alone is tried first, where the forward takes text; images are tried one by one, then
several a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations, islice
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from jaxtyping import Int
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.calls import main_input, parameters_of, text_config
from interp.models.clips import clip_shapes
from interp.models.examples import give
from interp.models.images import otherwise_cut, random_images
from interp.models.spec import module_device
from interp.models.wants import SAMPLES, told_by_layers, tried
from interp.run.batch import Batch

PROBE_ROWS, PROBE_LENGTH = 2, 7
OPTIONAL = (
    "input_ids",
    "bbox",
    "pixel_values",
    "input_features",
    "pixel_values_videos",
    "input_values",
    "image_attention_mask",
    "image_embeds_position_mask",
    "pixel_attention_mask",
)
"""Parameters that a signature may leave open although the forward needs them, the likeliest first."""
MOST, TRIALS = 3, 80
"""How many of them are tried together, and how often in all."""
TOKENS_AN_IMAGE = ("latent_query_num", "num_query_tokens", "image_seq_length")
BINS = ("num_mel_bins", "feature_size")
FRAMES_A_TOKEN = (1, 2, 4, 8, 16)
needed: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
"""Of models that were not content with their main input: what their forward works with."""
_wanting: WeakSet[nn.Module] = WeakSet()
"""Models with whose main input nothing was found to work."""


def with_companions(module: nn.Module, batch: Batch) -> Batch:
    """The batch with the inputs that the model's forward needs besides.

    Where none are found to help it has those that the signature requires, if any are known, and is else as it was.
    """
    if module in needed:
        return Batch.of_inputs(as_weights(module, needed[module]))
    read = parameters_of(module)
    required = [
        name
        for name, parameter in read.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name not in ("self", *batch.inputs)
    ]
    optional = [
        name for name in OPTIONAL if name in read and name not in (*batch.inputs, *required)
    ]
    made, fault = tried(module, batch.to(module_device(module)))
    if not required and made is not None and made.ndim > 1:
        return batch
    named = [name for name in optional if re.search(rf"\b{name}\b", fault.why)]
    for inputs in islice(_trials(module, batch, required, optional, named), TRIALS):
        if _works(module, Batch.of_inputs(inputs)):
            needed[module] = inputs
            return with_companions(module, batch)
    told = told_by_layers(module, batch.inputs, main_input(module))
    if told is not None:
        needed[module] = told
        return with_companions(module, batch)
    counted = {name: x for name in required for x in _counts(module, name, batch.inputs)}
    others = [name for name in required if name not in counted]
    known = Batch.of_inputs({**batch.inputs, **counted})

    def trials() -> Iterator[dict[str, Tensor]]:
        return islice(_trials(module, known, others, optional, named), TRIALS)

    for inputs in trials() if counted else ():
        if _works(module, Batch.of_inputs(inputs)):
            needed[module] = inputs
            return with_companions(module, batch)
    _wanting.add(module)
    # Why it fails with all that it requires says more than that something is missing.
    whole = (x for x in trials() if required and all(name in x for name in required))
    inputs = next(whole, None)
    return batch if inputs is None else Batch.of_inputs(inputs)


def with_vectors(module: nn.Module, batch: Batch) -> Batch:
    """The batch with random vectors in place of tokens, where no companions helped and the forward works on such."""
    if module not in _wanting or batch.has_source or "input_ids" not in batch.inputs:
        return batch
    width = getattr(text_config(module), "hidden_size", None)
    read = parameters_of(module)
    if "inputs_embeds" in read and isinstance(width, int):
        x = torch.randn(*batch.ids.shape, width, generator=torch.Generator().manual_seed(2))
        inputs = as_weights(module, {"inputs_embeds": x})
        if _works(module, Batch.of_inputs(inputs)):
            needed[module] = inputs
            return with_companions(module, batch)
    return batch


def _counts(module: nn.Module, name: str, inputs: dict[str, Tensor]) -> Iterator[Tensor]:
    """How many of something each row has, of a parameter that nothing else is made for: one; of lengths a wave's."""
    if next(_made(module, name, inputs), None) is None:
        yield torch.full((PROBE_ROWS,), SAMPLES if name.endswith("lengths") else 1)


def as_weights(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of these inputs, numbers in the type that the model's weights have now."""
    dtype = next(module.parameters()).dtype
    return {
        name: x.to(dtype, copy=True) if x.is_floating_point() else x.clone()
        for name, x in inputs.items()
    }


def _trials(
    module: nn.Module, batch: Batch, required: list[str], optional: list[str], named: list[str]
) -> Iterator[dict[str, Tensor]]:
    """Inputs to try: text alone, then the main input with the required ones and as few others as may be.

    Several that the failure of the main input alone names are tried together before.
    """
    main = main_input(module)
    parameter = parameters_of(module).get(main)
    if "input_ids" in optional and parameter is not None and parameter.default is None:
        yield {"input_ids": random_ids(module, PROBE_LENGTH)}
    given = [batch.inputs]
    if main == "pixel_values":
        given += [{**batch.inputs, main: x} for x in _made(module, main, batch.inputs)][1:]
        cut = otherwise_cut(module, batch.inputs[main]) if main in batch.inputs else ()
        given += [{**batch.inputs, main: x} for x in cut]
    if len(named) > 1:
        yield from _filled(module, [*required, *named], batch.inputs)
    for inputs in given:
        for count in range(MOST + 1):
            for some in combinations(optional, count):
                yield from _filled(module, [*required, *some], inputs)


def _filled(
    module: nn.Module, names: list[str], inputs: dict[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """The inputs with every choice of tensors for these names, each made to fit those before it."""
    if not names:
        yield inputs
        return
    for x in _made(module, names[0], inputs):
        yield from _filled(module, names[1:], {**inputs, names[0]: x})


def _made(module: nn.Module, name: str, inputs: dict[str, Tensor]) -> Iterator[Tensor]:
    """Tensors that a parameter of this name may take, beside these inputs."""
    config: Any = getattr(module, "config", None)
    ids = inputs.get("input_ids")
    length = PROBE_LENGTH if ids is None else ids.shape[1]
    generator = torch.Generator().manual_seed(2)
    dtype = next(module.parameters()).dtype
    counts = [n for key in TOKENS_AN_IMAGE for n in _values(config, key)]
    if name.endswith("input_ids"):
        for longer in (0, *(counts if name == "input_ids" else ())):
            part = name.removesuffix("input_ids")
            yield random_ids(module, PROBE_LENGTH + longer, part, of_parts=True)
    elif name == "pixel_values":
        images = [random_images(module)["pixel_values"]]
        least = min(images[0].shape[-2:])  # square, where the model puts several into one
        for side in dict.fromkeys((*_values(config, "image_size"), least)):  # of a part of a part
            shape = (*images[0].shape[:-2], side, side)
            if shape != images[0].shape:
                images.append(torch.randn(shape, generator=generator).to(dtype))
        for pixels in images:  # one image, several or two a row
            yield from (pixels, pixels[:, None], torch.stack([pixels, pixels.flip(0)], 1))
    elif name == "input_values":  # a wave
        x = torch.randn(PROBE_ROWS, SAMPLES, generator=generator).to(dtype)
        yield from (x, x[:, None])
    elif name.endswith("videos"):
        for shape, _ in clip_shapes(module, name):
            yield torch.randn(shape, generator=generator).to(dtype)
    elif name.endswith(("pixel_values", "_masks")) and "pixel_values" in inputs:  # of its shape
        yield torch.randn(inputs["pixel_values"].shape, generator=generator).to(dtype)
    elif name == "bbox":  # left, top, right, bottom: parts of a page
        corners = torch.rand(PROBE_ROWS, length, 2, 2, generator=generator)
        yield corners.sort(dim=2).values.flatten(2).to(dtype)
    elif name == "input_features":
        bins = next((n for key in BINS for n in _values(config, key)), 0)
        for frames in FRAMES_A_TOKEN if bins else ():
            x = torch.randn(PROBE_ROWS, length * frames, bins, generator=generator).to(dtype)
            yield from (x, x.mT.contiguous(), x[:, None])
    elif name.endswith("position_mask"):  # 1 where an image's vectors stand in place of tokens
        for n in counts:
            mask = torch.zeros(PROBE_ROWS, length, dtype=torch.long)
            mask[:, 1 : 1 + n] = 1
            yield mask
    elif name == "image_attention_mask":
        yield torch.ones(PROBE_ROWS, length, 1, dtype=torch.long)
    elif name == "pixel_attention_mask":  # of images
        yield torch.ones(PROBE_ROWS, 1, dtype=torch.bool)
    elif name.endswith("mask"):
        yield torch.ones(PROBE_ROWS, length, dtype=torch.long)
    elif name.endswith("_inputs"):  # its own name tells the length: task_inputs, task_seq_len
        for n in _values(config, f"{name.removesuffix('_inputs')}_seq_len"):
            yield torch.randn(PROBE_ROWS, n, generator=generator).to(dtype)


def probe_length(module: nn.Module) -> int:
    """How many token ids to probe with: PROBE_LENGTH, or as many after a model has made one position of several."""
    config: Any = getattr(module, "config", None)
    return PROBE_LENGTH * next(_values(config, "downsampling_rate"), 1)


def random_ids(
    module: nn.Module, length: int, part: str = "", seed: int = 0, of_parts: bool = False
) -> Int[Tensor, "row pos"]:
    """Token ids that are no special token's, of the text or of the part of the config called `part`.

    `of_parts`: the smallest vocabulary that a part of the config names will do.
    """
    config: Any = getattr(getattr(module, "config", None), f"{part}config", None)
    config = text_config(module) if config is None else config
    d_vocab = getattr(config, "vocab_size", None)
    if d_vocab is None and of_parts:
        d_vocab = min(_values(config, "vocab_size"), default=None)
    if d_vocab is None:  # characters of any number, hashed to so many vectors
        d_vocab = next(_values(config, "num_hash_buckets"), None)
    if d_vocab is None:
        raise Refused(
            f"{type(module).__name__} reads neither tokens nor pixels that its config describes; {give()}"
        )
    special = {
        value
        for of in (config, text_config(module), getattr(module, "config", config))
        for key, value in of.to_dict().items()
        if key.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    usable = torch.tensor([i for i in range(d_vocab) if i not in special] or [0])
    generator = torch.Generator().manual_seed(seed)
    return usable[torch.randint(len(usable), (PROBE_ROWS, length), generator=generator)]


def _works(module: nn.Module, batch: Batch) -> bool:
    made, _ = tried(module, batch.to(module_device(module)))
    return made is not None and made.ndim > 1


def _values(config: Any, name: str) -> Iterator[int]:
    """What a config and its parts call by this name."""
    if isinstance(value := getattr(config, name, None), int):
        yield value
    for part in vars(config).values() if config is not None else ():
        if type(part).__name__.endswith("Config"):
            yield from _values(part, name)
