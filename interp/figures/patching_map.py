"""Where replacing an activation changes the metric: layer × head or layer × position, or a bar a neuron."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from interp.errors import unknown
from interp.figures.tokens import visible
from interp.report import Report

NEURONS = 40
"""Bars drawn of a neuron sweep: those with the largest effect."""
NOT_EXACT = "·"


def patching_map(report: Report, position: str | None = None) -> go.Figure:
    """Heat map of the effect (share of the way from corrupted to clean), red up and blue down.

    A dot marks a cell whose value is a first-order estimate; all others are exact.

    Args:
        position: of a sweep over heads or neurons at several positions, the one to draw; by default the
            one with the largest effect.
    """
    table = report.table
    what = "all positions" if set(table["position"]) == {"all"} else "each position alone"
    if "head" in table or "neuron" in table:
        names = list(dict.fromkeys(table["position"]))
        if position is None:
            position = str(table["position"].iloc[int(table["effect"].abs().to_numpy().argmax())])
        if position not in names:
            raise unknown("position of this report", position, names)
        table = table.loc[table["position"] == position]
        what = "all positions" if position == "all" else _names(report, [position])[0]
    options, unit = report.meta["options"], report.meta["unit"]
    verb = "restored in the corrupted run" if options["direction"] == "denoise" else "corrupted"
    if options["kind"] != "patch":
        verb = f"replaced ({options['kind']}, {options['direction']})"
    figure = _bars(table, unit) if "neuron" in table else _map(report, table)
    return figure.update_layout(
        title=f"{options['task']}: {options['site']} {verb}, {what}<br><sup>{options['metric']} clean "
        f"{report.meta['clean']:.2f}, corrupted {report.meta['corrupted']:.2f} {unit}; "
        f"effect 1 is the whole way. A dot: first-order estimate</sup>",
        template="plotly_white",
    )


def _map(report: Report, table: pd.DataFrame) -> go.Figure:
    """Layer × head, or layer × position."""
    by_head = "head" in table
    columns = sorted(set(table["head"])) if by_head else list(dict.fromkeys(table["position"]))
    names = [str(c) for c in columns] if by_head else _names(report, columns)
    n_layers = report.meta["model"]["n_layers"]
    values, marks, hovers = (
        np.full((n_layers, len(columns)), empty, kind)
        for empty, kind in ((np.nan, float), ("", object), ("", object))
    )
    place_of = {column: i for i, column in enumerate(columns)}
    for row in table.to_dict("records"):
        at = row["layer"], place_of[row["head"] if by_head else row["position"]]
        values[at], marks[at] = row["effect"], "" if row["exact"] else NOT_EXACT
        where = f"L{row['layer']}H{row['head']}" if by_head else f"L{row['layer']}, {names[at[1]]}"
        hovers[at] = where + "<br>" + _told(row, report.meta["unit"])
    largest = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=list(range(len(columns))),
            text=marks,
            texttemplate="%{text}",
            customdata=hovers,
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=False,
            colorscale="RdBu_r",
            zmin=-largest,
            zmax=largest,
            colorbar={"title": "effect"},
        )
    )
    ticks = {"tickmode": "array", "tickvals": list(range(len(columns))), "ticktext": names}
    return figure.update_layout(
        xaxis={"title": "head" if by_head else "position", "tickangle": 0 if by_head else -45}
        | ticks,
        yaxis={"title": "layer", "autorange": "reversed", "dtick": 1 if n_layers < 40 else 5},
        height=max(380, 20 * n_layers + 160),
    )


def _bars(table: pd.DataFrame, unit: str) -> go.Figure:
    """The strongest neurons, one bar each; estimates paler than exact values."""
    order = np.argsort(-table["effect"].abs().to_numpy(), kind="stable")[:NEURONS]
    rows = table.iloc[order].to_dict("records")
    figure = go.Figure(
        go.Bar(
            x=[f"L{row['layer']}N{row['neuron']}" for row in rows],
            y=[row["effect"] for row in rows],
            error_y={"type": "data", "array": [_error(row) for row in rows], "thickness": 1},
            text=["" if row["exact"] else NOT_EXACT for row in rows],
            customdata=[_told(row, unit) for row in rows],
            hovertemplate="%{x}<br>%{customdata}<extra></extra>",
            marker={
                "color": ["firebrick" if row["effect"] > 0 else "steelblue" for row in rows],
                "opacity": [1.0 if row["exact"] else 0.4 for row in rows],
            },
        )
    )
    return figure.update_layout(
        xaxis={"title": "neuron", "tickangle": -60}, yaxis={"title": "effect ± s.e."}, height=460
    )


def _error(row: dict[Any, Any]) -> float | None:
    """The standard error in the unit of the effect, where it is known."""
    if row["se"] != row["se"] or not row["change"]:
        return None
    return abs(row["se"] * row["effect"] / row["change"])


def _told(row: dict[Any, Any], unit: str) -> str:
    se = "" if row["se"] != row["se"] else f" ± {row['se']:.3f}"
    how = "exact" if row["exact"] else "first-order estimate"
    return (
        f"effect {row['effect']:+.1%}<br>change {row['change']:+.3f}{se} {unit}<br>"
        f"value {row['value']:.3f} {unit}, normalised {row['normalised']:.2f}<br>{how}"
    )


def _names(report: Report, positions: list[str]) -> list[str]:
    """Positions as a reader knows them: a number with the token or name that stands there."""
    labels = report.meta["position_labels"]
    return [
        f"{place} {visible(labels[int(place)])}".strip() if place.isdigit() else visible(place)
        for place in positions
    ]
