"""Several models side by side: roles, depth, matched heads, and what a fine-tune changed."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from interp.errors import BadInput
from interp.figures.by_head import by_layer, heads_heatmap
from interp.report import Report

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A5C00")
"""Okabe and Ito's, and a brown for their yellow, which is too pale for lines."""
PALE, GREY = "#c8ccd2", "#8a8f98"
SHOWN = 8
"""Models or roles beyond this many share one grey: their lines could not be told apart."""


def role_counts(report: Report) -> go.Figure:
    """Share of each model's heads that have each role, with Wilson's 95 % interval."""
    table: Any = report.tables["roles"]
    used = table.groupby("role", sort=False)["heads"].sum()
    roles = [role for role, heads in used.items() if heads]
    figure = go.Figure()
    for place, model in enumerate(table["model"].unique()):
        mine = table[table["model"] == model].set_index("role").loc[roles]
        figure.add_trace(
            go.Bar(
                x=roles,
                y=mine["share"],
                name=_text(model),
                marker_color=_colour(place),
                error_y={
                    "array": mine["share_high"] - mine["share"],
                    "arrayminus": mine["share"] - mine["share_low"],
                    "thickness": 1,
                    "width": 2,
                },
                customdata=mine[["heads", "heads_low", "heads_high"]],
                hovertemplate="%{y:.1%}: %{customdata[0]} heads, %{customdata[1]} to %{customdata[2]} on other "
                "prompts<extra>%{fullData.name}</extra>",
            )
        )
    return _empty(figure, "no head of any model has a role", not roles).update_layout(
        title="heads with each role, as a share of the model's heads",
        yaxis={"title": "share of heads", "tickformat": ".0%", "rangemode": "tozero"},
        barmode="group",
        template="plotly_white",
        height=420,
    )


