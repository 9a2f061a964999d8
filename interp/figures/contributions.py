"""What each head and MLP adds to a logit: layer × head map with the MLP as a last column."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from interp.errors import BadInput
from interp.figures.parts import table_of
from interp.figures.tokens import visible
from interp.report import Report


def contributions(report: Report, prompt: int = 0) -> go.Figure:
    """Heat map of direct contributions (logits) for one prompt; blue lowers the logit, red raises it."""
    table = table_of(report, "attribute")
    if prompt not in set(table["prompt"]):
        raise BadInput(f"no prompt {prompt}: the report has {table['prompt'].nunique()} prompts")
    rows = [row for row in table.to_dict("records") if row["prompt"] == prompt]
    model = report.meta["model"]
    values = np.full((model["n_layers"], model["n_heads"] + 1), np.nan)
    for row in rows:
        if row["component"] in ("head", "mlp"):
            column = model["n_heads"] if row["component"] == "mlp" else int(row["head"])
            values[int(row["layer"]), column] = row["contribution"]
    rest = sum(row["contribution"] for row in rows if row["component"] not in ("head", "mlp"))
    names = [str(head) for head in range(model["n_heads"])] + ["MLP"]
    answer = f"‘{visible(report.meta['answers'][prompt])}’"
    if report.meta["instead"]:
        answer += f" − ‘{visible(report.meta['instead'][prompt])}’"
    largest = float(np.nanmax(np.abs(values)))
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=names,
            colorscale="RdBu_r",
            zmin=-largest,
            zmax=largest,
            hovertemplate="L%{y} %{x}<br>%{z:.3f} logits<extra></extra>",
            colorbar={"title": "logits"},
        )
    )
    return figure.update_layout(
        title=f"direct contributions to {answer} = {report.meta['logits'][prompt]:.2f} logits "
        f"(embedding and biases {rest:+.2f})",
        xaxis={"title": "head", "type": "category"},
        yaxis={"title": "layer", "autorange": "reversed", "dtick": 1 if len(values) < 40 else 5},
        height=max(360, 22 * len(values)),
        template="plotly_white",
    )
