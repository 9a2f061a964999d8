"""Where a name of the packages lives: the nouns on first use, and for every other name what to import."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = ("interp", "circuits", "probes")
_DEFINED = r"^(?:def|class) {name}\b|^{name}(?::[^=\n]+)? = "
_RENAMED = {"from_pretrained": "interp.load(name)", "boot_transformers": "interp.load(name)"}
"""What the loaders of other libraries are called."""


def attribute(package: str, name: str, homes: Mapping[str, str]) -> Any:
    """What `package.name` is: a noun from its home, or a module of the package, imported now.

    `import interp` is quick because torch and transformers wait for the first use.

    Args:
        package: its import name. name: what was asked of it. homes: module of each of its nouns.

    Raises:
        AttributeError: neither; says which module defines the name, in any of the packages.
    """
    if name in homes:
        return getattr(importlib.import_module(homes[name]), name)
    if not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}") is not None:
        return importlib.import_module(f"{package}.{name}")
    message = f"module '{package}' has no attribute '{name}'"
    hint = "" if name.startswith("_") else _hint(package, name, homes)
    raise AttributeError(f"{message}{hint}", name=name, obj=importlib.import_module(package))


def names(package: str, homes: Mapping[str, str]) -> list[str]:
    """What can be asked of a package: its nouns and its modules."""
    path = importlib.import_module(package).__path__
    modules = (found.name for found in pkgutil.iter_modules(path))
    return sorted({*homes, *(module for module in modules if not module.startswith("_"))})


def _hint(package: str, name: str, homes: Mapping[str, str]) -> str:
    if name in _RENAMED:
        return f"; here: {_RENAMED[name]}"
    if modules := _defining(package, name):
        return "; write: " + ", or: ".join(f"from {module} import {name}" for module in modules[:3])
    if near := difflib.get_close_matches(name, [*homes, *names(package, homes)], n=1):
        return f"; did you mean '{near[0]}'?"
    return f"; dir({package}) lists what it has"


def _defining(package: str, name: str) -> list[str]:
    """The modules that define `name`, of the package itself first.

    >>> _defining("circuits", "logit_diff")
    ['interp.metrics']
    """
    root = Path(__file__).parent.parent
    defined = re.compile(_DEFINED.format(name=re.escape(name)), re.MULTILINE)
    found = []
    for other in sorted(PACKAGES, key=lambda other: other != package):
        for file in sorted((root / other).rglob("*.py"), key=lambda file: (len(file.parts), file)):
            if defined.search(file.read_text(encoding="utf-8")):
                parts = file.relative_to(root).with_suffix("").parts
                found.append(".".join(part for part in parts if part != "__init__"))
    return found
