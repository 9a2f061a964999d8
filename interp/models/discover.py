"""Where a model's parts are, read off one recorded forward.

An attention module is whatever calls the window; W_O is the linear layer that reads z; a block is the
member of the ModuleList that holds the attention module; what a block writes is solved for: the
sub-module outputs, with multipliers, that sum to `resid_post - resid_pre`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.attention import Watch, window
from interp.models.calls import call_model, text_config
from interp.models.recording import AttentionCall, ModuleCall, Recording
from interp.models.spec import BlockMap, Source, Spec, Write
from interp.models.verify import RELATIVE_TOLERANCE, relative_error
from interp.run.batch import Batch
from interp.sites import AXES

TAGS = 200
"""Base of the numbers that output columns are told apart by."""


def discover(seen: Recording, batch: Batch) -> Spec:
    """The map that the recording suggests, not yet verified."""
    refused: dict[str, str] = {}
    stack, layer_of = _stack(seen, refused)
    blocks_module = seen.module.get_submodule(stack)
    block_calls = [seen.once(f"{stack}.{i}") for i in range(len(blocks_module))]  # type: ignore[arg-type]
    if any(call is None or not call.inputs or call.output is None for call in block_calls):
        raise Refused(
            f"blocks of '{stack}' are not each called once with a hidden state: nothing can be addressed"
        )
    pre = block_calls[0].inputs[0]  # type: ignore[union-attr]
    shape = pre.shape
    if len(shape) != 3:
        raise Refused(
            f"blocks of '{stack}' read a tensor of shape {tuple(shape)}; expected [batch, pos, d_model]"
        )

    blocks, patterns = [], []
    for layer, call in enumerate(block_calls):
        name = f"{stack}.{layer}"
        attention = layer_of.get(layer)
        block = BlockMap(name)
        if attention is not None:
            block = _attention_map(seen, block, attention, batch, refused)
            patterns.append(torch.cat(attention.rows, dim=2))
        blocks.append(_write_map(seen, block, call, shape, refused) if layer_of else block)
    if not any(block.W_out for block in blocks):
        refused.setdefault(
            "mlp_post", "no one linear layer makes an MLP's output (experts, or a gate)"
        )
    if all(block.parallel or block.attn_write is None for block in blocks):
        refused.setdefault("resid_mid", "attention and MLP are parallel: nothing lies between them")
    causal = bool(patterns) and all(not pattern.triu(1).any() for pattern in patterns)
    config: Any = getattr(seen.module, "config", None)
    text = text_config(seen.module) if config is not None else None
    spec = Spec(
        family=getattr(config, "model_type", type(seen.module).__name__),
        stack=stack,
        blocks=tuple(blocks),
        d_model=shape[-1],
        causal=causal,
        d_vocab=getattr(text, "vocab_size", None) if "input_ids" in batch.inputs else None,
        n_ctx=getattr(text, "max_position_embeddings", None),
        tuple_blocks=any(call.is_tuple for call in block_calls if call),
        copies=frozenset(
            name for name, calls in seen.calls.items() if any(call.mutated for call in calls)
        ),
        refused=refused,
    )
    return _with_ends(spec, seen, batch)


def _stack(seen: Recording, refused: dict[str, str]) -> tuple[str, dict[int, AttentionCall]]:
    """The ModuleList of blocks, and the attention call of each of its layers."""
    placed, outside = _place(seen)
    if not placed:
        why = (
            f"{type(seen.module).__name__} does not call transformers' attention interface"
            if not outside
            else f"attention module '{outside[0]}' stands in no ModuleList of blocks"
        )
        for site in set(AXES) - {"embed", "resid_pre", "resid_post"}:
            refused[site] = f"{why}; resid_pre, resid_post and logits still work"
        return _largest_chain(seen), {}
    if len(placed) > 1:
        raise Refused(
            f"{type(seen.module).__name__} has {len(placed)} stacks of attention blocks "
            f"({', '.join(placed)}); pass one part of the model, such as its encoder or vision tower"
        )
    ((stack, layers),) = placed.items()
    counts = Counter(id(call.module) for call in seen.attention)
    if max(counts.values()) > 1:
        raise Refused(
            f"{type(seen.module).__name__} calls one attention module several times "
            f"('{seen.names[seen.attention[0].module]}'): its layers share weights and cannot be told apart"
        )
    if several := [layer for layer, calls in layers.items() if len(calls) > 1]:
        raise Refused(
            f"block {several[0]} of '{stack}' attends {len(layers[several[0]])} times (cross-attention or "
            "several branches); one attention a block can be addressed"
        )
    return stack, {layer: calls[0] for layer, calls in layers.items()}


def _place(seen: Recording) -> tuple[dict[str, dict[int, list[AttentionCall]]], list[str]]:
    """Attention calls by ModuleList and index, and the names of attention modules in no list.

    The nearest list counts, unless a list further out holds all calls (T5's blocks are lists too).
    """
    levels: list[dict[str, dict[int, list[AttentionCall]]]] = []
    outside = []
    for call in seen.attention:
        places = _list_places(seen.module, seen.names[call.module])
        if not places:
            outside.append(seen.names[call.module])
        for level, (name, index) in enumerate(places):
            while len(levels) <= level:
                levels.append({})
            levels[level].setdefault(name, {}).setdefault(index, []).append(call)
    single = [level for level in levels if len(level) == 1]
    return (single or levels or [{}])[0], outside


def _list_places(module: nn.Module, name: str) -> list[tuple[str, int]]:
    """(list, index) of every ModuleList member that holds the module called `name`, nearest first."""
    parts = name.split(".")
    return [
        (parent, int(parts[end]))
        for end in range(len(parts) - 1, 0, -1)
        if parts[end].isdigit()
        and isinstance(module.get_submodule(parent := ".".join(parts[:end])), nn.ModuleList)
    ]


def _largest_chain(seen: Recording) -> str:
    """The longest ModuleList whose members were each called once, each on its predecessor's output."""
    chains = []
    for name, submodule in seen.module.named_modules():
        if isinstance(submodule, nn.ModuleList) and len(submodule):
            calls = [seen.once(f"{name}.{i}") for i in range(len(submodule))]
            linked = all(
                call is not None
                and call.output is not None
                and call.inputs
                and call.inputs[0].shape == call.output.shape
                for call in calls
            )
            if linked and all(torch.equal(a.output, b.inputs[0]) for a, b in pairwise(calls)):  # type: ignore
                chains.append((len(submodule), name))
    if not chains:
        raise Refused(
            f"{type(seen.module).__name__} shows no stack of blocks: nothing can be addressed"
        )
    return max(chains)[1]


def _attention_map(
    seen: Recording,
    block: BlockMap,
    attention: AttentionCall,
    batch: Batch,
    refused: dict[str, str],
) -> BlockMap:
    """Heads, W_O and the source of v of one attention call."""
    z, k, v = (attention.tensors[name] for name in ("z", "k", "v"))
    block = replace(
        block,
        attention=seen.names[attention.module],
        n_heads=z.shape[2],
        n_kv_heads=k.shape[1],
        d_head=z.shape[3],
        v=_source(seen, block, attention.module, v, batch),
    )
    readers = [
        name
        for name, calls in seen.calls.items()
        if name.startswith(block.name + ".")
        and len(calls) == 1
        and calls[0].output is not None
        and any(
            x.numel() == z.numel() and torch.equal(x.reshape(-1), z.reshape(-1))
            for x in calls[0].inputs[:1]
        )
        and next(seen.module.get_submodule(name).parameters(), None) is not None
    ]
    if readers:
        # Wrappers (an output module that projects and normalises) read z too: the projection is innermost.
        innermost = [
            name for name in readers if not any(other.startswith(name + ".") for other in readers)
        ]
        return replace(block, W_O=innermost[0])
    refused.setdefault(
        "attn_out",
        f"in '{block.attention}' no linear layer reads z unchanged (a gate or norm stands between)",
    )
    return block


def _source(
    seen: Recording, block: BlockMap, attention: nn.Module, v: Tensor, batch: Batch
) -> Source | None:
    """The linear layer, and its output columns, that v [batch kv pos d_head] was taken from."""
    n, n_kv, pos, d_head = v.shape
    wanted = v.permute(1, 3, 0, 2).reshape(n_kv * d_head, n * pos).contiguous()
    keys = [column.tobytes() for column in wanted.float().cpu().numpy()]
    for name, calls in seen.calls.items():
        inside = (
            name.startswith(block.name + ".") and len(calls) == 1 and calls[0].output is not None
        )
        if (
            not inside
            or not calls[0].inputs
            or any(True for _ in seen.module.get_submodule(name).children())
        ):
            continue
        out = calls[0].output
        if out is None or out.numel() % (n * pos) or out.shape[-1] < n_kv * d_head:
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
                found = _tagged_columns(seen, name, attention, batch, found)
            return (
                None
                if found is None
                else Source(name, found, _input_name(seen, block, calls[0].inputs[0]))
            )
    return None


def _tagged_columns(
    seen: Recording, name: str, attention: nn.Module, batch: Batch, like: Tensor
) -> Tensor | None:
    """Which output columns of a linear layer v is made of, read off v when every column says its number.

    Two forwards, one a digit: bfloat16 counts to 256. None where v is not these columns as they are.
    """
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


def _input_name(seen: Recording, block: BlockMap, x: Tensor) -> str:
    """ "resid_pre", or the module of the block whose output `x` is; "" if neither."""
    call = seen.once(block.name)
    if call is not None and _same(call.inputs[0], x):
        return "resid_pre"
    for name, calls in seen.calls.items():
        if name.startswith(block.name + ".") and len(calls) == 1 and calls[0].output is not None:
            if _same(calls[0].output, x):
                return name
    return ""


def _same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


@dataclass
class Candidate:
    """A value that might be written to the residual stream, and the modules that returned it."""

    value: Tensor
    modules: list[str]


def _write_map(
    seen: Recording,
    block: BlockMap,
    call: ModuleCall | None,
    shape: torch.Size,
    refused: dict[str, str],
) -> BlockMap:
    """The block's writes: which module outputs, times what, sum to resid_post - resid_pre."""
    assert call is not None and call.output is not None
    if call.output.shape != shape:
        refused["resid_post"] = (
            f"'{block.name}' returns shape {tuple(call.output.shape)}, reads {tuple(shape)}"
        )
        return block
    candidates = _candidates(seen, block, shape)
    pre, post = call.inputs[0].double(), call.output.double()
    chosen = _solve(pre, post, candidates, call.output.dtype)
    if chosen is None:
        reason = (
            f"no outputs inside '{block.name}' sum to resid_post - resid_pre (a norm after the addition, "
            "or a rescaled stream)"
        )
        for site in ("attn_write", "mlp_write", "mlp_out", "mlp_post", "resid_mid"):
            refused.setdefault(site, reason)
        return block
    from_attention = _downstream(seen, block, candidates)
    for index, scale in chosen:
        candidate = candidates[index]
        write = Write(candidate.modules[0], scale)  # the last to return this value
        if index in from_attention:
            if block.attn_write is not None:
                refused["attn_write"] = f"'{block.name}' writes its attention twice"
            block = replace(block, attn_write=write, direct=block.W_O in candidate.modules)
        elif block.mlp_write is not None:
            several = (
                "three times" if block.attention else "twice, neither time with attention seen here"
            )
            refused.setdefault(
                "mlp_write", f"'{block.name}' writes to the residual stream {several}"
            )
        else:
            block = replace(
                block, mlp_write=write, mlp_out=_before_norm(seen, write.module, candidates)
            )
            block = _neurons(seen, block, candidates)
    if block.attn_write is not None and block.mlp_write is not None:
        mid = pre + block.attn_write.scale * _value(candidates, block.attn_write.module).double()
        inside = [
            x
            for name, calls in seen.calls.items()
            if name.startswith(block.name + ".")
            for c in calls
            for x in c.inputs[:1]
        ]
        allowed = RELATIVE_TOLERANCE[call.output.dtype]
        sequential = any(
            x.numel() == mid.numel() and relative_error(x.reshape(mid.shape), mid)[0] <= allowed
            for x in inside
        )
        block = replace(block, parallel=not sequential)
    return block


def _candidates(seen: Recording, block: BlockMap, shape: torch.Size) -> list[Candidate]:
    """Distinct d_model-wide outputs of modules called once inside the block, latest first.

    Some blocks flatten batch and position (OPT): any output with the right last axis and size counts.
    """
    found: list[tuple[int, str, Tensor]] = [
        (calls[0].order, name, calls[0].output.reshape(shape))
        for name, calls in seen.calls.items()
        if name.startswith(block.name + ".")
        and len(calls) == 1
        and calls[0].output is not None
        and calls[0].output.shape[-1] == shape[-1]
        and calls[0].output.numel() == shape.numel()
        and calls[0].output.is_floating_point()
    ]
    candidates: list[Candidate] = []
    for _, name, value in sorted(found, key=lambda item: -item[0]):
        same = next((c for c in candidates if torch.equal(c.value, value)), None)
        if same is None:
            candidates.append(Candidate(value, [name]))
        else:
            same.modules.append(name)
    return candidates


def _solve(
    pre: Tensor, post: Tensor, candidates: list[Candidate], dtype: torch.dtype
) -> list[tuple[int, float]] | None:
    """Smallest set of candidates (with multipliers) that sums to post - pre; None if there is none.

    Least squares on the Gram matrix, so that every pair costs a 2 × 2 solve. Rounding in the block's
    own additions bounds how well a true set can fit: eps times the size of what was added.
    """
    target = (post - pre).reshape(-1)
    columns = [candidate.value.double().reshape(-1) for candidate in candidates]
    if not columns:
        return None
    A = torch.stack(columns, dim=1)
    A = torch.where(A.isfinite(), A, 0.0)
    gram, right = A.T @ A, A.T @ target
    eps = torch.finfo(dtype).eps
    allowed = 4 * eps * (pre.norm() + post.norm())
    for size in (1, 2, 3):
        fits = []
        for chosen in combinations(range(len(columns)), size):
            index = list(chosen)
            if gram[index, index].min() == 0:
                continue
            system = gram[index][:, index]
            scales = torch.linalg.lstsq(system, right[index][:, None], driver="gelsd").solution[
                :, 0
            ]
            quick = target @ target - 2 * scales @ right[index] + scales @ system @ scales
            if quick.clamp_min(0).sqrt() > 1e-3 * target.norm() + 10 * allowed:
                continue
            scales = torch.linalg.lstsq(A[:, index], target[:, None]).solution[:, 0]
            snapped = torch.where((scales - 1).abs() < max(1e-4, 4 * eps), 1.0, scales)
            error = float((target - A[:, index] @ snapped).norm())
            if error <= max(float(allowed), 1e-12) and float(snapped.abs().min()) > 1e-6:
                fits.append((error, list(zip(index, snapped.tolist(), strict=True))))
        if fits:
            plain = [fit for fit in fits if all(scale == 1.0 for _, scale in fit[1])]
            return min(plain or fits, key=lambda fit: fit[0])[1]
    return None


def _downstream(seen: Recording, block: BlockMap, candidates: list[Candidate]) -> set[int]:
    """Candidates that are the attention output, passed through dropout, scaling or a norm or not."""
    starts = [name for name in (block.W_O, block.attention) if name]
    reached = {
        i
        for i, candidate in enumerate(candidates)
        if any(
            name in starts or (block.attention or "?").startswith(name + ".")
            for name in candidate.modules
        )
    }
    for i in reversed(range(len(candidates))):  # in order of execution
        for name in candidates[i].modules:
            call = seen.once(name)
            if call and call.inputs and _elementwise(seen, name, call):
                if any(_same(call.inputs[0], candidates[j].value) for j in reached):
                    reached.add(i)
    return reached


def _elementwise(seen: Recording, name: str, call: ModuleCall) -> bool:
    """Whether a module has no more parameters than a norm: gains and biases, no mixing matrix."""
    width = sum(parameter.numel() for parameter in seen.module.get_submodule(name).parameters())
    return call.output is not None and width <= 2 * call.output.shape[-1]


def _value(candidates: list[Candidate], module: str) -> Tensor:
    return next(candidate.value for candidate in candidates if module in candidate.modules)


def _before_norm(seen: Recording, module: str, candidates: list[Candidate]) -> str:
    """The MLP's own output: what a norm that makes the write reads, else the write itself."""
    call = seen.once(module)
    if call and call.inputs and _elementwise(seen, module, call):
        for candidate in candidates:
            if _same(candidate.value, call.inputs[0]):
                return candidate.modules[0]
    return module


def _neurons(seen: Recording, block: BlockMap, candidates: list[Candidate]) -> BlockMap:
    """W_out: the linear layer that returns mlp_out as it is; none where experts or gates mix it."""
    for name in next(c.modules for c in candidates if block.mlp_out in c.modules):
        call, module = seen.once(name), seen.module.get_submodule(name)
        linear = isinstance(getattr(module, "weight", None), Tensor)
        leaf = linear and not any(True for _ in module.children())
        if leaf and call and call.inputs and not _elementwise(seen, name, call):
            return replace(block, W_out=name, d_mlp=call.inputs[0].shape[-1])
    return block


def _with_ends(spec: Spec, seen: Recording, batch: Batch) -> Spec:
    """Embedding, final norm and unembedding of the map."""
    inside = spec.stack + "."
    last = seen.once(spec.blocks[-1].name)
    assert last is not None and last.output is not None
    embedding = _name_of(seen, "get_input_embeddings") if "input_ids" in batch.inputs else None
    unembedding = _name_of(seen, "get_output_embeddings")
    final = seen.once(unembedding)
    norm = next(
        (
            name
            for name, calls in seen.calls.items()
            if not name.startswith(inside)
            and len(calls) == 1
            and calls[0].order > last.order
            and calls[0].inputs
            and _same(calls[0].inputs[0], last.output)
            and calls[0].output is not None
            and (final is None or (final.inputs and _same(final.inputs[0], calls[0].output)))
            and not any(True for _ in seen.module.get_submodule(name).children())
        ),
        None,
    )
    scale, softcap = 1.0, None
    if final is not None and final.output is not None and final.output.shape == seen.output.shape:
        raw, out = final.output.double(), seen.output.double()
        scale = float((raw * out).sum() / (raw * raw).sum())
        scale = 1.0 if abs(scale - 1) < 1e-4 else scale
        cap = getattr(text_config(seen.module), "final_logit_softcapping", None)
        if cap is not None:
            scale, softcap = 1.0, float(cap)
    return replace(
        spec,
        embedding=embedding,
        final_norm=norm,
        unembedding=unembedding if final is not None else None,
        logit_scale=scale,
        logit_softcap=softcap,
    )


def _name_of(seen: Recording, getter: str) -> str | None:
    try:
        found = getattr(seen.module, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return seen.names.get(found) if isinstance(found, nn.Module) else None
