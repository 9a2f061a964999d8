"""What kind of reading a feature is: induction, local or long-range; and whether a head's features are of one kind.

Both are measured from direct feature attribution and from weights; no one has looked at the features.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import BadInput
from interp.models.model import Model
from probes.saes.attention import Prompt, attention_of, feature_ids
from probes.saes.attribute import active_parts, head_weights
from probes.saes.model import SAE
from probes.saes.written import feature_writes, normed

TOKENS_PER_FORWARD = 4096
SHARES = ("induction", "local", "long_range", "lead")
SUMS = (
    *SHARES,
    "possible",
    "weight",
    "n",
    "induction_null",
    "induction_var",
    "local_null",
    "local_var",
)
NOTHING = 1e-12


@torch.no_grad()
def feature_families(
    model: Model,
    sae: SAE,
    prompts: Prompt,
    features: Sequence[int] | Tensor | None = None,
    *,
    local: int = 5,
    share: float = 0.5,
    z: float = 3.0,
    lead: int = 1,
) -> pd.DataFrame:
    """Each feature's family, from where its direct feature attribution comes from when it is active.

    At every position t where the feature is active, the sources s share out Σ_s |Σ_h DFA(t, s, h)|:

    - lead: s among the first `lead` tokens (which take attention whatever they are);
    - local: t − s < `local`;
    - induction: further back, and the token before s is the token at t;
    - long_range: everything else.

    Shares are averaged with the activation as weight: a feature is called by where it is strongly
    active. Its family is the one with the largest mean share, if that is at least `share`, and for
    induction and local if it is also `z` standard deviations above its null; else "other" (features fed
    by the lead token are "other" too). The null is what the same attribution gives at shuffled
    positions: masses permuted over all sources but the lead, for induction over those that are not
    local either; its mean and variance are exact, z takes the sum over positions as normal. Long range
    has no null: in a long prompt most positions are far.

    It does not say what a feature means, nor that the family is why it is active: a feature is called
    by where its input comes from. The families depend on the text, above all on how often it repeats.

    Args:
        prompts: text or texts, token ids, or a Batch.
        features: their numbers; none: all that are active on the prompts.
        local, share, z, lead: the thresholds above; tokens, a share of 1, standard deviations, tokens.

    Returns: one row a feature: feature; n (active positions); induction, local, long_range, lead (mean
        shares, together 1); possible (weight of the positions that have a source of induction, of 1);
        induction_null, induction_z, local_null, local_z; family ("inactive" where n = 0).

    Raises:
        BadInput: an SAE of another site than z, no such feature, thresholds out of range.

    Source: families as in Kissane et al. 2024, who judged them by eye; the criterion is ours.

    >>> from probes.saes.model import SAEConfig
    >>> sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="z.1", heads=4))
    >>> ids = torch.arange(20).repeat(2)[None]
    >>> table = feature_families(tiny_model(), sae, ids, [3, 9])
    >>> list(table.columns[:6])
    ['feature', 'n', 'induction', 'local', 'long_range', 'lead']
    """
    if local < 1 or lead < 0 or not 0 < share <= 1:
        raise BadInput(
            f"local={local}, lead={lead}, share={share}: wanted at least 1 token, no fewer than 0, "
            "and a share of at most 1"
        )
    chosen = None if features is None else feature_ids(sae, features)
    place = attention_of(sae, model)
    batch = model.as_batch(prompts)
    sums = torch.zeros(sae.config.d_sae, len(SUMS), dtype=torch.double)
    step = max(1, TOKENS_PER_FORWARD // batch.ids.shape[1])
    for first in range(0, batch.size, step):
        rows = batch.rows(slice(first, first + step))
        found = active_parts(model, sae, rows, chosen, place=place, lead=lead)
        for row, (at, latent, value, by_source) in enumerate(found):
            ids = rows.ids[row].cpu()
            real = torch.ones_like(ids, dtype=torch.bool)
            if rows.mask is not None:
                real = rows.mask[row].cpu()
            kinds = _kinds(ids, real, at.cpu(), local, lead, model.spec.causal)
            own = _sums(by_source.abs().cpu().double(), kinds, value.cpu().double())
            sums.index_add_(0, latent.cpu(), own)
    if chosen is None:
        chosen = sums[:, SUMS.index("n")].nonzero()[:, 0]
    return _table(chosen, sums[chosen], share, z)


def _kinds(
    ids: Int[Tensor, " pos"], real: Bool[Tensor, " pos"], at: Int[Tensor, " n"],
    local: int, lead: int, causal: bool,
) -> dict[str, Bool[Tensor, "n source"]]:  # fmt: skip
    """Which sources of every target are of which kind; a source is of one kind at most."""
    source = torch.arange(len(ids))
    back = at[:, None] - source
    readable = real & ((back >= 0) if causal else torch.ones_like(back, dtype=torch.bool))
    first = int(real.int().argmax())
    is_lead = readable & (source < first + lead)
    near = readable & ~is_lead & (back.abs() < local)
    before = torch.cat([torch.full((1,), -1), ids[:-1]])
    before[first] = -1
    after_copy = (before == ids[at][:, None]) & (source - 1 != at[:, None])
    induction = readable & ~is_lead & ~near & after_copy
    far = readable & ~is_lead & ~near & ~induction
    return {"induction": induction, "local": near, "long_range": far, "lead": is_lead}


def _sums(
    mass: Float[Tensor, "n source"],
    kinds: dict[str, Bool[Tensor, "n source"]],
    weight: Float[Tensor, " n"],
) -> Float[Tensor, "n sums"]:
    """SUMS of every target, weighted: shares, and two of them under shuffled positions."""
    total = mass.sum(1).clamp_min(NOTHING)
    shares = {name: (mass * kind).sum(1) / total for name, kind in kinds.items()}
    away = kinds["induction"] | kinds["long_range"]
    columns = [weight * shares[name] for name in SHARES]
    columns += [weight * kinds["induction"].any(1), weight, torch.ones_like(total)]
    for kind, pool in ((kinds["induction"], away), (kinds["local"], away | kinds["local"])):
        mean, variance = _shuffled(mass / total[:, None], kind, pool)
        columns += [weight * mean, weight.square() * variance]
    return torch.stack(columns, dim=1)


def _shuffled(
    share: Float[Tensor, "n source"], kind: Bool[Tensor, "n source"], pool: Bool[Tensor, "n source"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Mean and variance of the kind's share when shares are permuted within the pool it is part of.

    The kind then has a random sample without replacement of the pool's shares.
    """
    n, k = pool.sum(1).double(), kind.sum(1).double()
    mean = (share * pool).sum(1) / n.clamp_min(1)
    spread = ((share - mean[:, None]).square() * pool).sum(1) / (n - 1).clamp_min(1)
    return k * mean, k * (1 - k / n.clamp_min(1)) * spread


