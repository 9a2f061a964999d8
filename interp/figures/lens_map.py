"""Layers × tokens of what a lens reads: the top token of each place, coloured by one number."""

from __future__ import annotations

import html

import numpy as np
import plotly.graph_objects as go

from interp.errors import BadInput, unknown
from interp.figures.parts import table_of
from interp.figures.tokens import visible
from interp.report import Report

QUANTITIES = {
    "top_probability": ("probability of the top token", "Blues"),
    "entropy": ("entropy, nats", "Blues"),
    "kl": ("KL(final ‖ lens), nats", "Blues"),
    "target_probability": ("probability of the target", "Blues"),
    "target_rank": ("rank of the target (0: most likely)", "Blues_r"),
}
"""What a cell can be coloured by, with its unit and colours: dark is sure, or far, or a low rank."""

CELL_WIDTH, CELL_HEIGHT, MARGIN = 62, 21, 190
LETTERS = 8
"""Pixels of a cell, and how many letters of a token fit into it."""


def lens_map(
    report: Report,
    quantity: str = "top_probability",
    *,
    prompt: int = 0,
    site: str | None = None,
    head: int = -1,
) -> go.Figure:
    """Heat map of one prompt: positions across, layers upwards, the top token in every cell.

    Hovering shows the k most likely tokens and all numbers.

    Args:
        quantity: top_probability, entropy, kl, target_probability or target_rank.
        prompt: which prompt. site: which of the report's sites; the first by default.
        head: which head, where the site is `z`.
    """
    if quantity not in QUANTITIES:
        raise unknown("quantity", quantity, QUANTITIES)
    if np.ndim(head):
        raise BadInput(f"head={head!r}: give one number, the same head of every layer: head=1")
    table, top = table_of(report, "lens"), report.tables["top"]
    sites = list(dict.fromkeys(table["site"]))
    name: str = sites[0] if site is None else site
    if name not in sites:
        raise unknown("site", name, sites)
    rows = table.query("prompt == @prompt and site == @name and head == @head")
    if not len(rows):
        raise BadInput(
            f"no reading of prompt {prompt}, site '{name}', head {head}; prompts are 0 to "
            f"{table['prompt'].max()}, heads {sorted(set(table.loc[table['site'] == name, 'head']))}"
        )
    layers, positions = sorted(set(rows["layer"])), sorted(set(rows["position"]))
    shape = len(layers), len(positions)
    values, texts, hovers = (
        np.full(shape, np.nan),
        np.full(shape, "", object),
        np.full(shape, "", object),
    )
    k = len(top) // len(table)
    candidates = list(zip(top["token"], top["probability"], strict=True))
    for index, row in zip(rows.index, rows.to_dict(orient="records"), strict=True):
        at = layers.index(row["layer"]), positions.index(row["position"])
        values[at] = np.log10(1 + row[quantity]) if quantity == "target_rank" else row[quantity]
        texts[at] = _short(row["top_token"])
        hovers[at] = _hover(row, candidates[index * k : (index + 1) * k])
    unit, colours = QUANTITIES[quantity]
    bar = {"title": {"text": unit, "side": "right"}}
    if quantity == "target_rank":
        ticks = range(int(np.nanmax(values)) + 1)
        bar |= {"tickvals": list(ticks), "ticktext": [f"{10**i - 1:,}" for i in ticks]}
    tokens = dict(zip(rows["position"], rows["token"], strict=True))
    bounded = quantity.endswith("probability")
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=np.arange(len(positions)),
            y=np.arange(len(layers)),
            text=texts,
            texttemplate="%{text}",
            textfont={"size": 11},
            customdata=hovers,
            hovertemplate="%{customdata}<extra></extra>",
            colorscale=colours,
            zmin=0,
            zmax=1 if bounded else None,
            xgap=1,
            ygap=1,
            colorbar=bar,
        )
    )
    place = name if head < 0 else f"{name}, head {head}"
    return figure.update_layout(
        title={
            "text": f"{html.escape(str(report.meta['model']['id']))}: {place}, {next(iter(rows['lens']))} lens"
        },
        xaxis={
            "title": "token at the position",
            "tickvals": list(range(len(positions))),
            "ticktext": [f"{_short(tokens[p])}<br>{p}" for p in positions],
            "tickangle": 0,
        },
        yaxis={
            "title": "layer",
            "tickvals": list(range(len(layers))),
            "ticktext": [str(layer) for layer in layers],
        },
        width=max(560, MARGIN + CELL_WIDTH * len(positions)),
        height=max(320, MARGIN + CELL_HEIGHT * len(layers)),
        template="plotly_white",
    )


def _hover(row: dict, candidates: list[tuple[str, float]]) -> str:
    """All that is known about one cell, as plotly's small HTML."""
    lines = [
        f"layer {row['layer']}, position {row['position']} {_quoted(row['token'])}",
        *(f"{p:.3f} {_quoted(token)}" for token, p in candidates),
        f"entropy {row['entropy']:.3f} nats, KL to the end {row['kl']:.3f} nats",
        f"target {_quoted(row['target_token'])}: {row['target_probability']:.3g}, rank {row['target_rank']}",
    ]
    return "<br>".join(lines)


def _quoted(token: str) -> str:
    return f"‘{visible(token)}’"


def _short(token: str) -> str:
    """A token that fits a cell; a leading space is a dot.

    >>> _short(" Mary"), _short("international")
    ('·Mary', 'interna…')
    """
    shown = "·" * (len(token) - len(token.lstrip(" "))) + token.lstrip(" ")
    return visible(shown if len(shown) <= LETTERS else shown[: LETTERS - 1] + "…")
