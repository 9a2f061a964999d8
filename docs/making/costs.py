"""What is known of costs: the README's table, and the scripts of benchmarks/ that measured it."""

from __future__ import annotations

import ast
import inspect
from functools import cache

from docs.making import ROOT
from docs.making.docstrings import escaped, parsed, prose
from interp.registry import ANALYSES, Analysis

MEASURED = {
    "heads": ("capture", "heads", "memory", "page"),
    "edges": ("edges",),
    "circuit_find": ("edges", "discovery"),
    "circuit_evaluate": ("edges",),
    "flow": ("flow",),
    "sae_train": ("sae_quality", "sae_saelens", "sae_step", "sae_store"),
    "sae_features": ("sae_page",),
}
"""Scripts of benchmarks/ that measure an analysis without importing its function by name."""


def cost(name: str) -> str:
    """What was measured of an analysis, and by which script."""
    analysis = ANALYSES[name]
    scripts = [script for script in benchmarks() if _measures(script, analysis)]
    rows = [row for row in measurements() if any(f"/{script}.py" in row[2] for script in scripts)]
    parts = []
    if rows:
        parts.append(
            "On the default model (2 CPU cores, float32), each ratio measured in one run by the script named:"
        )
        table = ["| what | measured | by |", "|---|---|---|"]
        parts.append("\n".join([*table, *(f"| {' | '.join(row)} |" for row in rows)]))
    elif scripts:
        listed = ", ".join(f"[`benchmarks/{s}.py`](../benchmarks.md#{anchor(s)})" for s in scripts)
        parts.append(f"Measured by {listed}.")
    else:
        parts.append("No script of `benchmarks/` measures it.")
    parts.append('What a call took stands in its report: `report.meta["wall_time_s"]`, in seconds.')
    if "resume" in inspect.signature(analysis.function).parameters:
        parts.append(
            "An interrupted call keeps what is finished; the same command with `--resume` goes on from it."
        )
    return "\n\n".join(parts)


def _measures(script: str, analysis: Analysis) -> bool:
    named = analysis.function.__module__, analysis.function.__name__
    return script in MEASURED.get(analysis.name, ()) or named in _imported(script)


@cache
def _imported(script: str) -> set[tuple[str, str]]:
    """(module, name) of everything that a script of benchmarks/ imports by name."""
    text = (ROOT / "benchmarks" / f"{script}.py").read_text(encoding="utf-8")
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
    return {(node.module or "", alias.name) for node in imports for alias in node.names}


@cache
def benchmarks() -> dict[str, str]:
    """The module docstring of every script of benchmarks/."""
    found = {}
    for path in sorted((ROOT / "benchmarks").glob("[!_]*.py")):
        found[path.stem] = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return found


@cache
def measurements() -> tuple[tuple[str, str, str], ...]:
    """The rows of the README's table of costs: what, measured, by which script."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## What it costs", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip().strip("|").split(" | ") for line in section.split("\n| ")[2:]]
    split = [[part.strip().strip("|").strip() for part in row] for row in rows]
    return tuple((row[0], row[1], row[2].split("\n")[0].rstrip("| ")) for row in split)


def anchor(script: str) -> str:
    """The anchor of a script on the page of benchmarks."""
    return script.replace("_", "-")


def benchmarks_page() -> str:
    """How to run every script of benchmarks/, and what it measures."""
    parts = [
        "# Benchmarks",
        "Every number in these pages and in the README comes from a script of `benchmarks/`. Each prints what "
        "it measured beside what it is compared with, from one run on one machine; run them where nothing "
        "else runs. Ratios travel between machines better than seconds do.",
        "## Measured",
        "On the default model (2 CPU cores, float32).",
        "\n".join(
            ["| what | measured | by |", "|---|---|---|"]
            + [f"| {' | '.join(row)} |" for row in measurements()]
        ),
    ]
    for script, text in benchmarks().items():
        doc = parsed(text)
        if not text:
            continue
        run = f"python -m benchmarks.{script}"
        parts += [f"## {script} {{ #{anchor(script)} }}", f"*{escaped(doc.result)}*"]
        parts += [
            f"```console\n$ {run}\n```",
            prose([p for p in doc.paragraphs if p.strip() != run]),
        ]
    return "\n\n".join(filter(None, parts)) + "\n"
