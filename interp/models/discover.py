"""Where a model's parts are, read off one recorded forward.

An attention module is whatever calls the window; W_O is the linear layer that reads z; a block is the
member of the ModuleList that holds the attention module; what a block writes is solved for.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import torch

from interp.models.axes import find_axes, with_axes
from interp.models.between import with_ahead, with_attention_ahead
from interp.models.block_map import BlockMap, Member
from interp.models.bypass import read_besides
from interp.models.calls import beside_tokens, has_tokens, main_input, text_config
from interp.models.channels import is_over_channels
from interp.models.draft import Draft
from interp.models.ends import with_ends
from interp.models.find_placed import find_placed
from interp.models.find_stack import find_stack
from interp.models.find_windows import find_windows
from interp.models.find_writes import with_writes
from interp.models.layout import PARTED, PARTS, POSITIONS_FIRST, as_held_inside
from interp.models.mixed import WHY, streams_in_a_row
from interp.models.named import before_attention, rows_apart, stands_beside_tokens
from interp.models.pieces import pieces
from interp.models.projections import (
    attention_map,
    cross_attention,
    gated_attention_map,
    with_output,
)
from interp.models.recording import AttentionCall, Recording
from interp.models.repeated import shared_with_asides
from interp.models.restarted import restarts
from interp.models.several import HEADS, asides_of
from interp.models.spec import Spec
from interp.models.stack import Layer, starts_stage
from interp.models.trials import scaled_z, sees_no_later
from interp.models.windows import in_order
from interp.run.batch import Batch
from interp.sites import CROSSES, SELF_SITES


def discover(seen: Recording, batch: Batch, called: str | None = None) -> Spec:
    """The map that the recording suggests, not yet verified; of the stack called so, where a model has several."""
    refused: dict[str, str] = {}
    stack, named, layers, key = find_stack(seen, batch, refused, called)
    axes = find_axes(seen, layers, key, batch)
    layers = with_axes(find_placed(seen, layers, axes, key, batch), axes)
    _refuse_no_one_attention(layers, refused)
    layers = with_ahead(seen, layers, stack, refused)
    layers, repeated = zip(*map(shared_with_asides, layers), strict=True)
    layers = list(layers)
    shapes = [layer.hidden(key).shape for layer in layers]
    starts = [False, *(starts_stage(a, b, key) for a, b in pairwise(layers))]
    blocks = [
        BlockMap(
            layer.name,
            d_model=shape[-1],
            axes=layer.axes,
            starts_stage=start,
            ends_stage=layer.reshapes(key) and layer.output.shape == after,
            asides=asides_of(layer.inside, layer.asides),
            members=tuple(Member(name, seen.call(name).is_tuple) for name in layer.members),
            adds=layer.added_to is not None,
            repeated=names,
        )
        for layer, shape, start, after, names in zip(
            layers, shapes, starts, [*shapes[1:], None], repeated, strict=True
        )
    ]
    absent: set[str] = set()
    if any(layer.attention for layer in layers):
        draft = _with_windows(Draft(seen, batch, key, layers, blocks, refused))
        _queries_and_keys(draft)
        draft = _with_parts(draft)
        layers, blocks, refused = draft.layers, draft.blocks, draft.refused
        absent = _absent(blocks, refused) | draft.absent
        causal = any(layer.attention for layer in layers) and all(
            _causal(layer.attention) for layer in layers if layer.attention
        )
    else:
        causal = sees_no_later(seen, layers, batch)
    main = main_input(seen.module)
    if "input_ids" in batch.inputs and main not in ("input_ids", "pixel_values") and not named:
        if not batch.has_source and shapes[0][1] != batch.ids.shape[1]:
            beside_tokens.add(seen.module)
    beside = named and stands_beside_tokens(seen, layers[0], key, batch)
    of_ids = has_tokens(seen.module, batch) and not beside
    config: Any = getattr(seen.module, "config", None)
    text = text_config(seen.module) if config is not None else None
    n_ctx = getattr(text, "max_position_embeddings", None)
    anew = [
        restarts(block) and not layer.reshapes(key)  # another shape is another stage's stream
        for block, layer in zip(blocks, layers, strict=True)
    ]
    spec = Spec(
        family=getattr(config, "model_type", type(seen.module).__name__),
        stack=stack,
        blocks=tuple(blocks),
        d_model=shapes[-1][-1],
        causal=causal,
        d_vocab=getattr(text, "vocab_size", None) if of_ids else None,
        n_ctx=n_ctx if isinstance(n_ctx, int) and n_ctx > 0 else None,
        named=named,
        beside=beside,
        together=batch.size == 1 or not rows_apart(seen, batch),
        hidden=key,
        n_streams=layers[0].n_streams,
        tuple_blocks=any(layer.call.is_tuple for layer in layers),
        dict_key=layers[0].call.dict_key,
        copies=frozenset(
            name for name, calls in seen.calls.items() if any(call.mutated for call in calls)
        ),
        bypassed=next(filter(None, map(_goes_on_besides, blocks, anew)), ""),
        refused=refused,
        absent=frozenset(absent),
    )
    starts = [stage[0] for stage in spec.stages[1:]]
    if (starts or named) and not spec.bypassed and read_besides(seen, layers, key, batch, starts):
        of = "a stage" if starts else f"'{stack}'"
        why = f"what blocks of {of} return is read by more than the block after them"
        spec = replace(spec, bypassed=why)
    spec = with_ends(spec, seen, layers, batch)
    if named and not before_attention(seen, layers[0], key, batch):
        spec = replace(spec, embedding=None)
    return spec


def _refuse_no_one_attention(layers: list[Layer], refused: dict[str, str]) -> None:
    """Refuse attention's sites where the calls of a layer are no one attention, in that layer or everywhere."""
    alone = any(layer.attention for layer in layers)
    for i, layer in enumerate(layers):
        if layer.attention is not None or not layer.inside.attention:
            continue
        in_parts = layer.axes in (PARTS, PARTED) and not layer.placed
        why = (
            f"which parts of an input the queries and keys of '{layer.name}' are of was not found: its rows of "
            "attention are not of one part each, and together of all"
            if in_parts
            else f"block '{layer.name}' attends {len(layer.inside.attention)} times, and that is no one attention: "
            f"heads of different shapes, or too many sources ({_shapes(layer)})"
        )
        for site in (*SELF_SITES, "attn_out", "attn_write"):
            refused[f"{site}.{i}" if in_parts and alone else site] = why


