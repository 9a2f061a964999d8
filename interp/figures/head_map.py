"""Layer × head map of one score, with every head's labels and interval on hover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from interp.errors import BadInput, unknown
from interp.figures.by_head import by_layer, heads_heatmap
from interp.figures.letters import role_letters
from interp.report import Report

IN_A_LINE = 6
"""Roles named in a line under the title: what fits into the width of a notebook."""


def head_map(report: Report, score: str | None = None) -> go.Figure:
    """Heat map of `score` (a column of the heads table; the first detector's by default).

    Labelled heads carry the letters of their roles.
    """
    table = report.table
    numeric = [name for name in table.columns if table[name].dtype.kind == "f"]
    score = str(report.meta["detectors"][0]["name"] if score is None else score)
    if score in report.meta.get("skipped", {}):
        raise BadInput(f"no score '{score}' in this report: {report.meta['skipped'][score]}")
    if score not in numeric:
        raise unknown("score", score, numeric)
    letters = role_letters(report.meta["detectors"])
    marks, hovers = [], []
    for row in table.to_dict("records"):
        roles = [role for role in row["labels"].split(",") if role]
        marks.append("".join(letters[role] for role in roles))
        hovers.append(
            f"L{row['layer']}H{row['head']}<br>{score} {row[score]:.3f}<br>"
            f"{', '.join(roles) or 'no label'}"
        )
    unit = next((d["unit"] for d in report.meta["detectors"] if d["name"] == score), "")
    cells = heads_heatmap(
        table, table[score].to_numpy(), hovers, marks=marks, unit=unit, colorscale="Viridis"
    )
    return by_layer(go.Figure(cells)).update_layout(
        title={
            "text": f"{report.meta['model']['id']}: {score.replace('_', ' ')}",
            "subtitle": {"text": _key(marks, letters)},
        }
    )


def _key(marks: Sequence[str], letters: Mapping[str, str]) -> str:
    """What the letters that stand in the map mean, a few to a line."""
    shown = set("".join(marks))
    means = [
        f"{letter} {name.replace('_', ' ')}" for name, letter in letters.items() if letter in shown
    ]
    lines = range(0, len(means), IN_A_LINE)
    return "<br>".join(", ".join(means[i : i + IN_A_LINE]) for i in lines)
