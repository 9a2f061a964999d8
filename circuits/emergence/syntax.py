"""Syntactic attention structure: how many dependency arcs the heads of a model point at.

After Chen et al. 2024: every relation has the head that follows it best, and the structure's strength is
the share of arcs that these heads get right. Here the heads are chosen on other sentences than they are
judged on, and beside them stands the best fixed distance of each relation, chosen in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.data.arcs import Aligned, Sentence, align, read_arcs
from interp.errors import BadInput
from interp.models.model import Model
from interp.run.batch import Batch

TOGETHER = 16
"""Sentences in one forward: patterns are kept whole."""
FOLDS = 2


class Asked(NamedTuple):
    """An arc as a question to its later word: is the earlier word what it attends to most?"""

    sentence: int
    relation: str
    later: int
    earlier: int


def arcs_asked(sentences: Sequence[Sentence]) -> list[Asked]:
    """Every arc between words (punctuation left out); which end is later is part of the relation."""
    found = []
    for place, sentence in enumerate(sentences):
        for arc in sentence.arcs:
            if any(map(str.isalnum, sentence.words[arc.dependent])):
                first, last = sorted((arc.dependent, arc.head))
                side = "dependent" if last == arc.dependent else "head"
                found.append(Asked(place, f"{arc.relation} from the {side}", last, first))
    return found


def attachment_scores(
    asked: Sequence[Asked], right: Bool[np.ndarray, "arcs answers"]
) -> Float[np.ndarray, " sentences"]:
    """Share of each sentence's arcs that its relations' best answers get right.

    For each relation the answer (a head, or a distance) with most hits on the sentences of other folds is
    judged on this fold's. NaN for a sentence without arcs.

    >>> asked = [Asked(s, "det", 1, 0) for s in range(4)]
    >>> attachment_scores(asked, np.array([[True, False]] * 4)).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    sentence = np.array([arc.sentence for arc in asked])
    relation = np.array([arc.relation for arc in asked])
    hit = np.zeros(len(asked))
    for name in set(relation):
        mine = relation == name
        for fold in range(FOLDS):
            judged = mine & (sentence % FOLDS == fold)
            best = right[mine & ~judged].sum(0).argmax()
            hit[judged] = right[judged, best]
    n = sentence.max() + 1
    with np.errstate(invalid="ignore"):
        return np.bincount(sentence, hit, n) / np.bincount(sentence, minlength=n)


def syntax_scores(model: Model) -> dict[str, np.ndarray]:
    """ "uas" and "uas_distance" [sentences]: shares of arcs found by heads, and by fixed distances.

    Raises:
        BadInput: no tokenizer, or fewer than four shipped sentences that the model can read.
    """
    sentences, tokens = [], []
    for sentence in read_arcs("dependencies").sentences:
        found = align(model, sentence)
        room = model.spec.n_ctx or 1 << 30
        if isinstance(found, Aligned) and len(found.ids) <= room and sentence.tree is not None:
            sentences.append(sentence)
            tokens.append(found)
    if len(sentences) < 4:
        raise BadInput(
            f"{model.id} can read {len(sentences)} of the parsed sentences: syntax needs 4"
        )
    asked = arcs_asked(sentences)
    attended = [
        most
        for start in range(0, len(tokens), TOGETHER)
        for most in _most_attended(model, tokens[start : start + TOGETHER])
    ]
    heads = np.stack([attended[a.sentence][:, a.later] == a.earlier for a in asked])
    reach = max(a.later - a.earlier for a in asked)
    back = np.array([[a.later - a.earlier == far for far in range(1, reach + 1)] for a in asked])
    return {
        "uas": attachment_scores(asked, heads),
        "uas_distance": attachment_scores(asked, back),
    }


@torch.no_grad()
def _most_attended(model: Model, tokens: Sequence[Aligned]) -> list[np.ndarray]:
    """For each sentence the earlier word that every head attends to most from every word [heads words].

    Attention to a word is the sum over its tokens, from a word the mean (Clark et al. 2019).
    """
    longest = max(len(found.ids) for found in tokens)
    ids = torch.zeros(len(tokens), longest, dtype=torch.long)
    mask = torch.zeros(len(tokens), longest, dtype=torch.bool)
    for row, found in enumerate(tokens):
        ids[row, : len(found.ids)], mask[row, : len(found.ids)] = found.ids, True
    run = model.run(Batch.of_ids(ids, mask), capture=["pattern"], logits=False)
    patterns: list[Tensor] = [x.float().cpu() for x in run.cache.by_layer("pattern").values()]
    most = []
    for row, found in enumerate(tokens):
        n = len(found.ids)
        pattern = torch.cat([layer[row, :, :n, :n] for layer in patterns])
        parts = found.parts
        between = parts / parts.sum(-1, keepdim=True) @ pattern @ parts.mT
        later = torch.ones(between.shape[-2:], dtype=torch.bool).triu()
        most.append(between.masked_fill(later, -1.0).argmax(-1).numpy())
    return most
