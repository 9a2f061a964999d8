"""Loss over the number of heads removed, for each order of removal."""

from __future__ import annotations

import html

import plotly.graph_objects as go

from interp.report import Report

COLOURS = {"greedy": "#0072B2", "once": "#D55E00", "random": "#999999"}
NAMES = {
    "greedy": "least missed first, measured again",
    "once": "by the first measurement",
    "random": "random orders",
}


PROMPTS = {"repeated": "the second copy of random tokens", "text": "prose"}


def pruning_curve(report: Report) -> go.Figure:
    """A line an order, with its interval over prompts."""
    figure = go.Figure()
    for order in reversed(NAMES):  # the main curve is drawn last, over the others
        mine = report.table[report.table["order"] == order]
        colour = COLOURS[order]
        x = mine["removed"].tolist()
        figure.add_trace(
            go.Scatter(
                x=x + x[::-1],
                y=mine["high"].tolist() + mine["low"].tolist()[::-1],
                fill="toself",
                fillcolor=colour,
                opacity=0.15,
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
            )
        )
        figure.add_trace(
            go.Scatter(
                x=x,
                y=mine["loss"].tolist(),
                mode="lines+markers",
                line={"color": colour},
                name=NAMES[order],
            )
        )
    options = report.meta["options"]
    return figure.update_layout(
        title=f"{html.escape(str(report.meta['model']['id']))}: loss on {PROMPTS[options['data']]} "
        "as heads are removed",
        xaxis={"title": "heads removed (mean-ablated)"},
        yaxis={"title": "loss, nats a token"},
        legend={"traceorder": "reversed"},
        template="plotly_white",
        height=460,
    )
