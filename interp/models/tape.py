"""What a module computes, call by call: every torch function, what it was given and what it returned.

A tape can say where a tensor came from, and compute again what depends on one that is changed. PyTorch's
`multi_head_attention_forward` is one torch function made of many: of it the many are on the tape. So are the
steps of an einsum that is a product of matrices, and those of an SDPA that has no axes [row head pos d_head]: heads
may be folded into rows, or windows have an axis of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from interp.errors import Refused
from interp.models.einsums import batched_product, is_batched_product

PRODUCTS = {  # names of the two factors, and where they stand
    "matmul": (("input", 0), ("other", 1)),
    "__matmul__": (("input", 0), ("other", 1)),
    "bmm": (("input", 0), ("mat2", 1)),
    "baddbmm": (("batch1", 1), ("batch2", 2)),
}
ADDITIONS = ("add", "__add__", "__radd__")
COMPOSED = "multi_head_attention_forward"
KERNEL = "scaled_dot_product_attention"


@dataclass(eq=False)
class Step:
    """One call: what it was given, what it returned, and the steps that had made what it was given."""

    index: int
    function: Callable[..., Any]
    name: str
    args: tuple
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]
    made_by: dict[int, Step]

    @property
    def in_place(self) -> bool:
        """Whether it returns a tensor that it was given, changed."""
        given = {id(x) for x in tensors(self.args, self.kwargs)}
        return any(id(x) in given for x in self.outputs)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """The two factors of a matrix product."""
        if self.name not in PRODUCTS:
            return None
        return two_factors(self.name, self.args, self.kwargs)


def two_factors(name: str, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The two factors of a product that is about to be formed."""
    left, right = (
        args[at] if at < len(args) else kwargs.get(keyword) for keyword, at in PRODUCTS[name]
    )
    return (left, right) if isinstance(left, Tensor) and isinstance(right, Tensor) else None


@dataclass
class Tape(TorchFunctionMode):
    """The calls of torch functions inside the `with`; `attended` may take a call over."""

    attended: Callable[[Tape, str, Callable, tuple, dict], Any]
    steps: list[Step] = field(default_factory=list)
    latest: dict[int, Step] = field(default_factory=dict)
    in_parts: bool = False
    """Whether what runs is a part of one composed function."""

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == COMPOSED:
            self.in_parts = True
            try:
                with self:
                    return _in_parts(func)(*args, **kwargs)
            finally:
                self.in_parts = False
        if name == KERNEL and (args[0] if args else kwargs["query"]).ndim != 4:
            with self:
                return _attention_in_steps(*args, **kwargs)
        if name == "einsum" and not kwargs and is_batched_product(args):
            with self:
                return batched_product(args)
        out = self.attended(self, name, func, args, kwargs)
        changed = name == "__setitem__"
        outputs = (args[0],) if changed else tuple(_flat((out,)))
        if outputs and (given := list(tensors(args, kwargs))):
            made_by = {id(x): self.latest[id(x)] for x in given if id(x) in self.latest}
            step = Step(len(self.steps), func, name, args, kwargs, outputs, made_by)
            self.steps.append(step)  # which keeps all these tensors alive, and so their ids theirs
            self.latest.update((id(x), step) for x in outputs)
        return out

    def again(self, first: int, values: dict[tuple[int, int], Tensor]) -> None:
        """Compute again every step after `first` that reads what `values` has another value for.

        `values` is by the index of a step and the id of its output; what is computed is added to it.
        """
        for step in self.steps[first + 1 :]:
            new = {
                id(x): values[key]
                for x in tensors(step.args, step.kwargs)
                if (key := key_of(x, step.made_by.get(id(x)))) in values
            }
            if new:
                self.redo(step, new, values)

    def redo(
        self, step: Step, new: Mapping[int, Tensor], values: dict[tuple[int, int], Tensor]
    ) -> None:
        """One step with other tensors, by the id of those it was given."""
        if step.in_place:  # what it changes may be needed as it was, or has been changed already
            old = step.args[0]
            new = {**new, id(old): new[id(old)].clone() if id(old) in new else _before(step, old)}
        args, kwargs = swapped(step.args, new), swapped(step.kwargs, new)
        out = step.function(*args, **kwargs)
        outputs = (args[0],) if step.name == "__setitem__" else tuple(_flat((out,)))
        for old, made in zip(step.outputs, outputs, strict=True):
            values[step.index, id(old)] = made

    def origin(
        self, x: Tensor, wanted: Callable[[Step], bool], maker: Step | None = None
    ) -> list[Step] | None:
        """The steps from the nearest wanted one to `x`, each of which kept the number of entries."""
        step = maker or self.latest.get(id(x))
        if step is None or len(step.outputs) != 1:
            return None
        if wanted(step):
            return [step]
        if step.name in PRODUCTS or step.name in ("softmax", "linear", "einsum"):
            return None
        for given in tensors(step.args, step.kwargs):
            before = step.made_by.get(id(given))
            if before is None or given.numel() != x.numel() or not given.is_floating_point():
                continue
            if step.in_place and given is not step.outputs[0]:
                continue  # what it was added to is gone: this step cannot be done again
            path = self.origin(given, wanted, before)
            if path is not None:
                return [*path, step]
        return None


