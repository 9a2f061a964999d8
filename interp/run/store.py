"""Activations on disk: shards of rows that are made once, checked, and read in a seeded shuffle.

Capturing costs 5 to 20 times what training on the activations costs, so they are stored. A shard is
a safetensors file with one array [rows, width] in 16 bits; `index.json` names the finished shards,
their checksums, and everything they depend on. What a shard holds is a function of its number, so a
store that was interrupted or damaged is mended by making the missing shards again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save
from torch import Tensor

from interp.errors import BadInput, unknown
from interp.run.files import write_atomically

FORMAT = 1
INDEX, EXTRAS = "index.json", "extras.safetensors"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Rows(Protocol):
    """Rows of activations that can be read in a seeded shuffle: a store on disk, or a tensor."""

    @property
    def n_rows(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def key(self) -> Mapping[str, Any]: ...

    def batches(
        self, size: int, *, seed: int = 0, epoch: int = 0, skip: int = 0
    ) -> Iterator[Float[Tensor, "rows width"]]: ...

    def rows(self, where: Int[Tensor, " n"]) -> Float[Tensor, "n width"]: ...


@dataclass(frozen=True, eq=False)
class MemoryRows:
    """Rows of a tensor, read as those of a store are.

    >>> rows = MemoryRows(torch.arange(6.0)[:, None])
    >>> rows.n_rows, rows.width, [batch.shape for batch in rows.batches(4)]
    (6, 1, [torch.Size([4, 1])])
    """

    x: Float[Tensor, "rows width"]
    key: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.x.shape[0]

    @property
    def width(self) -> int:
        """Numbers a row."""
        return self.x.shape[1]

    def batches(
        self, size: int, *, seed: int = 0, epoch: int = 0, skip: int = 0
    ) -> Iterator[Float[Tensor, "rows width"]]:
        """One pass over the rows: see `ActivationStore.batches`."""
        return _batches([self.n_rows], lambda _: self.x, size, seed, epoch, skip)

    def rows(self, where: Int[Tensor, " n"]) -> Float[Tensor, "n width"]:
        """Some rows, by number, float32."""
        return self.x[where].float()


class ActivationStore:
    """A folder of activation shards, opened for reading; made by `write_store`.

    Attributes:
        folder: where it is. key: everything its rows depend on (model, site, text, seed, …).
        shards: one entry a shard: name, rows, sha256.
        extras: small tensors that belong to it, such as the token ids of every window.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = _read_index(self.folder)
        if index is None:
            raise BadInput(f"no activation store in {folder}: it has no {INDEX}; make one first")
        missing = index["n_shards"] - len(index["shards"])
        if missing:
            raise BadInput(
                f"{folder} is unfinished: {missing} of {index['n_shards']} shards are missing; run "
                "what makes it again: finished shards are kept"
            )
        self.key: dict[str, Any] = index["key"]
        self.shards: list[dict[str, Any]] = index["shards"]
        self._width: int = index["width"]
        self._verified: set[int] = set()
        path = self.folder / EXTRAS
        if index["extras"] is not None and _sha256(path) != index["extras"]:
            raise BadInput(f"{path} is damaged (its checksum differs): run what makes it again")
        self.extras: dict[str, Tensor] = {} if index["extras"] is None else load_file(path)

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.folder)!r}, {self.n_rows} × {self.width})"

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return sum(shard["rows"] for shard in self.shards)

    @property
    def width(self) -> int:
        """Numbers a row."""
        return self._width

    def shard(self, number: int) -> Float[Tensor, "rows width"]:
        """One shard as it is stored; its checksum is compared the first time.

        Raises:
            BadInput: the shard is damaged or gone; says which.
        """
        shard = self.shards[number]
        path = self.folder / shard["name"]
        if number not in self._verified:
            if _sha256(path) != shard["sha256"]:
                raise BadInput(
                    f"shard {path} is damaged or gone (its checksum differs): run what makes the "
                    "store again: damaged shards are made anew, the others are kept"
                )
            self._verified.add(number)
        return load_file(path)["x"]

    def batches(
        self, size: int, *, seed: int = 0, epoch: int = 0, skip: int = 0
    ) -> Iterator[Float[Tensor, "rows width"]]:
        """One pass over all rows in batches of `size`, shuffled; float32.

        Shards are permuted, then the rows of each, by (seed, epoch): with the number of batches
        already read, those two integers are the whole reading state. Rows that do not fill a last
        batch are left out, unless there is no other batch.

        Args:
            size: rows a batch.
            skip: how many batches to pass over; costs nothing.
        """
        rows = [shard["rows"] for shard in self.shards]
        return _batches(rows, self.shard, size, seed, epoch, skip)

    def rows(self, where: Int[Tensor, " n"]) -> Float[Tensor, "n width"]:
        """Some rows, by number, float32."""
        starts = torch.tensor([0] + [shard["rows"] for shard in self.shards]).cumsum(0)
        where = where.long()
        if len(where) and not 0 <= int(where.min()) <= int(where.max()) < self.n_rows:
            raise BadInput(f"rows are 0 to {self.n_rows - 1}, not {where.min()} to {where.max()}")
        shard_of = torch.searchsorted(starts, where, right=True) - 1
        out = torch.empty(len(where), self.width)
        for number in shard_of.unique().tolist():
            mine = (shard_of == number).nonzero()[:, 0]
            out[mine] = self.shard(number)[where[mine] - starts[number]].float()
        return out


