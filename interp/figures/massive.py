"""Massive activations through the layers: sizes, norms of tokens, and the heads that are sinks."""

from __future__ import annotations

import html

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from interp.report import Report

SIZES = {"largest": "#D55E00", "second": "#E69F00", "third": "#F0E442", "median": "#999999"}
PEAKS = {"peak": ("largest token", "#0072B2"), "first_peak": ("first token", "#56B4E9")}


def massive_layers(report: Report) -> go.Figure:
    """Largest entries and median of the stream behind each layer (log); norms; share of sink heads.

    Means over prompts. Norms are those of a token over the median token's.
    """
    layers = report.tables["layers"]
    x = layers["layer"]
    has_heads = "sink_share" in layers.columns
    titles = ["size of entries", "token norm over the median"] + ["sink heads"] * has_heads
    figure = make_subplots(
        rows=len(titles), shared_xaxes=True, vertical_spacing=0.08, subplot_titles=titles
    )
    for name, colour in SIZES.items():
        label = name if name == "median" else f"{name} |x|"
        figure.add_scatter(
            x=x, y=layers[name], name=label, line_color=colour, mode="lines+markers", row=1, col=1
        )
    for name, (label, colour) in PEAKS.items():
        figure.add_scatter(
            x=x, y=layers[name], name=label, line_color=colour, mode="lines+markers", row=2, col=1
        )
    if has_heads:
        share = layers["sink_share"]
        figure.add_bar(x=x, y=share, name="sink heads", marker_color="#009E73", row=3, col=1)
        figure.update_yaxes(title="share of heads", range=[0, 1], row=3, col=1)
    figure.update_yaxes(type="log", title="units of the stream", row=1, col=1)
    figure.update_yaxes(type="log", title="ratio", row=2, col=1)
    figure.update_xaxes(title="layer", row=len(titles), col=1)
    dimensions = sorted(set(report.table["dimension"]))
    told = "dimensions " + ", ".join(map(str, dimensions[:8])) if dimensions else "none"
    more = f" and {len(dimensions) - 8} more" if len(dimensions) > 8 else ""
    rate = report.meta.get("sink_rate")
    sinks = "" if rate is None else f"; sink rate {rate:.3f}"
    return figure.update_layout(
        title=f"{html.escape(str(report.meta['model']['id']))}: massive activations: {told}{more}{sinks}",
        template="plotly_white",
        height=240 * len(titles) + 80,
    )
