"""Who may import whom: circuits → interp ← probes, and inside interp only downwards."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS: tuple[tuple[str, ...], ...] = (
    ("interp.errors", "interp.devices", "interp.homes"),
    ("interp.sites", "interp.transformer_lens_elsewhere"),
    ("interp.run",),
    ("interp.models",),
    ("interp.block_norms", "interp.projections", "interp.skeleton"),
    ("interp.transformer_lens_parts",),
    ("interp.transformer_lens_weights",),
    (
        "interp.data",
        "interp.direction",
        "interp.metrics",
        "interp.registry",
        "interp.resampling",
        "interp.nnsight",
        "interp.quiet_direction",
        "interp.transformer_lens",
        "interp.unembedding",
    ),
    ("interp.remote",),
    ("interp.open",),
    ("interp.affine_lens", "interp.lens_text", "interp.lens_vectors"),
    ("interp.generate", "interp.last_token", "interp.ridge_lens", "interp.schemas"),
    ("interp.report",),
    ("interp.figures", "interp.lens"),
    ("interp.commands", "interp.terminal"),
    ("interp.batch",),
    ("interp.cli",),
    ("interp.__main__",),
)
"""A module imports from its own group and from groups above it. Groups on one line do not import
each other."""

EXCEPTIONS = {
    # A Report draws itself in a notebook and on saving; figures read Reports. Imported when drawn.
    ("interp.report", "interp.figures"),
    # A Cache shows itself as TransformerLens' when asked to; theirs needs a Model's weights.
    ("interp.run", "interp.transformer_lens"),
}
PACKAGES = {
    "interp": {"interp"},
    "circuits": {"interp", "circuits"},
    "probes": {"interp", "probes"},
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no modules in {package}"
    return found


def imports(tree: ast.AST, *, everywhere: bool) -> Iterator[str]:
    """Our own modules that are imported; TYPE_CHECKING and, unless `everywhere`, functions left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports from the root"
            name = node.module or ""
            yield name
            if name in PACKAGES or name in ("interp.models", "interp.models.sources"):
                yield from (f"{name}.{alias.name}" for alias in node.names)
        elif (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)) or (
            not everywhere and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        ):
            continue
        else:
            yield from imports(node, everywhere=everywhere)


def ours(path: Path, *, everywhere: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = imports(tree, everywhere=everywhere)
    return {name for name in names if name.split(".")[0] in PACKAGES}


def group(module: str) -> tuple[int, str] | None:
    """(level, group) of a module; None for the package `interp` itself, which imports lazily."""
    for level, names in enumerate(LAYERS):
        for name in names:
            if module == name or module.startswith(name + "."):
                return level, name
    return None


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package: str) -> None:
    """circuits and probes never import each other, interp imports neither: not even in a function."""
    for path in modules(package):
        for name in ours(path, everywhere=True):
            assert name.split(".")[0] in PACKAGES[package], f"{module_of(path)} imports {name}"


def test_every_module_of_interp_has_a_place() -> None:
    placed = {module_of(path): group(module_of(path)) for path in modules("interp")}
    assert [name for name, where in placed.items() if where is None] == ["interp"]


def test_inside_interp_imports_point_down() -> None:
    """Function-level imports count too, but for the listed exceptions."""
    used = set()
    for path in modules("interp"):
        mine = group(module_of(path))
        for name in ours(path, everywhere=True):
            theirs = group(name)
            if mine is None or theirs is None or mine[1] == theirs[1]:
                continue
            if (mine[1], theirs[1]) in EXCEPTIONS:
                assert name not in ours(path, everywhere=False), f"{module_of(path)}: top level"
                used.add((mine[1], theirs[1]))
                continue
            assert theirs[0] < mine[0], f"{module_of(path)} imports {name}"
    assert used == EXCEPTIONS, "an exception that nothing needs"


def test_importing_interp_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, interp, interp.registry\n"
        "assert 'Model' in dir(interp) and interp.Site.parse('z.1').layer == 1\n"
        "heavy = {'torch', 'transformers', 'pandas', 'plotly', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_interp_shows_the_nouns_and_says_what_is_missing() -> None:
    import interp

    for name in interp.__all__:
        assert getattr(interp, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Modle'"):
        _ = interp.Modle
