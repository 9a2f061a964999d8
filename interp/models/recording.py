"""Everything that happens in one forward: each module's call and each attention call."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interp.models.attention import Watch, window
from interp.models.calls import call_model, output_tensor
from interp.models.spec import first_tensor
from interp.run.batch import Batch


@dataclass
class ModuleCall:
    """One module's call, its tensors cloned."""

    inputs: list[Tensor]
    output: Tensor | None
    order: int
    is_tuple: bool
    original: Tensor | None
    version: int

    @property
    def mutated(self) -> bool:
        """Whether the output was changed in place after the module returned it."""
        return self.original is not None and self.original._version != self.version


@dataclass
class AttentionCall(Watch):
    """One attention call during the probe."""

    module: nn.Module
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: list[Tensor] = field(default_factory=list)
    needs_rows = True

    def inputs(self, q, k, v):
        self.tensors |= {"q": q.clone(), "k": k.clone(), "v": v.clone()}
        return q, k, v

    def pattern(self, pattern, start):
        missing = self.tensors["k"].shape[2] - pattern.shape[3]
        self.rows.append(nn.functional.pad(pattern, (0, missing)).clone())
        return pattern

    def z(self, z):
        self.tensors["z"] = z.clone()
        return z


@dataclass
class Recording:
    """Everything seen in the probe forward."""

    module: nn.Module
    names: dict[nn.Module, str]
    calls: dict[str, list[ModuleCall]]
    attention: list[AttentionCall]
    output: Tensor

    def call(self, name: str) -> ModuleCall:
        """The only call of a module that is known to be called once."""
        (call,) = self.calls[name]
        return call

    def once(self, name: str | None) -> ModuleCall | None:
        """The call of a module that was called exactly once."""
        calls = [] if name is None else self.calls.get(name, [])
        return calls[0] if len(calls) == 1 else None


def record(module: nn.Module, batch: Batch) -> Recording:
    """One forward with every module call and every attention call recorded."""
    names = {submodule: name for name, submodule in module.named_modules()}
    seen = Recording(module, names, {}, [], torch.empty(0))
    order = 0

    def listen(attention: nn.Module) -> AttentionCall:
        seen.attention.append(AttentionCall(attention))
        return seen.attention[-1]

    def keep(submodule: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        nonlocal order
        order += 1
        tensors = [
            x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()
        ]
        out = first_tensor(output)
        seen.calls.setdefault(names[submodule], []).append(
            ModuleCall(
                inputs.pop(id(submodule), []) if tensors else [],
                None if out is None else out.clone(),
                order,
                not isinstance(output, Tensor),
                out,
                0 if out is None else out._version,
            )
        )

    inputs: dict[int, list[Tensor]] = {}

    def keep_inputs(submodule: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs[id(submodule)] = [
            x.clone()
            for x in (*args, *kwargs.values())
            if isinstance(x, Tensor) and x.is_floating_point()
        ]

    with ExitStack() as stack:
        for submodule in names:
            stack.callback(
                submodule.register_forward_pre_hook(keep_inputs, with_kwargs=True).remove
            )
            stack.callback(submodule.register_forward_hook(keep, with_kwargs=True).remove)
        stack.enter_context(window(module, listen))
        seen.output = output_tensor(call_model(module, batch)).clone()
    return seen
