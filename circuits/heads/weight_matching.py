"""Heads of two models paired by their weights: layer by layer in one shape, by what no basis changes in two.

Circuits of one layer are written in the same residual stream, so their cosines can be taken as they are. The null
is the same circuits in a stream whose axes are shuffled and turned: spectra and outlying axes stay, what
they have in common with the other model's goes.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from scipy.stats import false_discovery_control
from torch import Tensor

from circuits.heads.head_weights import HeadWeights
from circuits.heads.low_rank import Circuit, invariants, norms, products
from circuits.heads.matching import ALPHA, match_heads, standardised

LEAST_COSINE = 0.5
"""Heads whose circuits share less than this are not matched by weights, however unlikely by chance."""
NULL_COSINES = 1000
"""How many cosines of unrelated heads p-values are read from, at least."""


def match_in_layers(
    a: HeadWeights, b: HeadWeights, *, alpha: float = ALPHA, seed: int = 0
) -> pd.DataFrame:
    """Each head's partner in the same layer: the assignment with the largest sum of mean cosines.

    p: how often the most alike head of a layer written on shuffled, turned axes of the stream is as alike, from
    all such cosines together: 1 − F(likeness)^(heads of the layer).
    """
    layers = [kind[layer] for _, kind in a.kinds for layer in kind]
    total = sum(circuit.shape[0] ** 2 for circuit in layers)
    d_model = layers[0].shape[1]
    draws = -(-NULL_COSINES // max(total, 1))
    generator = torch.Generator().manual_seed(seed)
    rows, null = [], []
    for layer in sorted(a.qk.keys() & b.qk.keys() | a.ov.keys() & b.ov.keys()):
        kinds = [
            (mine[layer], theirs[layer], norms(mine[layer])[:, None] * norms(theirs[layer]))
            for (_, mine), (_, theirs) in zip(a.kinds, b.kinds, strict=True)
            if layer in mine and layer in theirs
        ]
        alike = _likeness(kinds)
        for _ in range(draws):
            order = torch.randperm(d_model, generator=generator)
            sign = torch.randint(0, 2, (d_model,), generator=generator) * 2.0 - 1
            # a turned circuit's norm stays as it is
            null.append(
                _likeness((x, y.on_axes(order, sign), size) for x, y, size in kinds).ravel()
            )
        place = np.abs(np.arange(len(alike))[:, None] - np.arange(len(alike)))
        for x, y in zip(*linear_sum_assignment(1e-9 * place - alike), strict=True):
            rows.append((layer, x, layer, y, alike[x, y], len(alike)))
    found = pd.DataFrame(
        rows, columns=["layer_a", "head_a", "layer_b", "head_b", "likeness", "heads"]
    )
    by_chance = np.sort(np.concatenate(null))
    above = len(by_chance) - np.searchsorted(by_chance, found["likeness"], side="left")
    tail = (1 + above) / (1 + len(by_chance))
    p = 1 - (1 - tail).clip(0) ** found["heads"].to_numpy()
    found["chance"] = [np.quantile(by_chance, 0.5 ** (1 / n)) for n in found["heads"]]
    found["p"] = false_discovery_control(p) if len(found) else p
    found["matched"] = (found["p"] <= alpha) & (found["likeness"] >= LEAST_COSINE)
    return found.drop(columns="heads")


def _likeness(
    kinds: Iterable[tuple[Circuit, Circuit, Float[Tensor, "heads_a heads_b"]]],
) -> Float[np.ndarray, "heads_a heads_b"]:
    """Mean over kinds of circuits of ⟨W_a, W_b⟩ / ‖W_a‖ ‖W_b‖, the norms' products given; 0 without weights."""
    found = [
        torch.where(size > 0, products(a, b) / size.clamp_min(1e-30), 0.0) for a, b, size in kinds
    ]
    return torch.stack(found).mean(0).double().numpy()


def features_by_head(weights: HeadWeights) -> pd.DataFrame:
    """One row a head: layer, head, and the invariants of its circuits (`circuits.heads.low_rank`).

    NaN where a layer has no circuit of a kind, or a head no weights.
    """
    layers = sorted(weights.qk.keys() | weights.ov.keys())
    parts = []
    for layer in layers:
        kinds = {kind: of[layer] for kind, of in weights.kinds if layer in of}
        n_heads = next(iter(kinds.values())).shape[0]
        part: dict[str, object] = {"layer": layer, "head": range(n_heads)}
        for kind, circuit in kinds.items():
            part |= {f"{kind}_{name}": x.numpy() for name, x in invariants(circuit).items()}
        parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)


def match_by_features(
    a: HeadWeights, b: HeadWeights, *, alpha: float = ALPHA, seed: int = 0
) -> pd.DataFrame:
    """Each head's partner in a model of any other shape, by what no basis changes (`match_heads`).

    Eight numbers of a head are few: heads that do different things can share them.
    """
    features = [features_by_head(weights) for weights in (a, b)]
    names = [name for name in features[0] if name in features[1] and name not in ("layer", "head")]
    x, y, _ = standardised(*(table[names].to_numpy(float) for table in features))
    found = match_heads(x, y, alpha=alpha, seed=seed)
    out = {
        f"{name}_{side}": table[name].to_numpy()[found[side].to_numpy()]
        for side, table in zip("ab", features, strict=True)
        for name in ("layer", "head")
    }
    out |= {name: found[name] for name in ("distance", "chance", "effect", "p", "matched")}
    return pd.DataFrame(out)
