"""Faithfulness of circuits over their size, and what circuits of several tasks share."""

from __future__ import annotations

import html

import numpy as np
import plotly.graph_objects as go

from interp.report import Report

COLOURS = {"signed": "#0072B2", "absolute": "#D55E00", "random": "#999999", "circuit": "#009E73"}
NAMES = {"signed": "CPR", "absolute": "CMD", "random": "CPR"}


def faithfulness(report: Report) -> go.Figure:
    """Faithfulness over circuit size (log axis) with 95 % intervals; random circuits in grey.

    The dotted line at 1 is the model itself. Legends hold the areas: CPR of the signed ranking and of
    random circuits, CMD of the absolute ranking.
    """
    table, areas = report.table, report.tables["areas"]
    traces: list[go.Scatter] = []
    for ranking in ("signed", "absolute"):
        mine = table[table["ranking"] == ranking]
        if len(mine):
            colour = COLOURS[ranking]
            traces += [_band(mine, colour), _curve(mine, colour, _label(areas, ranking))]
    draws = table[table["ranking"].str.startswith("random")]
    for i, (_, mine) in enumerate(draws.groupby("ranking", sort=True)):
        trace = _curve(mine, COLOURS["random"], _label(areas, "random"))
        traces.append(trace.update(legendgroup="random", showlegend=i == 0, opacity=0.6))
    found = table[table["ranking"] == "circuit"]
    if len(found):
        traces.append(_curve(found, COLOURS["circuit"], "the saved circuit").update(mode="markers"))
    unit = html.escape(str(report.meta["unit"]))
    figure = go.Figure(traces)
    figure.add_hline(y=1, line={"dash": "dot", "color": "#333333"})
    figure.add_hline(y=0, line={"color": "#cccccc"})
    model, task = (html.escape(str(x)) for x in (report.meta["model"]["id"], report.meta["task"]))
    return figure.update_layout(
        title=f"{model}, {task}: {html.escape(str(report.meta['metric']))} "
        f"{report.meta['model_value']:.2f} {unit} whole, {report.meta['empty_value']:.2f} empty",
        xaxis={"title": f"edges kept, % of {report.meta['n_edges']:,}", "type": "log"},
        yaxis={"title": "faithfulness"},
        template="plotly_white",
        height=460,
    )


def _label(areas, ranking: str) -> str:
    rows = areas[areas["ranking"] == ranking].to_dict("records")
    told = ", ".join(f"{row['area']} {row['value']:.2f}" for row in rows)
    return f"{ranking}: {told}"


def _curve(table, colour: str, name: str) -> go.Scatter:
    rows = table.to_dict("records")
    return go.Scatter(
        x=table["size"],
        y=table["faithfulness"],
        mode="lines+markers",
        line={"color": colour},
        name=name,
        customdata=[
            f"{row['ranking']}, {row['size']:g} % ({row['nominal']:,} edges, {row['edges']:,} connected, "
            f"{row['nodes']} nodes)<br>faithfulness {row['faithfulness']:.3f} "
            f"[{row['low']:.3f}, {row['high']:.3f}]<br>metric {row['value']:.3f}"
            for row in rows
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _band(table, colour: str) -> go.Scatter:
    x = table["size"].to_numpy()
    low, high = table["low"].to_numpy(), table["high"].to_numpy()
    return go.Scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([low, high[::-1]]),
        fill="toself",
        fillcolor=colour,
        opacity=0.15,
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
    )


def overlap(report: Report) -> go.Figure:
    """Share of each task's heads that another's circuit has too, task by task."""
    table = report.table
    names = list(dict.fromkeys(table["a"]))
    shares = table.set_index(["a", "b"])
    values = np.array([[shares.loc[(a, b), "share_of_a"] for b in names] for a in names], float)
    texts = [
        [
            f"{html.escape(a)} in {html.escape(b)}<br>"
            f"{row['heads_shared']:.0f} of {row['heads_a']:.0f} heads, by chance {row['by_chance']:.0%}"
            f"<br>{row['edges_shared']:.0f} edges<br>faithfulness of {html.escape(a)}'s circuit on "
            f"{html.escape(b)}: {row['faithfulness']:.2f}"
            for b in names
            for row in [shares.loc[(a, b)]]
        ]
        for a in names
    ]
    shown = [html.escape(name) for name in names]
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=shown,
            y=shown,
            zmin=0,
            zmax=1,
            colorscale="Blues",
            customdata=texts,
            hovertemplate="%{customdata}<extra></extra>",
            texttemplate="%{z:.0%}",
            colorbar={"title": "share of heads"},
        )
    )
    return figure.update_layout(
        title=f"{html.escape(str(report.meta['model']['id']))}: heads of each row's circuit that the "
        "column's has too",
        yaxis={"autorange": "reversed"},
        template="plotly_white",
        height=160 + 60 * len(names),
    )
