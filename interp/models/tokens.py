"""Tokens of a model: texts as a batch of ids, and ids as texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from interp.errors import BadInput
from interp.run.batch import Batch


@dataclass(frozen=True)
class Tokens:
    """A tokenizer, or None, of a model with `d_vocab` tokens. `id` is what messages call the model."""

    tokenizer: Any
    id: str
    d_vocab: int

    def batch(
        self, prompts: str | Sequence[str], *, padding_side: str = "right", bos: bool | None = None
    ) -> Batch:
        """Token ids, mask and positions of texts; arguments as in `Model.tokenize`."""
        if self.tokenizer is None:
            raise BadInput(
                f"{self.id} was loaded without a tokenizer: pass token ids, or load with tokenizer="
            )
        texts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(texts, Iterable) or not all(isinstance(text, str) for text in texts):
            raise BadInput(
                f"a {type(prompts).__name__} that is no text or list of texts; token ids are a tensor "
                "[batch pos]: torch.tensor([[5, 6, 7]])"
            )
        texts = list(texts)
        if not texts or not all(texts):
            raise BadInput(
                f"prompt {texts.index('') if texts else 0} is empty: give at least one token of text"
            )
        if padding_side not in ("left", "right"):
            raise BadInput(f"padding_side '{padding_side}' is neither 'left' nor 'right'")
        rows = [list(self.tokenizer(text)["input_ids"]) for text in texts]
        first = self.tokenizer.bos_token_id
        if bos is True and first is None:
            raise BadInput(f"the tokenizer of {self.id} has no BOS token; leave out bos=True")
        if bos is not None and first is not None:
            rows = [row[1:] if row and row[0] == first else row for row in rows]
            rows = [[first, *row] for row in rows] if bos else rows
        if empty := [text for text, row in zip(texts, rows, strict=True) if not row]:
            raise BadInput(f"prompt {empty[0]!r} has no tokens: give at least one token of text")
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = torch.full((len(rows), longest), pad)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            where = slice(longest - len(row), None) if padding_side == "left" else slice(len(row))
            ids[i, where], mask[i, where] = torch.tensor(row), True
        return Batch.of_ids(ids, mask)

    def texts(self, ids: Iterable[int]) -> list[str]:
        """Each token's text, as it reads on its own; `#id` without a tokenizer."""
        if isinstance(ids, str) or getattr(ids, "ndim", 1) != 1:
            raise BadInput("tokens of one row of ids: model.tokens(model.tokenize(text).ids[0])")
        if self.tokenizer is None:
            return [f"#{int(i)}" for i in ids]
        return [self.tokenizer.decode([int(i)], clean_up_tokenization_spaces=False) for i in ids]

    def id_of(self, token: str | int) -> int:
        """The id of one token, given as its text or its id; as `Model.token_id`."""
        if isinstance(token, int):
            if 0 <= token < self.d_vocab:
                return token
            raise BadInput(
                f"token id {token} is outside the vocabulary: {self.id} has ids 0 to {self.d_vocab - 1}"
            )
        if not token:
            raise BadInput(
                "the token is empty: wanted the text of one token, as ' Paris', or its id"
            )
        if self.tokenizer is None:
            raise BadInput(
                f"{self.id} was loaded without a tokenizer: give the id of {token!r} instead"
            )
        ids = list(self.tokenizer(token, add_special_tokens=False)["input_ids"])
        if len(ids) == 1:
            unknown = getattr(self.tokenizer, "unk_token", None)
            if self.texts(ids) == [unknown] and token.strip() != unknown:
                raise BadInput(f"{token!r} is not in the vocabulary of {self.id}: {unknown} there")
            return self.id_of(ids[0])
        spaced = self.tokenizer(f" {token}", add_special_tokens=False)["input_ids"]
        hint = f"did you mean {' ' + token!r}?" if len(spaced) == 1 else "name one of them"
        split = " + ".join(repr(part) for part in self.texts(ids)) or "nothing"
        raise BadInput(
            f"{token!r} is {len(ids)} tokens of {self.id}, wanted one: it splits into {split}; {hint}"
        )
