"""Needle in a haystack: a sentence planted in a long text, and a question about it.

Where the tokenizer has a chat template (as the default model's has), the model is asked a question and
told to answer with a sentence of the text; where not, the sentence's first words stand at the end of the
prompt and the model goes on (plain copying).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from interp.data.prompts import lead_token, prose
from interp.errors import BadInput
from interp.models.model import Model

LENGTHS = (256, 512)
"""Prompt lengths in tokens, where the model reads that much."""

EXTRA_STEPS = 6
"""Decode steps beyond the needle's length: an answer may begin with a few words of its own."""


@dataclass(frozen=True)
class Needle:
    """A sentence that stands in no text, a question that it answers, and the words of it that do.

    The rest of the sentence stands in the question too: to repeat that is not to retrieve. Without `answer`
    the whole sentence is asked for.
    """

    sentence: str
    question: str
    answer: str = ""


NEEDLES = tuple(
    Needle(sentence, question, answer)
    for sentence, question, answer in (
        (
            "The brass key to the boathouse hangs behind the clock in the kitchen.",
            "Where does the brass key to the boathouse hang?",
            "behind the clock in the kitchen.",
        ),
        (
            "In the tower of the museum Doctor Ivanov keeps eleven yellow parrots.",
            "What does Doctor Ivanov keep in the tower of the museum?",
            "eleven yellow parrots.",
        ),
        (
            "The secret ingredient of the Lisbon soup is a spoonful of burnt honey.",
            "What is the secret ingredient of the Lisbon soup?",
            "a spoonful of burnt honey.",
        ),
        (
            "The night train to Oslo leaves from platform nine at a quarter past three.",
            "When does the night train to Oslo leave?",
            "from platform nine at a quarter past three.",
        ),
        (
            "Captain Moreno painted his submarine bright orange to please his daughter.",
            "Why did Captain Moreno paint his submarine?",
            "to please his daughter.",
        ),
        (
            "The password of the old computer is written under the third blue chair.",
            "Where is the password of the old computer written?",
            "under the third blue chair.",
        ),
        (
            "Every penguin in the zoo of Nairobi is named after a famous violin player.",
            "After whom is every penguin in the zoo of Nairobi named?",
            "a famous violin player.",
        ),
        (
            "The winner of the chess match gave her gold medal to a hungry taxi driver.",
            "Who got the gold medal of the winner of the chess match?",
            "a hungry taxi driver.",
        ),
        (
            "The robot in the library answers questions about volcanoes only on Fridays.",
            "When does the robot in the library answer questions about volcanoes?",
            "only on Fridays.",
        ),
        (
            "On the roof of the science building Professor Tanaka grows purple potatoes.",
            "What does Professor Tanaka grow on the roof of the science building?",
            "purple potatoes.",
        ),
        (
            "The map of the hidden cave was folded inside a box of peppermint cookies.",
            "Where was the map of the hidden cave?",
            "inside a box of peppermint cookies.",
        ),
        (
            "The bridge to the island is closed because a family of otters lives on it.",
            "Why is the bridge to the island closed?",
            "because a family of otters lives on it.",
        ),
    )
)

ASK = "\n\nQuestion: {question}\nAnswer with a sentence of the text."


@dataclass(frozen=True, eq=False)
class NeedleRun:
    """A prompt and what is known about its positions.

    Attributes:
        ids: the prompt [pos]; the answer is expected to follow it.
        start, width: the span that is asked for: `ids[start : start + width]`.
        control: where a span of `lead + width` tokens starts in the haystack, apart from the needle.
        needle: number in NEEDLES; -1 for another one. depth: where it stands, 0 first to 1 last.
        lead: how many tokens of the needle stand before the span that an answer may begin with: they are in
            the question too, and do not count.
    """

    ids: Int[Tensor, " pos"]
    start: int
    width: int
    control: int
    needle: int = -1
    depth: float = 0.5
    lead: int = 0

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.ids)

    @property
    def answer(self) -> Int[Tensor, " width"]:
        """The tokens that are asked for."""
        return self.ids[self.start : self.start + self.width]

    @property
    def whole(self) -> Int[Tensor, " lead+width"]:
        """The needle up to their last: what a model says that answers in a sentence."""
        return self.ids[self.start - self.lead : self.start + self.width]


