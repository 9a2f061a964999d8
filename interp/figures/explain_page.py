"""One self-contained page that explains a prediction: headline, lens, writers, attention, flow, relevance.

The page holds its data as one gzip member in base64 (JSON, then attention patterns as bytes) and one
script that unpacks and draws it; sections whose pass is not in the report are named with the reason.
Nothing is fetched: the page's own Content-Security-Policy forbids the network and every script but
that one. Tokens travel inside the base64, or escaped by the template.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from interp.figures.attention_grid import attention_patterns
from interp.figures.document import column, document, packed, provenance_lines
from interp.figures.waterfall import waterfall_steps
from interp.report import Report

SCRIPTS = ("attention_grid.js", "flow_graph.js", "explain_page.js")
SPOKEN = 12
WORDS_OF_HEADS = {
    "layer": "layer",
    "head": "head",
    "contribution": "adds, logits",
    "source_token": "takes most from",
    "output": "writes",
    "value": "would write, from there alone",
    "query": "looks for",
    "key": "is looked for by",
}
WORDS_OF_NEURONS = {
    "layer": "layer",
    "neuron": "neuron",
    "activation": "active",
    "norm": "length",
    "up": "raises",
    "down": "lowers",
    "key": "excited by",
}


def explain_page(report: Report) -> str:
    """A whole HTML document that shows an "explain" report, or a "flow" one; opens from disk.

    Args:
        report: sections are drawn from the tables that are there: "lens" with "top"; "attribute"
            with "sources" and "neurons"; "flow" with its heads, neurons and words; "relevance"; the
            array "pattern". meta["tokens"] and meta["target"] must be there.

    Returns:
        The document. Numbers in it carry six significant digits, attention weights eight bits.
    """
    meta, (header, patterns) = report.meta, _payload(report)
    return document(
        "explain_page.html.j2",
        styles=["explain_page.css"],
        scripts=SCRIPTS,
        data=packed(header, patterns),
        analysis=report.analysis,
        model=meta.get("model", {}),
        headline=meta.get("headline") or [],
        tokens=meta["tokens"],
        target=meta["target"],
        has={name for name in header if header[name] is not None},
        lens_kind=meta.get("lens", {}).get("kind", "logit"),
        skipped=meta.get("skipped") or {},
        integrated=meta.get("integrated_gradients"),
        notes=meta.get("notes") or [],
        provenance=provenance_lines(meta),
    )


# --- what travels with the page -----------------------------------------------------------------


def _payload(report: Report) -> tuple[dict[str, Any], bytes]:
    """The document that the script draws, a section each (None: not there), and the patterns."""
    meta, model = report.meta, report.meta["model"]
    found = attention_patterns(report)
    about, patterns = (None, b"") if found is None else found
    target = dict(meta["target"])
    for name in ("answer", "instead"):
        if name in target:
            target[name] = target[name]["text"]
    document = {
        "tokens": list(meta["tokens"]),
        "target": target,
        "shape": [model["n_layers"], model["n_heads"]],
        "prediction": _prediction(report),
        "lens": _lens(report),
        "writers": _writers(report),
        "patterns": about,
        "flow": _flow(report),
        "relevance": _relevance(report),
        "words": _words(report),
        "startHead": _start(report),
    }
    return document, patterns


def _prediction(report: Report) -> list[tuple[str, float]] | None:
    facts = report.tables.get("explain")
    if facts is None:
        return None
    top = facts.loc[facts["fact"] == "predicted"]
    return list(zip(top["token"], column(top["value"]), strict=True))


def _lens(report: Report) -> dict[str, Any] | None:
    """Layers × positions of the report's first site: words by index, k a cell, and five numbers a cell."""
    table, top = report.tables.get("lens"), report.tables.get("top")
    if table is None or top is None or "target" not in report.meta:
        return None
    site = table["site"].iloc[0]
    chosen = ((table["site"] == site) & (table["prompt"] == 0) & (table["head"] == -1)).to_numpy()
    k = len(top) // len(table)
    table, top = table.loc[chosen], top.loc[np.repeat(chosen, k)]
    layers, positions = sorted(set(table["layer"])), sorted(set(table["position"]))
    codes, words = pd.factorize(top["token"])
    numbers = {
        "p": "top_probability",
        "tp": "target_probability",
        "rank": "target_rank",
        "kl": "kl",
        "entropy": "entropy",
    }
    return {
        "layers": layers,
        "positions": positions,
        "k": k,
        "words": list(words),
        "top": codes.tolist(),
        "topP": column(top["probability"]),
    } | {short: column(table[name]) for short, name in numbers.items()}


