"""Which modules of a model compute attention themselves, read off one forward with every torch function seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from interp.models.calls import call_model
from interp.models.find_pieces import find_pieces
from interp.models.own_attention import beside_interface, first_step, found_at, own
from interp.models.pieces import pieces
from interp.models.spec import first_tensor
from interp.models.tape import KERNEL, Tape, softmax_of_rows
from interp.run.batch import Batch


def find_own(module: nn.Module, batch: Batch, but: Container[nn.Module] = ()) -> str:
    """Note which modules of this model compute attention themselves: a window watches them from then on.

    A module is the innermost one whose call forms the scores, the pattern and z. `but`: modules whose attention is
    seen without. Returns why there is none, "" where there is one.
    """
    running: list[tuple[nn.Module, int]] = []
    noted: set[nn.Module] = set()
    folded: dict[nn.Module, torch.Size] = {}
    softmaxes: Counter[nn.Module] = Counter()
    seen: Counter[nn.Module] = Counter()

    def attended(tape: Tape, name: str, function: Any, args: tuple, kwargs: dict) -> Any:
        found = None if name == KERNEL else found_at(tape, name, args, kwargs, batch.size)
        first = None
        if name == "softmax":
            softmaxes.update(_with_layers(tape, running))
        if name == KERNEL:
            first, n_heads = len(tape.steps), 0
        elif found is not None:
            first, n_heads = first_step(found), found.n_heads
        if first is not None:
            inside = [part for part, start in running if start <= first]
            if inside[-1] in but:
                return function(*args, **kwargs)
            own[inside[-1]] = n_heads
            noted.add(inside[-1])
            seen[inside[-1]] += 1
            if found is not None and found.weights.ndim == 3:
                folded[inside[-1]] = found.weights.shape
        return function(*args, **kwargs)

    def left(part: nn.Module, args: tuple, out: Any) -> None:
        running.pop()
        made = first_tensor(out)
        if part in folded and made is not None:
            own[part] = _heads_folded(folded.pop(part), made.shape) or own[part]

    tape = Tape(attended)
    with ExitStack() as stack:
        for part in module.modules():
            enter = part.register_forward_pre_hook(
                lambda part, args: running.append((part, len(tape.steps)))
            )
            leave = part.register_forward_hook(left)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        stack.enter_context(tape)
        call_model(module, batch)
    # Of some modules this shows one attention (of global tokens, say) and not another.
    others = [part for part in softmaxes if softmaxes[part] > seen[part] and part not in but]
    others = [part for part in others if part in noted] if noted else others
    in_pieces = find_pieces(module, batch, others) if others else []
    own.update((part, pieces[part].n_heads) for part in in_pieces)
    if but:
        beside_interface.update([*noted, *in_pieces])
    if noted or in_pieces:
        return ""
    if any(softmax_of_rows(step) for step in tape.steps):
        return (
            f"{type(module).__name__} calls no attention function, and does not multiply the rows of a "
            "softmax with values, [batch, heads, query, key] with [batch, heads, key, width], nor blocks of "
            "such rows with blocks of values"
        )
    return f"{type(module).__name__} has no softmax attention: nothing in it is a softmax over rows of scores"


def _heads_folded(weights: torch.Size, made: torch.Size) -> int:
    """How many heads a pattern [rows·heads query key] has, where its module makes a vector a row and query.

    Rows may be windows of an image, more than the batch has. 0 where what is made is folded as well.
    """
    vectors, n_queries = made[:-1].numel(), weights[1]
    if made[0] == weights[0] or vectors % n_queries or weights[0] % (vectors // n_queries or 1):
        return 0
    return weights[0] * n_queries // vectors


def _with_layers(tape: Tape, running: list[tuple[nn.Module, int]]) -> list[nn.Module]:
    """The innermost module that is running and has called a linear layer."""
    with_layers = [
        part for part, start in running if any(step.name == "linear" for step in tape.steps[start:])
    ]
    return with_layers[-1:]
