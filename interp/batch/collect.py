"""The results of a plan as one: tables of all units together, for pandas, duckdb and Hugging Face datasets.

Every unit's folder is named by its keys, so other programs read a table across the plan by themselves:

    SELECT model, revision, layer, head, induction
    FROM read_parquet('reports/sizes/units/*/*/analysis=heads/*/*/heads.parquet', hive_partitioning = true)
    JOIN 'reports/sizes/index.parquet' USING (unit)

The folder keeps units of earlier plans that were run in it; the join leaves them out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import BadInput, unknown
from interp.run.files import write_together

if TYPE_CHECKING:
    import pandas as pd

    from interp.report import Report

KEYS = ("model", "revision", "analysis", "data", "unit")


def folders(folder: str | Path) -> list[tuple[dict[str, str], Path]]:
    """(keys, folder) of every finished unit of the plan that was last run in a folder, in its order."""
    try:
        plan = json.loads((Path(folder) / "plan.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        plan = {"units": []}
    found = [
        ({key: unit[key] for key in KEYS}, Path(folder) / unit["folder"])
        for unit in plan["units"]
        if (Path(folder) / unit["folder"] / "manifest.json").exists()
    ]
    if not found:
        raise BadInput(f"no results of a plan in {folder}; make some with `interp batch PLAN.toml`")
    return found


def reports(folder: str | Path, analysis: str) -> list[Report]:
    """The reports of one analysis, a unit each, as `Report.load` gives them."""
    from interp.report import Report

    return [Report.load(path) for _, path in _of(folder, analysis)]


def tables(folder: str | Path, analysis: str, table: str | None = None) -> pd.DataFrame:
    """One table of an analysis for all units of a plan, with the columns model, revision, data and unit.

    A column that the table itself has keeps its name; the plan's is then called `plan_<name>`.

    Args:
        folder: of the plan. analysis: its name. table: of its tables, by default the main one.
    """
    import pandas as pd

    table = table or analysis
    parts = []
    for keys, path in _of(folder, analysis):
        file = path / f"{table}.parquet"
        if not file.exists():
            known = [other.stem for other in sorted(path.glob("*.parquet"))]
            raise unknown(f"table of '{analysis}' called", table, known)
        rows = pd.read_parquet(file)
        ours = {
            f"plan_{key}" if key in rows else key: keys[key] for key in KEYS if key != "analysis"
        }
        parts.append(pd.DataFrame(ours, index=rows.index).join(rows))
    return pd.concat(parts, ignore_index=True)


def export_dataset(folder: str | Path, out: str | Path) -> Path:
    """Write the tables of a plan as a Hugging Face dataset folder: parquet files and a card.

    `datasets.load_dataset(out, "heads")` reads the main table of "heads", and "heads.ov_tokens" another.
    """
    import io

    out = Path(out)
    kinds: dict[str, set[str]] = {}
    for keys, path in folders(folder):
        stems = {file.stem for file in path.glob("*.parquet")}
        kinds.setdefault(keys["analysis"], set()).update(stems)
    files: dict[str, bytes] = {}
    configs: dict[str, int] = {}
    for analysis, names in sorted(kinds.items()):
        for name in sorted(names):
            config = analysis if name == analysis else f"{analysis}.{name}"
            rows = tables(folder, analysis, name)
            buffer = io.BytesIO()
            rows.to_parquet(buffer, index=False)
            files[f"{config}.parquet"] = buffer.getvalue()
            configs[config] = len(rows)
    files["README.md"] = _card(configs).encode()
    write_together(out, files)
    return out


def _of(folder: str | Path, analysis: str) -> list[tuple[dict[str, str], Path]]:
    found = folders(folder)
    chosen = [(keys, path) for keys, path in found if keys["analysis"] == analysis]
    if not chosen:
        raise unknown(
            "analysis in these results called", analysis, sorted({k["analysis"] for k, _ in found})
        )
    return chosen


def _card(configs: dict[str, int]) -> str:
    """The dataset's card: its YAML header names the files, which is what the loader reads."""
    listed = [{"config_name": name, "data_files": f"{name}.parquet"} for name in configs]
    header: dict[str, Any] = {"configs": listed, "tags": ["interpretability"]}
    rows = "\n".join(f"| `{name}` | {n} |" for name, n in configs.items())
    # JSON is YAML.
    return (
        f"---\n{json.dumps(header)}\n---\n\n# Attention heads and circuits, measured\n\n"
        "Tables of interp-suite reports over several models. Columns `model`, `revision`, `data` and "
        f"`unit` say what a row was measured on.\n\n| table | rows |\n|---|---|\n{rows}\n"
    )
