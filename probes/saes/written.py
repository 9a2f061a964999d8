"""What a feature of attention outputs writes: to the residual stream, and directly to every token's logit."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.models.model import Model
from probes.saes.attention import Place, attention_of, feature_ids, write_sites
from probes.saes.model import SAE

FEATURES_AT_ONCE = 256
"""Features whose logits over the whole vocabulary exist at once."""


@torch.no_grad()
def feature_writes(
    model: Model, sae: SAE, features: Sequence[int] | Tensor
) -> Float[Tensor, "feature d_model"]:
    """What one unit of each feature adds to the residual stream: W_dec[i] W_O, times the write's scale.

    Where a norm stands between attention and the stream, its gain is applied and its scale is 1.
    """
    return _writes(model, sae, feature_ids(sae, features), attention_of(sae, model))


def _writes(
    model: Model, sae: SAE, chosen: Int[Tensor, " feature"], place: Place
) -> Float[Tensor, "feature d_model"]:
    layer, heads = place
    write_sites(model, layer)
    block = model.spec.blocks[layer]
    assert block.attn_write is not None
    W_O = model.W_O(layer)[list(heads)].float().flatten(0, 1)
    out = sae.W_dec[chosen.to(sae.W_dec.device)].float().to(W_O.device) @ W_O
    if not block.direct:
        norm = model.norm(block.attn_write.module)
        out = norm.centre(out) * norm.gain.float()
    return out * block.attn_write.scale


@torch.no_grad()
def feature_logits(
    model: Model, sae: SAE, features: Sequence[int] | Tensor
) -> Float[Tensor, "feature d_vocab"]:
    """What each feature writes directly to every token's logit: in logits · σ, a unit of the feature.

        effect[i, token] = (W_dec[i] W_O ∘ gain) · W_U[:, token]

    gain is the final norm's (its centring too, where it centres). On a prompt the effect is this,
    times the feature's activation, over the norm's scale σ there: the order of tokens holds on every
    prompt, the size does not. The scale of a norm behind attention, where there is one, is left out in
    the same way. Later heads and MLPs that read the feature are not in it.

    Raises:
        BadInput: an SAE of another site than z. Refused: no unembedding that was verified.

    Source: Kissane et al. 2024; nostalgebraist 2020 for reading directions by the unembedding.

    >>> from probes.saes.model import SAEConfig
    >>> sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="z.1", heads=4))
    >>> feature_logits(tiny_model(), sae, [3, 9]).shape
    torch.Size([2, 97])
    """
    return write_logits(model, feature_writes(model, sae, features))


def normed(
    model: Model, writes: Float[Tensor, "feature d_model"]
) -> Float[Tensor, "feature d_model"]:
    """Writes as the unembedding reads them: through the final norm, its scale and bias left out."""
    norm = model.final_norm
    return norm.centre(writes.float()) * norm.gain.float().to(writes.device)


def write_logits(
    model: Model, writes: Float[Tensor, "feature d_model"]
) -> Float[Tensor, "feature d_vocab"]:
    """Logits · σ of what is written to the stream."""
    W_U = model.W_U
    return normed(model, writes).to(W_U.device) @ W_U.float() * model.spec.logit_scale


@torch.no_grad()
def top_tokens(
    model: Model, sae: SAE, features: Sequence[int] | Tensor, k: int = 10
) -> pd.DataFrame:
    """The tokens each feature writes most for and most against, by `feature_logits`.

    Returns: columns feature, side ("up" or "down"), rank (from 0), token_id, token, logit (logits · σ
        a unit of the feature).

    >>> from probes.saes.model import SAEConfig
    >>> sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="z.1", heads=4))
    >>> top_tokens(tiny_model(), sae, [3], k=2)["side"].tolist()
    ['up', 'up', 'down', 'down']
    """
    chosen, tables, place = feature_ids(sae, features), [], attention_of(sae, model)
    for some in chosen.split(FEATURES_AT_ONCE):
        logits = write_logits(model, _writes(model, sae, some, place)).cpu()
        for sign, side in ((1, "up"), (-1, "down")):
            best = (sign * logits).topk(min(k, logits.shape[1]), dim=1)
            n = best.values.shape[1]
            table = {
                "feature": some.repeat_interleave(n).numpy(),
                "side": side,
                "rank": torch.arange(n).repeat(len(some)).numpy(),
                "token_id": best.indices.flatten().numpy(),
                "logit": (sign * best.values).flatten().numpy(),
            }
            tables.append(pd.DataFrame(table))
    table = pd.concat(tables).sort_values("feature", kind="stable", ignore_index=True)
    names = dict(zip(ids := table["token_id"].unique().tolist(), model.tokens(ids), strict=True))
    table.insert(4, "token", [names[i] for i in table["token_id"].tolist()])
    return table
