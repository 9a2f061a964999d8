"""How many positions there is room for in the tables of positions that a model reads, wherever it begins in them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from interp.models.calls import call_model
from interp.run.batch import Batch


def room_for_positions(module: nn.Module, batch: Batch) -> int | None:
    """How many tokens' positions the smallest table has rows for, from the furthest row at which a read begins.

    ProphetNet reads one table three times, from its second row for the tokens and from its third for those that it
    predicts: of n rows that is room for n - 2. None where no table is read at rows one after the other, or there is
    none but that of tokens.
    """
    if sum(isinstance(part, nn.Embedding) for part in module.modules()) < 2:
        return None
    with _Reads(batch.ids.shape[1]) as reads:
        call_model(module, batch)
    return min(reads.rooms, default=None)


class _Reads(TorchFunctionMode):
    """Notes how many rows of a table are left from where `n` of them, one after the other, are read."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n
        self.rooms: list[int] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        given = [*args, *(kwargs or {}).values()]
        if getattr(func, "__name__", "") == "embedding" and self.n > 1:
            ids, table = given[:2]
            if isinstance(ids, Tensor) and ids.shape[-1:] == (self.n,):
                first = int(ids.min())
                if bool((ids - first == ids.new_tensor(range(self.n))).all()):
                    self.rooms.append(len(table) - first)
        return func(*args, **(kwargs or {}))
