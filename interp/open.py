"""`interp.load`: any checkpoint, opened, probed and verified."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

from interp.models.load import load_checkpoint
from interp.models.model import Model

if TYPE_CHECKING:
    import torch
    from torch import nn


def load(
    source: str | PathLike[str] | nn.Module = "smollm2-135m",
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """A Model from the embedded default, a hub id, a folder, a .gguf file, or a live module.

    Args:
        source: "smollm2-135m", "org/name", a path, or an nn.Module (which is used as it is).
        tokenizer: for a live module; elsewhere it comes with the checkpoint.
        device, dtype, device_map, revision: passed to the Hugging Face loaders.
        trust_remote_code: run code that a checkpoint brings; off unless you ask.

    Raises:
        BadInput: no such model, damaged or missing weights, NaN in them. Refused: nothing in the
            model can be addressed.
    """
    loaded = load_checkpoint(
        source,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        device_map=device_map,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    return Model(loaded.module, loaded.tokenizer, loaded.id, notes=loaded.notes)
