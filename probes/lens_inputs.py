"""What a learned lens reads, and its maps.

A unit is one map: of a block's input (tuned lens) or of one head's z (Attention Lens).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import Refused
from interp.models.model import Model

Maps = dict[str, Tensor]
"""A and b, or U, V and b, of all units: [n_layers units ...]."""


@dataclass(frozen=True)
class Inputs:
    """Which activations a kind of lens reads: every unit is one of a layer's `units`.

    Attributes:
        kind: "layers" (block inputs, one unit a layer) or "heads" (z, one unit a head).
        layers: the layers of the first axis of all maps. units: of each layer. d_in: width of one.
    """

    model: Model
    kind: str
    layers: tuple[int, ...]
    units: int
    d_in: int

    @staticmethod
    def of(model: Model, kind: str, layers: Sequence[int]) -> Inputs:
        """The inputs of these layers; Refused where heads have none, or write through a norm."""
        if kind == "layers":
            return Inputs(model, kind, tuple(layers), 1, model.spec.d_model)
        known = model.layers_with("z")
        layers = [layer for layer in layers if layer in known]
        if not layers:
            raise Refused(f"{model.id} has no heads in the layers named; they are in {known}")
        blocks = [model.spec.blocks[layer] for layer in layers]
        for layer, block in zip(layers, blocks, strict=True):
            if not block.direct:
                raise Refused(
                    f"{model.id} normalises what attention writes at layer {layer}, so one head's "
                    "write is not its own; a lens of kind 'layers' can be trained"
                )
        shapes = {(block.n_heads, block.d_head) for block in blocks}
        if len(shapes) > 1:
            raise Refused(
                f"heads of {model.id} differ in shape between layers: {sorted(shapes)} (n_heads, "
                "d_head); name layers that are alike"
            )
        return Inputs(model, kind, tuple(layers), *shapes.pop())

    def read(
        self, ids: Int[Tensor, "n pos"], places: slice | Tensor, only: Sequence[int] | None = None
    ) -> tuple[dict[int, Float[Tensor, "units rows d_in"]], Float[Tensor, "rows d_model"]]:
        """(activations by place in `layers`, final residuals) at these positions of every window.

        `only`: places in `layers` that are wanted. Every window's rows stand together.
        """
        wanted = range(len(self.layers)) if only is None else only
        name = "resid_pre" if self.kind == "layers" else "z"
        last = f"resid_post.{self.model.n_layers - 1}"
        sites = {place: f"{name}.{self.layers[place]}" for place in wanted}
        cache = self.model.run(ids, capture=[*sites.values(), last], logits=False).cache
        read: dict[int, Tensor] = {}
        for place, site in sites.items():
            x = cache[site][:, places].float().flatten(0, 1)
            read[place] = x[None] if self.kind == "layers" else x.transpose(0, 1).contiguous()
        return read, cache[last][:, places].flatten(0, 1)

    def plainly(
        self, place: int, x: Float[Tensor, "units rows d_in"]
    ) -> Float[Tensor, "units rows d_model"]:
        """What the logit lens unembeds: the residual itself, or what each head writes."""
        base = self.base(place)
        return x if base is None else x @ base

    def base(self, place: int) -> Float[Tensor, "units d_in d_model"] | None:
        """The map of the logit lens: None for the identity, else each head's slice of W_O."""
        if self.kind == "layers":
            return None
        layer = self.layers[place]
        write = self.model.spec.blocks[layer].attn_write
        return self.model.W_O(layer).float() * (1.0 if write is None else write.scale)

    def translated(
        self, maps: Mapping[str, Tensor], place: int, x: Float[Tensor, "units rows d_in"]
    ) -> Float[Tensor, "units rows d_model"]:
        """x A + b; of a low rank, x U V + b, for layers added to x itself."""
        at = {name: value[place].to(x.device) for name, value in maps.items()}
        if "A" in at:
            return torch.baddbmm(at["b"][:, None], x, at["A"])
        y = torch.baddbmm(at["b"][:, None], x @ at["U"], at["V"])
        return x + y if self.kind == "layers" else y
