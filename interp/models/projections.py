"""Heads of one attention call: W_O, which reads z, and the linear layer that v is columns of."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from interp.models.attention import Watch, window
from interp.models.block_map import BlockMap, CrossAttention, Source
from interp.models.calls import call_model
from interp.models.recording import AttentionCall, ModuleCall, Recording
from interp.models.several import HEADS
from interp.models.stack import Layer
from interp.run.batch import Batch

TAGS = 200
"""Base of the numbers that output columns are told apart by."""
PROPORTIONAL = 1e-3
"""How far W_O's input may be from proportional to z: a product of three numbers in float32 or wider;
16-bit inputs get 30 times as much. What is not elementwise is off by the size of the input."""


def attention_map(layer: Layer, block: BlockMap, key: int | str, batch: Batch) -> BlockMap:
    """Heads, W_O where it reads z unchanged, and the source of v of one layer's attention."""
    attention, seen = layer.attention, layer.inside
    assert attention is not None
    z, k, v = (attention.tensors[name] for name in ("z", "k", "v"))
    if block.windows is not None:  # what is padding stands behind
        v = v[:, :, : block.windows.layout.n_pos]
    block = replace(
        block,
        attention=seen.names[attention.module],
        attends=tuple(seen.names[module] for module in layer.attends),
        along=layer.along,
        placed=layer.placed,
        n_heads=z.shape[2],
        n_kv_heads=k.shape[1],
        d_head=z.shape[3],
        v=_source(layer, key, v, batch),
    )
    if layer.along:
        return block if layer.along == HEADS else with_output(layer, block, key)
    readers = [name for name in _projections(seen, z) if _reads(seen.call(name), z)]
    if not readers and (name := _reads_in_turns(seen, block.attention or "", z)):
        block = replace(block, W_O=name, repeated=block.repeated | {name})
        return with_output(layer, block, key)
    if not readers:
        return block
    # Wrappers (an output module that projects and normalises) read z too: the projection is innermost.
    innermost = [
        name for name in readers if not any(other.startswith(name + ".") for other in readers)
    ]
    return with_output(layer, replace(block, W_O=innermost[0]), key)


def cross_attention(layer: Layer, key: int | str, batch: Batch) -> CrossAttention:
    """Heads and W_O of an attention to a source, `attention` of the layer given."""
    found = attention_map(layer, BlockMap(layer.name), key, batch)
    found = found if found.attn_out else with_output(layer, found, key)
    assert found.attention is not None
    sizes = (found.n_heads, found.n_kv_heads, found.d_head)
    return CrossAttention(found.attention, *sizes, found.W_O, found.attn_out)


def gated_attention_map(
    layer: Layer, changed: Layer, factor: Tensor, block: BlockMap, key: int | str
) -> BlockMap:
    """W_O where something stands between z and it; `changed` is the layer with z times `factor`.

    Where W_O's input is multiplied by the same factor, a gate stands between.
    """
    attention, seen = layer.attention, layer.inside
    assert attention is not None
    after: list[tuple[int, str, Tensor, Tensor]] = []
    own = seen.once(block.attention)
    within = own is not None and _ends_in_a_norm_of_a_sum(seen, block.attention or "", own)
    for name in _projections(seen, attention.tensors["z"]):
        if within and not name.startswith(f"{block.attention}."):
            continue  # it reads the stream, with attention's output in it
        call, other = seen.call(name), changed.inside.once(name)
        if _is_linear(seen, name) and call.order > attention.order and other is not None:
            x, y = call.inputs[0].double().reshape(-1), other.inputs[0].double().reshape(-1)
            if not torch.equal(x, y):
                after.append((call.order, name, x, y))
    none = (0, "", torch.empty(0), torch.empty(0))
    _, name, x, y = min(after, key=lambda found: found[0], default=none)
    width = block.n_heads * block.d_head
    if not name or seen.call(name).inputs[0].shape[-1] != width or _reads_a_sum(layer, name):
        # No projection of its own, or one a group of heads: the attention module's output is all there is.
        return with_output(layer, block, key)
    eps = PROPORTIONAL * (30 if factor.dtype in (torch.bfloat16, torch.float16) else 1)
    error = (y - x * factor.double().reshape(-1)).abs().max()
    between = "gate" if float(error) <= eps * float(x.abs().max()) else "function"
    return with_output(layer, replace(block, W_O=name, between=between), key)