def _shapes(layer: Layer) -> str:
    """What a layer's queries are of, by attention module: rows of the batch (windows, say), heads and positions."""
    found = {}
    for call in layer.inside.attention:
        rows, heads, positions, _ = call.tensors["q"].shape
        name = layer.inside.names[call.module].removeprefix(f"{layer.name}.")
        found[f"'{name}': {rows} rows of {positions} queries, {heads} heads"] = None
    return "; ".join(
        [*found, f"for {layer.inside.n_rows} inputs of {layer.output.shape[1]} positions"]
    )


def _with_parts(draft: Draft) -> Draft:
    """Attention and writes of every block; of several streams in a row where one stream does not explain any."""
    one = _with_attention_and_writes(draft)
    if any(block.writes or block.mixed for block in one.blocks):
        return one
    n = streams_in_a_row(draft.layers)
    if n > 1:
        several = [replace(layer, in_a_row=n) for layer in draft.layers]
        again = _with_attention_and_writes(replace(draft, layers=several))
        if all(block.mixed for block in again.blocks):
            return again
    return one


def _with_attention_and_writes(draft: Draft) -> Draft:
    """The draft with both, and with what they refuse; the given one stays as it is."""
    draft = replace(draft, refused=dict(draft.refused))
    draft = replace(draft, blocks=_with_attention(draft))
    return replace(draft, blocks=with_writes(draft))


def _goes_on_besides(block: BlockMap, anew: bool) -> str:
    """What of a block's stream goes on by other ways than its output; "" if nothing is known to."""
    if anew:
        return (
            f"'{block.name}' starts the residual stream anew: what it reads goes on by other ways"
        )
    if block.asides:
        return f"'{block.name}' returns another stream besides, to which '{block.asides[0].attention}' writes"
    return ""


def _causal(attention: AttentionCall) -> bool:
    """Whether no query sees a key after itself; keys fewer than queries are each of several positions."""
    n_queries, n_keys = (attention.tensors[name].shape[2] for name in ("q", "k"))
    rows = torch.cat(attention.rows, dim=2)[..., :n_queries]
    return n_keys >= n_queries and not bool(rows.triu(1).any())


def _with_windows(draft: Draft) -> Draft:
    """Attention within windows in the order of positions; refused where it is not known how they are cut."""
    key = draft.key
    windows = find_windows(draft.seen, draft.layers, key, draft.batch)
    layers = [
        in_order(layer, windows[i].layout) if i in windows else layer
        for i, layer in enumerate(draft.layers)
    ]
    unseen: dict[int, str] = {}
    absent: set[int] = set()
    for i, layer in enumerate(layers):
        rows = layer.hidden(key).shape[0]
        q = None if layer.attention is None else layer.attention.tensors["q"]
        if q is None or i in windows or layer.placed:
            continue
        n_pos, whole = layer.hidden(key).shape[1], layer.output.shape[1]
        if is_over_channels(layer, key):
            absent.add(i)
            why = (
                f"'{layer.name}' attends from channels to channels ({q.shape[2]} of them in each of {q.shape[1]} "
                "groups), each of which holds all positions: it has no attention between positions"
            )
        elif q.shape[0] != rows or _padded(layer, key):
            why = (
                f"'{layer.name}' attends in windows ({q.shape[0]} of {q.shape[2]} positions, for {rows} "
                "rows of the batch), and which positions of the residual stream they hold was not found"
            )
        elif q.shape[2] not in (n_pos, whole):
            why = f"'{layer.name}' has queries of {q.shape[2]} of its {n_pos} positions where its attention is seen"
        else:
            continue
        unseen[i] = why
        layers[i] = replace(layer, attention=None)
    alone = any(layer.attention for layer in layers)
    for (i, why), site in product(unseen.items(), (*SELF_SITES, "attn_out")):
        draft.refuse(f"{site}.{i}" if alone else site, why)
    blocks = [replace(block, windows=windows.get(i)) for i, block in enumerate(draft.blocks)]
    without = frozenset(
        f"{site}.{i}" for i in absent if alone for site in (*SELF_SITES, "attn_out")
    )
    return replace(draft, layers=layers, blocks=blocks, absent=without)


