"""SAEs of attention outputs: which heads they read, what values are to them, and their way to the stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.direction import norm_behind
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.cache import Cache
from interp.sites import Site
from probes.saes.model import SAE

Prompt = Batch | Tensor | str | Sequence[str]
Place = tuple[int, tuple[int, ...]]
"""A layer, and the heads whose z an SAE of it reads."""


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
