"""The window: one attention function of ours through which every architecture's heads are seen.

Transformers dispatches most models' attention through `AttentionInterface`; what others compute in
their own code is shown to the same watches by `interp.models.own_attention`. While a window
is open on a model, its attention modules call `attend`, which shows q, k, v (after rotary
positions), scores, pattern and z to a `Watch` and lets it change them. Where a watch does not need
the pattern, the computation is PyTorch's SDPA; where it does, the pattern is formed for one chunk of
query rows at a time, so memory grows with the number of tokens and not with its square.

The trap this file closes: an attention function registered *without* a matching entry in
`AttentionMaskInterface` is called with no mask at all, and every model silently becomes
bidirectional. Ours is registered with SDPA's mask function: boolean, or None for "causal".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from interp.models.chunks import chunk_mask, in_chunks, rows_apart
from interp.models.one_thread import one_thread
from interp.models.own_attention import beside_interface, own, own_attention_shown

IMPLEMENTATION = "interp_window"
AT_ONCE = "interp_window_flash"
"""The same function, for modules that call any other once for each row of the batch: transformers hands one whose
name speaks of flash attention all rows in one call, and tells it where each ends."""
CHUNK_BYTES = 24 * 2**20
"""Target size of one chunk of scores, all heads of one layer together."""


class Watch:
    """What is read and changed in one attention call; the base class watches nothing.

    Heads are kept where the attention interface has them: q, k, v are [batch heads pos d_head].
    """

    needs_rows = False
    """Whether scores or patterns are wanted; if not, SDPA computes z."""
    at_once = False
    """Whether scores and patterns are wanted whole, not a chunk of their rows at a time."""
    n_rows = 1
    """How many rows of the batch lie one after the other in what a module of `in_chunks` passes."""

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v to go on with."""
        return q, k, v

    def scores(self, scores: Tensor, start: int) -> Tensor:
        """Masked scores [batch n_heads rows keys] of query rows from `start` on."""
        return scores

    def pattern(self, pattern: Tensor, start: int) -> Tensor:
        """Pattern [batch n_heads rows keys] of query rows from `start` on.

        In a causal model keys after the last row of the chunk are left out: their weight is 0.
        """
        return pattern

    def z(self, z: Tensor) -> Tensor:
        """Head outputs [batch pos n_heads d_head] to go on with."""
        return z


_listeners: dict[nn.Module, Callable[[nn.Module], Watch]] = {}
_explicit: set[int | nn.Module] = set()
"""Ids of configs, and modules, of models that know no kernel but their own and do not say everywhere
that they are causal: they are used to a mask that hides what is hidden, and get one."""
needs_masks: WeakSet[nn.Module] = WeakSet()
"""Models that were wrong without such a mask on their probe: they make something of it (more keys, say)."""
softmax_in_float32: WeakSet[nn.Module] = WeakSet()
"""Models in float64 that were wrong on their probe but with the softmax in float32, as most eager attention has it."""


