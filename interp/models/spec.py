"""The verified map of a model: where its attention, its writes and its unembedding are."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from interp.models.block_map import BlockMap
from interp.sites import ranges


@dataclass(frozen=True)
class Check:
    """One identity tried on the probe: the largest relative error, beside what was allowed.

    `sites` stand on it, and are refused where it fails. Where none does, it is a finding about the architecture (does
    each block read what the one before it returned?), and what it rules out is in `Spec.not_a_sum`.
    """

    name: str
    passed: bool
    error: float
    allowed: float
    detail: str = ""
    sites: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """ "holds", "fails", or "no" of a finding on which no site stands."""
        return "holds" if self.passed else "fails" if self.sites else "no"


@dataclass(frozen=True)
class Spec:
    """The map of a model and the identities that vouch for it.

    `refused` names every site that this model cannot give, with the reason ("attn_write.0" where one layer
    alone cannot); `absent` those among them
    that its architecture does not have (nothing lies between parallel branches; routed experts have no
    one set of neurons; behind a transform there is no "unembedding" of the residual).
    `stack` is the list of the blocks, or several lists (", " in between) whose blocks are called in turn, or
    (" + " in between) whose members make one layer each together.
    Blocks of a model with stages work on streams of several widths and lengths one after the other; `d_model`
    is then that of the last, and `stages` says which layers belong together.
    `hidden` is where a block's call has the hidden state: an index of its arguments, or a keyword. With
    several residual streams `d_model` is what all `n_streams` have together, and attn_out and mlp_out are
    as wide as one of them.
    `readout` are the modules that make logits of the final residual one after the other, where that is
    more than a norm and a linear layer (BERT's head has a transform); ("",) is the model itself, less its blocks.
    `bypassed` says what reads an earlier block's stream besides the one after it, "" if nothing does.
    `dict_key`: where blocks return dicts, what they call the hidden state in them.
    `final_dtype` is what a stream kept in another dtype is rounded to before `final_norm` reads it.
    `first_position` is the number the model gives its first position (RoBERTa counts from
    pad_token_id + 1). `logit_scale` and `logit_softcap` say what the model does to `W_U`'s output.
    `between_kernels` is how far the model's logits are from those with its own eager attention, relative to
    their size, where the map was verified with the latter; else 0.
    `in_float64`: how far what the window makes of its logits is from the model's own, where these agree in float64 and
    the map was verified there; else 0.
    `named`: the stack is one of several that the model has, and was asked for by name. `beside`: its positions are
    not those of the tokens that the model reads besides. `heard`: what the model returns first is made of what its last
    block returns. `together`: what the model returns for a row depends on the
    rows beside it, or the probe had a single row and it was not tried.
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
    final_dtype: torch.dtype | None = None
    unembedding: str | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    readout: tuple[str, ...] = ()
    hidden: int | str = 0
    n_streams: int = 1
    tuple_blocks: bool = False
    dict_key: str = ""
    bypassed: str = ""
    copies: frozenset[str] = frozenset()
    between_kernels: float = 0.0
    in_float64: float = 0.0
    named: bool = False
    beside: bool = False
    together: bool = False
    heard: bool = True
    checks: tuple[Check, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()

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
    def hidden_axes(self) -> tuple[str, ...]:
        """How the last block holds its stream."""
        return self.blocks[-1].axes

    @property
    def facts(self) -> dict[str, Any]:
        """Family and sizes, as reports and `interp inspect` show them."""
        names = ("family", "n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_vocab")
        return {name: getattr(self, name) for name in names}

    @property
    def not_a_sum(self) -> str:
        """Why the final residual is not embedding plus attn_write plus mlp_write; "" where it is."""
        if self.n_streams > 1:
            return f"it has {self.n_streams} residual streams, mixed by weights that depend on the token"
        if self.bypassed:
            return self.bypassed
        for block in self.blocks[1:]:
            if block.cross is not None and block.ahead:
                times = f"{block.cross.carry:.3g} times " if block.cross.carry != 1 else ""
                return (
                    f"'{block.cross.attention}' stands between blocks: '{block.name}' reads {times}what the one "
                    "before it returned, plus cross_write"
                )
        if not self.chained:
            return "something is done to the residual stream between blocks"
        if len(self.stages) > 1:
            widths = ", ".join(str(self.blocks[stage[0]].d_model) for stage in self.stages)
            return f"its blocks work in stages, on streams of widths {widths} one after the other"
        for layer in range(self.n_layers):
            if why := self.refused.get(f"attn_write.{layer}"):
                return why
        if self.shared:
            return f"several layers are calls of one module ('{self.blocks[0].name}')"
        for block in self.blocks:
            if block.norm_pre:
                return (
                    f"'{block.name}' goes on with the normed residual stream ('{block.norm_pre}')"
                )
            if block.rescales:
                return f"'{block.name}' rescales the residual stream before it adds to it"
            if norm := block.norm_mid or block.norm_post:
                return (
                    f"'{block.name}' normalises the residual stream after adding to it ('{norm}')"
                )
            if block.cross is not None:
                sources = [f"{of}write" for of, _ in block.sources]
                return (
                    f"'{block.name}' writes its attention to the source ('{block.cross.attention}') to "
                    f"the residual stream besides (site {' and '.join(sources)})"
                )
            if block.others:
                return (
                    f"'{block.name}' writes something besides attention and MLP to the residual "
                    f"stream ('{block.others[0].module}')"
                )
            if block.convolved:
                return f"'{block.convolved}' mixes positions in what '{block.name}' writes"
            if gain := next((write.gain for write in block.writes if write.gain), None):
                return f"'{block.name}' scales each channel of what it writes ('{gain}')"
            if block.repeated:
                return f"'{block.name}' calls '{min(block.repeated)}' several times"
            if block.turned:
                return f"'{min(block.turned)}' returns channels before positions"
            if any(write.channels is not None for write in block.writes):
                return f"'{block.name}' scales each channel of what it writes"
            if gate := next((write.gate for write in block.writes if write.gate), None):
                return f"'{block.name}' gates what it writes by what it computes ({gate})"
        return ""

    @property
    def stages(self) -> list[range]:
        """Layers that share one residual stream: all of them, in most models.

        A module between two stages makes the stream of the one of that of the other (it merges patches, say).
        """
        starts = [i for i, block in enumerate(self.blocks) if i == 0 or block.starts_stage]
        return [range(a, b) for a, b in pairwise([*starts, self.n_layers])]

    @property
    def chained(self) -> bool:
        """Whether each block of a stage reads what the one before it returned; a replay runs all otherwise."""
        return not self.bypassed and all(c.passed for c in self.checks if c.name == "stream")

    @property
    def shared(self) -> bool:
        """Whether several layers call one and the same module (ALBERT)."""
        blocks = [block.name for block in self.blocks]
        attentions = [block.attention for block in self.blocks if block.attention]
        return any(len(set(names)) < len(names) for names in (blocks, attentions))

    @property
    def attention_layers(self) -> list[int]:
        """Layers whose attention is seen through the window."""
        return [layer for layer, block in enumerate(self.blocks) if block.attention]

    @property
    def unseen(self) -> str:
        """Which layers attend unseen where others are seen, and why; "" where there are none."""
        layers = [i for i in range(self.n_layers) if f"z.{i}" in self.refused]
        if not layers:
            return ""
        return (
            f"the heads of layers {ranges(layers)} are not seen: {self.refused[f'z.{layers[0]}']}"
        )

    @property
    def unheard(self) -> str:
        """That what the model returns first is not made of these layers; "" where it is."""
        if self.heard:
            return ""
        return (
            f"what this model returns first, run.logits, is not made of what '{self.blocks[-1].name}' returns: an edit "
            "may move nothing there; see what it moves in a site, as resid_post of the last layer"
        )

    @property
    def elsewhere(self) -> str:
        """Which heads write to another stream than the blocks', and are at no site; "" where none do."""
        layers = [i for i, block in enumerate(self.blocks) if block.asides]
        if not layers:
            return ""
        asides = dict.fromkeys(aside.attention for aside in self.blocks[layers[0]].asides)
        names = " and ".join(f"'{name}'" for name in asides)
        return (
            f"besides, layers {ranges(layers)} attend for another stream that they return ({names}): the heads that "
            "write to it are at no site; what it carries on to later layers is part of every run and replay"
        )

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
    """The tensor that a module call is about: itself, or the first of a tuple or of a dict."""
    if isinstance(value, Tensor):
        return value
    if type(value) is dict and value:
        return first_tensor(next(iter(value.values())))
    if isinstance(value, (tuple, list)) and value:
        return first_tensor(value[0])
    return None


def with_first(value, tensor: Tensor):
    """`value` with its first tensor replaced."""
    if isinstance(value, Tensor):
        return tensor
    if isinstance(value, dict):
        first = next(iter(value))
        return {**value, first: with_first(value[first], tensor)}
    return type(value)([with_first(value[0], tensor), *value[1:]])


def module_device(module: nn.Module) -> torch.device:
    """Where a model's inputs go: to its first weights, or where accelerate brings those that are offloaded."""
    parameter = next(module.parameters(), None)
    place = torch.device("cpu") if parameter is None else parameter.device
    offloaded = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if place.type == "meta" and offloaded is not None:
        return torch.device(offloaded)
    return place
