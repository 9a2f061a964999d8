"""Word pairs asked in context and without: prompts, their answers' tokens, and which pairs are held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from interp.data.answers import begun
from interp.data.word_pairs import WordPair, word_pairs
from interp.errors import BadInput
from interp.models.model import Model
from interp.run.batch import Batch

TEMPLATE = "Q: {source}\nA:"
"""How a pair is asked: the target follows, after a space unless the template ends in one."""
SEPARATOR = "\n\n"
PARTS = {"train": 0.4, "valid": 0.3, "test": 0.3}
"""Shares of the pairs that vectors are made of, that settings are chosen on, and that are reported."""
LEAST = 4

Pairs = Sequence[tuple[str, str]]


class Asked(NamedTuple):
    """Prompts padded on the left, and the first token of each answer."""

    batch: Batch
    answers: Int[Tensor, " n"]


@dataclass(frozen=True)
class WordTask:
    """Pairs that a model's tokens can tell apart, in three parts that share no pair.

    Attributes:
        first: the token that the target begins with, as it follows the prompt.
        left_out: reasons why pairs were left out, and how many.
    """

    name: str
    template: str
    train: tuple[WordPair, ...]
    valid: tuple[WordPair, ...]
    test: tuple[WordPair, ...]
    first: Mapping[WordPair, int]
    left_out: Mapping[str, int]

    def zero_shot(self, model: Model, part: str) -> Asked:
        """Every pair of a part asked by itself."""
        pairs = getattr(self, part)
        return self._asked(model, [self._question(pair) for pair in pairs], pairs)

    def in_context(
        self, model: Model, part: str, *, shots: int, n: int | None = None, seed: int = 0,
        shuffled: bool = False,
    ) -> Asked:  # fmt: skip
        """Pairs of a part asked after `shots` answered training pairs, never the same pair.

        Args:
            n: how many prompts; by default one a pair. shuffled: the shots' answers change places, so
                that no task can be read off them.
        """
        if shots < 1 or shots > len(self.train) - 1:
            raise BadInput(
                f"shots={shots}: '{self.name}' has {len(self.train)} training pairs; wanted 1 to "
                f"{len(self.train) - 1}"
            )
        draw = np.random.default_rng(seed)
        pairs = getattr(self, part)
        count = len(pairs) if n is None else n
        order = np.concatenate(
            [draw.permutation(len(pairs)) for _ in range(-(-count // len(pairs)))]
        )
        chosen = list(pairs) if n is None else [pairs[i] for i in order[:count]]
        texts = []
        for pair in chosen:
            others = [other for other in self.train if other != pair]
            shown = [others[i] for i in draw.choice(len(others), shots, replace=False)]
            targets = [other.target for other in shown]
            if shuffled:
                step = int(draw.integers(1, shots)) if shots > 1 else 0
                targets = targets[step:] + targets[:step]
            answered = [
                self._question(other) + _joint(self.template) + target + SEPARATOR
                for other, target in zip(shown, targets, strict=True)
            ]
            texts.append("".join(answered) + self._question(pair))
        return self._asked(model, texts, chosen)

    def _question(self, pair: WordPair) -> str:
        return self.template.format(source=pair.source)

    def _asked(self, model: Model, texts: list[str], pairs: Sequence[WordPair]) -> Asked:
        batch = model.as_batch(model.tokenize(texts, padding_side="left"))
        return Asked(batch, torch.tensor([self.first[pair] for pair in pairs]).to(batch.ids.device))


def word_task(
    model: Model,
    name: str,
    pairs: Pairs | None = None,
    *,
    template: str = TEMPLATE,
    most: int | None = None,
    seed: int = 0,
) -> WordTask:
    """Pairs of a shipped set (or your own) that the model's tokens can tell apart, split in three.

    Left out are pairs whose target does not simply follow the prompt, begins with the same token as
    another target (the first token alone is judged) or with the first token of its own source.

    Args:
        pairs: (source, target) pairs, in place of the shipped set `name`.
        template: text with {source} in it; the target follows it.
        most: use at most this many of the pairs that are left, drawn.

    Raises:
        BadInput: no tokenizer; an unknown set; a template without {source}; too few pairs left.
    """
    check_template(template)
    known = word_pairs(name) if pairs is None else [WordPair(*pair) for pair in pairs]
    first: dict[WordPair, int] = {}
    left_out: list[str] = []
    for pair in dict.fromkeys(known):
        text = template.format(source=pair.source)
        target = begun(model, text, pair.target, "target")
        if target.token is None:
            left_out.append(target.why)
        elif begun(model, text, pair.source).token == target.token:
            left_out.append("target and source begin with the same token")
        else:
            first[pair] = target.token
    targets: dict[int, set[str]] = {}
    for pair, token in first.items():
        targets.setdefault(token, set()).add(pair.target)
    for pair, token in list(first.items()):
        if len(targets[token]) > 1:
            left_out.append("the target begins with the same token as another one")
            del first[pair]
    order = np.random.default_rng(seed).permutation(len(first))
    kept = [list(first)[i] for i in order[: len(order) if most is None else most]]
    n = len(kept)
    ends = [round(n * PARTS["train"]), round(n * (PARTS["train"] + PARTS["valid"]))]
    parts = kept[: ends[0]], kept[ends[0] : ends[1]], kept[ends[1] :]
    if min(map(len, parts)) < LEAST:
        reason = Counter(left_out).most_common(1)
        raise BadInput(
            f"'{name}' has {n} of {len(known)} pairs that {model.id}'s tokens can tell apart"
            + (f" (of {reason[0][1]}: {reason[0][0]})" if reason else "")
            + f"; wanted at least {round(LEAST / 0.3)} for training, validation and test"
        )
    train, valid, test = (tuple(part) for part in parts)
    return WordTask(name, template, train, valid, test, first, Counter(left_out))


def check_template(template: str) -> None:
    """Raise BadInput for a template that no source could be put into."""
    if template.count("{source}") != 1 or "{" in template.replace("{source}", ""):
        raise BadInput(f"template {template!r} must contain {{source}} once, as in {TEMPLATE!r}")


def task_names(tasks: str | Sequence[str] | Mapping[str, Pairs]) -> dict[str, Pairs | None]:
    """Names of shipped sets ("capital,antonym", or a list), or sets of your own by name."""
    if isinstance(tasks, Mapping):
        found: dict[str, Pairs | None] = dict(tasks)
    else:
        names = tasks.split(",") if isinstance(tasks, str) else list(tasks)
        found = {name.strip(): None for name in names if name.strip()}
        for name in found:
            word_pairs(name)
    if not found:
        raise BadInput("no task is named: write capital,antonym for example")
    return found


def _joint(template: str) -> str:
    return "" if template[-1].isspace() else " "
