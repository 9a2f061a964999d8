"""Calling a Hugging Face model: which inputs it takes, where its logits are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from interp.errors import BadInput, Refused
from interp.models.examples import fresh
from interp.models.forwards import hooks_called
from interp.models.spec import Spec, first_tensor, module_device
from interp.run.batch import Batch

drawing: WeakSet[nn.Module] = WeakSet()
"""Models that draw random numbers in every forward, as the probe finds: torch's generator is put back before each."""
beside_tokens: WeakSet[nn.Module] = WeakSet()
"""Models that read tokens besides, and whose blocks have other positions (a policy that reads a robot's state)."""
handed_on: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""By model the inputs that its forward does not name, and hands on to layers that cannot do without them."""
FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    AttributeError,
    KeyError,
    AssertionError,
)
"""What models raise for an input of another shape, or for one that is missing."""
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DRAWS = (
    "draws random numbers in every forward (masks, perhaps): the same ones, of seed 0, in every run on inputs of "
    "one shape; rows of a larger batch get others"
)


_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@lru_cache(maxsize=64)
def _parameters(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(forward).parameters


def parameters_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of a module's forward by name, `self` among them."""
    return _parameters(type(module).forward)


def text_config(module: nn.Module) -> Any:
    """The config that describes the token model (a part of the whole for multimodal ones)."""
    config: Any = module.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def call_model(module: nn.Module, batch: Batch, first_position: int = 0, **extra: Any) -> Any:
    """The model's output for a batch; inputs its forward does not take are left out.

    `first_position` is what the model calls the position that a Batch calls 0.
    """
    inputs: dict[str, Any] = inputs_taken(module, batch, first_position)
    inputs |= {name: fresh(name, x) for name, x in batch.objects.items()}
    if "use_cache" in parameters_of(module):
        extra["use_cache"] = False
    with hooks_called(module):
        if module not in drawing:
            return module(**inputs, **extra)
        place = module_device(module)
        with torch.random.fork_rng([place] if place.type == "cuda" else []):
            torch.manual_seed(0)
            return module(**inputs, **extra)


def inputs_taken(module: nn.Module, batch: Batch, first_position: int = 0) -> dict[str, Tensor]:
    """Those of a batch's inputs that a model's forward takes, positions as the model counts them."""
    parameters = parameters_of(module)
    taken = {*parameters, *handed_on.get(module, ()), "input_ids", "pixel_values"}
    inputs = {name: value for name, value in batch.inputs.items() if name in taken}
    if "position_ids" in inputs:
        inputs["position_ids"] = inputs["position_ids"] + first_position
    # A batch of tokens without padding has no mask: where the forward requires one, nothing is padding.
    unmasked = "input_ids" in batch.inputs and "attention_mask" not in inputs
    if unmasked and "attention_mask" in required_inputs(module):
        inputs["attention_mask"] = torch.ones_like(batch.inputs["input_ids"])
    return inputs


def is_encoder_decoder(module: nn.Module) -> bool:
    """Whether a model reads a source with an encoder and writes after it with a decoder."""
    config: Any = getattr(module, "config", None)
    return bool(
        getattr(config, "is_encoder_decoder", False)
        and "decoder_input_ids" in parameters_of(module)
    )


def has_tokens(module: nn.Module, batch: Batch) -> bool:
    """Whether the positions of a model's blocks are tokens of the batch."""
    return batch.has_source or ("input_ids" in batch.inputs and module not in beside_tokens)


def with_decoder_start(module: nn.Module, batch: Batch) -> Batch:
    """The batch, where only an encoder's inputs are given with the token that `generate` begins with.

    Raises:
        BadInput: the model names no such token.
    """
    if batch.has_source or not is_encoder_decoder(module):
        return batch
    _check_main(module, batch)
    places = (getattr(module, "generation_config", None), module.config, text_config(module))
    for name in ("decoder_start_token_id", "bos_token_id"):
        for place in places:
            if isinstance(start := getattr(place, name, None), int):
                return batch.with_decoder_start(start)
    raise BadInput(
        f"{type(module).__name__} names no decoder_start_token_id: give decoder_input_ids besides the "
        'source, model.run({"input_ids": …, "decoder_input_ids": …})'
    )


def named_input(module: nn.Module) -> str:
    """The name of what a model reads: the first its class names; pixels where that is inherited and it takes them."""
    named: str | list[str] = getattr(module, "main_input_name", "input_ids")  # type: ignore[assignment]
    name = named if isinstance(named, str) else named[0]
    taken = parameters_of(module)
    return "pixel_values" if name not in taken and "pixel_values" in taken else name


