"""Evidence prompts: short texts, or images, whose attention patterns the report shows for every head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from interp.data.images import Images
from interp.data.prompts import frame, repeated_tokens, text_windows
from interp.models.model import Model
from interp.run.batch import Batch

LENGTH = 64
BYTES = 12 * 2**20
"""Patterns beyond this size (one byte a weight) are left out: the page would not open quickly."""
SENTENCE = "When Mary and John went to the store, John gave a drink to"


@dataclass(frozen=True)
class Evidence:
    """One prompt, and a name for each of its positions: a token, or a patch as "row,column"."""

    title: str
    batch: Batch
    tokens: list[str]


def evidence_prompts(model: Model, n: int, seed: int) -> list[Evidence]:
    """At most `n` prompts: repeated random tokens, a sentence, windows of prose."""
    found: list[tuple[str, torch.Tensor]] = []
    lead, tail = frame(model)
    around = len(lead) + len(tail)
    repeated, _ = repeated_tokens(model, 1, length=(LENGTH - around) // 2, seed=seed)
    found.append(("repeated random tokens", repeated.ids[0]))
    if model.tokenizer is not None:
        sentence = torch.tensor(model.tokenizer(SENTENCE, add_special_tokens=False)["input_ids"])
        room = (model.spec.n_ctx or LENGTH) - around
        if len(sentence) <= min(LENGTH, room):
            whole = torch.cat([lead, sentence, tail])
            found.append(("a sentence with a repeated name", whole))
        windows = text_windows(model, max(n - len(found), 1), length=LENGTH - around, seed=seed)
        found += [(f"prose {i + 1}", row) for i, row in enumerate(windows.ids)]
    return [
        Evidence(title, Batch.of_ids(ids[None]), model.tokens(ids.tolist()))
        for title, ids in found[:n]
    ]


def evidence_images(images: Images, n: int) -> list[Evidence]:
    """The first `n` images, their positions named by row and column of the patch."""
    names = [f" {label}" for label in images.grid.labels]  # pages write tokens one after the other
    return [
        Evidence(title, images.rows(slice(i, i + 1)).batch, names)
        for i, title in enumerate(images.titles[:n])
    ]


def evidence_patterns(model: Model, prompts: list[Evidence]) -> np.ndarray:
    """round(255 √A) of every head on every prompt: uint8 [n_prompts n_layers n_heads pos pos].

    Padded with 0 to the longest prompt. The root keeps small weights visible in a byte.
    """
    longest = max(len(prompt.tokens) for prompt in prompts)
    shape = (model.n_layers, model.spec.n_heads, longest, longest)
    prompts = prompts[: BYTES // int(np.prod(shape))]
    patterns = np.zeros((len(prompts), *shape), dtype=np.uint8)
    for place, prompt in enumerate(prompts):
        run = model.run(prompt.batch, capture=["pattern"], logits=False)
        for layer, pattern in run.cache.by_layer("pattern").items():
            n = min(pattern.shape[2], len(prompt.tokens))
            pattern = pattern[0, :, :n, :n]  # what is no token's comes behind: padding, global keys
            root = (255 * pattern.float().clamp(0, 1).sqrt()).round().to(torch.uint8)
            patterns[place, layer, : root.shape[0], : root.shape[1], : root.shape[2]] = (
                root.cpu().numpy()
            )
    return patterns
