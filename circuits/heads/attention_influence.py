"""AttentionInfluence: how much a text needs the retrieval heads, as a score of that text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch import Tensor

from circuits.heads.retrieval import Head, mask_heads
from interp.data.prompts import lead_token
from interp.errors import BadInput
from interp.metrics import loss
from interp.models.model import Model
from interp.run.cache import Run


def attention_influence(
    model: Model,
    texts: Sequence[str] | Sequence[Tensor],
    heads: Sequence[Head],
    *,
    max_tokens: int | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> pd.DataFrame:
    """Relative rise of each text's loss when these heads attend evenly.

    influence = (L_masked − L) / L, L the mean loss of the text's tokens. Compare texts of one domain
    only: the score also depends on how predictable a text is. It is a score of the text; it does not
    show that these heads are retrieval heads, nor that other heads would not matter as much.

    Args:
        texts: or token ids [pos] of each; the lead token (BOS, …) is put before both.
        heads: (layer, head) pairs; published: the 5 % with the highest retrieval score
            (`circuits.heads.retrieval.top_heads`).
        max_tokens: of a text that are read, its first ones; by default as many as n_ctx has room for.

    Returns: a row for each text: "text" (its number), "tokens" (read), "cut" (whether some were left out),
        "loss" and "loss_masked" (nats a token), "influence" (no unit).

    Raises:
        BadInput: no heads, no texts, or a text of under two tokens.

    >>> found = attention_influence(tiny_model(), [torch.arange(3, 40)], heads=[(0, 1), (1, 2)])
    >>> bool((found["influence"] == (found["loss_masked"] - found["loss"]) / found["loss"]).all())
    True

    Source: Hua et al. 2025, AttentionInfluence, §3. Differs: a row of the masked pattern is uniform over
        the keys that a causal model sees (1 / (q + 1) in row q, zeroed queries), where the paper writes 1 / L.
    """
    if not len(texts) or not len(heads):
        raise BadInput(f"{len(texts)} texts and {len(heads)} heads: give at least one of each")
    lead = lead_token(model)
    room = (model.spec.n_ctx or 1 << 30) - len(lead)
    room = room if max_tokens is None else min(room, max_tokens)
    all_ids = [_ids(model, text) for text in texts]
    if short := [i for i, ids in enumerate(all_ids) if min(len(ids), room) < 2]:
        raise BadInput(f"text {short[0]} has under two tokens to read: nothing to predict")
    first = min(layer for layer, _ in heads)
    rows = []
    for number, ids in enumerate(all_ids):
        read = torch.cat([lead, ids[:room]])[None]
        clean = model.run(read, capture=[f"resid_pre.{first}"])

        def measure(run: Run, read: Tensor = read) -> float:
            assert run.logits is not None
            return float(loss(run.logits[:, :-1], read[:, 1:]))

        before = measure(clean)
        (after,) = model.replay(clean, [[mask_heads(heads)]], measure)
        rows.append(
            {
                "text": number,
                "tokens": min(len(ids), room),
                "cut": len(ids) > room,
                "loss": before,
                "loss_masked": after,
                "influence": (after - before) / before,
            }
        )
        advance(1)
    return pd.DataFrame(rows)


def _ids(model: Model, text: str | Tensor) -> Tensor:
    if isinstance(text, Tensor):
        return text.cpu()
    if model.tokenizer is None:
        raise BadInput(f"{model.id} has no tokenizer: give token ids in place of texts")
    return torch.tensor(
        model.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long
    )
