"""Activations of a model on a text, collected once into a store that remembers where each row is from.

The text is cut into windows that never cross a document, one document in every few is held out, and
the windows are put into shards in a seeded random order, so that every shard mixes documents.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.data.prompts import lead_token
from interp.data.texts import WIKIPEDIA, documents
from interp.errors import BadInput
from interp.models.load import model_sha256
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.files import write_atomically
from interp.run.progress import Progress
from interp.run.store import DTYPES, ActivationStore, write_store
from interp.sites import Site, by_query, has_heads

TOKENS_PER_FORWARD = 2048
LOOK_AHEAD = 4
"""Text is read until there are this many times the windows wanted, of which some are drawn."""

SHORTEST_WINDOW = 2
PADDING = -1
NOTICE = """Text: {text}, under {licence} ({url}).

Activations, contexts and autoencoders made from it carry parts of that text, or are adapted from it: pass this
notice on with them.
"""
LICENCES = {
    WIKIPEDIA: {
        "text": "articles of English Wikipedia by its authors, as carried by the package gensim 4.4.0",
        "licence": "CC BY-SA 3.0",
        "url": "https://creativecommons.org/licenses/by-sa/3.0/",
    }
}
"""What is known of texts that are not ours, as `NOTICE` takes it."""
_log = logging.getLogger("interp")


@dataclass(frozen=True)
class Activations:
    """Rows to fit on and rows of other documents to judge by.

    Attributes:
        train, held_out: stores whose `key` says model, site, text and seed, and whose rows' origins
            `origins` gives.
    """

    train: ActivationStore
    held_out: ActivationStore

    @staticmethod
    def open(folder: str | Path) -> Activations:
        """What `collect_activations` has left in `folder`."""
        return Activations(
            ActivationStore(Path(folder) / "train"), ActivationStore(Path(folder) / "held_out")
        )


@torch.no_grad()
def collect_activations(
    model: Model,
    source: str | Path | Sequence[str] | Sequence[Tensor],
    folder: str | Path,
    *,
    site: str | Site | None = None,
    tokens: int = 262_144,
    held_out: float = 0.15,
    context: int = 128,
    dtype: str = "float16",
    shard_mb: float = 256,
    field: str = "text",
    seed: int = 0,
    progress: bool | None = None,
) -> Activations:
    """A site's activations on a text, on disk, shuffled over documents; each row's origin is kept.

    The forward stops behind the site. The lead token (BOS) is read by the model and not stored: its
    activation is the same everywhere and hundreds of times larger in many models. Windows do not
    cross documents, so text at the end of a document stands in a shorter window.

    The same call after an interruption goes on at the first shard that is missing; a shard whose
    checksum is wrong is named in a warning and made again.

    Args:
        source: see `interp.data.texts.documents`; or token ids, one tensor a document.
        folder: gets the stores `train` and `held_out`.
        site: one layer's site, such as "z.12" (all heads side by side) or "resid_post.5"; by default
            z of the layer two fifths up. Not patterns.
        tokens: rows to store for training, at most; they are drawn from the windows of a text up to
            four times as long.
        held_out: rows stored of held-out documents, as a share of `tokens`; the same share of
            documents is held out.
        context: tokens a window, beside the lead token.
        dtype: "float16", "bfloat16" or "float32".
        shard_mb: size of a shard; what a kill loses at most.

    Returns: the two stores. Their rows are [width] in the site's own unit, width = n_heads · d_head
        for sites with heads.

    Raises:
        BadInput: no text, less than one context of it, one document only, a site without a layer,
            or a folder with another store. Refused: the model has not got the site.

    >>> import tempfile
    >>> text = [torch.arange(40) + i for i in range(8)]
    >>> made = collect_activations(
    ...     tiny_model(), text, tempfile.mkdtemp(), site="z.1", tokens=200, context=16, progress=False
    ... )
    >>> made.train.width, made.train.n_rows, made.held_out.n_rows
    (32, 200, 30)
    """
    if not 0 < held_out < 1 or tokens < 1 or context < SHORTEST_WINDOW or shard_mb <= 0:
        raise BadInput(
            f"held_out={held_out}, tokens={tokens}, context={context}, shard_mb={shard_mb}: wanted a "
            f"share between 0 and 1, at least 1 token, {SHORTEST_WINDOW} tokens of context, and a size"
        )
    parsed = _site(model, site)
    width, heads = site_shape(model, parsed)
    lead = lead_token(model)
    context = min(context, (model.spec.n_ctx or context + 1) - len(lead))
    shown = str(source) if isinstance(source, (str, Path)) else "texts of the caller"
    wanted = {"train": tokens, "held_out": max(1, round(tokens * held_out))}
    parts = _windows(model, source, field, wanted, held_out, context, seed)
    shard_rows = max(1, int(shard_mb * 1e6 / (width * DTYPES.get(dtype, torch.float32).itemsize)))
    about = {
        "model": {"id": model.id, "sha256": model_sha256(model), **model.spec.facts},
        "site": str(parsed),
        "heads": heads,
        "context": context,
        "lead": len(lead),
        "seed": seed,
    }
    stores = {}
    with Progress(progress) as bars:
        for name, windows in parts.items():
            plan = _Plan.of(windows, wanted[name], shard_rows, lead, seed)
            digest = hashlib.sha256(plan.extras["ids"].numpy().tobytes()).hexdigest()
            text = {
                "name": shown,
                "licence": LICENCES.get(shown, {}).get("licence"),
                "sha256": digest,
            }
            advance = bars.stage(f"Activations ({name})", sum(plan.shard_rows))

            def told(
                number: int, why: str, plan: _Plan = plan, name: str = name, advance: Any = advance
            ) -> None:
                advance(plan.shard_rows[number])
                if why == "rebuilt":
                    _log.warning(
                        "shard %d of %s/%s was damaged and was made again", number, folder, name
                    )

            stores[name] = write_store(
                Path(folder) / name,
                key={**about, "text": text, "split": name},
                shard_rows=plan.shard_rows,
                width=width,
                make=lambda number, plan=plan: _captured(model, parsed, plan, number, width),
                extras=plan.extras,
                dtype=dtype,
                made=told,
            )
    if shown in LICENCES:
        notice = NOTICE.format(**LICENCES[shown])
        write_atomically(Path(folder) / "LICENCE.txt", notice.encode())
    return Activations(stores["train"], stores["held_out"])


def origins(store: ActivationStore, rows: Int[Tensor, " n"]) -> pd.DataFrame:
    """Where rows of a store come from: one line a row.

    Returns: columns row, document (its number in the source), token (its number in the document),
        window, position (in the window, lead token included), token_id.
    """
    starts = store.extras["row_start"].long()
    lead = int(store.key["lead"])
    window = torch.searchsorted(starts, rows.long(), right=True) - 1
    position = rows - starts[window] + lead
    return pd.DataFrame(
        {
            "row": rows.numpy(),
            "document": store.extras["document"][window].numpy(),
            "token": (store.extras["start"][window] + position - lead).numpy(),
            "window": window.numpy(),
            "position": position.numpy(),
            "token_id": store.extras["ids"][window, position].numpy(),
        }
    )


def windows(store: ActivationStore, rows: slice = slice(None)) -> list[Int[Tensor, " pos"]]:
    """Token ids of the windows that the model read, lead token included; unequal in length."""
    ids, length = store.extras["ids"][rows].long(), store.extras["length"][rows]
    return [row[:n] for row, n in zip(ids, length.tolist(), strict=True)]


def window_batches(
    store: ActivationStore, most: int | None = None, tokens_per_forward: int = TOKENS_PER_FORWARD
) -> Iterator[Batch]:
    """The windows of a store as batches for a model, the longest `most` of them if given."""
    found = sorted(windows(store), key=len, reverse=True)[:most]
    yield from _batches(found, tokens_per_forward)


# --- text to windows -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Window:
    """Consecutive tokens of a document, from its token number `start` on."""

    document: int
    start: int
    ids: Int[Tensor, " pos"]


def _windows(
    model: Model,
    source: Any,
    field: str,
    wanted: dict[str, int],
    held_out: float,
    context: int,
    seed: int,
) -> dict[str, list[_Window]]:
    """Windows of the training and of the held-out documents; enough of both to draw from."""
    parts: dict[str, list[_Window]] = {"train": [], "held_out": []}
    seen, total, n_documents = dict.fromkeys(parts, 0), 0, 0
    for document, ids in enumerate(_token_ids(model, source, field)):
        n_documents, total = document + 1, total + len(ids)
        part = "held_out" if _is_held_out(document, held_out, seed) else "train"
        for start in range(0, len(ids), context):
            piece = ids[start : start + context]
            if len(piece) >= SHORTEST_WINDOW:
                parts[part].append(_Window(document, start, piece))
                seen[part] += len(piece)
        if all(seen[name] >= LOOK_AHEAD * wanted[name] for name in parts):
            break
    if total < context:
        raise BadInput(
            f"the text has {total} tokens in {n_documents} documents, less than one context of {context}: "
            "give more text or a smaller context"
        )
    if empty := [name for name, found in parts.items() if not found]:
        raise BadInput(
            f"no document is left for '{empty[0]}': the text has {n_documents}, of which {held_out:.0%} "
            "are held out; give more documents (in a .txt file they are separated by two blank lines)"
        )
    return parts


def _is_held_out(document: int, share: float, seed: int) -> bool:
    """Of every block of 1/share documents one is held out, drawn by the seed: works on a stream."""
    size = max(2, round(1 / share))
    block, place = divmod(document, size)
    digest = hashlib.sha256(f"{seed} {block}".encode()).digest()
    return int.from_bytes(digest[:4], "little") % size == place


def _token_ids(model: Model, source: Any, field: str) -> Iterator[Tensor]:
    if not isinstance(source, (str, Path)) and len(source) and isinstance(source[0], Tensor):
        yield from (ids.flatten().long().cpu() for ids in source)
        return
    if model.tokenizer is None:
        raise BadInput(
            f"{model.id} was loaded without a tokenizer: give token ids, one tensor a document"
        )
    texts = documents(source, field=field)
    while block := list(itertools.islice(texts, 64)):
        for ids in model.tokenizer(block, add_special_tokens=False)["input_ids"]:
            yield torch.tensor(ids, dtype=torch.long)


@dataclass(frozen=True)
class _Plan:
    """Which windows stand in which shard; `extras` are the tensors that are stored with the rows."""

    shards: list[list[_Window]]
    shard_rows: list[int]
    extras: dict[str, Tensor]
    lead: Tensor

    @staticmethod
    def of(windows: list[_Window], rows: int, shard_rows: int, lead: Tensor, seed: int) -> _Plan:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(windows), generator=generator).tolist()
        chosen, room = [], rows
        for index in order:
            window = windows[index]
            if room < SHORTEST_WINDOW:
                break
            ids = window.ids[:room]
            chosen.append(_Window(window.document, window.start, ids))
            room -= len(ids)
        shards: list[list[_Window]] = [[]]
        filled = 0
        for window in chosen:
            if filled and filled + len(window.ids) > shard_rows:
                shards.append([])
                filled = 0
            shards[-1].append(window)
            filled += len(window.ids)
        # Windows of one length run together without padding; reading shuffles the rows anyway.
        shards = [sorted(shard, key=lambda window: -len(window.ids)) for shard in shards]
        stored = [window for shard in shards for window in shard]
        longest = max(len(window.ids) for window in stored) + len(lead)
        ids = torch.full((len(stored), longest), PADDING, dtype=torch.int32)
        for row, window in zip(ids, stored, strict=True):
            whole = torch.cat([lead, window.ids])
            row[: len(whole)] = whole
        lengths = torch.tensor([len(window.ids) for window in stored])
        extras = {
            "ids": ids,
            "length": (lengths + len(lead)).int(),
            "document": torch.tensor([window.document for window in stored]).int(),
            "start": torch.tensor([window.start for window in stored]).int(),
            "row_start": torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
        }
        return _Plan(shards, [sum(len(w.ids) for w in shard) for shard in shards], extras, lead)


# --- windows to activations ----------------------------------------------------------------------


def _captured(
    model: Model, site: Site, plan: _Plan, number: int, width: int
) -> Float[Tensor, "rows width"]:
    """The rows of one shard, window after window."""
    lead = len(plan.lead)
    out, done = torch.empty(plan.shard_rows[number], width), 0
    rows = [torch.cat([plan.lead, window.ids]) for window in plan.shards[number]]
    for batch in _batches(rows, TOKENS_PER_FORWARD):
        found = model.run(batch, capture=[site], logits=False).cache[site]
        if has_heads(site.name) and site.head is None:
            found = found.flatten(-2)
        assert batch.mask is not None
        mask = batch.mask.to(found.device)[:, lead:]
        part = found[:, lead:][mask]
        out[done : done + len(part)] = part.to(out)
        done += len(part)
    return out


def _batches(rows: Iterable[Tensor], tokens_per_forward: int) -> Iterator[Batch]:
    """Rows of like length together, padded on the right; given longest first."""
    waiting: list[Tensor] = []
    for row in rows:
        if waiting and (len(waiting) + 1) * len(waiting[0]) > tokens_per_forward:
            yield _padded(waiting)
            waiting = []
        waiting.append(row)
    if waiting:
        yield _padded(waiting)


def _padded(rows: list[Tensor]) -> Batch:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    return Batch.of_ids(ids, mask)


def site_shape(model: Model, site: Site) -> tuple[int, int]:
    """(numbers at one position of one layer's site, heads side by side in them; 0 without heads).

    >>> site_shape(tiny_model(), Site.parse("z.1")), site_shape(tiny_model(), Site.parse("v.1.0"))
    ((32, 4), (8, 0))
    """
    # What a stack that was named reads may need more than tokens.
    data = model.probed if model.spec.named else torch.zeros(1, 2, dtype=torch.long)
    found = model.run(data, capture=[site], logits=False).cache[site]
    heads = found.shape[2] if has_heads(site.name) and site.head is None else 0
    return found[0, 0].numel(), heads


def _site(model: Model, site: str | Site | None) -> Site:
    parsed = Site("z", model.n_layers * 2 // 5) if site is None else Site.parse(site)
    if by_query(parsed.name):
        raise BadInput(
            f"'{parsed}' has no width of its own (keys × queries): store z, v or resid_post"
        )
    if parsed.name != "embed" and parsed.layer is None:
        raise BadInput(f"'{parsed}' names every layer; one is stored at a time: '{parsed}.0'")
    return parsed
