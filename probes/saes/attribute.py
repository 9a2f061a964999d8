"""What makes a feature of attention outputs, and what it writes: by head, source position and token.

z of a head is its pattern times its values, so a feature's pre-activation is a sum over heads and
source positions, and what it writes through W_O is linear in it. Everything here is exact once the
patterns and the norms' scales are held fixed; nothing here says why the pattern is what it is.

Source: Kissane, Krzyzanowski, Bloom, Conmy, Nanda 2024, "Interpreting attention layer outputs with
sparse autoencoders" (weight-based head attribution, direct feature attribution).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.direction import places_of
from interp.errors import BadInput
from interp.models.model import Model
from interp.run.batch import Batch
from probes.saes.attention import (
    Place,
    Prompt,
    attention_of,
    encoded_values,
    feature_ids,
    pre_activation_bias,
    rows_of_heads,
    values_of_heads,
)
from probes.saes.model import SAE


@torch.no_grad()
def head_weights(sae: SAE) -> Float[Tensor, "d_sae n_heads"]:
    """Each head's share of what a feature writes, by the norms of its decoder's slices; rows sum to 1.

        weight[i, h] = ‖W_dec[i, h]‖ / Σ_j ‖W_dec[i, j]‖,   W_dec[i, h]: the d_head numbers of head h

    It does not say that the head makes the feature active on any prompt: `direct_feature_attribution`
    does. Slices are compared in z's own unit, before W_O.

    Raises:
        BadInput: the SAE does not say how many heads lie side by side in what it reads.

    Source: Kissane et al. 2024, weight-based head attribution.

    >>> from probes.saes.model import SAEConfig
    >>> weights = head_weights(SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="z.1", heads=4)))
    >>> weights.shape, torch.allclose(weights.sum(1), torch.ones(64))
    (torch.Size([64, 4]), True)
    """
    if sae.config.heads < 1:
        raise BadInput(
            "this SAE does not say how many heads lie side by side in its input: make it with "
            "SAEConfig(heads=…), on a site such as 'z.12'"
        )
    norms = sae.W_dec.unflatten(1, (sae.config.heads, -1)).norm(dim=-1)
    return norms / norms.sum(1, keepdim=True).clamp_min(1e-12)


def top_heads(sae: SAE, features: Sequence[int] | Tensor, k: int = 3) -> pd.DataFrame:
    """The heads that write most of each feature, by `head_weights`.

    Returns: columns feature, rank (from 0), head, weight (share of decoder norm).

    Raises:
        BadInput: no such feature, or the SAE does not say its heads.

    >>> from probes.saes.model import SAEConfig
    >>> sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="z.1", heads=4))
    >>> top_heads(sae, [3, 5], k=2).shape
    (4, 4)
    """
    chosen = feature_ids(sae, features)
    best = head_weights(sae)[chosen].topk(min(k, sae.config.heads), dim=1)
    n = best.values.shape[1]
    return pd.DataFrame(
        {
            "feature": chosen.repeat_interleave(n).numpy(),
            "rank": torch.arange(n).repeat(len(chosen)).numpy(),
            "head": best.indices.flatten().numpy(),
            "weight": best.values.flatten().numpy(),
        }
    )


@dataclass(frozen=True, eq=False)
class FeatureAttribution:
    """A feature's pre-activation by head and source position, kept as the two factors of every part.

        parts[b, i, t, h, s] = weights[b, h, t, s] · values[b, h, s, i]

    Sums are made from the factors, so [batch feature target head source] exists only if asked for.

    Attributes:
        features: their numbers. heads: of the model, in the order of the head axis.
        targets: [batch target], the positions whose pre-activations are explained.
        weights: attention weights from target to source. values: what each source's v adds to the
            pre-activation where the head attends to it alone.
        bias: what the SAE's biases add, b_enc − b_dec W_enc.
    """

    features: Int[Tensor, " feature"]
    heads: tuple[int, ...]
    targets: Int[Tensor, "batch target"]
    weights: Float[Tensor, "batch head target source"]
    values: Float[Tensor, "batch head source feature"]
    bias: Float[Tensor, " feature"]

    @property
    def by_head(self) -> Float[Tensor, "batch feature target head"]:
        """Summed over sources: z_h · W_enc[h, i], in units of the pre-activation."""
        return (self.weights @ self.values).permute(0, 3, 2, 1)

    @property
    def by_source(self) -> Float[Tensor, "batch feature target source"]:
        """Summed over heads, in units of the pre-activation."""
        if len(self.features) == 1:
            # One product and sum; a batched matrix product with one column is slower.
            return (self.weights * self.values[..., 0][:, :, None]).sum(1)[:, None]
        return torch.einsum("bhts,bhsf->bfts", self.weights, self.values)

    @property
    def parts(self) -> Float[Tensor, "batch feature target head source"]:
        """By head and source, in units of the pre-activation."""
        return torch.einsum("bhts,bhsf->bfths", self.weights, self.values)

    @property
    def total(self) -> Float[Tensor, "batch feature target"]:
        """All parts and the biases: the pre-activation, to rounding."""
        return self.by_head.sum(-1) + self.bias[:, None]


@torch.no_grad()
def direct_feature_attribution(
    model: Model,
    sae: SAE,
    prompt: Prompt,
    features: Sequence[int] | Tensor,
    *,
    targets: Sequence[int] | Tensor | None = None,
) -> FeatureAttribution:
    """A feature's pre-activation as a sum over heads and the positions they read, from one forward.

        DFA_i(t, s, h) = A_h[t, s] · (v_h[s] · W_enc[h, i]),   pre_i(t) = Σ_{h,s} DFA_i(t, s, h) + bias_i

    with v_h the values of h's key/value group and bias = b_enc − b_dec W_enc. v is multiplied with W_enc
    first, so z's terms [batch target source n_heads · d_head] are never formed. The forward stops
    behind the SAE's layer.

    It does not show what makes a head attend where it does (the pattern is taken as it is), nor
    whether the feature is active: that also depends on the other features under TopK. Of a gated SAE
    it explains the gate.

    Args:
        prompt: text or texts, token ids, or a Batch.
        features: their numbers.
        targets: positions explained: the same in every prompt, negative ones from the end of its
            tokens; or a LongTensor [batch] or [batch target] of each prompt's own; none: all. Rows of
            padding mean nothing.

    Returns: the parts, in units of the pre-activation (z's unit times W_enc's).

    Raises:
        BadInput: an SAE of another site than z, no such feature or position.

    Source: Kissane et al. 2024, direct feature attribution.

    >>> from probes.saes.model import SAEConfig
    >>> sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="z.1", heads=4))
    >>> ids = torch.tensor([[5, 6, 7]])
    >>> found = direct_feature_attribution(tiny_model(), sae, ids, [3, 9], targets=[2])
    >>> found.parts.shape, found.by_source.shape
    (torch.Size([1, 2, 1, 4, 3]), torch.Size([1, 2, 1, 3]))
    """
    layer, heads = attention_of(sae, model)
    chosen = feature_ids(sae, features)
    batch = model.as_batch(prompt)
    places = _targets(batch, targets)
    cache = model.run(batch, capture=[f"v.{layer}", f"pattern.{layer}"], logits=False).cache
    weights = cache[f"pattern.{layer}"][:, list(heads)].float()
    if targets is not None:
        index = places[:, None, :, None].expand(-1, len(heads), -1, weights.shape[-1])
        weights = weights.gather(2, index.to(weights.device))
    v = values_of_heads(model, cache, layer, heads)
    return FeatureAttribution(
        features=chosen,
        heads=heads,
        targets=places,
        weights=weights,
        values=encoded_values(sae, v, chosen),
        bias=pre_activation_bias(sae)[chosen],
    )


def active_parts(
    model: Model,
    sae: SAE,
    batch: Batch,
    features: Tensor | None = None,
    *,
    place: Place,
    lead: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each row, the features active in it and their attribution by source, where they are active.

    Args:
        place: what `attention_of` found for this SAE.
        features: only these. lead: leave out this many real tokens at the beginning as targets.

    Yields, row by row: position [n], feature [n], activation [n] and by_source [n source], summed
        over heads, in units of the pre-activation.
    """
    layer, heads = place
    sites = [f"z.{layer}", f"v.{layer}", f"pattern.{layer}"]
    cache = model.run(batch, capture=sites, logits=False).cache
    v = values_of_heads(model, cache, layer, heads)
    rows = rows_of_heads(cache, layer, heads).to(sae.encoder)
    wanted = torch.ones(sae.config.d_sae, dtype=torch.bool)
    if features is not None:
        wanted = torch.zeros_like(wanted)
        wanted[features] = True
    for row in range(batch.size):
        codes = sae.codes(z := rows[row])
        real = torch.ones(len(z)) if batch.mask is None else batch.mask[row]
        explained = (real.cumsum(0) > lead).to(z.device) & real.to(z.device).bool()
        keep = (codes.value > 0) & wanted.to(z.device)[codes.latent] & explained[codes.row]
        at, latent, value = codes.row[keep], codes.latent[keep], codes.value[keep]
        own, column = latent.unique(return_inverse=True)
        values = encoded_values(sae, v[row][None], own)[0].permute(2, 0, 1)  # [own head source]
        weights = cache[f"pattern.{layer}"][row, list(heads)].float().transpose(0, 1)
        by_source = torch.cat(
            [
                torch.einsum("nhs,nhs->ns", weights[t], values[c])
                for t, c in zip(at.split(1024), column.split(1024), strict=True)
            ]
            or [z.new_zeros(0, z.shape[0])]
        )
        yield at, latent, value, by_source


def _targets(batch: Batch, targets: Sequence[int] | Tensor | None) -> Int[Tensor, "batch target"]:
    """Target positions of every prompt."""
    size, length = batch.ids.shape
    if targets is None:
        return torch.arange(length).expand(size, -1)
    if isinstance(targets, Tensor):
        places = targets.long().cpu()
        places = places[:, None] if places.ndim == 1 else places
    else:
        columns = [
            places_of(batch, int(t)) if t < 0 else torch.full((size,), int(t)) for t in targets
        ]
        places = torch.stack(columns, 1) if columns else torch.empty(size, 0, dtype=torch.long)
    if places.shape[0] != size or not places.numel():
        raise BadInput(
            f"targets of shape {list(places.shape)}: wanted positions for each of {size} prompts"
        )
    low, high = int(places.min()), int(places.max())
    if low < 0 or high >= length:
        raise BadInput(
            f"target position {low if low < 0 else high} is not in the prompt: positions are 0 to {length - 1}"
        )
    return places
