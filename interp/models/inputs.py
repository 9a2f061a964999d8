"""Random sound, video or other numbers in a shape that a model's own forward takes.

Shapes follow from sizes that configs name alike in every model, and from what the layer that failed
wanted; the first with which the forward works is kept, with the masks that the forward cannot do without.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import permutations
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from interp.errors import BadInput, Refused
from interp.models.calls import (
    FAILURES,
    call_model,
    is_encoder_decoder,
    main_input,
    parameters_of,
    required_inputs,
)
from interp.models.clips import ROWS, clip_shapes, sizes
from interp.models.companions import as_weights, needed, with_companions
from interp.models.examples import give, told
from interp.models.frames import OneFrame, one_frame
from interp.models.grids import inputs_known
from interp.models.images import ANY_SIDES, random_images
from interp.models.polarity import right_way
from interp.models.spec import module_device
from interp.models.wants import SAMPLES, Fault, tried
from interp.run.batch import Batch

FRAMES = 72
"""0.4 s at 16 kHz; frames for models that take any number: several positions after pooling by 8."""
SECONDS = 200
"""Two seconds of frames: for models that cut sound into parts of a quarter, a half or a whole one."""
BINS = (
    "num_mel_bins",
    "input_feat_per_channel",
    "feature_size",
    "feature_projection_input_dim",
    "input_feat_size",
    "input_size",
)
CHANNELS = ("num_input_channels", "input_size")
"""Of a time series, as long as the config's context."""
MOST_FRAMES = ("max_source_positions", "max_length", "max_position_embeddings")
WAVES = (ROWS, SAMPLES)
UNKNOWN = (ROWS, FRAMES, FRAMES - 1)
"""Of these the first layer says how many bins it wants; in the second two axes that can be told apart."""
RETURNS = "returns"
IN_ONE = "returns all rows in one,"

_known: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


