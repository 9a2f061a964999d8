"""What heads do and how they work together; built on `interp`, never on `probes`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from circuits.attribution import direct_attribution
    from circuits.flow import information_flow
    from circuits.heads.classify import classify_heads

_HOMES = {
    "classify_heads": "circuits.heads.classify",
    "direct_attribution": "circuits.attribution",
    "information_flow": "circuits.flow",
}

__all__ = ["classify_heads", "direct_attribution", "information_flow"]


def __getattr__(name: str):
    """The analyses, imported when first used."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'circuits' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
