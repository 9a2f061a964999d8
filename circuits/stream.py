"""Who writes the residual stream and who reads it: the linear maps on both sides of every head.

A head writes z_h W_O^h. It reads q, k and v from columns of linear layers that read the normed stream;
which columns belong to which head is found by asking autograd on a probe: the outputs of the linear
layer that q of head h depends on. Nothing here knows an architecture. Where a head's q depends on more
than its own columns (a norm over all heads, latent attention) the layer is marked as not `split`, and
callers run the block itself on every receiver's input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuits.graph import Graph
from interp.errors import Refused
from interp.models.attention import Watch, window
from interp.models.calls import at_home, call_model
from interp.models.hooks import hidden_of, with_hidden
from interp.models.model import Model
from interp.models.probe import probe_batch
from interp.models.spec import BlockMap, first_tensor, module_device
from interp.models.weights import FrozenNorm, linear_map

KINDS = ("q", "k", "v")


# --- norms in closed form -----------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """norm(x) = gain · c(x) / σ(x) + bias with σ(x)² = mean c(x)² + eps; c takes out the mean, or nothing.

    With `live=False` there is no norm: σ = 1.
    """

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool
    eps: float
    live: bool = True

    @staticmethod
    @torch.no_grad()
    def of(module: nn.Module | None, d_model: int, device: torch.device) -> Norm:
        """The norm that a module computes; whether it has this form is for the caller to verify."""
        frozen = FrozenNorm(module, d_model, device)
        if module is None:
            return Norm(frozen.gain, frozen.bias, False, 0.0, live=False)
        small = 1e-3
        sign = torch.ones_like(frozen.gain)
        sign[1::2] = -1
        inner = (frozen.gain * sign).cpu().double() * small
        made = (at_home(module, sign[None] * small)[0] - frozen.bias).cpu().double()
        # At mean square small² the norm multiplies by ratio · gain, with ratio² = 1 / (small² + eps).
        ratio = float((inner * made).sum() / (inner * inner).sum()) ** 2
        # A module that keeps its input's size would pass for a norm with a huge epsilon.
        eps = 1 / ratio - small**2 if ratio > 1 else 0.0
        return Norm(frozen.gain.float(), frozen.bias.float(), frozen.centred, max(eps, 0.0))

    def centre(self, x: Tensor) -> Tensor:
        """x less its mean, where the norm takes it out."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def sigma(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows"]:
        """σ(x) of every row; 1 where there is no norm."""
        if not self.live:
            return torch.ones_like(x[..., 0])
        if self.centred:
            return (x.var(-1, correction=0) + self.eps).sqrt()
        square = torch.linalg.vector_norm(x, dim=-1).square() / x.shape[-1]
        return (square + self.eps).sqrt()

    def __call__(self, x: Tensor) -> Tensor:
        """norm(x)."""
        return self.gain * self.centre(x) / self.sigma(x)[..., None] + self.bias


# --- readers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """q, k or v of a layer's heads before positions are applied: columns of a linear layer's output.

    columns: [heads width], heads being kv heads for k and v. width: of the whole output.
    """

    module: str
    columns: Int[Tensor, "heads width"]
    width: int


@dataclass(frozen=True)
class Reads:
    """How the heads and the MLP of one block read the residual stream.

    Attributes:
        norm: what stands between the stream and q, k and v.
        projections: of "q", "k", "v"; empty where the layer could not be split (see `why`).
        mlp_entries: modules whose first input is the MLP's: the stream itself, or `mlp_norm` of it.
        why: the reason for what is not split.
    """

    norm: Norm | None = None
    projections: dict[str, Projection] = field(default_factory=dict)
    mlp_entries: tuple[str, ...] = ()
    mlp_norm: str | None = None
    why: str = ""

    @property
    def split(self) -> bool:
        """Whether every head's q, k and v come from columns of their own."""
        return bool(self.projections)


