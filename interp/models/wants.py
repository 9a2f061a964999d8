"""Inputs that a forward cannot do without, each as the layer wants it that reads it.

Names tell little: an input that the signature requires, that a failure names, or in whose place a layer
was given None is given numbers of a width that no other has. The layer that fails on that width says
which input it reads, and what it wants: a linear layer so many numbers a position, an embedding whole
numbers, a convolution so many channels. Two streams that are put together name the length that one should have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from interp.models.calls import (
    FAILURES,
    call_model,
    handed_on,
    output_tensor,
    parameters_of,
    required_inputs,
)
from interp.models.spec import module_device
from interp.run.batch import Batch

FRAMES, SAMPLES = 40, 6400
"""Of what a convolution reads beside the main input: of several channels, or of one (a wave)."""
WIDTHS = (71, 73, 79, 83, 89, 101)
"""Numbers a position in inputs of which nothing is known yet, and so how many may be found."""
APART = (2, 0)
"""How many positions they have more than the main input, where they may: streams of one length look alike."""
LENGTHS = (
    r"Expected size (\d+) but got size (\d+)",
    r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)",
)
"""How a failure names the lengths of two streams that should have one."""
MOST = 3 * len(WIDTHS)
"""Forwards that are tried, at most, for the next input or the width of one."""


@dataclass(frozen=True)
class Fault:
    """Why a forward failed, with the layers that it was in, outermost first, and what each was given."""

    why: str
    inside: tuple[tuple[nn.Module, Any], ...] = ()
    around: tuple[str, ...] = ()
    """What the modules around the last of these layers may be given, and by default are not."""

    @property
    def channels(self) -> tuple[int, int]:
        """How many channels the layer got and wanted; 0 of both where no layer failed on them."""
        for layer, x in self.inside:
            channels, axis = channels_of(layer) or (0, 0)
            if axis and isinstance(x, Tensor) and x.ndim >= -axis:
                return x.shape[axis], channels
        return 0, 0

    @property
    def missing(self) -> bool:
        """Whether a layer was given None."""
        return any(x is None for _, x in self.inside)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of two streams that should have one; none where the failure is another."""
        told = (re.search(pattern, self.why) for pattern in LENGTHS)
        return next((tuple(map(int, match.groups())) for match in told if match), ())

    def fills(self, other: Fault) -> bool:
        """Whether the layer that was given None in the other failure is given something, and fails on that."""
        if not (self.inside and other.inside):
            return False
        (layer, x), (empty, nothing) = self.inside[-1], other.inside[-1]
        return layer is empty and nothing is None and x is not None

    def is_at(self, other: Fault) -> bool:
        """Whether it is the same failure of the same layers, given something or nothing as before."""
        here, there = ([(part, x is None) for part, x in each.inside] for each in (self, other))
        return self.why == other.why and here == there


def tried(module: nn.Module, batch: Batch) -> tuple[Tensor | None, Fault]:
    """What the forward makes of a batch, None where it fails; then with the fault."""
    inside: list[tuple[nn.Module, Any]] = []

    def enter(layer: nn.Module, args: tuple) -> None:
        if args:
            inside.append((layer, args[0]))

    def leave(layer: nn.Module, args: tuple, output: Any) -> None:
        if args:
            inside.pop()

    leaves = [m for m in module.modules() if isinstance(m, nn.Embedding) or channels_of(m)]
    hooks = [leaf.register_forward_pre_hook(enter) for leaf in leaves]
    hooks += [leaf.register_forward_hook(leave) for leaf in leaves]
    try:
        with torch.no_grad():
            return output_tensor(call_model(module, batch)), Fault("")
    except FAILURES as error:
        why = " ".join(str(error).split()) or type(error).__name__
        return None, Fault(why, tuple(inside), _left_open(module, inside[-1][0]) if inside else ())
    finally:
        for hook in hooks:
            hook.remove()