def main_input(module: nn.Module) -> str:
    """The same; where the name is inherited and not taken, the first that the forward requires."""
    name = named_input(module)
    taken = parameters_of(module)
    if name in taken or not hasattr(module, "main_input_name"):
        return name
    return next(iter(required_inputs(module)), name)


def required_inputs(module: nn.Module) -> list[str]:
    """What the signature of a forward does not leave open, in its order."""
    return [
        name
        for name, p in parameters_of(module).items()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and name != "self"
    ]


def _check_main(module: Any, batch: Batch) -> None:
    name = main_input(module)
    if name not in batch.inputs:
        raise BadInput(
            f"{type(module).__name__} reads '{name}' as its source; given: {', '.join(batch.inputs)}"
        )


def check_source(module: Any, batch: Batch) -> None:
    """BadInput where there is no source, or one of tokens that are not in the encoder's vocabulary."""
    _check_main(module, batch)
    ids = batch.inputs.get("input_ids")
    if ids is not None:
        encoder = module.get_encoder()  # not a model of its own everywhere
        embedding = None
        if hasattr(encoder, "get_input_embeddings"):
            with suppress(NotImplementedError):  # it does not say which module it is
                embedding = encoder.get_input_embeddings()
        check_tokens(ids, getattr(embedding, "num_embeddings", None), "source")


def check_tokens(ids: Tensor, d_vocab: int | None, of: str = "prompt") -> None:
    """BadInput where there are no token ids, or some outside the vocabulary."""
    if ids.numel() == 0:
        raise BadInput(f"the {of} has no tokens: give at least one")
    if ids.is_floating_point():
        raise BadInput(
            f"the {of}'s token ids are {ids.dtype} numbers; token ids are whole: ids.long()"
        )
    low, high = int(ids.min()), int(ids.max())
    if d_vocab is not None and (high >= d_vocab or low < 0):
        wrong = low if low < 0 else high
        raise BadInput(f"the {of}'s token id {wrong} is outside the vocabulary of {d_vocab} tokens")


def check_kept(logits: Any, batch: Batch, tokens: bool) -> None:
    """BadInput where `logits` of a run is neither True, False nor positions that the batch has."""
    if isinstance(logits, bool):
        return
    if not isinstance(logits, Tensor) or logits.ndim != 1 or logits.dtype not in _WHOLE:
        given = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else logits
        raise BadInput(
            f"logits={given}: wanted True, False, or a LongTensor of positions, the same in every row: "
            "logits=torch.tensor([-1]). One position a row is picked afterwards: "
            "run.logits[torch.arange(rows), positions]"
        )
    n = batch.ids.shape[1] if tokens else None
    if n is not None and (beyond := [i for i in logits.tolist() if not -n <= i < n]):
        raise BadInput(f"logits at position {beyond[0]}: the prompts have {n} positions")


def output_tensor(output: Any) -> Tensor:
    """Logits where the model has a head, else its last hidden state, else the first that is no whole numbers."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(tensor := getattr(output, name, None), Tensor):
            return tensor
    if isinstance(output, Tensor):  # which has `values`, of sparse ones
        return output
    several = tuple(output.values()) if hasattr(output, "values") else output
    several = several if isinstance(several, tuple) else (several,)
    # Not which points match, on which no identity can be tried; nor numbers of objects, which are no tensor.
    numbers = [x for x in several if not isinstance(x, Tensor) or x.is_floating_point()]
    found = next((x for x in map(first_tensor, numbers) if x is not None), None)
    if found is None:
        raise Refused("the model returns neither logits nor a hidden state")
    return found


def uncapped_logits(spec: Spec, module: nn.Module, residual: Tensor) -> Tensor:
    """The same before a soft-cap: linear in the normed residual, with the model's scale."""
    if spec.readout:
        raise Refused(
            f"logits are not linear in the normed residual: '{spec.readout[0]}' transforms it first"
            if spec.readout[0]
            else "no chain of modules, but code of the model's own, makes logits of the final residual"
        )
    if spec.unembedding is None:
        raise Refused("this model has no unembedding (no language-model head)")
    if spec.final_norm is not None:
        norm = module.get_submodule(spec.final_norm)
        residual = at_home(norm, residual.to(spec.final_dtype or residual.dtype))
    return at_home(module.get_submodule(spec.unembedding), residual) * spec.logit_scale


def at_home(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), computed where the module's weights are; weights not in memory are brought to x.

    Of a module that returns several things (a norm and its scale) the first tensor.
    A linear layer reads what has its weights' dtype alone, so a model that keeps x in another one rounds it.
    """
    if isinstance(module, nn.Linear) and module.weight.dtype in FLOATS:
        x = x.to(module.weight.dtype)
    place = module_device(module)
    made = first_tensor(module(x if place.type == "meta" else x.to(place)))
    assert made is not None
    return made.to(x.device)
