"""What a head's weights do with a token: whether attending to it raises that very token's logit.

The path is effective embedding → input norm → W_V W_O → final norm → W_U. A token's effective embedding
is the residual stream behind block 0 with block 0's attention taken out (W_E plus what the first MLP
makes of it, which is where models undo the tying of W_E and W_U); heads of layer 0 read W_E itself.
Scales of norms are positive and drop out of a z-score; biases are the same for every token and are
left out. A vocabulary by vocabulary matrix is never formed: a head's logits of one token have mean 0
(W_U is centred) and variance w C wᵀ with C = W_U W_Uᵀ / d_vocab, [d_model d_model].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.data.prompts import plain_tokens
from interp.devices import wide
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.run.edits import Edit

TOKENS = 32
"""Tokens in one sample: the unit of these tests."""
COLUMNS = 8192
"""Unembedding columns that are widened to float32 at a time."""


def token_samples(model: Model, n: int, seed: int, size: int = TOKENS) -> Int[Tensor, "n size"]:
    """`n` samples of distinct ordinary tokens of the vocabulary, disjoint where there are enough.

    Samples shrink where the vocabulary has fewer than twice `size` ordinary tokens.
    """
    pool = plain_tokens(model)
    if len(pool) < 4:
        raise BadInput(f"{model.id} has {len(pool)} ordinary tokens: samples of tokens need 4")
    size = min(size, len(pool) // 2)
    generator = torch.Generator().manual_seed(seed)
    if len(pool) >= n * size:
        return pool[torch.randperm(len(pool), generator=generator)[: n * size]].view(n, size)
    rows = [pool[torch.randperm(len(pool), generator=generator)[:size]] for _ in range(n)]
    return torch.stack(rows)


@dataclass(frozen=True)
class TokenVectors:
    """What the stream holds of tokens [n_tokens d_model]: `embed` before block 0, `effective` behind it."""

    embed: Float[Tensor, "n_tokens d_model"]
    effective: Float[Tensor, "n_tokens d_model"]

    def read_by(self, layer: int) -> Float[Tensor, "n_tokens d_model"]:
        """What heads of this layer read."""
        return self.embed if layer == 0 else self.effective


@torch.no_grad()
def token_vectors(model: Model, ids: Int[Tensor, " n_tokens"]) -> TokenVectors:
    """The effective embedding of every token, and its plain one.

    Every token stands at position 1 behind a copy of itself, which it does not see: position 0 is
    treated apart by many models, and learned positions do not differ between tokens.

    Raises:
        Refused: block 0's attention cannot be taken out (no attention there, or no known write).
    """
    block = model.spec.blocks[0]
    if block.attention is None or block.attn_write is None:
        raise Refused(
            f"{model.id} has no effective embeddings: what block 0 writes beside its MLP is not known"
        )
    run = model.run(
        ids[:, None].expand(-1, 2),
        capture=["resid_pre.0", "resid_post.0"],
        edits=[Edit.zero("attn_write.0")],
        logits=False,
    )
    return TokenVectors(*(wide(run.cache[f"resid_{end}.0"][:, 1]) for end in ("pre", "post")))


class Unembedded:
    """Directions of tokens before the final norm: gain folded in, mean over the vocabulary taken out."""

    @torch.no_grad()
    def __init__(self, model: Model):
        self.W_U, self.norm = model.W_U, model.final_norm
        self.mean = torch.stack([part.sum(1) for part in self._parts()]).sum(0) / self.W_U.shape[1]

    def _parts(self) -> Iterator[Float[Tensor, "d_model columns"]]:
        """W_U in float32, some columns at a time."""
        return (wide(part) for part in self.W_U.split(COLUMNS, dim=1))

    @cached_property
    @torch.no_grad()
    def covariance(self) -> Float[Tensor, "d_model d_model"]:
        """C: w C wᵀ is the variance over the vocabulary of the logits of a write w."""
        gram = torch.zeros(())
        for part in self._parts():
            gram = gram + part @ part.T
        covariance = gram / self.W_U.shape[1] - self.mean[:, None] * self.mean
        return self._before(self._before(covariance).T)

    @property
    def of_mean(self) -> Float[Tensor, " d_model"]:
        """What centring takes out of every direction."""
        return self._before(self.mean[None])[0]

    def _before(self, rows: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        """Directions as they are before the final norm (its scale left out)."""
        return self.norm.centre(rows * self.norm.gain.to(rows))

    def spread(
        self,
        z: Float[Tensor, "rows n_heads d_head"],
        W_O: Float[Tensor, "n_heads d_head d_model"],
    ) -> Float[Tensor, "rows n_heads"]:
        """Standard deviation over the vocabulary of the logits of each write z W_O, the final scale left out.

        By [d_head d_head] products: z (W_O C W_Oᵀ) zᵀ. Infinite where the unembedding reads nothing of
        the write: such a head's z-score is 0, not noise by noise.
        """
        size, variance = (
            torch.einsum("nhd,hde,nhe->nh", z, through @ W_O.transpose(-1, -2), z)
            for through in (W_O, W_O @ self.covariance)
        )
        noise = 1e-8 * self.covariance.trace() * size
        return torch.where(variance > noise, variance, torch.inf).sqrt()

    @torch.no_grad()
    def directions(self, ids: Int[Tensor, " n_tokens"]) -> Float[Tensor, "n_tokens d_model"]:
        """Dot product with a write: how far it raises each token's logit over the vocabulary's mean."""
        return self._before(wide(self.W_U[:, ids.to(self.W_U.device)]).T - self.mean)


@torch.no_grad()
def values(
    model: Model, layer: int, stream: Float[Tensor, "n_tokens d_model"]
) -> Float[Tensor, "n_tokens n_heads d_head"]:
    """v of every query head for these stream vectors, by weights: input norm folded, biases left out."""
    block = model.spec.blocks[layer]
    if block.v is not None and block.v.input not in ("", "resid_pre"):
        module = model.module.get_submodule(block.v.input)
        if any(gain.shape[-1] != model.spec.d_model for gain in module.parameters()):
            raise Refused(
                f"layer {layer} of {model.id}: v is read from a latent, not from the stream"
            )
        norm = model.norm(block.v.input)
        stream = norm.centre(stream) / norm.scale(stream)
    W_V = wide(model.W_V(layer))
    v = torch.einsum("nm,kmd->nkd", stream, W_V)
    return v[:, [model.spec.kv_group(layer, head) for head in range(block.n_heads)]]


@torch.no_grad()
def written(model: Model, layer: int) -> Float[Tensor, "n_heads d_head d_model"]:
    """W_O as it enters the stream: times the write's scale, and through a norm behind it.

    Such a norm's scale is held (it is positive and the same for all heads).
    """
    block, W_O = model.spec.blocks[layer], wide(model.W_O(layer))
    if block.attn_write is None:
        raise Refused(f"layer {layer} of {model.id} has no known attention write")
    if block.direct:
        return W_O * block.attn_write.scale
    module = model.module.get_submodule(block.attn_write.module)
    norm = model.norm(block.attn_write.module)
    some = W_O.flatten(0, 1)[:4].to(norm.gain)
    made = norm.gain * norm.centre(some) / norm.scale(some) + norm.bias
    if not torch.allclose(wide(made), wide(module(some)), rtol=1e-2, atol=1e-3):
        raise Refused(
            f"layer {layer} of {model.id}: what stands behind the attention's output is not a norm"
        )
    return norm.centre(W_O) * wide(norm.gain) * block.attn_write.scale


@torch.no_grad()
def own_token_z(
    model: Model, samples: Int[Tensor, "n size"]
) -> tuple[Float[Tensor, "n n_layers n_heads"], Float[Tensor, "n n_layers n_heads"]]:
    """(z of the attended token's own logit, z of another token's logit), means over each sample.

    z = (w · W_U[t] − mean) / sd over the vocabulary, w what the head writes when it attends to t alone.
    The other token is the sample's next one: the same tokens, the relation destroyed. NaN where a
    layer's weights cannot be read.

    >>> own, other = own_token_z(tiny_model(), torch.arange(6).view(2, 3))
    >>> own.shape
    torch.Size([2, 2, 4])
    """
    ids = samples.flatten().to(model.device)
    stream, unembedded = token_vectors(model, ids), Unembedded(model)
    own = unembedded.directions(ids)
    shape = (2, len(samples), model.n_layers, model.spec.n_heads)
    out = torch.full(shape, torch.nan)
    for layer, v, W_O in head_circuits(model, stream):
        write = torch.einsum("nhd,hdm->nhm", v, W_O)
        sd = unembedded.spread(v, W_O)
        for which, directions in enumerate((own, another(own, samples))):
            z = torch.einsum("nhm,nm->nh", write, directions) / sd
            z = z.unflatten(0, samples.shape).mean(1)
            out[which, :, layer, : z.shape[1]] = z.cpu()
    return out[0], out[1]


def another(rows: Float[Tensor, "n_tokens d_model"], samples: Int[Tensor, "n size"]) -> Tensor:
    """To every token the row of its sample's next one: the same tokens, the relation destroyed."""
    return rows.unflatten(0, samples.shape).roll(-1, dims=1).flatten(0, 1)


