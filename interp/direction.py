"""The residual direction that a logit reads, and what it takes to ask for one: tokens, positions, norms.

With the scales of norms held fixed a logit is linear in what was written to the stream, so a direction
pulled back to a write gives the write's contribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.devices import wide
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.models.weights import FrozenNorm, linear_map
from interp.run.batch import Batch


@dataclass(frozen=True)
class Direction:
    """The residual direction of a logit (or logit difference) at one position of each prompt.

    vector: [batch d_model], final norm's gain and scale folded in: its dot product with a write is the
    write's contribution in logits. constant: [batch], what biases after the last block add.
    """

    vector: Float[Tensor, "batch d_model"]
    constant: Float[Tensor, " batch"]


@torch.no_grad()
def logit_direction(
    model: Model, final: Float[Tensor, "batch d_model"], answer: Tensor, instead: Tensor | None
) -> Direction:
    """The direction that logit[answer] (− logit[instead]) reads at the final residual `final`."""
    W_U, b_U = linear_map(
        model.module.get_submodule(model.spec.unembedding or ""), model.spec.d_model, model.device
    )
    d, b = wide(W_U.T[answer]), wide(b_U[answer])
    if instead is not None:
        d, b = d - wide(W_U.T[instead]), b - wide(b_U[instead])
    norm, scale = model.final_norm, model.spec.logit_scale
    constant = ((d * wide(norm.bias.to(d.device))).sum(-1) + b) * scale
    return Direction(norm.pull_back(d, at=final) * scale, constant)


def norm_behind(
    model: Model,
    layer: int,
    kind: str,
    out: Float[Tensor, "*rows d_model"],
    written: Float[Tensor, "*rows d_model"],
) -> FrozenNorm:
    """The norm between an "attn" or "mlp" output and the stream, tried on what was seen of both.

    Args:
        out, written: the sites attn_out and attn_write (or mlp_out and mlp_write) of the layer.

    Raises:
        Refused: what stands there does not make the one of the other as a norm does.
    """
    block = model.spec.blocks[layer]
    write = block.attn_write if kind == "attn" else block.mlp_write
    assert write is not None
    norm = model.norm(write.module)
    wanted = wide(written) / write.scale
    made = wide(norm.gain) * norm.centre(wide(out)) / norm.scale(out) + wide(norm.bias)
    if not torch.allclose(made, wanted, rtol=1e-2, atol=1e-3 * float(wanted.abs().max())):
        what = "attention" if kind == "attn" else "MLP"
        raise Refused(
            f"layer {layer} of {model.id}: what stands between the {what}'s output and the residual "
            "stream is not a norm that could be held fixed"
        )
    return norm


def places_of(batch: Batch, position: int) -> Int[Tensor, " batch"]:
    """Each prompt's position in the batch, `position` being counted over its real tokens."""
    mask = torch.ones_like(batch.ids, dtype=torch.bool) if batch.mask is None else batch.mask
    mask = mask.cpu()
    real = mask.sum(1)
    if int(real.min()) < max(-position, position + 1):
        n = int(real.min())
        raise BadInput(
            f"position {position} is not in a prompt of {n} tokens: positions are 0 to {n - 1}, or -1 "
            f"to -{n} from the end"
        )
    return mask.int().argmax(1) + (position if position >= 0 else real + position)


def token_ids(model: Model, token: str | int | Tensor | None, size: int) -> Tensor | None:
    """One token id for every prompt."""
    if token is None:
        return None
    if not isinstance(token, Tensor):
        return torch.tensor([model.token_id(token)] * size)
    if token.shape != (size,):
        raise BadInput(f"token ids of shape {list(token.shape)}: wanted one a prompt, [{size}]")
    return torch.tensor([model.token_id(int(i)) for i in token])
