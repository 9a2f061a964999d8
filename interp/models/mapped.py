"""The layers of a recording as a map describes them: in the axes and the order in which sites are shown."""

from __future__ import annotations

from dataclasses import replace

from interp.models.axes import with_axes
from interp.models.between import with_ahead
from interp.models.in_a_row import with_blocks_in_a_row
from interp.models.recording import Recording
from interp.models.repeated import on_the_stream
from interp.models.several import calls_aside
from interp.models.spec import Spec
from interp.models.stack import Layer, layers_of, with_cross
from interp.models.turned import channels_behind
from interp.models.windows import in_order


def as_mapped(spec: Spec, seen: Recording) -> list[Layer]:
    """Every layer, what is inside it brought to [batch pos width]."""
    recorded = layers_of(seen, spec.stack)
    if [layer.name for layer in recorded] != [block.name for block in spec.blocks]:
        recorded = with_blocks_in_a_row(seen, recorded)
    layers = [
        with_cross(replace(layer, asides=calls_aside(layer.inside, block.asides)), spec.hidden)
        for layer, block in zip(recorded, spec.blocks, strict=True)
    ]
    placed = zip(layers, spec.blocks, strict=True)
    layers = [
        replace(
            layer,
            placed=block.placed,
            attention=layer.attention if block.attention else None,
            added_to=spec.hidden if block.adds else None,
            crosses=layer.crosses if block.crosses else (),
        )
        for layer, block in placed
    ]
    layers = with_axes(layers, [block.axes for block in spec.blocks])
    if any(block.ahead for block in spec.blocks):
        layers = with_ahead(seen, layers, spec.stack, {})
    made = []
    for layer, block in zip(layers, spec.blocks, strict=True):
        if "n_streams" not in spec.hidden_axes:
            layer = replace(layer, in_a_row=spec.n_streams)
        if block.windows is not None:
            layer = in_order(layer, block.windows.layout)
        if block.turned:
            layer = channels_behind(layer, spec.hidden)[0]
        made.append(on_the_stream(layer)[0] if block.repeated else layer)
    return made
