"""What hangs on a model being one stack of blocks, tried for one of several that was named.

The whole model runs, and what it returns need not be made of this stack (nor, in some, of the only one): whether it
is, whether the stack's positions are the tokens',
whether it begins with their embedding, and whether the model's rows are apart is not taken for granted.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import BadInput
from interp.models.calls import FAILURES, call_model, output_tensor
from interp.models.recording import Recording, record
from interp.models.relative import relative_error, relative_tolerance
from interp.models.spec import Spec, first_tensor
from interp.models.stack import Layer, calls_of
from interp.run.batch import Batch


def stands_beside_tokens(seen: Recording, first: Layer, key: int | str, batch: Batch) -> bool:
    """Whether the model reads tokens and these are not the positions of the stack: there are more or fewer of them, or
    its first block reads the same of other tokens."""
    hidden, ids = first.hidden(key), batch.inputs.get("input_ids")
    if ids is None or hidden.shape[:2] != ids.shape[:2]:
        return ids is not None
    others = replace(batch, inputs={**batch.inputs, "input_ids": ids.flip(int(len(ids) == 1))})
    return torch.equal(_read(record(seen.module, others), first, key), hidden)


def before_attention(seen: Recording, first: Layer, key: int | str, batch: Batch) -> bool:
    """Whether no attention has been at work on what the stack begins with: scaling every z changes none of it."""
    generator = torch.Generator().manual_seed(0)
    factors = [
        1 + torch.rand(call.tensors["z"].shape, generator=generator).to(call.tensors["z"])
        for call in seen.attention
    ]
    return torch.equal(_read(record(seen.module, batch, factors), first, key), first.hidden(key))


def rows_apart(seen: Recording, batch: Batch) -> bool:
    """Whether what the model returns for a row is the same without the others (CLIP compares texts with images).

    Where no row can be taken out alone, it is asked of all of them twice.
    """
    if batch.objects:  # of which no second row can be made
        return False
    out, allowed = seen.output, relative_tolerance(seen.output.dtype)
    if batch.size == len(out):
        with suppress(BadInput):  # which entries are whose is not known
            alone = _returned(seen, batch.rows(slice(0, 1)))
            if alone is not None:
                return relative_error(alone, out[:1])[0] <= allowed
    twice = _returned(seen, batch.repeat(2))
    if twice is None or twice.shape != (2 * len(out), *out.shape[1:]):
        return False
    return all(relative_error(half, out)[0] <= allowed for half in twice.split(len(out)))


def _returned(seen: Recording, batch: Batch) -> Tensor | None:
    """What the model returns for another batch, None where it fails."""
    with suppress(*FAILURES):
        return output_tensor(call_model(seen.module, batch)).to(seen.output.device)
    return None


def last_returned(spec: Spec, module: nn.Module, batch: Batch) -> list[Tensor]:
    """What the last block of the stack returns in a plain forward, call by call."""
    returned: list[Tensor] = []

    def keep(block: nn.Module, args: tuple, output: Any) -> None:
        x = first_tensor(output)
        assert x is not None
        returned.append(x.detach().to("cpu", copy=True))

    hook = module.get_submodule(spec.blocks[-1].returns).register_forward_hook(keep)
    try:
        call_model(module, batch)
    finally:
        hook.remove()
    return returned


def is_heard(last: str, seen: Recording, batch: Batch) -> bool:
    """Whether what the model returns is another where the last block of a stack, called so, returns another stream.

    A segmenter may return first what its backbone makes of an image, whatever its decoder does.
    """
    returned = [call.output for call in seen.calls[last] if call.output is not None]
    other = [*returned[:-1], returned[-1].flip(-1)]
    again = record(seen.module, batch, restored={last: other})
    return not torch.equal(again.output, seen.output)


def _read(again: Recording, first: Layer, key: int | str) -> Tensor:
    (call,) = calls_of(again, [first])
    return replace(first, call=call).hidden(key)
