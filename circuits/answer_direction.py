"""The direction of the residual stream along which a task's answers are told from its wrong ones."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from interp.data.pairs import Pairs
from interp.direction import Direction, logit_direction
from interp.models.model import Model


def answer_direction(model: Model, final: Float[Tensor, "n d_model"], pairs: Pairs) -> Direction:
    """The residual direction of answer − wrong; means of directions where there are several tokens."""
    vector, constant = torch.zeros_like(final, dtype=torch.float32), torch.zeros(len(final))
    for sign, ids in ((1, pairs.answers), (-1, pairs.wrong)):
        share = (ids >= 0).float() / (ids >= 0).sum(1, keepdim=True)
        for tokens, weight in zip(ids.clamp_min(0).T, share.T, strict=True):
            one = logit_direction(model, final, tokens.to(final.device), None)
            weight = sign * weight.to(final.device)
            vector = vector + weight[:, None] * one.vector
            constant = constant.to(final.device) + weight * one.constant
    return Direction(vector, constant)
