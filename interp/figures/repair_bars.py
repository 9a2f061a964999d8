"""A behaviour before and after a repair, beside what random heads do."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from interp.report import Report

TITLES = {"accuracy": "accuracy", "prefers": "answer preferred", "logit_diff": "logit difference"}
COLORS = {"before": "#8c8c8c", "after": "#c0392b", "control": "#c9b8a8"}


def repair_bars(report: Report) -> go.Figure:
    """Accuracy, preference (shares) and logit difference (logits) with 95 % intervals; dots are draws."""
    rows = report.table.to_dict("records")
    draws = report.tables["controls"]
    figure = make_subplots(cols=len(TITLES), subplot_titles=list(TITLES.values()))
    for column, name in enumerate(TITLES, start=1):
        names = [row["condition"] for row in rows]
        values = [row[name] for row in rows]
        figure.add_bar(
            x=names,
            y=values,
            marker_color=[COLORS[condition] for condition in names],
            error_y={
                "array": [row[f"{name}_high"] - row[name] for row in rows],
                "arrayminus": [row[name] - row[f"{name}_low"] for row in rows],
            },
            hovertemplate="%{x}<br>%{y:.3f}<extra></extra>",
            row=1,
            col=column,
        )
        figure.add_scatter(
            x=["control"] * len(draws),
            y=draws[name],
            mode="markers",
            marker={"color": "#444", "size": 5, "opacity": 0.5},
            text=draws["heads"],
            hovertemplate="%{text}<br>%{y:.3f}<extra>random heads</extra>",
            row=1,
            col=column,
        )
    options = report.meta["options"]
    if options["attend"]:
        done = f"attend to {', '.join(options['attend'])}"
    else:
        done = "restored" if options["restore"] else f"× {options['scale']:g}"
    silenced = f", {', '.join(options['silence'])} silenced" if options["silence"] else ""
    return figure.update_layout(
        title=f"{options['task']} ({options['on']} prompts): {', '.join(options['heads'])} {done}"
        f"{silenced}; random heads do as well in {report.meta['as_good']:.0%} of draws",
        showlegend=False,
        template="plotly_white",
        height=420,
    )
