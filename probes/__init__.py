"""What is encoded where; built on `interp`, never on `circuits`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probes.saes.evaluate import evaluate_sae
    from probes.saes.interop import load_sae, save_sae
    from probes.saes.model import SAE, SAEConfig
    from probes.saes.splice import splice
    from probes.saes.train import train_sae

_HOMES = {
    "SAE": "probes.saes.model",
    "SAEConfig": "probes.saes.model",
    "evaluate_sae": "probes.saes.evaluate",
    "load_sae": "probes.saes.interop",
    "save_sae": "probes.saes.interop",
    "splice": "probes.saes.splice",
    "train_sae": "probes.saes.train",
}

__all__ = ["SAE", "SAEConfig", "evaluate_sae", "load_sae", "save_sae", "splice", "train_sae"]


def __getattr__(name: str):
    """The public names, imported when first used."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'probes' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
