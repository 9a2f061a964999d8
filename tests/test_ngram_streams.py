"""Attention with a softmax for some queries and another for the rest (ProphetNet): one pattern over all positions.

Its decoder holds three streams of the tokens' length one after the other: that of the tokens, and two that predict
later ones. Queries of the first see its keys; those of the others see these and their own. W_O is called for the first
stream, and then for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.models.pieces import pieces
from interp.nnsight import addresses
from interp.run.edits import Edit
from interp.run.statistics import Mass
from interp.sites import Site

ROUNDING = 1e-5
"""A few float32 roundings, two blocks deep."""
MOVED = 1e-3
"""A hundred times that: an effect, and no rounding."""
N_HEADS, N_TOKENS, N_STREAMS = 4, 7, 3
N_POS = N_STREAMS * N_TOKENS
SITES = ["q", "k", "v", "scores", "pattern", "z", "attn_out", "attn_write", "resid_mid"]
CLASSES = {
    "decoder": transformers.ProphetNetForCausalLM,
    "encoder-decoder": transformers.ProphetNetForConditionalGeneration,
}


@cache
def opened(kind: str = "decoder") -> Model:
    torch.manual_seed(0)
    config = transformers.ProphetNetConfig(
        vocab_size=97,
        hidden_size=32,
        num_encoder_layers=1,
        num_decoder_layers=2,
        num_encoder_attention_heads=N_HEADS,
        num_decoder_attention_heads=N_HEADS,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        ngram=N_STREAMS - 1,
        num_buckets=8,
        relative_max_distance=16,
    )
    module: Any = CLASSES[kind](config).eval()
    assert sum(parameter.numel() for parameter in module.parameters()) < 200_000
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.15) * torch.randn_like(parameter))
    return Model(module, id=kind)


def tokens() -> Tensor:
    return torch.randint(3, 97, (2, N_TOKENS), generator=torch.Generator().manual_seed(1))


def off(got: Tensor | None, wanted: Tensor) -> float:
    assert got is not None and got.shape == wanted.shape
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


def plain() -> Tensor:
    with torch.no_grad():
        return opened().module(tokens(), use_cache=False).logits


def attention(layer: int) -> Any:
    block: Any = opened().blocks[layer]
    return block.self_attn


@contextmanager
def hooked(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", CLASSES)
def test_all_sites_and_w_o_are_verified(kind: str) -> None:
    model = opened(kind)
    assert set(model.spec.refused) <= {"unembedding"}  # logits are of the other streams' positions
    assert {"heads", "writes"} <= {check.name for check in model.spec.checks if check.passed}
    for block in model.spec.blocks:
        assert block.attention and f"{block.attention}.out_proj" == block.W_O
        assert block.attn_out == block.attention and not block.between
        of = pieces[model.module.get_submodule(block.attention)]
        assert of.q and len(of.more) == 1
    with pytest.raises(Refused, match="no one module's input"):
        addresses(model)[Site("z", 0)]  # W_O reads one stream, and then the others


@pytest.mark.parametrize("layer", [0, 1])
def test_rows_are_those_of_the_models_own_softmaxes(layer: int) -> None:
    made: list[tuple[Tensor, Tensor, Tensor]] = []
    cache = opened().run(tokens(), capture=SITES).cache
    hook = attention(layer).register_forward_hook(lambda module, args, out: made.append(out))
    with hooked(hook):
        logits = plain()
    out, of_tokens, of_others = made[0]
    pattern = torch.zeros(2, N_HEADS, N_POS, N_POS)
    pattern[:, :, :N_TOKENS, :N_TOKENS] = of_tokens
    for stream in range(1, N_STREAMS):
        mine = slice(stream * N_TOKENS, (stream + 1) * N_TOKENS)
        pattern[:, :, mine, :N_TOKENS] = of_others[:, stream - 1, :, :, :N_TOKENS]
        pattern[:, :, mine, mine] = of_others[:, stream - 1, :, :, N_TOKENS:]
    at = {name: cache[f"{name}.{layer}"] for name in SITES}
    assert off(at["pattern"], pattern) < ROUNDING
    assert off(at["scores"].softmax(-1), pattern) < ROUNDING
    assert off(at["z"], torch.einsum("bhqk,bkhd->bqhd", pattern, at["v"])) < ROUNDING
    W_O, bias = opened().W_O(layer), attention(layer).out_proj.bias
    assert off(torch.einsum("bphd,hdm->bpm", at["z"], W_O) + bias, out) < ROUNDING
    assert off(at["attn_out"], out) < ROUNDING and off(at["attn_write"], out) < ROUNDING
    assert off(opened().run(tokens()).logits, logits) < ROUNDING


def without_head(head: int, streams: slice) -> Callable[..., Any]:
    """Pre-hook of W_O [batch streams token width]: zeros where this head's z in these streams is."""
    calls = 0

    def hook(module: Any, args: tuple) -> tuple:
        nonlocal calls
        numbers = torch.tensor([0]) if calls == 0 else torch.arange(1, N_STREAMS)
        calls += 1
        z = args[0].unflatten(-1, (N_HEADS, -1)).clone()
        wanted = torch.isin(numbers, torch.arange(N_STREAMS)[streams])
        z[:, wanted, :, head] = 0
        return (z.flatten(-2),)

    return hook


