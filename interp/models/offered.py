"""Which sites a model has, in which layers; the reason where it has none."""

from __future__ import annotations

from dataclasses import dataclass

from interp.errors import BadInput, Refused
from interp.models.spec import Spec
from interp.sites import ATTENTION_SITES, CROSS_SITES, Site, source_of


@dataclass(frozen=True)
class Offered:
    """The sites of a verified map. `id` is what messages call the model."""

    spec: Spec
    id: str

    def layers_with(self, name: str) -> list[int]:
        """The layers that have the site called `name`; raises Refused with the reason if none."""
        if name in self.spec.refused:
            raise Refused(f"{self.id} cannot give '{name}': {self.spec.refused[name]}")
        if name == "embed":
            return [0]
        return [layer for layer in range(self.spec.n_layers) if self._has(name, layer)]

    def _has(self, name: str, layer: int) -> bool:
        block = self.spec.blocks[layer]
        if (of := source_of(name)) is not None:
            cross, which = block.to_source(of[0]), of[1]
            address = {"out": cross and cross.out, "write": cross and cross.write}
            return address.get(which, cross) is not None
        if name in ATTENTION_SITES:
            return block.attention is not None
        if name == "resid_mid":
            return bool(block.before_mid)
        address = {
            "attn_out": block.attn_out,
            "attn_write": block.attn_write,
            "mlp_post": block.W_out,
            "mlp_out": block.mlp_out,
            "mlp_write": block.mlp_write,
        }
        return address.get(name, "resid") is not None

    def layers_to_see(self, name: str) -> list[int]:
        """The same for what a pass captures or edits: of a site of cross-attention, Refused where no layer has it."""
        layers = self.layers_with(name)
        # A model of attention alone has no MLP's sites: nothing is captured of them.
        if layers or name not in CROSS_SITES:
            return layers
        one = any(block.crosses for block in self.spec.blocks)
        why = "no block attends to a second source" if one else "no block attends to a source"
        why = self.spec.refused.get("z", why)
        raise Refused(f"{self.id} cannot give '{name}': {why}")

    def layers_of(self, site: Site) -> list[int]:
        """The layers that a site names: its own, or all that have it.

        Raises:
            BadInput: no such layer, or no such head. Refused: this model cannot give the site.
        """
        layers = self.layers_to_see(site.name)
        if site.layer is not None and site.layer not in layers:
            if why := self.spec.refused.get(f"{site.name}.{site.layer}"):
                raise Refused(f"{self.id} cannot give '{site}': {why}")
            raise BadInput(
                f"no site '{site}' in {self.id}: layers are 0 to {self.spec.n_layers - 1}"
            )
        if site.head is not None:
            block = self.spec.blocks[site.layer or 0]
            source = source_of(site.name)
            of = block if source is None else block.to_source(source[0])
            assert of is not None  # one of `layers`
            n_heads = of.n_kv_heads if "n_kv_heads" in site.axes else of.n_heads
            if site.head >= n_heads:
                raise BadInput(f"no site '{site}' in {self.id}: heads are 0 to {n_heads - 1}")
        return layers if site.layer is None else [site.layer]
