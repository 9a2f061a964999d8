"""Discover where a model's parts are from one probe forward, then verify it with identities.

Nothing here, in `discover` or in `verify` knows an architecture. What cannot be verified is refused by
name, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from interp.errors import BadInput, Refused
from interp.models import attention, lengths
from interp.models.calls import (
    FAILURES,
    call_model,
    drawing,
    has_tokens,
    is_encoder_decoder,
    main_input,
    output_tensor,
    text_config,
)
from interp.models.chunks import in_chunks
from interp.models.codebooks import with_codebooks
from interp.models.companions import probe_length, random_ids, with_companions, with_vectors
from interp.models.discover import discover
from interp.models.exact import exact_instead
from interp.models.examples import give, told
from interp.models.find_own import find_own
from interp.models.find_stack import SeveralStacks, is_within
from interp.models.forwards import find_called
from interp.models.grids import packed_patches
from interp.models.images import random_images
from interp.models.inputs import numbers_taken
from interp.models.kernels import apart, between_kernels, eager_instead, logits_of
from interp.models.named import is_heard, last_returned
from interp.models.other_inputs import with_fitted
from interp.models.own_attention import own
from interp.models.recording import Recording, record
from interp.models.relative import relative_error, relative_tolerance
from interp.models.spec import Spec, module_device
from interp.models.tables import room_for_positions
from interp.models.verify import verify
from interp.run.batch import Batch

PROBE_TARGET = 5


def probe(module: nn.Module, batch: Batch | None = None, called: str | None = None) -> Spec:
    """The verified map of `module`.

    Args:
        module: a Hugging Face model in eval mode.
        batch: what to probe with; random tokens or pixels of the config's shape if not given.
        called: of a model with several stacks of blocks, the one that is wanted.

    Raises:
        BadInput: the forward fails on `batch`, or no stack is called so. Refused: it fails on what is made up, or no
            stack of blocks can be made out.
    """
    made_up = batch is None
    batch = (probe_batch(module) if batch is None else batch).to(module_device(module))
    with torch.no_grad():
        with _works(module, batch, made_up):
            plain = output_tensor(_noted_if_drawing(module, batch))
        if not bool(plain.isfinite().all()):  # nothing can be compared, or solved for
            raise BadInput(
                f"{type(module).__name__} returns NaN or infinite values on the probe: check its weights, or open it "
                "in another dtype"
            )
        seen = record(module, batch)
        if find_called(module, partial(call_model, module, batch), seen.calls):
            seen = record(module, batch)
        seen = _at_once(module, batch, seen)
        if not seen.attention:
            why = find_own(module, batch)
            seen = replace(seen if why else record(module, batch), without=why)
        # Masks as eager attention gets them, and its softmax: the first that is what the model was wrong without.
        for wrong in (attention.needs_masks, attention.softmax_in_float32):
            if relative_error(seen.output, plain)[0] > relative_tolerance(plain.dtype):
                seen = _told_apart(wrong, module, batch, seen, plain)
        attending = (seen.names[call.module] for call in seen.attention)
        if called is not None and not any(is_within(name, called) for name in attending):
            seen = _with_own(module, batch, seen)
        try:
            mapped, seen = _discovered(module, batch, called, seen)
        except FAILURES as error:
            if why := lengths.follow_values(seen, module, batch):
                raise Refused(why) from error
            raise
        mapped = with_fitted(mapped, seen, batch)
        if first := first_position(module, batch, plain):
            n_ctx = None if mapped.n_ctx is None else mapped.n_ctx - first
            mapped = replace(mapped, first_position=first, n_ctx=n_ctx)
        if mapped.n_ctx and has_tokens(module, batch):
            room = room_for_positions(module, batch)
            mapped = replace(mapped, n_ctx=min(mapped.n_ctx, room or mapped.n_ctx))
        if mapped.named or not (mapped.unembedding or mapped.readout):
            mapped = replace(mapped, heard=is_heard(mapped.blocks[-1].returns, seen, batch))
        # Of one stack of several, or where no match is found, what the model returns says little.
        few = 2 * int(plain.count_nonzero()) < plain.numel()
        with_ends = mapped.named or few or not mapped.heard
        told = partial(_with_ends, mapped) if with_ends else logits_of
        own = [plain, *(last_returned(mapped, module, batch) if with_ends else [])]
        spec = verify(mapped, seen, plain, ends=own[1:])
        failed = {check.name for check in spec.checks if not check.passed}
        if failed & {"window", "stack"}:
            if not torch.equal(output_tensor(call_model(module, batch)), plain):
                raise Refused(
                    f"{type(module).__name__} returns something else at every call on the same inputs "
                    "whatever the state of torch's generator: no two runs can be compared"
                )
            if plain.dtype in (torch.bfloat16, torch.float16):
                between = between_kernels(module, batch, told)
                return verify(mapped, seen, plain, between, ends=own[1:])
            ends = [call.output for call in seen.calls[mapped.blocks[-1].returns]]
            shown = [seen.output, *(x for x in ends if with_ends and x is not None)]
            if (eager := eager_instead(module, batch, shown, told)) is not None:
                of = "that of its eager attention"
                return replace(
                    verify(mapped, seen, eager[0], of=of, ends=eager[1:]),
                    between_kernels=apart(own, eager),
                )
            if "window" in failed and (exact := exact_instead(module, batch, seen)) is not None:
                of = "the model's own where both are computed in float64"
                return replace(
                    verify(mapped, seen, exact[1], of=of, ends=own[1:], shown=exact[0]),
                    in_float64=relative_error(seen.output, plain)[0],
                )
        return spec


def _noted_if_drawing(module: nn.Module, batch: Batch) -> Any:
    """What the model returns; one that moves torch's generator is noted as `drawing`, however little it makes of it."""
    before = _generators(module)
    output = call_model(module, batch)
    if all(map(torch.equal, before, _generators(module))):
        return output
    drawing.add(module)
    return call_model(module, batch)


