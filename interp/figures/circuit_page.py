"""The page of a circuit: a layered graph that a slider prunes, and a card for every node of it.

For reports of "edges" and "circuit_find". A card holds the node's score, its strongest edges in and out,
each a way on to the node at its other end, the words that the node writes, and, where a heads report
was given, what is known of the head. The page holds its data as one gzip member in base64, and one
script that unpacks and draws it; its own Content-Security-Policy forbids the network and every script
but that one. Names and tokens travel inside the base64, or escaped by the template.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from interp.figures.circuit_graph import SHOWN, kind_of, node_of, place_of
from interp.figures.document import column, document, packed, provenance_lines
from interp.figures.head_claims import NAME, head_claims
from interp.figures.page import claims_document
from interp.report import Report

STYLES = ("page.css", "circuit_page.css")
SCRIPTS = ("head_claims.js", "circuit_page.js")
MOST = 3000
"""Edges that travel with the page; the slider starts at the strongest `SHOWN` of them."""
ROWS = 200
LOSSES = ("kl", "loss")
"""Metrics that are low where the model does well."""


def circuit_page(report: Report, heads: Report | None = None) -> str:
    """A whole HTML document that shows an "edges" or "circuit_find" report; it opens from disk.

    A score is that of the report: what corrupting an edge does to the metric, estimated. The page does
    not show that a node does what its roles say *because of* these edges: roles are claims about the
    prompts that the heads report was made on.

    Args:
        report: its table "nodes" gives the nodes' scores, "words" what they write, "head_claims" what
            is known of heads; each may be absent.
        heads: a heads report of the same model, in place of the table "head_claims".

    Raises:
        BadInput: `heads` is another analysis, or of other weights.
    """
    if heads is not None:
        tables, about = head_claims(heads, report.meta["model"])
        meta = report.meta | about
        report = Report(report.analysis, report.tables | tables, report.arrays, meta)
    meta = report.meta
    notes = [str(note) for note in meta.get("notes") or []]
    return document(
        "circuit_page.html.j2",
        styles=STYLES,
        scripts=SCRIPTS,
        data=packed(_payload(report)),
        model=meta.get("model", {}),
        task=meta.get("options", {}).get("task"),
        lede=notes[:1],
        notes=notes[1:],
        reading=_reading(meta),
        n_edges=len(report.table),
        most=MOST,
        has_claims=NAME in report.tables,
        tables=_tables(report),
        provenance=provenance_lines(meta),
    )


def _reading(meta: dict[str, Any]) -> str:
    """What the sign and size of a score say."""
    if not meta.get("signed", True):
        return "A score is the magnitude of what travels along an edge, as its weaker end has it; it has no sign."
    metric = meta.get("options", {}).get("metric", "the metric")
    sign = "positive" if metric in LOSSES else "negative"
    return (
        f"A score estimates what corrupting that edge alone does to {metric}: the answer needs an edge whose "
        f"score is {sign}. Edges that make up for each other do not show."
    )


# --- what travels with the page -----------------------------------------------------------------


def _payload(report: Report) -> dict[str, Any]:
    """Edges, strongest first, by index of their nodes; nodes with their places; words; claims."""
    meta, model = report.meta, report.meta["model"]
    table = report.table
    order = np.argsort(-table["score"].abs().to_numpy(), kind="stable")[:MOST]
    table = table.iloc[order]
    receivers = [node_of(name) for name in table["receiver"]]
    n_layers = int(model["n_layers"])
    names = sorted({*table["sender"], *receivers}, key=lambda name: _order(name, n_layers))
    index = {name: i for i, name in enumerate(names)}
    places = [place_of(name, n_layers) for name in names]
    nodes = _nodes(report, names)
    edges: dict[str, Any] = {
        "from": [index[name] for name in table["sender"]],
        "to": [index[name] for name in receivers],
        "into": [kind_of(name) for name in table["receiver"]],
        "score": column(table["score"]),
    }
    if "importance" in table:
        edges["importance"] = column(table["importance"])
    return {
        "n_layers": n_layers,
        "unit": _unit(meta),
        "scoreOf": _score_of(meta),
        "start": min(SHOWN, len(table)),
        "signed": bool(meta.get("signed", True)),
        "edges": edges,
        "nodes": {
            "name": names,
            "kind": [place.kind for place in places],
            "x": [place.x for place in places],
            "y": [place.y for place in places],
        }
        | nodes,
        "words": _words(report, index),
        "claims": _claims(report),
    }


def _order(name: str, n_layers: int) -> tuple[float, float]:
    """Order of computation: the embedding, each layer's heads, then its MLP, the logits."""
    place = place_of(name, n_layers)
    return place.x, 1e9 if place.kind == "mlp" else place.y


def _nodes(report: Report, names: list[str]) -> dict[str, list[Any]]:
    """The numbers of the table "nodes" that are there, and each score's share of all nodes' scores."""
    table = report.tables.get("nodes")
    if table is None or "score" not in table:
        return {}
    whole = table.loc[~table["node"].str.contains(r"\.[qkv]$")].set_index("node")
    total = float(whole["score"].abs().sum())
    whole = whole.assign(share=whole["score"].abs() / total if total else np.nan)
    found = whole.reindex(names)
    wanted = ("score", "share", "importance", "contribution")
    return {name: column(found[name]) for name in wanted if name in found}


def _words(report: Report, index: dict[str, int]) -> dict[int, list[list[str]]]:
    """For a node its top tokens at the end, a list for each of the pairs that were kept."""
    table = report.tables.get("words")
    if table is None:
        return {}
    table = table.sort_values(["node", "pair", "place"], kind="stable")
    found: dict[int, list[list[str]]] = {}
    for _, rows in table.groupby(["node", "pair"], sort=False):
        node = str(rows["node"].iloc[0])
        if node in index:
            found.setdefault(index[node], []).append([str(token) for token in rows["token"]])
    return found


def _claims(report: Report) -> dict[str, Any] | None:
    table = report.tables.get(NAME)
    if table is None:
        return None
    return claims_document(table, report.meta.get(NAME, {}).get("detectors", []))


def _score_of(meta: dict[str, Any]) -> str:
    """What a node's score is."""
    own = meta.get("options", {}).get("method") in ("atp", "cd-t")
    return "of the node itself" if own else "the sum over its edges out"


def _unit(meta: dict[str, Any]) -> str:
    if not meta.get("signed", True):
        return ""
    return str(meta.get("unit") or meta.get("faithfulness", {}).get("unit") or "")


# --- the document -------------------------------------------------------------------------------


def _tables(report: Report) -> list[dict[str, Any]]:
    """The first rows of every table but the wide one of claims, as text."""
    return [
        {
            "name": name,
            "length": len(table),
            "columns": [str(column) for column in table],
            "numeric": [pd.api.types.is_numeric_dtype(table[column]) for column in table],
            "rows": [[_cell(x) for x in row] for row in table.head(ROWS).itertuples(index=False)],
        }
        for name, table in report.tables.items()
        if name != NAME
    ]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.4g}".replace("-", "−")
    return str(value)
