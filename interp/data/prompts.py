"""Prompt sets for head detection: repeated random tokens, their control, and English prose.

All rows of a set have the same length and begin with the same lead token (BOS, or what the
tokenizer has instead), so a position means the same thing in every row. A model that reads in both
directions gets its texts as its tokenizer frames them: [CLS] text [SEP], or [CLS] text [SEP] text [SEP].
`prose.txt` is the opening of Jane Austen's *Pride and Prejudice* (1813, public domain).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.errors import BadInput
from interp.models.calls import text_config
from interp.models.model import Model
from interp.run.batch import Batch


@dataclass(frozen=True)
class Prompts:
    """Token ids [n pos] with what is known about their positions.

    Attributes:
        name: "repeated", "unrepeated", "text" or "pairs".
        ids: token ids, all rows equally long.
        lead: how many tokens (0 or 1) stand before the content.
        period: length of the repeated part; 0 where nothing repeats by construction.
        causal: whether the model reads left to right.
        separators: where the tokenizer's separators stand, as in an encoder's prompts; None for none.
        types: token types of pairs, where the tokenizer gives them.
    """

    name: str
    ids: Int[Tensor, "n pos"]
    lead: int
    period: int = 0
    causal: bool = True
    separators: Bool[Tensor, "n pos"] | None = None
    types: Int[Tensor, "n pos"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def length(self) -> int:
        """Tokens a row, lead included."""
        return self.ids.shape[1]

    def rows(self, rows: slice) -> Prompts:
        """Some of the prompts."""
        return self._each(lambda x: x[rows])

    def first(self, length: int) -> Prompts:
        """Only the first `length` positions; for sets without a period."""
        return self._each(lambda x: x[:, :length])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Prompts:
        changed = {
            name: change(value)
            for name in ("ids", "separators", "types")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **changed)

    @property
    def batch(self) -> Batch:
        """What a model is run on."""
        batch = Batch.of_ids(self.ids)
        if self.types is None:
            return batch
        return Batch({**batch.inputs, "token_type_ids": self.types}, batch.mask)

    @property
    def content(self) -> Bool[Tensor, "n pos"]:
        """Everything but the lead token and separators."""
        content = self.positions >= self.lead
        return content if self.separators is None else content & ~self.separators

    @property
    def positions(self) -> Int[Tensor, "n pos"]:
        """0, 1, 2, … in every row."""
        return torch.arange(self.length).expand(len(self), -1)

    @property
    def judged(self) -> Int[Tensor, " m"]:
        """Positions whose next token a loss is taken on: the second copy, or all after the lead."""
        first = self.lead + self.period if self.period else self.lead
        return torch.arange(max(first, 1) - 1, self.length - 1)

    @property
    def second_half(self) -> Bool[Tensor, "n pos"]:
        """Where the second copy stands."""
        return self.content & (self.positions >= self.lead + self.period)


def repeated_tokens(
    model: Model, n: int, *, length: int = 64, seed: int = 0
) -> tuple[Prompts, Prompts]:
    """[lead, r, r] with r distinct random tokens, and the control [lead, r, r'] with a fresh half.

    The control keeps every position and the first half and destroys only the relation: no token of
    r' is in r. Both halves shrink together where the vocabulary or n_ctx is too small.
    """
    generator = torch.Generator().manual_seed(seed)
    usable = plain_tokens(model)
    lead, tail = frame(model)
    width = min(length, len(usable) // 2, _room(model, lead, tail) // 2)
    if width < 8:
        raise BadInput(
            f"{model.id} has room for {width} distinct random tokens twice (vocabulary {len(usable)}, "
            f"n_ctx {model.spec.n_ctx}); repeated prompts need 8"
        )
    rows, controls = [], []
    for _ in range(n):
        picks = usable[torch.randperm(len(usable), generator=generator)[: 2 * width]]
        first, fresh = picks[:width], picks[width:]
        rows.append(torch.cat([lead, first, first, tail]))
        controls.append(torch.cat([lead, first, fresh, tail]))
    causal, marks = model.spec.causal, _last(n, len(rows[0]), len(tail))
    return (
        Prompts("repeated", torch.stack(rows), len(lead), width, causal, marks),
        Prompts("unrepeated", torch.stack(controls), len(lead), width, causal, marks),
    )


def text_windows(
    model: Model, n: int, *, length: int = 128, seed: int = 0, text: str | None = None
) -> Prompts:
    """Windows of `length` consecutive tokens of English prose, each after the lead token.

    Windows do not overlap while the text is long enough for it; `seed` picks which ones.
    """
    lead, tail = frame(model)
    windows = _windows(model, n, min(length, _room(model, lead, tail)), seed, text)
    rows = [torch.cat([lead, window, tail]) for window in windows]
    marks = _last(n, len(rows[0]), len(tail))
    return Prompts("text", torch.stack(rows), len(lead), 0, model.spec.causal, marks)


def paired_windows(model: Model, n: int, *, length: int = 128, seed: int = 0) -> Prompts:
    """Windows of prose cut in two at a random place and joined as the tokenizer joins two texts.

    So the separator between them stands elsewhere in every row, and looking at it is not looking at a
    position. Raises BadInput where the tokenizer separates texts by nothing.
    """
    gaps, types = pair_frame(model)
    if not gaps[1]:
        raise BadInput(f"the tokenizer of {model.id} puts nothing between two texts")
    lead, between, tail = (torch.tensor(gap, dtype=torch.long) for gap in gaps)
    width = min(length, _room(model, lead, between, tail))
    generator = torch.Generator().manual_seed(seed)
    ids, marks, kinds = [], [], []
    for window in _windows(model, n, width, seed, None):
        cut = int(torch.randint(width // 4, width - width // 4, (1,), generator=generator))
        parts = [lead, window[:cut], between, window[cut:], tail]
        ids.append(torch.cat(parts))
        marks.append(torch.cat([torch.full((len(x),), i in (2, 4)) for i, x in enumerate(parts)]))
        if types is not None:
            kinds.append(
                torch.cat([torch.full((len(x),), t) for x, t in zip(parts, types, strict=True)])
            )
    return Prompts(
        "pairs",
        torch.stack(ids),
        len(lead),
        0,
        model.spec.causal,
        torch.stack(marks),
        torch.stack(kinds) if kinds else None,
    )


def _windows(model: Model, n: int, width: int, seed: int, text: str | None) -> list[Tensor]:
    """`n` windows of `width` tokens of a text."""
    ids = text_tokens(model, text)
    if len(ids) < width or width < 16:
        raise BadInput(
            f"the text has {len(ids)} tokens; windows of {width} (at least 16) were wanted"
        )
    generator = torch.Generator().manual_seed(seed)
    if len(ids) // width >= n:
        starts = torch.randperm(len(ids) // width, generator=generator)[:n] * width
    else:
        starts = torch.randint(len(ids) - width + 1, (n,), generator=generator)
    return [ids[start : start + width] for start in starts.tolist()]


def text_tokens(model: Model, text: str | None = None) -> Int[Tensor, " tokens"]:
    """Token ids of a text, the shipped prose by default, without special tokens."""
    if model.tokenizer is None:
        raise BadInput(f"{model.id} has no tokenizer: text prompts cannot be made")
    text = prose() if text is None else text
    return torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"])


@cache
def prose() -> str:
    """The shipped English text."""
    return files("interp.data").joinpath("prose.txt").read_text(encoding="utf-8")


def lead_token(model: Model) -> Int[Tensor, " lead"]:
    """BOS, or CLS, or EOS, whichever the tokenizer (or config) has first; empty if none."""
    _, ids = _lead(model)
    return torch.tensor(ids, dtype=torch.long)


def lead_notes(model: Model) -> list[str]:
    """What a reader of first-token scores has to know where prompts do not begin with BOS."""
    kind, ids = _lead(model)
    stands = len(frame(model)[0]) > 0
    others = kind == "BOS" and getattr(model.tokenizer, "bos_token_id", ids) is None
    if stands and ((kind == "BOS" and not others) or not model.spec.causal):
        return []
    if not stands:
        said = "has no BOS, CLS or EOS token: prompts begin with ordinary text"
    else:
        name = "the BOS of the model's config" if others else kind
        said = f"has no BOS token: prompts begin with {name} ({model.tokens(ids)[0]}) instead"
    sink = ", and it is that token which a first-token sink attends to" if model.spec.causal else ""
    return [f"The tokenizer {said}{sink}."]


def _lead(model: Model) -> tuple[str, list[int]]:
    """What the lead token is, and its id; "" and nothing without one."""
    for source in (model.tokenizer, getattr(model.module, "config", None)):
        for kind in ("BOS", "CLS", "EOS"):
            token = getattr(source, f"{kind.lower()}_token_id", None)
            if isinstance(token, int) and 0 <= token < (model.spec.d_vocab or 0):
                return kind, [token]
    return "", []


def frame(model: Model) -> tuple[Int[Tensor, " lead"], Int[Tensor, " tail"]]:
    """What stands before and after a prompt: in an encoder what its tokenizer puts there.

    Elsewhere `lead_token` and nothing: a model that reads left to right is not told where a text ends.

    >>> frame(tiny_model())
    (tensor([1]), tensor([], dtype=torch.int64))
    """
    if not model.spec.causal and model.tokenizer is not None:
        gaps, _ = _frame_of(model.tokenizer, (SAMPLES[0],))
        if len(gaps[0]) <= 1:
            return tuple(torch.tensor(gap, dtype=torch.long) for gap in gaps)  # type: ignore[return-value]
    return lead_token(model), torch.empty(0, dtype=torch.long)


def pair_frame(model: Model) -> tuple[list[list[int]], list[int] | None]:
    """Token ids before, between and after two texts; token types of those and of the texts, in order."""
    if model.tokenizer is None:
        raise BadInput(f"{model.id} has no tokenizer: text prompts cannot be made")
    return _frame_of(model.tokenizer, SAMPLES)


SAMPLES = ("A truth that is universally acknowledged", "He made no answer")


def _frame_of(tokenizer: Any, texts: tuple[str, ...]) -> tuple[list[list[int]], list[int] | None]:
    """What a tokenizer puts around texts: its ids of all together, less its ids of each alone."""
    found = tokenizer(*texts)
    whole, gaps, cuts = list(found["input_ids"]), [], []
    at = 0
    for text in texts:
        plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        start = at
        while whole[start : start + len(plain)] != plain:
            start += 1
            if start > len(whole):
                raise BadInput(f"the tokenizer reads {text!r} differently beside other text")
        gaps.append(whole[at:start])
        cuts += [at, start]
        at = start + len(plain)
    gaps.append(whole[at:])
    types = found.get("token_type_ids")
    # A gap without tokens has no type of its own, and needs none.
    return gaps, None if types is None else [[*types, 0][cut] for cut in (*cuts, at)]


def _last(n: int, length: int, tail: int) -> Bool[Tensor, "n pos"] | None:
    """Marks the last `tail` positions of every row; None for none."""
    return (torch.arange(length) >= length - tail).expand(n, -1) if tail else None


def _room(model: Model, *frame: Tensor) -> int:
    return (model.spec.n_ctx or 1 << 30) - sum(map(len, frame))


def plain_tokens(model: Model) -> Tensor:
    """Ids of ordinary tokens: no special ones, none the tokenizer does not know."""
    if model.spec.d_vocab is None:
        raise BadInput(f"{model.id} reads no tokens: head detection needs a text model")
    special = set(getattr(model.tokenizer, "all_special_ids", ()) or ())
    special |= set(getattr(model.tokenizer, "added_tokens_decoder", None) or ())
    config = text_config(model.module).to_dict() if hasattr(model.module, "config") else {}
    special |= {
        value
        for key, value in config.items()
        if key.endswith("token_id") and isinstance(value, int)
    }
    known = (
        model.spec.d_vocab
        if model.tokenizer is None
        else min(model.spec.d_vocab, len(model.tokenizer))
    )
    return torch.tensor([i for i in range(known) if i not in special])
