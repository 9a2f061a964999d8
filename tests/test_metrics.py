"""Metrics beside plain torch, and shapes that would have been broadcast into another number."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from interp.errors import BadInput
from interp.metrics import accuracy, answer_loss, kl, logit_diff, loss, prob_diff, token_loss

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(4, 7, 11, generator=GENERATOR)
IDS = torch.randint(11, (4, 7), generator=GENERATOR)
ANSWERS, WRONG = torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8])


def test_metrics_are_those_of_plain_torch() -> None:
    """To rounding: one sum in another order (float32)."""
    predicted, targets = LOGITS[:, :-1], IDS[:, 1:]
    plain = cross_entropy(predicted.flatten(0, 1), targets.flatten(), reduction="none").view(4, 6)
    assert torch.allclose(token_loss(predicted, targets), plain, atol=1e-6)
    assert torch.allclose(loss(predicted, targets), plain.mean(1), atol=1e-6)
    hits = (predicted.argmax(-1) == targets).float().mean(1)
    assert torch.equal(accuracy(predicted, targets), hits)
    last, rows = LOGITS[:, -1], range(4)
    p = last.softmax(-1)
    assert logit_diff(last, ANSWERS, WRONG).tolist() == [
        float(last[i, i + 1] - last[i, i + 5]) for i in rows
    ]
    wanted = torch.stack([p[i, i + 1] - p[i, i + 5] for i in rows])
    assert torch.allclose(prob_diff(last, ANSWERS[:, None], WRONG[:, None]), wanted, atol=1e-6)
    # of two answers together, and of one where the second is no token
    several = torch.tensor([[1, 2], [3, -1], [4, 5], [6, -1]])
    together = [-float(p[i, row[row >= 0]].sum().log()) for i, row in enumerate(several)]
    assert answer_loss(last, several).tolist() == pytest.approx(together, abs=1e-5)
    assert torch.allclose(kl(last, LOGITS[:, 0]), kl_of(last, LOGITS[:, 0]), atol=1e-6)


def kl_of(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)


@pytest.mark.parametrize("metric", [token_loss, loss, accuracy])
@pytest.mark.parametrize(
    ("logits", "targets"),
    [(LOGITS, IDS[:1]), (LOGITS[:, :2], IDS[:, 1:2]), (LOGITS, IDS[:, 1:]), (LOGITS[:1], IDS)],
    ids=["targets of one prompt", "one target of two", "not shifted alike", "logits of one prompt"],
)
def test_targets_of_other_positions_are_refused(metric, logits, targets) -> None:
    with pytest.raises(
        BadInput, match=r"a target for each position, as in loss\(run.logits\[:, :-1\]"
    ):
        metric(logits, targets)


@pytest.mark.parametrize(
    ("logits", "answers"),
    [
        (LOGITS[:, -1], torch.tensor([3])),
        (LOGITS[:, -1], torch.tensor([3, 4])),
        (LOGITS[:, -1], torch.tensor([[1, 2], [3, 4]])),
        (LOGITS, ANSWERS),
        (LOGITS[0, -1], torch.tensor(3)),
        (LOGITS[:, -1], 3),
    ],
    ids=["one answer", "two answers", "two of two", "every position", "one prompt", "a number"],
)
def test_answers_of_other_prompts_are_refused(logits, answers) -> None:
    """One answer for four prompts once gave the number of the first prompt alone."""
    with pytest.raises(BadInput, match=r"a tensor of each prompt's token \[batch\]"):
        logit_diff(logits, answers, answers)
    with pytest.raises(BadInput, match=r"such as run.logits\[:, -1\]"):
        answer_loss(logits, answers)
