"""The map of a stack while it is drawn: its layers as they were recorded, and what is known of them so far."""

from __future__ import annotations

from dataclasses import dataclass

from interp.models.block_map import BlockMap
from interp.models.recording import Recording
from interp.models.stack import Layer
from interp.run.batch import Batch


@dataclass(frozen=True)
class Draft:
    """What the probe knows of a stack's layers; `blocks` say it, one a layer.

    `seen` is the recording of `batch`; `key` says which argument of a layer's call is the hidden state.
    `refused` takes down, site by site, what cannot be given and why; the first reason stays.
    """

    seen: Recording
    batch: Batch
    key: int | str
    layers: list[Layer]
    blocks: list[BlockMap]
    refused: dict[str, str]
    absent: frozenset[str] = frozenset()
    """Those of the refused sites that a layer does not have, where others do."""

    @property
    def pairs(self) -> list[tuple[Layer, BlockMap]]:
        """Each layer with its block."""
        return list(zip(self.layers, self.blocks, strict=True))

    def refuse(self, site: str, why: str) -> None:
        """Take down a reason, where there is none yet."""
        self.refused.setdefault(site, why)
