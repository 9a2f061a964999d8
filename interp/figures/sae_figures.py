"""An SAE's training curve, losses with it spliced in, densities of its features, and probing."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from interp.figures.parts import table_of
from interp.report import Report

CURVES = {"fvu": "FVU of the batch", "l0": "active features", "dead": "dead features (share)"}
CONDITIONS = {"clean": "#8c8c8c", "sae": "#1f5c93", "zero": "#c0392b", "mean": "#d98880"}
BARS = "#1f5c93"


def training_curve(report: Report) -> go.Figure:
    """Unexplained variance, active and dead features of every step's batch, over the rows seen."""
    curve = table_of(report, "curve")
    figure = make_subplots(cols=len(CURVES), subplot_titles=list(CURVES.values()))
    for column, name in enumerate(CURVES, start=1):
        figure.add_scatter(
            x=curve["rows"], y=curve[name], mode="lines", line={"color": BARS}, row=1, col=column
        )
    row = report.table.iloc[0]
    sae = report.meta["sae"]
    return figure.update_layout(
        title=f"{sae['activation']} SAE of {sae['site'] or 'rows'}, {sae['d_sae']} features: FVU "
        f"{row['fvu']:.3f}, L0 {row['l0']:.1f} on {row.get('rows_of', 'held-out documents')}",
        showlegend=False,
        template="plotly_white",
        height=360,
    ).update_xaxes(title="activations seen")


def density(report: Report) -> go.Figure:
    """How many features are active in which share of tokens; how many never were is in the title."""
    shares = report.arrays.get("density")
    if shares is None:
        shares = report.table["density"].to_numpy()
    alive = shares[shares > 0]
    counts, edges = np.histogram(np.log10(alive), bins=np.linspace(-6, 0, 49))
    figure = go.Figure(
        go.Bar(
            x=10 ** ((edges[1:] + edges[:-1]) / 2),
            y=counts,
            width=10 ** edges[1:] - 10 ** edges[:-1],
            marker_color=BARS,
        )
    )
    return figure.update_layout(
        title=f"Density of {len(shares)} features; never active: {len(shares) - len(alive)}",
        xaxis={"type": "log", "title": "share of tokens in which a feature is active"},
        yaxis_title="features",
        template="plotly_white",
        height=360,
    )


def losses(report: Report) -> go.Figure:
    """Rise of the loss with the SAE spliced in, beside zero- and mean-ablation of the site (nats a token)."""
    loss = table_of(report, "loss")
    clean = float(loss.loc[loss["condition"] == "clean", "loss"].iloc[0])
    others = loss[loss["condition"] != "clean"]
    sae = others.loc[others["condition"] == "sae"].iloc[0]
    figure = go.Figure(
        go.Bar(
            x=others["increase"],
            y=others["condition"],
            orientation="h",
            marker_color=[CONDITIONS[name] for name in others["condition"]],
            text=[f"{value:+.4f}" for value in others["increase"]],
        )
    )
    return figure.update_layout(
        title=f"Loss over clean ({clean:.4f} nats a token): {sae['recovered_vs_zero']:.1%} recovered "
        f"against zero, {sae['recovered_vs_mean']:.1%} against the mean",
        xaxis_title="rise of the loss, nats a token",
        template="plotly_white",
        height=260,
    )


def probing(report: Report) -> go.Figure:
    """How well few latents tell which token is there, beside single coordinates and shuffled weights."""
    table = table_of(report, "probing")
    figure = go.Figure()
    for name, rows in table.groupby("representation", sort=False):
        figure.add_box(
            x=[f"{n} best" for n in rows["latents"]],
            y=rows["auc"],
            name=str(name),
            boxpoints="all",
            text=rows["task"],
        )
    return figure.update_layout(
        title=f"Sparse probing for {table['task'].nunique()} tokens",
        yaxis_title="AUC on held-out documents",
        boxmode="group",
        template="plotly_white",
        height=380,
    )
