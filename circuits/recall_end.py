"""What MLPs add at the last position of a fact's prompt, and what the last layers take back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution import Contributions
from circuits.heads.claims import INTERVAL
from circuits.recall_facts import ALPHA, Asked, corrected_p, log_p
from interp.data.prompts import prose
from interp.devices import wide
from interp.models.model import Model
from interp.run.cache import Run
from interp.run.edits import Edit
from interp.unembedding import Unembedding

SUPPRESSION = 0.05
"""A suppressor's least effect on the answer's log-probability, in nats."""
FREQUENT = 100
"""How many of the most frequent tokens of the shipped English prose count as frequent."""
MLP_COLUMNS = [
    *("layer", "contribution", "contribution_low", "contribution_high", "contribution_shuffled"),
    *("log_p_change", "log_p_change_low", "log_p_change_high", "rank_change"),
    *("common", "common_low", "common_high", "explained", "explained_shuffled"),
]
"""Columns of table "mlps": the same for a model without resid_mid, or without an MLP."""


# --- the lens ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spoken:
    """The logit lens's log p (nats) and rank of each fact's answer, before and after each MLP.

    after, rank_after: [n_layers + 1, n], the embedding first. other: the same of the counterfactual's
    answer. before, rank_before: by layer, from resid_mid; empty where the model has none.
    """

    after: Float[np.ndarray, "layers n"]
    other: Float[np.ndarray, "layers n"]
    rank_after: Float[np.ndarray, "layers n"]
    before: dict[int, Float[np.ndarray, " n"]]
    rank_before: dict[int, Float[np.ndarray, " n"]]


@torch.no_grad()
def spoken_by_layer(model: Model, run: Run, asked: Asked) -> Spoken:
    """What the logit lens reads at the end of each fact's prompt."""
    unembed, end = Unembedding(model), asked.prompts.end
    tokens = torch.stack([asked.answers, asked.answers[asked.other]], 1)

    def spoken(site: str) -> np.ndarray:
        """[3 n]: log p of the answer, of the counterfactual's answer, rank of the answer."""
        logits = unembed(run.cache[site][:, end]).cpu()
        at = logits.gather(1, tokens)
        rank = (logits > at[:, :1]).sum(1, keepdim=True)
        return torch.cat([at - logits.logsumexp(1, keepdim=True), rank], 1).double().numpy().T

    sites = ["resid_pre.0", *(f"resid_post.{layer}" for layer in range(model.n_layers))]
    own, other, rank = np.stack([spoken(site) for site in sites], 1)
    before = {layer: spoken(f"resid_mid.{layer}") for layer in run.cache.layers("resid_mid")}
    return Spoken(
        own,
        other,
        rank,
        {layer: values[0] for layer, values in before.items()},
        {layer: values[2] for layer, values in before.items()},
    )


def lens_table(asked: Asked, spoken: Spoken) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Table "lens", and how far the answer's probability falls from its peak to the end."""
    p, other = np.exp(spoken.after), np.exp(spoken.other)
    rows = []
    for place, values in enumerate(p):
        row: dict[str, Any] = {"layer": place - 1} | asked.named("probability", values)
        row["probability_other"] = float(other[place].mean())
        row |= asked.named("log_p", spoken.after[place])
        rows.append(row | {"rank": float(np.median(spoken.rank_after[place]))})
    means = np.concatenate([p.mean(1)[None], asked.draws @ p.T])
    # The peak is looked for again in every resample, so that the fall is not the fall from a lucky layer.
    falls = means.max(1) - means[:, -1]
    low, high = np.quantile(falls[1:], INTERVAL)
    peak = int(means[0].argmax())
    found = {"peak_layer": peak - 1, "peak": float(means[0, peak]), "final": float(means[0, -1])}
    falls = {"fall": float(falls[0]), "fall_low": float(low), "fall_high": float(high)}
    return pd.DataFrame(rows), found | falls


# --- MLPs ----------------------------------------------------------------------------------------


