"""From the embedding to the logit: what each component adds, the small ones taken together."""

from __future__ import annotations

import html
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from interp.errors import BadInput
from interp.figures.parts import table_of
from interp.figures.tokens import visible
from interp.report import Report

SHOWN = 16
"""Heads and MLPs with a bar of their own, the largest of either sign."""
RAISE, LOWER, TOTAL = "#D55E00", "#0072B2", "#777777"
"""Okabe-Ito; the sign is written beside the bar as well."""


@dataclass(frozen=True)
class Step:
    """One bar: `value` logits on top of `start`. kind: "embed", "bias", "head", "mlp", "rest", "total"."""

    name: str
    kind: str
    start: float
    value: float
    layer: int | None = None
    head: int | None = None
    source: int | None = None


def waterfall_steps(report: Report, prompt: int = 0, shown: int = SHOWN) -> list[Step]:
    """The bars in order: embedding and biases, then heads and MLPs from most raising to most lowering.

    Their values sum to the total, which is the last one. `source` is the position that a head's
    contribution comes from most.
    """
    table = table_of(report, "attribute")
    if prompt not in set(table["prompt"]):
        raise BadInput(f"no prompt {prompt}: the report has {table['prompt'].nunique()} prompts")
    table = table.loc[table["prompt"] == prompt]
    own = table.loc[table["component"].isin(["head", "mlp"])]
    largest = own.loc[own["contribution"].abs().sort_values(ascending=False, kind="stable").index]
    named, rest = largest.iloc[:shown], largest.iloc[shown:]
    named = named.sort_values("contribution", ascending=False, kind="stable")
    steps: list[Step] = []

    def add(name: str, kind: str, value: float, **place: int | None) -> None:
        start = steps[-1].start + steps[-1].value if steps else 0.0
        steps.append(Step(name, kind, start, float(value), **place))

    sums = table.groupby("component")["contribution"].sum()
    if "embed" in sums:
        add("embedding", "embed", sums["embed"])
    bias = sums.get("attn_bias", 0.0) + sums.get("constant", 0.0)
    if abs(bias) > 1e-6:
        add("biases", "bias", bias)
    best = _sources(report, prompt)
    for row in named.to_dict("records"):
        layer = int(row["layer"])
        if row["component"] == "mlp":
            add(f"MLP {layer}", "mlp", row["contribution"], layer=layer)
            continue
        head = int(row["head"])
        place = {"layer": layer, "head": head, "source": best.get((layer, head))}
        add(f"L{layer}H{head}", "head", row["contribution"], **place)
    for component, title in (("head", "other heads"), ("mlp", "other MLPs")):
        some = rest.loc[rest["component"] == component, "contribution"]
        if len(some):
            add(f"{len(some)} {title}", "rest", some.sum())
    total = steps[-1].start + steps[-1].value
    return [*steps, Step("sum", "total", 0.0, total)]


def _sources(report: Report, prompt: int) -> dict[tuple[int, int], int]:
    """For every head the position with its largest contribution, of either sign."""
    if "sources" not in report.tables:
        return {}
    table: pd.DataFrame = report.tables["sources"]
    table = table.loc[table["prompt"] == prompt]
    size = table["contribution"].abs()
    best = table.loc[size.groupby([table["layer"], table["head"]]).idxmax()]
    places = zip(best["layer"], best["head"], best["source"], strict=True)
    return {(int(layer), int(head)): int(source) for layer, head, source in places}


def waterfall(report: Report, prompt: int = 0, shown: int = SHOWN) -> go.Figure:
    """Waterfall of direct contributions in logits: orange raises, blue lowers, the last bar is the sum.

    Args:
        prompt: which prompt. shown: how many heads and MLPs have a bar of their own.
    """
    steps = waterfall_steps(report, prompt, shown)
    answer = f"‘{visible(report.meta['answers'][prompt])}’"
    if report.meta["instead"]:
        answer += f" − ‘{visible(report.meta['instead'][prompt])}’"
    figure = go.Figure(
        go.Waterfall(
            orientation="h",
            y=[step.name for step in steps],
            x=[step.value for step in steps],
            measure=["total" if step.kind == "total" else "relative" for step in steps],
            text=[f"{step.value:+.2f}".replace("-", "−") for step in steps],
            textposition="outside",
            increasing={"marker": {"color": RAISE}},
            decreasing={"marker": {"color": LOWER}},
            totals={"marker": {"color": TOTAL}},
            connector={"line": {"color": "#bbbbbb", "width": 1}},
            hovertemplate="%{y}: %{text} logits<extra></extra>",
        )
    )
    return figure.update_layout(
        title=f"{html.escape(report.meta['model']['id'])}: what makes {answer}",
        xaxis={"title": "logits, added up from the top"},
        yaxis={"autorange": "reversed", "type": "category"},
        height=max(320, 90 + 24 * len(steps)),
        template="plotly_white",
    )
