"""A circuit as a layered graph: layers across, heads up, edges by strength, pruned with a slider."""

from __future__ import annotations

import html
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from interp.errors import BadInput
from interp.report import Report

COLOURS = {
    "q": "#0072B2",
    "k": "#D55E00",
    "v": "#009E73",
    "mlp": "#999999",
    "logits": "#000000",
}
"""Okabe-Ito by what the edge ends in: told apart by most colour-blind readers."""
STEPS = 10
SHOWN = 300


@dataclass(frozen=True)
class Place:
    """Where a node stands: x its layer, y its head."""

    x: float
    y: float
    kind: str


def circuit_graph(report: Report, edges: int = SHOWN) -> go.Figure:
    """The strongest edges of an "edges" or "circuit_find" report; the slider keeps fewer of them.

    Columns are layers: the embedding on the left, each layer's heads above each other with its MLP
    below, logits on the right. Colour says what an edge ends in (q, k, v of a head, MLP, logits), width
    its rank; hover names it with its score. Edges of one step and colour are one trace, so hundreds of
    them open at once.

    Args:
        edges: how many edges at most, the strongest of the report's table.
    """
    if edges < 1:
        raise BadInput(f"edges={edges}: give at least 1")
    order = np.argsort(-report.table["score"].abs().to_numpy(), kind="stable")[:edges]
    table = report.table.iloc[order].reset_index(drop=True)
    n_layers = int(report.meta["model"]["n_layers"])
    names = {*table["sender"], *(node_of(receiver) for receiver in table["receiver"])}
    places = {name: place_of(name, n_layers) for name in sorted(names)}
    ranks = np.arange(len(table))
    limits = _limits(len(table))
    step = np.searchsorted(limits, ranks, side="right")  # 0: among the strongest few
    traces: list[go.Scatter] = []
    steps: list[int] = []
    for at in range(len(limits)):
        for kind, colour in COLOURS.items():
            mine = (step == at) & np.array([kind_of(r) == kind for r in table["receiver"]], bool)
            if mine.any():
                first = not any(trace.name == kind for trace in traces)
                traces.append(_lines(table.loc[mine], places, kind, colour, at, first))
                steps.append(at)
        mine = step == at
        if mine.any():
            traces.append(_middles(table.loc[mine], places, report))
            steps.append(at)
    for at in range(len(limits)):
        fresh = _first_seen(table, step, at)
        if fresh:
            traces.append(_nodes(fresh, places, report))
            steps.append(at)
    figure = go.Figure(traces)
    title = f"{html.escape(str(report.meta['model']['id']))}: {len(table)} strongest edges"
    if "task" in report.meta.get("options", {}):
        title += f" for {html.escape(str(report.meta['options']['task']))}"
    ticks = sorted({place.x for place in places.values()})
    return figure.update_layout(
        title=title,
        xaxis={
            "title": "layer",
            "tickvals": ticks,
            "ticktext": [_tick(x, n_layers) for x in ticks],
            "showgrid": False,
            "zeroline": False,
        },
        yaxis={"title": "head (MLP at the bottom)", "showgrid": False, "zeroline": False},
        sliders=[_slider(limits, steps)],
        template="plotly_white",
        hovermode="closest",
        height=620,
        legend={"title": "edge into"},
    )


def node_of(receiver: str) -> str:
    """The node whose input a receiver is: "5.2" for "5.2.q"."""
    return receiver.rsplit(".", 1)[0] if receiver[-1] in "qkv" else receiver


def kind_of(receiver: str) -> str:
    """What an edge into a receiver ends in: "q", "k", "v", "mlp" or "logits"."""
    return receiver[-1] if receiver[-1] in "qkv" else receiver.split(".")[0]


def place_of(name: str, n_layers: int) -> Place:
    """Where a node stands in the graph.

    >>> place_of("5.2", 30), place_of("logits", 30).x
    (Place(x=5.0, y=2.0, kind='head'), 30.0)
    """
    if name == "embed":
        return Place(-1.0, 0.0, "embed")
    if name == "logits":
        return Place(float(n_layers), 0.0, "logits")
    if name.startswith("mlp."):
        return Place(float(name.removeprefix("mlp.")), -1.5, "mlp")
    layer, head = name.split(".")
    return Place(float(layer), float(head), "head")


