"""What hooks do on modules whose outputs a block writes: captures and edits are of the write, not of the output.

A write is the output times a factor: a number, one a channel, or a gate that is seen in the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.block_map import Carry
from interp.models.gate import Gate
from interp.models.hooks import BlockInput, untouched
from interp.models.spec import first_tensor


class Opening:
    """A gate in one pass, times what else a write is multiplied with: seen where its module returns."""

    def __init__(self, gate: Gate, fixed: float | Tensor, rows: int, d_model: int):
        self.gate, self.fixed, self.rows, self.d_model = gate, fixed, rows, d_model
        self._seen: Tensor | None = None

    def see(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Hook of the gate's module."""
        x = first_tensor(output)
        assert x is not None
        self._seen = _times(self.gate.of(x, self.rows, self.d_model), self.fixed)

    def times(self, x: Tensor) -> Tensor:
        """What of x [batch pos d_model] is let through."""
        return x * self._open().to(x.device)

    def over(self, new: Tensor, x: Tensor) -> Tensor:
        """What comes through as `new`, where x would have come.

        Raises:
            Refused: the gate is closed where `new` is not 0, or where a gradient is wanted.
        """
        by = self._open().to(new.device)
        closed = (by == 0).expand_as(new)
        if not closed.any():
            return new / by
        if torch.is_grad_enabled() or new[closed].any():
            what = (
                "no gradient leads there" if torch.is_grad_enabled() else "nothing is written there"
            )
            raise Refused(
                f"the gate of what is written ({self.gate}) is closed (0) in {int(closed.sum())} entries: {what}; "
                "edit or differentiate the stream, as resid_post"
            )
        return torch.where(closed, x, new / by.masked_fill(by == 0, 1))

    def _open(self) -> Tensor:
        if self._seen is None:
            raise Refused(f"the gate of what is written ({self.gate}) was not computed before it")
        return self._seen


Factor = float | Tensor | Opening
"""What a write multiplies its module's output with: a number, one a channel [d_model], or a gate."""


def write_change(name: str, layer: int, factor: Factor, touch) -> Callable[[Tensor], Tensor]:
    """Change of a module's output that carries edits of what the block writes (`factor` times it)."""

    def change(x: Tensor) -> Tensor:
        written = _times(x, factor)
        new = touch(name, layer, written)
        # With gradients, what is captured has to lie on the way to the logits.
        return x if new is written and untouched(x, written) else _over(new, factor, x)

    return change


class Middle:
    """resid_mid where nothing norms it: block input plus the writes before it, seen at the last of them.

    Where the block rescales its input first, `carry` is how. An edit of resid_mid becomes a change of
    that last write, which the stream then carries.
    """

    def __init__(
        self,
        layer: int,
        factors: Sequence[Factor],
        touch,
        pre: BlockInput,
        carry: Carry | None = None,
    ):
        self.layer, self.factors, self.touch, self.pre = layer, factors, touch, pre
        self.carry = carry
        self.normed: Tensor | None = None
        self.earlier: list[Tensor] = []

    def keep_normed(self, x: Tensor) -> Tensor:
        """Note the output of the norm that the block goes on with instead of its input."""
        self.normed = x
        return x

    def keep(self, x: Tensor) -> Tensor:
        """Note the output of a module that writes before the last one."""
        self.earlier.append(_times(x, self.factors[len(self.earlier)]))
        return x

    def change(self, x: Tensor) -> Tensor:
        """Change of the output of the last module that writes before resid_mid."""
        assert self.pre.resid is not None
        before = (self.pre.resid if self.normed is None else self.normed).to(x.device)
        if self.carry is not None:  # a stream begun anew may be of another shape
            before = torch.zeros_like(x) if self.carry.nothing else self.carry(before)
        for write in self.earlier:
            before = before + write
        self.earlier.clear()
        written = _times(x, self.factors[-1])
        mid = before + written
        edited = self.touch("resid_mid", self.layer, mid)
        if edited is mid and not torch.is_grad_enabled():
            return x
        return _over(edited - before, self.factors[-1], x)


def _times(x: Tensor, factor: Factor) -> Tensor:
    if isinstance(factor, Opening):
        return factor.times(x)
    if isinstance(factor, Tensor):
        return x * factor.to(x.device)
    return x if factor == 1 else x * factor


def _over(new: Tensor, factor: Factor, x: Tensor) -> Tensor:
    """What makes `new` when it is multiplied with the factor, where x would have been."""
    if isinstance(factor, Opening):
        return factor.over(new, x)
    if isinstance(factor, Tensor):
        return new / factor.to(new.device)
    return new if factor == 1 else new / factor
