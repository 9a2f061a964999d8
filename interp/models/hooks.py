"""The hooks of one pass: what is captured and edited where, and where the pass may stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interp.models.attention import Watch
from interp.models.spec import Write, first_tensor, with_first
from interp.run.cache import Run
from interp.run.edits import Edit, Seen
from interp.run.statistics import RowStatistics


class Stop(Exception):
    """Raised inside a forward when nothing after this point is needed."""


@dataclass
class Plan:
    """What one pass captures and edits, by (site name, layer)."""

    capture: set[tuple[str, int]] = field(default_factory=set)
    edits: dict[tuple[str, int], list[Edit]] = field(default_factory=dict)
    statistics: RowStatistics | None = None
    statistics_until: int = -1

    @property
    def sites(self) -> set[tuple[str, int]]:
        return self.capture | set(self.edits)

    def wants(self, name: str, layer: int) -> bool:
        return (name, layer) in self.capture or (name, layer) in self.edits

    def wants_any(self, names: Iterable[str], layer: int) -> bool:
        return any(self.wants(name, layer) for name in names)

    def layers_of(self, *names: str) -> set[int]:
        return {layer for name, layer in self.sites if name in names}

    @property
    def last_layer(self) -> int:
        return max([layer for _, layer in self.sites] + [self.statistics_until], default=-1)


class RunWatch(Watch):
    """Shows one attention call's tensors to `touch`, heads behind positions."""

    def __init__(self, layer: int, plan: Plan, touch: Callable[..., Tensor], run: Run):
        self.layer, self.plan, self.touch, self.run = layer, plan, touch, run
        self.needs_rows = plan.statistics is not None or plan.wants_any(
            ("scores", "pattern"), layer
        )
        self._whole: dict[str, list[Tensor]] = {}
        self._n_keys = 0

    def inputs(self, q, k, v):
        self._n_keys = k.shape[2]
        seen = []
        for name, x in (("q", q), ("k", k), ("v", v)):
            if self.plan.wants(name, self.layer):
                x = self.touch(name, self.layer, x.transpose(1, 2)).transpose(1, 2)
            seen.append(x)
        return tuple(seen)

    def scores(self, scores, start):
        return self._chunk("scores", scores, start, fill=-torch.inf)

    def pattern(self, pattern, start):
        pattern = self._chunk("pattern", pattern, start, fill=0.0)
        if self.plan.statistics is not None:
            self.plan.statistics.update(self.layer, pattern, start)
        return pattern

    def z(self, z):
        for name, chunks in self._whole.items():
            # A single chunk is kept as it is: a copy would have no gradient.
            whole = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=2)
            self.run.cache.put(name, self.layer, whole)
        return self.touch("z", self.layer, z) if self.plan.wants("z", self.layer) else z

    def _chunk(self, name: str, x: Tensor, start: int, fill: float) -> Tensor:
        for edit in self.plan.edits.get((name, self.layer), ()):
            x = edit(x, Seen(self.layer, start, self.run.batch.mask))
        if (name, self.layer) in self.plan.capture:
            missing = self._n_keys - x.shape[-1]
            whole = nn.functional.pad(x, (0, missing), value=fill) if missing else x
            self._whole.setdefault(name, []).append(whole)
        return x


class BlockInput:
    """Pre-hook of a block: embed, resid_pre, and what resid_mid needs to know."""

    def __init__(self, layer: int, touch, plan: Plan, run: Run, *, stop: bool, grad: bool):
        self.layer, self.touch, self.plan, self.run, self.stop, self.grad = (
            layer,
            touch,
            plan,
            run,
            stop,
            grad,
        )
        self.resid: Tensor | None = None
        names = ("resid_pre", "embed") if layer == 0 else ("resid_pre",)
        self.needed = stop or grad or plan.wants_any((*names, "resid_mid"), layer)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        x = old = args[0] if args else kwargs["hidden_states"]
        if self.grad and not x.requires_grad:
            x = x.detach().requires_grad_()
        for name in ("embed", "resid_pre") if self.layer == 0 else ("resid_pre",):
            if self.plan.wants(name, self.layer):
                x = self.touch(name, self.layer, x)
        self.resid = x
        if self.stop:
            raise Stop
        return None if x is old else with_hidden(args, kwargs, x)


class BlockOutput:
    """Forward hook of a block: resid_post, the extras a replay needs, and stopping early."""

    def __init__(self, layer: int, touch, run: Run, plan: Plan, *, stop: bool):
        self.layer, self.touch, self.run, self.plan, self.stop = layer, touch, run, plan, stop
        self.needed = stop or plan.wants("resid_post", layer)

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        x = old = first_tensor(output)
        assert x is not None
        if isinstance(output, tuple):
            self.run.extras[self.layer] = output[1:]
        if self.plan.wants("resid_post", self.layer):
            x = self.touch("resid_post", self.layer, x)
        if self.stop:
            raise Stop
        return None if x is old else with_first(output, x)


def write_change(name: str, layer: int, write: Write, touch) -> Callable[[Tensor], Tensor]:
    """Change of a module's output that carries edits of what the block writes (`scale` times it)."""

    def change(x: Tensor) -> Tensor:
        if write.scale == 1:
            return touch(name, layer, x)
        written = x * write.scale
        new = touch(name, layer, written)
        if new is written and not torch.is_grad_enabled():
            return x
        # With gradients, what is captured has to lie on the way to the logits.
        return new / write.scale

    return change


def attn_write_change(
    layer: int, write: Write, touch, plan: Plan, pre: BlockInput
) -> Callable[[Tensor], Tensor]:
    """Change of the attention write that carries edits of attn_write and of resid_mid."""

    def change(x: Tensor) -> Tensor:
        written = x if write.scale == 1 else x * write.scale
        new = touch("attn_write", layer, written) if plan.wants("attn_write", layer) else written
        if plan.wants("resid_mid", layer):
            assert pre.resid is not None
            mid = pre.resid + new
            edited = touch("resid_mid", layer, mid)
            if edited is not mid or torch.is_grad_enabled():
                new = edited - pre.resid
        if new is written and (write.scale == 1 or not torch.is_grad_enabled()):
            return x
        return new / write.scale

    return change


def with_hidden(args: tuple, kwargs: dict, hidden: Tensor) -> tuple[tuple, dict]:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