def _tick(x: float, n_layers: int) -> str:
    return "embed" if x < 0 else "logits" if x >= n_layers else f"{x:.0f}"


def _limits(n: int) -> np.ndarray:
    """How many edges each step of the slider keeps, from few to all."""
    if n == 0:
        return np.array([0])
    return np.unique(np.round(np.geomspace(min(10, n), n, STEPS)).astype(int))


def _ends(table: pd.DataFrame, places: dict[str, Place]) -> tuple[np.ndarray, ...]:
    start = [places[sender] for sender in table["sender"]]
    end = [places[node_of(receiver)] for receiver in table["receiver"]]
    return tuple(
        np.array([getattr(place, axis) for place in side])
        for side in (start, end)
        for axis in ("x", "y")
    )


def _lines(
    table: pd.DataFrame, places: dict[str, Place], kind: str, colour: str, at: int, legend: bool
) -> go.Scatter:
    """All edges of one colour and step as one broken line."""
    x0, y0, x1, y1 = _ends(table, places)
    gap = np.full(len(table), np.nan)
    x, y = (np.stack(part, 1).ravel() for part in ((x0, x1, gap), (y0, y1, gap)))
    return go.Scatter(
        x=[None if np.isnan(value) else float(value) for value in x],
        y=[None if np.isnan(value) else float(value) for value in y],
        mode="lines",
        line={"color": colour, "width": 0.5 + 3.5 * (1 - at / STEPS)},
        opacity=0.25 + 0.65 * (1 - at / STEPS),
        hoverinfo="skip",
        name=kind,
        legendgroup=kind,
        showlegend=legend,
    )


def _middles(table: pd.DataFrame, places: dict[str, Place], report: Report) -> go.Scatter:
    """Points to hover over, in the middle of the edges."""
    x0, y0, x1, y1 = _ends(table, places)
    unit = html.escape(str(report.meta.get("unit", "")))
    texts = []
    for row in table.to_dict("records"):
        text = f"{row['sender']} → {row['receiver']}<br>score {row['score']:+.4g} {unit}"
        if row.get("importance") is not None:
            text += f"<br>importance {row['importance']:+.3g}"
        texts.append(text)
    return go.Scatter(
        x=(x0 + x1) / 2,
        y=(y0 + y1) / 2,
        mode="markers",
        marker={"size": 7, "opacity": 0},
        customdata=texts,
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
    )


def _first_seen(table: pd.DataFrame, step: np.ndarray, at: int) -> list[str]:
    """Nodes whose strongest edge is in this step."""
    strongest: dict[str, int] = {}
    for row, level in zip(table.to_dict("records"), step.tolist(), strict=True):
        for name in (row["sender"], node_of(row["receiver"])):
            strongest.setdefault(name, level)
    return sorted(name for name, level in strongest.items() if level == at)


def _nodes(names: list[str], places: dict[str, Place], report: Report) -> go.Scatter:
    scores: dict[str, float] = {}
    if "nodes" in report.tables and {"node", "score"} <= set(report.tables["nodes"]):
        nodes = report.tables["nodes"]
        scores = dict(zip(nodes["node"], nodes["score"], strict=True))
    hovers = [
        name + (f"<br>all its edges {scores[name]:+.4g}" if name in scores else "")
        for name in names
    ]
    return go.Scatter(
        x=[places[name].x for name in names],
        y=[places[name].y for name in names],
        mode="markers+text",
        text=names,
        textposition="top center",
        textfont={"size": 9},
        marker={
            "size": 11,
            "color": "white",
            "line": {"color": "#333333", "width": 1.5},
            "symbol": ["circle" if places[name].kind == "head" else "square" for name in names],
        },
        customdata=hovers,
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
    )


def _slider(limits: np.ndarray, steps: list[int]) -> dict:
    return {
        "active": len(limits) - 1,
        "steps": [
            {
                "method": "restyle",
                "label": str(limit),
                "args": [{"visible": [of <= at for of in steps]}],
            }
            for at, limit in enumerate(limits.tolist())
        ],
        "currentvalue": {"prefix": "edges shown: "},
        "pad": {"t": 50},
    }
