"""Groups of heads: which heads of a layer attend alike, which write alike, and what is lost with the group.

Two likenesses between heads of a layer, over the same prompts:
- attend: correlation of their attention rows, all entries a query can see, each row less its mean (else two
  heads that both follow the uniform pattern would look alike).
- write: correlation of what they add to the residual stream, z W_O, each less its mean over tokens.
Heads are clustered by either; how many clusters a layer has is the number with the best silhouette.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score, silhouette_score
from torch import Tensor

from circuits.heads.claims import INTERVAL, resampling
from circuits.heads.game import PROMPTS, Game, prompts_of
from interp.data.prompts import Prompts
from interp.errors import BadInput, Refused, unknown
from interp.models.model import Model
from interp.registry import analysis, first_rows, leading
from interp.report import Report, provenance
from interp.run.edits import Edit, Seen
from interp.run.progress import Progress

LEAST_SILHOUETTE = 0.25
"""Below this best silhouette a layer has no clusters to speak of: each head is one of its own."""
LEAST_LIKENESS = 0.5
"""A cluster's pairs are alike by at least this much on average, or its heads are each one of their own."""
KINDS = ("attend", "write")

Likeness = Float[np.ndarray, "n heads heads"]


def check_options(
    *, data: str = "text", prompts: int = 8, by: str = "attend", tested: int = 12, **_: Any
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if data not in PROMPTS:
        raise unknown("kind of prompts", data, PROMPTS)
    if by not in KINDS:
        raise unknown("kind of likeness", by, KINDS)
    if prompts < 2:
        raise BadInput(f"prompts={prompts}: agreement between prompts needs at least 2")
    if tested < 0:
        raise BadInput(f"tested={tested}: give 0 or more groups")


@analysis(
    name="head_groups",
    source="CHAI (Agarwal et al. 2024), clusters by correlation of attention; the rest ours",
    example="interp head-groups smollm2-135m",
    figure="map",
    validate=check_options,
    summary=lambda report: leading(
        first_rows(report), "layer", "head", "attend", "nearest_attend", "likeness_attend", "write"
    ),
    takes="text",
)
def head_groups(
    model: Model,
    *,
    data: str = "text",
    prompts: int = 8,
    by: str = "attend",
    tested: int = 12,
    seed: int = 0,
    progress: bool | None = None,
) -> Report:
    """Which heads of each layer attend alike and write alike, and what removing one or all of a group costs.

    Likeness is a correlation over these prompts, so it says nothing of other text; heads that attend alike
    can write different things. A gap between removing all and the sum of removing each says that they stand
    in for each other (positive) or need each other (negative), not that they do the same.

    Args:
        model: from `interp.load`.
        data: "text" (prose) or "repeated" random tokens.
        prompts: how many; each is also clustered alone, to see how far they agree.
        by: the likeness whose clusters are tested by ablation, "attend" or "write".
        tested: how many clusters of at least two heads are ablated, the most alike first; 0 for none.
        seed: of prompts and intervals.
        progress: show progress bars.

    Returns: a Report with tables
        "head_groups": a row a head: layer, head, kv_group, attend and write (number of its cluster in the layer,
            by either likeness), nearest_attend and nearest_write (the head most like it, and how much).
        "layers": a row a layer: clusters and silhouette of each kind, agreement (mean adjusted Rand index of
            the clusters of single prompts with those of all), and how far both kinds of clusters agree.
        "redundancy": a row a tested cluster: heads, likeness, cost of all together, sum of their single costs,
            largest single cost, gap (all − sum) with interval (nats a token).
        "kv_groups": a row a group of heads that share keys and values: likeness within, between it and the
            rest of the layer, and the share of equally large sets of heads of the layer that are less alike.
        Arrays "attend" and "write" [n_layers n_heads n_heads].

    Raises:
        BadInput: options as above. Refused: the model's patterns cannot be seen.

    >>> report = head_groups(tiny_model(), data="repeated", prompts=2, progress=False)
    >>> sorted(report.tables), len(report.table)
    (['head_groups', 'kv_groups', 'layers', 'redundancy'], 8)

    Source: CHAI (Agarwal et al. 2024): clusters of heads by correlation of their attention, per layer, the
        number by an elbow; ours by the silhouette, with average linkage. Writing, redundancy and groups of
        shared keys are ours.
    """
    started = time.perf_counter()
    check_options(data=data, prompts=prompts, by=by, tested=tested)
    model.layers_with("pattern")
    made = prompts_of(model, data, prompts, seed)
    notes = []
    with Progress(progress) as bars:
        alike = {"attend": attention_likeness(model, made, bars.stage("Comparing heads", prompts))}
        try:
            alike["write"] = write_likeness(model, made)
        except Refused as refusal:
            notes.append(f"What heads write is not compared: {refusal}")
            if by == "write":
                raise
        clusters = {
            kind: {layer: cluster(x.mean(0)) for layer, x in layers.items()}
            for kind, layers in alike.items()
        }
        tables = {
            "head_groups": _head_rows(model, alike, clusters),
            "layers": _layer_rows(alike, clusters),
            "redundancy": _redundancy(model, made, alike[by], clusters[by], tested, seed, notes),
            "kv_groups": _kv_rows(model, alike),
        }
    options = {"data": data, "prompts": prompts, "by": by, "tested": tested}
    meta = provenance(model, options=options, seed=seed) | {"notes": notes}
    meta["wall_time_s"] = round(time.perf_counter() - started, 2)
    arrays = {kind: _stacked(model, layers) for kind, layers in alike.items()}
    return Report("head_groups", tables, arrays, meta)


# --- likeness ----------------------------------------------------------------------------------------


def attention_likeness(
    model: Model, prompts: Prompts, advance=lambda n: None
) -> dict[int, Likeness]:
    """Correlation of the attention rows of every two heads of a layer, prompt by prompt.

    r_ab = Σ_qk Ã_a[q, k] Ã_b[q, k] / √(Σ Ã_a² Σ Ã_b²), Ã the weights of the keys that query q sees less their
    mean; the first query sees one key and counts for nothing. Keys outside a sliding window count as seen
    with weight 0. Patterns are read chunk by chunk.
    """
    sums: dict[int, Tensor] = {}
    parts: list[dict[int, np.ndarray]] = []

    def read(pattern: Tensor, seen: Seen) -> Tensor:
        rows, keys = pattern.shape[2:]
        at = torch.arange(seen.start, seen.start + rows, device=pattern.device)
        visible = torch.ones(rows, keys, device=pattern.device)
        if prompts.causal:
            visible = (torch.arange(keys, device=pattern.device) <= at[:, None]).float()
        centred = pattern.float() - pattern.float().sum(-1, keepdim=True) / visible.sum(
            -1, keepdim=True
        )
        flat = (centred * visible).flatten(2)
        gram = flat @ flat.transpose(1, 2)
        sums[seen.layer] = sums[seen.layer] + gram if seen.layer in sums else gram
        return pattern

    for row in range(len(prompts)):
        sums.clear()
        model.run(
            prompts.rows(slice(row, row + 1)).batch,
            edits=[Edit.apply("pattern", read)],
            logits=False,
        )
        parts.append({layer: _correlation(gram[0]) for layer, gram in sums.items()})
        advance(1)
    return {layer: np.stack([part[layer] for part in parts]) for layer in sorted(parts[0])}


def write_likeness(model: Model, prompts: Prompts) -> dict[int, Likeness]:
    """Correlation of what every two heads of a layer write, z W_O less its mean over tokens, by prompt.

    ⟨z_a W_O^a, z_b W_O^b⟩ = ⟨z_aᵀ z_b, W_O^a W_O^bᵀ⟩: no [tokens heads d_model] array is formed.
    """
    model.layers_with("attn_out")
    parts: list[dict[int, np.ndarray]] = []
    overlaps: dict[int, Tensor] = {}
    for row in range(len(prompts)):
        run = model.run(prompts.rows(slice(row, row + 1)).batch, capture=["z"], logits=False)
        part = {}
        for layer, z in run.cache.by_layer("z").items():
            if layer not in overlaps:
                W_O = model.W_O(layer).float()
                overlaps[layer] = torch.einsum("adm,bem->abde", W_O, W_O)
            z = z[0].float()
            z = z - z.mean(0)
            both = torch.einsum("pad,pbe->abde", z, z)
            part[layer] = _correlation((both * overlaps[layer]).sum((2, 3)))
        parts.append(part)
    return {layer: np.stack([part[layer] for part in parts]) for layer in sorted(parts[0])}


def _correlation(gram: Tensor) -> np.ndarray:
    """Gram matrix [heads heads] over its diagonal's roots; a head that never varies is like none."""
    root = gram.diagonal().clamp_min(0).sqrt()
    # what is left of a constant is rounding: under 1e-6 of the layer's largest it is nothing
    still = root <= 1e-6 * root.max().clamp_min(1e-20)
    found = gram / (root[:, None] * root).clamp_min(1e-30)
    found = found.masked_fill(still[:, None] | still, 0.0).clamp(-1, 1)
    return found.fill_diagonal_(1.0).cpu().double().numpy()


# --- clusters ----------------------------------------------------------------------------------------


def cluster(likeness: Float[np.ndarray, "heads heads"]) -> tuple[np.ndarray, float]:
    """(number of each head's cluster, silhouette): average linkage at distance 1 − likeness.

    The number of clusters is the one with the best silhouette; each head alone where that is under 0.25. A
    cluster less alike than 0.5 on average is none. A layer all of whose pairs are alike by 0.5 is one cluster
    (its silhouette is NaN, as that of heads all alone).

    >>> alike = np.array([[1, 0.9, 0.1], [0.9, 1, 0.0], [0.1, 0.0, 1]])
    >>> cluster(alike)[0].tolist()
    [0, 0, 1]
    """
    n = len(likeness)
    distance = (1 - likeness).clip(min=0)
    np.fill_diagonal(distance, 0)
    pairs = likeness[np.triu_indices(n, 1)]
    if len(pairs) and pairs.min() >= LEAST_LIKENESS:
        return np.zeros(n, int), float("nan")
    best = np.arange(n), float("nan")
    top = LEAST_SILHOUETTE
    for k in range(2, n):
        found = AgglomerativeClustering(
            n_clusters=k, metric="precomputed", linkage="average"
        ).fit_predict(distance)
        silhouette = float(silhouette_score(distance, found, metric="precomputed"))
        if silhouette > top:
            best, top = (found, silhouette), silhouette
    return _in_order(_broken(best[0], likeness)), best[1]


def _broken(labels: np.ndarray, likeness: np.ndarray) -> np.ndarray:
    """The same clusters, the heads of those that are not alike each one of its own."""
    labels = labels.copy()
    for label in np.unique(labels):
        heads = np.nonzero(labels == label)[0].tolist()
        if len(heads) > 1 and _within(likeness, heads) < LEAST_LIKENESS:
            labels[heads] = labels.max() + 1 + np.arange(len(heads))
    return labels


def _in_order(labels: np.ndarray) -> np.ndarray:
    """The same clusters, numbered by their first head."""
    _, first = np.unique(labels, return_index=True)
    number = {labels[i]: place for place, i in enumerate(sorted(first))}
    return np.array([number[label] for label in labels])


# --- tables ------------------------------------------------------------------------------------------


def _head_rows(model: Model, alike, clusters) -> pd.DataFrame:
    rows = []
    for layer, x in alike["attend"].items():
        for head in range(x.shape[1]):
            row: dict[str, Any] = {
                "layer": layer,
                "head": head,
                "kv_group": model.spec.kv_group(layer, head),
            }
            for kind, layers in alike.items():
                row[kind] = int(clusters[kind][layer][0][head])
                mean = layers[layer].mean(0)[head].copy()
                mean[head] = -np.inf
                alone = len(mean) == 1
                row[f"nearest_{kind}"] = -1 if alone else int(mean.argmax())
                row[f"likeness_{kind}"] = np.nan if alone else float(mean.max())
            rows.append(row)
    return pd.DataFrame(rows)


def _layer_rows(alike, clusters) -> pd.DataFrame:
    rows = []
    for layer in alike["attend"]:
        row: dict[str, Any] = {"layer": layer}
        for kind, layers in alike.items():
            found, silhouette = clusters[kind][layer]
            single = [cluster(one)[0] for one in layers[layer]]
            row[f"clusters_{kind}"] = int(found.max()) + 1
            row[f"silhouette_{kind}"] = silhouette
            row[f"agreement_{kind}"] = float(
                np.mean([adjusted_rand_score(found, one) for one in single])
            )
        if "write" in clusters:
            row["attend_and_write"] = float(
                adjusted_rand_score(clusters["attend"][layer][0], clusters["write"][layer][0])
            )
        rows.append(row)
    return pd.DataFrame(rows)


def _within(likeness: np.ndarray, heads: Sequence[int]) -> float:
    """Mean likeness of the pairs among some heads."""
    return float(np.mean([likeness[a, b] for a, b in combinations(heads, 2)]))


def _redundancy(
    model: Model, prompts: Prompts, alike, clusters, tested: int, seed: int, notes: list[str]
) -> pd.DataFrame:
    """Clusters of at least two heads, most alike first: cost of each head and of all together."""
    columns = ["layer", "heads", "likeness", "all", "sum", "largest", "gap", "gap_low", "gap_high"]
    groups = []
    for layer, (labels, _) in clusters.items():
        for label in np.unique(labels):
            heads = np.nonzero(labels == label)[0].tolist()
            if len(heads) > 1:
                groups.append((_within(alike[layer].mean(0), heads), layer, heads))
    groups = sorted(groups, key=lambda group: -group[0])[:tested]
    if not groups:
        return pd.DataFrame(columns=columns)
    try:
        game = Game.of(model, prompts)
    except Refused as refusal:
        notes.append(f"No group is ablated: {refusal}")
        return pd.DataFrame(columns=columns)
    base = game.base()
    sets = [[(layer, head)] for _, layer, heads in groups for head in heads]
    sets += [[(layer, head) for head in heads] for _, layer, heads in groups]
    costs = game.losses(base, [game.mask(removed) for removed in sets]) - base.losses
    costs = costs.double().numpy()
    weights = resampling(len(prompts), seed)
    rows, start = [], 0
    for place, (likeness, layer, heads) in enumerate(groups):
        single = costs[start : start + len(heads)]
        start += len(heads)
        together = costs[len(costs) - len(groups) + place]
        gap = together - single.sum(0)
        low, high = np.quantile(weights @ gap, INTERVAL)
        rows.append(
            (
                layer,
                ",".join(map(str, heads)),
                likeness,
                together.mean(),
                single.mean(1).sum(),
                single.mean(1).max(),
                gap.mean(),
                low,
                high,
            )
        )
    return pd.DataFrame(rows, columns=columns)


def _kv_rows(model: Model, alike) -> pd.DataFrame:
    """Each group of heads with shared keys and values against equally large sets of its layer."""
    columns = ["layer", "kv_group", "heads"]
    columns += [f"{kind}_{part}" for kind in alike for part in ("within", "between", "above")]
    rows = []
    for layer, x in alike["attend"].items():
        n = x.shape[1]
        groups: dict[int, list[int]] = {}
        for head in range(n):
            groups.setdefault(model.spec.kv_group(layer, head), []).append(head)
        for group, heads in groups.items():
            if not 1 < len(heads) < n:
                continue
            row: list[Any] = [layer, group, ",".join(map(str, heads))]
            for layers in alike.values():
                mean = layers[layer].mean(0)
                inside = _within(mean, heads)
                rest = [head for head in range(n) if head not in heads]
                others = [_within(mean, some) for some in _sets(n, len(heads))]
                row += [inside, float(mean[np.ix_(heads, rest)].mean())]
                row.append(float(np.mean([inside > other for other in others])))
            rows.append(row)
    return pd.DataFrame(rows, columns=columns)


def _sets(n: int, size: int, most: int = 2000) -> list[tuple[int, ...]]:
    """All sets of `size` out of n heads, or as many random ones where there are too many."""
    generator = np.random.default_rng(0)
    found = []
    for chosen in combinations(range(n), size):
        found.append(chosen)
        if len(found) > most:
            return [tuple(generator.permutation(n)[:size]) for _ in range(most)]
    return found


def _stacked(model: Model, layers: dict[int, Likeness]) -> np.ndarray:
    """Mean likeness [n_layers n_heads n_heads]; NaN where a layer has no (or fewer) heads."""
    n = model.spec.n_heads
    out = np.full((model.n_layers, n, n), np.nan, dtype=np.float32)
    for layer, x in layers.items():
        out[layer, : x.shape[1], : x.shape[1]] = x.mean(0)
    return out
