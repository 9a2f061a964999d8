"""How long a repeated prefix a head or a feature needs before it looks for what followed: short or long.

Source: Kissane et al. 2024, "Interpreting attention layer outputs with sparse autoencoders", on the two
induction heads of a layer that seemed redundant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.data.prompts import repeated_tokens
from interp.errors import BadInput
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.edits import Edit, Seen
from probes.saes.attention import attention_of, feature_ids, rows_of_heads
from probes.saes.model import SAE

GAP = 8
"""Distinct tokens between the token that followed the prefix and the second copy."""

INTACT, CORRUPTED = "intact", "corrupted"


@dataclass(frozen=True)
class PrefixPrompts:
    """Random tokens whose last `prefix` tokens stood earlier, before the token at `followed`.

    Attributes:
        ids: [n pos]. followed: the position of the token that followed the prefix.
    """

    ids: Int[Tensor, "n pos"]
    followed: int


def prefix_prompts(
    model: Model, n: int, *, prefix: int, longest: int, corrupted: bool = False, seed: int = 0
) -> PrefixPrompts:
    """[lead, p_1 … p_N, x, gap, q_1 … q_N] with q the last `prefix` tokens of p, before them fresh ones.

    All other tokens are distinct. Lengths, positions and the end of the first copy are the same for
    every `prefix`. `corrupted`: of the earlier copy, only the last token is left of what is repeated;
    the rest is replaced by fresh tokens, so that the query's own context stays as it was.

    >>> prompts = prefix_prompts(tiny_model(), 2, prefix=2, longest=4)
    >>> ids, x = prompts.ids[0], prompts.followed
    >>> torch.equal(ids[-2:], ids[x - 2 : x]), bool(torch.isin(ids[-4:-2], ids[:x]).any())
    (True, False)
    """
    if not 0 <= prefix <= longest or longest < 1:
        raise BadInput(f"prefix={prefix}: wanted 0 to longest={longest}, which is at least 1")
    needed = 3 * longest + 1 + GAP
    _, source = repeated_tokens(model, n, length=-(-needed // 2), seed=seed)
    lead, drawn = source.ids[:, : source.lead], source.ids[:, source.lead :]
    if drawn.shape[1] < needed:
        raise BadInput(
            f"longest={longest} needs {needed} distinct tokens, {model.id} has room for {drawn.shape[1]}: "
            f"take a smaller one"
        )
    first, x, gap, second, fresh = drawn[:, :needed].split(
        [longest, 1, GAP, longest, longest], dim=1
    )
    second = torch.cat([second[:, prefix:], first[:, longest - prefix :]], dim=1)
    if corrupted and prefix > 1:
        kept = torch.arange(longest)
        kept = (kept < longest - prefix) | (kept == longest - 1)
        first = torch.where(kept, first, fresh)
    ids = torch.cat([lead, first, x, gap, second], dim=1)
    return PrefixPrompts(ids, source.lead + longest)


@torch.no_grad()
def prefix_induction(
    model: Model,
    heads: Sequence[tuple[int, int]] | None = None,
    *,
    sae: SAE | None = None,
    features: Sequence[int] | Tensor | None = None,
    longest: int = 8,
    n: int = 32,
    seed: int = 0,
) -> pd.DataFrame:
    """Attention to what followed a repeated prefix (or a feature's activation), by the prefix's length.

    On random tokens whose last p tokens stood earlier (see `prefix_prompts`), p from 0 (nothing repeats)
    to `longest`: of a head, its attention from the last position to the token that followed the prefix;
    of a feature, its activation at the last position. "corrupted": the earlier copy's tokens but the
    last replaced, so that only one token still matches whatever p is.

    A head of short-prefix induction scores at p = 1 and keeps its score when the prefix is corrupted;
    one of long-prefix induction needs p > 1 and loses it. It does not show what the heads do on text,
    where prefixes have meaning; and attention is no effect.

    Args:
        heads: (layer, head) pairs; by default all heads, or none where `sae` is given.
        sae, features: features of an SAE of z, scored beside or instead of heads.
        longest: longest prefix. n: prompts for each length. seed: of the random tokens.

    Returns: one row for each (head or feature, condition, prefix): layer, head, feature (missing where
        it is the other kind), condition ("intact", "corrupted"; the latter from prefix 2 on), prefix,
        score (attention, 0 to 1; or activation), sem (its standard error over prompts).

    Raises:
        BadInput: no such head or feature, features without an SAE, a prefix too long for the model.

    Source: Kissane et al. 2024, long- and short-prefix induction.

    >>> table = prefix_induction(tiny_model(), [(1, 0)], longest=3, n=4)
    >>> table[["condition", "prefix"]].values.tolist()[-2:]
    [['corrupted', 2], ['corrupted', 3]]
    """
    if (sae is None) != (features is None):
        raise BadInput("give sae= and features= together")
    if heads is None:
        heads = model.spec.heads if sae is None else ()
    wanted = [(int(layer), int(head)) for layer, head in heads]
    if beyond := [place for place in wanted if place not in set(model.spec.heads)]:
        raise BadInput(
            f"no head {beyond[0]} in {model.id}: {model.n_layers} layers of {model.spec.n_heads}"
        )
    chosen = torch.zeros(0) if sae is None else feature_ids(sae, features)  # type: ignore[arg-type]
    place = None if sae is None else attention_of(sae, model)
    conditions = [(INTACT, p) for p in range(longest + 1)]
    conditions += [(CORRUPTED, p) for p in range(2, longest + 1)]
    rows = []
    for condition, prefix in conditions:
        prompts = prefix_prompts(
            model, n, prefix=prefix, longest=longest, corrupted=condition == CORRUPTED, seed=seed
        )
        attention = _attention(model, prompts, wanted)
        for (layer, head), score in attention.items():
            rows.append((layer, head, None, condition, prefix, *_mean(score)))
        if sae is not None and place is not None:
            layer, own = place
            cache = model.run(prompts.ids, capture=[f"z.{layer}"], logits=False).cache
            f = sae.encode(rows_of_heads(cache, layer, own)[:, -1])[:, chosen]
            for feature, score in zip(chosen.tolist(), f.unbind(1), strict=True):
                rows.append((layer, None, feature, condition, prefix, *_mean(score)))
    table = pd.DataFrame(
        rows, columns=["layer", "head", "feature", "condition", "prefix", "score", "sem"]
    ).astype({"head": "Int64", "feature": "Int64"})
    order = ["layer", "head", "feature", "condition", "prefix"]
    return table.sort_values(
        order, key=lambda c: c.ne(INTACT) if c.name == "condition" else c, ignore_index=True
    )


def prefix_kinds(table: pd.DataFrame, *, low: float = 0.3, high: float = 0.7) -> pd.DataFrame:
    """Heads of `prefix_induction` by what they need: "short", "long" or "neither".

    long: below `low` at one repeated token and above `high` at the longest prefix; short: above `high`
    at one token already. Returns: layer, head, one (score at prefix 1), longest (at the longest), corrupted
    (at the longest, corrupted), kind.

    Source: the two thresholds are Kissane et al.'s description of a long-prefix head.

    >>> table = prefix_induction(tiny_model(), [(1, 0)], longest=3, n=4)
    >>> prefix_kinds(table)["kind"].tolist()
    ['neither']
    """
    found: dict[tuple[int, int], dict[tuple[str, int], float]] = {}
    of_heads = table.loc[table["head"].notna()].sort_values(["layer", "head"])
    for row in of_heads.to_dict("records"):
        own = found.setdefault((row["layer"], row["head"]), {})
        own[row["condition"], row["prefix"]] = row["score"]
    rows = []
    for (layer, head), scores in found.items():
        last = max(prefix for _, prefix in scores)
        one, longest = scores[INTACT, 1], scores[INTACT, last]
        kind = "short" if one > high else "long" if one < low and longest > high else "neither"
        corrupted = scores.get((CORRUPTED, last), float("nan"))
        rows.append((layer, head, one, longest, corrupted, kind))
    return pd.DataFrame(rows, columns=["layer", "head", "one", "longest", "corrupted", "kind"])


def _attention(
    model: Model, prompts: PrefixPrompts, heads: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Float[Tensor, " n"]]:
    """Each head's attention from the last position to the token that followed the prefix."""
    found: dict[int, Tensor] = {}
    last = prompts.ids.shape[1] - 1

    def keep(x: Tensor, seen: Seen) -> Tensor:
        if seen.start <= last < seen.start + x.shape[2]:
            found[seen.layer] = x[:, :, last - seen.start, prompts.followed].float().cpu()
        return x

    layers = {layer for layer, _ in heads}
    edits = [Edit.apply(f"pattern.{layer}", keep) for layer in layers]
    if edits:
        model.run(Batch.of_ids(prompts.ids), edits=edits, logits=False)
    return {(layer, head): found[layer][:, head] for layer, head in heads}


def _mean(score: Float[Tensor, " n"]) -> tuple[float, float]:
    """Mean, and its standard error (NaN of one prompt)."""
    deviation = float(score.std()) if len(score) > 1 else float("nan")
    return float(score.mean()), deviation / len(score) ** 0.5