def _table(
    features: Tensor, sums: Float[Tensor, "feature sums"], share: float, z: float
) -> pd.DataFrame:
    column: dict[str, Tensor] = dict(zip(SUMS, sums.T, strict=True))
    n = column["weight"].clamp_min(NOTHING)
    table = pd.DataFrame({"feature": features.numpy(), "n": column["n"].long().numpy()})
    for name in (*SHARES, "possible"):
        table[name] = (column[name] / n).numpy()
    for name in ("induction", "local"):
        above = column[name] - column[f"{name}_null"]
        table[f"{name}_null"] = (column[f"{name}_null"] / n).numpy()
        # Where the shuffle changes nothing (no or every source is of the kind) nothing is shown.
        deviation = column[f"{name}_var"].sqrt()
        shown = deviation > NOTHING
        table[f"{name}_z"] = torch.where(shown, above / deviation.clamp_min(NOTHING), 0.0).numpy()
    shares = table.loc[:, list(SHARES)]
    best = shares.idxmax(axis=1)
    enough = shares.max(axis=1) >= share
    for name in ("induction", "local"):
        enough &= (best != name) | (table[f"{name}_z"] >= z)
    enough &= best != "lead"
    table["family"] = best.where(enough, "other").where(table["n"] > 0, "inactive")
    return table


