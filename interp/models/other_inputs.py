"""Numbers that were fitted to the probe, tried on other inputs: what explains a block there alone is refused.

A channel has a handful of equations. Modules that have nothing to do with the stream may meet them by chance, and
what is computed of an input that the probe has only one of (a time, a class) is no number of the block's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.block_map import BlockMap
from interp.models.calls import FAILURES
from interp.models.hooks import argument, with_argument
from interp.models.mapped import as_mapped
from interp.models.recording import Recording, record
from interp.models.relative import relative_error, relative_tolerance
from interp.models.spec import Spec
from interp.models.stack import Layer
from interp.models.trials import either_sign
from interp.models.written import remade
from interp.run.batch import Batch


def with_fitted(spec: Spec, seen: Recording, batch: Batch) -> Spec:
    """The map, in which a block's writes are refused where the numbers in their sum do not hold on other inputs."""
    which = [i for i, block in enumerate(spec.blocks) if fitted(block)]
    if not which:
        return spec
    layers, failed = _elsewhere(spec, seen, batch), {}
    for i in which:
        block = spec.blocks[i]
        if not layers:
            failed[i] = (
                f"the model fails on other inputs, on which the numbers in the sum of '{block.name}' could be tried"
            )
            continue
        made, wanted = remade(layers[i], block, spec.hidden), layers[i].output
        error, _ = relative_error(made, wanted.double())
        # A stream may be kept in float32 and be made of weights that are not.
        if not error <= max(map(relative_tolerance, (seen.output.dtype, wanted.dtype))):
            failed[i] = (
                f"numbers that make what '{block.name}' returns of its parts on the probe do not on other inputs: off "
                f"by {error:.1e} of its size"
            )
    refused = dict(spec.refused)
    for i, why in failed.items():
        crosses = [f"{of}write" for of, _ in spec.blocks[i].sources]
        for site in ("attn_write", "mlp_write", "resid_mid", *crosses):
            refused.setdefault(f"{site}.{i}" if len(failed) < spec.n_layers else site, why)
    return replace(spec, refused=refused)


def fitted(block: BlockMap) -> bool:
    """Whether the sum of a block has numbers in it that are fitted channel by channel."""
    carries = (block.carry_first, block.carry_mid, block.carry_post)
    return any(write.channels is not None for write in block.writes) or any(
        carry is not None and (carry.shift is not None or isinstance(carry.factor, Tensor))
        for carry in carries
    )


def _elsewhere(spec: Spec, seen: Recording, batch: Batch) -> list[Layer]:
    """The layers on other inputs and other streams; of inputs that cannot be changed, other streams; else []."""
    shapes = [layer.output.shape for layer in as_mapped(spec, seen)]
    for inputs in (_turned(batch), batch):
        with suppress(*FAILURES, Refused), _other_streams(spec, seen.module):
            layers = as_mapped(spec, record(seen.module, inputs))
            if [layer.output.shape for layer in layers] == shapes:
                return layers
    return []


def _turned(batch: Batch) -> Batch:
    """The batch with token ids in reverse order, and numbers that are no mask in reverse order of the last axis."""

    def turned(name: str, x: Tensor) -> Tensor:
        if "mask" in name or not (x.is_floating_point() or name.endswith("input_ids")):
            return x
        return x.flip(-1 if x.is_floating_point() else 1)

    return replace(batch, inputs={name: turned(name, x) for name, x in batch.inputs.items()})


@contextmanager
def _other_streams(spec: Spec, module: nn.Module) -> Iterator[None]:
    """Inside, every block reads its stream with each entry multiplied by a number of its own."""

    def change(block: nn.Module, args: tuple, kwargs: dict) -> Any:
        x = argument(args, kwargs, spec.hidden)
        numbers = either_sign(x.shape, torch.Generator().manual_seed(0))
        return with_argument(args, kwargs, spec.hidden, x * numbers.to(x))

    names = {block.members[0].name if block.members else block.name for block in spec.blocks}
    hooks = [
        module.get_submodule(name).register_forward_pre_hook(change, with_kwargs=True)
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
