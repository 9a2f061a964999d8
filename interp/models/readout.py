"""Logits of final residual vectors, exactly as the model makes them, by whatever comes after its last block."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.models.calls import (
    at_home,
    call_model,
    is_encoder_decoder,
    output_tensor,
    uncapped_logits,
)
from interp.models.forwards import other_forwards
from interp.models.hooks import argument, with_hidden
from interp.models.layout import CHANNELS_FIRST, held, read_in_plain_order
from interp.models.spec import Spec, module_device
from interp.run.batch import Batch

WHOLE = ("",)
"""The readout of a model where no chain of modules, but code of its own, leads to the logits."""
AT_ONCE = 256
"""Vectors a forward, each at a position of its own: masks made for nothing grow with the square."""


def unembed(spec: Spec, module: nn.Module, residual: Tensor) -> Tensor:
    """Logits of a final residual [... d_model], exactly as the model makes them."""
    if spec.readout == WHOLE:
        return rest_of_model(spec, module, residual)
    if spec.readout:
        x = residual
        if not read_in_plain_order(spec.hidden_axes):
            # As blocks hold them: all in one row, or images of one position.
            sizes = {"n_streams": spec.n_streams, "d_model": spec.d_model // spec.n_streams}
            like = [sizes.get(axis, 1) for axis in spec.hidden_axes]
            x = x.reshape(-1, x.shape[-1])
            x = x[:, None] if spec.hidden_axes == CHANNELS_FIRST else x[None]
            x = held(x, spec.hidden_axes, like)
        for name in spec.readout:
            x = at_home(module.get_submodule(name), x)
        return x.reshape(*residual.shape[:-1], x.shape[-1])
    logits = uncapped_logits(spec, module, residual)
    if spec.logit_softcap is not None:
        return torch.tanh(logits / spec.logit_softcap) * spec.logit_softcap
    return logits


def of_tokens(residual: Tensor, logits: Tensor) -> Tensor:
    """A final residual at the positions that have logits: what a model pads itself stands behind its tokens."""
    longer = residual.ndim == logits.ndim == 3 and residual.shape[1] > logits.shape[1]
    return residual[:, : logits.shape[1]] if longer else residual


def rest_of_model(
    spec: Spec, module: nn.Module, residual: Float[Tensor, "*lead d_model"]
) -> Float[Tensor, "*lead d_vocab"]:
    """What the model makes of final residual vectors, when every block returns these and computes nothing.

    The vectors stand at the positions of one row, of tokens that no one reads: true of models whose end
    is the same at every position, which `discover` tries.
    """
    vectors = residual.reshape(-1, residual.shape[-1]).to(module_device(module))
    made = []
    for part in vectors.split(min(AT_ONCE, spec.n_ctx or AT_ONCE)):
        ids = torch.zeros(1, len(part), dtype=torch.long, device=part.device)
        with _returning(spec, module, part[None]):
            given = {"input_ids": ids[:, :1], "decoder_input_ids": ids}
            batch = Batch.of_inputs(given) if is_encoder_decoder(module) else Batch.of_ids(ids)
            made.append(output_tensor(call_model(module, batch))[0])
    logits = torch.cat(made).to(residual.device)
    return logits.reshape(*residual.shape[:-1], logits.shape[-1])


def _returning(spec: Spec, module: nn.Module, resid: Tensor) -> AbstractContextManager[None]:
    """Inside, every block returns `resid` [batch pos d_model] whatever it is given."""
    blocks = {module.get_submodule(block.name) for block in spec.blocks}

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return argument(*with_hidden(args, kwargs, resid, spec, -1), spec.hidden)

    return other_forwards(dict.fromkeys(blocks, forward))