def _left_open(module: nn.Module, layer: nn.Module) -> tuple[str, ...]:
    """Parameters that are None by default of the modules around a layer, the whole left out; the nearest first."""
    (name, *_) = (name for name, part in module.named_modules() if part is layer)
    parts = name.split(".")
    around = [module.get_submodule(".".join(parts[:end])) for end in range(len(parts) - 1, 0, -1)]
    read = [parameters_of(part) for part in around]
    return tuple(dict.fromkeys(n for each in read for n, p in each.items() if p.default is None))


def channels_of(layer: nn.Module) -> tuple[int, int] | None:
    """How many channels a layer reads, and on which axis; None of one that does not say."""
    for name, axis in (("in_features", -1), ("normalized_shape", -1), ("in_channels", 0)):
        size = getattr(layer, name, None)
        size = size[-1] if isinstance(size, tuple) and size else size
        kernel = getattr(layer, "kernel_size", ())
        if isinstance(size, int) and (axis or isinstance(kernel, tuple)):  # not what holds a layer
            return size, axis or -1 - len(kernel)
    weight, of_channels = getattr(layer, "weight", None), ("num_features", "num_channels")
    if isinstance(weight, Tensor) and weight.ndim == 1 and len(weight) > 1:  # a norm, of positions
        return None if any(hasattr(layer, name) for name in of_channels) else (len(weight), -1)
    return None


def told_by_layers(
    module: nn.Module, inputs: dict[str, Tensor], main: str
) -> dict[str, Tensor] | None:
    """The inputs with those besides that make the forward work; None where layers do not tell them.

    Args:
        main: the name of the input whose axes, [row pos ...], the others follow; its own width is found too.
    """
    x = inputs[main]
    open_ = x.is_floating_point() and x.ndim == 3 and x.shape[1] > 1  # no wave [row 1 sample]
    widths = {main: x.shape[-1]} if open_ else {}
    found = (_found(_Search(module, main, inputs, widths, apart)) for apart in APART)
    return next((each for each in found if each is not None), None)


def _found(search: _Search) -> dict[str, Tensor] | None:
    """The inputs with which the forward works, where the search ends at such."""
    required = [name for name in required_inputs(search.module) if name not in search.given]
    if len(required) + len(search.widths) > len(WIDTHS):
        return None
    for name in required:
        search = search.with_(name)
    for _ in range(MOST):
        made, fault = search.forward()
        if made is not None:
            return search.given if made.ndim > 1 else None
        further = search.as_wanted(fault) or search.as_long(fault) or search.with_another(fault)
        if further is None:
            return search.given_up()
        search = further
    return search.given_up()


