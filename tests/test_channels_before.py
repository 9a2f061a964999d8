"""SqueezeBERT: blocks that hold channels before positions, return dicts, and whose `forward` the model calls itself."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.forwards import called, find_called, hooks_called
from interp.models.layout import CHANNELS_BEFORE
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.edits import Edit

IDS = torch.randint(10, 97, (2, 9), generator=torch.Generator().manual_seed(1))
ROUNDING = 1e-5
"""A few float32 roundings, two blocks deep."""
SIZES = {"hidden_size": 32, "embedding_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


@cache
def squeezed() -> Any:
    torch.manual_seed(0)
    config = transformers.SqueezeBertConfig(vocab_size=97, num_hidden_layers=2, **SIZES)
    module: Any = transformers.SqueezeBertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return Model(module, id="squeezed")


def off(got: Any, wanted: Any) -> float:
    assert got.shape == wanted.shape
    return float(((got - wanted).abs().max() / wanted.abs().max()).detach())


@torch.no_grad()
def plain(**inputs: Tensor) -> Any:
    given = inputs or {"input_ids": IDS}
    return squeezed().module(**given, output_attentions=True, output_hidden_states=True)


def test_sites_are_what_the_model_itself_returns() -> None:
    model = squeezed()
    assert set(model.spec.refused) == {"unembedding"} == set(model.spec.absent)
    assert model.spec.hidden_axes == CHANNELS_BEFORE and model.spec.d_model == 32
    sites = ["resid_pre", "resid_post", "scores", "pattern", "attn_write", "resid_mid", "mlp_write"]
    run, own = model.run(IDS, capture=sites), plain()
    assert torch.equal(run.logits, own.logits)
    for layer in range(2):
        assert torch.equal(run.cache[f"resid_pre.{layer}"], own.hidden_states[layer])
        assert torch.equal(run.cache[f"resid_post.{layer}"], own.hidden_states[layer + 1])
        assert off(run.cache[f"scores.{layer}"], own.attentions[layer]) < ROUNDING
        assert off(run.cache[f"pattern.{layer}"], own.attentions[layer].softmax(-1)) < ROUNDING
        block, total = model.blocks[layer], run.cache[f"resid_pre.{layer}"]
        for write, norm, end in (
            ("attn_write", block.post_attention.layernorm, "resid_mid"),
            ("mlp_write", block.output.layernorm, "resid_post"),
        ):
            total = norm((total + run.cache[f"{write}.{layer}"]).mT).mT
            assert off(total, run.cache[f"{end}.{layer}"]) < ROUNDING
    assert off(model.unembed(run.cache["resid_post.1"]), run.logits) < ROUNDING
    same = [Edit.apply(site, lambda x, seen: x) for site in (*sites, "q", "k", "z")]
    assert torch.equal(model.run(IDS, edits=same).logits, own.logits)


def test_weights_of_grouped_convolutions_make_what_is_seen() -> None:
    model = squeezed()
    run = model.run(IDS, capture=["resid_pre", "v", "z", "attn_out", "mlp_post", "mlp_out"])
    for layer in range(2):
        heads = torch.einsum("bphd,hdm->bpm", run.cache[f"z.{layer}"], model.W_O(layer))
        assert off(heads + model.b_O(layer), run.cache[f"attn_out.{layer}"]) < ROUNDING
        neurons = run.cache[f"mlp_post.{layer}"] @ model.W_out(layer) + model.b_out(layer)
        assert off(neurons, run.cache[f"mlp_out.{layer}"]) < ROUNDING
        v = torch.einsum("bpm,hmd->bphd", run.cache[f"resid_pre.{layer}"], model.W_V(layer))
        bias = model.blocks[layer].attention.value.bias.reshape(4, 8)
        assert off(v + bias, run.cache[f"v.{layer}"]) < ROUNDING


@pytest.mark.parametrize("site", ["z", "attn_out", "mlp_post", "resid_mid", "resid_post"])
def test_an_edit_is_a_plain_hook_on_the_module(site: str) -> None:
    model = squeezed()
    block, head = model.blocks[0], slice(8, 16) if site == "z" else slice(None)

    def zero(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, head, 3] = 0
        return x

    def before(module: nn.Module, args: tuple) -> tuple:
        return (zero(args[0]), *args[1:])

    def after(module: nn.Module, args: tuple, out: Any) -> Any:
        return zero(out)

    hook = {
        "z": lambda: block.post_attention.conv1d.register_forward_pre_hook(before),
        "attn_out": lambda: block.post_attention.conv1d.register_forward_hook(after),
        "mlp_post": lambda: block.output.conv1d.register_forward_pre_hook(before),
        "resid_mid": lambda: block.post_attention.layernorm.register_forward_hook(after),
        "resid_post": lambda: block.output.register_forward_hook(after),
    }[site]()
    wanted = plain().logits
    hook.remove()
    heads = [(0, 1)] if site == "z" else None
    edit = Edit.zero(site if heads else f"{site}.0", heads=heads, positions=[3])
    run = model.run(IDS, capture=["resid_pre"])
    (replayed,) = model.replay(run, [[edit]], lambda variant: variant.logits)
    with model.hooked(IDS, edits=[edit]):
        hooked = plain().logits
    for got in (model.run(IDS, edits=[edit]).logits, replayed, hooked):
        assert off(got, wanted) < ROUNDING < off(run.logits, wanted)


def test_a_replay_skips_blocks_and_the_model_is_as_it_was() -> None:
    model, seen = squeezed(), []
    run = model.run(IDS, capture=["resid_pre"])
    hook = model.blocks[0].attention.register_forward_hook(lambda *of: seen.append(of))
    edits = [[Edit.zero("resid_post.1", positions=[2])], [Edit.zero("z", heads=[(1, 0)])], []]
    replayed = model.replay(run, edits, lambda variant: variant.logits)
    hook.remove()
    assert not seen
    for edit, logits in zip(edits, replayed, strict=True):
        assert off(logits, model.run(IDS, edits=edit).logits) < ROUNDING
    assert torch.equal(plain().logits, run.logits)
    for part in model.module.modules():
        assert "forward" not in part.__dict__
        assert not part._forward_hooks and not part._forward_pre_hooks


@torch.no_grad()
def test_a_norm_is_held_fixed() -> None:
    model = squeezed()
    run = model.run(IDS, capture=["resid_pre.0", "attn_write.0", "resid_mid.0"])
    norm = model.norm(model.spec.blocks[0].norm_mid)
    x = run.cache["resid_pre.0"] + run.cache["attn_write.0"]
    made = norm.gain * norm.centre(x) / norm.scale(x) + norm.bias
    assert norm.centred and off(made, run.cache["resid_mid.0"]) < ROUNDING


def test_padding_changes_nothing_of_the_row() -> None:
    model, row = squeezed(), IDS[1, :5]
    ids, mask = IDS.clone(), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    run = model.run(Batch.of_ids(ids, mask), capture=["resid_post"])
    alone = model.run(row[None], capture=["resid_post"])
    assert off(run.logits[1, :5], alone.logits[0]) < ROUNDING
    assert off(run.cache["resid_post"][1, :5], alone.cache["resid_post"][0]) < ROUNDING


def test_gradients_reach_what_is_captured() -> None:
    model = squeezed()
    run = model.run(IDS, capture=["resid_pre", "z", "attn_write", "resid_post"], grad=True)
    target = run.logits[:, 3, 5].sum()
    for site in run.cache:
        step = torch.randn_like(run.cache[f"{site}.0"])
        slope = float((run.gradients(target, f"{site}.0") * step).sum())
        near = [
            model.run(IDS, edits=[Edit.add(f"{site}.0", by * step)]).logits[:, 3, 5].sum()
            for by in (-1e-2, 1e-2)
        ]
        assert float(near[1] - near[0]) / 2e-2 == pytest.approx(slope, rel=5e-2, abs=1e-3)


def test_what_takes_channels_for_the_last_axis_is_refused() -> None:
    from interp.models.hooks import hidden_of

    with pytest.raises(Refused, match=r"\[batch, d_model, pos\]"):
        hidden_of((torch.zeros(2, 32, 9),), {}, squeezed().spec, 0)


def test_hooks_are_called_once_however_a_block_is_called() -> None:
    """By the model's own `block.forward(…)`, and by `block(…)` as ever."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0].forward(x)
            return self.layers[1].forward(self.layers[2](x))

    model, x, count = Blocks(), torch.randn(2, 3), list[int]()
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda module, args, out, i=i: count.append(i))
    wanted = model(x)
    assert count == [2]
    assert not find_called(model, lambda: model(x), {f"layers.{i}" for i in range(3)})
    assert find_called(model, lambda: model(x), {"layers.2"})
    assert set(called[model]) == {model.layers[0], model.layers[1]}
    called[model].add(model.layers[2])  # called as ever: its hooks are not called twice
    count.clear()
    with hooks_called(model):
        assert torch.equal(model(x), wanted)
    assert count == [0, 2, 1]
    count.clear()
    assert torch.equal(model(x), wanted) and count == [2]
    assert not any("forward" in part.__dict__ for part in model.modules())
