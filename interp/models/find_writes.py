"""What every block of a stack writes, each taken apart in the way that explains it.

A block that nothing explains refuses what it writes itself; the others have their sites.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from interp.models.block_map import BlockMap
from interp.models.draft import Draft
from interp.models.find_gates import gated
from interp.models.mixed import mixed_blocks
from interp.models.repeated import on_the_stream
from interp.models.rescaled import rescaled
from interp.models.reshaped import as_it_returns, before_the_shape_changes
from interp.models.restarted import follow_no_input, restarted
from interp.models.several import HEADS
from interp.models.stack import Layer
from interp.models.sums import Candidate, Sums, taken_apart
from interp.models.thrice import norm_by_norm, with_middle
from interp.models.trials import works_by_position
from interp.models.turned import channels_behind
from interp.models.writes import branch_of, write_map
from interp.sites import CROSSES

ATTENTION_WRITES = ("attn_write",)
MLP_WRITES = ("mlp_write", "mlp_out", "mlp_post")
WRITE_SITES = (*ATTENTION_WRITES, *MLP_WRITES, "resid_mid")
Found = tuple[Sums | None, list[Candidate]]
"""How a block is taken apart, None where nothing explains it, and all that it might be made of."""


def with_writes(draft: Draft) -> list[BlockMap]:
    """Writes of every block; in stacks of several kinds of layer a trial tells MLPs from mixers."""
    if draft.layers[0].n_streams > 1:
        return mixed_blocks(draft)
    key, refused = draft.key, draft.refused
    layers, blocks = list(draft.layers), list(draft.blocks)
    found: list[Found] = []
    for i, layer in enumerate(draft.layers):
        if layer.reshapes(key):
            if i + 1 == len(layers) or layers[i + 1].hidden(key).shape != layer.output.shape:
                refused["resid_post"] = _shapes(layer, key)
            found.append(as_it_returns(layer, blocks[i]))
            continue
        layers[i], blocks[i], sums, candidates = _taken_apart(layer, blocks[i], key)
        found.append((sums, candidates))
    draft = replace(draft, layers=layers, blocks=blocks)
    found = _with_restarts(draft, found)
    for i, layer in enumerate(layers):
        if found[i][0] is None and layer.reshapes(key):
            found[i] = before_the_shape_changes(layer, blocks[i], key)
    hybrid = any(
        sums is not None
        and len(sums.writes) - (layer.attention is not None) - len(layer.crosses) != 1
        for layer, (sums, _) in zip(layers, found, strict=True)
    ) or not all(layer.attention for layer in layers)
    by_position: set[str] | None = None
    if hybrid:
        by_position = _by_position(draft, found)
    made = [
        block
        if sums is None
        else with_middle(
            layer,
            write_map(layer, block, sums, candidates, by_position, key, refused),
            refused,
        )
        for (layer, block), (sums, candidates) in zip(draft.pairs, found, strict=True)
    ]
    unexplained = [i for i, (sums, _) in enumerate(found) if sums is None]
    _refuse_unexplained(replace(draft, blocks=made), unexplained)
    attending = [block for block in made if block.attention and block.along != HEADS]
    if any(block.repeated for block in made) and all(block.attn_out for block in attending):
        refused.pop("attn_out", None)
    return made


def _taken_apart(
    layer: Layer, block: BlockMap, key: int | str
) -> tuple[Layer, BlockMap, Sums | None, list[Candidate]]:
    """The sums of one block, and the layer and block as they are seen for them; the first way that explains it."""
    sums, candidates = taken_apart(layer, key)
    if sums is None:
        of_z = None if block.between else block.W_O
        sums = (
            norm_by_norm(layer, key, candidates, of_z)
            or gated(layer, key, candidates)
            or rescaled(layer, key, candidates)
        )
    if sums is not None:
        return layer, block, sums, candidates
    ways: list[tuple[str, Callable[[Layer], tuple[Layer, frozenset[str]]]]] = [
        ("repeated", on_the_stream),
        ("turned", lambda layer: channels_behind(layer, key)),
    ]
    for field, way in ways:
        again, names = way(layer)
        if names:
            sums, others = taken_apart(again, key)
            if sums is not None:
                return again, replace(block, **{field: getattr(block, field) | names}), sums, others
    return layer, block, None, candidates


def _shapes(layer: Layer, key: int | str) -> str:
    return (
        f"'{layer.name}' returns shape {tuple(layer.output.shape)}, "
        f"reads {tuple(layer.hidden(key).shape)}"
    )


def _by_position(draft: Draft, found: list[Found]) -> set[str]:
    """Those of the branches that write to the stream which work position by position."""
    branches = {
        branch_of(layer.name, candidate, layer, candidates)
        for layer, (sums, candidates) in zip(draft.layers, found, strict=True)
        if sums is not None
        for candidate, _ in sums.writes
    }
    turned = branches & {name for block in draft.blocks for name in block.turned}
    plain = works_by_position(draft, sorted(branches - turned))
    return plain | works_by_position(draft, sorted(turned), turned=True)


def _refuse_unexplained(draft: Draft, unexplained: list[int]) -> None:
    """Refuse what blocks write that nothing explains: by layer, where others are explained."""
    key, alone = draft.key, not any(block.writes for block in draft.blocks)
    for i, (layer, block) in enumerate(draft.pairs):
        why, sites = "", WRITE_SITES
        if block.reshapes_behind and block.mlp_write is None:
            why = f"{_shapes(layer, key)}: what is written behind '{block.reshapes_behind}' was not found"
            sites = MLP_WRITES
        elif i in unexplained and layer.reshapes(key):
            why = f"{_shapes(layer, key)}: what it writes does not add up to that"
        elif i in unexplained:
            why = (
                f"no outputs inside '{layer.name}' sum to resid_post - resid_pre, nor to what its "
                "norms read (a rescaled stream)"
            )
        crosses = [f"{of}write" for of, _ in zip(CROSSES, layer.crosses, strict=False)]
        for site in (*sites, *crosses) if why else ():
            draft.refuse(site if alone else f"{site}.{i}", why)


def _with_restarts(draft: Draft, found: list[Found]) -> list[Found]:
    """What was found, and the sums of blocks that start the stream anew where none was."""
    layers = draft.layers
    anew = {
        i: sums
        for i, (layer, (known, candidates)) in enumerate(zip(layers, found, strict=True))
        if known is None
        and candidates
        and not layer.members
        and (sums := restarted(layer, candidates)) is not None
    }
    names = {layers[i].name for i in anew}
    names = follow_no_input(draft.seen, names, draft.batch, draft.key) if names else names
    return [
        (anew[i], candidates) if i in anew and layers[i].name in names else (sums, candidates)
        for i, (sums, candidates) in enumerate(found)
    ]
