"""Any form of input that a model is given, as a checked batch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from interp.errors import BadInput, Refused, unknown
from interp.models.calls import (
    check_source,
    check_tokens,
    has_tokens,
    is_encoder_decoder,
    main_input,
    parameters_of,
    text_config,
)
from interp.models.codebooks import begun, in_codebooks
from interp.models.examples import fresh
from interp.models.grids import named_as_taken, with_images_apart
from interp.models.inputs import check_kind
from interp.models.layout import ONE_AFTER_THE_OTHER
from interp.models.polarity import as_marked
from interp.models.spec import Spec
from interp.models.tokens import Tokens
from interp.run.batch import Batch

_log = logging.getLogger("interp")
_told: WeakSet[nn.Module] = WeakSet()
"""Models of which it was said that their ids look padded."""


def batch_of(
    data: Batch | Tensor | str | Sequence[str] | Mapping[str, Any],
    module: nn.Module,
    spec: Spec,
    tokens: Tokens,
    example: Batch | None = None,
) -> Batch:
    """Text, token ids [batch pos] or [pos], inputs by name or a Batch, as a checked Batch.

    `example`: what the model was opened on, if anything: then inputs by name may be no tensors.

    Raises:
        BadInput: what this model does not read, too many positions, ids outside the vocabulary.
    """
    data = named_as_taken(module, data)
    check_kind(module, data)
    if isinstance(data, Batch):
        batch = data
    elif isinstance(data, Tensor):
        batch = Batch.of_ids(data[None] if data.ndim == 1 else data)
    elif isinstance(data, Mapping):
        batch = Batch.of_inputs(data) if example is None else batch_like(module, data)
    else:
        batch = tokens.batch(data)
    if not batch.has_source and is_encoder_decoder(module):
        if isinstance(data, (Batch, Tensor)):
            raise BadInput(
                f"{tokens.id} is an encoder-decoder and was given one sequence of token ids, as what "
                "reads a causal model's text does; that cannot be done here. model.run and "
                'interp lens take a source as text, model.run {"input_ids": the source, '
                '"decoder_input_ids": what the decoder has read}; Model(module.get_encoder()) is '
                "one stack"
            )
        batch = begun(module, batch)
    batch = as_marked(module, with_images_apart(module, in_codebooks(module, batch)))
    if example is not None and example.size == 1 < batch.size:
        raise Refused(
            f"{tokens.id} was opened on an example of one row and is given {batch.size}: how rows lie beside one "
            "another was not tried. Give them one by one, or open it on an example of two"
        )
    packed = spec.blocks[0].axes in ONE_AFTER_THE_OTHER
    if spec.beside or (packed and not has_tokens(module, batch)):
        # A mask of frames or pixels: rows are packed without padding. Or one of tokens, beside the stack.
        batch = replace(batch, mask=None)
    if has_tokens(module, batch):
        n, n_ctx = batch.ids.shape[1], spec.n_ctx
        if n_ctx is not None and n > n_ctx:
            raise BadInput(
                f"the prompt has {n} tokens, {tokens.id} reads at most {n_ctx} (n_ctx): shorten it"
            )
        check_tokens(batch.ids, spec.d_vocab)
    if batch.has_source:
        check_source(module, batch)
    if isinstance(data, Tensor) or (isinstance(data, Mapping) and "attention_mask" not in data):
        _tell_of_padding(module, batch.inputs.get("input_ids"), tokens)
    return batch


def batch_like(module: nn.Module, inputs: Mapping[str, Any]) -> Batch:
    """The batch of inputs by name of which some are no tensors, these as they are now.

    It has one row where none of the tensors is of token ids or the model's main input.

    Raises:
        BadInput: the forward names no such input, or it cannot be copied.
    """
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    objects = {name: fresh(name, x) for name, x in inputs.items() if name not in tensors}
    if not inputs:
        raise BadInput("no inputs were given; wanted: a mapping of the forward's inputs by name")
    parameters = parameters_of(module).values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    if strange := [name for name in objects if name not in names]:
        raise unknown(f"input of {type(module).__name__}", strange[0], names)
    batch = Batch.of_inputs(tensors)
    in_rows = not objects or {main_input(module), batch.name_of_ids} & tensors.keys()
    return Batch(batch.inputs, batch.mask, n_rows=None if in_rows else 1, objects=objects)


def _tell_of_padding(module: nn.Module, ids: Tensor | None, tokens: Tokens) -> None:
    """A warning, once a model, where ids without a mask begin or end with a token that is there for padding alone.

    Not where texts begin or end with that token too.
    """
    takes_mask = "attention_mask" in parameters_of(module)
    if module in _told or not takes_mask or ids is None or not ids.numel():
        return
    config, generation = getattr(module, "config", None), getattr(module, "generation_config", None)
    places = [tokens.tokenizer, generation, config, config and text_config(module)]

    def called(*names: str) -> set[int]:
        found = [getattr(place, f"{name}_token_id", None) for place in places for name in names]
        each = [i for one in found for i in (one if isinstance(one, list) else [one])]
        return {i for i in each if isinstance(i, int)}

    ends = ids[:, [0, -1]]
    for pad in called("pad") - called("bos", "eos", "sep"):
        if bool((ends == pad).any()):
            _told.add(module)
            _log.warning(
                "%s was given token ids that begin or end with its padding token, %d, and no mask: padding is read "
                "like any token, and changes results; pass texts, or {'input_ids': ids, 'attention_mask': mask}, 0 at "
                "padding (said once a model)",
                tokens.id,
                pad,
            )
