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

from interp.direction import logit_direction, norm_behind, places_of, token_ids
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.cache import Cache
from interp.sites import Site
from probes.saes.model import SAE
from probes.saes.sparse import Codes

FEATURES_AT_ONCE = 256
"""Features whose logits over the whole vocabulary exist at once."""

Prompt = Batch | Tensor | str | Sequence[str]
Place = tuple[int, tuple[int, ...]]
"""A layer, and the heads whose z an SAE of it reads."""


# --- by weights ------------------------------------------------------------------------------------


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


# --- direct feature attribution ---------------------------------------------------------------------


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


# --- what a feature writes --------------------------------------------------------------------------


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


@dataclass(frozen=True, eq=False)
class FeatureContributions:
    """What every active feature adds to a logit (or difference), by head; all in logits.

    Attributes:
        heads: z_h · W_O^h d, each head's direct attribution.
        features: of each entry of `codes` (active latents by prompt), its part in each head.
        error: of what the SAE does not reconstruct. bias: of b_dec. With the features of their
            prompt they sum to `heads`.
        positions: the read position of each prompt. answers, instead: token ids.
    """

    codes: Codes
    features: Float[Tensor, "n head"]
    error: Float[Tensor, "batch head"]
    bias: Float[Tensor, "batch head"]
    heads: Float[Tensor, "batch head"]
    positions: Int[Tensor, " batch"]
    answers: Int[Tensor, " batch"]
    instead: Int[Tensor, " batch"] | None

    @property
    def total(self) -> Float[Tensor, "batch head"]:
        """Features, error and bias of each prompt: `heads` to rounding."""
        summed = self.error + self.bias
        return summed.index_add(0, self.codes.row, self.features)

    def table(self) -> pd.DataFrame:
        """One row for each (prompt, part): prompt, part ("feature", "error", "bias"), feature,
        activation, contribution (logits, over all heads), strongest features first."""
        codes = self.codes
        active = pd.DataFrame(
            {
                "prompt": codes.row.cpu().numpy(),
                "part": "feature",
                "feature": codes.latent.cpu().numpy(),
                "activation": codes.value.cpu().numpy(),
                "contribution": self.features.sum(1).cpu().numpy(),
            }
        )
        active = active.sort_values("contribution", key=abs, ascending=False, kind="stable")
        rest = [
            pd.DataFrame(
                {
                    "prompt": range(len(values)),
                    "part": part,
                    "contribution": values.sum(1).cpu().numpy(),
                }
            )
            for part, values in (("error", self.error), ("bias", self.bias))
        ]
        table = pd.concat([active, *rest], ignore_index=True)
        return table.sort_values("prompt", kind="stable", ignore_index=True)


@torch.no_grad()
def feature_contributions(
    model: Model,
    sae: SAE,
    prompt: Prompt,
    *,
    answer: str | int | Tensor | None = None,
    instead: str | int | Tensor | None = None,
    position: int = -1,
) -> FeatureContributions:
    """What each feature, the SAE's error and its bias add directly to a logit: together, the heads' part.

        z_h · g_h = Σ_i f_i W_dec[i, h] · g_h + (z − ẑ)_h · g_h + b_dec[h] · g_h,   g_h = W_O^h d

    d is the logit's direction at the final residual, with the final norm's scale (and that of a norm
    behind attention) held fixed. What b_O adds is no feature's and is left out. Direct effects only:
    what later heads and MLPs do with a feature is not in it.

    Args:
        prompt: text or texts, token ids, or a Batch.
        answer: the explained token: text, an id, or one id a prompt [batch]; by default the model's
            own top token. instead: explain the difference answer − instead.
        position: whose logits; negative from the end of the real tokens. The features are read there.

    Raises:
        BadInput: an SAE of another site than z, a token that is not one, a position not in the prompt.
        Refused: the writes or the unembedding of this model were not verified.

    Source: Kissane et al. 2024; Elhage et al. 2021 for direct logit attribution.

    >>> from probes.saes.model import SAEConfig
    >>> sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="z.1", heads=4))
    >>> found = feature_contributions(tiny_model(), sae, torch.tensor([[5, 6, 7]]), answer=3)
    >>> torch.allclose(found.total, found.heads, atol=1e-5), len(found.table())
    (True, 6)
    """
    layer, heads = attention_of(sae, model)
    batch = model.as_batch(prompt)
    places = places_of(batch, position)
    last = f"resid_post.{model.n_layers - 1}"
    sites = [f"z.{layer}", last, *write_sites(model, layer)]
    cache = model.run(batch, capture=sites, logits=False).cache
    rows = torch.arange(batch.size)
    final = cache[last][rows, places]
    wanted, other = (token_ids(model, token, batch.size) for token in (answer, instead))
    if wanted is None:
        wanted = model.unembed(final).argmax(-1).cpu()
    _ = model.W_U  # Refused where the unembedding was not verified
    d = logit_direction(model, final, wanted, other).vector
    d = before_norm(model, cache, layer, d, (rows, places))
    g = torch.einsum("bm,hdm->bhd", d, model.W_O(layer)[list(heads)].float()).to(sae.encoder)
    z = rows_of_heads(cache, layer, heads)[rows, places].to(sae.encoder)
    codes = sae.codes(z)

    def through(x: Tensor, g: Tensor) -> Tensor:
        return (x.unflatten(-1, (len(heads), -1)) * g).sum(-1)

    decoded = codes.value[:, None] * sae.W_dec[codes.latent]
    return FeatureContributions(
        codes=codes,
        features=through(decoded, g[codes.row]),
        error=through(z - sae.decode(codes), g),
        bias=through(sae.b_dec.expand_as(z), g),
        heads=through(z, g),
        positions=places,
        answers=wanted,
        instead=other,
    )


