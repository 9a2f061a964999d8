"""A TransformerLens bridge, opened as the Hugging Face model that it wraps.

A `TransformerBridge` puts a component of its own in the place of most modules of the model it is
given, and keeps the originals inside. Their attention is computed by the bridge and never reaches
transformers' attention interface, so the bridge itself cannot be watched. Here the original tree is
put together again beside it, with the same parameters (none is copied), and must give the bridge's
own output on a few tokens before it is used. The bridge goes on working as it did.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import BadInput, Refused
from interp.models.calls import call_model, main_input, output_tensor
from interp.models.probe import probe_batch
from interp.models.sources.base import Loaded
from interp.models.sources.pretrained import with_padding

AGREEMENT = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Largest difference of centred outputs, as a part of the largest: two orders of float additions
through some dozen blocks. 16-bit numbers have two or three digits: 3e-2."""

PROCESSED = (
    "weights are as TransformerLens processed them (norm gains folded into what reads them, writing "
    "weights and unembedding centred): probabilities are the checkpoint's, residual streams and "
    "weights are not"
)
BEGINNING = (
    "TransformerLens puts BOS first in what its bridge is given as text; here the tokenizer decides: "
    "model.tokenize(texts, bos=True) does as it does"
)


def is_bridge(source: Any) -> bool:
    """Whether `source` is a TransformerLens bridge; does not import TransformerLens."""
    return any(
        cls.__name__ == "BridgeCore" and cls.__module__.startswith("transformer_lens.")
        for cls in type(source).__mro__
    )


def load_bridge(bridge: Any, *, tokenizer: Any) -> Loaded:
    """The Hugging Face model of a bridge, with the bridge's parameters and its output.

    Raises:
        Refused: the bridge holds no Hugging Face module, or its output is not had from the modules
            it wraps nor from the checkpoint it names.
    """
    held = getattr(bridge, "original_model", None)
    config = getattr(held, "config", None)
    if not isinstance(held, nn.Module) or config is None or not hasattr(config, "to_dict"):
        raise Refused(
            f"this {type(bridge).__name__} holds {type(held).__name__}, no Hugging Face model: "
            "give interp.load the checkpoint's name or the Hugging Face model itself"
        )
    id = str(getattr(config, "_name_or_path", "") or getattr(bridge.cfg, "model_name", "model"))
    notes = [PROCESSED] if getattr(bridge, "_weights_processed", False) else []
    if getattr(bridge.cfg, "default_prepend_bos", False):
        notes.append(BEGINNING)
    if bridge.training:
        notes.append(
            "the bridge was in training mode; its model is read in eval mode (dropout off)"
        )
    tokenizer = with_padding(bridge.tokenizer if tokenizer is None else tokenizer)
    module = unwrapped(held).eval()
    difference = _difference(bridge, module)
    if difference is None:
        return Loaded(module, tokenizer, id, "live", notes=tuple(notes))
    from interp.models.load import load_checkpoint

    try:
        again = load_checkpoint(id, device=str(next(module.parameters()).device))
    except (BadInput, Refused) as error:
        difference += f", and its checkpoint cannot be read again: {error}"
    else:
        other = _difference(bridge, again.module)
        if other is None:
            said = (
                f"read again from '{id}', unprocessed: what the bridge wraps is no longer the "
                f"original ({difference})"
            )
            rest = [note for note in notes if note != PROCESSED]
            return Loaded(again.module, tokenizer, id, "live", notes=(said, *rest))
        difference += f", and its checkpoint '{id}' is {other}"
    raise Refused(
        "the modules that this TransformerBridge wraps do not give its output (enable_compatibility_mode "
        "rewrites fused projections so): pass the checkpoint's name, or a bridge before "
        f"enable_compatibility_mode() ({difference})"
    )


def unwrapped(module: nn.Module, done: dict[int, nn.Module] | None = None) -> nn.Module:
    """The same tree with the original of every bridge component; parameters and buffers are shared.

    Modules are new objects, without hooks and with their class's own forward.
    """
    done = {} if done is None else done
    while hasattr(module, "original_component"):
        module = module.original_component  # type: ignore[assignment]
    if id(module) not in done:
        # What hooks and TransformerLens put on the instance stays behind.
        left = {"forward", "_output_capturing_hooks_installed"}
        state = {name: value for name, value in module.__dict__.items() if name not in left}
        state |= {
            name: type(value)() for name, value in state.items() if name.endswith(HOOK_TABLES)
        }
        done[id(module)] = new = object.__new__(type(module))
        children = {
            name: None if child is None else unwrapped(child, done)
            for name, child in module._modules.items()
        }
        new.__dict__.update(state | {"_modules": children})
        new.__dict__["_parameters"] = dict(module._parameters)
        new.__dict__["_buffers"] = dict(module._buffers)
    return done[id(module)]


HOOK_TABLES = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


@torch.no_grad()
def _difference(bridge: Any, module: nn.Module) -> str | None:
    """How far `module` is from the bridge on random tokens; None where that is rounding."""
    if (main := main_input(module)) != "input_ids":
        raise Refused(
            f"{type(module).__name__} takes '{main}': pass its text or vision part, "
            "or the Hugging Face model itself"
        )
    batch = probe_batch(module).to(next(module.parameters()).device)
    ours = _centred(output_tensor(call_model(module, batch)))
    was_training = bridge.training
    try:
        output = bridge.eval()(batch.ids)
    finally:
        bridge.train(was_training)
    theirs = _centred(output if isinstance(output, Tensor) else output_tensor(output))
    if ours.shape != theirs.shape:
        return f"shape {list(ours.shape)} and not {list(theirs.shape)}"
    off = float((ours - theirs).abs().max() / theirs.abs().max())
    allowed = AGREEMENT.get(next(module.parameters()).dtype, 3e-2)
    return (
        None if off <= allowed else f"off by {off:.1g} of the largest logit, {allowed:.0e} allowed"
    )


def _centred(logits: Tensor) -> Tensor:
    """Logits less their mean: the unembedding may be centred in one and not in the other."""
    logits = logits.cpu().double()
    return logits - logits.mean(-1, keepdim=True)
