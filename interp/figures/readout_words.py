"""A circuit's nodes as words: each node's top token, coloured by what it gives to the answer."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from interp.errors import BadInput, unknown
from interp.figures.tokens import visible
from interp.report import Report

SHOWN = 60
"""Nodes in one figure; the others are in the table."""


def readout_words(report: Report, pair: int = 0, position: str | None = None) -> go.Figure:
    """Nodes in order of computation with the top tokens of what they write, on one pair.

    Bars are direct contributions (logits, mean over pairs); at positions other than the last, where
    there are none, bars say how far up the answer stands (log10 of d_vocab / rank).
    """
    places = list(report.meta["options"]["positions"])
    position = places[0] if position is None else position
    if position not in places:
        raise unknown("position", str(position), places)
    if not 0 <= pair < len(report.meta["prompts"]):
        raise BadInput(f"no pair {pair}: the report shows {len(report.meta['prompts'])}")
    rows = report.table.loc[report.table["position"] == position].to_dict("list")
    values, ranks = np.array(rows["contribution"]), np.array(rows["answer_rank"])
    d_vocab = report.meta["model"]["d_vocab"] or 1
    direct = not np.isnan(values).all()
    if not direct:
        values = np.log10(d_vocab / (ranks + 1))
    largest = np.argsort(-np.abs(values), kind="stable")[:SHOWN]
    kept = sorted(int(i) for i in largest)
    said: dict[str, list[str]] = {}
    for word in report.tables["words"].to_dict("records"):
        if word["pair"] == pair and word["position"] == position:
            said.setdefault(word["node"], []).append(f"‘{visible(word['token'])}’")
    names = [str(rows["node"][i]) for i in kept]
    ranked = [ranks, rows["wrong_rank"], rows["answer_first"]]
    figure = go.Figure(
        go.Bar(
            x=values[kept],
            y=names,
            orientation="h",
            marker={"color": values[kept], "colorscale": "RdBu_r", "cmid": 0},
            text=[" · ".join(said.get(name, [])) for name in names],
            textposition="outside",
            cliponaxis=False,
            customdata=np.array(ranked, float).T[kept],
            hovertemplate="%{y}<br>%{x:.3f}<br>rank of the answer %{customdata[0]:.0f}, of the wrong one "
            "%{customdata[1]:.0f}<br>answer first in %{customdata[2]:.0%} of pairs<extra></extra>",
        )
    )
    low, high = float(values[kept].min(initial=0.0)), float(values[kept].max(initial=1e-6))
    answer = ", ".join(f"‘{visible(token)}’" for token in report.meta["answers"][pair][:3])
    return figure.update_layout(
        title=f"{report.meta['options']['task']} at {position}: words of pair {pair}, answer {answer}",
        xaxis={
            "title": "direct contribution (logits)" if direct else "log10 (d_vocab / rank)",
            "range": [1.4 * min(low, -0.3 * high), 1.4 * max(high, -0.3 * low)],  # room for words
        },
        yaxis={"type": "category", "autorange": "reversed", "title": "node", "dtick": 1},
        height=max(360, 160 + 22 * len(names)),
        template="plotly_white",
    )
