"""How each block's heads and MLP read the residual stream: found on one probe, and verified there.

Which columns of a linear layer belong to which head is found by asking autograd: the outputs of the layer
that q of head h depends on. Nothing here knows an architecture.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from circuits.stream import (
    KINDS,
    Norm,
    Projection,
    Reads,
    frozen,
    head_bias,
    head_weights,
    own_columns,
    rounding_of,
)
from interp.errors import Refused
from interp.models.attention import Watch, window
from interp.models.block_map import BlockMap
from interp.models.calls import call_model
from interp.models.hooks import hidden_of, with_hidden
from interp.models.model import Model
from interp.models.spec import first_tensor, module_device


@dataclass
class _Seen(Watch):
    """One block's probe: its input, its modules' inputs and outputs in the graph, and q, k, v."""

    x: Tensor | None = None
    inputs_of: dict[str, Tensor] = field(default_factory=dict)
    views_of: dict[str, Tensor] = field(default_factory=dict)
    outputs_of: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)

    def inputs(self, q, k, v):
        self.heads = {"q": q, "k": k, "v": v}
        return q, k, v


def find_reads(model: Model) -> list[Reads]:
    """How every block's heads and MLP read the residual stream: found on one probe, and verified there.

    Each layer's closed form (projection and norm) is compared with autograd; where they differ the
    layer is not split.

    Raises: Refused: the input of some MLP could not be told from other readers of the stream.

    >>> reads = find_reads(tiny_model())
    >>> reads[1].split, reads[1].projections["k"].columns.shape, reads[1].mlp_entries
    (True, torch.Size([2, 8]), ('model.layers.1.post_attention_layernorm',))
    """
    seen = _probe(model)
    found = []
    for layer, block in enumerate(model.spec.blocks):
        reads = Reads()
        if block.attn_write is not None and block.W_O is not None:
            reads = _head_reads(model, block, seen[layer])
        if block.mlp_write is not None:
            entries, norm = _mlp_reads(model, block, seen[layer])
            reads = Reads(reads.norm, reads.projections, entries, norm, reads.why)
        found.append(reads)
    return found


def _probe(model: Model) -> list[_Seen]:
    """One forward of probe tokens, each block's graph starting at its own input."""
    seen = [_Seen() for _ in model.blocks]
    batch = model.probed
    layer_of = {
        model.module.get_submodule(block.attention): layer
        for layer, block in enumerate(model.spec.blocks)
        if block.attention
    }

    def start(layer: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            x = hidden_of(args, kwargs, model.spec, layer).detach().to(module_device(module))
            seen[layer].x = x.requires_grad_()
            # The block reads a view: an operation in place on a leaf would be refused.
            return with_hidden(args, kwargs, x.view_as(x), model.spec, layer)

        return hook

    def enter(layer: int, name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            value = float_input(args, kwargs)
            if value is None or not value.requires_grad:
                return None
            seen[layer].inputs_of[name] = value
            seen[layer].views_of[name] = view = value.view_as(value)
            return with_float_input(args, kwargs, view)

        return hook

    def leave(layer: int, name: str):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None and tensor.is_floating_point():
                seen[layer].outputs_of[name] = tensor

        return hook

    with ExitStack() as stack:
        stack.enter_context(frozen(model.module))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(
            window(model.module, lambda m: seen[layer_of[m]] if m in layer_of else Watch())
        )
        for layer, block in enumerate(model.blocks):
            name = model.spec.blocks[layer].name
            stack.callback(block.register_forward_pre_hook(start(layer), with_kwargs=True).remove)
            for inner, module in block.named_modules():
                if not inner:
                    continue
                full = f"{name}.{inner}"
                stack.callback(
                    module.register_forward_pre_hook(enter(layer, full), with_kwargs=True).remove
                )
                stack.callback(module.register_forward_hook(leave(layer, full)).remove)
        call_model(model.module, batch, model.spec.first_position)
    return seen


def float_input(args: tuple, kwargs: dict) -> Tensor | None:
    """The first floating point tensor a module was called with."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


def with_float_input(args: tuple, kwargs: dict, new: Tensor) -> tuple[tuple, dict]:
    """The same call with that tensor replaced."""
    old = float_input(args, kwargs)
    return (
        tuple(new if value is old else value for value in args),
        {name: new if value is old else value for name, value in kwargs.items()},
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1).to(a.device))


def _head_reads(model: Model, block: BlockMap, seen: _Seen) -> Reads:
    """The columns of each head's q, k and v, verified; or the reason why there are none."""
    x = seen.x
    assert x is not None
    sources: dict[str, str] = {}  # linear layers that read the normed stream -> that norm
    for name, value in seen.inputs_of.items():
        if any(True for _ in model.module.get_submodule(name).children()):
            continue
        if name not in seen.outputs_of or not seen.outputs_of[name].requires_grad:
            continue
        if _same(value, x):
            sources[name] = ""
            continue
        for norm, output in seen.outputs_of.items():
            if norm != name and _is_norm_of(model, seen, norm, x) and _same(output, value):
                sources[name] = norm
                break
    for norm in set(sources.values()):
        sources.pop(norm, None)  # the norm reads the stream too, but only to pass it on
    projections, norms = {}, set()
    for kind in KINDS:
        found = _projection(seen, kind, list(sources))
        if isinstance(found, str):
            return Reads(why=f"{kind} of '{block.attention}' {found}")
        projections[kind] = found
        norms.add(sources[found.module])
    used: dict[str, int] = {}
    for projection in projections.values():
        used[projection.module] = used.get(projection.module, 0) + projection.columns.numel()
    if len(norms) > 1 or any(used[name] != seen.outputs_of[name].shape[-1] for name in used):
        return Reads(why=f"the linear layers of '{block.attention}' hold more than q, k and v")
    (norm_name,) = norms
    module = model.module.get_submodule(norm_name) if norm_name else None
    reads = Reads(Norm.of(module, model.spec.d_model, model.device), projections)
    error = max(_error(model, reads, seen, kind) for kind in KINDS)
    if error > rounding_of(x.dtype):
        return Reads(why=f"the closed form of '{block.attention}' is off by {error:.1e}")
    return reads


def _is_norm_of(model: Model, seen: _Seen, name: str, x: Tensor) -> bool:
    """Whether a module reads `x` and has no more parameters than a gain and a bias."""
    weights = sum(weight.numel() for weight in model.module.get_submodule(name).parameters())
    reads = name in seen.inputs_of and _same(seen.inputs_of[name], x)
    return reads and weights <= 2 * x.shape[-1]


def _projection(seen: _Seen, kind: str, sources: list[str]) -> Projection | str:
    """The columns of one linear layer that each head depends on; or what is the matter."""
    heads = seen.heads[kind]
    outputs = [seen.outputs_of[name] for name in sources]
    if not outputs or not heads.requires_grad:
        return "comes from no linear layer on the normed stream"
    weights = torch.randn(
        heads.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    ).to(heads)
    module, columns = None, []
    for head in range(heads.shape[1]):
        grads = torch.autograd.grad(
            (heads[:, head] * weights[:, head]).sum(), outputs, retain_graph=True, allow_unused=True
        )
        live = [
            (name, grad.reshape(-1, grad.shape[-1]).ne(0).any(0).nonzero()[:, 0])
            for name, grad in zip(sources, grads, strict=True)
            if grad is not None and bool(grad.ne(0).any())
        ]
        if len(live) != 1 or module not in (None, live[0][0]):
            return "comes from several linear layers, or from none that reads the normed stream"
        module = live[0][0]
        columns.append(live[0][1])
    assert module is not None
    every = torch.cat(columns)
    if len({len(own) for own in columns}) > 1 or len(every.unique()) != len(every):
        return "of one head depends on other heads' columns"
    return Projection(module, torch.stack(columns).cpu(), seen.outputs_of[module].shape[-1])


def _error(model: Model, reads: Reads, seen: _Seen, kind: str) -> float:
    """How far the closed form of d(q · w)/dx is from autograd's, relative to the largest entry."""
    heads, x = seen.heads[kind], seen.x
    assert x is not None and reads.norm is not None
    weights = torch.randn(
        heads.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32
    ).to(heads)
    leaf = seen.outputs_of[reads.projections[kind].module]
    exact, at_leaf = torch.autograd.grad(
        heads, [x, leaf], weights, retain_graph=True, allow_unused=True
    )
    assert at_leaf is not None and exact is not None
    with torch.no_grad():
        x, leaf, exact, at_leaf = (t.to(model.device) for t in (x, leaf, exact, at_leaf))
        W, bias = head_weights(model, reads, kind), head_bias(model, reads, kind)
        columns = reads.projections[kind].columns
        shape = (*x.shape[:2], -1)
        own = own_columns(leaf.reshape(shape), columns).float()  # [batch pos heads width]
        grads = own_columns(at_leaf.reshape(shape), columns).float()
        sigma = reads.norm.sigma(x.float())[..., None]
        unit = reads.norm.centre(x.float()) / sigma
        made_leaf = torch.einsum("bpm,hmw->bphw", x.float(), W) / sigma[..., None] + bias
        made = torch.einsum("bphw,hmw->bpm", grads, W) / sigma
        if reads.norm.live:
            along = (grads * (own - bias)).sum((-1, -2))[..., None]
            made = made - unit * along / (x.shape[-1] * sigma)
        off = (made - exact.float()).abs().max() / exact.float().abs().max().clamp_min(1e-12)
        off_leaf = (made_leaf - own).abs().max() / own.abs().max().clamp_min(1e-12)
    return max(float(off), float(off_leaf))


def _mlp_reads(model: Model, block: BlockMap, seen: _Seen) -> tuple[tuple[str, ...], str | None]:
    """The modules through which the MLP, and nothing else, reads the stream."""
    assert block.mlp_write is not None and seen.x is not None
    target = seen.outputs_of.get(block.mlp_write.module)
    if target is None or not target.requires_grad:
        raise Refused(f"no gradient reaches what the MLP of '{block.name}' writes")
    if block.attn_write is None or block.parallel:
        stream = seen.x
    else:
        written = seen.outputs_of[block.attn_write.module].reshape(seen.x.shape)
        stream = seen.x + block.attn_write.scale * written
    weights = torch.randn(
        target.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float32
    ).to(target)

    def reaches(names: list[str]) -> list[str]:
        """Of these modules, those on the way to the MLP's write and outside of attention's."""
        names = [n for n in names if not (block.attention or "?").startswith(n)]
        names = [n for n in names if not n.startswith((block.attention or "?") + ".")]
        views = [seen.views_of[n] for n in names]
        if not views:
            return []
        grads = torch.autograd.grad(target, views, weights, retain_graph=True, allow_unused=True)
        return [n for n, g in zip(names, grads, strict=True) if g is not None]

    def outermost(names: list[str]) -> list[str]:
        return [n for n in names if not any(n != m and n.startswith(m + ".") for m in names)]

    def reads_stream(value: Tensor) -> bool:
        if value.numel() != stream.numel():
            return False
        off = (value.reshape(stream.shape) - stream).abs().amax(-1)
        # The block may add in another order than here: equal to rounding, not bit for bit.
        return bool((off <= 1e-5 * stream.abs().amax(-1) + 1e-12).all()) or (
            value.dtype in (torch.float16, torch.bfloat16)
            and bool((off <= 2e-2 * stream.abs().amax(-1)).all())
        )

    direct = outermost(reaches([n for n, value in seen.inputs_of.items() if reads_stream(value)]))
    attends = seen.heads.get("q")
    shared = [
        n
        for n in direct
        if attends is not None
        and attends.requires_grad
        and torch.autograd.grad(
            attends.sum(), [seen.views_of[n]], retain_graph=True, allow_unused=True
        )[0]
        is not None
    ]
    if not shared and direct:
        return tuple(direct), None
    if len(shared) == 1 and len(direct) == 1:
        # One norm for attention and MLP (parallel blocks): the MLP is entered behind it.
        normed = seen.outputs_of[shared[0]]
        behind = [
            n for n, value in seen.inputs_of.items() if n != shared[0] and _same(value, normed)
        ]
        if found := outermost(reaches(behind)):
            return tuple(found), shared[0]
    raise Refused(
        f"the input of the MLP of '{block.name}' could not be told from the other readers of the "
        "residual stream; edge scores and edge circuits of this model: use naive=True"
    )
