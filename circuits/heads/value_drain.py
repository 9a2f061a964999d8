"""Value drain: how little of the first token a head would write, however much it attends to it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.heads.detector import Detector, PerPrompt
from circuits.heads.prompt_sets import TEXT
from interp.data.prompts import Prompts
from interp.models.model import Model
from interp.run.cache import Run


def value_norms(
    model: Model, layer: int, v: Float[Tensor, "n pos n_kv_heads d_head"]
) -> Float[Tensor, "n pos n_heads"]:
    """‖v_k W_O‖ of every token and query head: what the head writes if it attends to that token alone.

    By the [d_head d_head] products W_O W_Oᵀ, so that no [pos n_heads d_model] tensor is formed.
    """
    W_O = model.W_O(layer).float()
    groups = [model.spec.kv_group(layer, head) for head in range(len(W_O))]
    v = v[:, :, groups].float()
    square = torch.einsum("nphd,hde,nphe->nph", v, W_O @ W_O.transpose(-1, -2), v)
    return square.clamp_min(0).sqrt()


@torch.no_grad()
def first_over_median(model: Model, prompts: Prompts, run: Run) -> PerPrompt:
    """‖v_0 W_O‖ over the median of ‖v_k W_O‖ of the later tokens, for every prompt and head."""
    out = torch.full((len(prompts), model.n_layers, model.spec.n_heads), torch.nan)
    for layer, v in run.cache.by_layer("v").items():
        norms = value_norms(model, layer, v).cpu()
        median = norms[:, 1:].median(dim=1).values
        # A head whose values are all 0 drains none of them more than another.
        ratio = torch.where(median > 0, norms[:, 0] / median.clamp_min(1e-30), 1.0)
        out[:, layer, : ratio.shape[1]] = ratio
    return out


def _combine(
    seen: Mapping[str, PerPrompt], control: Mapping[str, PerPrompt] | None
) -> tuple[PerPrompt, PerPrompt]:
    return seen["score"], torch.ones_like(seen["score"])


VALUE_DRAIN = Detector(
    name="value_drain",
    title="Value drain",
    letter="A",
    description="How large a value the first token (BOS where the tokenizer has one) has for this head, on "
    "prose: ‖v₀ W_O‖ over the median of the other tokens. Far below 1, attention parked there writes next to "
    "nothing. A score, not a label; query heads that share a value head differ only by W_O.",
    source="Guo et al. 2024, Active-Dormant Attention Heads (value-state drain; there ‖v‖ alone), Gu et al. "
    "2024, When Attention Sink Emerges",
    reads=TEXT,
    null="1: a token with a value as large as the median",
    threshold=None,
    margin=0.0,
    side=-1,
    rank=28,
    unit="ratio",
    measure=first_over_median,
    captures=lambda model: ("v",),
    combine=_combine,
    causal_only=True,
)
