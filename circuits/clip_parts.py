"""A CLIP's image embedding as an exact sum over embedding, heads, biases and MLPs of its vision tower.

The image embedding is a projection of the final norm of one position (CLS). With that norm's scale held at
its value, the embedding is linear in the final residual, and so in every write to it. Which position, norm
and projection those are is read off one forward and then tried on every image: no model is known by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuits.attribution import rows_at
from interp.devices import wide
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.models.spec import first_tensor
from interp.models.towers import image_part
from interp.models.weights import FrozenNorm, linear_map
from interp.run.batch import Batch

PER_PASS = 16
"""Images, or texts, in one forward."""
EXACT = 1e-3
"""Allowed error of a sum, as a share of its size: float32 through tens of layers stays far below it."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Direct contributions to the image embedding, before it is scaled to unit length.

    `embedding` is what the model gives; all the others sum to it: embed, constant (biases after the last
    block) and, over layers, heads, biases (of attention outputs) and mlps.
    """

    embedding: Float[Tensor, "n d_embed"]
    embed: Float[Tensor, "n d_embed"]
    constant: Float[Tensor, " d_embed"]
    heads: Float[Tensor, "n n_layers n_heads d_embed"]
    biases: Float[Tensor, "n n_layers d_embed"]
    mlps: Float[Tensor, "n n_layers d_embed"]

    @property
    def total(self) -> Float[Tensor, "n d_embed"]:
        """The sum of all parts."""
        layers = self.heads.sum((1, 2)) + self.biases.sum(1) + self.mlps.sum(1)
        return self.embed + self.constant + layers


@dataclass(frozen=True, eq=False)
class Readout:
    """How the embedding is read: W applied to the norm of the final residual at `place`."""

    place: int
    norm: nn.Module
    W: Float[Tensor, "d_model d_embed"]
    b: Float[Tensor, " d_embed"]

    @torch.no_grad()
    def frozen(
        self, final: Float[Tensor, "n d_model"], writes: Float[Tensor, "n *parts d_model"]
    ) -> Float[Tensor, "n *parts d_embed"]:
        """What writes to the stream give to the embedding, the norm's scale held at that of `final`."""
        held = FrozenNorm(self.norm, final.shape[-1])
        scale = held.scale(final).view(-1, *[1] * (writes.ndim - 1))
        return (held.centre(wide(writes)) * wide(held.gain) / scale) @ wide(self.W)


def vision_tower(clip: nn.Module, tokenizer: Any = None, id: str = "model") -> Model:
    """The part of a model of images and texts that reads images, as a Model."""
    for name in ("get_image_features", "get_text_features"):
        if not hasattr(clip, name):
            raise Refused(
                f"{id} is a {type(clip).__name__}, which has no {name}: wanted a model that embeds both "
                "images and texts, such as a CLIPModel"
            )
    found = image_part(clip)
    if found is None:
        raise Refused(f"{id} ({type(clip).__name__}) has no part of its own that reads pixels")
    return Model(found[1], tokenizer, id)


def embedding_of(output: Any) -> Float[Tensor, "n d_embed"]:
    """The embedding in what `get_image_features` or `get_text_features` returns."""
    found = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise Refused("the model gives no one embedding for an image or a text")
    return found


@torch.no_grad()
def text_embeddings(
    clip: nn.Module, tokenizer: Any, texts: Sequence[str]
) -> Float[Tensor, "n_texts d_embed"]:
    """Unit embeddings of texts, as the model compares them with images."""
    if tokenizer is None:
        raise BadInput(
            "this checkpoint has no tokenizer: its texts cannot be embedded; pass tokenizer="
        )
    device = next(clip.parameters()).device
    config: Any = clip.config
    room = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    found = []
    for start in range(0, len(texts), 4 * PER_PASS):
        tokens = tokenizer(
            list(texts[start : start + 4 * PER_PASS]),
            padding=True,
            truncation=room is not None,
            max_length=room,
            return_tensors="pt",
        )
        inputs = {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}
        found.append(wide(embedding_of(clip.get_text_features(**inputs))).cpu())  # type: ignore[operator]
    return nn.functional.normalize(torch.cat(found), dim=-1)


@torch.no_grad()
def read_off(clip: nn.Module, vision: Model, pixels: Float[Tensor, "n channels h w"]) -> Readout:
    """Position, norm and projection that make the image embedding of the final residual.

    Raises:
        Refused: the embedding is no linear map of one normed position (attention pooling, a mean over
            patches, an MLP on top).
    """
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        x, y = first_tensor(args), first_tensor(output)
        if x is not None and y is not None:
            calls.append((module, x, y))

    last = f"resid_post.{vision.n_layers - 1}"
    final = vision.run(Batch({"pixel_values": pixels}), capture=[last]).cache[last]
    with ExitStack() as stack:
        for module in clip.modules():
            stack.callback(module.register_forward_hook(keep).remove)
        embedding = embedding_of(clip.get_image_features(pixel_values=pixels))  # type: ignore[operator]
    for linear, x, y in _giving(calls, embedding):
        for norm, before, after in calls:
            place = _place(final, before, after, x)
            if norm is not linear and place is not None:
                W, b = linear_map(linear, final.shape[-1], vision.device)
                found = Readout(place, norm, W, b)
                if _error(norm(final[:, place]) @ W + b, embedding) < EXACT and y.ndim == 2:
                    return found
    raise Refused(
        f"{vision.id}: its image embedding is no linear map of one normed position of the last block (pooled by "
        "attention or averaged, as in SigLIP): it has no exact sum over heads; `interp heads` reads its patterns"
    )


