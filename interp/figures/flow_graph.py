"""The important-flow graph: tokens across, layers up, edges by how much of the information they carry."""

from __future__ import annotations

import html

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from interp.errors import unknown
from interp.figures.parts import table_of
from interp.figures.tokens import visible
from interp.report import Report

COLOURS = {"attention": "#D55E00", "residual": "#999999", "mlp": "#0072B2"}
"""Okabe-Ito: told apart by most colour-blind readers."""
BINS = 8
HEIGHT = {"pre": 0.0, "mid": 0.5, "post": 1.0}
BEND = 0.14
"""How far an FFN edge stands off the residual edge beside it, in positions."""
SHOWN_TOKENS = 80


def flow_graph(report: Report, by: str = "through") -> go.Figure:
    """The graph of a "flow" report, with a slider that prunes weak edges.

    Hover names an edge's heads or neurons and the tokens that what they write would raise. Each bin of
    weights and kind of edge is one trace, so thousands of edges open at once.

    Args:
        by: "through" (share of the chosen token that passes the edge) or "weight" (share of the sum
            at the edge's end): sets width, opacity and what the slider prunes.
    """
    if by not in ("through", "weight"):
        raise unknown("edge measure", by, ("through", "weight"))
    edges = table_of(report, "flow")
    edges = edges.loc[edges["kind"] != "bias"].reset_index(drop=True)
    edges = edges.assign(colour=[kind.removesuffix("-mlp") for kind in edges["kind"]])
    limits = _limits(edges[by].to_numpy())
    place = np.clip(np.searchsorted(limits, edges[by], side="right") - 1, 0, len(limits) - 1)
    hovers = _hovers(report, edges)
    traces: list[go.Scatter] = []
    bins: list[int] = []
    for level in range(len(limits)):
        strength = (level + 1) / len(limits)
        for colour, value in COLOURS.items():
            here = edges.loc[(place == level) & (edges["colour"] == colour)]
            if len(here):
                strongest = level == place[edges["colour"] == colour].max()
                traces.append(_lines(here, value, strength, colour, bool(strongest)))
                bins.append(level)
        here = np.flatnonzero((place == level) & (edges["colour"] != "residual"))
        if len(here):
            traces.append(_hover_points(edges.iloc[here], [hovers[i] for i in here]))
            bins.append(level)
    traces.append(_end(report, edges))
    return go.Figure(traces).update_layout(**_layout(report), sliders=[_slider(limits, bins, by)])


def _limits(values: np.ndarray) -> np.ndarray:
    """Lower edges of the bins, evenly spaced in the logarithm over three decades at most."""
    top = float(values.max()) if len(values) else 1.0
    low = max(float(values.min()) if len(values) else 1.0, top / 1000)
    return np.concatenate([[0.0], np.geomspace(low, top, BINS + 1)[1:-1]])