def window_mask(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """SDPA's mask, left out where a kernel knows it without being told; `_explicit` models get eager's."""
    mask = eager_mask if id(config) in _explicit else sdpa_mask
    return mask(*args, config=config, **kwargs)


def _in_need_of_masks(modules: list[nn.Module]) -> set[int | nn.Module]:
    """What of a model belongs into `_explicit`."""
    found: set[int | nn.Module] = set()
    for module in modules:
        if isinstance(module, PreTrainedModel) and not module._supports_sdpa:
            parts = list(module.modules())
            said = [part.is_causal for part in parts if hasattr(part, "is_causal")]
            if not said or not all(said) or module in needs_masks:
                found |= {id(module.config), *parts}
    return found


@contextmanager
def implementation(model: nn.Module, name: str) -> Iterator[None]:
    """The attention function called `name` in all configs of `model`; their own again afterwards.

    Ours is AT_ONCE in configs of modules `in_chunks`.
    """
    configs: dict[int, Any] = {
        id(config): config
        for module in model.modules()
        if hasattr(config := getattr(module, "config", None), "_attn_implementation_internal")
    }
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    whole = {
        id(getattr(module, "config", None)) for module in model.modules() if module in in_chunks
    }
    try:
        for key, config in configs.items():
            ours = name == IMPLEMENTATION and key in whole
            config._attn_implementation_internal = AT_ONCE if ours else name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


@contextmanager
def window(model: nn.Module, listener: Callable[[nn.Module], Watch]) -> Iterator[None]:
    """Route every attention call inside `model` to the Watch that `listener(module)` returns.

    The model's configs name our function inside the `with` and their own again after it, also when
    an exception flies. Modules that compute attention themselves are watched doing so. Other threads wait.
    """
    with one_thread(model):
        yield from _opened(model, listener)


def _opened(model: nn.Module, listener: Callable[[nn.Module], Watch]) -> Iterator[None]:
    modules = list(model.modules())
    outer = {module: _listeners.get(module) for module in modules}
    explicit = _in_need_of_masks(modules) - _explicit
    themselves = [module for module in modules if module in own]
    alone = [module for module in themselves if outer[module] is None]
    try:
        _explicit.update(explicit)
        _listeners.update(dict.fromkeys(modules, listener))
        with ExitStack() as stack:
            if themselves:
                watch_of = lambda module: _listeners[module](module)  # noqa: E731
                stack.enter_context(own_attention_shown(alone, watch_of, _kernel))
            if not themselves or any(module in beside_interface for module in themselves):
                stack.enter_context(implementation(model, IMPLEMENTATION))
            yield
    finally:
        _explicit.difference_update(explicit)
        for module, listening in outer.items():
            if listening is None:
                _listeners.pop(module, None)
            else:
                _listeners[module] = listening


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """z [batch pos n_heads d_head] of one attention call, shown to whoever watches `module`.

    Sink logits are one a head (`s_aux` [n_heads]) or one a query (`sinks` [batch n_heads q 1]).
    `indices` [batch q few] are the keys that an indexer picked for each query: it sees no others.
    `cu_seq_lens_q` says, of a module `in_chunks`, where the chunks of its one row begin, and where the last ends.
    """
    watch = _listeners[module](module) if module in _listeners else Watch()
    narrow = query.dtype == torch.float64 and module in softmax_in_float32
    in_one = cu_seq_lens_q is not None and module in in_chunks
    if cu_seq_lens_q is not None and in_one:
        query, key, value = (rows_apart(x, watch.n_rows) for x in (query, key, value))
        attention_mask = chunk_mask(cu_seq_lens_q, watch.n_rows, causal=bool(is_causal))
    if indices is not None:
        attention_mask = _only_picked(attention_mask, indices, key.shape[2])
    if module in _explicit:
        is_causal = False
    query, key, value = watch.inputs(query, key, value)
    sinks = s_aux.reshape(1, -1, 1, 1) if s_aux is not None else sinks
    if watch.needs_rows or softcap is not None or sinks is not None or narrow:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal) and attention_mask is None and query.shape[2] > 1
        scaling = float(query.shape[-1] ** -0.5) if scaling is None else scaling
        z = _attend_in_chunks(
            watch,
            query,
            key,
            value,
            mask=attention_mask,
            causal=causal,
            scaling=scaling,
            softcap=softcap,
            sinks=sinks,
            bias=position_bias,
            dropout=dropout if module.training else 0.0,
            narrow=narrow,
        )
    else:
        z, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            position_bias=position_bias,
            **kwargs,
        )
    z = watch.z(z)
    return z.flatten(0, 1)[None] if in_one else z, None