def numbers_taken(
    module: nn.Module, name: str, others: dict[str, Tensor]
) -> dict[str, Float[Tensor, "row ..."]]:
    """Random numbers as the model's input `name`, in the first shape with which its forward works.

    A clip of one frame is tried last, and taken down in `frames.one_frame`.

    Args:
        others: the other inputs that the forward gets, such as an encoder-decoder's target.

    Returns:
        the numbers by `name`, masks of ones that its forward requires, and what else it needs.

    Raises:
        Refused: it works with none; with why the likeliest shape failed.
    """
    if module in _known:
        return as_weights(module, _known[module])
    waiting = list(dict.fromkeys(_shapes(module, name)))
    reasons: dict[tuple[int, ...], str] = {}
    shaped: list[dict[str, Tensor]] = []
    in_one: list[dict[str, Tensor]] = []
    while waiting:
        shape = waiting.pop(0)
        for masks in _masks(module, name, shape):
            made = {name: _numbers(module, shape), **masks}
            channels, why = _wanted(module, _batch(module, made, others))
            if masks and re.search(r"\bbool", why):  # it takes no other masks
                made |= {n: mask.bool() for n, mask in masks.items()}
                channels, why = _wanted(module, _batch(module, made, others))
            if not why:
                made = right_way(module, name, made, others)
                _known[module] = _with_future(module, made)
                return numbers_taken(module, name, others)
            if why.startswith(IN_ONE):
                in_one.append(made)
            if shape not in reasons or why.startswith(RETURNS):
                reasons[shape] = why
            if shape in (WAVES, UNKNOWN):
                moved = _moved(shape, *channels)
                waiting += [other for other in moved if other not in (*reasons, *waiting)]
            waiting += [x for x in _reshaped(shape, why) if x not in (*reasons, *waiting)]
            if "conv2d" in why:
                images = _pictures(module, _batch(module, made, others))
                waiting += [other for other in images if other not in (*reasons, *waiting)]
            if multiple := re.search(r"multiple of (\d+)", why):
                least = int(multiple[1])
                whole = (*shape[:-1], -(-shape[-1] // least) * least)
                waiting += [whole] if least and whole not in (*reasons, *waiting) else []
            fails = not why.startswith((RETURNS, IN_ONE))
            if fails and channels == (0, 0):  # no layer wanted more: another input may be missing
                shaped.append(made)
    for made in shaped:
        batch = with_companions(module, Batch.of_inputs({**made, **others}))
        if module in needed:
            taken = {given: x for given, x in batch.inputs.items() if given not in others}
            _known[module] = _with_future(module, taken)
            return numbers_taken(module, name, others)
    if in_one:
        _known[module] = in_one[0]
        return numbers_taken(module, name, others)
    if (made := _of_one_frame(module, name, others, reasons)) is not None:
        _known[module] = made
        return numbers_taken(module, name, others)
    if kind := _no_tensor(module, name):
        raise Refused(
            f"{type(module).__name__} takes '{name}', which by its signature is no tensor but {kind}; {give(name)}; "
            f"or {_parts_that_are_models(module)}"
        )
    shape, why = max(reasons.items(), key=lambda each: each[1].startswith(RETURNS))
    raise Refused(
        f"{type(module).__name__} takes '{name}', and its forward works with none of the {len(reasons)} "
        f"shapes of random input that were tried (of {shape}: {why}); wanted: one with a row for each input in "
        f"what is returned; {give(name)}; or {_parts_that_are_models(module)}"
    )


def _of_one_frame(
    module: nn.Module,
    name: str,
    others: dict[str, Tensor],
    reasons: dict[tuple[int, ...], str],
) -> dict[str, Tensor] | None:
    """A clip of one frame with which the forward works, where none of several did, for these reasons; or None."""
    for several, axis in clip_shapes(module, name):
        told = OneFrame(name, axis, several, reasons[several])
        if told.shape in reasons:  # tried before
            continue
        for masks in _masks(module, name, told.shape):
            made = {name: _numbers(module, told.shape), **masks}
            if not _wanted(module, _batch(module, made, others))[1]:
                one_frame[module] = told
                return made
    return None


def _no_tensor(module: nn.Module, name: str) -> str:
    """What a forward says that this input is, where that holds no tensor; "" where it does, or nothing is said."""
    parameter = parameters_of(module).get(name)
    said = inspect.Parameter.empty if parameter is None else parameter.annotation
    told = said if isinstance(said, str) else inspect.formatannotation(said)
    if said is inspect.Parameter.empty or "Tensor" in told or told.endswith("Any"):
        return ""
    return told.rsplit(".", 1)[-1] if isinstance(said, type) else told


def _parts_that_are_models(module: nn.Module) -> str:
    """What can be passed instead: the outermost parts that have a config of their own and read tensors."""
    parts: list[str] = []
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in parts)
        model = name and not inside and isinstance(part, PreTrainedModel)
        if model and not _no_tensor(part, main_input(part)):
            parts.append(name)
    if not parts:
        return "no part of it is a model that could be passed instead"
    return f"pass a part that is a model of its own: {', '.join(parts)}"


def check_kind(module: nn.Module, data: Any) -> None:
    """BadInput where a model of sound, images or video is given something else, or numbers of other axes."""
    main = main_input(module)
    if main == "input_ids":
        return
    named = {**data.inputs, **data.objects} if isinstance(data, Batch) else data
    named = named if isinstance(named, Mapping) else {"input_ids": named}
    read = parameters_of(module)
    if main not in named and not any(n in read and not n.endswith("mask") for n in named):
        given = "text" if isinstance(data, (str, list, tuple)) else ", ".join(named)
        after = ', "decoder_input_ids": …' if is_encoder_decoder(module) else ""
        raise BadInput(
            f"{type(module).__name__} reads '{main}' and was given {given}: "
            f'model.run({{"{main}": …{after}}}); what takes prompts of text cannot be done here'
        )
    known, x = _known.get(module), named.get(main)
    if known is None or x is None or main not in known:  # a model may take tokens by two names
        return
    shape = tuple(known[main].shape)
    if x.ndim != len(shape) or not x.is_floating_point():
        raise BadInput(
            f"'{main}' has shape {tuple(x.shape)} and type {x.dtype}; {type(module).__name__} reads "
            f"floating-point numbers of {len(shape)} axes, such as {shape}"
        )


@contextmanager
def faults_of_input(module: nn.Module, batch: Batch) -> Iterator[None]:
    """Inside, a failure that the model by itself has on this batch too is a BadInput: what it lacks, or its shape."""
    try:
        yield
    except FAILURES as error:
        name = main_input(module)
        patches = inputs_known(module)
        known = _known.get(module) or needed.get(module) or patches
        if batch.objects:
            _check_objects(module, batch)
        if lacking := set(required_inputs(module)) - {*batch.inputs, *batch.objects}:
            known = known or (random_images(module) if name == "pixel_values" else {})
            like = {n: f", such as {tuple(known[n].shape)}" for n in lacking & known.keys()}
            raise BadInput(
                f"{type(module).__name__} was given {', '.join([*batch.inputs, *batch.objects])}; "
                "its forward requires besides "
                + " and ".join(f"'{n}'{like.get(n, '')}" for n in sorted(lacking))
            ) from error
        missing = [given for given in known if given not in batch.inputs]
        x = batch.inputs.get(name) if name in known and (module in _known or not missing) else None
        why = _wanted(module, batch)[1] if x is not None or missing or patches else ""
        if not why or why.startswith(IN_ONE):
            raise
        besides = [f"'{n}' {tuple(m.shape)}" for n, m in known.items() if n != name]
        if x is None:
            raise BadInput(
                f"{type(module).__name__} fails on {', '.join(batch.inputs)}: {why}; it works with "
                + ", ".join(f"'{n}' {tuple(m.shape)}" for n, m in known.items())
            ) from error
        raise BadInput(
            f"{type(module).__name__} fails on '{name}' of shape {tuple(x.shape)}, type {x.dtype}: {why}; "
            f"it works on shape {tuple(known[name].shape)}, type {_type(module, known[name])}"
            + ", with ".join(["", *besides])
        ) from error


def _check_objects(module: nn.Module, batch: Batch) -> None:
    """BadInput where the model by itself fails on a batch with inputs that are no tensors."""
    try:
        with torch.no_grad():
            call_model(module, batch)
    except FAILURES as error:
        raise BadInput(
            f"{type(module).__name__} fails on {batch}: {told(error)}; it works on the example that it was opened on"
        ) from error


def _type(module: nn.Module, x: Tensor) -> torch.dtype:
    """The type of an input: numbers have that of the model's weights."""
    return next(module.parameters()).dtype if x.is_floating_point() else x.dtype


def _masks(module: nn.Module, name: str, shape: tuple[int, ...]) -> Iterator[dict[str, Tensor]]:
    """The masks that the forward requires, all ones: of the frames on the second axis, or on the last; no padding.

    Then the input's own mask besides, which a signature may leave open although the forward needs it.
    """
    parameters = parameters_of(module)
    ends = ("mask", "padding")
    required = [n for n, p in parameters.items() if p.default is p.empty and n.endswith(ends)]
    own = f"{name}_mask"
    open_ = own in parameters and own not in required
    for names in (required, [*required, own]) if open_ else (required,):
        for frames in dict.fromkeys((shape[1], shape[-1]) if names else (0,)):
            ones = torch.ones(shape[0], frames, dtype=torch.long)
            yield {n: ones.clone() if n.endswith("mask") else 0 * ones for n in names}


def _shapes(module: nn.Module, name: str) -> Iterator[tuple[int, ...]]:
    """Video where frames are told or the name says it; spectrograms where bins are, waves, anything."""
    yield from (shape for shape, _ in clip_shapes(module, name))
    config = getattr(module, "config", None)
    lengths = [n for size in sizes(config, MOST_FRAMES) for n in (size, 2 * size, size // 2)]
    for bins in sizes(config, BINS):
        for frames in (FRAMES, *lengths, SECONDS):
            yield ROWS, frames, bins
            yield ROWS, bins, frames
    lags = getattr(config, "lags_sequence", None) or ()
    for length in sizes(config, ("context_length",)):
        for channels in sizes(config, CHANNELS):
            for size in dict.fromkeys((length, length + max(lags, default=0))):
                yield from ((ROWS, size, channels), (ROWS, size))
    yield WAVES
    yield ROWS, 1, SAMPLES
    yield UNKNOWN


def _with_future(module: nn.Module, made: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs; of a series' past also its future, as long as the config predicts, where a decoder reads that.

    Without it the decoder has a single position, or none.
    """
    length = getattr(getattr(module, "config", None), "prediction_length", None)
    names = {name: name.replace("past_", "future_") for name in made if name.startswith("past_")}
    taken = parameters_of(module)
    if not isinstance(length, int):
        return made
    more = {names[n]: x[:, -length:] for n, x in made.items() if names.get(n) in taken}
    (without, _), (beside, _) = (tried(module, _batch(module, x)) for x in (made, {**made, **more}))
    if without is None or beside is None or without.shape == beside.shape:
        return made
    return {**made, **more}


def _numbers(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Spectrograms without negative numbers: some models take the first for indices of a table."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    numbers = numbers.abs() if len(shape) == 3 else numbers
    return numbers.to(next(module.parameters()).dtype)


def _batch(module: nn.Module, *inputs: Mapping[str, Tensor]) -> Batch:
    merged = {name: x for each in inputs for name, x in each.items()}
    return Batch.of_inputs(merged).to(module_device(module))


def _wanted(module: nn.Module, batch: Batch) -> tuple[tuple[int, int], str]:
    """(how many channels the layer that failed got and wanted, why the forward failed); why is "" if it works."""
    made, fault = tried(module, batch)
    if made is None:
        return fault.channels, fault.why[:120]
    if made.ndim < 2 or made.shape[0] != batch.size:
        one = made.ndim == 2 and made.shape[0] % batch.size == 0
        return (0, 0), f"{IN_ONE if one else RETURNS} {tuple(made.shape)} for {batch.size} rows"
    return (0, 0), ""


def _pictures(module: nn.Module, batch: Batch) -> list[tuple[int, ...]]:
    """Shapes of images with as many channels as the convolution over rows and columns reads that failed."""
    _, fault = tried(module, batch)
    layer = fault.inside[-1][0] if fault.inside else None
    channels = layer.in_channels if isinstance(layer, nn.Conv2d) else 0
    return [(ROWS, channels, side, side) for side in ANY_SIDES if channels]


def _reshaped(shape: tuple[int, ...], why: str) -> list[tuple[int, ...]]:
    """The shapes that a failure outside of layers asks for: another size on an axis, or spectrograms of one channel.

    >>> _reshaped((2, 72, 71), "Expected size 64 but got size 71 for tensor number 1 in the list.")
    [(2, 72, 64)]
    >>> _reshaped((2, 72, 32), "Dimension out of range (expected to be in range of [-3, 2], but got 3)")
    [(2, 1, 72, 32)]
    """
    if len(shape) == 3 and "in range of [-3, 2], but got 3" in why:
        return [(shape[0], 1, *shape[1:])]
    return [
        (*shape[:-1], wanted)
        for got, wanted in permutations(Fault(why).lengths, 2)
        if shape[-1] == got
    ]


def _moved(shape: tuple[int, ...], got: int, wanted: int) -> list[tuple[int, ...]]:
    """The shapes with one axis behind the rows as much longer as the layer wanted more, the last one first.

    By as many channels, or as many times: convolutions and folds make several channels of one, or one of
    several, rounding up (so to a multiple of 8).
    """
    return [
        (*shape[:axis], size, *shape[axis + 1 :])
        for axis in reversed(range(1, len(shape)))
        for size in (shape[axis] + wanted - got, -(-shape[axis] * wanted // max(got, 1) // 8) * 8)
        if wanted != got and size > 0
    ]
