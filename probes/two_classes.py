"""Texts of two classes as a causal check takes them: read, with answers, split, and batched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from interp.data.labelled import LabelledTexts, labelled_texts, of, word_span
from interp.errors import BadInput, unknown
from interp.models.model import Model
from interp.run.batch import Batch
from probes.captured import last_token_of

FEWEST_GROUPS = 6
Data = LabelledTexts | Mapping[str, Sequence[str]] | str | Path


def two_classes(
    data: Data, classes: Sequence[str] | None, template: str, until_word: bool
) -> tuple[LabelledTexts, tuple[str, str]]:
    """The texts of two classes as the model reads them, and the classes."""
    if isinstance(data, Mapping):
        labels = [label for label, texts in data.items() for _ in texts]
        data = of([text for texts in data.values() for text in texts], labels)
    elif not isinstance(data, LabelledTexts):
        data = labelled_texts(data)
    known = sorted(set(data.labels))
    for label in classes or ():
        if label not in known:
            raise unknown(f"class of {data.name}", label, known)
    chosen = known if classes is None else list(classes)
    if len(chosen) != 2:
        raise BadInput(
            f"{data.name} has {len(chosen)} classes ({', '.join(chosen)}); two are compared: choose "
            "them with classes="
        )
    data = data.rows([i for i, label in enumerate(data.labels) if label in chosen])
    texts = data.texts
    if until_word:
        if data.words is None:
            raise BadInput(
                f"until_word: {data.name} does not say which word each text is asked about"
            )
        ends = [word_span(*pair) for pair in zip(texts, data.words, strict=True)]
        texts = tuple(t[: end[1]] for t, end in zip(texts, ends, strict=True) if end is not None)
    texts = tuple(template.replace("{text}", text) for text in texts)
    return replace(data, texts=texts), (chosen[0], chosen[1])


def answer_ids(
    model: Model, answers: Sequence[str] | None, pair: tuple[str, str]
) -> tuple[list[int], list[int]] | None:
    """Token ids of the answers of class 2 and of class 1."""
    if answers is None:
        return None
    ids: dict[str, list[int]] = {label: [] for label in pair}
    for answer in answers:
        label, _, word = answer.partition("=")
        if label not in ids:
            raise unknown("class with answers", label, pair)
        spaced = model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        ids[label].append(model.token_id(f" {word}" if len(spaced) == 1 else word))
    if empty := [label for label in pair if not ids[label]]:
        raise BadInput(f"class '{empty[0]}' has no answer: add {empty[0]}=word")
    if both := set(ids[pair[0]]) & set(ids[pair[1]]):
        token = model.tokens(both)[0]
        raise BadInput(f"both classes have the answer {token!r}: their log-odds would be 0")
    return ids[pair[1]], ids[pair[0]]


def split(
    texts: LabelledTexts, y: np.ndarray, items: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Items to find a direction on, and items of other groups to judge it on: a third, or `items`."""
    groups = np.asarray(texts.groups)
    names = np.random.default_rng(seed).permutation(np.unique(groups))
    if len(names) < FEWEST_GROUPS:
        raise BadInput(
            f"{texts.name} has {len(names)} groups: {FEWEST_GROUPS} or more are needed to find a "
            "direction on some and judge it on others"
        )
    most, chosen = min(items, len(y) // 3), np.zeros(len(y), dtype=bool)
    for name in names:
        grown = chosen | (groups == name)
        chosen = grown if grown.sum() <= most else chosen
    for part, what in ((y[~chosen], "found"), (y[chosen], "judged")):
        if not 0 < part.sum() < len(part):
            raise BadInput(
                f"{texts.name}: the texts on which the direction is {what} lack a class; give more or "
                "smaller groups, more items, or another seed"
            )
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def batch_at(model: Model, texts: LabelledTexts, where: str) -> tuple[Batch, Int[Tensor, " items"]]:
    """The texts padded on the left, so that all end together, and where each is changed."""
    batch = model.as_batch(model.tokenize(texts.texts, padding_side="left"))
    width = batch.ids.shape[1]
    if where == "last":
        return batch, torch.full((len(texts),), width - 1)
    assert texts.words is not None
    within = [last_token_of(model, *pair) for pair in zip(texts.texts, texts.words, strict=True)]
    mask = torch.ones_like(batch.ids) if batch.mask is None else batch.mask
    return batch, torch.tensor(within) + width - mask.sum(1).cpu()
