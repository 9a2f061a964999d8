"""One self-contained page from a heads Report: the map of all heads, and a card for each of them.

The page holds its data as one gzip member in base64: JSON for the tables, then the attention
patterns as bytes of 255·√A, only the lower triangle when the model is causal. A small script
(`head_claims.js` and `page.js`) unpacks and draws it. Nothing is fetched: the page's own
Content-Security-Policy forbids the network and every script but that one, and tokens only ever travel
inside the base64, so no tokenizer can write HTML into it.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp.figures.document import (
    column,
    compact,
    document,
    packed,
    part,
    provenance_lines,
)
from interp.figures.letters import role_letters

if TYPE_CHECKING:
    from interp.report import Report

SCRIPTS = ("head_claims.js", "page.js")
WITHOUT_FRAME = (
    "The report is not shown here: this notebook is not trusted, or what shows it leaves frames out. "
    "Trust the notebook, run the cell again, or save the report and open its report.html."
)


def head_page(report: Report) -> str:
    """A whole HTML document that shows `report` and opens from disk, without a network.

    Args:
        report: a Report of the analysis "heads". `arrays["pattern"]` and `tables["ov_tokens"]` may
            be absent; any score may be NaN; heads may be missing.

    Returns:
        The document. Numbers in it carry six significant digits, attention weights eight bits.
    """
    meta, heads = report.meta, report.tables["heads"]
    return document(
        "page.html.j2",
        styles=["page.css"],
        scripts=SCRIPTS,
        data=_payload(report),
        model=meta.get("model", {}),
        summary=_summary(meta, heads),
        methods=[_method(detector) for detector in meta.get("detectors", [])],
        skipped=meta.get("skipped") or {},
        notes=meta.get("notes") or [],
        provenance=provenance_lines(meta),
    )


def notebook_frame(page: str, *, height: int = 900) -> str:
    """`page` in a sandboxed frame: the form that JupyterLab, VS Code, Colab and nbconvert can show.

    A page is told whether the notebook is dark, and tells it of wheels that scroll nothing in the frame.

    Notebooks that are not trusted are shown without frames. What stands inside the tag, and is never seen
    beside a frame, is then all that is left.

    Example:
        >>> notebook_frame("<p>hello</p>", height=100)[:64]
        '<iframe title="interp report" sandbox="allow-scripts allow-downl'
    """
    return (
        '<iframe title="interp report" sandbox="allow-scripts allow-downloads" '
        f'style="width:100%;height:{int(height)}px;border:0" '
        f'onload="{html.escape(compact(part("frame.js")), quote=True)}" '
        f'srcdoc="{html.escape(page, quote=True)}">{WITHOUT_FRAME}</iframe>'
    )


# ---------------------------------------------------------------- what travels with the page


def _payload(report: Report) -> bytes:
    """What the page's script unpacks: a header, and the pattern bytes."""
    meta, heads = report.meta, report.tables["heads"]
    prompts, pattern = _patterns(report)
    n_layers, n_heads = _grid_shape(meta, heads)
    header = {
        "shape": [n_layers, n_heads],
        "slots": _pattern_shape(report),
        "causal": bool(meta.get("causal", True)),
        "prompts": prompts,
        "ov": _ov_words(report.tables.get("ov_tokens"), heads),
        "clusters": _clusters(report.tables.get("clusters")),
        "meta": {k: v for k, v in meta.items() if k != "prompts"},
    } | claims_document(heads, meta.get("detectors", []))
    return packed(header, pattern)