def _padded(layer: Layer, key: int | str) -> bool:
    """Whether the attention over pieces of a block is one of more positions than its stream has."""
    call, lengths = layer.attention, (layer.hidden(key).shape[1], layer.output.shape[1])
    return call is not None and call.module in pieces and call.tensors["q"].shape[2] not in lengths


def _queries_and_keys(draft: Draft) -> None:
    """Refuse q and k where the scores are not made through them alone: they are shown without a width."""
    for layer in draft.layers:
        calls = [(layer.attention, ""), *zip(layer.crosses, CROSSES, strict=False)]
        for call, prefix in calls:
            if call is not None and call.tensors["q"].shape[-1] == 0:
                why = f"the scores of '{layer.name}' are not made of the residual stream through queries and keys alone"
                draft.refuse(prefix + "q", why)
                draft.refuse(prefix + "k", why)


def _with_attention(draft: Draft) -> list[BlockMap]:
    """Heads and W_O of every layer that attends; a trial where something stands between z and W_O."""
    seen, layers, key, batch = draft.seen, draft.layers, draft.key, draft.batch
    blocks = [
        attention_map(layer, block, key, batch) if layer.attention else block
        for layer, block in draft.pairs
    ]
    if any(map(_with_something_between, blocks)):
        changed, factors = scaled_z(seen, layers, batch)
        of_call = {id(call): factor for call, factor in zip(seen.attention, factors, strict=True)}
        blocks = [
            gated_attention_map(layer, again, of_call[id(layer.attention)], block, key)
            if _with_something_between(block)
            else block
            for layer, again, block in zip(layers, changed, blocks, strict=True)
        ]
    blocks = [
        with_output(layer, block, key)
        if block.windows and block.attention and block.W_O is None and not block.along
        else block
        for layer, block in zip(layers, blocks, strict=True)
    ]
    blocks = [
        replace(
            block,
            crosses=tuple(
                cross_attention(replace(layer, attention=call), key, batch)
                for call in layer.crosses
            ),
        )
        for layer, block in zip(layers, blocks, strict=True)
    ]
    blocks = with_attention_ahead(replace(draft, blocks=blocks))
    for block in blocks:
        for prefix, cross in block.sources:
            if cross.out is None:
                why = f"no module of '{block.name}' returns the output of '{cross.attention}'"
                draft.refuse(f"{prefix}out", why)
        if block.attention and block.attn_out is None and block.along != HEADS:
            draft.refuse(
                "attn_out", f"no module of '{block.name}' returns the output of '{block.attention}'"
            )
    return blocks


def _with_something_between(block: BlockMap) -> bool:
    """Whether W_O was not seen to read z, where a trial can tell what stands between them."""
    alone = (
        not block.along
        and block.windows is None
        and (block.axes == POSITIONS_FIRST or not as_held_inside(block.axes))
    )
    return block.attention is not None and block.W_O is None and alone


def _absent(blocks: list[BlockMap], refused: dict[str, str]) -> set[str]:
    """Sites that the architecture does not have, added to `refused` with the reason."""
    absent = {}
    attending = [block for block in blocks if block.attention]
    if several := next((block for block in blocks if block.along == HEADS), None):
        names = " and ".join(f"'{name}'" for name in dict.fromkeys(several.attends))
        why = f"{names} each return an output of their own: '{several.name}' has no one attention output"
        absent |= dict.fromkeys(("attn_out", "attn_write"), why)
    if not any(block.W_out for block in blocks):
        attention_alone = all(
            block.attn_write is not None and list(block.writes) == [block.attn_write]
            for block in blocks
        )
        absent["mlp_post"] = (
            "all that blocks add is attention's output: there is no MLP"
            if attention_alone
            else "no one linear layer makes an MLP's output (experts, or a gate)"
        )
    if any(block.mixed for block in blocks):
        absent |= dict.fromkeys(("attn_write", "mlp_write", "resid_mid"), WHY)
    elif not any(block.before_mid for block in blocks):
        parallel = any(block.parallel for block in blocks)
        why = "attention and MLP are parallel" if parallel else "no block writes twice"
        absent["resid_mid"] = f"{why}: nothing lies between them"
    if without := [block for block in attending if block.attn_write is None and block.writes]:
        adds = " and ".join(f"'{write.module}'" for write in without[0].writes)
        why = (
            f"'{without[0].name}' does not add its attention's output to the residual stream: all that "
            f"it adds is the output of {adds}"
        )
        (absent if without == attending else refused).setdefault("attn_write", why)
    new = {site: why for site, why in absent.items() if site not in refused}
    refused.update(new)
    return set(new)