def _writers(report: Report) -> dict[str, Any] | None:
    """Waterfall, layer × head map, contributions by source position, and the table of neurons."""
    if "attribute" not in report.tables:
        return None
    model, table = report.meta["model"], report.tables["attribute"]
    shape = model["n_layers"], model["n_heads"]
    heads, mlps = np.full(shape, np.nan), np.full(shape[0], np.nan)
    for row in table.loc[table["prompt"] == 0].to_dict("records"):
        if row["component"] == "head":
            heads[int(row["layer"]), int(row["head"])] = row["contribution"]
        elif row["component"] == "mlp":
            mlps[int(row["layer"])] = row["contribution"]
    neurons = report.tables.get("neurons")
    return {
        "rows": [vars(step) for step in waterfall_steps(report)],
        "heads": column(pd.Series(heads.ravel())),
        "mlps": column(pd.Series(mlps)),
        "sources": _sources(report, shape),
        "neurons": None
        if neurons is None
        else [
            list(row)
            for row in zip(
                *(neurons[name].tolist() for name in ("layer", "neuron")),
                *(column(neurons[name]) for name in ("contribution", "activation")),
                strict=True,
            )
        ],
    }


def _sources(report: Report, shape: tuple[int, int]) -> list[list[float] | None] | None:
    """For every head, flat over layers and heads, its contribution by source position."""
    table = report.tables.get("sources")
    if table is None:
        return None
    found: list[list[float] | None] = [None] * (shape[0] * shape[1])
    for (layer, head), rows in table.loc[table["prompt"] == 0].groupby(["layer", "head"]):
        place = int(str(layer)) * shape[1] + int(str(head))
        found[place] = column(rows.sort_values("source")["contribution"])
    return found


def _flow(report: Report) -> dict[str, Any] | None:
    """Edges, their heads and neurons as columns; words by their place.

    A place is "hLAYER.POSITION.SOURCE.HEAD" or "nLAYER.POSITION.NEURON".
    """
    edges = report.tables.get("flow")
    if edges is None:
        return None
    names = {"source_position": "source", "source_stage": "sourceStage"}

    def columns(table: pd.DataFrame) -> dict[str, list[Any]]:
        return {names.get(str(name), str(name)): column(table[name]) for name in table}

    words: dict[str, list[tuple[str, float]]] = {}
    said = report.tables.get("flow_words")
    for row in [] if said is None else said.to_dict("records"):
        place = f"{row['layer']}.{row['position']}."
        key = f"h{place}{row['source_position']}.{row['index']}"
        key = key if row["kind"] == "head" else f"n{place}{row['index']}"
        words.setdefault(key, []).append((row["token"], round(float(row["logit"]), 3)))
    neurons = report.tables.get("flow_neurons", pd.DataFrame(columns=["layer", "position"]))
    return {
        "edges": columns(edges),
        "heads": columns(report.tables["flow_heads"]),
        "neurons": columns(neurons),
        "words": words,
    }


def _relevance(report: Report) -> dict[str, Any] | None:
    table = report.tables.get("relevance")
    if table is None:
        return None
    names = [name for name in table.columns if name not in ("position", "token")]
    return {"scores": {name: column(table[name]) for name in names}}


def _words(report: Report) -> list[dict[str, Any]] | None:
    """What heads and neurons say at the explained position: those that write the answer, or the largest."""
    heads, neurons = report.tables.get("word_heads"), report.tables.get("word_neurons")
    if heads is None or neurons is None:
        return None
    chosen = heads
    if "attribute" in report.tables:
        written = report.tables["attribute"].query("component == 'head' and prompt == 0")
        written = written.assign(size=written["contribution"].abs())
        chosen = heads.merge(
            written[["layer", "head", "contribution", "size"]], on=["layer", "head"]
        )
        chosen = chosen.sort_values("size", ascending=False, kind="stable")
    tables = []
    for title, table, names in (
        ("Heads that add most to the answer, of either sign", chosen, WORDS_OF_HEADS),
        ("Neurons that write most, by length", neurons, WORDS_OF_NEURONS),
    ):
        known = {name: shown for name, shown in names.items() if name in table}
        if len(table):
            some = table.head(SPOKEN)
            rows = [list(row) for row in zip(*(column(some[name]) for name in known), strict=True)]
            tables.append({"title": title, "columns": list(known.values()), "rows": rows})
    return tables


def _start(report: Report) -> int:
    """The head that is open at first: the one that raises the answer most."""
    table = report.tables.get("attribute")
    if table is None:
        return 0
    heads = table.loc[(table["component"] == "head") & (table["prompt"] == 0)]
    best = heads.loc[heads["contribution"].idxmax()]
    return int(best["layer"]) * report.meta["model"]["n_heads"] + int(best["head"])