def own_columns(
    x: Tensor, columns: Int[Tensor, "heads width"]
) -> Float[Tensor, "*rows heads width"]:
    """The columns of each head; without a copy where heads lie side by side."""
    first, n = int(columns[0, 0]), columns.numel()
    if torch.equal(columns.reshape(-1), torch.arange(first, first + n)):
        return x[..., first : first + n].unflatten(-1, tuple(columns.shape))
    return x[..., columns.to(x.device)]


def _folded(model: Model, reads: Reads, kind: str) -> tuple[Tensor, Tensor]:
    projection = reads.projections[kind]
    linear = model.module.get_submodule(projection.module)
    W, b = linear_map(linear, model.spec.d_model, model.device)
    return W.float(), b.float()


def head_weights(model: Model, reads: Reads, kind: str) -> Float[Tensor, "heads d_model width"]:
    """W with leaf output = (x @ W) / σ(x) + `head_bias`: the norm's gain and centring are folded in."""
    assert reads.norm is not None
    W, _ = _folded(model, reads, kind)
    W = own_columns(reads.norm.gain.to(W)[:, None] * W, reads.projections[kind].columns)
    if reads.norm.centred:
        W = W - W.mean(0)
    return W.transpose(0, 1)


def head_bias(model: Model, reads: Reads, kind: str) -> Float[Tensor, "heads width"]:
    """What the linear layer adds to each head's columns whatever the stream is."""
    assert reads.norm is not None
    W, b = _folded(model, reads, kind)
    return own_columns(reads.norm.bias.to(W) @ W + b, reads.projections[kind].columns)


