"""What a head is worth to the loss, to first order and exactly.

One backward gives an estimate for every head; it is for triage only. Critical heads can have small
gradients (a previous-token head whose ablation costs several nats may be estimated at a tenth of a nat),
so the exact ablation stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from circuits.heads.ablation import ablation_effects
from circuits.heads.claims import INTERVAL, resampling
from circuits.heads.detector import Detector, PerPrompt, head_table
from circuits.heads.prompt_sets import REPEATED
from circuits.heads.shapley import layer_relative
from interp.data.prompts import repeated_tokens
from interp.models.model import Model

ROWS = 4
"""Prompts that every head is ablated on."""


def _by_layer(values: Mapping[int, Tensor]) -> Tensor:
    """[n layer heads …]; NaN in layers and heads that are not there."""
    n_layers, first = max(values) + 1, next(iter(values.values()))
    n_heads = max(value.shape[1] for value in values.values())
    out = first.new_full((len(first), n_layers, n_heads, *first.shape[2:]), torch.nan)
    for layer, value in values.items():
        out[:, layer, : value.shape[1]] = value
    return out


def _dot(z: Mapping[int, Tensor], grad: Mapping[int, Tensor]) -> Tensor:
    """Σ_t z_t · dL/dz_t of every prompt and head."""
    return _by_layer({layer: (z[layer] * grad[layer]).sum((1, 3)).float() for layer in z})


def _relative(values: np.ndarray) -> np.ndarray:
    """Each head's value over the root of its layer's sum of squares (`layer_relative`) [n_layers n_heads]."""
    layers = np.arange(len(values)).repeat(values.shape[1])
    relative = layer_relative(np.nan_to_num(values).ravel(), layers).reshape(values.shape)
    return np.where(np.isnan(values), np.nan, relative)


def _gradient_table(seen: Mapping[str, np.ndarray]) -> dict[str, pd.DataFrame]:
    importance = seen["score"].mean(0)
    table = head_table(importance=importance, layer_relative=_relative(importance))
    return {"gradient_importance": table}


def _gradient(z: Mapping[int, Tensor], grad: Mapping[int, Tensor]) -> dict[str, Tensor]:
    return {"score": _dot(z, grad).abs()}


def _first_order(z: Mapping[int, Tensor], grad: Mapping[int, Tensor]) -> dict[str, Tensor]:
    return {
        "dot": _dot(z, grad),
        "gradient": _by_layer({layer: value.sum(1).float() for layer, value in grad.items()}),
        "mean_z": _by_layer({layer: value.mean(1).float() for layer, value in z.items()}),
    }


def _replaced_by_the_mean(seen, control) -> tuple[PerPrompt, PerPrompt]:
    def change(side) -> PerPrompt:
        return (side["gradient"] * side["mean_z"].mean(0)).sum(-1) - side["dot"]

    return change(seen), change(control)


GRADIENT = Detector(
    name="gradient_importance",
    title="Gradient importance",
    letter="G",
    description="|Σ_t z_t · dL/dz_t|, L the loss (nats a token) on the second copy of repeated random "
    "tokens: how fast the loss changes as the head's output is scaled. For triage only: heads that matter "
    "can have small gradients.",
    source="Michel et al. 2019, Are Sixteen Heads Really Better than One, eq. 2; the table "
    "gradient_importance has it normalised by layer too, as there (§4.1)",
    reads=REPEATED,
    null="the same where the second half is fresh tokens (no repeat)",
    threshold=None,
    margin=0.0,
    rank=20,
    unit="nats a token",
    from_gradient=_gradient,
    tables=_gradient_table,
    serves="repeated",
    needs_logits=True,
    causal_only=True,
    slow=True,
)

FIRST_ORDER = Detector(
    name="first_order_ablation",
    title="Ablation, first order",
    letter="H",
    description="Σ_t (mean z − z_t) · dL/dz_t: the first-order estimate of what mean-ablating the head "
    "does to the loss (nats a token) on the second copy of repeated random tokens. For triage only.",
    source="first-order term of mean ablation (Molchanov et al. 2017 for pruning)",
    reads=REPEATED,
    null="the same where the second half is fresh tokens (no repeat)",
    threshold=None,
    margin=0.0,
    rank=21,
    unit="nats a token",
    from_gradient=_first_order,
    combine=_replaced_by_the_mean,
    serves="repeated",
    needs_logits=True,
    causal_only=True,
    slow=True,
)


def _ablate_every_head(model: Model, n: int, seed: int) -> dict[str, np.ndarray]:
    """Effects of every kind of ablation [n n_layers n_heads]; "score" and "null" are of mean ablation."""
    prompts, control = repeated_tokens(model, min(n, ROWS), seed=seed)
    heads = model.spec.heads
    found = {}
    for key, rows, kind in (
        ("score", prompts, "mean"),
        ("zero", prompts, "zero"),
        ("resample", prompts, "resample"),
        ("null", control, "mean"),
    ):
        effects = ablation_effects(model, rows, heads, kind=kind)
        found[key] = np.full((len(rows), model.n_layers, model.spec.n_heads), np.nan)
        for effect, (layer, head) in zip(effects, heads, strict=True):
            found[key][:, layer, head] = effect
    return found


def _ablation_table(seen: Mapping[str, np.ndarray]) -> dict[str, pd.DataFrame]:
    """Each kind's mean effect with its interval, and the mean ablation's over its layer's."""
    draws = resampling(len(seen["score"]), 0)
    columns = {}
    for name, key in (("mean", "score"), ("zero", "zero"), ("resample", "resample")):
        low, high = np.quantile(np.tensordot(draws, seen[key], 1), INTERVAL, axis=0)
        columns |= {name: seen[key].mean(0), f"{name}_low": low, f"{name}_high": high}
    return {"exact_ablation": head_table(**columns, layer_relative=_relative(columns["mean"]))}


EXACT = Detector(
    name="exact_ablation",
    title="Ablation, exact",
    letter="X",
    description="Change in loss (nats a token) on the second copy of repeated random tokens when this "
    "head alone is replaced by its mean: exact, every head, four prompts. The table exact_ablation has zero "
    "and another prompt's output in its place too. It does not show what several heads do together: one can "
    "make up for another.",
    source="mean ablation as in Wang et al. 2022, §2; exact by replay",
    reads=None,
    observe=_ablate_every_head,
    tables=_ablation_table,
    null="the same where the second half is fresh tokens (no repeat)",
    threshold=None,
    margin=0.0,
    rank=22,
    unit="nats a token",
    serves="repeated",
    needs_logits=True,
    causal_only=True,
    slow=True,
)
