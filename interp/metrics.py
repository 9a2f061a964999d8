"""Numbers a run is judged by, each with its unit."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def token_loss(
    logits: Float[Tensor, "batch pos d_vocab"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """-log p(target) at every position, in nats; `logits[:, i]` predicts `targets[:, i]`.

    >>> token_loss(torch.zeros(1, 1, 4), torch.tensor([[2]])).exp()
    tensor([[4.]])
    """
    logits = logits.float()
    found = logits.gather(-1, targets[..., None].to(logits.device))[..., 0]
    return logits.logsumexp(-1) - found


def loss(
    logits: Float[Tensor, "batch pos d_vocab"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Mean loss of each prompt, in nats a token."""
    return token_loss(logits, targets).mean(-1)


def logit_diff(
    logits: Float[Tensor, "batch d_vocab"],
    answer: Int[Tensor, " batch"],
    wrong: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Logit of the answer minus logit of the wrong answer, in logits."""
    rows = torch.arange(len(logits), device=logits.device)
    return logits[rows, answer] - logits[rows, wrong]


def kl(
    p_logits: Float[Tensor, "*batch d_vocab"], q_logits: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(p ‖ q) of two next-token distributions, in nats."""
    p, q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def accuracy(
    logits: Float[Tensor, "batch pos d_vocab"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Share of positions where the most likely token is the target."""
    return (logits.argmax(-1) == targets.to(logits.device)).float().mean(-1)
