"""Prompt sets that detectors share: one pass over each feeds every detector that reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from interp.data.images import Images, image_prompts, reads_images
from interp.data.prompts import Prompts, paired_windows, repeated_tokens, text_windows
from interp.models.model import Model

TOKENS = 128
"""After the lead of each prompt, where nothing else is said."""


@dataclass(frozen=True)
class PromptSet:
    """Where prompts come from: `make(model, n, seed, tokens)` gives them and their control, if there is one.

    A control is the same prompts with the relation destroyed that detectors look for. `tokens`: after
    the lead of each prompt. `needs_text`: a tokenizer is needed. `of_images`: for models that read images,
    not tokens; `tokens` is then not asked.
    """

    name: str
    title: str
    make: Callable[[Model, int, int, int], tuple[Prompts | Images, Prompts | Images | None]]
    needs_text: bool = False
    of_images: bool = False

    def other_kind(self, model: Model) -> str | None:
        """Why these are for another kind of model; None where a model can read them."""
        if self.of_images == reads_images(model):
            return None
        kind, other = ("images", "text") if self.of_images else ("text", "images")
        return f"needs a model that reads {kind}, and this one reads {other}"


REPEATED = PromptSet(
    "repeated",
    "repeated random tokens",
    lambda model, n, seed, tokens: repeated_tokens(model, n, length=tokens // 2, seed=seed),
)
TEXT = PromptSet(
    "text",
    "windows of English prose",
    lambda model, n, seed, tokens: (text_windows(model, n, length=tokens, seed=seed), None),
    needs_text=True,
)
PAIRS = PromptSet(
    "pairs",
    "pairs of passages of English prose",
    lambda model, n, seed, tokens: (paired_windows(model, n, length=tokens, seed=seed), None),
    needs_text=True,
)
IMAGES = PromptSet(
    "images",
    "images",
    lambda model, n, seed, tokens: (image_prompts(model, n, seed=seed), None),
    of_images=True,
)
