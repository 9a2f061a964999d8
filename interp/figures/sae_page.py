"""One self-contained page for an SAE: an overview, a list of all features, and a card for each.

The page holds its data as one gzip member in base64: a JSON header, then typed arrays, each named in
the header. Numbers of features and contexts are columns; activations and histograms are bytes, the
text of all contexts stands there once, and every token's text once. The list builds only the rows in
sight and a card is built when it is opened, so that ten thousand features cost what a screen of them
costs. Nothing is fetched: the page's Content-Security-Policy forbids the network and every script but
its own, and tokens travel inside the base64 only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from interp.figures.document import column, document, packed, provenance_lines
from interp.report import Report

CURVE_POINTS = 400
"""Points of the training curve that travel with the page: more than a screen shows."""

PER_FEATURE = ("density", "mean", "max", "head_share", "ablation_effect", "ablation_at_peak")


def sae_page(report: Report) -> str:
    """A whole HTML document that shows a "sae_features" report and opens from disk, without a network.

    Args:
        report: of the analysis "sae_features". Tables "loss" and "curve", arrays "heads",
            "up_ids" and what belongs to them may be absent; ablation effects may be NaN.

    Returns:
        The document. In it activations carry 8 bits of the feature's largest one, logits 8 bits of
        the feature's largest, histograms 8 bits of the root of a count; other numbers 32-bit floats.
    """
    meta = report.meta
    return document(
        "sae_page.html.j2",
        styles=["sae_page.css"],
        scripts=["sae_page.js"],
        data=_payload(_header(report), _arrays(report)),
        model=meta.get("model", {}),
        sae=meta.get("sae", {}),
        text=meta.get("text") or {},
        overview=report.tables["overview"].iloc[0].to_dict(),
        features=len(report.table),
        losses=_losses(report),
        has={name for name in ("loss", "curve") if name in report.tables},
        removed=int(report.table["ablation_effect"].notna().to_numpy().sum()),
        contexts_removed=meta.get("ablated_contexts", 0),
        distinct=meta.get("distinct", "document"),
        skipped=meta.get("skipped") or {},
        notes=meta.get("notes") or [],
        provenance=provenance_lines(meta),
    )


# --- what travels with the page -----------------------------------------------------------------


def _payload(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """What the page's script unpacks: the header, and the arrays one after the other."""
    header["arrays"] = [[name, x.dtype.str[1:], list(x.shape)] for name, x in arrays.items()]
    parts = [x.astype(x.dtype.newbyteorder("<")).tobytes() for x in arrays.values()]
    return packed(header, b"".join(parts))


def _header(report: Report) -> dict[str, Any]:
    """Tokens, the overview's curves, and names; small beside the arrays."""
    histogram = report.tables["histogram"]
    curve = report.tables.get("curve")
    if curve is not None:
        curve = curve.iloc[:: max(1, len(curve) // CURVE_POINTS)]
    return {
        "tokens": report.tables["tokens"]["text"].tolist(),
        "histogram": {
            "from": column(histogram["from"]),
            "to": column(histogram["to"]),
            "features": column(histogram["latents"]),
        },
        "curve": None
        if curve is None
        else {name: column(curve[name]) for name in ("rows", "fvu", "l0", "dead")},
        "dense": int(report.table["dense"].to_numpy().sum()),
        "site": report.meta.get("sae", {}).get("site", ""),
    }


def _arrays(report: Report) -> dict[str, np.ndarray]:
    """Columns of features and of contexts, quantised; the texts that contexts are parts of."""
    table, contexts, given = report.table, report.tables["contexts"], report.arrays
    tokens = report.tables["tokens"]["token_id"].to_numpy()
    index = np.uint16 if len(tokens) <= 2**16 else np.uint32
    places = np.searchsorted(table["feature"], contexts["feature"])
    order = np.lexsort((contexts["rank"], places))
    contexts, near = contexts.iloc[order], given["context_activations"][order]
    places = places[order]
    found = {
        "feature": table["feature"].to_numpy(np.uint32),
        "fired": table["fired"].to_numpy(np.uint32),
        "first": np.searchsorted(places, np.arange(len(table) + 1)).astype(np.uint32),
        "histogram": _rooted(given["histogram"]),
        "exponent": given["histogram_exponent"].astype(np.int8),
        "start": contexts["start"].to_numpy(np.uint32),
        "length": contexts["length"].to_numpy(np.uint16),
        "peak": contexts["peak"].to_numpy(np.uint16),
        "activation": contexts["activation"].to_numpy(np.float32),
        "rise": contexts["ablation_effect"].to_numpy(np.float32),
        "near": _bytes(near, table["max"].to_numpy()[places], np.uint8),
        "text": np.searchsorted(tokens, given["text_ids"]).astype(index),
    }
    found |= _runs(given["text_document"], given["text_token"])
    found |= {
        name: table[name].to_numpy(np.float32) for name in PER_FEATURE if name in table.columns
    }
    if "heads" in given:
        found["heads"] = np.round(255 * given["heads"]).astype(np.uint8)
        found["head"] = table["head"].to_numpy(np.uint16)
    for side in ("up", "down"):
        if f"{side}_ids" in given:
            largest = np.abs(given[f"{side}_logits"]).max(1)
            found[f"{side}_token"] = np.searchsorted(tokens, given[f"{side}_ids"]).astype(index)
            found[f"{side}_logit"] = _bytes(given[f"{side}_logits"], largest, np.int8)
            found[f"{side}_scale"] = largest.astype(np.float32)
    return found


def _bytes(x: np.ndarray, largest: np.ndarray, kind: type) -> np.ndarray:
    """Rows as whole numbers of the largest that a byte holds; what is not zero stays so."""
    top = np.iinfo(kind).max
    scaled = x * (top / np.maximum(np.nan_to_num(largest, nan=1.0), 1e-30))[:, None]
    least = np.where(x != 0, np.sign(x), 0)
    rounded = np.round(scaled)
    return np.clip(np.where(rounded == 0, least, rounded), np.iinfo(kind).min, top).astype(kind)


def _rooted(counts: np.ndarray) -> np.ndarray:
    """Counts as bytes of the root of their share of the row's largest, so that one token can be seen."""
    return _bytes(np.sqrt(counts), np.sqrt(counts.max(1)), np.uint8)


def _runs(document: np.ndarray, token: np.ndarray) -> dict[str, np.ndarray]:
    """Where consecutive text begins: place in the text, document, number of the first token there."""
    begins = np.ones(len(document), dtype=bool)
    begins[1:] = (np.diff(document) != 0) | (np.diff(token) != 1)
    where = np.flatnonzero(begins)
    return {
        "run": where.astype(np.uint32),
        "run_document": document[where].astype(np.uint32),
        "run_token": token[where].astype(np.uint32),
    }


def _losses(report: Report) -> list[dict[str, Any]]:
    """The loss under each condition, with the length of its bar in per cent of the largest rise."""
    table: pd.DataFrame | None = report.tables.get("loss")
    if table is None:
        return []
    names = {"clean": "nothing replaced", "sae": "the SAE spliced in", "zero": "zero-ablation",
             "mean": "mean-ablation"}  # fmt: skip
    largest = max(float(np.asarray(table["increase"].abs().max())), 1e-12)
    return [
        {
            "name": names.get(row["condition"], row["condition"]),
            "loss": row["loss"],
            "increase": row["increase"],
            "share": round(100 * abs(row["increase"]) / largest, 1),
            "recovered": [row["recovered_vs_zero"], row["recovered_vs_mean"]]
            if row["condition"] == "sae"
            else None,
        }
        for row in table.to_dict("records")
    ]
