"""Which senders act through a receiver: layer × head maps of path-patching effects, a receiver at a time."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from interp.errors import unknown
from interp.report import Report

CHOICES = 24
"""Receivers offered in the menu: those with the strongest paths."""


def path_map(report: Report, receiver: str | None = None) -> go.Figure:
    """Heat map of the change of the metric by sender; a menu chooses among the strongest receivers.

    Blue: the path supports the metric (it falls when the path is corrupted). A dot marks a screened,
    first-order value; all others are exact.

    Args:
        receiver: show this one only.
    """
    table, model, unit = report.table, report.meta["model"], report.meta["unit"]
    rows = table.to_dict("records")
    strength: dict[str, float] = {}
    for row in rows:
        name = row["receiver"]
        strength[name] = max(strength.get(name, 0.0), abs(row["change"]))
    ranked = sorted(strength, key=lambda name: -strength[name])
    if receiver is not None and receiver not in ranked:
        raise unknown("receiver of this report", receiver, ranked[:CHOICES])
    shown = ranked[:CHOICES] if receiver is None else [receiver]
    with_mlps = bool((table["head"] < 0).any())
    names = [str(head) for head in range(model["n_heads"])] + ["MLP"] * with_mlps
    # The embedding and what comes after the receiver are no senders: left empty.
    shape = model["n_layers"], len(names)
    figure = go.Figure()
    for place, name in enumerate(shown):
        values, marks = np.full(shape, np.nan), np.full(shape, "", object)
        hovers = np.full(shape, "", object)
        for row in (row for row in rows if row["receiver"] == name):
            at = row["layer"], row["head"] if row["head"] >= 0 else len(names) - 1
            how = f"exact, MLPs {row['definition']}" if row["exact"] else "screened"
            values[at], marks[at] = row["change"], "" if row["exact"] else "·"
            hovers[at] = (
                f"{row['sender']} → {name}<br>{row['change']:+.3f} {unit} "
                f"({row['normalised']:+.1%})<br>{how}"
            )
        largest = float(np.nanmax(np.abs(values))) or 1.0
        figure.add_heatmap(
            z=values,
            x=names,
            text=marks,
            texttemplate="%{text}",
            customdata=hovers,
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=False,
            colorscale="RdBu_r",
            zmin=-largest,
            zmax=largest,
            visible=place == 0,
            colorbar={"title": unit},
        )
    if len(shown) > 1:
        figure.update_layout(updatemenus=[_menu(shown)])
    where = report.meta["options"]["positions"]
    task = report.meta["options"]["task"]
    return figure.update_layout(
        title=f"{task}: change by the path from each sender"
        + (f", read at {where}" if where else "")
        + (f" → {shown[0]}" if len(shown) == 1 else ""),
        xaxis={"title": "head", "type": "category"},
        yaxis={
            "title": "layer",
            "autorange": "reversed",
            "dtick": 1 if model["n_layers"] < 40 else 5,
        },
        height=max(360, 22 * model["n_layers"] + 140),
        template="plotly_white",
    )


def _menu(shown: list[str]) -> dict:
    """One entry a receiver, each showing its own map."""
    buttons = [
        {
            "label": f"→ {name}",
            "method": "update",
            "args": [{"visible": [other == name for other in shown]}],
        }
        for name in shown
    ]
    return {"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"}


def role_map(report: Report) -> go.Figure:
    """Heads with a role, one colour a role; larger marks have a larger effect."""
    table, model = report.table, report.meta["model"]
    figure = go.Figure()
    for role in dict.fromkeys(table["role"]):
        rows = [row for row in table.to_dict("records") if row["role"] == role]
        figure.add_scatter(
            x=[row["head"] for row in rows],
            y=[row["layer"] for row in rows],
            name=role,
            mode="markers",
            marker={"size": [10 + 30 * min(abs(row["effect"]), 1) ** 0.5 for row in rows]},
            customdata=[
                f"{row['layer']}.{row['head']} {role}<br>effect {row['effect']:+.1%} into {row['into']}"
                f"<br>{row['attends']} {row['attention']:.2f}"
                for row in rows
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
    return figure.update_layout(
        title=f"{report.meta['options']['task']}: roles by path patching",
        xaxis={"title": "head", "dtick": 1, "range": [-0.7, model["n_heads"] - 0.3]},
        yaxis={"title": "layer", "range": [model["n_layers"] - 0.3, -0.7]},
        height=max(360, 22 * model["n_layers"] + 140),
        template="plotly_white",
    )
