"""Which device and which number format: what the user wrote, checked before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interp.errors import BadInput, unknown

if TYPE_CHECKING:
    import torch

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "float64": "float64",
    "fp64": "float64",
}
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def resolve_dtype(dtype: Any, *, default: str) -> Any:
    """The torch dtype meant by a name or a dtype, or "auto" for the checkpoint's own.

    >>> resolve_dtype("bf16", default="auto")
    torch.bfloat16
    >>> resolve_dtype(None, default="auto")
    'auto'
    """
    import torch

    if dtype is None:
        dtype = default
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise BadInput(f"dtype {dtype} is not a float type; give one of {', '.join(DTYPES)}")
        return dtype
    name = str(dtype).lower().removeprefix("torch.")
    if name == "auto":
        return "auto"
    if name not in DTYPES:
        raise unknown("dtype", str(dtype), ["auto", *DTYPES])
    return getattr(torch, DTYPES[name])


def resolve_device(device: Any, device_map: Any = None) -> torch.device | None:
    """The device to put the model on, checked to exist here; None where `device_map` decides.

    Not given or "auto" means the first CUDA device where there is one, else the CPU. Apple's mps is
    used only when asked for: it has no float64 and not every operation, so parts run on the CPU there.
    """
    import torch

    if device_map is not None:
        if device is not None:
            raise BadInput("device and device_map were both given; give one of them")
        if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
            resolve_device(_device_or_map(device_map))
        return None
    if device is None or str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = str(device).partition(":")
    if kind == "gpu":
        raise BadInput("no device 'gpu': give cuda (Nvidia, AMD), mps (Apple) or xpu (Intel)")
    if kind not in DEVICES[1:] or (index and not index.isdigit()):
        raise unknown("device", str(device), [*DEVICES, "cuda:0"])
    found = torch.device(str(device))
    count = _device_count(kind)
    if count == 0:
        raise BadInput(f"no {kind} device in this machine; give --device cpu")
    if (found.index or 0) >= count:
        raise BadInput(
            f"no device '{device}': this machine has {count}, {kind}:0 to {kind}:{count - 1}"
        )
    return found


def _device_or_map(device_map: str) -> str:
    if device_map.partition(":")[0] not in DEVICES:
        raise unknown("device_map", device_map, [*DEVICE_MAPS, *DEVICES[1:]])
    return device_map


def _device_count(kind: str) -> int:
    import torch

    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    if kind == "xpu":
        return torch.xpu.device_count() if torch.xpu.is_available() else 0
    return 1
