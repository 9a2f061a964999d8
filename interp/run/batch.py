"""A Batch: the tensors a model is called with, and which positions are real."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.errors import BadInput
from interp.sites import AXES


@dataclass(frozen=True)
class Batch:
    """Model inputs by name, with a mask of the positions that hold a real token (or patch).

    Of an encoder-decoder, `ids` and `mask` are those of the decoder, whose positions the sites have;
    the encoder's are `inputs["input_ids"]` (or an image, or sound) and `source_mask`.

    An input may hold several entries for each row, one row's after the other's: ids the codebooks of a row,
    images their patches. `packed` names the axis along which they lie, and `n_rows` says how many rows there are.

    `objects` are inputs that are no tensors, such as the session of a video tracker: every forward gets a copy of its
    own. They hold all rows, so a batch with some has neither fewer rows nor more.

    >>> batch = Batch.of_ids(torch.tensor([[5, 6, 7], [8, 9, 1]]))
    >>> batch.size, batch.repeat(2).ids.shape, bool(batch.padded)
    (2, torch.Size([4, 3]), False)
    """

    inputs: dict[str, Tensor]
    mask: Bool[Tensor, "batch pos"] | None = None
    packed: Mapping[str, int] = field(default_factory=dict)
    n_rows: int | None = None
    objects: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of_ids(ids: Int[Tensor, "batch pos ..."], mask: Tensor | None = None) -> Batch:
        """The batch of these token ids; `mask` is False (or 0) at padding."""
        if mask is None or bool(mask.all()):
            mask = (
                torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
                if mask is None
                else mask.bool().to(ids.device)
            )
            return Batch({"input_ids": ids}, mask)
        mask = mask.bool()
        # Positions count real tokens, so that left padding changes nothing (GPT-2 needs to be told).
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}
        return Batch(inputs, mask)

    @staticmethod
    def of_inputs(inputs: Mapping[str, Tensor]) -> Batch:
        """The batch of model inputs by name, such as a Hugging Face tokenizer or processor returns.

        Its mask is what the inputs call one; a model whose mask is True at padding turns it when it is given the batch.
        """
        if wrong := [name for name, x in inputs.items() if not isinstance(x, Tensor)]:
            kind = type(inputs[wrong[0]]).__name__
            raise BadInput(
                f"'{wrong[0]}' is a {kind}, and inputs by name are tensors; a tokenizer makes them with "
                "return_tensors='pt'. Text goes in as it is: model.run(text)"
            )
        if "decoder_input_ids" in inputs:
            return Batch._of_decoder(inputs)
        mask = inputs.get("attention_mask", _own_mask(inputs))
        mask = None if mask is None else mask.bool()
        if "input_ids" not in inputs and mask is not None and bool(mask.all()):
            mask = None  # of samples or frames: there may be fewer positions
        if "input_ids" not in inputs or "position_ids" in inputs:
            return Batch(dict(inputs), mask)
        batch = Batch.of_ids(inputs["input_ids"], mask)
        told = {n: x for n, x in inputs.items() if n != "attention_mask"} | batch.inputs
        own = inputs.get("attention_mask")
        if own is not None and own.dtype == torch.bool:  # a forward may take it for an index
            told["attention_mask"] = own
        return Batch(told, batch.mask)

    @staticmethod
    def _of_decoder(inputs: Mapping[str, Tensor]) -> Batch:
        ids, mask = inputs["decoder_input_ids"], inputs.get("decoder_attention_mask")
        target = Batch.of_ids(ids, mask)
        told = {f"decoder_{name}": x for name, x in target.inputs.items()}
        rest = {name: x for name, x in inputs.items() if name != "decoder_attention_mask"}
        return Batch({**rest, **told}, target.mask)

    def with_decoder_start(self, start: int) -> Batch:
        """The batch of these inputs of an encoder, with a decoder that has read the token `start` alone."""
        first = torch.full((self.size, 1), start, device=next(iter(self.inputs.values())).device)
        return Batch.of_inputs({**self.inputs, "decoder_input_ids": first})

    def of_several_rows(self, times: int) -> Batch:
        """The same batch, where every `times` rows of its ids are one row of the batch."""
        rows = len(self.ids) // times
        of_ids = self.mask is not None and len(self.mask) == len(self.ids)
        mask = self.mask[::times] if self.mask is not None and of_ids else self.mask
        assert mask is None or len(mask) == rows
        return Batch(self.inputs, mask, {self.name_of_ids: 0}, rows)

    def __repr__(self) -> str:
        """Names and shapes of the inputs, and how many positions of each row are real where some are not."""
        shapes = [f"{name} {list(x.shape)}" for name, x in self.inputs.items()]
        named = ", ".join([*shapes, *(f"{n} {type(x).__name__}" for n, x in self.objects.items())])
        if self.mask is not None and not bool(self.mask.all()):
            named += f", real positions {self.mask.sum(1).tolist()}"
        return f"Batch({named})"

    @property
    def has_source(self) -> bool:
        """Whether this is a batch of an encoder-decoder."""
        return "decoder_input_ids" in self.inputs

    @property
    def ids(self) -> Int[Tensor, "batch pos ..."]:
        """Token ids, of an encoder-decoder the decoder's; KeyError for a batch of images."""
        return self.inputs[self.name_of_ids]

    @property
    def name_of_ids(self) -> str:
        """The input that `ids` are."""
        return "decoder_input_ids" if self.has_source else "input_ids"

    @property
    def source_mask(self) -> Bool[Tensor, "batch source_pos"] | None:
        """Which positions of a source (or of tokens beside a stack of images) are real; None where all are."""
        beside = self.mask is None and "input_ids" in self.inputs  # of tokens that others attend to
        mask = self.inputs.get("attention_mask") if self.has_source or beside else None
        return None if mask is None or bool(mask.all()) else mask.bool()

    def mask_of(self, site: str) -> Bool[Tensor, "batch pos"] | None:
        """Which positions of a site's second axis are real: of the source, for cross_k and cross_v."""
        return self.source_mask if AXES[site][1] == "source_pos" else self.mask

    @property
    def size(self) -> int:
        """Number of rows."""
        if self.n_rows is not None:
            return self.n_rows
        first = next(iter(self.inputs.values()))  # patches of images may stand before the ids
        return self.inputs.get(self.name_of_ids, first).shape[0]

    @property
    def padded(self) -> bool:
        """Whether any position is padding."""
        return ("decoder_attention_mask" if self.has_source else "attention_mask") in self.inputs

    def repeat(self, times: int) -> Batch:
        """`times` copies of all rows, one copy after the other.

        Raises:
            BadInput: several, of a batch with inputs that are no tensors.
        """
        if times != 1:
            self._require_tensors(f"{times} copies of its rows")
        return self._map(lambda x: torch.cat([x] * times), self.size * times)

    def rows(self, rows: slice | Tensor) -> Batch:
        """Some of the rows: a slice of them, or their numbers.

        Raises:
            BadInput: an input has more or fewer entries than there are rows, and which are whose is not known.
        """
        for name, x in self.inputs.items():
            if name not in self.packed and x.shape[0] != self.size:
                raise BadInput(
                    f"which of the {x.shape[0]} entries of '{name}' belong to which of {self.size} rows is not known: "
                    "make a batch of each row"
                )
        if not isinstance(rows, slice) or range(self.size)[rows] != range(self.size):
            self._require_tensors("some of its rows")
        kept = len(range(self.size)[rows]) if isinstance(rows, slice) else len(rows)
        return self._map(lambda x: x[rows], kept)

    def _require_tensors(self, what: str) -> None:
        """BadInput where there are inputs that are no tensors: which part of them is a row's is not known."""
        if self.objects:
            raise BadInput(
                f"a batch with '{next(iter(self.objects))}', which is no tensor, was asked for {what}; only the whole "
                "of it can be run: give batches of their own"
            )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`; what is no tensor stays where it is."""
        return self._map(lambda x: x.to(device), self.size)

    def _map(self, change: Callable[[Tensor], Tensor], n_rows: int) -> Batch:
        """Every tensor with its rows changed, one an entry of the first axis."""

        def changed(name: str, x: Tensor) -> Tensor:
            if name not in self.packed:
                return change(x)
            axis = self.packed[name]
            rows = x.unflatten(axis, (self.size, -1)).movedim(axis, 0)
            return change(rows).movedim(0, axis).flatten(axis, axis + 1)

        mask = None if self.mask is None else change(self.mask)
        inputs = {name: changed(name, x) for name, x in self.inputs.items()}
        rows = None if self.n_rows is None else n_rows
        return replace(self, inputs=inputs, mask=mask, n_rows=rows)


def _own_mask(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """The mask [batch frames] that stands beside an input under its own name, such as input_features_mask."""
    if "input_ids" in inputs:  # then positions are tokens
        return None
    found = (inputs.get(f"{name}_mask") for name in inputs)
    return next((mask for mask in found if mask is not None and mask.ndim == 2), None)