def _ends(edges: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    layer, x0, x1 = (
        edges[name].to_numpy(dtype=float) for name in ("layer", "source_position", "position")
    )
    y0 = layer + np.array([HEIGHT[stage] for stage in edges["source_stage"]])
    y1 = layer + np.array([HEIGHT[stage] for stage in edges["stage"]])
    return x0, y0, x1, y1


def _middles(edges: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    x0, y0, x1, y1 = _ends(edges)
    return (x0 + x1) / 2 + BEND * (edges["kind"] == "mlp").to_numpy(), (y0 + y1) / 2


def _lines(
    edges: pd.DataFrame, colour: str, strength: float, name: str, legend: bool
) -> go.Scatter:
    """All edges of one colour and bin as one broken line."""
    x0, y0, x1, y1 = _ends(edges)
    xm, ym = _middles(edges)
    gap = np.full(len(edges), np.nan)
    x, y = (np.stack(part, 1).ravel() for part in ((x0, xm, x1, gap), (y0, ym, y1, gap)))
    return go.Scatter(
        x=[None if np.isnan(v) else round(v, 3) for v in x],
        y=[None if np.isnan(v) else round(v, 3) for v in y],
        mode="lines",
        line={"color": colour, "width": 0.5 + 4 * strength},
        opacity=0.2 + 0.8 * strength,
        hoverinfo="skip",
        name=name,
        legendgroup=name,
        showlegend=legend,
    )


def _hover_points(edges: pd.DataFrame, texts: list[str]) -> go.Scatter:
    x, y = _middles(edges)
    return go.Scatter(
        x=x.round(3),
        y=y.round(3),
        mode="markers",
        marker={"size": 7, "opacity": 0},
        customdata=texts,
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
    )


def _hovers(report: Report, edges: pd.DataFrame) -> list[str]:
    tokens = [visible(token) for token in report.meta["tokens"]]
    inside = _inside(report)
    texts = []
    for edge in edges.to_dict("records"):
        i, j, layer = edge["position"], edge["source_position"], edge["layer"]
        text = f"L{layer} {edge['kind']}: {j} {tokens[j]} → {i} {tokens[i]}"
        text += f"<br>weight {edge['weight']:.3f}, through {edge['through']:.3g}"
        effect = edge.get("effect")
        if effect is not None and not np.isnan(effect):
            text += f"<br>worth {effect:+.3f} logits"
        key = ("head", layer, i, j) if edge["kind"] == "attention" else ("neuron", layer, i, -1)
        text += inside.get(key, "") if edge["kind"] in ("attention", "mlp") else ""
        texts.append(text)
    return texts


def _inside(report: Report) -> dict[tuple[str, int, int, int], str]:
    """Lines on the heads and neurons of an edge (kind, layer, position, source), with their words."""
    words: dict[tuple, list[str]] = {}
    said = report.tables.get("flow_words", pd.DataFrame())
    place = ["kind", "layer", "position", "source_position", "index"]
    for row in said.to_dict("records"):
        words.setdefault(tuple(row[name] for name in place), []).append(
            f"‘{visible(row['token'])}’"
        )
    lines: dict[tuple[str, int, int, int], str] = {}
    for kind, name, letter in (("head", "flow_heads", "H"), ("neuron", "flow_neurons", "N")):
        for row in report.tables.get(name, pd.DataFrame()).to_dict("records"):
            key = (kind, row["layer"], row["position"], row.get("source_position", -1))
            line = f"<br>{letter}{row[kind]}: {row['weight']:.3f} "
            line += " ".join(words.get((*key, row[kind]), []))
            lines[key] = lines.get(key, "") + line
    return lines


def _end(report: Report, edges: pd.DataFrame) -> go.Scatter:
    """The token explained, at the top."""
    target = report.meta["target"]
    named = visible(target["answer"]["text"])
    if "instead" in target:
        named += f" − {visible(target['instead']['text'])}"
    top = max(edges["layer"], default=0) + 1
    return go.Scatter(
        x=[target["position"]],
        y=[top],
        mode="markers+text",
        text=[named],
        textposition="top center",
        marker={"size": 10, "color": "#000000"},
        hovertemplate=f"{target['value']:.2f} logits<extra></extra>",
        showlegend=False,
    )


def _slider(limits: np.ndarray, bins: list[int], by: str) -> dict:
    steps = [
        {
            "method": "restyle",
            "label": f"{limit:.2g}",
            "args": [{"visible": [of >= level for of in bins] + [True]}],
        }
        for level, limit in enumerate(limits)
    ]
    return {"steps": steps, "currentvalue": {"prefix": f"{by} at least "}, "pad": {"t": 60}}


def _layout(report: Report) -> dict:
    tokens = [visible(token) for token in report.meta["tokens"]]
    every = max(1, len(tokens) // SHOWN_TOKENS)
    ticks = list(range(0, len(tokens), every))
    return {
        "title": f"{html.escape(report.meta['model']['id'])}: information flow",
        "xaxis": {
            "tickvals": ticks,
            "ticktext": [tokens[i] for i in ticks],
            "tickangle": -60,
            "showgrid": False,
            "zeroline": False,
        },
        "yaxis": {"title": "layer", "showgrid": False, "zeroline": False},
        "template": "plotly_white",
        "hovermode": "closest",
        "height": 700,
    }
