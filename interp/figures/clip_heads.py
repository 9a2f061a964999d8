"""Heads of a CLIP with the texts that name them, and where the variance of image embeddings comes from."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from interp.figures.by_head import heads_heatmap
from interp.figures.tokens import visible
from interp.report import Report

SHOWN = 5
"""Texts of a head in a hover."""


def text_map(report: Report) -> go.Figure:
    """Described layers × heads: each head's share of the variance, its texts on hover."""
    table: Any = report.table
    said: dict[tuple[int, int], list[str]] = {}
    for row in report.tables["texts"].to_dict("records"):
        line = f"{row['explained']:.0%} {visible(row['text'])}"
        said.setdefault((row["layer"], row["head"]), []).append(line)
    hovers = [
        f"L{row['layer']}H{row['head']}: {row['share']:.1%} of the variance<br>"
        + "<br>".join(said.get((row["layer"], row["head"]), ["no text"])[:SHOWN])
        for row in table.to_dict("records")
    ]
    first = int(table["layer"].min())
    n_layers = int(table["layer"].max()) + 1 - first
    cells = heads_heatmap(
        table.assign(layer=table["layer"] - first),
        table["share"].to_numpy(),
        hovers,
        unit="share",
        signed=True,
        y0=first,
        dy=1,
    )
    return go.Figure(cells).update_layout(
        title=f"{report.meta['model']['id']}: heads and their texts",
        xaxis={"title": "head", "dtick": 1},
        yaxis={"title": "layer", "autorange": "reversed", "dtick": 1},
        template="plotly_white",
        height=max(320, 40 * n_layers + 160),
    )


def part_shares(report: Report) -> go.Figure:
    """Shares of the variance by layer: all heads together, and the MLP."""
    parts: Any = report.tables["parts"]
    figure = go.Figure()
    for part, name in (("head", "heads"), ("mlp", "MLP")):
        by_layer = parts[parts["part"] == part].groupby("layer")["share"].sum()
        figure.add_bar(x=by_layer.index.astype(int), y=by_layer.to_numpy(), name=name)
    embed = float(np.sum(parts[parts["part"] == "embed"]["share"]))
    return figure.update_layout(
        title=f"Where the variance of image embeddings is written (embedding itself {embed:.1%})",
        xaxis={"title": "layer", "dtick": 1},
        yaxis={"title": "share of variance", "tickformat": ".0%"},
        barmode="relative",
        template="plotly_white",
    )
