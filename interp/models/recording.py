"""Everything that happens in one forward: each module's call and each attention call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from interp.models.attention import Watch, window
from interp.models.calls import call_model, output_tensor
from interp.models.spec import first_tensor, with_first
from interp.run.batch import Batch


@dataclass
class ModuleCall:
    """One module's call, its tensors copied to the CPU.

    `keys` says where each of the inputs stood: an index of the arguments, or a keyword. `start` and
    `order` count the calls that had ended when this one began and when it ended.
    """

    inputs: list[Tensor]
    output: Tensor | None
    order: int
    is_tuple: bool
    original: Tensor | None
    version: int | None
    start: int = 0
    keys: tuple[int | str, ...] = ()
    dict_key: str = ""
    """What its output is called in the dict that was returned, if it was one."""

    @property
    def mutated(self) -> bool:
        """Whether the output was changed in place after the module returned it.

        Tensors made in inference mode count no versions: there the values are compared.
        """
        if self.original is None or self.version is None:
            return self.original is not None and not self._as_kept(self.original)
        return self.original._version != self.version

    def _as_kept(self, x: Tensor) -> bool:
        assert self.output is not None
        return torch.equal(x.nan_to_num().cpu(), self.output.nan_to_num())


@dataclass
class AttentionCall(Watch):
    """One attention call during the probe.

    Where a trial asks for it, `factor` multiplies its z, or `held` goes on instead.
    """

    module: nn.Module
    order: int = 0
    factor: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: list[Tensor] = field(default_factory=list)
    n_rows: int = 1
    held: Tensor | None = None
    needs_rows = True

    def inputs(self, q, k, v):
        self.tensors |= {"q": _kept(q), "k": _kept(k), "v": _kept(v)}
        return q, k, v

    def pattern(self, pattern, start):
        missing = self.tensors["k"].shape[2] - pattern.shape[3]
        self.rows.append(_kept(nn.functional.pad(pattern, (0, missing))))
        return pattern

    def z(self, z):
        self.tensors["z"] = _kept(z)
        if self.held is not None:
            return self.held.to(z, copy=True)
        return z if self.factor is None else z * self.factor.to(z)


@dataclass
class Recording:
    """Everything seen in the probe forward, of `n_rows` inputs; `without` says why no attention was."""

    module: nn.Module
    names: dict[nn.Module, str]
    calls: dict[str, list[ModuleCall]]
    attention: list[AttentionCall]
    output: Tensor
    without: str = ""
    n_rows: int = 0

    def call(self, name: str) -> ModuleCall:
        """The only call of a module that is known to be called once."""
        (call,) = self.calls[name]
        return call

    def once(self, name: str | None) -> ModuleCall | None:
        """The call of a module that was called exactly once."""
        calls = [] if name is None else self.calls.get(name, [])
        return calls[0] if len(calls) == 1 else None

    def within(self, outer: ModuleCall) -> Recording:
        """What happened during one call of a module, that call itself left out."""
        inside = {
            name: kept
            for name, calls in self.calls.items()
            if (kept := [call for call in calls if outer.start < call.order < outer.order])
        }
        attention = [call for call in self.attention if outer.start <= call.order < outer.order]
        return replace(self, calls=inside, attention=attention)


def record(
    module: nn.Module,
    batch: Batch,
    factors: list[Tensor] | None = None,
    restored: Mapping[str, list[Tensor]] | None = None,
    held: list[Tensor] | None = None,
) -> Recording:
    """One forward with every module call and every attention call recorded.

    Args:
        factors: what each attention call's z is multiplied with, in the order of the calls.
        restored: by module, what each of its calls returns whatever it computed.
        held: what goes on as each attention call's z whatever it computed.
    """
    names = {submodule: name for name, submodule in module.named_modules()}
    seen = Recording(module, names, {}, [], torch.empty(0), n_rows=batch.size)
    order = 0
    inputs: dict[int, tuple[list[Tensor], tuple[int | str, ...], int]] = {}

    def listen(attention: nn.Module) -> AttentionCall:
        number = len(seen.attention)
        factor, kept = (None if of is None else of[number] for of in (factors, held))
        call = AttentionCall(attention, order, factor, n_rows=batch.size, held=kept)
        seen.attention.append(call)
        return seen.attention[-1]

    def keep_inputs(submodule: nn.Module, args: tuple, kwargs: dict) -> None:
        found = {
            key: _kept(x)
            for key, x in [*enumerate(args), *kwargs.items()]
            if isinstance(x, Tensor) and x.is_floating_point()
        }
        inputs[id(submodule)] = (list(found.values()), tuple(found), order)

    def keep(submodule: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        nonlocal order
        order += 1
        out = first_tensor(output)
        kept, keys, start = inputs.pop(id(submodule), ([], (), order - 1))
        seen.calls.setdefault(names[submodule], []).append(
            ModuleCall(
                kept,
                None if out is None else _kept(out),
                order,
                not isinstance(output, Tensor),
                out,
                None if out is None or out.is_inference() else out._version,
                start,
                keys,
                str(next(iter(output), "")) if type(output) is dict else "",
            )
        )

    with ExitStack() as stack:
        for submodule in names:
            stack.callback(
                submodule.register_forward_pre_hook(keep_inputs, with_kwargs=True).remove
            )
            stack.callback(submodule.register_forward_hook(keep, with_kwargs=True).remove)
        for name, values in (restored or {}).items():
            hook = _restoring(values)
            stack.callback(module.get_submodule(name).register_forward_hook(hook).remove)
        stack.enter_context(window(module, listen))
        seen.output = _kept(output_tensor(call_model(module, batch)))
    return seen


def _restoring(values: list[Tensor]) -> Callable[..., Any]:
    left = iter(values)

    def restore(module: nn.Module, args: tuple, output: Any) -> Any:
        made = first_tensor(output)
        assert made is not None
        return with_first(output, next(left).to(made.device, copy=True))  # may be added to in place

    return restore


def _kept(x: Tensor) -> Tensor:
    """A copy on the CPU: a model may lie on several devices, and not every device has float64."""
    return x.detach().to("cpu", copy=True)
