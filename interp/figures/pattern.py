"""One head's attention pattern on one evidence prompt."""

from __future__ import annotations

import plotly.graph_objects as go

from interp.errors import BadInput
from interp.figures.tokens import visible
from interp.report import Report


def pattern(report: Report, head: tuple[int, int] = (0, 0), prompt: int = 0) -> go.Figure:
    """Heat map of √attention of head (layer, head): queries down, keys across; the root keeps small weights visible."""
    if "pattern" not in report.arrays:
        raise BadInput("this report keeps no patterns; make it with evidence=4")
    n_prompts, n_layers, n_heads = report.arrays["pattern"].shape[:3]
    layer, index = head
    if not (0 <= prompt < n_prompts and 0 <= layer < n_layers and 0 <= index < n_heads):
        raise BadInput(
            f"no pattern of L{layer}H{index} on prompt {prompt}; the report has {n_layers} layers, "
            f"{n_heads} heads, {n_prompts} prompts"
        )
    shown = report.meta["prompts"][prompt]
    tokens = [f"{i} {visible(token)}" for i, token in enumerate(shown["tokens"])]
    root = report.arrays["pattern"][prompt, layer, index, : len(tokens), : len(tokens)] / 255
    ticks = {"showticklabels": len(tokens) <= 40}
    figure = go.Figure(
        go.Heatmap(
            z=root,
            x=tokens,
            y=tokens,
            customdata=root**2,
            hovertemplate="%{y} → %{x}<br>%{customdata:.3f}<extra></extra>",
            colorscale="Viridis",
            zmin=0,
            zmax=1,
            colorbar={"title": "√attention"},
        )
    )
    return figure.update_layout(
        title=f"L{layer}H{index}, {shown['title']}",
        xaxis={"title": "key", "constrain": "domain", **ticks},
        # square cells: a diagonal at 45° is an offset
        yaxis={
            "title": "query",
            "autorange": "reversed",
            "scaleanchor": "x",
            "constrain": "domain",
            **ticks,
        },
        template="plotly_white",
    )
