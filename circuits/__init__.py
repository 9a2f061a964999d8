"""What heads do and how they work together; built on `interp`, never on `probes`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.homes import attribute, names

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
    return attribute("circuits", name, _HOMES)


def __dir__() -> list[str]:
    return names("circuits", _HOMES)
