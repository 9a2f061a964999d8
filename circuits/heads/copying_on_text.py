"""Copying on real prompts: what a head does to the logits of the tokens it looks at.

Weights say what a head would do to any token; this says what it does to those that it attends to, along
its direct path to the logits, on prose and on repeated random tokens (induction's copying half).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.heads.detector import Detector, PerPrompt
from circuits.heads.own_token import Unembedded, seen_by, written
from interp.data.prompts import Prompts, repeated_tokens, text_windows
from interp.models.model import Model


@torch.no_grad()
def attended_token_z(
    model: Model, prompts: Prompts, rows: Bool[Tensor, " pos"], seed: int = 0
) -> tuple[Float[Tensor, "n n_layers n_heads"], Float[Tensor, "n n_layers n_heads"]]:
    """(mean z of the logits of attended tokens, the same of other tokens of the prompt), by prompt and head.

    z[q, k] = (z_q W_O · W_U[token k] − mean over the vocabulary) / sd over the vocabulary: how far the
    head's write at q raises the token at k, final norm folded. The score is Σ A[q, k] z[q, k] / Σ A[q, k]
    over the rows and all keys after the lead token (or after the first, without one): attention parked
    there copies nothing. For the null the prompt's tokens change places, the attention stays.

    Args:
        rows: queries that count [pos].

    Returns: standard deviations over the vocabulary; NaN where no attention is on any such key.

    What it does not show: that the head's attention and its write are due to the same token.
    """
    unembedded = Unembedded(model)
    out = torch.full((2, len(prompts), model.n_layers, model.spec.n_heads), torch.nan)
    generator = torch.Generator().manual_seed(seed)
    first = max(prompts.lead, 1)
    W_Os = {layer: written(model, layer) for layer in model.spec.attention_layers}
    for place, ids in enumerate(prompts.ids):
        run = model.run(ids[None], capture=["z", "pattern"], logits=False)
        directions = unembedded.directions(ids[first:])
        shuffled = directions[torch.randperm(len(directions), generator=generator)]
        for layer, W_O in W_Os.items():
            weights = run.cache[f"pattern.{layer}"][0, :, rows, first:].float()
            z = run.cache[f"z.{layer}"][0, rows].float()
            write = torch.einsum("qhd,hdm->hqm", z, W_O)
            per_sd = weights / unembedded.spread(z, W_O).T[..., None]
            total = weights.sum((1, 2))
            for which, tokens in enumerate((directions, shuffled)):
                raised = torch.einsum("hqm,km->hqk", write, tokens)
                score = (per_sd * raised).sum((1, 2)) / total
                out[which, place, layer, : len(score)] = score.where(total > 0, torch.nan).cpu()
    return out[0], out[1]


def _on_text(model: Model, n: int, seed: int) -> tuple[PerPrompt, PerPrompt]:
    prompts = text_windows(model, n, seed=seed)
    return attended_token_z(model, prompts, prompts.positions[0] >= max(prompts.lead, 1), seed)


def _on_repeats(model: Model, n: int, seed: int) -> tuple[PerPrompt, PerPrompt]:
    prompts, _ = repeated_tokens(model, n, seed=seed)
    return attended_token_z(model, prompts, prompts.second_half[0], seed)


DESCRIPTION = (
    "The head's direct effect on the logits of the tokens it attends to, weighted by that attention (the "
    "first token left out), in standard deviations over the vocabulary of the logits it writes: above 0 it "
    "copies, below 0 it suppresses. A score, not a label: a head may look at a token and write of another."
)
SOURCE = (
    "after Olsson et al. 2022, copying score (there ReLU of centred logits of attended tokens over all, whose "
    "normalisation is ambiguous; ours keeps the sign and divides by the spread over the vocabulary)"
)
NULL = "the same attention and writes, the prompt's tokens exchanged among its positions"

COPYING_ON_TEXT = Detector(
    name="copying_on_text",
    title="Copying on prose",
    letter="Y",
    description="On prose. " + DESCRIPTION,
    source=SOURCE,
    reads=None,
    observe=seen_by(_on_text),
    null=NULL,
    threshold=None,
    margin=0.0,
    rank=26,
    unit="standard deviations over the vocabulary",
    needs_text=True,
    slow=True,
)

COPYING_ON_REPEATS = Detector(
    name="copying_on_repeats",
    title="Copying on repeats",
    letter="Y",
    description="On the second copy of repeated random tokens: induction's copying half. "
    + DESCRIPTION,
    source=SOURCE,
    reads=None,
    observe=seen_by(_on_repeats),
    null=NULL,
    threshold=None,
    margin=0.0,
    rank=27,
    unit="standard deviations over the vocabulary",
    slow=True,
    serves="repeated",
)
