"""What probes read: one vector a text from every chosen site, taken in one pass over the texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.data.labelled import LabelledTexts, word_span
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.run.progress import Progress
from interp.sites import Site, by_query, has_heads, ranges

TOKENS_PER_FORWARD = 1024
"""Every captured layer is held at every position of one forward: 70 MB for 30 layers of width 576."""

NAMED_POSITIONS = ("last", "word", "mean")


class Feature(NamedTuple):
    """Where a feature vector is read: a site of one layer (and head), at one position."""

    site: str
    layer: int
    head: int | None
    position: str


def position_list(positions: str) -> list[str]:
    """The positions that `positions` names, each "last", "word", "mean" or a whole number.

    >>> position_list("word, -1")
    ['word', '-1']
    """
    found = [part.strip() for part in str(positions).split(",") if part.strip()]
    for part in found:
        if part not in NAMED_POSITIONS and not part.removeprefix("-").isdecimal():
            raise BadInput(
                f"no position '{part}': give last, word, mean, or whole numbers such as -1,-2 "
                "(-1 is a text's last token, 0 its first)"
            )
    if not found or len(set(found)) < len(found):
        raise BadInput(f"positions '{positions}': name at least one, and each once")
    return found


def site_list(sites: str | Sequence[str]) -> list[Site]:
    """The sites that are named, all of which give vectors; BadInput for one that does not."""
    texts = sites.split(",") if isinstance(sites, str) else list(sites)
    texts = [text.strip() if isinstance(text, str) else text for text in texts]
    found = [Site.parse(text) for text in texts if text != ""]
    if not found:
        raise BadInput("no sites: name at least one, such as resid_post, z or mlp_out.5")
    for site in found:
        if by_query(site.name):
            raise BadInput(
                f"'{site}' has one number a pair of tokens, not a vector a token: probe z or "
                "resid_post instead"
            )
    return found


def features_of(
    model: Model, sites: str | Sequence[str], positions: str = "last"
) -> dict[str, Feature]:
    """Every feature that sites and positions name, by key, in order of site, layer, head, position.

    A key is the site of one layer (and one head, where the site has heads), and "@position" after it
    where several positions are asked for.

    Raises:
        BadInput: unknown site (with the nearest name), layer, head or position. Refused: a site that
            this model cannot give, with the reason.

    >>> list(features_of(tiny_model(), "resid_post,z.1", "-1"))
    ['resid_post.0', 'resid_post.1', 'z.1.0', 'z.1.1', 'z.1.2', 'z.1.3']
    >>> list(features_of(tiny_model(), ["z.1.2"], "-1,-2"))
    ['z.1.2@-1', 'z.1.2@-2']
    """
    places = position_list(positions)
    found: dict[str, Feature] = {}
    for site in site_list(sites):
        layers = model.layers_with(site.name)
        if site.layer is not None and site.layer not in layers:
            raise BadInput(
                f"no site '{site}' in {model.id}: '{site.name}' is at layers {ranges(layers)}"
            )
        for layer in layers if site.layer is None else [site.layer]:
            for head in _heads(model, site, layer):
                for place in places:
                    key = site.name if site.name == "embed" else str(Site(site.name, layer, head))
                    key += f"@{place}" if len(places) > 1 else ""
                    found[key] = Feature(site.name, layer, head, place)
    return found


def _heads(model: Model, site: Site, layer: int) -> Sequence[int | None]:
    if not has_heads(site.name):
        return [None]
    block = model.spec.blocks[layer]
    n_heads = block.n_kv_heads if site.name in ("k", "v") else block.n_heads
    if site.head is None:
        return range(n_heads)
    if site.head >= n_heads:
        raise BadInput(f"no site '{site}' in {model.id}: its heads are 0 to {n_heads - 1}")
    return [site.head]


@torch.no_grad()
def capture_features(
    model: Model,
    data: LabelledTexts,
    sites: str | Sequence[str],
    *,
    positions: str = "last",
    progress: bool | Progress | None = None,
) -> dict[str, Float[np.ndarray, "items width"]]:
    """The activation of every text at every named site and position, from one pass over the texts.

    Texts of like length share a forward, which stops behind the last layer that is needed. Only the
    chosen positions are kept. A text's vectors do not depend on the texts beside it, but for the
    order of float additions.

    Args:
        data: the texts, and their words for position "word".
        sites: such as "resid_post" (every layer), "z.5" (every head of layer 5), "mlp_out.3".
        positions: separated by commas: "last" (the last token, which an encoder puts there itself, or
            "-1"), "word" (the last token of the text's word), "mean" (over all tokens), or whole
            numbers, from the end where negative.
        progress: show a progress bar, or add one to these; by default in a terminal or a notebook.

    Returns: for every key of `features_of`, in its order, float32 [items, width].

    Raises:
        BadInput: no tokenizer; unknown site or position; a position outside the shortest text; a text
            over n_ctx tokens. Refused: a site this model cannot give. All before the first forward.

    >>> from interp.data.labelled import of
    >>> capture_features(tiny_model(), of(["a", "b"], [0, 1]), "resid_post")
    Traceback (most recent call last):
    interp.errors.BadInput: tiny was loaded without a tokenizer: texts need one; load it with tokenizer=
    """
    features = features_of(model, sites, positions)
    places = list(dict.fromkeys(feature.position for feature in features.values()))
    rows = _rows(model, data, places)
    capture = list(dict.fromkeys((f.site, f.layer) for f in features.values()))
    kept: dict[tuple[str, int, str], np.ndarray] = {}
    with nullcontext(progress) if isinstance(progress, Progress) else Progress(progress) as bars:
        advance = bars.stage(f"Reading the texts: {model.id}", len(data))
        for chosen in _alike(rows.lengths):
            batch = model.tokenize([data.texts[i] for i in chosen])
            run = model.run(
                batch, capture=[Site(name, layer) for name, layer in capture], logits=False
            )
            for name, layer in capture:
                x = run.cache[Site(name, layer)]
                for place in places:
                    at = rows.positions.get(place)
                    read = _read(x, batch.mask, None if at is None else at[chosen])
                    where = name, layer, place
                    if where not in kept:
                        shape = (len(data), *read.shape[1:])
                        kept[where] = np.empty(shape, dtype=np.float32)
                    kept[where][chosen] = read.float().cpu().numpy()
            advance(len(chosen))
    found = {}
    for key, (name, layer, head, place) in features.items():
        whole = kept[name, layer, place]
        found[key] = whole if head is None else whole[:, head]
    return found


class _Rows(NamedTuple):
    """Of every text: how many tokens it has, and where each position is (not for "mean")."""

    lengths: np.ndarray
    positions: Mapping[str, np.ndarray]


def _rows(model: Model, data: LabelledTexts, places: Sequence[str]) -> _Rows:
    if model.tokenizer is None:
        raise BadInput(
            f"{model.id} was loaded without a tokenizer: texts need one; load it with tokenizer="
        )
    if "word" in places and data.words is None:
        raise BadInput(
            f"position 'word': {data.name} does not say which word each text is asked about; give a "
            "column 'word', or position last or mean"
        )
    lengths = np.array([len(model.tokenizer(text)["input_ids"]) for text in data.texts])
    n_ctx, longest, shortest = model.spec.n_ctx, int(lengths.argmax()), int(lengths.argmin())
    if n_ctx is not None and lengths[longest] > n_ctx:
        raise BadInput(
            f"{data.name}: text {longest + 1} has {lengths[longest]} tokens, {model.id} reads at most "
            f"{n_ctx} (n_ctx): shorten it or leave it out"
        )
    positions: dict[str, np.ndarray] = {}
    for place in places:
        if place == "last":
            positions[place] = lengths - 1
        elif place == "word":
            positions[place] = np.array(
                [
                    last_token_of(model, text, word)
                    for text, word in zip(data.texts, data.words or (), strict=True)
                ]
            )
        elif place != "mean":
            number = int(place)
            if not -lengths[shortest] <= number < lengths[shortest]:
                raise BadInput(
                    f"position {number} is outside text {shortest + 1} of {data.name}, which has "
                    f"{lengths[shortest]} tokens: {data.texts[shortest]!r}"
                )
            positions[place] = np.full(len(lengths), number) + (lengths if number < 0 else 0)
    return _Rows(lengths, positions)


def last_token_of(model: Model, text: str, word: str) -> int:
    """The position of the last token of a text's word, at the word's last occurrence."""
    span = word_span(text, word)
    if span is None:
        raise BadInput(f"the word '{word}' is not in its text {text!r}")
    if getattr(model.tokenizer, "is_fast", False):
        offsets = model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        inside = [i for i, (a, b) in enumerate(offsets) if a < span[1] and b > max(a, span[0])]
        if inside:
            return inside[-1]
    # Without offsets: the tokens of the text up to the word's end, if the whole text begins with them.
    whole = list(model.tokenizer(text)["input_ids"])
    until = list(model.tokenizer(text[: span[1]], add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(until) + 1):
        if until and whole[start : start + len(until)] == until:
            return start + len(until) - 1
    raise Refused(
        f"the tokenizer of {model.id} does not say where '{word}' is in {text!r}: use position last or mean"
    )


def _alike(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Rows in batches of like length, none over the tokens of a forward with its padding."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        # sorted: the next row would be the longest of the batch
        if end == len(order) or (end + 1 - start) * lengths[order[end]] > TOKENS_PER_FORWARD:
            yield order[start:end]
            start = end


def _read(
    x: Float[Tensor, "batch pos ..."], mask: Tensor | None, at: np.ndarray | None
) -> Float[Tensor, "batch ..."]:
    """x at one position a row, or its mean over real positions."""
    if at is not None:
        return x[torch.arange(len(x)), torch.from_numpy(at)]
    if mask is None:
        return x.float().mean(1)
    weight = mask.to(x.device).float()
    weight = (weight / weight.sum(1, keepdim=True)).view(*weight.shape, *[1] * (x.ndim - 2))
    return (x.float() * weight).sum(1)
