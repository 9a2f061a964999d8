"""A clean run whose norm scales are held fixed while its blocks are run again on something else.

A norm with its scale held, norm(x) = gain · (x [− mean x]) / σ(clean) + bias, is affine in x. With the
attention patterns held too (`Edit.patch("pattern", …)`), everything between MLPs is affine, so a change
can be followed through the real modules and taken apart by subtraction. Norms are found, not named: a
module whose output does not depend on the size of its input and is gain · x / σ + bias on the clean run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

from interp.devices import wide
from interp.models.layout import require_rows_first
from interp.models.model import Model
from interp.models.verify import relative_error, relative_tolerance
from interp.models.weights import FrozenNorm, linear_map
from interp.run.batch import Batch
from interp.run.cache import Run
from interp.run.edits import Edit

T = TypeVar("T")

LARGE = 1e3
"""Inputs this much larger than the clean ones drown a norm's epsilon."""
ROUNDING = 1e-5
"""Of a vector's largest entry: float32 rounding carried through a few dozen blocks."""


@dataclass
class Calls:
    """Inputs and outputs of one module in the clean run, in order of its calls."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@dataclass
class Held:
    """One module under the hold: what it adds as a bias, and σ of every clean call if it is a norm."""

    bias: Tensor
    clean: list[Tensor]
    norm: FrozenNorm | None = None
    scales: list[Tensor] = field(default_factory=list)
    called: int = 0


class Frozen:
    """A clean run, and replays of it in which every norm of a block keeps its clean scale.

    Attributes:
        run: the clean run, with resid_pre, the last resid_post, what was asked for, and pattern unless
            `patterns` is False: then `hold_patterns` holds none.
        held: names of the norms whose scale is held. error: largest relative error of the final
            residual when nothing is changed; where it exceeds `allowed`, no norm is held.

    >>> frozen = Frozen(tiny_model(), torch.tensor([[5, 6, 7]]))
    >>> len(frozen.held), frozen.error < 1e-5
    (4, True)
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Model,
        data: Batch | Tensor,
        capture: Iterable[str] = (),
        *,
        share_bias: bool = False,
        patterns: bool = True,
    ):
        model.layers_with("pattern")
        require_rows_first((block.axes for block in model.spec.blocks), "holding norms")
        self.model, self.share_bias = model, share_bias
        self.last = f"resid_post.{model.n_layers - 1}"
        sites = ["resid_pre", *(["pattern"] if patterns else []), self.last, *capture]
        with _recorded(model) as calls:
            self.run = model.run(data, capture=list(dict.fromkeys(sites)), logits=False)
        names = {module: name for name, module in model.module.named_modules()}
        self._modules: dict[nn.Module, Held] = {}
        for module, seen in calls.items():
            if (held := _held(module, seen)) is not None and (held.norm or share_bias):
                self._modules[module] = held
        self.held = tuple(names[module] for module, held in self._modules.items() if held.norm)
        computed = {model.dtype, *(held.norm.dtype for held in self._modules.values() if held.norm)}
        self.allowed = max(map(relative_tolerance, computed))
        self.error = self._error()
        if self.error > self.allowed:
            self._modules, self.held = {}, ()

    def _error(self) -> float:
        first = f"resid_pre.{min(self.run.cache.layers('resid_pre'))}"
        unchanged = [Edit.apply(first, lambda x, seen: x)]
        (final,) = self.replay([unchanged], lambda run: run.cache[self.last], capture=[self.last])
        return relative_error(final, self.run.cache[self.last])[0]

    def hold_patterns(self, layers: Iterable[int]) -> list[Edit]:
        """Edits that keep the clean patterns in these layers."""
        patterns = self.run.cache.by_layer("pattern")
        return [
            Edit.patch(f"pattern.{layer}", patterns[layer]) for layer in layers if layer in patterns
        ]

    @torch.no_grad()
    def replay(
        self,
        variants: Sequence[Sequence[Edit]],
        read: Callable[[Run], T],
        *,
        capture: Iterable[str] = (),
        progress: Callable[[int], None] | None = None,
    ) -> list[T]:
        """`model.replay` with norm scales held; no logits are made."""
        with self._hold():
            return self.model.replay(
                self.run, variants, read, logits=False, capture=capture, progress=progress
            )

    @contextmanager
    def _hold(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module, held in self._modules.items():
                held.called = 0
                stack.callback(module.register_forward_hook(self._hook(held)).remove)
            yield

    def _hook(self, held: Held) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            call = held.called % len(held.clean)
            held.called += 1
            bias = held.bias
            if held.norm is None:
                linear = wide(output) - bias
            else:
                gain = wide(held.norm.gain.to(output.device))
                scale = _repeated(held.scales[call], len(output))
                linear = gain * held.norm.centre(wide(args[0])) / scale
            if self.share_bias:
                clean = wide(_repeated(held.clean[call], len(output)))
                relevant, size = (clean - bias - linear).abs(), linear.abs()
                # What a subtraction leaves of nothing gets no share of the bias.
                rounding = ROUNDING * clean.abs().amax(-1, keepdim=True)
                relevant = torch.where(relevant > rounding, relevant, 0.0)
                bias = bias * (size / (size + relevant)).nan_to_num(1.0)
            return (linear + bias).to(output.dtype)

        return hook


def _repeated(x: Tensor, rows: int) -> Tensor:
    """One copy for every variant; variants lie one after the other along the first axis."""
    return x.repeat(rows // len(x), *[1] * (x.ndim - 1))


@contextmanager
def _recorded(model: Model) -> Iterator[dict[nn.Module, Calls]]:
    """Calls of every module inside a block that could be a norm or adds a bias."""
    seen: dict[nn.Module, Calls] = {}

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if len(args) != 1 or kwargs or not isinstance(output, Tensor):
            return
        x = args[0]
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return
        if not _biased(module) and (x.shape != output.shape or not _is_small(module, x)):
            return
        calls = seen.setdefault(module, Calls())
        calls.inputs.append(x.clone())
        calls.outputs.append(output.clone())

    with ExitStack() as stack:
        for block in chain.from_iterable(model.parts):
            for module in block.modules():
                if not any(True for _ in module.children()):
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield seen


def _is_small(module: nn.Module, x: Tensor) -> bool:
    """No more parameters than a gain and a bias."""
    return sum(parameter.numel() for parameter in module.parameters()) <= 2 * x.shape[-1]


def _biased(module: nn.Module) -> bool:
    """Whether a linear layer has a bias that is not zero, or one that is not in memory."""
    linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    bias = getattr(module, "bias", None) if linear else None
    return isinstance(bias, Tensor) and (bias.is_meta or bool(bias.any()))


def _held(module: nn.Module, calls: Calls) -> Held | None:
    """How a module is held: as a norm, or (None as `norm`) as a linear layer with a bias."""
    if _biased(module):
        bias = linear_map(module, calls.inputs[0].shape[-1])[1]
        return Held(wide(bias), calls.outputs)
    x, out = calls.inputs[0], calls.outputs[0]
    if x.shape[-1] % 2 or torch.equal(x, out) or not bool(x.any()):
        return None
    alike = max(map(relative_tolerance, (x.dtype, torch.float32)))
    if relative_error(module(x * LARGE), module(x * 2 * LARGE))[0] > alike:
        return None
    norm = FrozenNorm(module, x.shape[-1])
    allowed = max(map(relative_tolerance, (x.dtype, norm.dtype)))
    shift = wide(norm.bias.to(x.device))
    scales = []
    for x, out in zip(calls.inputs, calls.outputs, strict=True):
        scale = norm.scale(x).nan_to_num(1.0)  # a vector of zeros has none
        made = wide(norm.gain.to(x.device)) * norm.centre(wide(x)) / scale + shift
        if relative_error(made, wide(out))[0] > allowed:
            return None
        scales.append(scale)
    return Held(shift, calls.outputs, norm, scales)