def claims_document(heads: pd.DataFrame, detectors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What head_claims.js draws: detectors, and a heads table by column, with every head's labels.

    >>> heads = pd.DataFrame({"layer": [0], "head": [2], "labels": ["broad"], "broad": [0.9]})
    >>> claims_document(heads, [{"name": "broad"}])["detectors"]
    [{'name': 'broad', 'title': 'broad', 'letter': 'B'}]
    """
    labels = [_names(text) for text in heads["labels"]] if "labels" in heads else []
    declared = {d["name"] for d in detectors}
    others = dict.fromkeys(name for names in labels for name in names if name not in declared)
    letters = role_letters([*detectors, *({"name": name} for name in others)])
    return {
        "detectors": [
            dict(d) | {"title": d.get("title", d["name"]), "letter": letters.get(d["name"], "")}
            for d in detectors
        ],
        "letters": letters,
        "columns": {str(name): column(heads[name]) for name in heads.columns if name != "labels"},
        "labels": labels,
    }


def _clusters(table: pd.DataFrame | None) -> list[dict[str, Any]]:
    """Letter and description of each cluster of heads."""
    if table is None or table.empty:
        return []
    return [
        {
            "letter": row["cluster"],
            "told": "; ".join(filter(None, (row["above"], row["below"]))) or "near the mean",
        }
        for row in table.to_dict("records")
    ]


def _patterns(report: Report) -> tuple[list[dict[str, Any]], bytes]:
    """The prompts that have a pattern, and those patterns: prompt, layer, head, query, key."""
    pattern = report.arrays.get("pattern")
    if pattern is None or pattern.size == 0:
        return [], b""
    causal = report.meta.get("causal", True)
    prompts, chunks = [], []
    for prompt, grid in zip(report.meta.get("prompts", []), pattern, strict=False):
        n = min(len(prompt["tokens"]), grid.shape[-1])
        query, key = np.tril_indices(n) if causal else map(np.ravel, np.indices((n, n)))
        prompts.append(dict(prompt) | {"tokens": list(prompt["tokens"][:n])})
        chunks.append(np.ascontiguousarray(grid[:, :, query, key], dtype=np.uint8).tobytes())
    return prompts, b"".join(chunks)


def _pattern_shape(report: Report) -> list[int]:
    pattern = report.arrays.get("pattern")
    return [] if pattern is None else [int(n) for n in pattern.shape[1:3]]


def _ov_words(table: Any, heads: Any) -> dict[str, Any]:
    """Per head: [direction, reads, writes], each a list of [index into words, score]."""
    if table is None or table.empty:
        return {"words": [], "heads": []}
    table = table.sort_values(["layer", "head", "direction", "side", "rank"])
    codes, words = pd.factorize(table["token"])
    where = {key: i for i, key in enumerate(zip(heads["layer"], heads["head"], strict=True))}
    found: list[dict[int, dict[str, list[Any]]]] = [{} for _ in range(len(heads))]
    columns = [table[name] for name in ("layer", "head", "direction", "side")]
    for layer, head, direction, side, code, score in zip(
        *columns, codes, column(table["score"]), strict=True
    ):
        row = where.get((layer, head))
        if row is not None:
            sides = found[row].setdefault(int(direction), {"reads": [], "writes": []})
            sides[side].append([int(code), score])
    return {
        "words": [str(word) for word in words],
        "heads": [[[d, s["reads"], s["writes"]] for d, s in entry.items()] for entry in found],
    }


# ---------------------------------------------------------------- what is written in words


def _summary(meta: dict[str, Any], heads: Any) -> dict[str, Any]:
    """The counts of the opening paragraph, read off the table."""
    labels = [_names(text) for text in heads["labels"]] if "labels" in heads else [[]] * len(heads)
    roles = []
    for detector in meta.get("detectors", []):
        name = detector["name"]
        rows = heads[[name in own for own in labels]]
        if rows.empty:
            continue
        score = rows[name] if name in rows else rows["confidence"]
        roles.append(
            {
                "count": len(rows),
                "title": _lower_first(detector.get("title", name)),
                "layers": _depth(rows["layer"]),
                "best": _head_name(rows.loc[score.idxmax()]) if score.notna().any() else None,
            }
        )
    labelled = sum(bool(own) for own in labels)
    return {
        "heads": len(heads),
        "layers": _grid_shape(meta, heads)[0],
        "labelled": labelled,
        "unlabelled": len(heads) - labelled,
        "roles": sorted(roles, key=lambda role: -role["count"]),
        "ablation": _largest_effect(heads),
    }


def _depth(layers: pd.Series) -> str:
    """The layers that heads of a role lie in, and those of the middle half where that says more."""

    def span(low: float, high: float) -> str:
        return f"L{int(low)}" if low == high else f"L{int(low)}–L{int(high)}"

    low, high = layers.min(), layers.max()
    inner = [layers.quantile(q, interpolation="nearest") for q in (0.25, 0.75)]
    if len(layers) < 8 or inner[1] - inner[0] > 0.4 * (high - low):
        return span(low, high)
    return f"{span(low, high)}, half of them in {span(*inner)}"


def _largest_effect(heads: Any) -> dict[str, Any] | None:
    if "ablation_effect" not in heads or not heads["ablation_effect"].notna().any():
        return None
    row = heads.loc[heads["ablation_effect"].idxmax()]
    interval = ""
    if pd.notna(row.get("ablation_low")) and pd.notna(row.get("ablation_high")):
        interval = f" [{_signed(row['ablation_low'])}, {_signed(row['ablation_high'])}]"
    metric = row.get("ablation_metric")
    return {
        "tested": int(heads["ablation_effect"].notna().sum()),
        "head": _head_name(row),
        "effect": f"{_signed(row['ablation_effect'])} nats{interval}",
        "metric": metric if isinstance(metric, str) and metric else "the loss",
    }


def _method(detector: dict[str, Any]) -> dict[str, str]:
    """What one score means, as sentences."""
    threshold, margin = detector.get("threshold"), detector.get("margin")
    parts = [
        detector.get("description"),
        f"Unit: {detector['unit']}" if detector.get("unit") else None,
        None if threshold is None else f"Threshold {threshold}",
        None if threshold is None or margin is None else f"Margin over the null {margin}",
        f"Null: {detector['null']}" if detector.get("null") else None,
        None if detector.get("labels", True) else "A score only; it gives no role",
        f"Source: {detector['source']}" if detector.get("source") else None,
    ]
    text = " ".join(f"{str(part).rstrip().rstrip('.')}." for part in parts if part)
    name = detector["name"]
    return {"name": name, "title": detector.get("title", name), "text": text}


def _grid_shape(meta: dict[str, Any], heads: Any) -> tuple[int, int]:
    model = meta.get("model", {})
    size = {"layer": model.get("n_layers"), "head": model.get("n_heads")}
    n_layers, n_heads = (
        max(n if isinstance(n, int) else 0, 0 if heads.empty else int(heads[axis].max()) + 1)
        for axis, n in size.items()
    )
    return n_layers, n_heads


def _head_name(row: Any) -> str:
    return f"L{int(row['layer'])}H{int(row['head'])}"


def _names(text: Any) -> list[str]:
    if not isinstance(text, str):
        return []
    return [name.strip() for name in text.split(",") if name.strip()]


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _signed(value: Any) -> str:
    return f"{float(value):+.2f}".replace("-", "−")