# --- writers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadWrites:
    """What each head of a layer adds to the stream: (z_h W_h + share) / σ, σ = 1 without a post-norm.

    With a norm after attention its scale σ is that of the whole attention output in the same run, so
    the heads' parts and `constant` sum to what is written; `share` is then each head's part of W_O's
    bias. `constant` is what the layer's attention writes whatever its heads do.
    """

    W: Float[Tensor, "heads d_head d_model"]
    share: Float[Tensor, " d_model"]
    constant: Float[Tensor, " d_model"]
    norm: Norm | None

    def parts(
        self,
        z: Float[Tensor, "batch pos heads d_head"],
        sigma: Float[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "heads batch pos d_model"]:
        """Every head's write; `sigma` is the post-norm's scale, where there is one."""
        rows = z.float().permute(2, 0, 1, 3)
        if sigma is not None:
            rows = rows / sigma[..., None]
        flat = rows.reshape(len(rows), -1, rows.shape[-1])
        out = torch.bmm(flat, self.W).reshape(*rows.shape[:3], -1)
        return out if sigma is None else out + self.share / sigma[..., None]


@dataclass
class Writes:
    """What was written in one run, kept narrow: heads as z (and the scale of a norm after attention)."""

    embed: Float[Tensor, "batch pos d_model"]
    z: dict[int, Float[Tensor, "batch pos heads d_head"]] = field(default_factory=dict)
    sigma: dict[int, Float[Tensor, "batch pos"]] = field(default_factory=dict)
    mlp: dict[int, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict)

    def heads(self, writers: Mapping[int, HeadWrites], layer: int) -> Tensor:
        """Writes of one layer's heads [heads batch pos d_model]."""
        return writers[layer].parts(self.z[layer], self.sigma.get(layer))

    def zero(self) -> Writes:
        """Nothing written by anyone (the share of W_O's bias included)."""
        return Writes(
            torch.zeros_like(self.embed),
            {layer: torch.zeros_like(z) for layer, z in self.z.items()},
            {layer: torch.full_like(s, torch.inf) for layer, s in self.sigma.items()},
            {layer: torch.zeros_like(write) for layer, write in self.mlp.items()},
        )

    @staticmethod
    def mean(several: Sequence[Writes]) -> Writes:
        """Every sender's mean write over all rows, position by position; one row."""

        def over(values: list[Tensor]) -> Tensor:
            return torch.cat(values).float().mean(0, keepdim=True)

        layers, mlps = list(several[0].z), list(several[0].mlp)
        sigma = {
            layer: 1 / over([1 / each.sigma[layer] for each in several])
            for layer in several[0].sigma
        }
        z = {}
        for layer in layers:
            if layer in sigma:  # the mean of z / σ, which is what a write is linear in
                scaled = over(
                    [each.z[layer] / each.sigma[layer][..., None, None] for each in several]
                )
                z[layer] = scaled * sigma[layer][..., None, None]
            else:
                z[layer] = over([each.z[layer] for each in several])
        return Writes(
            over([each.embed for each in several]),
            z,
            sigma,
            {layer: over([each.mlp[layer] for each in several]) for layer in mlps},
        )

    def expand(self, n: int) -> Writes:
        """n copies of a single row."""

        def copies(values: dict[int, Tensor]) -> dict[int, Tensor]:
            return {layer: x.expand(n, *x.shape[1:]) for layer, x in values.items()}

        return Writes(
            self.embed.expand(n, *self.embed.shape[1:]),
            copies(self.z),
            copies(self.sigma),
            copies(self.mlp),
        )

    def less(
        self, other: Writes, graph: Graph, writers: Mapping[int, HeadWrites]
    ) -> Float[Tensor, "n_senders batch pos d_model"]:
        """Every sender's write here, minus its write in `other`."""
        out = torch.empty(graph.shape[0], *self.embed.shape, device=self.embed.device)
        torch.sub(self.embed, other.embed, out=out[0])
        for layer in sorted({*self.z, *self.mlp}):
            rows = graph.rows(layer)
            n_heads = self.z[layer].shape[2] if layer in self.z else 0
            if n_heads:
                heads = slice(rows.start, rows.start + n_heads)
                if layer in self.sigma:
                    out[heads] = self.heads(writers, layer) - other.heads(writers, layer)
                else:
                    out[heads] = writers[layer].parts(self.z[layer] - other.z[layer])
            if layer in self.mlp:
                torch.sub(self.mlp[layer], other.mlp[layer], out=out[rows.stop - 1])
        return out


def head_writers(model: Model, graph: Graph) -> dict[int, HeadWrites]:
    """By layer, the map from z to what each head writes.

    Raises: Refused: something other than a norm stands between attention and the stream.
    """
    return {
        layer: _head_writer(model, layer)
        for layer in sorted({s.layer for s in graph.senders if s.kind == "head"})
    }


def _head_writer(model: Model, layer: int) -> HeadWrites:
    block = model.spec.blocks[layer]
    assert block.attn_write is not None
    W = model.W_O(layer).float()
    if block.attn_write.scale != 1:
        W = W * block.attn_write.scale
    bias = model.b_O(layer).to(W) * block.attn_write.scale
    if block.direct:
        return HeadWrites(W, torch.zeros_like(bias), bias, None)
    module = model.module.get_submodule(block.attn_write.module)
    norm = Norm.of(module, model.spec.d_model, model.device)
    probe = torch.randn(8, model.spec.d_model, generator=torch.Generator().manual_seed(0)).to(W)
    with torch.no_grad():
        wanted = at_home(module, probe.to(model.dtype)).float()
        off = (norm(probe) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)
    if float(off) > _allowed(model.dtype):
        raise Refused(
            f"layer {layer} of {model.id}: what stands between attention and the residual stream "
            f"('{block.attn_write.module}') is not a norm, so no head has a write of its own"
        )
    gain, scale = norm.gain.to(W), block.attn_write.scale
    share = norm.centre(bias) * gain / block.n_heads
    return HeadWrites(norm.centre(W) * gain, share, norm.bias.to(W) * scale, norm)


# --- finding the readers ------------------------------------------------------------------------


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient, so that graphs keep no activations for them."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


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
    batch = probe_batch(model.module).to(model.device)
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
    if error > _allowed(x.dtype):
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


def _allowed(dtype: torch.dtype) -> float:
    """Rounding of one projection and one norm, relative to the largest entry."""
    return {torch.float32: 2e-4, torch.float64: 2e-4}.get(dtype, 6e-2)


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