@torch.no_grad()
def head_polysemanticity(
    model: Model,
    sae: SAE,
    families: pd.DataFrame | None = None,
    *,
    k: int = 10,
    one_family: float = 0.9,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Of each head, whether the k features that it writes most of (by `head_weights`) are of one kind.

    agreement = mean over pairs of the cosine of the logit vectors that the two features write,
    W_dec[i] W_O through the final norm's gain and W_U, means over tokens taken out. Its null are k
    features of the SAE drawn at random, `draws` times. With `families` (of `feature_families`),
    same_family is the share of the most common family among those of the k that were active.

    A head is called a candidate for one kind ("one kind") if its agreement is above 95 % of the null
    and, with `families`, same_family ≥ `one_family`; else "several kinds".

    It does not prove either: features that agree in what they write may fire on unlike contexts, and
    the other way round; a head also takes part in features that it is not among the first writers of;
    and what a feature is depends on the SAE's width and training. The null says less the more alike
    all features of the SAE are.

    Args:
        families: one row a feature; those missing count as not active.
        k: features a head; at least 2. one_family: share of 1. draws, seed: of the null.

    Returns: one row a head: layer, head, features (the k numbers, largest weight first), weight (their
        mean head weight), agreement, null (its mean), p (share of draws at least as large),
        same_family and family (with `families`), kind.

    Raises:
        BadInput: an SAE of one head or of another site than z, k out of range.

    Source: Kissane et al. 2024 looked at the ten features of every GPT-2 head; here it is measured.

    >>> from probes.saes.model import SAEConfig
    >>> sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="z.1", heads=4))
    >>> head_polysemanticity(tiny_model(), sae, k=5)["kind"].tolist()
    ['several kinds', 'several kinds', 'several kinds', 'several kinds']
    """
    layer, heads = attention_of(sae, model)
    if not 2 <= k <= sae.config.d_sae:
        raise BadInput(f"k={k}: wanted 2 to {sae.config.d_sae} features a head")
    weights = head_weights(sae)
    best = weights.topk(k, dim=0)
    unit = _logit_units(model, sae)
    generator = torch.Generator().manual_seed(seed)
    random = torch.stack(
        [torch.randperm(sae.config.d_sae, generator=generator)[:k] for _ in range(draws)]
    )
    null = torch.stack([_agreement(unit[some]) for some in random])
    rows = []
    for i, head in enumerate(heads):
        chosen = best.indices[:, i]
        agreement = float(_agreement(unit[chosen]))
        p = (1 + int((null >= agreement).sum())) / (1 + draws)
        row = {
            "layer": layer,
            "head": head,
            "features": chosen.tolist(),
            "weight": float(best.values[:, i].mean()),
            "agreement": agreement,
            "null": float(null.mean()),
            "p": p,
        }
        alike = p <= 0.05
        if families is not None:
            own = families[families["feature"].isin(chosen.tolist())]
            counts = own.loc[own["family"] != "inactive", "family"].value_counts()
            row["same_family"] = float(counts.iloc[0] / counts.sum()) if len(counts) else 0.0
            row["family"] = counts.index[0] if len(counts) else ""
            alike = alike and row["same_family"] >= one_family
        rows.append(row | {"kind": "one kind" if alike else "several kinds"})
    return pd.DataFrame(rows)


def _logit_units(model: Model, sae: SAE) -> Float[Tensor, "d_sae d_model"]:
    """Rows whose dot products are the cosines of features' logit vectors, in d_model numbers each.

    (w ∘ gain) W_U has the inner product of (w ∘ gain) R with R Rᵀ = W_U W_Uᵀ, columns of W_U centred.
    """
    W_U = model.W_U.float()
    W_U = W_U - W_U.mean(1, keepdim=True)
    eigen = torch.linalg.eigh((W_U @ W_U.T).cpu().double())
    root = (eigen.eigenvectors * eigen.eigenvalues.clamp_min(0).sqrt()).to(W_U)
    writes = feature_writes(model, sae, torch.arange(sae.config.d_sae))
    return torch.nn.functional.normalize(normed(model, writes) @ root).cpu()


def _agreement(unit: Float[Tensor, "k d_model"]) -> Tensor:
    """Mean cosine of all pairs: (‖Σ u‖² − k) / (k (k − 1)), a row of zeros agreeing with nothing."""
    k = len(unit)
    return (unit.sum(0).square().sum() - unit.square().sum()) / (k * (k - 1))
