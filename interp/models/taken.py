"""Any form of input that a model is given, as a checked batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from interp.errors import BadInput
from interp.models.calls import check_source, check_tokens, has_tokens, is_encoder_decoder
from interp.models.codebooks import begun, in_codebooks
from interp.models.grids import named_as_taken, with_images_apart
from interp.models.inputs import check_kind
from interp.models.layout import ONE_AFTER_THE_OTHER
from interp.models.polarity import as_marked
from interp.models.spec import Spec
from interp.models.tokens import Tokens
from interp.run.batch import Batch


def batch_of(
    data: Batch | Tensor | str | Sequence[str] | Mapping[str, Tensor],
    module: nn.Module,
    spec: Spec,
    tokens: Tokens,
) -> Batch:
    """Text, token ids [batch pos] or [pos], inputs by name or a Batch, as a checked Batch.

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
        batch = Batch.of_inputs(data)
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
    return batch
