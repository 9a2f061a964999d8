"""The verified map of a model: where its attention, its writes and its unembedding are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Write:
    """What a block adds to the residual stream: `scale` times the output of `module`."""

    module: str
    scale: float = 1.0


@dataclass(frozen=True)
class Source:
    """Activations that are columns of a linear layer's output: `out[..., columns]`.

    `columns` is [heads, d_head]; `input` names what the layer reads: "resid_pre", or the module
    (a norm) whose output it reads.
    """

    module: str
    columns: Tensor
    input: str


@dataclass(frozen=True)
class BlockMap:
    """Addresses inside one block; None where the block has no such thing or it was not found.

    `parallel`: attention and MLP read the same input. `direct`: the attention output is written as
    it is (times `attn_write.scale`), with no norm in between. `W_out`: the one linear layer that makes
    mlp_out from the neurons (`d_mlp` of them).
    """

    name: str
    attention: str | None = None
    n_heads: int = 0
    n_kv_heads: int = 0
    d_head: int = 0
    W_O: str | None = None
    v: Source | None = None
    attn_write: Write | None = None
    W_out: str | None = None
    d_mlp: int = 0
    mlp_out: str | None = None
    mlp_write: Write | None = None
    parallel: bool = False
    direct: bool = False


@dataclass(frozen=True)
class Check:
    """One identity tried on the probe: the largest relative error, beside what was allowed."""

    name: str
    passed: bool
    error: float
    allowed: float
    detail: str = ""


@dataclass(frozen=True)
class Spec:
    """The map of a model and the identities that vouch for it.

    `refused` names every site that this model cannot give, with the reason.
    `first_position` is the number the model gives its first position (RoBERTa counts from
    pad_token_id + 1). `logit_scale` and `logit_softcap` say what the model does to `W_U`'s output.
    """

    family: str
    stack: str
    blocks: tuple[BlockMap, ...]
    d_model: int
    causal: bool
    d_vocab: int | None = None
    n_ctx: int | None = None
    first_position: int = 0
    embedding: str | None = None
    final_norm: str | None = None
    unembedding: str | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tuple_blocks: bool = False
    copies: frozenset[str] = frozenset()
    checks: tuple[Check, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        """Blocks of the stack, those without attention included."""
        return len(self.blocks)

    @property
    def n_heads(self) -> int:
        """Query heads of the widest layer."""
        return max((block.n_heads for block in self.blocks), default=0)

    @property
    def n_kv_heads(self) -> int:
        """Key/value heads of the widest layer."""
        return max((block.n_kv_heads for block in self.blocks), default=0)

    @property
    def d_head(self) -> int:
        """Width of z of the widest layer."""
        return max((block.d_head for block in self.blocks), default=0)

    @property
    def facts(self) -> dict[str, Any]:
        """Family and sizes, as reports and `interp inspect` show them."""
        names = ("family", "n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_vocab")
        return {name: getattr(self, name) for name in names}

    @property
    def attention_layers(self) -> list[int]:
        """Layers whose attention is seen through the window."""
        return [layer for layer, block in enumerate(self.blocks) if block.attention]

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Every (layer, head)."""
        return [
            (layer, head)
            for layer, block in enumerate(self.blocks)
            for head in range(block.n_heads)
        ]

    def kv_group(self, layer: int, head: int) -> int:
        """The key/value head that a query head reads."""
        block = self.blocks[layer]
        return head // (block.n_heads // block.n_kv_heads)


def first_tensor(value) -> Tensor | None:
    """The tensor that a module call is about: itself, or the first of a tuple or of a model output."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)) and value:
        return first_tensor(value[0])
    return None


def with_first(value, tensor: Tensor):
    """`value` with its first tensor replaced."""
    if isinstance(value, Tensor):
        return tensor
    return type(value)([with_first(value[0], tensor), *value[1:]])


def module_device(module: nn.Module) -> torch.device:
    """Where a model's inputs go."""
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
