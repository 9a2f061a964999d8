"""The strongest heads of each role: what the command line shows of a report on heads."""

from __future__ import annotations

from typing import Any

import pandas as pd

from interp.report import Report

STRONGEST = 3


def strongest_heads(report: Report) -> pd.DataFrame:
    """For each role how many heads have it, and its strongest ones with interval, null and effect.

    "ablated" and "controls" are changes in loss (nats a token) on what the role serves.
    """
    rows: list[dict[str, Any]] = []
    for detector in report.meta["detectors"]:
        if not detector["labels"]:
            continue
        name = detector["name"]
        mine = report.table.loc[[name in labels.split(",") for labels in report.table["labels"]]]
        first = {"role": detector["title"], "heads": str(len(mine))}
        best: Any = mine.nlargest(STRONGEST, name)
        for row in best.to_dict("records"):
            rows.append(
                first
                | {
                    "best": f"L{row['layer']}H{row['head']}",
                    "score": f"{row[name]:.3f}",
                    "95 %": f"{row[f'{name}_low']:.2f}–{row[f'{name}_high']:.2f}",
                    "null": f"{row[f'{name}_null']:.3f}",
                    "ablated": _signed(row.get("ablation_effect")),
                    "controls": _signed(row.get("ablation_control")),
                }
            )
            first = {"role": "", "heads": ""}
        if not len(mine):
            rows.append(first)
    return pd.DataFrame(rows).fillna("")


def _signed(value: float | None) -> str:
    """A number with its sign; nothing where it was not measured."""
    return "" if value is None or value != value else f"{value:+.3f}"