def needle_runs(
    model: Model,
    n: int,
    *,
    lengths: Sequence[int] | None = None,
    text: str | None = None,
    needles: Sequence[Needle] = NEEDLES,
    seed: int = 0,
) -> list[NeedleRun]:
    """`n` prompts over needles × depths × lengths, each of exactly its length in tokens.

    Needles and lengths take turns; depths are spread evenly over the haystack, in random order, and
    moved back to the end of a sentence. Every prompt has its own stretch of the text.

    Args:
        lengths: of prompts, in tokens; by default those of LENGTHS that the model reads.
        text: the haystack; by default the shipped novel.
        seed: which stretches, depths and control spans.

    Raises:
        BadInput: no tokenizer; a text too short for needle or haystack; a length over n_ctx, or with
            no room for needle and question.
    """
    if model.tokenizer is None:
        raise BadInput(f"{model.id} has no tokenizer: needle prompts cannot be made")
    generator = np.random.default_rng(seed)
    hay = _encode(model, prose() if text is None else text)
    ends = _sentence_ends(model, hay)
    room = (model.spec.n_ctx or 1 << 30) - EXTRA_STEPS
    lengths = _lengths(model, lengths, needles)
    depths = (generator.permutation(n) + generator.random(n)) / n
    order = generator.permutation(len(needles))
    made = []
    for i in range(n):
        which = int(order[i % len(order)])
        length = lengths[(i // len(order) + i) % len(lengths)]
        parts = _parts(model, needles[which], room)
        made.append(_planted(model, parts, hay, ends, length, float(depths[i]), which, generator))
    return made


@dataclass(frozen=True)
class _Parts:
    """Token ids of a prompt without its haystack; `asked` is the first token of the needle that is asked for
    and how many are, `lead` how many before it an answer may begin with."""

    before: list[int]
    needle: list[int]
    after: list[int]
    line: list[int]
    asked: tuple[int, int]
    lead: int

    @property
    def fixed(self) -> int:
        return len(self.before) + len(self.needle) + len(self.after) + 2 * len(self.line)


def _parts(model: Model, needle: Needle, room: int) -> _Parts:
    """Chat template where there is one, else plain copying; a model of few tokens gets less of the needle."""
    words, line = _encode(model, needle.sentence), _encode(model, "\n")
    words = words[: max(room // 6, 4)]
    if getattr(model.tokenizer, "chat_template", None):
        mark = "\x00hay\x00"
        content = mark + ASK.format(question=needle.question)
        chat = [{"role": "user", "content": content}]
        whole = model.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        before, after = whole.split(mark)
        asked = _asked(model, needle, words)
        return _Parts(_encode(model, before), words, _encode(model, after), line, asked, asked[0])
    cue = max(2, len(words) // 4)
    before, asked = lead_token(model).tolist(), (cue, len(words) - cue)
    return _Parts(before, words, line + words[:cue], line, asked, 0)


def _asked(model: Model, needle: Needle, words: Sequence[int]) -> tuple[int, int]:
    """First token of the answer in the sentence `words`, and its tokens; all where it is not (wholly) there."""
    before, found, _ = needle.sentence.partition(needle.answer or needle.sentence)
    first, end = (
        _shared(words, _encode(model, text)) for text in (before.rstrip(), before + found)
    )
    whole = _encode(model, needle.sentence)
    return (first, end - first) if first < end and len(words) == len(whole) else (0, len(words))


def _shared(words: Sequence[int], beginning: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    pairs = zip(words, beginning, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(words), len(beginning)))


def _encode(model: Model, text: str) -> list[int]:
    return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def _sentence_ends(model: Model, ids: Sequence[int]) -> np.ndarray:
    """Positions after which a sentence has ended."""
    kinds = sorted(set(ids))
    ending = {
        token
        for token, text in zip(kinds, model.tokens(kinds), strict=True)
        if text.rstrip().endswith((".", "!", "?"))
    }
    return np.array([i + 1 for i, token in enumerate(ids) if token in ending], dtype=int)


def _lengths(model: Model, lengths: Sequence[int] | None, needles: Sequence[Needle]) -> list[int]:
    n_ctx = model.spec.n_ctx or 1 << 30
    steps = max(len(_encode(model, needle.sentence)) for needle in needles) + EXTRA_STEPS
    if lengths is None:
        return [length for length in LENGTHS if length + steps <= n_ctx] or [n_ctx * 3 // 4]
    if not lengths:
        raise BadInput("lengths is empty: give at least one prompt length in tokens")
    if max(lengths) + steps > n_ctx:
        raise BadInput(
            f"a haystack of {max(lengths)} tokens and an answer of {steps} do not fit: {model.id} reads "
            f"at most {n_ctx} (n_ctx); give lengths up to {n_ctx - steps}"
        )
    return list(lengths)


def _planted(
    model: Model,
    parts: _Parts,
    text: Sequence[int],
    ends: np.ndarray,
    length: int,
    depth: float,
    which: int,
    generator: np.random.Generator,
) -> NeedleRun:
    needed, width = length - parts.fixed, len(parts.needle)
    if len(text) < width:
        raise BadInput(
            f"the text has {len(text)} tokens, the needle {width}: give a text longer than the needle"
        )
    if needed < 2 * width:
        raise BadInput(
            f"a prompt of {length} tokens leaves {needed} for the haystack beside needle and question; "
            f"lengths from {parts.fixed + 2 * width} on do"
        )
    if len(text) < needed:
        raise BadInput(
            f"the text has {len(text)} tokens; a prompt of {length} needs a haystack of {needed}: give a "
            "longer text or a shorter length"
        )
    first = int(generator.integers(len(text) - needed + 1))
    hay = list(text[first : first + needed])
    at = round(depth * needed)
    before = ends[(ends > first) & (ends <= first + at)]
    at = int(before[-1]) - first if len(before) else 0
    start = len(parts.before) + at + len(parts.line)
    ids = [
        *parts.before,
        *hay[:at],
        *parts.line,
        *parts.needle,
        *parts.line,
        *hay[at:],
        *parts.after,
    ]
    end, hay_end = start + width + len(parts.line), length - len(parts.after)
    starts = [
        *range(len(parts.before), start - len(parts.line) - width + 1),
        *range(end, hay_end - width + 1),
    ]
    first, asked = parts.asked
    return NeedleRun(
        torch.tensor(ids),
        start + first,
        asked,
        int(generator.choice(starts)),
        which,
        at / needed,
        parts.lead,
    )