def head_circuits(
    model: Model, stream: TokenVectors
) -> Iterator[
    tuple[int, Float[Tensor, "n_tokens n_heads d_head"], Float[Tensor, "n_heads d_head d_model"]]
]:
    """(layer, v, W_O) of every layer whose weights can be read; Refused if there is none."""
    reasons, found = [], False
    for layer in model.spec.attention_layers:
        try:
            v, W_O = values(model, layer, stream.read_by(layer)), written(model, layer)
        except Refused as refusal:
            reasons.append(str(refusal))
            continue
        found = True
        yield layer, v, W_O
    if not found:
        raise Refused(reasons[0] if reasons else f"{model.id} has no attention that is seen")


def seen_by(
    compute: Callable[[Model, int, int], tuple[Tensor, Tensor]],
) -> Callable[[Model, int, int], dict[str, np.ndarray]]:
    """A detector's `observe` of (model, n, seed) -> (score, null); NaN where the model refuses it."""

    def observe(model: Model, n: int, seed: int) -> dict[str, np.ndarray]:
        try:
            score, null = compute(model, n, seed)
        except Refused:
            nothing = np.full((n, model.n_layers, model.spec.n_heads), np.nan, dtype=np.float32)
            return {"score": nothing, "null": nothing.copy()}
        return {"score": score.numpy(), "null": null.numpy()}

    return observe


own_token = seen_by(lambda model, n, seed: own_token_z(model, token_samples(model, n, seed)))
"""`own_token_z` of n samples: what the copying and the suppression detector observe."""


def unread(seen: Mapping[str, np.ndarray]) -> list[str]:
    """What a report says where `seen_by` met a model whose weights cannot be read."""
    if not np.isnan(seen["score"]).all():
        return []
    return [
        "What heads do with a token by their weights alone is not given: this model has no verified "
        "unembedding, or its values, attention writes or first block cannot be read as weights."
    ]
