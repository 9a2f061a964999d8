"""The reference: every public name, under the module that defines it, from its docstring."""

from __future__ import annotations

import importlib
from functools import cache

from docs.making import ROOT

PACKAGES = ("interp", "circuits", "probes")

MORE: dict[str, tuple[str, tuple[str, ...]]] = {
    "interp": (
        "Beside the nouns",
        (
            "interp.data.pairs.Pairs",
            "interp.data.prompts.repeated_tokens",
            "interp.data.prompts.text_windows",
            "interp.data.labelled.LabelledTexts",
            "interp.data.activations.collect_activations",
            "interp.data.texts.documents",
            "interp.generate.generate",
            "interp.lens.logit_lens",
            "interp.lens.read",
            "interp.direction.logit_direction",
            "interp.metrics.loss",
            "interp.metrics.logit_diff",
            "interp.metrics.kl",
            "interp.run.statistics.Mass",
            "interp.run.statistics.Entropy",
            "interp.transformer_lens.view",
            "interp.nnsight.passes",
            "interp.registry.analysis",
            "interp.errors.BadInput",
            "interp.errors.Refused",
            "interp.errors.SaveFailed",
        ),
    ),
    "circuits": (
        "One dot deeper",
        (
            "circuits.heads.detector.Detector",
            "circuits.attribution.direct_contributions",
            "circuits.flow.flow_graph",
        ),
    ),
}
"""Names that are used from the module they live in, by package."""


@cache
def packages() -> tuple[str, ...]:
    """Every package that names what is public in it, in `__all__`; those of the user's first imports first."""
    found = [
        ".".join(path.parent.relative_to(ROOT).parts)
        for name in PACKAGES
        for path in sorted((ROOT / name).rglob("__init__.py"))
        if "__all__ =" in path.read_text(encoding="utf-8")
    ]
    return tuple(
        sorted(found, key=lambda name: (name.count("."), PACKAGES.index(name.split(".")[0])))
    )


@cache
def public_names() -> dict[str, str]:
    """`package.name` of every name in an `__all__` → the address where it is defined."""
    found = {}
    for package in packages():
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            home = getattr(value, "__module__", None) if callable(value) else None
            found[f"{package}.{name}"] = f"{home or package}.{name}"
    return found


def pages() -> dict[str, str]:
    """Markdown of the reference by package, one mkdocstrings block a name."""
    made = {}
    for package in packages():
        about = (importlib.import_module(package).__doc__ or "").splitlines()[0]
        parts = [f"# {package}", about]
        parts += [
            block(address, name)
            for name, address in public_names().items()
            if name.rpartition(".")[0] == package
        ]
        title, addresses = MORE.get(package, ("", ()))
        if addresses:
            parts += [f"# {title}", *(block(address, address) for address in addresses)]
        made[package] = "\n\n".join(parts) + "\n"
    return made


def block(address: str, shown: str) -> str:
    """What mkdocstrings fills in, under a heading that is how the name is written by a user."""
    return f"::: {address}\n    options:\n      heading: {shown}\n      toc_label: {shown}"
