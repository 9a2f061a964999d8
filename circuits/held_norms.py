"""Norms inside blocks made linear: their output stays, their scale has no gradient; and what they read.

Norms are found, not named: a module that gives the same for inputs all alike scaled, and another
output for all entries where one of them is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.devices import wide
from interp.models.model import Model
from interp.models.verify import relative_error, relative_tolerance
from interp.models.weights import FrozenNorm
from interp.run.batch import Batch

SAME = 1e-3
"""How far a norm's input may be from a captured site, as a share of its largest entry, to be that site; in
half precision what two passes of it differ by."""


@dataclass(frozen=True, eq=False)
class NormCall:
    """What one norm read and returned at the position [batch d_model]; `site` is what it read."""

    layer: int
    site: str
    name: str
    before: Float[Tensor, "batch d_model"]
    after: Float[Tensor, "batch d_model"]


class RecordedNorms:
    """What every norm of width d_model read and returned at the read position."""

    def __init__(self, batch: Batch, places: Tensor):
        self.batch, self.places = batch, places
        self.seen: list[tuple[int, str, Tensor, Tensor]] = []

    def add(self, layer: int, name: str, x: Tensor, out: Tensor) -> None:
        """Keep one call of a norm that sees the whole stream."""
        size, length = self.batch.ids.shape
        if x.numel() != size * length * x.shape[-1]:
            return
        rows = torch.arange(size, device=x.device)
        before, after = (
            wide(y.detach().reshape(size, length, -1)[rows, self.places.to(x.device)])
            for y in (x, out)
        )
        self.seen.append((layer, name, before, after))

    def calls(self, model: Model, kept: Mapping[tuple[str, int], Tensor]) -> list[NormCall]:
        """The calls whose input is a site of the layer, by the name of that site."""
        found, allowed = [], max(SAME, relative_tolerance(model.dtype))
        for layer, name, before, after in self.seen:
            if before.shape[-1] != model.spec.d_model:
                continue
            off = {
                site: relative_error(before, kept[site, layer])[0]
                for site in ("resid_pre", "resid_mid", "attn_out", "mlp_out")
                if (site, layer) in kept
            }
            nearest = min(off, key=lambda site: off[site])
            if off[nearest] < allowed:
                found.append(NormCall(layer, nearest, name, before, after))
        return found


@contextmanager
def norms_held(model: Model, recorded: RecordedNorms) -> Iterator[None]:
    """Inside, every norm of a block is linear: its output is the same, its scale has no gradient."""
    with ExitStack() as stack:
        for layer, block in enumerate(model.blocks):
            for name, module in block.named_modules():
                leaf = not any(True for _ in module.children())
                if leaf and all(parameter.ndim < 3 for parameter in module.parameters()):
                    hook = _holding(layer, name, recorded)
                    stack.callback(module.register_forward_hook(hook).remove)
        yield


def _holding(
    layer: int, name: str, recorded: RecordedNorms
) -> Callable[[nn.Module, tuple, object], Tensor | None]:
    def hook(module: nn.Module, args: tuple, output: object) -> Tensor | None:
        if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            return None
        x, bare = args[0], _Bare(module)
        if x.shape != output.shape or not _forgets_size(bare, x, output):
            return None
        recorded.add(layer, name, x, output)
        return _linear(bare, x, output)

    return hook


class _Bare(nn.Module):
    """A module that can be asked what it is from within its own hook: it is called without hooks."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module.forward(x)


@torch.no_grad()
def _forgets_size(module: nn.Module, x: Tensor, output: Tensor) -> bool:
    """Whether this is a norm: inputs all alike scaled give the same output, one entry scaled other ones.

    It is asked with its loudest input, which is none of padding, brought to a size that drowns epsilon
    and that float16 can square.
    """
    if x.ndim < 2 or not x.is_floating_point() or torch.equal(x, output):
        return False
    axes = min(2, x.ndim - 1)
    vectors = x.flatten(0, axes - 1)
    sizes = vectors.flatten(1).abs().amax(1)
    size = sizes.max()
    if not bool(size > 0) or not bool(size.isfinite()):
        return False
    length = 10.0 if x.dtype == torch.float16 else 1e6
    some = vectors[sizes.argmax()].reshape(*[1] * axes, *x.shape[axes:]) / size * length
    place = int(some.abs().argmax())
    uneven = some.clone()
    uneven.view(-1)[place] *= 100
    large, larger, other = (module(inputs) for inputs in (some, some * 2, uneven))
    allowed = max(map(relative_tolerance, (x.dtype, torch.float32)))  # what many norms compute in
    if not relative_error(larger, large)[0] <= allowed:
        return False
    # tanh forgets sizes too, but of every entry by itself: the others stay as they were.
    row, column = divmod(place, x.shape[-1])
    others = torch.arange(x.shape[-1], device=x.device) != column
    large, other = (out.reshape(-1, x.shape[-1])[row, others] for out in (large, other))
    return relative_error(other, large)[0] > allowed


def _linear(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """A norm's output as a linear function of its input.

    gain · (x [− mean x]) / σ + bias with σ held, where that is what the norm computes on its last axis;
    else (a gain for every head) x times a factor held for every entry.
    """
    if x.shape[-1] % 2 == 0:
        with torch.no_grad():
            held = FrozenNorm(module, x.shape[-1])
            gain, bias = wide(held.gain.to(x.device)), wide(held.bias.to(x.device))
            scale = held.scale(x).nan_to_num(1.0) if gain.ndim == 1 else torch.ones(1)
        made = gain * held.centre(wide(x)) / scale + bias
        allowed = max(map(relative_tolerance, (x.dtype, held.dtype)))
        if (
            made.shape == output.shape
            and relative_error(made.detach(), wide(output.detach()))[0] <= allowed
        ):
            return made.to(output.dtype)
    factor = (output / torch.where(x == 0, 1.0, x)).detach()
    return x * factor