def _kernel(
    watch: Watch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `scaled_dot_product_attention` returns [batch n_heads pos d_head], shown to `watch`."""
    query, key, value = watch.inputs(query, key, value)
    if watch.needs_rows:
        z = _attend_in_chunks(
            watch,
            query,
            key,
            value,
            mask=attn_mask,
            causal=is_causal,
            scaling=float(query.shape[-1] ** -0.5) if scale is None else scale,
            softcap=None,
            sinks=None,
            bias=None,
            dropout=dropout_p,
        )
    else:
        z = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        ).transpose(1, 2)
    return watch.z(z).transpose(1, 2)


def _attend_in_chunks(
    watch: Watch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    dropout: float,
    narrow: bool = False,
) -> Tensor:
    """z computed row chunk by row chunk, each chunk's scores and pattern passing through `watch`.

    `narrow`: the softmax is one of float32 also where scores are in float64.
    """
    n_queries, n_keys = query.shape[2], key.shape[2]
    outputs = []
    chunks = row_chunks(query.shape[0] * query.shape[1], n_queries, n_keys)
    # The graph of gradients keeps every chunk: one of them saves as much as many.
    if torch.is_grad_enabled() or watch.at_once:
        chunks = [(0, n_queries)]
    for start, stop in chunks:
        # A causal row sees no key after itself: leave those keys out instead of masking them.
        keys = min(stop, n_keys) if causal else n_keys
        scores = _grouped(query[:, :, start:stop], key[:, :, :keys].transpose(-1, -2)) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if bias is not None:
            scores = scores + bias[:, :, start:stop, :keys]
        hidden = torch.finfo(scores.dtype).min
        if causal:
            later = torch.ones(stop - start, keys, dtype=torch.bool, device=scores.device)
            scores = scores.masked_fill(later.triu(start + 1), hidden)
        elif mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask[:, :, start:stop, :keys], hidden)
        elif mask is not None:
            scores = scores + mask[:, :, start:stop, :keys]
        scores = watch.scores(scores, start)
        few = sinks if sinks is None or sinks.shape[2] == 1 else sinks[:, :, start:stop]
        pattern = _softmax(scores.float() if narrow else scores, few).to(query.dtype)
        pattern = watch.pattern(pattern, start)
        weights = nn.functional.dropout(pattern, p=dropout) if dropout else pattern
        outputs.append(_grouped(weights, value[:, :, :keys]))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _only_picked(mask: Tensor | None, indices: Tensor, n_keys: int) -> Tensor:
    """The mask with every key hidden that is not among a query's `indices`."""
    shape = (*indices.shape[:-1], n_keys)
    picked = torch.zeros(shape, dtype=torch.bool, device=indices.device)
    picked = picked.scatter(-1, indices.long(), True)[:, None]
    if mask is None:
        return picked
    if mask.dtype == torch.bool:
        return mask & picked
    return mask.masked_fill(~picked, torch.finfo(mask.dtype).min)


def row_chunks(n_maps: int, n_queries: int, n_keys: int) -> list[tuple[int, int]]:
    """Query row ranges whose scores take about CHUNK_BYTES for `n_maps` (batch × heads) maps."""
    rows = max(16, CHUNK_BYTES // (4 * n_maps * n_keys))
    return [(start, min(start + rows, n_queries)) for start in range(0, n_queries, rows)]


def _grouped(left: Tensor, right: Tensor) -> Tensor:
    """left @ right where `right` has one map a kv group: heads of a group share it, uncopied."""
    batch, n_heads, rows, inner = left.shape
    groups = right.shape[1]
    if groups == n_heads:
        return left @ right
    stacked = left.reshape(batch, groups, n_heads // groups * rows, inner)
    return (stacked @ right).reshape(batch, n_heads, rows, right.shape[-1])


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over keys in float32; a sink logit takes its share and is then dropped."""
    if sinks is None:
        return torch.softmax(
            scores, dim=-1, dtype=torch.float32 if scores.dtype != torch.float64 else None
        )
    extra = sinks.expand(*scores.shape[:-1], 1).to(scores.dtype)
    logits = torch.cat([scores, extra], dim=-1)
    logits = logits - logits.amax(dim=-1, keepdim=True)
    return torch.softmax(logits, dim=-1)[..., :-1]


for _name in (IMPLEMENTATION, AT_ONCE):
    AttentionInterface.register(_name, attend)
    AttentionMaskInterface.register(_name, window_mask)
