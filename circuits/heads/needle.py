"""Needle in a haystack: a sentence planted in a long text, and which token every head looks at while
the model repeats it.

The prompt is read once, with PyTorch's SDPA and a KV cache. Each decode step then has a single query,
so all that is ever formed of a pattern is one row a head and step: memory grows with the context, not
with its square.

Where the tokenizer has a chat template (as the default model's has), the model is asked a question and
told to answer with a sentence of the text; where not, the sentence's first words stand at the end of the
prompt and the model goes on (plain copying).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.data.prompts import lead_token, prose
from interp.errors import BadInput, Refused
from interp.models.attention import Watch, window
from interp.models.model import Model

LENGTHS = (256, 512)
"""Prompt lengths in tokens, where the model reads that much."""

EXTRA_STEPS = 6
"""Decode steps beyond the needle's length: an answer may begin with a few words of its own."""

TOKENS_PER_BATCH = 2048
RECALLED = 0.5
"""A run succeeds where the answer holds more than this share of the tokens asked for (as published)."""


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


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a model answered to one run, and where each head looked at every step.

    Attributes:
        tokens: the answer; -1 after its end [step].
        top: each head's most attended key, the first token included (as published); -1 where a
            layer has no attention or a window does not reach [step n_layers n_heads].
        mass, mass_control: attention on the span asked for and on the control span [step n_layers n_heads].
    """

    run: NeedleRun
    tokens: np.ndarray
    top: np.ndarray
    mass: np.ndarray
    mass_control: np.ndarray

    @property
    def recall(self) -> float:
        """Share of the tokens asked for that the answer holds, each as often as it holds it (ROUGE-1 recall)."""
        left = self.run.answer.tolist()
        for token in self.tokens.tolist():
            if token in left:
                left.remove(token)
        return 1 - len(left) / self.run.width

    @property
    def succeeded(self) -> bool:
        """Whether the model retrieved the needle."""
        return self.recall > RECALLED


# --- prompts -----------------------------------------------------------------------------------


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


# --- decoding ----------------------------------------------------------------------------------


def decode(
    model: Model,
    runs: Sequence[NeedleRun],
    *,
    extra: int = EXTRA_STEPS,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Decoded]:
    """Greedy answers to all runs with every head's most attended key and its mass on the needle, a step.

    A prompt's last token is the first query: the row that predicts an answer's first token is that
    token's. Runs of one length share a batch.

    Args:
        extra: steps beyond the needle's width (and its lead).

    Raises:
        Refused: a model without seen patterns, without logits over tokens, or without a KV cache.
    """
    model.layers_with("pattern")
    _ = model.W_U  # Refused where there is no language-model head
    done: dict[int, Decoded] = {}
    for places in batches(runs):
        found = _decoded(model, [runs[i] for i in places], extra)
        done |= dict(zip(places, found, strict=True))
        advance(len(places))
    return [done[i] for i in range(len(runs))]


def batches(runs: Sequence[NeedleRun]) -> Iterator[list[int]]:
    """Numbers of the runs that share a batch: equally long ones, TOKENS_PER_BATCH tokens together."""
    order = sorted(range(len(runs)), key=lambda i: runs[i].length)
    for length, same in groupby(order, key=lambda i: runs[i].length):
        places, size = list(same), max(1, TOKENS_PER_BATCH // length)
        yield from (places[i : i + size] for i in range(0, len(places), size))


Pattern = Float[Tensor, "batch n_heads rows keys"]


@contextmanager
def rows_shown(model: Model, see: Callable[[int, Pattern], None]) -> Iterator[None]:
    """Inside, `see(layer, rows)` gets every row of attention that is computed, without the masked keys after it.

    What is not seen costs SDPA only: read most of a prompt before.
    """
    layer_of = {
        model.module.get_submodule(block.attention): layer
        for layer, block in enumerate(model.spec.blocks)
        if block.attention
    }

    def listen(module: nn.Module) -> Watch:
        return _Rows(partial(see, layer_of[module])) if module in layer_of else Watch()

    with window(model.module, listen):
        yield


class _Rows(Watch):
    """Hands on the pattern of every call."""

    needs_rows = True

    def __init__(self, see: Callable[[Pattern], None]):
        self.see = see

    def pattern(self, pattern, start):
        self.see(pattern)
        return pattern


@torch.no_grad()
def _decoded(model: Model, runs: Sequence[NeedleRun], extra: int) -> list[Decoded]:
    steps = max(run.lead + run.width for run in runs) + extra
    ids = torch.stack([run.ids for run in runs]).to(model.device)
    if model.spec.n_ctx is not None:
        steps = min(steps, model.spec.n_ctx - ids.shape[1])
    if steps < 1:
        raise BadInput(
            f"a prompt of {ids.shape[1]} tokens leaves no room for an answer: {model.id} reads at most "
            f"{model.spec.n_ctx} (n_ctx); give shorter prompts"
        )
    shape = (len(runs), steps, model.n_layers, model.spec.n_heads)
    top = np.full(shape, -1, dtype=np.int64)
    mass, mass_control = np.full(shape, np.nan), np.full(shape, np.nan)
    step = 0

    def see(layer: int, pattern: Pattern) -> None:
        row, heads = pattern[:, :, -1], pattern.shape[1]
        # A cache of a sliding window has forgotten the first keys: they are missing on the left.
        gone = ids.shape[1] + step - row.shape[-1]
        top[:, step, layer, :heads] = (row.argmax(-1) + gone).cpu().numpy()
        for i, run in enumerate(runs):
            mass[i, step, layer, :heads] = span_mass(row[i], run.start - gone, run.width)
            at = run.control - gone
            mass_control[i, step, layer, :heads] = span_mass(row[i], at, run.width)

    cache = read_prompt(model, ids[:, :-1])
    ending = torch.tensor(_end_tokens(model), dtype=torch.long, device=ids.device)
    tokens = np.full((len(runs), steps), -1, dtype=np.int64)
    last, going = ids[:, -1:], torch.ones(len(runs), dtype=torch.bool, device=ids.device)
    with rows_shown(model, see):
        while step < steps and bool(going.any()):
            logits, cache = read_on(model, last, cache)
            last = logits[:, -1].argmax(-1, keepdim=True)
            going &= ~torch.isin(last[:, 0], ending)
            tokens[:, step] = last[:, 0].where(going, -1).cpu().numpy()
            step += 1
    return [Decoded(run, tokens[i], top[i], mass[i], mass_control[i]) for i, run in enumerate(runs)]


def span_mass(
    rows: Float[Tensor, "*any keys"], start: int, width: int
) -> Float[np.ndarray, "*any"]:
    """Attention on `width` keys from `start` on, which may lie before the first key there is."""
    return rows[..., max(start, 0) : max(start + width, 0)].sum(-1).cpu().numpy()


def read_prompt(model: Model, ids: Int[Tensor, "batch pos"]) -> Any:
    """The KV cache after `ids`, computed with SDPA."""
    with window(model.module, lambda module: Watch()):
        return read_on(model, ids, None)[1]


def read_on(model: Model, ids: Int[Tensor, "batch pos"], cache: Any) -> tuple[Tensor, Any]:
    """Logits (of the last position at least) and the KV cache after `ids`."""
    known = inspect.signature(type(model.module).forward).parameters
    keep = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    output = model.module(input_ids=ids, past_key_values=cache, use_cache=True, **keep)
    if getattr(output, "past_key_values", None) is None:
        raise Refused(
            f"{model.id} keeps no keys and values of earlier tokens: it cannot be decoded"
        )
    return output.logits, output.past_key_values


def _end_tokens(model: Model) -> list[int]:
    """The tokens that end an answer."""
    config = getattr(model.module, "generation_config", None)
    found = [getattr(config, "eos_token_id", None), getattr(model.tokenizer, "eos_token_id", None)]
    flat = [token for ids in found for token in (ids if isinstance(ids, list) else [ids])]
    return sorted({token for token in flat if isinstance(token, int)})
