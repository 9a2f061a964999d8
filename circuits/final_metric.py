"""The metric of prompts, read from residual vectors after the last block."""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.measure import Measure
from interp.models.calls import at_home
from interp.models.model import Model
from interp.models.weights import linear_map

ROWS = 1024
"""Vectors, variants × prompts, whose logits over the whole vocabulary exist at once."""


class FinalMetric:
    """What a measure says of final residuals; of logit differences the columns of the answers alone are computed."""

    def __init__(self, model: Model, measure: Measure):
        self.model, self.measure = model, measure

    def __call__(
        self, final: Float[Tensor, "variants n d_model"], rows: slice
    ) -> Float[Tensor, "variants n"]:
        """The metric of every variant of the prompts in `rows`, from the residual at their last position."""
        if self.measure.metric == "logit_diff":
            return self._logit_diffs(final, rows)
        few = self.measure.rows(rows)
        values, step = [], max(1, ROWS // len(few.pairs))
        for start in range(0, len(final), step):
            logits = self.model.unembed(final[start : start + step]).float()
            values += [few(variant) for variant in logits]
        return torch.stack(values)

    @property
    def parameters(self) -> int:
        """How many parameters each vector is multiplied with; 0 where they are a few."""
        spec = self.model.spec
        return 0 if self.measure.metric == "logit_diff" else (spec.d_vocab or 1) * spec.d_model

    def _logit_diffs(self, final: Float[Tensor, "variants n d_model"], rows: slice) -> Tensor:
        """Logits of the answers and wrong answers alone: a few columns of W_U."""
        spec, module = self.model.spec, self.model.module
        weights, W, b = self._answer_columns
        norm = None if spec.final_norm is None else module.get_submodule(spec.final_norm)
        x = final if norm is None else at_home(norm, final.flatten(0, 1)).reshape(final.shape)
        logits = torch.einsum("xnd,nkd->xnk", x.float(), W[rows]) + b[rows]
        logits = logits * spec.logit_scale
        if spec.logit_softcap is not None:
            logits = torch.tanh(logits / spec.logit_softcap) * spec.logit_softcap
        return (logits * weights[rows]).sum(-1)

    @cached_property
    def _answer_columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """(weight in the mean, row of W_Uᵀ, bias) of every answer (+) and wrong answer (−) of a prompt."""
        self.model.layers_with("resid_pre")
        _ = self.model.W_U
        module = self.model.module.get_submodule(self.model.spec.unembedding or "")
        W, b = linear_map(module, self.model.spec.d_model, self.model.device)
        sides = (self.measure.pairs.answers, self.measure.pairs.wrong)
        weights = [
            sign * (ids >= 0) / (ids >= 0).sum(1, keepdim=True)
            for ids, sign in zip(sides, (1, -1), strict=True)
        ]
        ids = torch.cat(sides, 1).clamp_min(0).to(W.device)
        return torch.cat(weights, 1).to(W.device), W.T[ids].float(), b[ids].float()
