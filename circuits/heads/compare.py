"""Head reports of several models laid side by side: by role, by relative depth, head by head."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from circuits.heads.changes import HEADS, SCORES, changes_by_head, changes_of_tables, errors
from circuits.heads.comparable import comparable, names_of
from circuits.heads.matching import ALPHA, DRAWS, distances, match_heads, standardised
from circuits.heads.profiles import (
    BINS,
    depth_profiles,
    profile_distances,
    relative_depth,
    role_counts,
)
from interp.errors import BadInput, unknown
from interp.registry import analysis
from interp.report import Report, combined_provenance

PAIRS = ("all", "first", "next")
SHAPE = ("family", "n_layers", "n_heads", "n_kv_heads", "d_model", "d_head")


def check_options(
    *, pairs: str = "all", penalty: float = 0.0, bins: int = BINS, alpha: float = ALPHA
) -> None:
    """Raise BadInput for options that no reports could satisfy."""
    if pairs not in PAIRS:
        raise unknown("way to pair reports", pairs, PAIRS)
    if penalty < 0:
        raise BadInput(f"penalty={penalty}: a difference in depth costs 0 or more")
    if bins < 1:
        raise BadInput(f"bins={bins}: depth needs at least one bin")
    if not 0 < alpha < 1:
        raise BadInput(f"alpha={alpha}: a significance level lies between 0 and 1, such as {ALPHA}")


def pairs_found(report: Report) -> pd.DataFrame:
    """Each pair of models: how many heads are matched, how many in the same place, how many changed."""
    rows: Any = report.table
    return pd.DataFrame(
        {
            "model": rows["model_a"],
            "with": rows["model_b"],
            "matched": [
                f"{n} ({x:.0%})" for n, x in zip(rows["matched"], rows["share"], strict=True)
            ],
            "in place": ["" if x != x else f"{x:.0%}" for x in rows["same_place"]],
            "changed": ["" if pd.isna(x) else str(int(x)) for x in rows["changed_heads"]],
        }
    )


@analysis(
    name="compare",
    source="matching units of models against a baseline: Gurnee et al. 2024 (universal neurons); the rest ours",
    example="interp compare reports/small-heads reports/large-heads --out reports/compare",
    figure="roles",
    validate=check_options,
    summary=pairs_found,
    reads="reports",
)
def compare_reports(
    reports: Sequence[Report],
    *,
    pairs: str = "all",
    penalty: float = 0.0,
    bins: int = BINS,
    alpha: float = ALPHA,
    seed: int = 0,
    out: Path | None = None,
) -> Report:
    """Role counts, depth profiles, matched heads and changed heads of models whose heads were classified.

    A head is its scores' distances from their nulls, in standard deviations over both models' heads. Each gets
    the partner that makes the sum of distances least; the pair is a match where it is nearer than heads with the
    same spreads and correlations of scores, otherwise put together at random, would be. So a match says that
    two heads behave alike on these prompts and unlike most others; not that they compute the same, nor that one
    could stand for the other. Two reports of one model with different seeds show how far matching can get.

    Args:
        reports: of `interp heads`, at least two, made with the same detectors and lengths of prompts.
        pairs: which pairs of models are matched: "all"; "first" with each other one; each with the "next".
        penalty: what it costs to pair heads at opposite ends of the models, in standard deviations.
        bins: of relative depth in profiles.
        alpha: corrected significance level of matches and changes.
        seed: of the models put together at random.
        out: where the report will be saved, so that it can link to the others.

    Returns: a Report with tables
        "compare": a row a pair of models: model_a, model_b, heads_a, heads_b, matched, share with interval (of
            the smaller model's heads), same_place and same_labels (shares of the matches; the place where
            shapes agree), distance and noise (medians over pairs; noise is what other prompts would make of the
            distance of a head to itself), closer_than_kin (share of heads whose partner is nearer than any
            other head of their own model: about ½ for two draws of one kind of model), changed_heads.
        "models": a row a report. "roles", "profiles", "profile_distances": `circuits.heads.profiles`.
        "matches": a row a pair of heads: places, relative depths, labels, distance, noise, chance, effect, p,
            matched (`circuits.heads.matching`). "unmatched": heads without a match, and why.
        "changes", "score_changes": heads in the same place, for pairs of one shape (`circuits.heads.changes`).

    Raises:
        BadInput: fewer than two reports, reports of something else, scores that cannot be compared.

    >>> from circuits import classify_heads
    >>> one = classify_heads(tiny_model(), prompts=4, ablate=False, evidence=0, progress=False)
    >>> both = compare_reports([one, one])
    >>> int(both.table["matched"][0]), float(both.table["same_place"][0])
    (8, 1.0)
    """
    started = time.perf_counter()
    check_options(pairs=pairs, penalty=penalty, bins=bins, alpha=alpha)
    detectors, notes = comparable(reports)
    names = names_of(reports)
    by_name = dict(zip(names, reports, strict=True))
    tables = {name: report.table for name, report in by_name.items()}
    n_layers = {name: report.meta["model"]["n_layers"] for name, report in by_name.items()}
    roles = [d["name"] for d in detectors if d["labels"]]
    found: dict[str, list[pd.DataFrame]] = {}
    rows = []
    for a, b in _pairs(names, pairs):
        row, parts = _compared(
            by_name[a], by_name[b], detectors, penalty=penalty, alpha=alpha, seed=seed
        )
        place = {"model_a": a, "model_b": b}
        rows.append(place | row)
        for table, part in parts.items():
            named: Any = part.assign(**place)[[*place, *part]]
            found.setdefault(table, []).append(named)
    pairs_table = pd.DataFrame(rows).astype({"changed_heads": "Int64"})
    made = {"compare": pairs_table, "models": _models(by_name, out)}
    made |= {
        "roles": role_counts(
            tables, n_layers, roles, {n: r.meta["options"]["alpha"] for n, r in by_name.items()}
        ),
        "profiles": depth_profiles(tables, n_layers, roles, bins),
        "profile_distances": profile_distances(tables, n_layers, roles, seed=seed),
    }
    for name, columns in (("matches", []), ("changes", HEADS), ("score_changes", SCORES)):
        empty = pd.DataFrame(columns=["model_a", "model_b", *columns])
        made[name] = pd.concat(found[name], ignore_index=True) if name in found else empty
    made["unmatched"] = _unmatched(made["matches"], tables)
    options = {"pairs": pairs, "penalty": penalty, "bins": bins, "alpha": alpha}
    meta = combined_provenance([r.meta for r in reports], options=options, seed=seed)
    meta |= {"detectors": detectors, "draws": DRAWS, "notes": notes}
    meta["wall_time_s"] = round(time.perf_counter() - started, 2)
    return Report("compare", made, {}, meta)


def _pairs(names: Sequence[str], pairs: str) -> list[tuple[str, str]]:
    if pairs == "first":
        return [(names[0], other) for other in names[1:]]
    return list(pairwise(names) if pairs == "next" else combinations(names, 2))


# --- a pair of models ---------------------------------------------------------------------------------


def _compared(
    a: Report,
    b: Report,
    detectors: Sequence[Mapping[str, Any]],
    *,
    penalty: float,
    alpha: float,
    seed: int,
) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """The pair's row, and its "matches", "changes" and "score_changes"."""
    scores = [d["name"] for d in detectors]
    sides = (a, b)
    noise = [errors(report.table, scores) for report in sides]
    x, y, unit = standardised(*(_from_null(r.table, scores) for r in sides), *noise)
    depth = [relative_depth(r.table, r.meta["model"]["n_layers"]) for r in sides]
    found = match_heads(
        x, y, depth_a=depth[0], depth_b=depth[1], penalty=penalty, alpha=alpha, seed=seed
    )
    rows, partners = found["a"].to_numpy(), found["b"].to_numpy()
    columns: dict[str, Any] = {}
    for side, report, deep, at in zip("ab", sides, depth, (rows, partners), strict=True):
        for name in ("layer", "head", "labels"):
            columns[f"{name}_{side}"] = report.table[name].to_numpy()[at]
        columns[f"depth_{side}"] = deep[at]
    squares = ((noise[0][rows] ** 2 + noise[1][partners] ** 2) * unit**2).mean(1)
    columns |= {"distance": found["distance"], "noise": np.sqrt(squares)}
    columns |= {name: found[name] for name in ("chance", "effect", "p", "matched")}
    matches: Any = pd.DataFrame(columns)
    real: Any = matches[matches["matched"]]
    within = distances(x, x)
    np.fill_diagonal(within, np.inf)
    share = binomtest(len(real), len(matches)).proportion_ci(method="wilson")
    row: dict[str, Any] = {
        "heads_a": len(x),
        "heads_b": len(y),
        "matched": len(real),
        "share": len(real) / len(matches),
        "share_low": float(share.low),
        "share_high": float(share.high),
        "same_place": np.nan,
        "same_labels": _mean(real["labels_a"] == real["labels_b"]),
        "distance": float(matches["distance"].median()),
        "noise": float(matches["noise"].median()),
        "closer_than_kin": float((matches["distance"] < within.min(1)[rows]).mean()),
        "changed_heads": None,
    }
    parts = {"matches": matches}
    if _same_shape(a, b):
        here = (real["layer_a"] == real["layer_b"]) & (real["head_a"] == real["head_b"])
        row["same_place"] = _mean(here)
        moved = changes_of_tables(
            a.table,
            b.table,
            {d["name"]: d["margin"] for d in detectors},
            prompts=min(r.meta["options"]["prompts"] for r in sides),
            alpha=alpha,
        )
        heads: Any = changes_by_head(moved, list(a.table["labels"]), list(b.table["labels"]))
        row["changed_heads"] = int((heads["changed_scores"] > 0).sum())
        parts |= {"changes": heads, "score_changes": moved}
    return row, parts