@dataclass(frozen=True)
class _Search:
    """Inputs as far as they are known; by name the widths of those of which nothing is known yet."""

    module: nn.Module
    main: str
    given: dict[str, Tensor]
    widths: dict[str, int]
    apart: int
    """How many positions more than the main input the others have."""
    lengths: dict[str, int] = field(default_factory=dict)
    """By name those of inputs of whose length a failure told."""

    @property
    def of_wave(self) -> bool:
        """Whether the main input is a wave: [row sample], or [row 1 sample]."""
        x = self.given[self.main]
        return x.is_floating_point() and (x.ndim == 2 or (x.ndim == 3 and x.shape[1] == 1))

    def positions(self, name: str) -> tuple[int, ...]:
        """Rows and positions of an input; beside a wave numbers have fewer than it has samples."""
        shape = self.given[self.main].shape
        if name in self.lengths:
            return shape[0], self.lengths[name]
        if self.of_wave and name != self.main and not name.endswith("mask"):
            return shape[0], min(shape[-1], FRAMES) + self.apart
        shape = shape[:-1] if len(shape) > 2 else shape
        more = 0 if name == self.main else self.apart
        return (*shape[:-1], shape[-1] + more)

    def forward(self) -> tuple[Tensor | None, Fault]:
        return tried(self.module, Batch.of_inputs(self.given).to(module_device(self.module)))

    def missing(self, fault: Fault) -> list[str]:
        """Parameters that are not given, of those that have no default, or None for one.

        Of a forward that hands on what it does not name, also those of the modules around the layer that failed.
        """
        parameters = parameters_of(self.module)
        open_ = [
            name
            for name, p in parameters.items()
            if p.kind is p.POSITIONAL_OR_KEYWORD and (p.default is p.empty or p.default is None)
        ]
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            open_ += [name for name in fault.around if name not in parameters]
        return [name for name in open_ if name not in ("self", *self.given)]

    def given_up(self) -> None:
        """None; and of what the forward does not name nothing is handed on."""
        handed_on.pop(self.module, None)

    def with_(self, name: str) -> _Search:
        """With one more: a mask of ones, or numbers in a width of their own."""
        if name not in parameters_of(self.module):
            handed_on.setdefault(self.module, set()).add(name)
        if name.endswith("mask"):
            ones = torch.ones(self.positions(name), dtype=torch.long)
            return replace(self, given={**self.given, name: ones})
        width = next(w for w in WIDTHS if w not in self.widths.values())
        x = self._numbers(*self.positions(name), width)
        return replace(self, given={**self.given, name: x}, widths={**self.widths, name: width})

    def with_another(self, fault: Fault) -> _Search | None:
        """With one more with which the forward comes further; None where there is none.

        The first that the layer is given that was given None, else the first with which another failure comes; of
        what the forward does not name only such as the layer is given.
        """
        missing = self.missing(fault)
        named = [name for name in missing if re.search(rf"\b{name}\b", fault.why)]
        other = None
        for name in named or (missing if fault.missing else []):
            if len(self.widths) == len(WIDTHS):
                return None
            further = self.with_(name)
            made, after = further.forward()
            if made is not None or after.fills(fault):
                return further
            if name in handed_on.get(self.module, ()):
                handed_on[self.module].discard(name)
            elif named and not after.is_at(fault):
                return further
            elif other is None and not after.is_at(fault):
                other = further
        return other

    def as_wanted(self, fault: Fault) -> _Search | None:
        """With the input changed that the failing layer reads; None where it is none, or not known which."""
        layer, x = fault.inside[-1] if fault.inside else (None, None)
        if layer is None or not isinstance(x, Tensor):
            return None
        got, wanted = fault.channels
        own = [name for name, width in self.widths.items() if width in x.shape]
        if not own and got != wanted:  # it reads several in one
            own = list(self.widths)
        if len(own) != 1:
            return None
        (name,) = own
        width = self.widths[name] + wanted - got
        if isinstance(layer, nn.Embedding):
            new = self._places(layer, self.positions(name))
        elif isinstance(layer, nn.Conv1d) and name != self.main:
            frames = FRAMES if layer.in_channels > 1 else SAMPLES
            new = self._numbers(x.shape[0], layer.in_channels, frames)
        elif got != wanted and width >= 0:
            new = self._numbers(*self.positions(name), width)
        else:
            return None
        rest = {other: w for other, w in self.widths.items() if other != name}
        return replace(self, given={**self.given, name: new}, widths=rest)

    def as_long(self, fault: Fault) -> _Search | None:
        """With one input besides as long as what it is put together with; None where no lengths are told, or again."""
        for own, wanted in permutations(fault.lengths, 2):
            for name, x in self.given.items():
                known = name == self.main or name in self.lengths
                if not known and x.ndim > 1 and x.shape[1] == own:
                    shape = (len(x), wanted, *x.shape[2:])
                    new = self._numbers(*shape) if x.is_floating_point() else x.new_ones(shape)
                    given, lengths = {**self.given, name: new}, {**self.lengths, name: wanted}
                    return replace(self, given=given, lengths=lengths)
        return None

    def _places(self, layer: nn.Embedding, positions: tuple[int, ...]) -> Tensor:
        """The first whole numbers that an embedding knows, one a position; of a wave one a row."""
        positions = (positions[0], 1) if self.of_wave else positions
        return (torch.arange(positions[-1]) % layer.num_embeddings).expand(positions).clone()

    def _numbers(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        return x.to(next(self.module.parameters()).dtype)
