"""What heads of a CLIP write to the image embedding, told in texts.

Gandelsman, Efros & Steinhardt 2024: the image embedding is a sum of direct contributions, most of what
tells images apart comes from the attention heads of the last layers, and each head moves the embedding
along few directions, which TextSpan names by greedily chosen texts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from circuits.clip_parts import Parts, image_parts, text_embeddings, vision_tower
from circuits.text_span import Span, by_chance, text_span
from interp.data.images import image_prompts
from interp.errors import BadInput
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.files import read_utf8
from interp.run.progress import Progress

LAYERS, TEXTS, IMAGES, EXTREMES = 4, 8, 64, 3
SUFFIX = ".txt"


def check_options(
    *, k: int = TEXTS, layers: int = LAYERS, n: int = IMAGES, models: Sequence[Any] | None = None
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    for name, value, least in (("k", k, 1), ("layers", layers, 1), ("n", n, 4)):
        if value < least:
            raise BadInput(f"{name}={value}; wanted at least {least}")


def strongest(report: Report) -> pd.DataFrame:
    """The heads that tell images apart most, with their first texts."""
    table: Any = report.table.nlargest(12, "share")
    return table[["layer", "head", "share", "explained", "by_chance", "text"]]


@analysis(
    name="clip_heads",
    source="Gandelsman, Efros & Steinhardt 2024, Interpreting CLIP's Image Representation via Text-Based "
    "Decomposition",
    example="interp clip-heads openai/clip-vit-base-patch32 --texts texts.txt --images photographs",
    figure="map",
    validate=check_options,
    summary=strongest,
    reads="models",
)
def clip_heads(
    models: Sequence[str | nn.Module],
    *,
    texts: Sequence[str] | None = None,
    images: str | Path | Tensor | None = None,
    n: int = IMAGES,
    layers: int = LAYERS,
    k: int = TEXTS,
    tokenizer: Any = None,
    device: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Report:
    """Heads of a CLIP's last layers described by texts, with the variance of image embeddings they carry.

    The image embedding is taken apart into direct contributions c of embedding, heads, biases and MLPs,
    with the final norm's scale held fixed; they sum to it exactly. A part's share is
    Σ ⟨c − c̄, e − ē⟩ / Σ ‖e − ē‖² over images: shares of all parts sum to 1. Each head is then named by TextSpan
    (`text_span`). What a head does to the embedding through later layers is not in its direct contribution.
    Texts name directions among those offered; compare `explained` with `by_chance`, the same for contributions
    turned at random: with few images and many texts it is high.

    Args:
        models: one model of images and texts: a hub id, a folder, or (in Python) the module itself.
        texts: descriptions to choose from, or text files with one a line; by default a small bank that
            fits the drawn images.
        images: a folder of pictures, or (in Python) a tensor [n channels height width] of numbers 0 to 1; by
            default drawn from the seed. Use photographs to learn about photographs.
        n: how many images; at least 4.
        layers: how many of the last layers have their heads described.
        k: texts for each head.
        tokenizer: for a module.
        device: "cpu", "cuda", …
        seed: of drawn images and of random turns.
        progress: show a progress bar; by default in a terminal or a notebook.

    Returns: a Report with tables "clip_heads" (a row a described head: its share, the variance that its texts
        explain, the same by chance, its first text), "texts" (a row for every head and text, with the variance
        explained up to it), "images" (those furthest along each head's first text, either way), "parts" (every
        part's share) and "ablation" (how much of the embedding is kept when everything but some heads is replaced
        by its mean over images).

    Raises:
        BadInput: not one model, no texts, unreadable images. Refused: not a model of images and texts, or its
            embedding is no linear readout of one position (SigLIP pools by attention).

    >>> clip_heads([], texts=["a cat"])
    Traceback (most recent call last):
    interp.errors.BadInput: 0 models were given; wanted one model of images and texts
    """
    from interp.models.load import load_checkpoint

    started = time.perf_counter()
    check_options(k=k, layers=layers, n=n)
    if len(models) != 1:
        raise BadInput(f"{len(models)} models were given; wanted one model of images and texts")
    bank = text_bank(texts)
    # Sums over hundreds of parts are checked, which 16-bit numbers would not pass.
    wanted = None if isinstance(models[0], nn.Module) else "float32"
    loaded = load_checkpoint(models[0], tokenizer=tokenizer, device=device, dtype=wanted)
    clip = loaded.module
    vision = vision_tower(clip, loaded.tokenizer, loaded.id)
    shown = image_prompts(vision, n, seed=seed, images=images)
    if len(shown) < 4:
        raise BadInput(f"{len(shown)} images were given; their variance needs at least 4")
    directions = text_embeddings(clip, loaded.tokenizer, bank)
    with Progress(progress) as bars:
        parts = image_parts(clip, vision, shown.pixels, bars.stage("Reading images", len(shown)))
        first = max(vision.n_layers - layers, 0)
        heads = [(layer, head) for layer, head in vision.spec.heads if layer >= first]
        advance = bars.stage("Choosing texts", len(heads))
        table, spans = _described(parts, directions, bank, heads, k, seed, advance)
    rebuilt = torch.stack([span.rebuilt for span in spans.values()]).sum(0)
    tables = {
        "clip_heads": table,
        "texts": _texts(spans, bank),
        "images": _images(spans, shown.titles),
        "parts": _shares(parts, vision.spec.heads),
        "ablation": _ablation(parts, directions, first, rebuilt),
    }
    options: dict[str, Any] = {"n": len(shown), "layers": layers, "k": k, "texts": len(bank)}
    options["images"] = (
        "drawn" if images is None else "tensor" if isinstance(images, Tensor) else str(images)
    )
    meta = provenance(vision, options=options, seed=seed)
    meta["model"]["sha256"] = loaded.sha256  # of texts' tower too
    meta["notes"] = [*loaded.notes, *([shown.note] if shown.note else [])]
    meta["wall_time_s"] = round(time.perf_counter() - started, 2)
    return Report("clip_heads", tables, {}, meta)


def text_bank(texts: Sequence[str] | str | None) -> list[str]:
    """Texts to choose from, each once: as given, read from files that end in .txt, or the default ones.

    >>> text_bank(["a cat", "a dog", "a cat"])
    ['a cat', 'a dog']
    """
    if texts is None:
        return default_texts()
    found: list[str] = []
    for text in [texts] if isinstance(texts, (str, Path)) else texts:
        path = Path(text)
        if path.suffix != SUFFIX:
            found.append(str(text).strip())
        elif not path.is_file():
            raise BadInput(
                f"no file of texts '{path}'; give texts, or a {SUFFIX} file with one a line"
            )
        else:
            found += [line.strip() for line in read_utf8(path).splitlines()]
    found = [text for text in dict.fromkeys(found) if text]
    if not found:
        raise BadInput("no texts to choose from: give at least one")
    return found


def default_texts() -> list[str]:
    """A small bank for the drawn images: colours, textures, shapes, how many, where, how light."""
    colours = ("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink", "brown")
    things = (
        "stripes",
        "a grid",
        "blurred spots",
        "clouds",
        "smoke",
        "sharp edges",
        "noise",
        "a texture",
    )
    things += (
        "a circle",
        "a square",
        "a triangle",
        "overlapping shapes",
        "an empty background",
        "a gradient",
    )
    things += ("one object", "two objects", "three objects", "many objects", "no object")
    things += ("horizontal lines", "vertical lines", "diagonal lines", "fine lines", "broad bands")
    places = ("on the left", "on the right", "at the top", "at the bottom", "in the centre")
    light = (
        "a dark image",
        "a bright image",
        "high contrast",
        "low contrast",
        "pale colours",
        "vivid colours",
    )
    kinds = (
        "a photograph",
        "an abstract painting",
        "a computer drawing",
        "a pattern",
        "a landscape",
    )
    return [
        *(f"an image in {colour}" for colour in (*colours, "black", "white", "grey")),
        *(f"an image of {thing}" for thing in things),
        *(f"something {place}" for place in places),
        *light,
        *kinds,
    ]


def _described(
    parts: Parts,
    directions: Tensor,
    bank: list[str],
    heads: list[tuple[int, int]],
    k: int,
    seed: int,
    advance: Any,
) -> tuple[pd.DataFrame, dict[tuple[int, int], Span]]:
    """A row a head, and every head's texts."""
    rng = torch.Generator().manual_seed(seed)
    rows, spans = [], {}
    for layer, head in heads:
        c = parts.heads[:, layer, head]
        span = spans[layer, head] = text_span(c, directions, k)
        rows.append(
            {
                "layer": layer,
                "head": head,
                "share": _share(c, parts.embedding),
                "explained": span.explained[-1] if span.explained else np.nan,
                "by_chance": by_chance(c, directions, k, rng),
                "text": bank[span.chosen[0]] if span.chosen else "",
            }
        )
        advance(1)
    return pd.DataFrame(rows), spans


