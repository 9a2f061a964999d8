"""Gates that what is computed opens: numbers of a token's or a row's own that multiply what a block writes.

Diffusion transformers condition their blocks so (adaLN-Zero: Peebles & Xie 2023, section 3.2): one linear layer
of the conditioning returns shifts, scales and gates side by side, and `resid_post = resid_pre + gate · out`. No
parameter is such a gate: it is seen in every run, where its module returns it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

THROUGH: dict[str, Callable[[Tensor], Tensor]] = {
    "": torch.clone,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""What a module's output may pass before it is a gate."""


@dataclass(frozen=True)
class Gate:
    """The `chunk`-th d_model entries of what `module` returns, `through` a function of THROUGH.

    It returns [batch pos n·d_model], or one gate for all positions of a row [batch n·d_model].
    """

    module: str
    chunk: int = 0
    through: str = ""

    def __str__(self) -> str:
        return f"{self.through} of '{self.module}'" if self.through else f"'{self.module}'"

    def of(self, output: Tensor, rows: int, d_model: int) -> Tensor:
        """[batch pos d_model] of what the module returned for `rows` inputs; pos is 1 where it is one for all.

        >>> both = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> Gate("adaLN", chunk=1).of(both, rows=1, d_model=2)
        tensor([[[3., 4.]]])
        """
        chunks = output.reshape(rows, -1, output.shape[-1])
        chunk = chunks[..., self.chunk * d_model : (self.chunk + 1) * d_model]
        return THROUGH[self.through](chunk)