def mlp_tables(
    model: Model,
    run: Run,
    asked: Asked,
    own: Contributions,
    shuffled: Contributions,
    spoken: Spoken,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Table "mlps", and each MLP's weight on every head of its layer."""
    end, n = asked.prompts.end, len(asked.answers)
    above = _AboveMean(model, run, end)
    common = above.direction(asked.answers[None].expand(n, -1))
    rows, weights = [], []
    for layer, block in enumerate(model.spec.blocks):
        if block.mlp_write is None:
            continue
        write = wide(run.cache[f"mlp_write.{layer}"][:, end])
        row: dict[str, Any] = {"layer": layer}
        row |= asked.named("contribution", own.mlps[:, layer])
        row["contribution_shuffled"] = float(shuffled.mlps[:, layer].mean())
        if layer in spoken.before:
            row |= asked.named("log_p_change", spoken.after[layer + 1] - spoken.before[layer])
            change = spoken.rank_after[layer + 1] - spoken.rank_before[layer]
            row["rank_change"] = float(np.median(change))
        row |= asked.named("common", (write * common).sum(-1).cpu())
        if block.attn_write is not None:
            writes = head_writes(model, run, layer, end)
            before = wide(run.cache[f"resid_pre.{layer}"][:, end])
            parts = torch.cat([writes, before[:, None]], 1).cpu().double().numpy()
            target = write.cpu().double().numpy()
            even = np.full((1, n), 1 / n)
            spread = np.quantile(mixture_weights(parts, target, asked.draws), INTERVAL, axis=0)
            fit = np.concatenate([mixture_weights(parts, target, even), spread])
            row["explained"] = _explained(parts, target)
            row["explained_shuffled"] = _explained(parts[asked.shuffled.numpy()], target)
            names = ("mlp_weight", "mlp_weight_low", "mlp_weight_high")
            for head, values in enumerate(fit[:, :-1].T):
                weights.append(
                    {"layer": layer, "head": head} | dict(zip(names, values, strict=True))
                )
        rows.append(row)
    columns = {"layer": int, "head": int}
    columns |= dict.fromkeys(("mlp_weight", "mlp_weight_low", "mlp_weight_high"), float)
    table = pd.DataFrame(rows, columns=MLP_COLUMNS)
    return table, pd.DataFrame(weights, columns=list(columns)).astype(columns)


def mixture_weights(
    parts: Float[np.ndarray, "n parts d_model"],
    target: Float[np.ndarray, "n d_model"],
    weights: Float[np.ndarray, "resamples n"],
) -> Float[np.ndarray, "resamples parts"]:
    """One weight a part in target ≈ Σ_f w_f part_f + intercept, least squares, for each weighting of facts.

    The intercept is a vector shared by all facts, so the fit is of what differs between facts. Only
    inner products are needed, so a resample costs no pass over d_model.

    >>> parts = np.random.default_rng(0).normal(size=(12, 2, 8))
    >>> target = 0.5 * parts[:, 0] - parts[:, 1] + np.arange(8)
    >>> mixture_weights(parts, target, np.full((1, 12), 1 / 12)).round(6).tolist()
    [[0.5, -1.0]]
    """
    n, k, _ = parts.shape
    flat = parts.reshape(n * k, -1)
    inner = (flat @ flat.T).reshape(n, k, n, k).transpose(0, 2, 1, 3).reshape(n * n, k * k)
    with_target = (flat @ target.T).reshape(n, k, n).transpose(0, 2, 1).reshape(n * n, k)
    # Σ_i w_i a_i b_i − (Σ_i w_i a_i)(Σ_j w_j b_j): the covariance, as weights of all pairs of facts.
    pairs = weights[:, :, None] * (np.eye(n) - weights[:, None, :])
    pairs = pairs.reshape(len(weights), n * n)
    left = (pairs @ inner).reshape(-1, k, k)
    right = pairs @ with_target
    return (np.linalg.pinv(left, rcond=1e-9, hermitian=True) @ right[..., None])[..., 0]


def _explained(
    parts: Float[np.ndarray, "n parts d_model"], target: Float[np.ndarray, "n d_model"]
) -> float:
    """Share of the target's variance over facts that the mixture explains on facts it was not fitted on."""
    fold = np.arange(len(parts)) % 4
    left, whole = 0.0, 0.0
    for k in range(4):
        out = fold == k
        centre, middle = parts[~out].mean(0), target[~out].mean(0)
        even = np.full((1, (~out).sum()), 1 / (~out).sum())
        weights = mixture_weights(parts[~out], target[~out], even)[0]
        made = middle + np.einsum("nfm,f->nm", parts[out] - centre, weights)
        left += float(((target[out] - made) ** 2).sum())
        whole += float(((target[out] - middle) ** 2).sum())
    return 1 - left / whole if whole else 0.0


def head_writes(model: Model, run: Run, layer: int, end: int) -> Float[Tensor, "n heads d_model"]:
    """What each head of a layer writes at the end, without biases."""
    block = model.spec.blocks[layer]
    assert block.attn_write is not None
    z = wide(run.cache[f"z.{layer}"][:, end])
    writes = torch.einsum("bhd,hdm->bhm", z, wide(model.W_O(layer)))
    if not block.direct:
        norm = model.norm(block.attn_write.module)
        scale = norm.scale(run.cache[f"attn_out.{layer}"][:, end])
        writes = wide(norm.gain) * norm.centre(writes) / scale[:, None]
    return writes * block.attn_write.scale


# --- the last layers -----------------------------------------------------------------------------


class _AboveMean:
    """Logits above the vocabulary's mean that a write at the end adds, final norm's scale frozen."""

    def __init__(self, model: Model, run: Run, end: int):
        self.model = model
        self.W_U = model.W_U
        self.final = run.cache[f"resid_post.{model.n_layers - 1}"][:, end]
        self.mean = self.W_U.mean(1, dtype=torch.float32)

    def direction(self, tokens: Int[Tensor, "n k"]) -> Float[Tensor, "n d_model"]:
        """The residual direction of the mean logit of k tokens, less the vocabulary's mean logit."""
        vectors = wide(self.W_U.T[tokens.to(self.W_U.device)]).mean(1) - self.mean
        return self.model.final_norm.pull_back(vectors, at=self.final) * self.model.spec.logit_scale

    def logits(self, writes: Float[Tensor, "n d_model"]) -> Float[Tensor, " d_vocab"]:
        """What the writes add to every logit, mean over facts, up to a constant."""
        norm = self.model.final_norm
        normed = wide(norm.gain.to(writes.device)) * norm.centre(writes) / norm.scale(self.final)
        mean = normed.mean(0).to(self.W_U)
        return wide(mean @ self.W_U) * self.model.spec.logit_scale


def final_table(model: Model, run: Run, asked: Asked, layers: range, seed: int) -> pd.DataFrame:
    """Table "final": every head and MLP of the last layers, and several of them ablated together."""
    end = asked.prompts.end
    above = _AboveMean(model, run, end)
    n = len(asked.answers)
    answer = above.direction(asked.answers[:, None])
    another = above.direction(asked.answers[asked.shuffled][:, None])
    frequent = above.direction(_frequent_tokens(model)[None].expand(n, -1))
    rows: list[dict[str, Any]] = []
    alike: dict[str, list[float]] = {"head": [], "mlp": []}
    for layer in range(model.n_layers):
        for kind, head, write in _writes(model, run, layer, end):
            similarity = _similarity(write, asked.draws)
            if layer not in layers:
                alike[kind].append(similarity[0])
                continue
            row: dict[str, Any] = {"component": kind, "layer": layer, "head": head, "label": ""}
            row |= asked.named("contribution", (write * answer).sum(-1).cpu())
            row["contribution_shuffled"] = float((write * another).sum(-1).mean())
            row |= asked.named("frequent", (write * frequent).sum(-1).cpu())
            names = ("similarity", "similarity_low", "similarity_high")
            row |= dict(zip(names, similarity, strict=True))
            logits = above.logits(write)
            row["raises"], row["lowers"] = (
                " ".join(repr(token) for token in model.tokens(values.topk(3).indices.tolist()))
                for values in (logits, -logits)
            )
            rows.append(row)
    ablated = _ablated(model, run, asked, [[row] for row in rows])
    p = corrected_p(np.stack([zero for zero, _ in ablated], 1), sides=1)
    for row, (zero, mean), value in zip(rows, ablated, p, strict=True):
        row["similarity_control"] = float(np.mean(alike[row["component"]] or [np.nan]))
        row |= asked.named("zero_effect", zero) | {"zero_p": float(value)}
        row |= asked.named("mean_effect", mean)
        if row["zero_effect"] >= SUPPRESSION and value <= ALPHA:
            row["label"] = "suppressor"
    suppressors = [row for row in rows if row["label"]]
    rest = [row for row in rows if not row["label"]]
    rest = [rest[i] for i in np.random.default_rng(seed).permutation(len(rest))]
    # As many heads and as many MLPs as among the suppressors, as far as there are so many.
    control: list[dict[str, Any]] = []
    for kind, count in Counter(row["component"] for row in suppressors).items():
        control += [row for row in rest if row["component"] == kind][:count]
    groups = {"suppressors": suppressors, "control": control}
    groups = {name: members for name, members in groups.items() if members}
    words = ("label", "raises", "lowers")
    together = _ablated(model, run, asked, list(groups.values()))
    for name, (zero, mean) in zip(groups, together, strict=True):
        row = {"component": name, "layer": -1, "head": -1} | dict.fromkeys(words, "")
        rows.append(row | asked.named("zero_effect", zero) | asked.named("mean_effect", mean))
    return pd.DataFrame(rows)


def _writes(model: Model, run: Run, layer: int, end: int) -> Iterator[tuple[str, int, Tensor]]:
    """(kind, head, write [n d_model]) of a layer's heads and MLP at the end; head −1 for the MLP."""
    block = model.spec.blocks[layer]
    if block.attn_write is not None:
        for head, write in enumerate(head_writes(model, run, layer, end).unbind(1)):
            yield "head", head, write
    if block.mlp_write is not None:
        yield "mlp", -1, wide(run.cache[f"mlp_write.{layer}"][:, end])


def _similarity(write: Float[Tensor, "n d_model"], draws: np.ndarray) -> tuple[float, float, float]:
    """Mean cosine of the writes on two different facts, with its interval."""
    unit = torch.nn.functional.normalize(write, dim=-1)
    cosines = (unit @ unit.T).cpu().double().numpy()
    np.fill_diagonal(cosines, 0)
    n = len(cosines)
    weights = np.concatenate([np.full((1, n), 1 / n), draws])
    same = (weights**2).sum(1)
    means = ((weights @ cosines) * weights).sum(1) / (1 - same)
    low, high = np.quantile(means[1:], INTERVAL)
    return float(means[0]), float(low), float(high)


def _frequent_tokens(model: Model) -> Int[Tensor, " k"]:
    ids = model.tokenizer(prose(), add_special_tokens=False)["input_ids"]
    return torch.tensor([token for token, _ in Counter(ids).most_common(FREQUENT)])


def _ablated(
    model: Model, run: Run, asked: Asked, groups: Sequence[Sequence[dict[str, Any]]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Gain in log p(answer), nats, when components write zero or their mean over facts at the end."""
    end = asked.prompts.end
    variants = [
        [edit for row in group for edit in _ablation(run, row, end, mean)]
        for group in groups
        for mean in (False, True)
    ]
    clean = log_p(run, asked)
    found = model.replay(
        run,
        variants,
        lambda variant: (log_p(variant, asked) - clean).numpy(),
        logits=torch.tensor([end]),
    )
    return list(zip(found[::2], found[1::2], strict=True))


def _ablation(run: Run, row: dict[str, Any], end: int, mean: bool) -> list[Edit]:
    layer, site = row["layer"], "z" if row["component"] == "head" else "mlp_write"
    heads = [(layer, row["head"])] if site == "z" else None
    place = site if heads else f"{site}.{layer}"
    if not mean:
        return [Edit.zero(place, heads=heads, positions=[end])]
    value = {layer: run.cache[f"{site}.{layer}"][:, end].mean(0)}
    return [Edit.patch(place, value, heads=heads, positions=[end])]
