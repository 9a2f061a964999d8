"""The two ends of a model: its embedding, and how logits are made of the final residual."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from interp.models.calls import has_tokens, is_encoder_decoder, main_input, text_config
from interp.models.layout import as_held_inside, n_ahead, shown
from interp.models.projections import same
from interp.models.readout import WHOLE, of_tokens, rest_of_model
from interp.models.recording import ModuleCall, Recording, record
from interp.models.relative import relative_error, relative_tolerance
from interp.models.spec import Spec
from interp.models.stack import Layer
from interp.run.batch import Batch

LONGEST_READOUT = 6
"""Modules between the final residual and the logits (DistilBERT's head has four)."""
PROPORTIONAL = 1e-5
"""One multiplication in float32 apart; 16-bit models are asked less."""


def with_ends(spec: Spec, seen: Recording, layers: list[Layer], batch: Batch) -> Spec:
    """The map with embedding, final norm and unembedding, or a readout of more modules."""
    last = layers[-1].call
    assert last.output is not None
    in_place = as_held_inside(layers[-1].axes) or layers[-1].added_to is not None
    residual = layers[-1].output if in_place else last.output
    if set(batch.inputs) == {"input_ids"}:
        residual = of_tokens(residual, seen.output)
    module: Any = seen.module
    of = module.get_decoder() if batch.has_source else module
    of_ids = has_tokens(module, batch) and not spec.beside
    embedding = _name_of(seen, of, "get_input_embeddings") if of_ids else None
    if spec.named and of_ids:
        embedding = _embedding_around(seen, spec.blocks[0].name)
    if embedding and not isinstance(
        getattr(module.get_submodule(embedding), "weight", None), Tensor
    ):
        embedding = None  # of several codebooks, one each
    unembedding = _name_of(seen, module, "get_output_embeddings")
    final = seen.once(unembedding)
    if final is not None and not final.inputs:  # an embedding, multiplied with outside any module
        final = None
    if final is None and (head := _head_of_letters(seen, last, residual)):
        unembedding, final = head, seen.once(head)
    after = {
        name: late[0]
        for name, calls in seen.calls.items()
        if len(late := [call for call in calls if call.start >= last.order]) == 1 and late[0].inputs
    }
    if n_ahead(layers[-1].axes):
        after = {name: _of_tokens(call, layers[-1], seen.output) for name, call in after.items()}
    norm, before = _final_norm(seen, after, residual, final)
    if norm is not None and (dtype := after[norm].inputs[0].dtype) != last.output.dtype:
        spec = replace(spec, final_dtype=dtype)
    if final is None or final.output is None or final.output.shape != seen.output.shape:
        spec = replace(spec, embedding=embedding, final_norm=norm)
        of_words = seen.output.shape[-1] == _d_vocab(module)
        return _by_other_ways(spec, seen, layers, residual, after, batch) if of_words else spec
    if before is None:
        spec = replace(spec, embedding=embedding, unembedding=unembedding)
        return _by_other_ways(spec, seen, layers, residual, after, batch)
    if _biased(final.output, seen.output):
        why = "a bias that is no module's is added to what W_U returns"
        if _whole(spec, seen, layers[-1].output):
            why += "; model.unembed gives the logits all the same, by the model's own code"
            spec = replace(spec, readout=WHOLE, absent=spec.absent | {"unembedding"})
        refused = {**spec.refused, "unembedding": why}
        ends = {"embedding": embedding, "final_norm": norm, "unembedding": unembedding}
        return replace(spec, **ends, refused=refused)  # type: ignore[arg-type]
    scale, softcap = _scale_and_cap(seen, final.output, seen.output)
    if (
        before != 1.0
        and getattr(seen.module.get_submodule(unembedding or ""), "bias", None) is None
    ):
        scale = scale * before
    return replace(
        spec,
        embedding=embedding,
        final_norm=norm,
        unembedding=unembedding,
        logit_scale=scale,
        logit_softcap=softcap,
    )


def _by_other_ways(
    spec: Spec,
    seen: Recording,
    layers: list[Layer],
    residual: Tensor,
    after: dict[str, ModuleCall],
    batch: Batch,
) -> Spec:
    """The map with a readout where no one linear layer makes the logits of the final residual, or why none."""
    no_one = spec.absent | {"unembedding"}
    final = layers[-1].output
    if set(batch.inputs) == {"input_ids"} and seen.output.shape[:-1] == batch.ids.shape:
        final = of_tokens(final, seen.output)
    if final.shape[:-1] != seen.output.shape[:-1]:
        why = (
            "logits are of other rows or positions than the final residual (several heads, or what changes "
            "its length): no one W_U makes them of it"
        )
        return replace(spec, refused={**spec.refused, "unembedding": why}, absent=no_one)
    if path := _path(seen, after, residual):
        why = (
            f"'{path[-1]}' makes the logits, and is no linear layer that reads the final residual or its norm"
            if spec.unembedding is None
            else f"'{path[0]}' transforms the final residual before W_U is reached, so logits are not linear in it"
        )
        why += "; model.unembed gives them all the same"
        refused = {**spec.refused, "unembedding": why}
        return replace(spec, readout=path, refused=refused, absent=no_one)
    why = "no chain of modules leads from the final residual to the logits"
    if _whole(spec, seen, layers[-1].output):
        why += "; model.unembed gives them all the same, by the model's own code behind its blocks"
        refused = {**spec.refused, "unembedding": why}
        return replace(spec, readout=WHOLE, refused=refused, absent=no_one)
    if _reads_earlier(seen, layers, batch):
        why = "logits are made of the final residual and of what earlier blocks read or returned besides"
        spec = replace(spec, absent=no_one, bypassed=spec.bypassed or why)
    return replace(spec, refused={**spec.refused, "unembedding": why})


def _of_tokens(call: ModuleCall, last: Layer, logits: Tensor) -> ModuleCall:
    """A call behind the blocks, at the tokens' positions alone of what has those of the last block."""
    assert last.call.output is not None
    length = last.call.output.shape[:2]

    def one(x: Tensor) -> Tensor:
        mine = x.ndim == 3 and x.shape[:2] == length
        return of_tokens(shown(x, last.axes, len(x)), logits) if mine else x

    output = None if call.output is None else one(call.output)
    return replace(call, inputs=[one(x) for x in call.inputs], output=output)


def _d_vocab(module: nn.Module) -> int | None:
    return getattr(text_config(module), "vocab_size", None) if hasattr(module, "config") else None


def _head_of_letters(seen: Recording, last: ModuleCall, residual: Tensor) -> str | None:
    """The linear layer behind the blocks that gives each position logits of the vocabulary, by no name (CTC)."""
    if seen.output.shape != (*residual.shape[:-1], _d_vocab(seen.module)):
        return None
    for name, calls in seen.calls.items():
        (call, *more), weight = calls, getattr(seen.module.get_submodule(name), "weight", None)
        if not more and call.start >= last.order and isinstance(weight, Tensor):
            if weight.ndim == 2 and call.output is not None and call.output.equal(seen.output):
                return name
    return None


def _biased(raw: Tensor, out: Tensor) -> bool:
    """Whether out is raw plus the same vector at every position (translation models' final bias)."""
    added = (out.double() - raw.double()).reshape(-1, out.shape[-1])
    apart, size = float((added - added[0]).abs().max()), float(added.abs().max())
    # A soft-cap on small 16-bit logits is hardly more than their rounding: it is not the same everywhere.
    rounding = 4 * torch.finfo(out.dtype).eps * float(out.abs().max())
    return apart <= rounding < size and 4 * apart <= size


def _final_norm(
    seen: Recording, after: dict[str, ModuleCall], residual: Tensor, final: ModuleCall | None
) -> tuple[str | None, float | None]:
    """The norm between the final residual and the unembedding, and what its output is multiplied with.

    None for the factor where the unembedding reads neither the norm's output nor the residual itself.
    """
    for name, call in after.items():
        part = seen.module.get_submodule(name)
        leaf = not isinstance(part, nn.Dropout) and not any(True for _ in part.children())
        vectors = all(parameter.ndim < 2 for parameter in part.parameters())
        reads = call.inputs[0]  # a stream in float32 may be rounded first
        if call.output is None or not leaf or not vectors:
            continue
        if same(reads, residual.to(reads.dtype)):
            if final is None:
                return name, 1.0
            if (factor := _factor(call.output, final.inputs[0])) is not None:
                return name, factor
    return None, None if final is None else _factor(
        residual.to(final.inputs[0].dtype), final.inputs[0]
    )


def _factor(a: Tensor, b: Tensor) -> float | None:
    """The number that makes b of a, None where there is none."""
    if a.numel() != b.numel():
        return None
    x, y = a.double().reshape(-1), b.double().reshape(-1)
    if torch.equal(x, y):
        return 1.0
    factor = float(x @ y / (x @ x).clamp_min(1e-30))
    allowed = max(PROPORTIONAL, 4 * torch.finfo(b.dtype).eps)
    return factor if float((factor * x - y).norm()) <= allowed * float(y.norm()) else None


def _path(seen: Recording, after: dict[str, ModuleCall], residual: Tensor) -> tuple[str, ...]:
    """The shortest chain of modules that makes logits of the final residual; () if there is none."""
    paths: list[tuple[tuple[str, ...], Tensor]] = [((), residual)]
    for _ in range(LONGEST_READOUT):
        longer = []
        for path, value in paths:
            for name, call in after.items():
                if call.output is None or not call.output.is_floating_point():
                    continue
                if call.inputs[0].shape != value.shape or not torch.equal(call.inputs[0], value):
                    continue
                if call.output.shape == seen.output.shape and torch.equal(call.output, seen.output):
                    return (*path, name)
                if call.output.shape != value.shape or not torch.equal(call.output, value):
                    longer.append(((*path, name), call.output))
        paths = longer
    return ()


def _whole(spec: Spec, seen: Recording, residual: Tensor) -> bool:
    """Whether the model's own code after its blocks makes the same logits of a residual at any position."""
    sound = is_encoder_decoder(seen.module) and main_input(seen.module) != "input_ids"
    of_tokens = spec.d_vocab is not None and not sound
    in_parts = any(block.members for block in spec.blocks) or n_ahead(spec.hidden_axes)
    in_parts = in_parts or any(block.adds for block in spec.blocks)
    several = spec.named or in_parts  # other stacks read other inputs besides
    if spec.tuple_blocks or several or not of_tokens or seen.output.ndim != residual.ndim:
        return False
    logits = rest_of_model(spec, seen.module, residual.flip(1)).flip(1)
    allowed = relative_tolerance(seen.output.dtype)
    return relative_error(logits, seen.output)[0] <= allowed


def _reads_earlier(seen: Recording, layers: list[Layer], batch: Batch) -> bool:
    """Whether logits change with the tokens, while the last block returns what it returned."""
    if set(batch.inputs) != {"input_ids"}:
        return False
    returned: dict[str, list[Tensor]] = {}
    for layer in layers:
        if layer.returns == layers[-1].returns:
            assert layer.call.output is not None
            returned.setdefault(layer.returns, []).append(layer.call.output)
    logits = record(seen.module, Batch.of_ids(batch.ids.flip(0)), restored=returned).output
    return relative_error(logits, seen.output)[0] > relative_tolerance(seen.output.dtype)


def _scale_and_cap(seen: Recording, raw: Tensor, out: Tensor) -> tuple[float, float | None]:
    """(s, c) of what the model does to the unembedding's output x: s·x, or c·tanh(s·x / c).

    Caps are those that the config names: on small logits they are hardly seen.
    """
    x, y = raw.double(), out.double()
    config: Any = text_config(seen.module)
    names = (*config.to_dict(), *dir(type(config)))  # of classes that fix it, too
    values = {name: getattr(config, name) for name in names if "softcap" in name.replace("_", "")}
    caps = {n: float(v) for n, v in values.items() if isinstance(v, (int, float)) and v > 0}
    final = {name: cap for name, cap in caps.items() if name.startswith("final")}
    fits: list[tuple[float, float, float | None]] = []
    for cap in (final or caps).values():
        scale = _fitted(x, cap * torch.atanh((y / cap).clamp(-1 + 1e-12, 1 - 1e-12)))
        fits.append((float((torch.tanh(scale * x / cap) * cap - y).norm()), scale, cap))
    if not final and not torch.equal(raw, out):
        scale = _fitted(x, y)
        fits.append((float((scale * x - y).norm()), scale, None))
    if not fits or (not final and torch.equal(raw, out)):
        return 1.0, None
    _, scale, cap = min(fits, key=lambda fit: fit[0])
    return scale, cap


def _fitted(x: Tensor, y: Tensor) -> float:
    """The number that makes y of x best; 1 where that is what it rounds to."""
    scale = float((x * y).sum() / (x * x).sum().clamp_min(1e-30))
    return 1.0 if abs(scale - 1) < 1e-4 else scale


def _embedding_around(seen: Recording, block: str) -> str | None:
    """The token embedding that the innermost part around a block names, of those that name one."""
    parts = block.split(".")
    around = [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]
    names = (_name_of(seen, seen.module.get_submodule(x), "get_input_embeddings") for x in around)
    return next((name for name in names if name), None)


def _name_of(seen: Recording, module: nn.Module, getter: str) -> str | None:
    try:
        found = getattr(module, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return seen.names.get(found) if isinstance(found, nn.Module) else None
