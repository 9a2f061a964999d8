"""A Report is data first: tables, arrays and where they came from; pages and figures are made from it."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp.errors import BadInput, unknown
from interp.run.files import check_writable, write_together

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from interp.models.model import Model

SCHEMA_VERSION = 1
ARRAYS = "arrays.safetensors"


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
        return _named(known[name])(self, **options)

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

    def save(self, folder: str | Path) -> Path:
        """Write report.json, tables (parquet and csv), arrays (safetensors) and report.html.

        All files appear together or none does.
        Raises SaveFailed where the folder cannot be written or the disk is full.
        """
        from safetensors.numpy import save

        folder = Path(folder)
        check_writable(folder)
        html = self.to_html()
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
        files["report.html"] = html.encode("utf-8", "replace")
        described = {"analysis": self.analysis, "schema_version": SCHEMA_VERSION} | self.meta
        described |= {"tables": sorted(self.tables), "arrays": sorted(self.arrays)}
        text = json.dumps(described, indent=1, default=_plain, allow_nan=False)
        files["report.json"] = text.encode()
        write_together(folder, files)
        return folder

    @staticmethod
    def load(folder: str | Path) -> Report:
        """A report that was saved; BadInput says what is missing or too new."""
        from safetensors.numpy import load_file

        folder = Path(folder)
        try:
            meta = json.loads((folder / "report.json").read_text())
        except FileNotFoundError as error:
            raise BadInput(
                f"no report in {folder}: it has no report.json; make one with `interp heads MODEL --out {folder}`"
            ) from error
        except json.JSONDecodeError as error:
            raise BadInput(
                f"{folder}/report.json is damaged: {error}; make the report again"
            ) from error
        if meta.get("schema_version", 0) > SCHEMA_VERSION:
            raise BadInput(
                f"{folder} has report schema {meta['schema_version']}, this version reads up to "
                f"{SCHEMA_VERSION}: update interp-suite"
            )
        tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in meta.pop("tables")}
        arrays = load_file(folder / ARRAYS) if meta.pop("arrays") else {}
        return Report(meta.pop("analysis"), tables, arrays, meta)


def provenance(model: Model, *, options: dict[str, Any], seed: int) -> dict[str, Any]:
    """Where a report comes from: model and weights, options, seed, versions, date."""
    from interp.models.load import weights_sha256

    packages = ("interp-suite", "torch", "transformers", "numpy")
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "id": model.id,
            "sha256": weights_sha256(model.module),
            **model.spec.facts,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "options": options,
        "seed": seed,
        "versions": {name: _version(name) for name in packages},
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _named(address: str) -> Callable[..., Any]:
    """The function at "module:name"."""
    module, function = address.split(":")
    return getattr(importlib.import_module(module), function)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _plain(value: Any) -> Any:
    """numpy numbers as JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} in a report's meta is not JSON")
