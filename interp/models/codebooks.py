"""Token ids of several codebooks at every position: in which order a model's forward takes them, found by trying.

Models that write sound read one id of each of n codebooks (or channels) at a position and add their
embeddings: ids are [batch pos n], or have the codebooks of a row as rows of their own [batch·n pos].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedConfig

from interp.errors import BadInput
from interp.models.calls import (
    FAILURES,
    call_model,
    has_tokens,
    output_tensor,
    with_decoder_start,
)
from interp.models.spec import module_device
from interp.run.batch import Batch

COUNTS = ("num_codebooks", "num_channels")
LAST, ROWS = "[batch, pos, {}]", "[batch·{}, pos]"

_known: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()
"""Of models that read several codebooks: the shapes that their forward takes, and how many codebooks of each."""


def with_codebooks(module: nn.Module, batch: Batch) -> Batch:
    """The batch with ids of as many codebooks as the forward takes; as it is where it takes plain ids.

    What its forward takes is remembered for `in_codebooks`.
    """
    if module not in _known:
        counts = dict.fromkeys(_counts(getattr(module, "config", None)))
        if not counts or _works(module, batch):
            return batch
        shapes = [(shape, n) for n in counts for shape in (LAST, ROWS)]
        taken = {shape: n for shape, n in shapes if _works(module, _made(batch, shape, n))}
        if not taken:
            return batch
        _known[module] = taken
    return _made(batch, *next(iter(_known[module].items())))


def begun(module: nn.Module, batch: Batch) -> Batch:
    """The batch of a source with a decoder that has read its start token alone, in every codebook."""
    batch = with_decoder_start(module, batch)
    taken = _known.get(module)
    return batch if taken is None else _made(batch, *next(iter(taken.items())))


def in_codebooks(module: nn.Module, batch: Batch) -> Batch:
    """The batch as one of several codebooks where the model reads such ids.

    A mask of tokens that are none of the blocks' positions is left out.

    Raises:
        BadInput: its ids have another shape than the forward takes.
    """
    taken = _known.get(module)
    if taken is None:
        beside = "input_ids" in batch.inputs and not has_tokens(module, batch)
        return Batch(batch.inputs) if beside else batch
    ids, source = batch.ids, [x for name, x in batch.inputs.items() if name != batch.name_of_ids]
    for shape, n in taken.items():
        rows = len(source[0]) if batch.has_source else len(ids) // n
        if shape == LAST and ids.ndim == 3 and ids.shape[2] == n:
            return batch
        if shape == ROWS and ids.ndim == 2 and len(ids) == rows * n:
            return batch.of_several_rows(n)
    shapes = " or ".join(shape.format(n) for shape, n in taken.items())
    raise BadInput(
        f"{type(module).__name__} reads token ids of several codebooks at every position, of shape {shapes}; "
        f"got shape {tuple(batch.ids.shape)}"
    )


def _made(batch: Batch, shape: str, n: int) -> Batch:
    """The batch with its ids, moved on by one position from codebook to codebook, as those of n codebooks."""
    ids: Int[Tensor, "batch pos"] = batch.ids
    books = torch.stack([ids.roll(book, 1) for book in range(n)], 2)
    books = books if shape == LAST else books.transpose(1, 2).flatten(0, 1)
    made = Batch({**batch.inputs, batch.name_of_ids: books}, batch.mask)
    return made if shape == LAST else made.of_several_rows(n)


def _works(module: nn.Module, batch: Batch) -> bool:
    try:
        with torch.no_grad():
            return output_tensor(call_model(module, batch.to(module_device(module)))).ndim > 1
    except FAILURES:
        return False


def _counts(config: Any) -> Iterator[int]:
    """The numbers of codebooks that a config and its parts name, images aside; a text token may be one more."""
    if config is None or hasattr(config, "image_size") or hasattr(config, "patch_size"):
        return
    for name in COUNTS:
        if isinstance(n := getattr(config, name, None), int) and n > 1:
            yield from (n, n + 1)
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            yield from _counts(part)
