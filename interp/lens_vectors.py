"""The vectors that a lens reads: of which sites, at which positions of which prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.cache import Cache
from interp.sites import Site


@dataclass(frozen=True)
class Rows:
    """The positions that are read, prompt by prompt: where they are in the batch and in the prompt."""

    prompts: list[list[int]]
    prompt: np.ndarray
    position: np.ndarray
    place: Tensor

    @staticmethod
    def of(batch: Batch, positions: Sequence[int] | None) -> Rows:
        ids = batch.ids
        mask = torch.ones_like(ids, dtype=torch.bool) if batch.mask is None else batch.mask.bool()
        prompts, chosen, places = [], [], []
        for row in range(len(ids)):
            real = mask[row].nonzero()[:, 0]
            n = len(real)
            for p in positions or ():
                if not -n <= p < n:
                    raise BadInput(f"position {p}: prompt {row} has {n} tokens, 0 to {n - 1}")
            wanted = range(n) if positions is None else sorted({p % n for p in positions})
            if not wanted:
                raise BadInput("positions is empty: leave it out, or give at least one")
            prompts.append(ids[row][real].tolist())
            chosen += [(row, p) for p in wanted]
            places += [(row, int(real[p])) for p in wanted]
        prompt, position = np.array(chosen).T
        return Rows(prompts, prompt, position, torch.tensor(places, device=ids.device))

    def pick(self, x: Tensor) -> Tensor:
        """x [batch pos ...] at these rows."""
        place = self.place.to(x.device)
        return x[place[:, 0], place[:, 1]]


@dataclass(frozen=True)
class Where:
    """One stack of vectors: a site, and the (layer, head) of each; head −1 for a whole site."""

    site: str
    places: list[tuple[int, int]]

    @property
    def inputs(self) -> list[int] | None:
        """The block whose input each vector is (the last block's output: n_layers); None for writes."""
        shift = {"embed": 0, "resid_pre": 0, "resid_post": 1}.get(self.site)
        return None if shift is None else [layer + shift for layer, _ in self.places]


def check_stages(model: Model, sites: Sequence[Site]) -> None:
    """Refuse layers of earlier stages: their streams have other widths or lengths than the one that is unembedded."""
    last = model.spec.stages[-1]
    for site in sites:
        layers = model.layers_with(site.name) if site.layer is None else [site.layer]
        if any(layer < last[0] for layer in layers):
            raise Refused(
                f"layers 0 to {last[0] - 1} of {model.id} are earlier stages, on streams of other widths or lengths "
                f"than the one that is unembedded; read {last[0]} to {last[-1]}, as '{site.name}.{last[-1]}'"
            )


def check_writes(model: Model, sites: Iterable[Site]) -> None:
    """Refuse heads whose write is not linear in z."""
    for site in sites:
        layers = model.layers_with(site.name)
        if site.name != "z":
            continue
        for layer in layers if site.layer is None else [site.layer]:
            if layer in layers and not model.spec.blocks[layer].direct:
                raise Refused(
                    f"{model.id} normalises what attention writes at layer {layer}, so one head's "
                    "write is not its own; read 'attn_write', or 'attn_out' before that norm"
                )


def vectors_of(
    model: Model, cache: Cache, sites: Iterable[Site], rows: Rows
) -> Iterable[tuple[Where, Float[Tensor, "lens rows d_model"]]]:
    """Each site's vectors, all its layers in one stack; heads one layer at a time."""
    for site in sites:
        if site.name == "embed":
            yield Where("embed", [(0, -1)]), rows.pick(cache["embed"])[None]
            continue
        layers = cache.layers(site.name) if site.layer is None else [site.layer]
        if site.name != "z":
            stack = torch.stack([rows.pick(cache[Site(site.name, layer)]) for layer in layers])
            yield Where(site.name, [(layer, -1) for layer in layers]), stack
            continue
        for layer in layers:
            W_O, write = model.W_O(layer), model.spec.blocks[layer].attn_write
            heads = range(len(W_O)) if site.head is None else [site.head]
            z = rows.pick(cache[Site("z", layer)])[:, heads]
            scale = 1.0 if write is None else write.scale
            written = torch.einsum("rhd,hdm->hrm", z, W_O[heads].to(z)) * scale
            yield Where("z", [(layer, head) for head in heads]), written
