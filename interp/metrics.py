"""Numbers a run is judged by, each with its unit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import BadInput


def token_loss(
    logits: Float[Tensor, "batch pos d_vocab"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """-log p(target) at every position, in nats; `logits[:, i]` predicts `targets[:, i]`.

    A prompt's own tokens are one place on from what predicts them, and padding is no target:
    `token_loss(run.logits[:, :-1], ids[:, 1:])[mask[:, 1:]]`.

    Raises:
        BadInput: other than one target for each of the logits' positions.

    >>> token_loss(torch.zeros(1, 1, 4), torch.tensor([[2]])).exp()
    tensor([[4.]])
    """
    _check_targets(logits, targets)
    logits = logits.float()
    found = logits.gather(-1, targets[..., None].to(logits.device))[..., 0]
    return logits.logsumexp(-1) - found


def loss(
    logits: Float[Tensor, "batch pos d_vocab"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Mean loss of each prompt, in nats a token; of its own next tokens `loss(run.logits[:, :-1], ids[:, 1:])`."""
    return token_loss(logits, targets).mean(-1)


def logit_diff(
    logits: Float[Tensor, "batch d_vocab"],
    answers: Int[Tensor, " *batch_k"],
    wrong: Int[Tensor, " *batch_k"],
) -> Float[Tensor, " batch"]:
    """Logit of the answer minus logit of the wrong answer, in logits; means where there are several.

    Args:
        logits: of one position a prompt, such as run.logits[:, -1].
        answers, wrong: token ids of each prompt: one, or several with −1 after the last.

    Raises:
        BadInput: logits of several positions, or tokens of another number of prompts.

    >>> logit_diff(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([2]), torch.tensor([[0, 1]]))
    tensor([2.5000])
    """
    return _over(logits, answers, torch.mean) - _over(logits, wrong, torch.mean)


def prob_diff(
    logits: Float[Tensor, "batch d_vocab"],
    answers: Int[Tensor, " *batch_k"],
    wrong: Int[Tensor, " *batch_k"],
) -> Float[Tensor, " batch"]:
    """Probability of the answers minus that of the wrong answers: from -1 to 1."""
    p = logits.float().softmax(-1)
    return _over(p, answers, torch.sum) - _over(p, wrong, torch.sum)


def answer_loss(
    logits: Float[Tensor, "batch d_vocab"], answers: Int[Tensor, " *batch_k"]
) -> Float[Tensor, " batch"]:
    """-log of the probability of the answers together, in nats."""
    logp = logits.float().log_softmax(-1)
    return -_over(logp, answers, lambda x: x.logsumexp(0))


def _over(
    values: Float[Tensor, "batch d_vocab"],
    tokens: Int[Tensor, " *batch_k"],
    join: Callable[[Tensor], Tensor],
) -> Float[Tensor, " batch"]:
    """`join` of each row's values at its tokens; -1 is no token."""
    if values.ndim != 2 or not isinstance(tokens, Tensor) or len(values) not in tokens.shape[:1]:
        given = list(tokens.shape) if isinstance(tokens, Tensor) else repr(tokens)
        raise BadInput(
            f"logits of shape {list(values.shape)} and tokens {given}: wanted logits [batch d_vocab] of one "
            "position a prompt, such as run.logits[:, -1], and a tensor of each prompt's token [batch]"
        )
    tokens = tokens.to(values.device)
    if tokens.ndim == 1 or tokens.shape[1] == 1:
        return values.gather(-1, tokens.reshape(-1, 1))[:, 0]
    rows = [row[mine[mine >= 0]] for row, mine in zip(values, tokens, strict=True)]
    return torch.stack([join(row) for row in rows])


def kl(
    p_logits: Float[Tensor, "*batch d_vocab"], q_logits: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(p ‖ q) of two next-token distributions, in nats; one of them may be shared by all rows of the other."""
    p, q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def accuracy(
    logits: Float[Tensor, "batch pos d_vocab"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Share of positions where the most likely token is the target."""
    _check_targets(logits, targets)
    return (logits.argmax(-1) == targets.to(logits.device)).float().mean(-1)


def _check_targets(logits: Tensor, targets: Tensor) -> None:
    if logits.shape[:-1] != targets.shape:
        raise BadInput(
            f"logits of shape {list(logits.shape)} and targets of shape {list(targets.shape)}: wanted a target "
            "for each position, as in loss(run.logits[:, :-1], ids[:, 1:])"
        )
