"""The page of a whole plan: a row a model and revision, a column an analysis, every cell a link to its report."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pandas as pd

from interp.figures.document import document, packed

NONE = "-"


def plan_page(index: pd.DataFrame, plan: dict[str, Any]) -> str:
    """A whole HTML document that lies beside the results; it opens from disk.

    Args:
        index: one row a unit (see `interp.batch.run_plan`). plan: the content of plan.json.
    """
    keys = ("analysis", "data", "options")
    columns = list(dict.fromkeys(zip(*(index[key] for key in keys), strict=True)))
    pages = plan.get("plan", {}).get("pages", True)
    rows = []
    groups: Any = index.groupby(["model", "revision"], sort=False)
    for (model, revision), units in groups:
        cells: list[list[dict[str, Any]]] = [[] for _ in columns]
        for unit in units.to_dict("records"):
            cells[columns.index(tuple(unit[key] for key in keys))].append(_cell(unit, pages))
        rows.append(
            {"model": model, "revision": "" if revision == NONE else revision, "cells": cells}
        )
    counts: Any = index["status"].value_counts()
    failed: Any = index[index["status"] == "failed"]
    facts = {
        "created": plan.get("created"),
        "engine": plan.get("engine"),
        "workers": plan.get("workers"),
        "threads a worker": plan.get("threads"),
        "units": len(index),
        "computing time": f"{index['seconds'].sum():.1f} s",
    }
    return document(
        "plan_page.html.j2",
        styles=("page.css", "plan_page.css"),
        scripts=("plan_page.js",),
        data=packed({}),
        n_models=len(set(index["model"])),
        counts=[f"{counts[name]} {name}" for name in counts.index],
        columns=[
            (name, " ".join(part for part in (data, options) if part not in ("", NONE)))
            for name, data, options in columns
        ],
        rows=rows,
        failed=[_failure(unit) for unit in failed.to_dict("records")],
        provenance=[(key, str(value)) for key, value in facts.items() if value is not None],
    )


def _cell(unit: dict[Any, Any], pages: bool) -> dict[str, Any]:
    done = unit["status"] in ("finished", "kept")
    target = f"{unit['folder']}/report.html" if done and pages else unit["folder"]
    words = {"finished": "report", "kept": "report", "failed": "failed", "waiting": "not yet"}
    return {
        "href": quote(target) if target else "",
        "word": words[unit["status"]],
        "seconds": f"{unit['seconds']:.1f} s" if done else "",
        "bad": unit["status"] == "failed",
    }


def _failure(unit: dict[Any, Any]) -> dict[str, str]:
    revision = "" if unit["revision"] == NONE else f"@{unit['revision']}"
    on = "" if unit["data"] == NONE else f" on {unit['data']}"
    return {
        "shown": f"{unit['analysis']} of {unit['model']}{revision}{on}",
        "error": unit["error"],
        "href": quote(unit["folder"]),
    }
