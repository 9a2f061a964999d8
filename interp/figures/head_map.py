"""Layer × head map of one score, with every head's labels and interval on hover."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from interp.errors import unknown
from interp.report import Report


def head_map(report: Report, score: str | None = None) -> go.Figure:
    """Heat map of `score` (a column of the heads table; the first detector's by default).

    Labelled heads carry the letters of their roles.
    """
    table = report.table
    numeric = [name for name in table.columns if table[name].dtype.kind == "f"]
    score = str(report.meta["detectors"][0]["name"] if score is None else score)
    if score not in numeric:
        raise unknown("score", score, numeric)
    letters = {d["name"]: d["letter"] for d in report.meta["detectors"]}
    shape = int(table["layer"].to_numpy().max()) + 1, int(table["head"].to_numpy().max()) + 1
    values, texts, hovers = (
        np.full(shape, np.nan),
        np.full(shape, "", object),
        np.full(shape, "", object),
    )
    for row in table.to_dict("records"):
        place = row["layer"], row["head"]
        roles = [role for role in row["labels"].split(",") if role]
        values[place] = row[score]
        texts[place] = "".join(letters[role] for role in roles)
        hovers[place] = (
            f"L{place[0]}H{place[1]}<br>{score} {row[score]:.3f}<br>{', '.join(roles) or 'no label'}"
        )
    unit = next((d["unit"] for d in report.meta["detectors"] if d["name"] == score), "")
    figure = go.Figure(
        go.Heatmap(
            z=values,
            text=texts,
            texttemplate="%{text}",
            customdata=hovers,
            hovertemplate="%{customdata}<extra></extra>",
            colorscale="Viridis",
            colorbar={"title": unit},
        )
    )
    return figure.update_layout(
        title=f"{report.meta['model']['id']}: {score.replace('_', ' ')}",
        xaxis={"title": "head", "dtick": 1},
        yaxis={"title": "layer", "autorange": "reversed"},
        template="plotly_white",
    )
