"""Skipping the blocks before a layer: they return what they returned before, and cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, cycle
from typing import Any

import torch
from torch import Tensor, nn

from interp.models.forwards import other_forwards
from interp.models.hooks import argument, with_hidden
from interp.models.spec import Spec
from interp.run.cache import Run
from interp.sites import Site


@contextmanager
def skipping(
    model: nn.Module, spec: Spec, start: int, resid: Tensor, clean: Run, times: int
) -> Iterator[None]:
    """Inside, blocks before `start` cost nothing and block `start` reads `resid`, held as it was in the clean run."""
    like = clean.held.get(start)
    size = resid.shape[0] // times
    blocks = [model.get_submodule(block.returns) for block in spec.blocks]
    begin = next(stage[0] for stage in spec.stages if start in stage)
    skipped: dict[nn.Module, list[Any]] = {}
    for layer, block in enumerate(blocks[:start]):
        rest = tuple(_repeated(x, size, times) for x in clean.extras.get(layer, ()))
        after = Site("resid_pre", layer + 1)
        output, held = None, None  # other stages return what they are given
        if layer >= begin:
            output, held = resid, like
        elif spec.blocks[layer].ends_stage and after in clean.cache:
            output, held = clean.cache[after].repeat(times, 1, 1), clean.held.get(layer + 1)
        skipped.setdefault(block, []).append((layer, output, held, rest))
    for block in blocks[start:]:  # a module that is called again later on works then
        if block in skipped:
            skipped[block].append(None)
    others = {block: _returning(outputs, block.forward, spec) for block, outputs in skipped.items()}
    for member in chain.from_iterable(block.members[:-1] for block in spec.blocks[:start]):
        others[model.get_submodule(member.name)] = _given_back if not member.in_tuple else _in_tuple
    with ExitStack() as stack:
        stack.enter_context(other_forwards(others))
        if start == begin and not spec.blocks[start].ahead:  # what is ahead may be edited
            first = cycle([resid] + [None] * (blocks.count(blocks[start]) - 1))

            def put(module: nn.Module, args: tuple, kwargs: dict) -> Any:
                given = next(first)
                return (
                    None if given is None else with_hidden(args, kwargs, given, spec, start, like)
                )

            reads = model.get_submodule(spec.blocks[start].name)
            hook = reads.register_forward_pre_hook(put, with_kwargs=True, prepend=True)
            stack.callback(hook.remove)
        yield


def _returning(
    outputs: Sequence[tuple[int, Tensor | None, torch.Size | None, tuple] | None],
    forward: Callable[..., Any],
    spec: Spec,
) -> Callable[..., Any]:
    """A block's forward that returns one output a call in turn, and works as before where it is None.

    An output is a layer, a hidden state (its own input, where that is None), in which shape it is held, and what
    comes besides.
    """
    turns = cycle(outputs)

    def returning(*args: Any, **kwargs: Any) -> Any:
        output = next(turns)
        if output is None:
            return forward(*args, **kwargs)
        layer, resid, like, rest = output
        if spec.blocks[layer].members:
            # This is the last of them, whose output code outside may change in place.
            return args[0] if resid is None else resid.clone()
        read = argument(args, kwargs, spec.hidden)
        if resid is not None:
            args, kwargs = with_hidden(args, kwargs, resid, spec, layer, like)
        hidden = argument(args, kwargs, spec.hidden)
        if spec.blocks[layer].adds:
            hidden = hidden - read
        if spec.dict_key:
            return {spec.dict_key: hidden}
        return (hidden, *rest) if spec.tuple_blocks else hidden

    return returning


def _given_back(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x


def _in_tuple(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
    return (x,)


def rows_are_known(clean: Run, start: int) -> bool:
    """Whether everything that blocks before `start` returned besides has one entry for each row, or one for all.

    Of other numbers of entries (rows times heads, in WavLM) it is not known which are a row's: there are no copies.
    """
    besides = chain.from_iterable(clean.extras.get(layer, ()) for layer in range(start))
    tensors = (x for x in besides if isinstance(x, Tensor) and x.ndim)
    return all(x.shape[0] in (1, clean.batch.size) for x in tensors)


def _repeated(x: Any, size: int, times: int) -> Any:
    """A block's extra output for `times` copies of a batch of `size` rows."""
    if isinstance(x, Tensor) and x.ndim > 1 and x.shape[0] == size and size > 1:
        return x.repeat(times, *[1] * (x.ndim - 1))
    return x