def _generators(module: nn.Module) -> list[Tensor]:
    """The states of torch's generators that a forward draws from."""
    place = module_device(module)
    on_gpu = [torch.cuda.get_rng_state(place)] if place.type == "cuda" else []
    return [torch.get_rng_state(), *on_gpu]


@contextmanager
def _works(module: nn.Module, batch: Batch, made_up: bool) -> Iterator[None]:
    """Inside, a failure of the forward is a BadInput, of an example; of what the probe made up it is Refused."""
    try:
        yield
    except FAILURES as error:
        name, why = type(module).__name__, told(error)
        if made_up:
            raise Refused(
                f"{name} fails on what was made up for it, {batch}: {why}; {give()}"
            ) from error
        raise BadInput(
            f"{name} fails on the example {batch}: {why}; wanted: inputs by name with which its own forward works"
        ) from error


def _discovered(
    module: nn.Module, batch: Batch, called: str | None, seen: Recording
) -> tuple[Spec, Recording]:
    """The map and the recording it is of: where there are several stacks, one with modules' own attention too."""
    try:
        return discover(seen, batch, called), seen
    except SeveralStacks:
        again = _with_own(module, batch, seen)
        if again is seen:
            raise
        return discover(again, batch, called), again


def _with_ends(mapped: Spec, module: nn.Module, batch: Batch) -> list[Tensor]:
    """What the model returns, and what the last block of the stack does, call by call."""
    return [*logits_of(module, batch), *last_returned(mapped, module, batch)]


