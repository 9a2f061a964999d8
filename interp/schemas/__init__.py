"""What report.json says of a report's tables and arrays, its JSON schemas, and older versions of it.

`report.json` names the type of every column and the shape of every array, so one JSON schema a kind of
report (`schemas/heads.json`, …) describes all that a program reads. `python -m interp.schemas` writes
them again after an analysis has changed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import BadInput, unknown

if TYPE_CHECKING:
    import numpy as np

HERE = Path(__file__).parent
SCHEMA_VERSION = 2
ARRAYS = "arrays.safetensors"


def schema_of(analysis: str) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the report.json of an analysis, in the present version.

    A column that is named has that type or, where nothing is in it, "null"; other columns may stand
    beside those, as an analysis has some for what it was asked for.

    >>> schema_of("heads")["properties"]["tables"]["properties"]["heads"]["required"]
    ['rows', 'columns']
    """
    known = sorted(path.stem for path in HERE.glob("*.json"))
    if analysis not in known:
        raise unknown("schema of an analysis", analysis, known)
    return json.loads((HERE / f"{analysis}.json").read_text(encoding="utf-8"))


def described_table(parquet: bytes | Path) -> dict[str, Any]:
    """Rows of a parquet file, and its columns with the types that its readers see."""
    from pyarrow import parquet as files

    source = io.BytesIO(parquet) if isinstance(parquet, bytes) else parquet
    metadata = files.read_metadata(source)
    columns = {
        field.name: str(field.type).replace("large_", "")
        for field in metadata.schema.to_arrow_schema()
    }
    return {"rows": metadata.num_rows, "columns": columns}


def described_array(array: np.ndarray) -> dict[str, Any]:
    """The dtype and shape of an array."""
    return {"dtype": str(array.dtype), "shape": list(array.shape)}


def read_description(folder: Path) -> dict[str, Any]:
    """The report.json of a folder, in the present version whatever it was written in.

    Raises:
        BadInput: there is none, it is damaged, or it is of a version that is not known here.
    """
    try:
        described = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        version = described["schema_version"]
    except FileNotFoundError as error:
        raise BadInput(
            f"no report in {folder}: it has no report.json; make one with `interp heads MODEL --out {folder}`"
        ) from error
    except NotADirectoryError as error:
        raise BadInput(
            f"{folder} is a file, and a report is a folder: give {folder.parent}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{folder}/report.json is damaged: {error!r}; make the report again"
        ) from error
    while version != SCHEMA_VERSION:
        if version not in UPGRADES:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            raise BadInput(
                f"{folder} has report schema {version}, this version reads {min(UPGRADES)} to {SCHEMA_VERSION}: "
                + ("update interp-suite" if newer else "make the report again")
            )
        described = UPGRADES[version](described, folder)
        version = described["schema_version"]
    return described


def _from_1(described: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Version 1 only named the tables and arrays."""
    from safetensors.numpy import load_file

    arrays = load_file(folder / ARRAYS) if described["arrays"] else {}
    return {
        **described,
        "schema_version": 2,
        "tables": {
            name: described_table(folder / f"{name}.parquet") for name in described["tables"]
        },
        "arrays": {name: described_array(array) for name, array in arrays.items()},
    }


UPGRADES: dict[int, Callable[[Mapping[str, Any], Path], dict[str, Any]]] = {1: _from_1}
"""What makes a description one version newer, by the version that it reads."""
