"""Which positions of a prompt hold tokens of a kind, and as many others drawn at random."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.data.images import Images
from interp.data.prompts import Prompts, prose
from interp.models.model import Model
from interp.run.statistics import Expected, Statistic

RARE_SHARE = 0.05


def attention_to(
    kind: Callable[[Model, Prompts], Bool[Tensor, "n pos"]],
) -> Callable[[Model, Prompts], dict[str, Statistic]]:
    """A detector's statistics: the mass on tokens of a kind, and on as many others, after a quarter."""

    def statistics(model: Model, prompts: Prompts) -> dict[str, Statistic]:
        rows = prompts.content & (prompts.positions >= prompts.length // 4)
        keys = kind(model, prompts)
        others = as_many(keys, prompts)
        return {"score": Expected(keys.float(), rows), "null": Expected(others.float(), rows)}

    return statistics


def delimiters(model: Model, prompts: Prompts) -> Bool[Tensor, "n pos"]:
    """Tokens of nothing but punctuation and line breaks; the lead token and separators not among them."""
    ids = prompts.ids.unique()
    texts = model.tokens(ids.tolist())
    chosen = ids[torch.tensor([_is_delimiter(text) for text in texts])]
    return torch.isin(prompts.ids, chosen) & prompts.content


def _is_delimiter(text: str) -> bool:
    marks = [c for c in text if c == "\n" or not c.isspace()]
    return bool(marks) and all(c == "\n" or unicodedata.category(c)[0] == "P" for c in marks)


def rare(model: Model, prompts: Prompts) -> Bool[Tensor, "n pos"]:
    """The rarest tokens that together make up 5 % of the shipped prose, of what is content."""
    counts = _counts(model.tokenizer, model.spec.d_vocab or 0)
    order = counts.argsort(stable=True)
    few = order[counts[order].cumsum(0) <= RARE_SHARE * counts.sum()]
    return torch.isin(prompts.ids, few) & prompts.content


@lru_cache(maxsize=2)
def _counts(tokenizer, d_vocab: int) -> Tensor:
    """How often each token occurs in the shipped prose."""
    ids = torch.tensor(tokenizer(prose(), add_special_tokens=False)["input_ids"])
    return torch.bincount(ids, minlength=d_vocab)


def as_many(
    chosen: Bool[Tensor, "n pos"], prompts: Prompts | Images, seed: int = 0
) -> Bool[Tensor, "n pos"]:
    """In every prompt as many positions of its content, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(chosen.shape, generator=generator)
    order[~prompts.content] = 2.0
    rank = order.argsort(dim=1).argsort(dim=1)
    return rank < chosen.sum(1, keepdim=True)
