"""A Report is data first: tables, arrays and where they came from; pages and figures are made from it."""

from __future__ import annotations

import datetime
import hashlib
import importlib
import importlib.metadata
import inspect
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd

from interp.errors import BadInput, unknown
from interp.run.files import check_writable, write_together
from interp.schemas import (
    ARRAYS,
    SCHEMA_VERSION,
    described_array,
    described_table,
    read_description,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from interp.models.model import Model

PACKAGES = ("interp-suite", "torch", "transformers", "numpy")
"""Whose versions a report records."""
T = TypeVar("T")

SHOWN = 3
"""Models named in the id of several."""


class _Named(dict[str, T]):
    """Tables or arrays by name; BadInput with those there are for a name that is not among them."""

    def __init__(self, what: str, items: Mapping[str, T]):
        super().__init__(items)
        self.what = what

    def __missing__(self, name: str) -> T:
        raise unknown(self.what, name, self)


@dataclass
class Report:
    """What an analysis found, and what it was made from.

    Attributes:
        analysis: its name; also the name of the main table.
        tables: pandas DataFrames by name. arrays: numpy arrays by name.
        meta: schema version, model (id, hash, shape), options, seed, versions, times, and what the
            analysis adds.
    """

    analysis: str
    tables: dict[str, pd.DataFrame]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tables = _Named(f"table of the report '{self.analysis}'", self.tables)
        self.arrays = _Named(f"array of the report '{self.analysis}'", self.arrays)

    @property
    def table(self) -> pd.DataFrame:
        """The main table."""
        return self.tables[self.analysis]

    def figure(self, name: str | None = None, **options: Any) -> go.Figure:
        """A plotly figure of this report, to restyle or export; its main one by default."""
        from interp.figures import FIGURES

        known = FIGURES.get(self.analysis, {})
        name = next(iter(known), "") if name is None else name
        if name not in known:
            raise unknown(f"figure of '{self.analysis}'", name, known)
        draw = _named(known[name])
        taken = list(inspect.signature(draw).parameters.values())[1:]
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
            for option in set(options) - {parameter.name for parameter in taken}:
                raise unknown(f"option of figure '{name}'", option, [p.name for p in taken])
        return draw(self, **options)

    def to_html(self) -> str:
        """The whole report as one page that opens from disk, without network."""
        from interp.figures import PAGES

        return _named(PAGES.get(self.analysis, "interp.figures.figure_page:figure_page"))(self)

    def _repr_html_(self) -> str:
        from interp.figures.page import notebook_frame

        return notebook_frame(self.to_html())

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(table)} rows" for name, table in self.tables.items())
        return f"Report({self.analysis!r} of {self.meta.get('model', {}).get('id')}: {sizes})"

    def files(self, *, page: bool = True) -> dict[str, bytes]:
        """Every file of the saved report, by name; without `page`, no report.html."""
        from safetensors.numpy import save

        files: dict[str, bytes] = {}
        for name, table in self.tables.items():
            buffer = io.BytesIO()
            table.to_parquet(buffer, index=False)
            files[f"{name}.parquet"] = buffer.getvalue()
            files[f"{name}.csv"] = table.to_csv(index=False).encode("utf-8", "surrogatepass")
        if self.arrays:
            files[ARRAYS] = save(
                {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
            )
        if page:
            files["report.html"] = self.to_html().encode("utf-8", "replace")
        described = {"analysis": self.analysis} | self.meta | {"schema_version": SCHEMA_VERSION}
        described["tables"] = {
            name: described_table(files[f"{name}.parquet"]) for name in sorted(self.tables)
        }
        described["arrays"] = {
            name: described_array(self.arrays[name]) for name in sorted(self.arrays)
        }
        text = json.dumps(described, indent=1, default=_plain, allow_nan=False)
        files["report.json"] = text.encode()
        return files

    def save(self, folder: str | Path) -> Path:
        """Write report.json, tables (parquet and csv), arrays (safetensors) and report.html.

        All files appear together or none does.
        Raises SaveFailed where the folder cannot be written or the disk is full.
        """
        folder = Path(folder)
        check_writable(folder)
        write_together(folder, self.files())
        return folder

    @staticmethod
    def load(folder: str | Path) -> Report:
        """A report that was saved; BadInput says what is missing or too new."""
        from safetensors.numpy import load_file

        folder = Path(folder)
        meta = read_description(folder)
        tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in meta.pop("tables")}
        arrays = load_file(folder / ARRAYS) if meta.pop("arrays") else {}
        return Report(meta.pop("analysis"), tables, arrays, meta)


def provenance(model: Model, *, options: dict[str, Any], seed: int) -> dict[str, Any]:
    """Where a report comes from: model and weights, options, seed, versions, date."""
    from interp.models.load import model_sha256

    return {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "id": model.id,
            "sha256": model_sha256(model),
            **({"stack": model.spec.stack} if model.spec.named else {}),
            **model.spec.facts,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        **_made(options, seed),
    }


def combined_provenance(
    sources: Sequence[Mapping[str, Any]], *, options: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Where a report made from several models or reports comes from, by what each came from.

    Args:
        sources: the `meta` of each report, or what `provenance` gave for each model.
        options, seed: of the analysis that puts them together.

    Returns: as `provenance`, and under "models" every source's "model". "model" has a short id for all
        of them and the SHA-256 of theirs, in their order.

    >>> meta = [{"model": {"id": name, "sha256": "0" * 64}} for name in "abcdef"]
    >>> both = combined_provenance(meta, options={}, seed=0)
    >>> both["model"]["id"], len(both["models"])
    ('a, b, c and 3 more', 6)
    """
    if not sources:
        raise BadInput("no models or reports were given; wanted at least one")
    models = [dict(source.get("model", {})) for source in sources]
    names = [str(model.get("id")) for model in models]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    text = json.dumps([model.get("sha256", model) for model in models], default=_plain)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "id": ", ".join(names[:SHOWN]) + more,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        },
        "models": models,
        **_made(options, seed),
    }


def _made(options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What a report was made with, whatever it was made from."""
    return {
        "options": dict(options),
        "seed": seed,
        "versions": {name: installed_version(name) for name in PACKAGES},
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _named(address: str) -> Callable[..., Any]:
    """The function at "module:name"."""
    module, function = address.split(":")
    return getattr(importlib.import_module(module), function)


def installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _plain(value: Any) -> Any:
    """numpy numbers as JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} in a report's meta is not JSON")