def _from_null(table: pd.DataFrame, scores: Sequence[str]) -> np.ndarray:
    """Scores less their nulls [heads scores]; as they are where there is no null."""
    found = [table[name] - table[f"{name}_null"].fillna(0) for name in scores]
    return np.stack([x.to_numpy(float) for x in found], axis=1)


def _same_shape(a: Report, b: Report) -> bool:
    x, y = a.meta["model"], b.meta["model"]
    alike = all(x.get(key) == y.get(key) for key in SHAPE)
    return alike and a.table[["layer", "head"]].equals(b.table[["layer", "head"]])


def _mean(values: pd.Series) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _unmatched(matches: pd.DataFrame, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """A row a head without a match: model, against, layer, head, labels, why, distance (of its partner)."""
    rows = []
    groups: Any = matches.groupby(["model_a", "model_b"], sort=False)
    for (a, b), mine in groups:
        for side, model, against in (("a", a, b), ("b", b, a)):
            places = zip(mine[f"layer_{side}"], mine[f"head_{side}"], strict=True)
            kept = dict(zip(places, mine[["matched", "distance"]].to_numpy(), strict=True))
            for layer, head, labels in tables[model][["layer", "head", "labels"]].to_numpy():
                matched, distance = kept.get((layer, head), (None, np.nan))
                if not matched:
                    why = (
                        f"{against} has fewer heads" if matched is None else "no nearer than chance"
                    )
                    rows.append((model, against, layer, head, labels, why, distance))
    columns = ["model", "against", "layer", "head", "labels", "why", "distance"]
    return pd.DataFrame(rows, columns=columns)


def _models(by_name: Mapping[str, Report], out: Path | None) -> pd.DataFrame:
    """A row a report; `page` is where its page is, from `out` if that is known, or "" ."""
    rows = []
    for name, report in by_name.items():
        model, folder = report.meta["model"], report.meta.get("folder")
        page = ""
        if folder:
            page = Path(folder).resolve() / "report.html"
            page = page.as_uri() if out is None else os.path.relpath(page, out.resolve())
        facts = {key: model.get(key) for key in (*SHAPE, "sha256")}
        asked = {"prompts": report.meta["options"]["prompts"], "seed": report.meta["seed"]}
        rows.append({"model": name} | facts | asked | {"heads": len(report.table), "page": page})
    return pd.DataFrame(rows)
