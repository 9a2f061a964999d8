"""Relevance on the text itself: every token on the colour of its score."""

from __future__ import annotations

import html

import numpy as np
import plotly.graph_objects as go

from interp.errors import unknown
from interp.figures.parts import table_of
from interp.figures.tokens import visible
from interp.report import Report

TOKENS_PER_LINE = 16


def relevance_text(report: Report, score: str = "relevance", hide_first: bool = True) -> go.Figure:
    """The prompt, line by line, each token coloured by `score` (a column of the relevance table).

    Args:
        score: rollout, attention_flow, relevance, gradient_x_input or integrated_gradients.
        hide_first: leave the first token out of the colour scale: as a sink it can drown the rest.
    """
    table = table_of(report, "relevance")
    known = [name for name in table.columns if name not in ("position", "token")]
    if score not in known:
        raise unknown("score", score, known)
    values = table[score].to_numpy(dtype=float)
    texts = [visible(token) for token in table["token"]]
    n_lines = -(-len(values) // TOKENS_PER_LINE)
    width = min(len(values), TOKENS_PER_LINE)
    z = np.full((n_lines, width), np.nan)
    text = np.full((n_lines, width), "", dtype=object)
    hover = np.full((n_lines, width), "", dtype=object)
    for i, value in enumerate(values):
        place = divmod(i, TOKENS_PER_LINE)
        z[place], text[place] = value, texts[i]
        hover[place] = f"{i} {texts[i]}<br>{score.replace('_', ' ')} {value:.4g}"
    signed = bool((values < 0).any())
    scaled = values[1:] if hide_first and len(values) > 1 else values
    limit = float(np.nanmax(np.abs(scaled))) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=z,
            text=text,
            texttemplate="%{text}",
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            colorscale="RdBu_r" if signed else "Blues",
            zmin=-limit if signed else 0,
            zmax=limit,
            xgap=2,
            ygap=6,
            colorbar={"title": _unit(score)},
        )
    )
    return figure.update_layout(
        title=f"{html.escape(report.meta['model']['id'])}: {score.replace('_', ' ')} of each token",
        xaxis={"visible": False},
        yaxis={"visible": False, "autorange": "reversed"},
        template="plotly_white",
        height=110 + 60 * n_lines,
        margin={"t": 70, "b": 20},
    )


def _unit(score: str) -> str:
    units = {"gradient_x_input": "logits", "integrated_gradients": "logits", "relevance": ""}
    return units.get(score, "share")