def depth_profiles(report: Report) -> go.Figure:
    """For each role, the share of heads that have it at each relative depth, a line a model."""
    table: Any = report.tables["profiles"]
    used = table.groupby("role", sort=False)["heads"].sum()
    roles = [role for role, heads in used.items() if heads]
    columns = 3
    n_rows = max(1, -(-len(roles) // columns))
    figure = make_subplots(
        n_rows,
        columns,
        subplot_titles=roles,
        shared_xaxes=True,
        vertical_spacing=0.35 / (n_rows + 1),
    )
    for place, model in enumerate(table["model"].unique()):
        for at, role in enumerate(roles):
            mine = table[(table["model"] == model) & (table["role"] == role) & (table["of"] > 0)]
            figure.add_trace(
                go.Scatter(
                    x=(mine["low"] + mine["high"]) / 2,
                    y=mine["share"],
                    mode="lines+markers",
                    name=_text(model),
                    legendgroup=str(place),
                    showlegend=at == 0,
                    line={"color": _colour(place), "width": 1.5},
                    marker={"size": 4},
                    customdata=mine[["heads", "of"]],
                    hovertemplate="depth %{x:.2f}: %{customdata[0]} of %{customdata[1]} heads"
                    "<extra>%{fullData.name}</extra>",
                ),
                row=at // columns + 1,
                col=at % columns + 1,
            )
    figure.update_yaxes(tickformat=".0%", rangemode="tozero").update_xaxes(range=[0, 1])
    return _empty(figure, "no head of any model has a role", not roles).update_layout(
        title="where in depth the heads of each role lie (0 first layer, 1 last)",
        template="plotly_white",
        height=200 * n_rows + 120,
    )


def matched_heads(report: Report, pair: int = 0) -> go.Figure:
    """A line from each head of one model to its match in the other, coloured by role, at their depths.

    Args:
        pair: which row of the report's main table; the first by default.
    """
    table = _pair(report, "matches", pair)
    names = [_text(name) for name in report.table.loc[pair, ["model_a", "model_b"]]]
    real: Any = table[table["matched"]]
    known = [d["name"] for d in report.meta["detectors"] if d["labels"]]
    figure = go.Figure()
    for place, role in enumerate([*known, ""]):
        mine = real[[_role(labels) == role for labels in real["labels_a"]]]
        if not len(mine):
            continue
        x, y, text = [], [], []
        for row in mine.to_dict("records"):
            x += [0, 1, None]
            y += [_spread(row, "a"), _spread(row, "b"), None]
            said = (
                f"L{row['layer_a']}H{row['head_a']} ({_text(row['labels_a'] or 'no role')}) – "
                f"L{row['layer_b']}H{row['head_b']} ({_text(row['labels_b'] or 'no role')})<br>"
                f"distance {row['distance']:.2f}, chance {row['chance']:.2f}, other prompts "
                f"{row['noise']:.2f}, p {row['p']:.2g}"
            )
            text += [said, said, None]
        figure.add_trace(
            go.Scatter(
                x=x,
                y=y,
                text=text,
                hovertemplate="%{text}<extra></extra>",
                mode="lines+markers",
                line={"width": 1, "color": _colour(place) if role else PALE},
                marker={"size": 5},
                name=f"{_text(role) or 'no role'} ({len(mine)})",
            )
        )
    left: Any = table[~table["matched"]]
    for side, at in (("a", -0.04), ("b", 1.04)):
        figure.add_trace(
            go.Scatter(
                x=[at] * len(left),
                y=[_spread(row, side) for row in left.to_dict("records")],
                text=[
                    f"L{row[f'layer_{side}']}H{row[f'head_{side}']} ({_text(row[f'labels_{side}'] or 'no role')})"
                    for row in left.to_dict("records")
                ],
                hovertemplate="%{text}: no nearer than chance<extra></extra>",
                mode="markers",
                marker={"symbol": "line-ew-open", "size": 8, "color": PALE},
                name="no match",
                legendgroup="none",
                showlegend=side == "a" and len(left) > 0,
            )
        )
    return figure.update_layout(
        title=f"{names[0]} and {names[1]}: {len(real)} of {len(table)} heads matched",
        xaxis={"tickvals": [0, 1], "ticktext": names, "range": [-0.15, 1.15], "zeroline": False},
        yaxis={"title": "relative depth", "range": [1.02, -0.02]},
        template="plotly_white",
        height=640,
    )


def change_map(report: Report, pair: int = 0, score: str = "") -> go.Figure:
    """Layers × heads: what changed between two models of one shape; + and − mark labels gained and lost.

    Args:
        pair: which row of the report's main table, the first of one shape by default.
        score: whose change is shown; by default how many scores changed.
    """
    if not len(report.tables["changes"]):
        return _empty(
            go.Figure(), "no two of these models have the same shape", True
        ).update_layout(title="changes head by head", template="plotly_white", height=240)
    pairs = report.tables["changes"][["model_a", "model_b"]].drop_duplicates()
    here = report.table.loc[[pair], ["model_a", "model_b"]].merge(pairs)
    names = (here if len(here) else pairs).iloc[0]
    heads = _of(report.tables["changes"], names)
    title = f"from {_text(names['model_a'])} to {_text(names['model_b'])}: "
    values: Any = heads["changed_scores"]
    if score:
        scores: Any = _of(report.tables["score_changes"], names)
        mine = scores[scores["score"] == score]
        if not len(mine):
            known = ", ".join(scores["score"].unique())
            raise BadInput(f"no score '{score}' in this report; it has {known}")
        values = mine["change"].to_numpy()
    cells = heads_heatmap(
        heads,
        values,
        [_said(row) for row in heads.to_dict("records")],
        marks=_marks(heads),
        unit=_text(score) or "scores",
        signed=bool(score),
        **({} if score else {"colorscale": "Blues", "zmin": 0, "zmax": max(1, values.max())}),
    )
    what = f"change of {_text(score)}" if score else "how many scores changed"
    return by_layer(go.Figure(cells)).update_layout(title=title + what)


def weight_changes(report: Report, model: str = "") -> go.Figure:
    """Layers × heads: ‖W' − W‖ / ‖W‖ of W_QK and W_OV, on a logarithmic scale; + and − mark labels.

    Args:
        model: which of the models that were compared with the base; the first by default.
    """
    table: Any = report.table
    title = f"change of weights from {_text(report.meta['base'])}"
    if not len(table):
        return _empty(go.Figure(), "no model has the base's shape", True).update_layout(
            title=title, template="plotly_white", height=240
        )
    model = model or table["model"].iloc[0]
    mine = table[table["model"] == model]
    if not len(mine):
        raise BadInput(
            f"no model '{model}' in this report; it has {', '.join(table['model'].unique())}"
        )
    figure = make_subplots(1, 2, subplot_titles=("W_QK", "W_OV"), shared_yaxes=True)
    sizes = mine[["qk_change", "ov_change"]].to_numpy(float)
    seen = sizes[np.isfinite(sizes) & (sizes > 0)]
    low, high = (np.log10(seen.min()), np.log10(seen.max())) if len(seen) else (-1, 0)
    for column, kind in enumerate(("qk", "ov"), start=1):
        size = mine[f"{kind}_change"].to_numpy(float)
        with np.errstate(divide="ignore"):
            logs = np.where(size > 0, np.log10(size), np.nan)
        cells = heads_heatmap(
            mine,
            logs,
            [
                f"{_said(row)}<br>changed by {row[f'{kind}_change']:.2g} of its norm, "
                f"cosine {row[f'{kind}_cosine']:.4f}"
                for row in mine.to_dict("records")
            ],
            marks=_marks(mine) if mine["gained"].notna().any() else None,
            unit="log₁₀",
            colorscale="Cividis",
            zmin=low,
            zmax=max(high, low + 1),
            showscale=column == 2,
            hoverongaps=False,
        )
        figure.add_trace(cells, row=1, col=column)
    n_layers = int(mine["layer"].max()) + 1
    figure.update_xaxes(title="head", dtick=1).update_yaxes(autorange="reversed")
    return figure.update_layout(
        title=f"{title} to {_text(model)}, as a share of the norm",
        yaxis={"title": "layer", "dtick": 1 if n_layers < 40 else 5},
        template="plotly_white",
        height=max(360, 22 * n_layers + 140),
    )


# --- parts --------------------------------------------------------------------------------------------


def _pair(report: Report, name: str, pair: int) -> pd.DataFrame:
    if not 0 <= pair < len(report.table):
        raise BadInput(f"pair={pair}: this report has pairs 0 to {len(report.table) - 1}")
    return _of(report.tables[name], report.table.loc[pair])


def _of(table: pd.DataFrame, names: Any) -> pd.DataFrame:
    """The rows of one pair of models."""
    mine = (table["model_a"] == names["model_a"]) & (table["model_b"] == names["model_b"])
    return table.loc[mine]


def _spread(row: dict[str, Any], side: str) -> float:
    """Relative depth of a head; heads of a layer a little apart."""
    return row[f"depth_{side}"] + 0.0015 * ((row[f"head_{side}"] % 8) - 4)


def _marks(heads: pd.DataFrame) -> Sequence[str]:
    both = zip(heads["gained"], heads["lost"], strict=True)
    return [("+" if gained else "") + ("−" if lost else "") for gained, lost in both]


def _said(row: dict[str, Any]) -> str:
    """What a cell says of a head."""
    text = f"L{row['layer']}H{row['head']}"
    for name in ("gained", "lost"):
        if isinstance(row[name], str) and row[name]:
            text += f"<br>{name} {_text(row[name])}"
    if isinstance(row["clearest"], str) and row["clearest"]:
        text += (
            f"<br>{row['changed_scores']} scores changed, most clearly {_text(row['clearest'])}: "
            f"{row['change']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
        )
    return text


def _role(labels: str) -> str:
    return labels.split(",")[0]


def _colour(place: int) -> str:
    return COLOURS[place] if place < SHOWN else GREY


def _text(value: Any) -> str:
    """Text that plotly shows as it is: it reads HTML, and MathJax between dollars."""
    return html.escape(str(value)).replace("$", "&#36;")


def _empty(figure: go.Figure, why: str, empty: bool) -> go.Figure:
    if empty:
        at = {"x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper"}
        figure.add_annotation(text=why, showarrow=False, **at)
        figure.update_xaxes(visible=False).update_yaxes(visible=False)
    return figure
