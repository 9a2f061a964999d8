"""A table that a figure draws, or the reason why the report has none."""

from __future__ import annotations

import pandas as pd

from interp.errors import BadInput
from interp.report import Report

MADE_BY = {
    "lens": "lens",
    "attribute": "attribute",
    "flow": "flow",
    "flow_heads": "flow",
    "relevance": "flow",
}


def table_of(report: Report, name: str) -> pd.DataFrame:
    """The report's table called `name`; BadInput says why it is not there."""
    if name in report.tables:
        return report.tables[name]
    command = MADE_BY.get(name, report.analysis)
    reason = (report.meta.get("skipped") or {}).get(command)
    if reason is None:
        reason = f"make it with `interp {command}`"
    raise BadInput(f"this report of '{report.analysis}' has no table '{name}': {reason}")