@pytest.mark.parametrize("streams", [slice(0, 3), slice(0, 1), slice(2, 3)])
def test_a_head_taken_out_is_taken_out_of_a_plain_forward(streams: slice) -> None:
    positions = list(range(N_POS))[streams.start * N_TOKENS : streams.stop * N_TOKENS]
    edits = [Edit.zero("z", heads=[(1, 2)], positions=positions)]
    pre = attention(1).out_proj.register_forward_pre_hook(without_head(2, streams))
    with hooked(pre):
        wanted = plain()
    run = opened().run(tokens(), capture=["resid_post"], edits=edits)
    assert off(run.logits, wanted) < ROUNDING
    clean = opened().run(tokens(), capture=["resid_post"])
    moved = (run.cache["resid_post.1"] - clean.cache["resid_post.1"]).abs().amax((0, 2)) > 0
    assert moved.nonzero()[:, 0].tolist() == positions


def test_edited_scores_and_patterns_go_on() -> None:
    def own_alone(pattern: Tensor, seen: Any) -> Tensor:
        return torch.eye(N_POS).expand_as(pattern)

    seen_alone = [Edit.apply("pattern.0", own_alone)]
    cache = opened().run(tokens(), capture=["z.0", "v.0", "attn_out.0"], edits=seen_alone).cache
    assert off(cache["z.0"], cache["v.0"]) < ROUNDING
    hidden = Edit.apply("scores.0", lambda x, seen: torch.where(x.isinf(), x, x.flip(1)))
    cache = opened().run(tokens(), capture=["scores.0", "pattern.0"], edits=[hidden]).cache
    assert off(cache["pattern.0"], cache["scores.0"].softmax(-1)) < ROUNDING
    clean = opened().run(tokens(), capture=["pattern.0"]).cache["pattern.0"]
    assert off(cache["pattern.0"], clean) > MOVED


def test_one_stream_s_queries_see_no_keys_of_another() -> None:
    uniform = Edit.apply("pattern.0", lambda x, seen: torch.full_like(x, 1 / N_POS))
    with pytest.raises(BadInput, match="queries see no key"):
        opened().run(tokens(), edits=[uniform])


def test_row_statistics_are_of_the_tokens() -> None:
    """Their stream is the first, and sees itself alone."""
    rows = torch.ones(N_TOKENS, dtype=torch.bool).expand(2, -1)
    before = (torch.arange(N_TOKENS) - 1).clamp_min(0)[None, :, None].expand(2, -1, -1)
    run = opened().run(tokens(), capture=["pattern"], statistics={"m": Mass(before, rows)})
    pattern = run.cache["pattern.1"][:, :, :N_TOKENS, :N_TOKENS]
    mass = pattern.gather(-1, before[:, None].expand(2, N_HEADS, -1, -1))[..., 0].mean(2)
    assert off(run.statistics["m"][:, 1], mass) < ROUNDING
