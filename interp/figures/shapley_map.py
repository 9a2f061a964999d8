"""Shapley values of heads, layers × heads."""

from __future__ import annotations

import html

import numpy as np
import plotly.graph_objects as go

from interp.report import Report


def shapley_map(report: Report) -> go.Figure:
    """Colour is the value; a dot marks heads whose interval leaves out 0."""
    table = report.table
    shape = int(table["layer"].to_numpy().max()) + 1, int(table["head"].to_numpy().max()) + 1
    values, marks = np.full(shape, np.nan), np.full(shape, "", object)
    hovers = np.full(shape, "", object)
    for row in table.to_dict("records"):
        place = row["layer"], row["head"]
        values[place] = row["value"]
        marks[place] = "•" if row["low"] > 0 or row["high"] < 0 else ""
        hovers[place] = (
            f"L{place[0]}H{place[1]}<br>{row['value']:+.4f} ± {1.96 * row['error']:.4f} nats a token"
        )
    largest = float(np.nanmax(np.abs(values))) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values,
            text=marks,
            texttemplate="%{text}",
            customdata=hovers,
            hovertemplate="%{customdata}<extra></extra>",
            colorscale="RdBu_r",
            zmin=-largest,
            zmax=largest,
            colorbar={"title": "nats a token"},
        )
    )
    game = report.meta["game"]
    return figure.update_layout(
        title=f"{html.escape(str(report.meta['model']['id']))}: each head's share of the loss without heads, "
        f"{game['loss_none']:.2f}, less that with all, {game['loss_all']:.2f}",
        xaxis={"title": "head", "dtick": 1},
        yaxis={"title": "layer", "autorange": "reversed", "dtick": 1},
        template="plotly_white",
        height=max(360, 22 * shape[0] + 140),
    )
