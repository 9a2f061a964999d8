"""What heads and neurons say: layers × heads with each head's top token, and the strongest neurons."""

from __future__ import annotations

import html

import numpy as np
import plotly.graph_objects as go

from interp.errors import BadInput, unknown
from interp.figures.tokens import visible
from interp.report import Report

KINDS = {
    "output": "what each head writes",
    "value": "what each head would write if it read its main source alone",
    "query": "what each head looks for at its main source",
    "key": "what a query must hold to be answered by that source",
}
LETTERS = 9
CELL_WIDTH, CELL_HEIGHT, MARGIN = 74, 21, 170
"""Pixels of a cell, and how many letters of a token fit into it."""


def head_words(report: Report, what: str = "output", *, prompt: int = 0) -> go.Figure:
    """Heat map of the size of every head's output, with the top token of its `what` in the cell.

    Hovering shows all words of the head and the position it takes most from.

    Args:
        what: output, value, query or key. prompt: which prompt.
    """
    if what not in KINDS:
        raise unknown("kind of vector", what, KINDS)
    rows = _rows(report, "heads", prompt)
    words = report.table.query(
        "prompt == @prompt and kind == 'head' and what == @what and place == 0"
    )
    first = {(row["layer"], row["index"]): row["token"] for row in words.to_dict(orient="records")}
    shape = report.meta["model"]["n_layers"], report.meta["model"]["n_heads"]
    sizes, texts, hovers = (
        np.full(shape, np.nan),
        np.full(shape, "", object),
        np.full(shape, "", object),
    )
    for row in rows:
        at = row["layer"], row["head"]
        sizes[at] = row["norm"]
        texts[at] = _short(str(first.get(at, "")))
        hovers[at] = "<br>".join(
            [
                f"L{at[0]}H{at[1]}, size {row['norm']:.2f}",
                f"takes most from ‘{visible(row['source_token'])}’ at {row['source']}, "
                f"attention {row['weight']:.2f}",
                *(f"{kind}: {visible(row[kind])}" for kind in KINDS if row[kind]),
            ]
        )
    figure = go.Figure(
        go.Heatmap(
            z=np.log10(1 + sizes),
            text=texts,
            texttemplate="%{text}",
            textfont={"size": 11},
            customdata=hovers,
            hovertemplate="%{customdata}<extra></extra>",
            colorscale="Blues",
            zmin=0,
            xgap=1,
            ygap=1,
            colorbar=_size_bar(sizes),
        )
    )
    read = report.meta["tokens"][prompt][report.meta["positions"][prompt]]
    return figure.update_layout(
        title=f"{visible(str(report.meta['model']['id']))} at ‘{visible(read)}’: {KINDS[what]}",
        xaxis={"title": "head", "dtick": 1},
        yaxis={"title": "layer", "autorange": "reversed", "dtick": 1},
        width=max(620, MARGIN + CELL_WIDTH * shape[1]),
        height=max(340, MARGIN + CELL_HEIGHT * shape[0]),
        template="plotly_white",
    )


def neuron_words(report: Report, *, prompt: int = 0) -> go.Figure:
    """Bars of the strongest neurons' sizes, each with the tokens it raises; all words on hover."""
    rows = _rows(report, "neurons", prompt)
    if not rows:
        why = html.escape(" ".join(report.meta["notes"])) or "none were asked for"
        return go.Figure().update_layout(
            title=f"no neurons are named: {why}", template="plotly_white"
        )
    hovers = [
        "<br>".join(
            [
                f"layer {row['layer']}, neuron {row['neuron']}, activation {row['activation']:.2f}",
                f"raises {visible(row['up'])}",
                f"lowers {visible(row['down'])}",
                f"excited by {visible(row['key'])}",
            ]
        )
        for row in rows
    ]
    figure = go.Figure(
        go.Bar(
            x=[row["norm"] for row in rows],
            y=[f"L{row['layer']} N{row['neuron']}" for row in rows],
            orientation="h",
            text=[visible(row["up"]) for row in rows],
            textposition="outside",
            cliponaxis=False,
            customdata=hovers,
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    return figure.update_layout(
        title="neurons that write most, with the tokens each raises",
        xaxis={
            "title": "|activation| · ‖W_out‖, residual units",
            "range": [0, 1.9 * rows[0]["norm"]],
        },
        yaxis={"autorange": "reversed", "type": "category"},
        width=1000,
        height=max(320, MARGIN + CELL_HEIGHT * len(rows)),
        margin={"l": 110},
        template="plotly_white",
    )


def _rows(report: Report, table: str, prompt: int) -> list[dict]:
    n = len(report.meta["tokens"])
    if not 0 <= prompt < n:
        raise BadInput(f"no prompt {prompt}: the report has prompts 0 to {n - 1}")
    return report.tables[table].query("prompt == @prompt").to_dict(orient="records")


def _size_bar(sizes: np.ndarray) -> dict:
    """A colour bar of log10(1 + size) that shows sizes."""
    ticks = [0, 1, 3, 10, 30, 100, 300, 1000, 3000]
    shown = [tick for tick in ticks if tick <= max(1.0, float(np.nanmax(sizes)))]
    return {
        "title": {"text": "size of the output", "side": "right"},
        "tickvals": [float(np.log10(1 + tick)) for tick in shown],
        "ticktext": [str(tick) for tick in shown],
    }


def _short(token: str) -> str:
    """A token that fits a cell; a leading space is a dot.

    >>> _short(" Mary")
    '·Mary'
    """
    shown = "·" * (len(token) - len(token.lstrip(" "))) + token.lstrip(" ")
    return visible(shown if len(shown) <= LETTERS else shown[: LETTERS - 1] + "…")
