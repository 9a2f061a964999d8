"""The map of a model whose weights are not here: found on a narrow copy with random weights.

Where a site is follows from a model's code and config, not from its weights: the same class is built
with every layer of the config but few and narrow heads, is probed and verified like any model, and
its addresses are then looked up in the real structure (parameters on the meta device), from which the
real sizes are read. What this cannot vouch for are the weights themselves.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from interp.errors import BadInput, Refused
from interp.models.block_map import BlockMap
from interp.models.calls import is_encoder_decoder, main_input, text_config
from interp.models.probe import probe, probe_batch
from interp.models.recording import Recording, record
from interp.models.spec import Spec

N_HEADS, D_HEAD, D_MLP, D_VOCAB = 4, 16, 48, 256
SMALL = 300_000_000
"""Parameters up to which a model is built in its own size, where a narrow one cannot be."""

_BUILD_ERRORS = (ValueError, RuntimeError, TypeError, KeyError, AttributeError, IndexError)
_BUILD_ERRORS = (*_BUILD_ERRORS, AssertionError, NotImplementedError, BadInput, Refused)


def skeleton(module: nn.Module) -> tuple[Spec, Recording]:
    """The map of `module`, and what happens in a forward of a copy that has the same modules.

    Raises:
        Refused: no copy could be built and probed.
    """
    if main_input(module) != "input_ids":
        raise Refused(f"{type(module).__name__} takes no token ids: only token models run remotely")
    if is_encoder_decoder(module):
        raise Refused(
            f"{type(module).__name__} is an encoder-decoder: load it here, with interp.load"
        )
    reasons = []
    for config in _configs(module):
        try:
            small = _random(type(module), config)
            spec, seen = probe(small), record(small, probe_batch(small))
            return _full_size(spec, small, module), seen
        except _BUILD_ERRORS as error:
            reasons.append(str(error).partition("\n")[0])
    raise Refused(
        f"no small copy of {type(module).__name__} could be built to find its sites on "
        f"({'; '.join(reasons)}): load its weights here with interp.load(model)"
    )


def _configs(module: nn.Module) -> list[Any]:
    """Configs of copies worth trying: narrow ones, and the model's own where that is small."""
    sizes = {
        "num_attention_heads": N_HEADS,
        "hidden_size": N_HEADS * D_HEAD,
        "word_embed_proj_dim": N_HEADS * D_HEAD,
        "vocab_size": D_VOCAB,
    }
    # Some configs have a head_dim of their own, in others (latent attention) it follows from others.
    found = [_narrow(module.config, {**sizes, "head_dim": D_HEAD}), _narrow(module.config, sizes)]
    if sum(parameter.numel() for parameter in module.parameters()) <= SMALL:
        found.append(copy.deepcopy(module.config))
    return found


def _narrow(config: Any, sizes: dict[str, int]) -> Any:
    """The config with few and narrow heads; every layer, kind of layer and switch is kept."""
    config = copy.deepcopy(config)
    part = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = part.num_attention_heads
    groups = getattr(part, "num_key_value_heads", None) or heads
    grouped = N_HEADS if groups == heads else max(1, N_HEADS * groups // heads)
    for name, size in {**sizes, "num_key_value_heads": grouped}.items():
        follows = isinstance(getattr(type(part), name, None), property)
        if getattr(part, name, None) is not None and not follows:
            setattr(part, name, size)
    for name, value in list(vars(part).items()):
        if isinstance(value, int) and (
            "intermediate_size" in name or name in ("ffn_dim", "n_inner")
        ):
            setattr(part, name, D_MLP)
        if name.endswith("token_id") and isinstance(value, int) and value >= D_VOCAB:
            setattr(part, name, value % D_VOCAB)
    return config


def _random(cls: type[nn.Module], config: Any) -> nn.Module:
    """A model of random weights, gains and biases off their trivial values."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = cls(config).float().eval()
        for parameter in module.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim < 2:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return module


def _full_size(spec: Spec, small: nn.Module, module: nn.Module) -> Spec:
    """The map with the sizes of the real structure; every address must be there, of the same class."""
    config, narrow = text_config(module), text_config(small)
    real = dict(module.named_modules())
    blocks = []
    for block in spec.blocks:
        writes = [write.module for write in block.writes]
        inner = (block.attention, block.W_O, block.attn_out, block.W_out, block.mlp_out)
        for name in (block.name, *inner, *writes):
            if name is None:
                continue
            if type(real.get(name)) is not type(small.get_submodule(name)):
                raise Refused(f"'{name}' of the copy is not in the model")
        blocks.append(_full_block(block, config, narrow, real))
    return replace(
        spec, blocks=tuple(blocks), d_model=config.hidden_size, d_vocab=config.vocab_size
    )


def _full_block(block: BlockMap, config: Any, narrow: Any, real: dict[str, nn.Module]) -> BlockMap:
    def d_in(name: str) -> int:
        weight = real[name].weight
        assert isinstance(weight, torch.Tensor)
        return weight.numel() // config.hidden_size

    if block.W_out is not None:
        block = replace(block, d_mlp=d_in(block.W_out))
    if block.attention is None:
        return replace(block, v=None)
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    n_heads = block.n_heads * config.num_attention_heads // narrow.num_attention_heads
    small_groups = getattr(narrow, "num_key_value_heads", None) or narrow.num_attention_heads
    n_kv_heads = block.n_kv_heads * groups // small_groups
    d_head = 0 if block.W_O is None else d_in(block.W_O) // n_heads
    return replace(block, n_heads=n_heads, n_kv_heads=n_kv_heads, d_head=d_head, v=None)