# --- shared with the files beside this one ----------------------------------------------------------


def attention_of(sae: SAE, model: Model) -> Place:
    """(layer, heads) of the z that an SAE reads; compares weights, so it is asked once a call.

    Raises:
        BadInput: it reads another site, or is of another model.
    """
    site = sae.site(model)
    if site.name != "z" or site.layer is None:
        raise BadInput(
            f"this SAE reads '{site}': attribution to heads needs one of attention outputs, such as 'z.12'"
        )
    heads = range(model.spec.blocks[site.layer].n_heads) if site.head is None else [site.head]
    return site.layer, tuple(heads)


def feature_ids(sae: SAE, features: Sequence[int] | Tensor) -> Int[Tensor, " feature"]:
    """Feature numbers as a tensor, checked."""
    chosen = torch.as_tensor(features, dtype=torch.long).flatten().cpu()
    if not len(chosen):
        raise BadInput("no features were given: name at least one")
    low, high = int(chosen.min()), int(chosen.max())
    if low < 0 or high >= sae.config.d_sae:
        raise BadInput(
            f"no feature {low if low < 0 else high}: this SAE has features 0 to {sae.config.d_sae - 1}"
        )
    return chosen


def rows_of(cache: Cache, site: Site) -> Float[Tensor, "batch pos d_in"]:
    """A captured site as the SAE of it reads it: heads side by side."""
    return cache[site].flatten(2)


def rows_of_heads(
    cache: Cache, layer: int, heads: Sequence[int]
) -> Float[Tensor, "batch pos d_in"]:
    """z of these heads side by side."""
    z = cache[f"z.{layer}"]
    return (z if len(heads) == z.shape[2] else z[:, :, list(heads)]).flatten(2)


def values_of_heads(
    model: Model, cache: Cache, layer: int, heads: Sequence[int]
) -> Float[Tensor, "batch pos head d_head"]:
    """v as each of these heads reads it: its key/value group's."""
    groups = [model.spec.kv_group(layer, head) for head in heads]
    return cache[f"v.{layer}"][:, :, groups].float()


def encoded_values(
    sae: SAE, v: Float[Tensor, "batch pos head d_head"], features: Int[Tensor, " feature"]
) -> Float[Tensor, "batch head pos feature"]:
    """v_h[s] · W_enc[h, i]: what each value would add to the pre-activations at weight 1."""
    W = sae.encoder[features.to(sae.encoder.device)].detach().float()
    by_head = (
        W.unflatten(1, (v.shape[2], -1)).to(v.device).permute(1, 2, 0)
    )  # [head d_head feature]
    rows = v.permute(2, 0, 1, 3).flatten(1, 2) @ by_head
    return rows.unflatten(1, v.shape[:2]).transpose(0, 1)


@torch.no_grad()
def pre_activation_bias(sae: SAE) -> Float[Tensor, " d_sae"]:
    """What the biases add to every pre-activation: b_enc − b_dec W_enc (b_enc where it does not centre)."""
    return sae.pre_activations(torch.zeros_like(sae.b_dec))


def write_sites(model: Model, layer: int) -> list[str]:
    """What `before_norm` needs to have been captured: nothing where attention is written as it is."""
    model.require_sum("attribution through attention")
    model.layers_with("attn_write")
    block = model.spec.blocks[layer]
    if block.attn_write is None:
        raise Refused(f"layer {layer} of {model.id}: what its attention writes was not found")
    return [] if block.direct else [f"attn_out.{layer}", f"attn_write.{layer}"]


def before_norm(
    model: Model,
    cache: Cache,
    layer: int,
    direction: Float[Tensor, "*rows d_model"],
    where: tuple[Tensor, Tensor] | int,
) -> Float[Tensor, "*rows d_model"]:
    """A direction of the stream, pulled back to the output of a layer's W_O (scale of a norm held).

    Args:
        where: index into [batch pos] of the rows that `direction` is of; a number is a row, all positions.

    Raises:
        Refused: what stands between attention and the stream is not a norm.
    """
    block = model.spec.blocks[layer]
    assert block.attn_write is not None
    pulled = direction * block.attn_write.scale
    if block.direct:
        return pulled
    out, written = (cache[f"{name}.{layer}"][where] for name in ("attn_out", "attn_write"))
    return norm_behind(model, layer, "attn", out, written).pull_back(pulled, at=out)


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