def write_store(
    folder: str | Path,
    *,
    key: Mapping[str, Any],
    shard_rows: Sequence[int],
    width: int,
    make: Callable[[int], Float[Tensor, "rows width"]],
    extras: Mapping[str, Tensor] | None = None,
    dtype: str = "float16",
    made: Callable[[int, str], None] = lambda number, why: None,
) -> ActivationStore:
    """A store in `folder`, of which only the shards that are not there yet, or are damaged, are made.

    Killed at any point, the same call goes on: a shard appears whole, then the index names it.

    Args:
        key: everything the rows depend on. A folder with another key is refused, not overwritten.
        shard_rows: rows of every shard.
        make: the rows of one shard, by its number; called in order.
        extras: small tensors kept with the store.
        dtype: "float16", "bfloat16" or "float32".
        made: called with the number of each shard and "kept", "made" or "rebuilt".

    Raises:
        BadInput: the folder holds another store or other files; values do not fit `dtype`.
        SaveFailed: the folder cannot be written.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> store = write_store(
    ...     folder, key={"seed": 0}, shard_rows=[2, 3], width=4,
    ...     make=lambda number: torch.full(([2, 3][number], 4), float(number)),
    ... )
    >>> store.n_rows, store.rows(torch.tensor([1, 4]))[:, 0].tolist()
    (5, [0.0, 1.0])
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise unknown("dtype of a store", dtype, DTYPES)
    described = {"dtype": dtype, "width": width, "shard_rows": list(shard_rows), **key}
    wanted = json.loads(json.dumps(described, sort_keys=True, default=str))
    index = _read_index(folder)
    if index is None and folder.exists() and any(folder.glob("*")):
        raise BadInput(f"{folder} holds other files than a store: give a new or empty folder")
    if index is not None and index["key"] != wanted:
        found = index["key"]
        changed = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        raise BadInput(
            f"{folder} holds a store made with {changed[0]}={_short(found.get(changed[0]))}, now "
            f"{_short(wanted.get(changed[0]))} is wanted: give another folder"
        )
    finished = {} if index is None else {shard["number"]: shard for shard in index["shards"]}
    kept = save({name: tensor.contiguous() for name, tensor in (extras or {}).items()})
    sha_of_extras = hashlib.sha256(kept).hexdigest() if extras else None
    if extras and (not (folder / EXTRAS).exists() or _sha256(folder / EXTRAS) != sha_of_extras):
        write_atomically(folder / EXTRAS, kept)

    def write_index() -> None:
        content = {
            "format": FORMAT,
            "key": wanted,
            "width": width,
            "n_shards": len(shard_rows),
            "extras": sha_of_extras,
            "shards": [finished[number] for number in sorted(finished)],
        }
        write_atomically(folder / INDEX, json.dumps(content, indent=1).encode())

    if index is None or index["extras"] != sha_of_extras:
        write_index()
    for number, rows in enumerate(shard_rows):
        name = f"shard-{number:05d}.safetensors"
        why = "made"
        if number in finished:
            if _sha256(folder / name) == finished[number]["sha256"]:
                made(number, "kept")
                continue
            why = "rebuilt"
        x = make(number)
        if x.shape != (rows, width):
            raise BadInput(f"shard {number} has shape {tuple(x.shape)}, wanted {(rows, width)}")
        content = save({"x": _narrow(x, dtype, number)})
        write_atomically(folder / name, content)
        sha256 = hashlib.sha256(content).hexdigest()
        finished[number] = {"number": number, "name": name, "rows": rows, "sha256": sha256}
        write_index()
        made(number, why)
    return ActivationStore(folder)


def _narrow(x: Tensor, dtype: str, number: int) -> Tensor:
    stored = x.detach().to("cpu", DTYPES[dtype]).contiguous()
    if not bool(stored.isfinite().all()):
        if not bool(x.isfinite().all()):
            raise BadInput(f"shard {number} has NaN or infinite activations: nothing was stored")
        raise BadInput(
            f"activations up to {float(x.abs().max()):.0f} do not fit {dtype}: give dtype='bfloat16'"
        )
    return stored


def _batches(
    shard_rows: Sequence[int],
    load: Callable[[int], Tensor],
    size: int,
    seed: int,
    epoch: int,
    skip: int,
) -> Iterator[Tensor]:
    """Batches of one epoch; shards that lie wholly before `skip` are not loaded."""
    total = sum(shard_rows)
    size = min(size, total)
    order = torch.randperm(len(shard_rows), generator=_generator(seed, epoch, -1)).tolist()
    passed, wanted, rest = 0, skip * size, []
    for number in order:
        rows = shard_rows[number]
        if passed + rows <= wanted:
            passed += rows
            continue
        perm = torch.randperm(rows, generator=_generator(seed, epoch, number))
        perm = perm[max(0, wanted - passed) :]
        passed += rows
        x = load(number)
        while len(perm):
            take = perm[: size - sum(map(len, rest))]
            perm = perm[len(take) :]
            rest.append(x[take].float())
            if sum(map(len, rest)) == size:
                yield rest[0] if len(rest) == 1 else torch.cat(rest)
                rest = []


def _generator(*numbers: int) -> torch.Generator:
    """A generator for a tuple of integers; hashed, so that neighbours are unrelated."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _read_index(folder: Path) -> dict[str, Any] | None:
    try:
        index = json.loads((folder / INDEX).read_text())
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{folder / INDEX} is damaged: {error}; give another folder") from error
    if index.get("format") != FORMAT:
        raise BadInput(f"{folder} has store format {index.get('format')}, wanted {FORMAT}")
    return index


def _sha256(path: Path) -> str:
    """Checksum of a file; of nothing where there is none."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except FileNotFoundError:
        return ""
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "…"
