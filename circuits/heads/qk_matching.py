"""QK matching: whether a head's queries prefer keys of the same token, by its weights."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.heads.detector import Detector, PerPrompt
from circuits.heads.own_token import seen_by, token_samples, token_vectors, unread
from interp.models.model import Model
from interp.run.edits import Edit

TOKENS = 8


@torch.no_grad()
def own_key_z(
    model: Model, samples: Int[Tensor, "n size"]
) -> tuple[Float[Tensor, "n n_layers n_heads"], Float[Tensor, "n n_layers n_heads"]]:
    """(z of the score q_t · k_t of a token with itself, z of q_t · k_u), means over each sample.

    z over the keys of all tokens of all samples. Every layer is given the effective embeddings (layer 0
    the plain ones) and asked for its own q and k, so norms, biases and a norm of q and k are in; query
    and key stand at the same position, where rotary positions turn neither against the other. u is the
    next token of the sample.

    >>> own_key_z(tiny_model(), torch.arange(8).view(2, 4))[0].shape
    torch.Size([2, 2, 4])
    """
    ids = samples.flatten().to(model.device)
    stream = token_vectors(model, ids)
    layers = model.layers_with("q")
    given = {layer: stream.read_by(layer)[:, None] for layer in layers}
    edits = [Edit.patch(f"resid_pre.{layer}", value) for layer, value in given.items()]
    run = model.run(ids[:, None], capture=["q", "k"], edits=edits, logits=False)
    out = torch.full((2, len(samples), model.n_layers, model.spec.n_heads), torch.nan)
    rows = torch.arange(len(ids)).view(samples.shape)
    for layer in layers:
        q, k = (run.cache[f"{name}.{layer}"][:, 0].float() for name in ("q", "k"))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k)
        mean, sd = scores.mean(-1, keepdim=True), scores.std(-1, keepdim=True)
        # A head whose queries tell no keys apart prefers none.
        noise = 1e-5 * scores.abs().amax(-1, keepdim=True)
        z = torch.where(sd > noise, (scores - mean) / sd, 0.0)
        for which, keys in enumerate((rows, rows.roll(-1, dims=1))):
            found = z[:, rows, keys].mean(-1).T
            out[which, :, layer, : q.shape[1]] = found.cpu()
    return out[0], out[1]


def _z(model: Model, n: int, seed: int) -> tuple[PerPrompt, PerPrompt]:
    return own_key_z(model, token_samples(model, n, seed, TOKENS))


QK_MATCHING = Detector(
    name="qk_matching",
    title="QK matching",
    letter="Q",
    description="z-score, over the keys of other tokens, of a token's query with its own key, both from "
    "effective embeddings at the same position. A score, not a label: at a distance rotary positions turn "
    "it, and later layers read more than embeddings.",
    source="QK circuits: Elhage et al. 2021; matching heads: Olsson et al. 2022, Wang et al. 2022 "
    "(duplicate-token heads). z-score over keys: ours",
    reads=None,
    observe=seen_by(_z),
    notes=unread,
    null="the key of another token of the same sample",
    threshold=None,
    margin=0.0,
    rank=23,
    unit="standard deviations over keys",
    slow=True,
)
