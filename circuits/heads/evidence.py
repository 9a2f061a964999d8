"""Evidence prompts: short texts whose attention patterns the report shows for every head."""

from __future__ import annotations

import numpy as np
import torch

from interp.data.prompts import lead_token, repeated_tokens, text_windows
from interp.models.model import Model

LENGTH = 64
BYTES = 12 * 2**20
"""Patterns beyond this size (one byte a weight) are left out: the page would not open quickly."""
SENTENCE = "When Mary and John went to the store, John gave a drink to"


def evidence_prompts(model: Model, n: int, seed: int) -> list[tuple[str, torch.Tensor]]:
    """(title, token ids) of at most `n` prompts: repeated random tokens, a sentence, windows of prose."""
    found: list[tuple[str, torch.Tensor]] = []
    lead = lead_token(model)
    repeated, _ = repeated_tokens(model, 1, length=(LENGTH - len(lead)) // 2, seed=seed)
    found.append(("repeated random tokens", repeated.ids[0]))
    if model.tokenizer is not None:
        sentence = torch.tensor(model.tokenizer(SENTENCE, add_special_tokens=False)["input_ids"])
        room = (model.spec.n_ctx or LENGTH) - len(lead)
        if len(sentence) <= min(LENGTH, room):
            found.append(("a sentence with a repeated name", torch.cat([lead, sentence])))
        windows = text_windows(model, max(n - len(found), 1), length=LENGTH - len(lead), seed=seed)
        found += [(f"prose {i + 1}", row) for i, row in enumerate(windows.ids)]
    return found[:n]


def evidence_patterns(model: Model, prompts: list[tuple[str, torch.Tensor]]) -> np.ndarray:
    """round(255 √A) of every head on every prompt: uint8 [n_prompts n_layers n_heads pos pos].

    Padded with 0 to the longest prompt. The root keeps small weights visible in a byte.
    """
    longest = max(len(ids) for _, ids in prompts)
    shape = (model.n_layers, model.spec.n_heads, longest, longest)
    prompts = prompts[: BYTES // int(np.prod(shape))]
    patterns = np.zeros((len(prompts), *shape), dtype=np.uint8)
    for place, (_, ids) in enumerate(prompts):
        run = model.run(ids[None], capture=["pattern"], logits=False)
        for layer, pattern in run.cache.by_layer("pattern").items():
            root = (255 * pattern[0].float().clamp(0, 1).sqrt()).round().to(torch.uint8)
            patterns[place, layer, : root.shape[0], : root.shape[1], : root.shape[2]] = (
                root.cpu().numpy()
            )
    return patterns