def _at_once(module: nn.Module, batch: Batch, seen: Recording) -> Recording:
    """The recording with all chunks in one attention call, of modules that attend to them one after the other."""
    attends = Counter(call.module for call in seen.attention if len(call.tensors["q"]) == 1)
    chunked = {part for part, n in attends.items() if n > len(seen.calls.get(seen.names[part], []))}
    in_chunks.update(chunked)
    if not chunked:
        return seen
    with suppress(*FAILURES):
        again = record(module, batch)
        apart, _ = relative_error(again.output, seen.output)
        if len(again.attention) < len(seen.attention) and apart <= relative_tolerance(
            seen.output.dtype
        ):
            return again
    in_chunks.difference_update(chunked)
    return seen


def _with_own(module: nn.Module, batch: Batch, seen: Recording) -> Recording:
    """The recording with attention that some modules compute themselves, where others call the interface."""
    known = {call.module for call in seen.attention}
    if not known or any(part in own for part in known) or find_own(module, batch, known):
        return seen
    return record(module, batch)


def _told_apart(
    apart: WeakSet[nn.Module], module: nn.Module, batch: Batch, seen: Recording, plain: Tensor
) -> Recording:
    """The recording with the model among those `apart`, if that is what it was wrong without."""
    parts = set(module.modules()) - set(apart)
    apart.update(parts)
    again = record(module, batch)
    if relative_error(again.output, plain)[0] < relative_error(seen.output, plain)[0] / 10:
        return again
    apart.difference_update(parts)
    return seen


def first_position(module: nn.Module, batch: Batch, plain: Tensor) -> int:
    """The number a model gives its first position when no one tells it: 0, or pad_token_id + 1.

    Padded rows need to be told positions, and in the numbers of the model.
    """
    if batch.has_source or "input_ids" not in batch.inputs or not hasattr(module, "config"):
        return 0
    named = (
        getattr(config, "pad_token_id", None) for config in (module.config, text_config(module))
    )
    pads = dict.fromkeys(pad for pad in named if isinstance(pad, int) and pad >= 0)
    if not pads:
        return 0
    rows, length = batch.ids.shape[:2]
    positions = torch.arange(length).expand(rows, length).to(batch.ids)
    told = replace(batch, inputs={**batch.inputs, "position_ids": positions})
    for first in (0, *(pad + 1 for pad in pads)):
        if torch.equal(output_tensor(call_model(module, told, first)), plain):
            return first
    return 0


def probe_batch(module: nn.Module) -> Batch:
    """Random inputs of the kind the model takes; for an encoder-decoder a source and a shorter target.

    Raises:
        Refused: no inputs are known with which its forward works, or it has none.
    """
    if type(module).forward is nn.Module.forward:
        parts = [f"`model.{name}`" for name, part in module.named_children() if _runs(part)]
        instead = f"pass one of its parts: {', '.join(parts)}" if parts else "no part is a model"
        raise Refused(
            f"{type(module).__name__} has no forward of its own, so nothing runs as a whole; {instead}"
        )
    target = {}
    if is_encoder_decoder(module):
        target = {"decoder_input_ids": random_ids(module, PROBE_TARGET, seed=1)}
    if not target and (patches := packed_patches(module)) is not None:
        return patches
    kind = main_input(module)
    if kind not in ("input_ids", "pixel_values"):
        inputs = numbers_taken(module, kind, target)
        if not target:
            return Batch(inputs)
        return with_codebooks(module, Batch.of_inputs({**inputs, **target}))
    if kind == "pixel_values":
        batch = Batch.of_inputs({**random_images(module), **target})
    elif getattr(module, "config", None) is None:
        raise Refused(
            f"{type(module).__name__} takes '{kind}' and has no config to tell its vocabulary"
        )
    else:
        batch = Batch.of_inputs({kind: random_ids(module, probe_length(module)), **target})
    batch = with_companions(module, batch)
    if not target and "input_ids" not in batch.inputs:
        return batch
    books = with_codebooks(module, batch)
    return with_vectors(module, batch) if books is batch else books


def _runs(part: nn.Module) -> bool:
    """Whether it is a model with a forward of its own."""
    return hasattr(part, "config") and type(part).forward is not nn.Module.forward
