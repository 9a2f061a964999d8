"""Training in pictures: trajectories of heads with the onset's band, loss beneath, and what goes with it."""

from __future__ import annotations

import html
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from interp.errors import BadInput, unknown
from interp.figures.parts import table_of
from interp.report import Report

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CURVES = {
    "accuracy": "accuracy on repeats (share)",
    "loss_repeated": "loss on repeats (nats a token)",
    "loss": "loss on text (nats a token)",
    "icl": "in-context score (nats)",
    "uas": "dependency arcs that heads find (share)",
}
BESIDE = {
    "entropy_min": "least entropy of a head (share)",
    "entropy_mean": "mean entropy (share)",
    "largest": "largest |x| of the stream",
    "times_median": "largest |x| over the median",
    "sink_rate": "sink heads (share)",
}


def trajectories(report: Report, detector: str | None = None) -> go.Figure:
    """Every head's score over training, its onset as a band, and accuracy, loss and in-context score beneath.

    A colour a series; a line a head, those with an onset strong. Bands reach from the last checkpoint before
    the first onset of what is drawn to the first one behind it.

    Args:
        detector: only this one's scores; by default those of every detector that gives labels.
    """
    names = [d["name"] for d in report.meta["detectors"] if d["labels"]]
    if detector is not None:
        known = [d["name"] for d in report.meta["detectors"]]
        if detector not in known:
            raise unknown("detector in this report", detector, known)
        names = [detector]
    curves: Any = table_of(report, "curves")
    shown = [name for name in CURVES if name in curves and curves[name].notna().any()]
    titles = {d["name"]: d["title"] for d in report.meta["detectors"]}
    units = {d["name"]: d["unit"] for d in report.meta["detectors"]}
    panels = [*[titles[name] for name in names], *[CURVES[name] for name in shown]]
    figure = make_subplots(
        rows=len(panels),
        shared_xaxes=True,
        vertical_spacing=0.3 / len(panels),
        subplot_titles=panels,
    )
    heads: Any = table_of(report, "emergence")
    onsets: Any = table_of(report, "onsets")
    for row, name in enumerate(names, 1):
        for series, colour in _coloured(report):
            mine = heads[heads["series"] == series]
            found = onsets[(onsets["series"] == series) & (onsets["quantity"] == name)]
            risen = {
                (layer, head)
                for layer, head, step in zip(
                    found["layer"], found["head"], found["step"], strict=True
                )
                if not pd.isna(step)
            }
            for (layer, head), line in mine.groupby(["layer", "head"]):
                strong = (layer, head) in risen
                told = f"{series} L{layer}H{head}"
                figure.add_trace(_line(line, name, colour, told, strong=strong), row=row, col=1)
            _band(figure, found, colour, row)
        if units[name] == "attention mass":
            figure.update_yaxes(range=[-0.03, 1.03], row=row, col=1)
    for row, name in enumerate(shown, len(names) + 1):
        for series, colour in _coloured(report):
            line = curves[curves["series"] == series]
            figure.add_trace(_line(line, name, colour, series, strong=True), row=row, col=1)
            found = onsets[(onsets["series"] == series) & (onsets["quantity"] == name)]
            _band(figure, found, colour, row)
    _legend(figure, report)
    return _laid_out(figure, report, len(panels), "heads over training")


def beside(report: Report) -> go.Figure:
    """Attention entropy, the largest entries of the stream, and the share of sink heads over training."""
    curves: Any = table_of(report, "curves")
    figure = make_subplots(
        rows=len(BESIDE),
        shared_xaxes=True,
        vertical_spacing=0.06,
        subplot_titles=list(BESIDE.values()),
    )
    for row, name in enumerate(BESIDE, 1):
        for series, colour in _coloured(report):
            line = curves[curves["series"] == series]
            figure.add_trace(_line(line, name, colour, series, strong=True), row=row, col=1)
    _legend(figure, report)
    return _laid_out(figure, report, len(BESIDE), "entropy, massive activations and sinks")


def onsets(report: Report) -> go.Figure:
    """When each quantity changed: a mark at half way, a bar from the last checkpoint before to the first behind."""
    table: Any = table_of(report, "onsets")
    table = table[table["step"].notna()].sort_values("step", ascending=False)
    figure = go.Figure()
    for series, colour in _coloured(report):
        mine = table[table["series"] == series]
        figure.add_trace(
            go.Scatter(
                x=1 + mine["step"],
                y=[_called(series, row) for row in mine.to_dict("records")],
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": mine["high"] - mine["step"],
                    "arrayminus": mine["step"] - mine["low"],
                },
                mode="markers",
                marker={"color": colour, "size": 8},
                name=html.escape(series),
                customdata=mine[["low", "step", "high"]],
                hovertemplate="%{y}<br>step %{customdata[1]:.0f} (%{customdata[0]:.0f} to "
                "%{customdata[2]:.0f})<extra></extra>",
            )
        )
    none = "" if len(table) else ": none was found"
    return figure.update_layout(
        title=f"{_about(report)}: onsets{none}",
        xaxis={"title": "1 + step", "type": "log"},
        template="plotly_white",
        height=160 + 26 * max(len(table), 2),
    )


def _called(series: str, row: dict[str, Any]) -> str:
    head = "" if pd.isna(row["layer"]) else f" L{row['layer']}H{row['head']}"
    return html.escape(f"{series}: {row['quantity']}{head}")


def _coloured(report: Report) -> list[tuple[str, str]]:
    series = [each["name"] for each in report.meta["series"]]
    return [(name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(series)]


def _line(rows: Any, name: str, colour: str, told: str, *, strong: bool) -> go.Scatter:
    return go.Scatter(
        x=1 + rows["step"],
        y=rows[name],
        mode="lines+markers" if strong else "lines",
        line={"color": colour, "width": 2 if strong else 1},
        marker={"size": 4},
        opacity=1.0 if strong else 0.35,
        showlegend=False,
        customdata=rows["step"],
        hovertemplate=f"{html.escape(told)}, step %{{customdata}}: %{{y:.3f}}<extra></extra>",
    )


def _band(figure: go.Figure, found: Any, colour: str, row: int) -> None:
    """The interval of the earliest onset."""
    found = found[found["step"].notna()]
    if len(found):
        first = found.sort_values("step").iloc[0]
        figure.add_vrect(
            x0=1 + first["low"],
            x1=1 + first["high"],
            fillcolor=colour,
            opacity=0.12,
            line_width=0,
            row=row,  # type: ignore[arg-type]
            col=1,  # type: ignore[arg-type]
        )


def _legend(figure: go.Figure, report: Report) -> None:
    for series, colour in _coloured(report):
        mark = {"color": colour}
        name = html.escape(series)
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line=mark, name=name))


def _about(report: Report) -> str:
    return html.escape(", ".join(each["name"] for each in report.meta["series"]))


def _laid_out(figure: go.Figure, report: Report, panels: int, what: str) -> go.Figure:
    if not report.meta["series"]:
        raise BadInput("the report has no series")
    figure.update_xaxes(type="log")
    figure.update_xaxes(title="1 + step", row=panels, col=1)
    return figure.update_layout(
        title=f"{_about(report)}: {what}", template="plotly_white", height=190 * panels + 100
    )
