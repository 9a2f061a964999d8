"""A Batch: the tensors a model is called with, and which positions are real."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Model inputs by name, with a mask of the positions that hold a real token (or patch).

    >>> batch = Batch.of_ids(torch.tensor([[5, 6, 7], [8, 9, 1]]))
    >>> batch.size, batch.repeat(2).ids.shape, bool(batch.padded)
    (2, torch.Size([4, 3]), False)
    """

    inputs: dict[str, Tensor]
    mask: Bool[Tensor, "batch pos"] | None = None

    @staticmethod
    def of_ids(ids: Int[Tensor, "batch pos"], mask: Tensor | None = None) -> Batch:
        """The batch of these token ids; `mask` is False (or 0) at padding."""
        if mask is None or bool(mask.all()):
            return Batch({"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool))
        mask = mask.bool()
        # Positions count real tokens, so that left padding changes nothing (GPT-2 needs to be told).
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}
        return Batch(inputs, mask)

    @staticmethod
    def of_inputs(inputs: Mapping[str, Tensor]) -> Batch:
        """The batch of model inputs by name, such as a Hugging Face tokenizer or processor returns."""
        mask = inputs.get("attention_mask")
        mask = None if mask is None else mask.bool()
        if "input_ids" not in inputs or "position_ids" in inputs:
            return Batch(dict(inputs), mask)
        batch = Batch.of_ids(inputs["input_ids"], mask)
        rest = {name: x for name, x in inputs.items() if name != "attention_mask"}
        return Batch({**rest, **batch.inputs}, batch.mask)

    @property
    def ids(self) -> Int[Tensor, "batch pos"]:
        """Token ids; KeyError for a batch of images."""
        return self.inputs["input_ids"]

    @property
    def size(self) -> int:
        """Number of rows."""
        return next(iter(self.inputs.values())).shape[0]

    @property
    def padded(self) -> bool:
        """Whether any position is padding."""
        return "attention_mask" in self.inputs

    def repeat(self, times: int) -> Batch:
        """`times` copies of all rows, one copy after the other."""
        return self._map(lambda x: x.repeat(times, *[1] * (x.ndim - 1)))

    def rows(self, rows: slice) -> Batch:
        """Some of the rows."""
        return self._map(lambda x: x[rows])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return self._map(lambda x: x.to(device))

    def _map(self, change) -> Batch:
        mask = None if self.mask is None else change(self.mask)
        return Batch({name: change(x) for name, x in self.inputs.items()}, mask)
