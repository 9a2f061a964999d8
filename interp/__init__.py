"""Watch any transformer through one window: capture, edit, replay, report.

>>> import interp
>>> interp.Site.parse("z.5.1")
Site(name='z', layer=5, head=1)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.homes import attribute, names

if TYPE_CHECKING:
    from interp.data.prompts import Prompts
    from interp.errors import InterpError
    from interp.models.model import Model
    from interp.open import load
    from interp.report import Report
    from interp.run.batch import Batch
    from interp.run.cache import Cache, Run
    from interp.run.edits import Edit
    from interp.sites import Site

_HOMES = {
    "load": "interp.open",
    "Model": "interp.models.model",
    "Batch": "interp.run.batch",
    "Run": "interp.run.cache",
    "Cache": "interp.run.cache",
    "Edit": "interp.run.edits",
    "Site": "interp.sites",
    "Prompts": "interp.data.prompts",
    "Report": "interp.report",
    "InterpError": "interp.errors",
}

__all__ = [
    "Batch",
    "Cache",
    "Edit",
    "InterpError",
    "Model",
    "Prompts",
    "Report",
    "Run",
    "Site",
    "load",
]


def __getattr__(name: str):
    return attribute("interp", name, _HOMES)


def __dir__() -> list[str]:
    return names("interp", _HOMES)