def with_output(layer: Layer, block: BlockMap, key: int | str) -> BlockMap:
    """`attn_out`: W_O, or the attention module where W_O has another order of axes or there is none."""
    rows = layer.hidden(key).shape[0]
    streams = (layer.hidden(key), layer.output)  # a block may read another width than it returns
    for name in (block.W_O, block.attention):
        call = layer.inside.once(name)
        if name is None or call is None or call.output is None:
            continue
        if call.output.shape[-1] not in [x.shape[-1] // layer.n_streams for x in streams]:
            continue
        if name != block.W_O and _ends_in_a_norm_of_a_sum(layer.inside, name, call):
            continue  # the stream, with attention's output in it
        first = call.output.shape[0]
        if first == rows or (call.output.ndim == 2 and not _positions_first(layer, call)):
            return replace(block, attn_out=name)
    return block


def _positions_first(layer: Layer, call: ModuleCall) -> bool:
    """Whether a flattened input holds z position by position, each of them row by row."""
    assert layer.attention is not None
    x, z = call.inputs[0].reshape(-1), layer.attention.tensors["z"]
    return not torch.equal(x, z.reshape(-1)) and torch.equal(x, z.transpose(0, 1).reshape(-1))


def _reads_a_sum(layer: Layer, name: str) -> bool:
    """Whether a module outside attention reads what a norm makes of a sum: the stream with attention's output in it."""
    attention, seen = layer.attention, layer.inside
    assert attention is not None
    if name.startswith(f"{seen.names[attention.module]}."):
        return False
    x, z = seen.call(name).inputs[0], attention.tensors["z"]
    norms = [
        call.inputs[0]
        for path, calls in seen.calls.items()
        for call in calls
        if call.inputs
        and call.output is not None
        and same(call.output, x)
        and elementwise(seen, path, call)
        and not same(call.inputs[0], call.output)
    ]
    return any(
        not same(read, z) and not same(read, z.transpose(0, 1)) and not _returned(seen, read)
        for read in norms
    )


def _returned(seen: Recording, x: Tensor) -> bool:
    """Whether some module returned this."""
    outputs = [call.output for calls in seen.calls.values() for call in calls]
    return any(out is not None and same(x, out) for out in outputs)


def _ends_in_a_norm_of_a_sum(seen: Recording, name: str, call: ModuleCall) -> bool:
    """Whether a module returns what a norm inside it makes of a tensor that no module returned."""
    assert call.output is not None
    inside = {
        path: calls[0]
        for path, calls in seen.calls.items()
        if path.startswith(name + ".") and len(calls) == 1 and calls[0].inputs
    }
    norms = [
        each
        for path, each in inside.items()
        if each.output is not None
        and same(each.output, call.output)
        and elementwise(seen, path, each)
        and not same(each.inputs[0], each.output)
    ]
    return any(not _returned(seen, norm.inputs[0]) for norm in norms)


def _projections(seen: Recording, z: Tensor) -> list[str]:
    """Modules that mix a tensor of z's size: with more parameters than a norm, called once."""
    return [
        name
        for name, calls in seen.calls.items()
        if len(calls) == 1
        and calls[0].output is not None
        and calls[0].inputs
        and calls[0].inputs[0].numel() == z.numel()
        and next(seen.module.get_submodule(name).parameters(), None) is not None
        and not elementwise(seen, name, calls[0])
    ]


def _reads_in_turns(seen: Recording, attention: str, z: Tensor) -> str:
    """The linear layer of an attention module that reads z in several calls, some positions after the others; "" if
    none does."""
    for name, calls in seen.calls.items():
        if len(calls) > 1 and name.startswith(f"{attention}.") and _is_linear(seen, name):
            read = [x.flatten(1, -2) for call in calls for x in call.inputs[:1] if x.ndim > 2]
            fits = all(x.shape[0] == len(z) and x.shape[2] == read[0].shape[2] for x in read)
            if len(read) == len(calls) and fits and same(torch.cat(read, 1), z):
                return name
    return ""


def _is_linear(seen: Recording, name: str) -> bool:
    matrix = getattr(seen.module.get_submodule(name), "weight", None)
    return isinstance(matrix, Tensor) and matrix.ndim == 2


def _reads(call: ModuleCall, z: Tensor) -> bool:
    """Whether the module's input is z, the axes of batch and position in either order."""
    x = call.inputs[0].reshape(-1)
    return torch.equal(x, z.reshape(-1)) or torch.equal(x, z.transpose(0, 1).reshape(-1))


def elementwise(seen: Recording, name: str, call: ModuleCall, numbers: int = 2) -> bool:
    """Whether a module has no more parameters than a norm: gain and bias a channel, no mixing matrix."""
    if call.output is None or (call.inputs and call.inputs[0].numel() != call.output.numel()):
        return False
    width = sum(parameter.numel() for parameter in seen.module.get_submodule(name).parameters())
    return width <= numbers * call.output.shape[-1]


def by_channel(seen: Recording, name: str, call: ModuleCall) -> bool:
    """Whether a module mixes no channels: a norm, or a short convolution of each channel."""
    return elementwise(seen, name, call, numbers=8)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same order."""
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def _source(layer: Layer, key: int | str, v: Tensor, batch: Batch) -> Source | None:
    """The linear layer, and its output columns, that v [batch kv pos d_head] was taken from."""
    seen = layer.inside
    n, n_kv, pos, d_head = v.shape
    wanted = v.permute(1, 3, 0, 2).reshape(n_kv * d_head, n * pos).contiguous()
    keys = [column.tobytes() for column in wanted.float().cpu().numpy()]
    for name, calls in seen.calls.items():
        if len(calls) != 1 or calls[0].output is None or not calls[0].inputs:
            continue
        if any(True for _ in seen.module.get_submodule(name).children()):
            continue
        out = calls[0].output
        if out.numel() % (n * pos) or out.shape[-1] < n_kv * d_head:
            continue
        columns = out.reshape(-1, out.shape[-1]).T
        if columns.shape[1] != n * pos:
            continue
        where = {
            column.tobytes(): i
            for i, column in enumerate(columns.contiguous().float().cpu().numpy())
        }
        if all(key in where for key in keys):
            found = torch.tensor([where[key] for key in keys]).reshape(n_kv, d_head)
            if len(where) < len(columns):  # some look alike on these tokens, all zero perhaps
                found = _tagged_columns(seen, name, layer, batch, found)
            return (
                None
                if found is None
                else Source(name, found, _input_name(layer, key, calls[0].inputs[0]))
            )
    return None


def _tagged_columns(
    seen: Recording, name: str, layer: Layer, batch: Batch, like: Tensor
) -> Tensor | None:
    """Which output columns of a linear layer v is made of, read off v when every column says its number.

    Two forwards, one a digit: bfloat16 counts to 256. None where v is not these columns as they are.
    """
    assert layer.attention is not None
    attention = layer.attention.module
    digits = []
    for digit in (lambda c: c // TAGS, lambda c: c % TAGS):

        def tag(module: nn.Module, args: tuple, out: Tensor, digit=digit) -> Tensor:
            return digit(torch.arange(out.shape[-1], device=out.device)).to(out).expand_as(out)

        calls: list[AttentionCall] = []

        def listen(module: nn.Module, calls: list[AttentionCall] = calls) -> Watch:
            if module is not attention:
                return Watch()
            calls.append(AttentionCall(module))
            return calls[-1]

        hook = seen.module.get_submodule(name).register_forward_hook(tag)
        try:
            with window(seen.module, listen):
                call_model(seen.module, batch)
        finally:
            hook.remove()
        v = calls[-1].tensors["v"]
        if not torch.equal(v, v[:1, :, :1].expand_as(v)):
            return None
        digits.append(v[0, :, 0].long().cpu())
    found = digits[0] * TAGS + digits[1]
    return found if found.shape == like.shape else None


def _input_name(layer: Layer, key: int | str, x: Tensor) -> str:
    """ "resid_pre", or the module of the block whose output `x` is, position by position; "" if neither."""
    hidden = layer.hidden(key)
    if same(hidden, x):
        return "resid_pre"
    if x.shape[:-1].numel() != hidden.shape[:-1].numel():  # of several positions together
        return ""
    for name, calls in layer.inside.calls.items():
        if len(calls) == 1 and calls[0].output is not None and same(calls[0].output, x):
            return name
    return ""
