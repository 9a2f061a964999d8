"""DeCoRe: next-token logits with what the model would say without its retrieval heads taken away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.heads.retrieval import Head, mask_heads
from interp.errors import BadInput
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.cache import Run


def decore_logits(
    model: Model,
    data: Batch | Tensor | str | Sequence[str] | Mapping[str, Tensor],
    heads: Sequence[Head],
    *,
    start: int | None = None,
    alpha: float | None = None,
    cap: float | None = None,
) -> tuple[Float[Tensor, "batch m d_vocab"], Float[Tensor, "batch m"]]:
    """Contrasted logits of the positions from `start` on, and the weight of the contrast at each.

    (1 + α) log p − α log p_masked, with α = H(p) = −Σ p log p, the entropy of the full model's next-token
    distribution in nats: neither divided by log d_vocab nor capped, as published. Masked heads attend
    evenly (zeroed queries) from `start` on; keys and values of earlier positions are those of the full
    model, as in decoding. The softmax of the result is the contrasted distribution. A better answer is
    not promised: where retrieval heads are not what the answer needs, the contrast is noise.

    Args:
        data: prompts of one length (no padding), as `Model.run` takes them.
        heads: (layer, head) pairs, the retrieval heads.
        start: first position; by default the last one, so that only the next token is contrasted.
        alpha: a fixed weight in place of the entropy.
        cap: largest entropy that is used.

    Returns: logits [batch m d_vocab], not normalised, and α [batch m]; m = pos − start.

    Raises:
        BadInput: padded prompts, no heads, a start outside the prompt.

    >>> logits, alpha = decore_logits(tiny_model(), torch.tensor([[5, 6, 7]]), heads=[(1, 2)])
    >>> logits.shape, alpha.shape
    (torch.Size([1, 1, 97]), torch.Size([1, 1]))

    Source: Gema et al. 2024, DeCoRe: Decoding by Contrasting Retrieval Heads, §2 (entropy-controlled).
    """
    batch = model.as_batch(data)
    length = batch.ids.shape[1]
    if batch.padded:
        raise BadInput("padded prompts have no common last position: give prompts of one length")
    if not heads:
        raise BadInput("no heads are named: give the retrieval heads as (layer, head) pairs")
    start = length - 1 if start is None else start
    if not 0 <= start < length:
        raise BadInput(f"start={start}: the prompts have positions 0 to {length - 1}")
    read = torch.arange(start, length)
    first = min(layer for layer, _ in heads)
    clean = model.run(batch, capture=[f"resid_pre.{first}"], logits=read)
    edit = mask_heads(heads, positions=read.tolist())
    (masked,) = model.replay(clean, [[edit]], _log_p, logits=read)
    log_p = _log_p(clean)
    if alpha is not None:
        weight = torch.full_like(log_p[..., 0], alpha)
    else:
        weight = -(log_p.exp() * log_p).sum(-1)
        weight = weight if cap is None else weight.clamp_max(cap)
    return (1 + weight[..., None]) * log_p - weight[..., None] * masked, weight


def _log_p(run: Run) -> Float[Tensor, "batch m d_vocab"]:
    assert run.logits is not None
    return run.logits.float().log_softmax(-1)
