"""A second device without a second device: its tensors are computed on the CPU and do not mix with the CPU's.

Tensors on "other:0", "other:1", … behave as on a GPU: an operation on tensors of two devices fails, so does
numpy, a factory call without `device=` makes a CPU tensor, and a CPU generator draws for the CPU alone. What
runs here with the numbers of the CPU forgets no device on the way. `other_device(like_mps=True)` has no float64
(nothing of it is made there, moved there, or cast on the way off) and none of the kernels that MPS lacks. What it
does not show: that every kernel exists on a real GPU, or its rounding.

    with other_device():
        module.to("other")
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "other"
COPY = torch.ops.aten.copy_.default
MOVES = (COPY, torch.ops.aten._to_copy.default)
WIDE = (torch.float64, torch.complex128)
NOT_ON_MPS = {
    "_linalg_eigh", "_linalg_eigvals", "_pdist_forward", "binomial", "frexp", "geqrf", "hash_tensor", "heaviside",
    "linalg_eig", "linalg_eigvals", "linalg_ldl_factor_ex", "linalg_lstsq", "linalg_lu_solve", "linalg_matrix_exp",
    "logit_", "mode", "ormqr", "poisson", "put_", "special_log_ndtr", "special_ndtri", "take",
}  # fmt: skip
"""Operations on dense tensors that torch's table of kernels has for the CPU and not for MPS.

Source: torchgen/packaged/ATen/native/native_functions.yaml of torch 2.13 (`linalg_svd` is not there either, but
MPSFallback.mm computes it on the CPU).
"""
_like_mps = False


class Other(Tensor):
    """A tensor on device `index`; `raw` is where its numbers are."""

    raw: Tensor
    index: int
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, raw: Tensor, index: int) -> Other:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, index),
            requires_grad=raw.requires_grad,
        )
        made.raw, made.index = raw, index
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Other({self.raw!r}, {self.index})"

    def tolist(self) -> Any:
        return self.raw.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"a tensor on {self.device} has no numpy view: take it to the CPU first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _compute(op, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Sees calls that have no tensor of the device among their arguments."""

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _compute(op, args, kwargs or {})


@contextmanager
def other_device(like_mps: bool = False) -> Iterator[None]:
    """The device exists inside the `with`; `like_mps`, without float64 and the kernels that MPS lacks."""
    global _like_mps
    _register()
    before, _like_mps = _like_mps, like_mps
    try:
        with _Factories():
            yield
    finally:
        _like_mps = before


def _compute(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    others = [x for x in given if isinstance(x, Other)]
    asked = kwargs.get("device")
    if asked is not None and torch.device(asked).type == NAME:
        place: int | None = torch.device(asked).index or 0
        kwargs = {**kwargs, "device": torch.device("cpu")}
    else:
        place = others[0].index if others and asked is None else None
    if op not in MOVES:
        _check_one_device(op, args, given)
    if place is not None and isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"{op} on {NAME} was given a generator of the CPU")
    if others and _like_mps:
        _check_kernel(op)
    out = op(*tree_map(_raw, args), **tree_map(_raw, kwargs))
    if _like_mps and (place is not None or others):
        _check_narrow(op, out)
    if op is COPY:
        return args[0]
    if torch.Tag.inplace_view in op.tags and isinstance(args[0], Other):
        with no_dispatch():  # the wrapper's own shape follows
            op(*args, **kwargs)
        return args[0]
    same = {id(_raw(x)): x for x in given}  # what was changed in place, or written to with out=

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        known = same.get(id(x))
        return known if known is not None else x if place is None else Other(x, place)

    return tree_map(wrapped, out)


def _check_one_device(op: Any, args: tuple, given: list[Tensor]) -> None:
    """A CPU tensor of no dimensions may join any device, a CPU index may index any tensor; nothing else."""
    index = op.name().startswith("aten::index") and isinstance(args[0], Other)
    joined = {x.device for x in given if isinstance(x, Other) or (x.ndim and not index)}
    if len(joined) > 1:
        shapes = [(str(x.device), tuple(x.shape)) for x in given]
        raise RuntimeError(f"{op} was given tensors of several devices: {shapes}")


def _check_kernel(op: Any) -> None:
    if op.name().removeprefix("aten::").split(".")[0] in NOT_ON_MPS:
        raise NotImplementedError(
            f"the operator {op} is not implemented for {NAME}, as it is not for MPS"
        )


def _check_narrow(op: Any, out: Any) -> None:
    """No float64 there; a cast on the way to the CPU is made there too (MPS casts on the source's side)."""
    if any(isinstance(x, Tensor) and x.dtype in WIDE for x in tree_leaves(out)):
        raise TypeError(
            f"{op}: cannot convert a tensor of {NAME} to float64, which it does not have"
        )


def _raw(x: Any) -> Any:
    return x.raw if isinstance(x, Other) else x


_library: list[torch.library.Library] = []


def _register() -> None:
    """Make the device known to torch, once a process; C++ asks these kernels when it indexes by a list."""
    if _library:
        return
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")

    def empty(op: Any) -> Any:
        return lambda *args, **kwargs: _compute(op, args, kwargs)

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        _raw(target).copy_(_raw(source))
        return target

    library.impl("empty_strided", empty(torch.ops.aten.empty_strided.default), "PrivateUse1")
    library.impl("empty.memory_format", empty(torch.ops.aten.empty.memory_format), "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    _library.append(library)