def _giving(
    calls: Sequence[tuple[nn.Module, Tensor, Tensor]], embedding: Tensor
) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """The calls of single layers that gave the embedding itself."""
    for module, x, y in calls:
        leaf = not any(True for _ in module.children())
        if leaf and y.shape == embedding.shape and x.ndim == 2 and torch.equal(y, embedding):
            yield module, x, y


def _place(final: Tensor, before: Tensor, after: Tensor, x: Tensor) -> int | None:
    """Where a norm read the final residual, if it did and its output there is x."""
    if before.shape == final.shape and torch.equal(before, final):
        hits = (after == x[:, None]).all(-1).all(0) if after.shape == final.shape else None
    elif before.shape == x.shape == after.shape and torch.equal(after, x):
        hits = (final == before[:, None]).all(-1).all(0)
    else:
        return None
    return int(hits.nonzero()[0]) if hits is not None and bool(hits.any()) else None


@torch.no_grad()
def image_parts(
    clip: nn.Module, vision: Model, pixels: Float[Tensor, "n channels height width"], advance=None
) -> Parts:
    """Every part's direct contribution to every image's embedding; they sum to it, which is checked.

    c = W g (x − mean x) / σ(final) for a write x at the read position; heads by z_h W_O^h.

    Raises:
        Refused: the embedding is no such sum in this model (`read_off`), or a block's writes are not known.
    """
    for site in ("attn_write", "mlp_write", "attn_out"):
        vision.layers_with(site)
    read = read_off(clip, vision, pixels[:2].to(vision.device))
    n_layers, n_heads = vision.n_layers, vision.spec.n_heads
    found: list[list[Tensor]] = []
    for start in range(0, len(pixels), PER_PASS):
        batch = Batch({"pixel_values": pixels[start : start + PER_PASS].to(vision.device)})
        places = torch.full((batch.size,), read.place)
        sites = ["resid_pre.0", "z", "attn_write", "mlp_write", f"resid_post.{n_layers - 1}"]
        kept = rows_at(vision, batch, places, sites)
        final = wide(kept["resid_post", n_layers - 1])
        heads = final.new_zeros(batch.size, n_layers, n_heads, final.shape[-1])
        biases, mlps = (final.new_zeros(batch.size, n_layers, final.shape[-1]) for _ in range(2))
        for layer in range(n_layers):
            if ("z", layer) in kept:
                z, W_O = wide(kept["z", layer]), wide(vision.W_O(layer))
                write = vision.spec.blocks[layer].attn_write
                # One number, or a number a dimension where the block has a layer scale.
                scale = torch.as_tensor(1.0 if write is None else write.scale).to(z)
                by_head = torch.einsum("nhd,hdm->nhm", z, W_O) * scale
                heads[:, layer, : z.shape[1]] = by_head
                biases[:, layer] = wide(vision.b_O(layer)) * scale
                written = wide(kept["attn_write", layer])
                if _error(by_head.sum(1) + biases[:, layer], written) > EXACT:
                    raise Refused(
                        f"{vision.id}: the heads of layer {layer} do not sum to what its attention writes (a norm "
                        "stands in between)"
                    )
            if ("mlp_write", layer) in kept:
                mlps[:, layer] = wide(kept["mlp_write", layer])
        embed = wide(kept["resid_pre", 0])
        writes = (embed, heads, biases, mlps)
        embedding = wide(read.norm(kept["resid_post", n_layers - 1])) @ wide(read.W) + read.b
        found.append([wide(embedding), *(read.frozen(final, x) for x in writes)])
        if advance is not None:
            advance(batch.size)
    embedding, embed, heads, biases, mlps = (torch.cat(x).cpu() for x in zip(*found, strict=True))
    held = FrozenNorm(read.norm, read.W.shape[0])
    constant = (wide(held.bias) @ wide(read.W) + wide(read.b)).cpu()
    parts = Parts(embedding, embed, constant, heads, biases, mlps)
    if (error := _error(parts.total, embedding)) > EXACT:
        raise Refused(
            f"{vision.id}: direct contributions do not sum to the image embedding (off by {error:.1g} of its "
            "size): something writes to the stream that is neither a head nor an MLP"
        )
    return parts


def _error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
