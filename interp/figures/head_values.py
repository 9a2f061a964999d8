"""What heads are worth to the loss, layers × heads: Shapley values, and effects of ablating each alone."""

from __future__ import annotations

import html

import plotly.graph_objects as go

from interp.figures.by_head import by_layer, heads_heatmap
from interp.report import Report


def shapley_map(report: Report) -> go.Figure:
    """Colour is the value; a dot marks heads whose interval leaves out 0."""
    game = report.meta["game"]
    return _value_map(
        report,
        f"each head's share of the loss without heads, {game['loss_none']:.2f}, "
        f"less that with all, {game['loss_all']:.2f}",
    )


def ablation_map(report: Report) -> go.Figure:
    """Colour is what the loss gains when the head is removed; a dot marks intervals that leave out 0."""
    clean = report.meta["ablation"]["loss_all"]
    return _value_map(report, f"loss without each head, less that with all, {clean:.2f}")


def _value_map(report: Report, told: str) -> go.Figure:
    table = report.table
    rows = table.to_dict("records")
    cells = heads_heatmap(
        table,
        table["value"].to_numpy(),
        [
            f"L{row['layer']}H{row['head']}<br>{row['value']:+.4f} ± {1.96 * row['error']:.4f} "
            "nats a token"
            for row in rows
        ],
        marks=["•" if row["low"] > 0 or row["high"] < 0 else "" for row in rows],
        unit="nats a token",
        signed=True,
    )
    model = html.escape(str(report.meta["model"]["id"]))
    return by_layer(go.Figure(cells)).update_layout(title=f"{model}: {told}")
