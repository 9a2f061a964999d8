"""How a sparse autoencoder is trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How an SAE is trained; see `train_sae`. All are part of a checkpoint's key."""

    rows: int
    batch_size: int
    lr: float
    warmup: float
    decay: float
    sparsity: float
    init: str
    encoder_scale: float
    revive: str
    aux: float
    dead_after: int
    precision: str
    seed: int

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return max(1, self.rows // self.batch_size)