def _in_parts(function: Any) -> Callable[..., Any]:
    """The function's own code, which hands itself over to no mode; the functions that it calls do."""
    names = {**function.__globals__, "has_torch_function": lambda given: False}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _attention_in_steps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What SDPA returns of [… pos d_head], step by step.

    Raises:
        Refused: keys are shared over heads, and which axis these have is not known.
    """
    if enable_gqa:
        raise Refused(
            f"an SDPA of shape {tuple(query.shape)} shares keys: which axis heads have is not known"
        )
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.dropout(scores.softmax(-1), dropout_p, dropout_p > 0) @ value


def _before(step: Step, x: Tensor) -> Tensor:
    """What a tensor was before a step that changed it in place: computed again."""
    maker = step.made_by.get(id(x))
    if maker is None:
        raise Refused(
            "it changes in place a tensor that it was given: its attention cannot be edited"
        )
    new = {id(x): _before(maker, x)} if maker.in_place else {}
    made = maker.function(*swapped(maker.args, new), **swapped(maker.kwargs, new))
    return made.clone()


def tensors(*values: Any) -> Iterator[Tensor]:
    """The tensors among a call's arguments, those in lists included."""
    for value in values:
        yield from _flat(value.values() if isinstance(value, dict) else value)


def _flat(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _flat(value)


def swapped(value: Any, new: Mapping[int, Tensor]) -> Any:
    """Arguments with some tensors replaced, by their ids."""
    if isinstance(value, Tensor):
        return new.get(id(value), value)
    if isinstance(value, dict):
        return {name: swapped(x, new) for name, x in value.items()}
    if type(value) in (tuple, list):
        return type(value)(swapped(x, new) for x in value)
    return value


def softmax_of_rows(step: Step) -> bool:
    """Whether a step is a softmax over the last axis of a tensor with at least three."""
    if step.name != "softmax" or len(step.outputs) != 1:
        return False
    axis = step.args[1] if len(step.args) > 1 else step.kwargs.get("dim")
    ndim = step.outputs[0].ndim
    return ndim >= 3 and axis in (-1, ndim - 1)


def is_product(step: Step) -> bool:
    """Whether a step is a matrix product."""
    return step.factors() is not None


def earlier(x: Tensor, maker: Step | None) -> Iterator[tuple[Tensor, Step | None]]:
    """x, and what it was made of by steps that only reorder or scale it, or add a smaller tensor to it.

    Each with the step that made it.
    """
    while True:
        yield x, maker
        if maker is None or maker.name in PRODUCTS or maker.in_place or len(maker.outputs) != 1:
            return
        given = [g for g in tensors(maker.args, maker.kwargs) if g.numel() > 1]
        if maker.name in ADDITIONS:
            given = [g for g in given if g.numel() == x.numel()]
        if len(given) != 1 or given[0].numel() != x.numel():
            return
        x = given[0]
        maker = maker.made_by.get(id(x))


def only_through(tape: Tape, x: Tensor, maker: Step | None, end: Step) -> bool:
    """Whether `end` depends on what x was made of through x alone.

    What it was made of is followed back as far as tensors are as large as x and no linear layer's output.
    """
    roots: set[tuple[int, int]] = set()
    open_ = [] if maker is None else [maker]
    while open_:
        step = open_.pop()
        if step.name in PRODUCTS or step.name in ("linear", "conv1d", "einsum"):
            continue
        for given in tensors(step.args, step.kwargs):
            before = step.made_by.get(id(given))
            key = key_of(given, before)
            if given.numel() == x.numel() and given.is_floating_point() and key not in roots:
                roots.add(key)
                open_ += [] if before is None else [before]
    others: set[int] = set()
    for step in tape.steps[: end.index + 1]:
        if step is maker:
            continue
        keys = [key_of(g, step.made_by.get(id(g))) for g in tensors(step.args, step.kwargs)]
        if any(key in roots or key[0] in others for key in keys):
            others.add(step.index)
    return end.index not in others


def key_of(x: Tensor, maker: Step | None) -> tuple[int, int]:
    """What a value is known by: the step that made it (-1 where none did), and the tensor."""
    return (-1 if maker is None else maker.index), id(x)