def _texts(spans: dict[tuple[int, int], Span], bank: list[str]) -> pd.DataFrame:
    """A row for every head and chosen text."""
    rows = [
        (*head, rank, bank[i], explained)
        for head, span in spans.items()
        for rank, (i, explained) in enumerate(zip(span.chosen, span.explained, strict=True))
    ]
    return pd.DataFrame(rows, columns=["layer", "head", "rank", "text", "explained"])


def _images(spans: dict[tuple[int, int], Span], titles: Sequence[str]) -> pd.DataFrame:
    """For every head the images that lie furthest along its first text, and furthest against it."""
    rows = []
    for head, span in spans.items():
        if not span.chosen:
            continue
        along = (span.rebuilt - span.rebuilt.mean(0)) @ span.basis[0]
        order = along.argsort(descending=True, stable=True).tolist()
        few = min(EXTREMES, len(order) // 2)
        rows += [(*head, "most", titles[i], float(along[i])) for i in order[:few]]
        rows += [(*head, "least", titles[i], float(along[i])) for i in order[::-1][:few]]
    return pd.DataFrame(rows, columns=["layer", "head", "side", "image", "along"])


def _share(c: Tensor, embedding: Tensor) -> float:
    """Σ ⟨c − c̄, e − ē⟩ / Σ ‖e − ē‖²: what a part carries of the variance between images."""
    c, e = (x.double() - x.double().mean(0) for x in (c, embedding))
    return float((c * e).sum() / (e * e).sum())


def _shares(parts: Parts, heads: list[tuple[int, int]]) -> pd.DataFrame:
    """Every part with its share and its mean length; shares sum to 1.

    Biases of attention outputs have a share: they are scaled by each image's norm.
    """
    found: list[tuple[str, int | None, int | None, Tensor]] = [("embed", None, None, parts.embed)]
    for layer in range(parts.mlps.shape[1]):
        found += [
            ("head", layer, head, parts.heads[:, at, head]) for at, head in heads if at == layer
        ]
        found.append(("bias", layer, None, parts.biases[:, layer]))
        found.append(("mlp", layer, None, parts.mlps[:, layer]))
    return pd.DataFrame(
        [
            (part, layer, head, _share(c, parts.embedding), float(c.norm(dim=-1).mean()))
            for part, layer, head, c in found
        ],
        columns=["part", "layer", "head", "share", "length"],
    ).astype({"layer": "Int64", "head": "Int64"})


def _ablation(parts: Parts, directions: Tensor, first: int, rebuilt: Tensor) -> pd.DataFrame:
    """What is kept of the embedding when everything else is replaced by its mean over images."""
    late = parts.heads[:, first:].sum((1, 2))
    kept = {
        "everything": parts.total,
        "all heads": parts.heads.sum((1, 2)),
        f"heads from layer {first} on": late,
        "those heads, by their texts alone": rebuilt,
        "nothing": torch.zeros_like(late),
    }
    e = parts.embedding
    nearest = (e @ directions.T).argmax(-1)
    rows = []
    for name, c in kept.items():
        found = e.mean(0) + c - c.mean(0)
        lost = float(((e - found) ** 2).sum() / ((e - e.mean(0)) ** 2).sum())
        cosine = float(nn.functional.cosine_similarity(found, e).mean())
        same = float(((found @ directions.T).argmax(-1) == nearest).float().mean())
        rows.append((name, 1 - lost, cosine, same))
    return pd.DataFrame(rows, columns=["kept", "variance", "cosine", "same_text"])
