"""The models of a plan: found, named by their content, and measured without loading a weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from interp.batch.arguments import file_sha256
from interp.errors import BadInput
from interp.models.load import kind_of
from interp.run.files import write_atomically

TOKENS, VECTORS = 2048, 4
"""Tokens of the pass whose activations a memory estimate counts (16 prompts of 128), and vectors that it
keeps of each in every layer."""
BYTES = {"F64": 8, "F32": 4, "I64": 8, "I32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
NOT_CONTENT = (".md", ".png", ".pt", ".gitattributes", ".lock")
"""Endings of files in a checkpoint's folder that say nothing about the model, such as an optimizer's."""
HASHES = "hashes.json"


@dataclass(frozen=True)
class Source:
    """One model at one revision.

    Attributes:
        name, revision: as the plan names them; revision is None where none was given.
        given: what `interp.load` is given. loading: its options.
        sha256: hash of the checkpoint's files, or the repository and commit of a hub id.
        n_bytes: estimate of the memory that a unit needs, weights and activations; None if unknown.
    """

    name: str
    revision: str | None
    given: str
    loading: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    n_bytes: int | None = None

    @property
    def shown(self) -> str:
        """Name and revision for a person."""
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def key(self) -> str:
        """What tells two loads of this plan apart."""
        return json.dumps([self.given, self.loading], sort_keys=True)


class Hashes:
    """SHA-256 of files, kept beside the results so that a rerun reads only files that changed.

    A file is taken for unchanged while its size and time of change are.
    """

    def __init__(self, folder: Path):
        self.path = folder / HASHES
        try:
            self.known: dict[str, list[Any]] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or damaged: every file is read
            self.known = {}

    def of(self, path: Path) -> str:
        """The hash of a file."""
        stat = path.stat()
        mark = [stat.st_size, stat.st_mtime_ns]
        key = str(path.resolve())
        found = self.known.get(key)
        if found is None or found[:2] != mark:
            self.known[key] = found = [*mark, file_sha256(path)]
        return found[2]

    def save(self) -> None:
        """Keep them."""
        write_atomically(self.path, json.dumps(self.known).encode())


def described_source(source: Source, hashes: Hashes) -> Source:
    """The source with its content's hash and the memory that it needs.

    Raises:
        BadInput: there is no such model or revision, or its files are damaged or missing.
    """
    kind, name, path = kind_of(source.given)
    dtype = source.loading.get("dtype")
    if kind == "hub":
        sha256, files, config = _hub(name, source.loading)
    elif kind == "folder":
        sha256, files, config = _folder(path, name, hashes)
    else:
        sha256, files, config = _gguf(path if kind == "gguf" else None, hashes)
    weights = _weight_bytes(files, dtype or ("float32" if kind in ("gguf", "embedded") else None))
    n_bytes = None if weights is None else weights + _activation_bytes(config)
    return Source(source.name, source.revision, source.given, source.loading, sha256, n_bytes)


def _folder(folder: Path, shown: str, hashes: Hashes) -> tuple[str, list[Path], dict[str, Any]]:
    from interp.models.sources.folder import check_weights, read_config

    config = read_config(folder / "config.json", shown)
    check_weights(folder, shown)
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.suffix not in NOT_CONTENT
    ]
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{hashes.of(path)}\0".encode())
    return digest.hexdigest(), [p for p in files if p.suffix in (".safetensors", ".bin")], config


def _hub(repo: str, loading: Mapping[str, Any]) -> tuple[str, list[Path], dict[str, Any]]:
    """The commit that a branch or tag stands for now; weights are measured where they are here."""
    from interp.models.sources.folder import read_config
    from interp.models.sources.hub import config_file_of, reachable

    revision = loading.get("revision")
    where = {
        "revision": revision or "main",
        "local_files_only": not reachable(repo, revision),
    }
    file = config_file_of(repo, where)
    commit = file.parent.name if file.parent.parent.name == "snapshots" else where["revision"]
    digest = hashlib.sha256(f"{repo}@{commit}".encode()).hexdigest()
    return digest, sorted(file.parent.glob("*.safetensors")), read_config(file, repo)


def _gguf(path: Path | None, hashes: Hashes) -> tuple[str, list[Path], dict[str, Any]]:
    from interp.models.sources import embedded
    from interp.models.sources.gguf import read_header

    # Where the embedded model was unpacked, its headers are quicker read than the file's vocabulary.
    cache = embedded.cache_folder() / "models" / embedded.NAME
    unpacked = sorted(cache.glob("*.safetensors")) if path is None else []
    path = path or embedded.gguf_path()
    if path is None:
        raise BadInput(f"the embedded model '{embedded.NAME}' is not installed; {embedded.INSTALL}")
    metadata = read_header(path).metadata
    kind = metadata["general.architecture"]
    take = partial(metadata.get)
    config = {
        "hidden_size": take(f"{kind}.embedding_length"),
        "num_hidden_layers": take(f"{kind}.block_count"),
        "vocab_size": take(f"{kind}.vocab_size"),
    }
    return hashes.of(path), unpacked or [path], config


def _weight_bytes(files: Iterable[Path], dtype: str | None) -> int | None:
    """Bytes of all weights in `dtype`, or as they were saved; from the headers of their files."""
    size = None if dtype is None else _item_bytes(dtype)
    total = 0
    for path in files:
        if path.suffix == ".safetensors":
            for numbers, shape in _tensors(path):
                n = 1
                for axis in shape:
                    n *= axis
                total += n * (size or BYTES.get(numbers, 4))
        elif path.suffix == ".gguf":
            from gguf import GGUFReader

            total += sum(int(t.n_elements) for t in GGUFReader(path).tensors) * (size or 4)
        else:  # a pickle says nothing without being read; it was saved in 4 bytes a number
            total += path.stat().st_size * (size or 4) // 4
    return total or None


def _item_bytes(dtype: str) -> int | None:
    """Bytes of a number; None for "auto"."""
    from interp.models.sources.placement import DTYPES

    name = DTYPES.get(dtype.lower().removeprefix("torch."))
    return None if name is None else int(name.removeprefix("b").removeprefix("float")) // 8


def _tensors(path: Path) -> list[tuple[str, list[int]]]:
    """(dtype, shape) of every tensor of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return [(t["dtype"], t["shape"]) for name, t in header.items() if name != "__metadata__"]


def _activation_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of one pass over `TOKENS` tokens that keeps `VECTORS` a layer, and its logits, in float32."""
    text = config.get("text_config") or config

    def first(*names: str) -> int:
        return next((int(text[name]) for name in names if text.get(name)), 0)

    width = first("hidden_size", "n_embd", "d_model")
    layers = first("num_hidden_layers", "n_layer", "num_layers")
    return TOKENS * 4 * (VECTORS * width * layers + first("vocab_size"))
