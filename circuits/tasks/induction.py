"""Induction: random tokens, the last of which stood earlier; what followed it then should follow now."""

from __future__ import annotations

import torch

from interp.data.pairs import Pairs
from interp.data.prompts import repeated_tokens
from interp.errors import unknown
from interp.models.model import Model

LENGTH, COPIED = 16, 12
"""Distinct random tokens, and how many of them are repeated."""

CORRUPTIONS = {
    "earlier": "the earlier occurrence is another token: nothing links the last token to the answer",
    "successor": "another token follows the earlier occurrence: the answer is that token",
}


def induction(model: Model, n: int = 32, seed: int = 0, *, corruption: str = "earlier") -> Pairs:
    """Random tokens a b c … whose beginning comes again; after it, the next one should follow.

    Positions earlier (where the last token stood first), next (what followed it, the answer), end.
    The wrong answer is another token of the first copy, or, with "successor", the one put there.
    Needs no tokenizer.

    >>> pairs = induction(tiny_model(), n=2)
    >>> bool((pairs.clean[0, pairs.position("next")[0]] == pairs.answers[0]).all())
    True

    Source: Elhage et al. 2021; Olsson et al. 2022, "In-context learning and induction heads".
    """
    if corruption not in CORRUPTIONS:
        raise unknown("corruption of task 'induction'", corruption, CORRUPTIONS)
    repeated, fresh = repeated_tokens(model, n, length=LENGTH, seed=seed)
    lead, width = repeated.lead, repeated.period
    copied = min(COPIED, width - 2)
    clean = repeated.ids[:, : lead + width + copied]
    new = fresh.ids[:, lead + width]  # in no prompt
    earlier = lead + copied - 1
    corrupted = clean.clone()
    if corruption == "earlier":
        corrupted[:, earlier] = new
        wrong = clean[:, earlier + 2]
    else:
        corrupted[:, earlier + 1] = new
        wrong = new
    return Pairs.of(
        clean,
        corrupted,
        answers=clean[:, earlier + 1],
        wrong=wrong,
        positions={
            "earlier": torch.full((n,), earlier),
            "next": torch.full((n,), earlier + 1),
        },
        name=f"induction:{corruption}",
    )
