"""Induction heads: attention to what followed the current token last time, and what it does to logits.

Olsson et al. 2022 define induction heads by two things on repeated random tokens: *prefix matching*
(attend to the successor of the earlier copy) and *copying* (raise the attended token's logit). Both
are here, as separate columns, because they come apart in real models: heads that match prefixes
without copying directly write something later heads read.
"""

import torch

from circuits.heads.detector import Detector, PerPrompt, offset_key, score_on_control
from circuits.heads.prompt_sets import REPEATED
from interp.data.prompts import Prompts
from interp.devices import wide
from interp.models.model import Model
from interp.run.cache import Run
from interp.run.statistics import Mass


def _statistics(model: Model, prompts: Prompts) -> dict[str, Mass]:
    return {"score": Mass(offset_key(prompts, prompts.period - 1), prompts.second_half)}


INDUCTION = Detector(
    name="induction",
    title="Induction",
    letter="I",
    description="Prefix matching: mean attention in the second copy of repeated random tokens to the "
    "token after the first copy. It does not show copying: see the next score.",
    source="Olsson et al. 2022, In-context Learning and Induction Heads, prefix-matching score; threshold ours",
    reads=REPEATED,
    null="the same rows and keys where the second half is fresh tokens (no repeat)",
    threshold=0.4,
    margin=0.3,
    rank=0,
    statistics=_statistics,
    combine=score_on_control,
    causal_only=True,
    min_layers=2,
    serves="repeated",
)


@torch.no_grad()
def copying_logit(model: Model, prompts: Prompts, run: Run) -> PerPrompt:
    """Direct effect of each head on the logit of the token after the first copy, in logits.

    z_h W_O^h · g/σ · (W_U[t] − mean W_U), averaged over the second half: t is the token that prefix
    matching attends to, g and σ the final norm's gain and scale, σ frozen. The direction is pulled
    back through W_O, so no [pos, head, d_model] tensor is formed. Heads whose output passes a norm
    or a gate before it enters the residual stream have no such direct path: NaN.
    """
    rows = torch.arange(prompts.lead + prompts.period, prompts.length)
    targets = prompts.ids[:, rows - prompts.period + 1].to(model.device)
    W_U = model.W_U
    direction = wide(W_U.T[targets]) - wide(W_U).mean(dim=1)
    final = run.cache[f"resid_post.{model.n_layers - 1}"][:, rows]
    direction = model.final_norm.pull_back(direction, at=final) * model.spec.logit_scale
    out = torch.full((len(prompts), model.n_layers, model.spec.n_heads), torch.nan)
    for layer in run.cache.layers("z"):
        block = model.spec.blocks[layer]
        if block.attn_write is None or not block.direct or block.between:
            continue
        if any(later.rescales for later in model.spec.blocks[layer:]):
            continue  # the write is not at the logits what it was here
        z = wide(run.cache[f"z.{layer}"][:, rows])
        pulled = torch.einsum("bpm,hdm->bphd", direction, wide(model.W_O(layer)))
        out[:, layer, : z.shape[2]] = block.attn_write.scale * (z * pulled).sum(-1).mean(1).cpu()
    return out


INDUCTION_COPYING = Detector(
    name="induction_copying",
    title="Induction copying",
    letter="K",
    description="Direct effect of the head on the logit of the token it should copy, in logits, on the "
    "second copy of repeated random tokens. A score, not a label: later layers may use what a head "
    "writes in other ways.",
    source="after Olsson et al. 2022, copying score; ours is the centred direct logit attribution, not their ratio",
    reads=REPEATED,
    null="the same token's logit where the second half is fresh tokens",
    threshold=None,
    margin=0.0,
    rank=1,
    unit="logits",
    measure=copying_logit,
    captures=lambda model: ("z", f"resid_post.{model.n_layers - 1}"),
    causal_only=True,
    min_layers=2,
    serves="repeated",
)
