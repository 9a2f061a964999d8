"""Pairs: clean and corrupted prompts that correspond position by position, with an answer and a wrong one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor

from interp.errors import BadInput, unknown
from interp.run.batch import Batch

NOTHING = -1
"""Fills rows of `answers` and `wrong` that have fewer tokens than others."""


@dataclass(frozen=True)
class Pairs:
    """Prompts of one length; the answer is what the model should predict after the last position.

    Attributes:
        name: of the task.
        clean, corrupted: token ids [n pos].
        answers, wrong: token ids [n k]: the right and the wrong next tokens (rows with fewer end in -1).
        positions: named positions, one a prompt ({"IO": [n], …}); the same in clean and corrupted.
            "end", the last position, is always there.

    >>> pairs = Pairs.of([[5, 6, 7]], [[5, 9, 7]], answers=[3], wrong=[4], positions={"name": [1]})
    >>> len(pairs), pairs.length, sorted(pairs.positions)
    (1, 3, ['end', 'name'])

    Raises:
        BadInput: prompts of unequal length, numbers of rows that differ, positions out of range.
    """

    name: str
    clean: Int[Tensor, "n pos"]
    corrupted: Int[Tensor, "n pos"]
    answers: Int[Tensor, "n k"]
    wrong: Int[Tensor, "n k"]
    positions: Mapping[str, Int[Tensor, " n"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, length = self.clean.shape
        if n == 0 or length == 0:
            raise BadInput(f"task '{self.name}' has no prompts: give at least one pair")
        if self.corrupted.shape != self.clean.shape:
            raise BadInput(
                f"task '{self.name}': clean prompts are {n} × {length} tokens, corrupted ones "
                f"{' × '.join(map(str, self.corrupted.shape))}; a pair corresponds token by token"
            )
        for side, ids in (("answers", self.answers), ("wrong", self.wrong)):
            if ids.ndim != 2 or len(ids) != n or bool((ids[:, :1] < 0).any()):
                raise BadInput(
                    f"task '{self.name}': {side} has shape {tuple(ids.shape)}; wanted at least one "
                    f"token for each of the {n} prompts"
                )
        for place, where in self.positions.items():
            if where.shape != (n,) or int(where.min()) < 0 or int(where.max()) >= length:
                raise BadInput(
                    f"task '{self.name}': position '{place}' must be {n} numbers from 0 to {length - 1}"
                )
        object.__setattr__(
            self, "positions", {**self.positions, "end": torch.full((n,), length - 1)}
        )

    @staticmethod
    def of(
        clean: Sequence[Sequence[int]] | Tensor,
        corrupted: Sequence[Sequence[int]] | Tensor,
        *,
        answers: Sequence[int] | Sequence[Sequence[int]] | Tensor,
        wrong: Sequence[int] | Sequence[Sequence[int]] | Tensor,
        positions: Mapping[str, Sequence[int] | Tensor] | None = None,
        name: str = "pairs",
    ) -> Pairs:
        """Pairs of plain lists; told which prompts are too long or short."""
        rows = {"clean": clean, "corrupted": corrupted}
        lengths = [len(row) for side in rows.values() for row in side]
        if len(set(lengths)) > 1:
            most = max(set(lengths), key=lengths.count)
            odd = [
                f"{side} {i} ({len(row)})"
                for side, prompts in rows.items()
                for i, row in enumerate(prompts)
                if len(row) != most
            ]
            raise BadInput(
                f"task '{name}': prompts must all have one length in tokens; most have {most}, but "
                f"{', '.join(odd[:5])}{' …' if len(odd) > 5 else ''} differ: reword them or leave them out"
            )
        return Pairs(
            name,
            torch.as_tensor(clean),
            torch.as_tensor(corrupted),
            _columns(answers),
            _columns(wrong),
            {place: torch.as_tensor(where) for place, where in (positions or {}).items()},
        )

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def length(self) -> int:
        """Tokens a prompt."""
        return self.clean.shape[1]

    @property
    def end(self) -> int:
        """The last position, whose logits are read."""
        return self.length - 1

    def position(self, name: str) -> Int[Tensor, " n"]:
        """A named position of every prompt; BadInput with the nearest name."""
        if name not in self.positions:
            raise unknown(f"position of task '{self.name}'", name, self.positions)
        return self.positions[name]

    @property
    def digest(self) -> str:
        """Changes when any prompt, answer or named position does: what finished work is kept under."""
        found = hashlib.sha256()
        sides = [self.clean, self.corrupted, self.answers, self.wrong]
        names = sorted(self.positions)
        for ids in (*sides, *(self.positions[name] for name in names)):
            found.update(f"{tuple(ids.shape)}".encode() + ids.cpu().long().numpy().tobytes())
        found.update(repr(names).encode())
        return found.hexdigest()[:16]

    def rows(self, rows: slice | Tensor) -> Pairs:
        """Some of the pairs."""
        positions = {name: where[rows] for name, where in self.positions.items()}
        return replace(
            self,
            clean=self.clean[rows],
            corrupted=self.corrupted[rows],
            answers=self.answers[rows],
            wrong=self.wrong[rows],
            positions=positions,
        )

    @property
    def swapped(self) -> Pairs:
        """Clean and corrupted exchanged (answers too): denoising becomes noising."""
        return Pairs(
            self.name, self.corrupted, self.clean, self.wrong, self.answers, self.positions
        )

    @property
    def clean_batch(self) -> Batch:
        """What a model is run on."""
        return Batch.of_ids(self.clean)

    @property
    def corrupted_batch(self) -> Batch:
        """The corrupted prompts, to run a model on."""
        return Batch.of_ids(self.corrupted)


def _columns(ids: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> Int[Tensor, "n k"]:
    """One row of token ids a prompt, short rows filled with -1."""
    if isinstance(ids, Tensor):
        return ids if ids.ndim == 2 else ids[:, None]
    rows = [[row] if isinstance(row, int) else list(row) for row in ids]
    width = max(map(len, rows), default=0)
    return torch.tensor([row + [NOTHING] * (width - len(row)) for row in rows])
