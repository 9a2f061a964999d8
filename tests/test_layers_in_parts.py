"""Layers that are no module: members of several lists, called one after the other in the model's own forward."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from interp.errors import Refused
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.edits import Edit
from interp.sites import SELF_SITES

IDS = torch.randint(10, 97, (2, 9), generator=torch.Generator().manual_seed(1))
ROUNDING = 1e-5
"""A few float32 roundings, three layers deep."""
SIZES = {"emb_dim": 32, "n_heads": 4, "n_layers": 3, "vocab_size": 99, "n_langs": 1}
LAYER = ("attentions", "layer_norm1", "ffns", "layer_norm2")


def made(name: str, **options: Any) -> Any:
    """A random model whose layers are members of four lists; its norms and biases too are random."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, max_position_embeddings=64, **options)
    module = getattr(transformers, f"{name}WithLMHeadModel")(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


@cache
def model(name: str = "XLM", **options: Any) -> Any:
    return Model(made(name, **options), id=name)


def off(got: Any, wanted: Any) -> float:
    assert got.shape == wanted.shape
    return float(((got - wanted).abs().max() / wanted.abs().max()).detach())


def plain(of: Any, batch: Tensor | Batch = IDS) -> Any:
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else batch.inputs
    inputs = {name: x for name, x in inputs.items() if name != "position_ids"}
    of.module.set_attn_implementation("eager")
    with torch.no_grad():
        return of.module(**inputs, output_attentions=True, output_hidden_states=True)


@pytest.mark.parametrize(
    "options", [{"name": "XLM"}, {"name": "XLM", "causal": True}, {"name": "Flaubert"}]
)
def test_sites_are_what_the_model_itself_returns(options: dict[str, Any]) -> None:
    of = model(**options)
    assert of.spec.stack == " + ".join(f"transformer.{name}" for name in LAYER)
    assert not of.spec.refused and of.spec.chained and not of.spec.shared
    assert of.spec.causal is ("causal" in options)
    sites = ["resid_pre", "resid_post", "pattern", "attn_write", "resid_mid", "mlp_write"]
    run, own = of.run(IDS, capture=sites), plain(of)
    assert torch.equal(run.logits, own.logits)
    for layer in range(of.n_layers):
        assert torch.equal(run.cache[f"resid_pre.{layer}"], own.hidden_states[layer])
        assert torch.equal(run.cache[f"resid_post.{layer}"], own.hidden_states[layer + 1])
        assert off(run.cache[f"pattern.{layer}"], own.attentions[layer]) < ROUNDING
        norms = [of.module.get_submodule(f"transformer.layer_norm{i}.{layer}") for i in (1, 2)]
        total = run.cache[f"resid_pre.{layer}"]
        for write, norm, end in zip(
            ("attn_write", "mlp_write"), norms, ("resid_mid", "resid_post"), strict=True
        ):
            total = norm(total + run.cache[f"{write}.{layer}"])
            assert off(total, run.cache[f"{end}.{layer}"]) < ROUNDING
    assert torch.equal(of.run(IDS, edits=[Edit.apply("z", lambda x, seen: x)]).logits, own.logits)


@pytest.mark.parametrize("site", ["z", "attn_write", "mlp_out", "mlp_post", "resid_mid"])
def test_an_edit_is_a_plain_hook_on_the_module(site: str) -> None:
    of = model()
    inside = {
        "z": ("attentions.1.out_lin", slice(8, 16)),
        "attn_write": ("attentions.1", slice(None)),
        "mlp_out": ("ffns.1", slice(None)),
        "mlp_post": ("ffns.1.lin2", slice(None)),
        "resid_mid": ("layer_norm1.1", slice(None)),
    }
    name, columns = inside[site]
    module = of.module.get_submodule(f"transformer.{name}")

    def zero(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., columns] = 0
        return x

    def before(module: nn.Module, args: tuple) -> tuple:
        return (zero(args[0]), *args[1:])

    def after(module: nn.Module, args: tuple, output: Any) -> Any:
        return (zero(output[0]), *output[1:]) if isinstance(output, tuple) else zero(output)

    of_input = site in ("z", "mlp_post")
    hook = (
        module.register_forward_pre_hook(before)
        if of_input
        else module.register_forward_hook(after)
    )
    wanted = plain(of).logits
    hook.remove()
    edit = Edit.zero("z", heads=[(1, 1)]) if site == "z" else Edit.zero(f"{site}.1")
    run = of.run(IDS, capture=["resid_pre"])
    (replayed,) = of.replay(run, [[edit]], lambda variant: variant.logits)
    for got in (of.run(IDS, edits=[edit]).logits, replayed):
        assert off(got, wanted) < ROUNDING < off(run.logits, wanted)


def test_blocks_before_a_replay_are_not_computed_and_the_model_is_as_it_was() -> None:
    of = model()
    run = of.run(IDS, capture=["resid_pre", "resid_post"])
    before = run.cache["resid_pre"].clone()
    called: list[str] = []
    hooks = [
        part.register_forward_hook(lambda m, a, o, name=name: called.append(name))
        for name, part in of.module.named_modules()
        if name.endswith(("q_lin", "lin1"))
    ]
    edit = Edit.zero("resid_post.1", positions=[3])
    (again, same) = of.replay(run, [[edit], []], lambda variant: variant.logits)
    for hook in hooks:
        hook.remove()
    assert not any(name.startswith("transformer.attentions.0") for name in called)
    assert off(again, of.run(IDS, edits=[edit]).logits) < ROUNDING < off(again, run.logits)
    assert off(same, run.logits) < ROUNDING
    assert torch.equal(before, run.cache["resid_pre"])
    assert torch.equal(plain(of).logits, run.logits)
    assert not any("forward" in part.__dict__ for part in of.module.modules())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_of_the_row(side: str) -> None:
    of = model()
    rows = [IDS[0], IDS[1, :5]]
    ids, mask = torch.full((2, 9), 2), torch.zeros(2, 9, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(len(row)) if side == "right" else slice(9 - len(row), None)
        ids[i, where], mask[i, where] = row, True
    run = of.run(Batch.of_ids(ids, mask), capture=["resid_post"])
    for i, row in enumerate(rows):
        alone = of.run(row[None], capture=["resid_post"])
        assert off(run.logits[i][mask[i]], alone.logits[0]) < ROUNDING
        assert off(run.cache["resid_post"][i][mask[i]], alone.cache["resid_post"][0]) < ROUNDING


def test_gradients_reach_what_is_captured_with_frozen_weights_too() -> None:
    found = []
    for needed in (True, False):
        of: Any = Model(made("XLM").requires_grad_(needed), id="xlm")
        run = of.run(IDS, capture=["resid_pre", "resid_post", "z", "attn_write"], grad=True)
        target = run.logits.select(1, -1)[:, 5].sum()
        found.append([run.gradients(target, f"{site}.1") for site in run.cache])
    for gradient, frozen in zip(*found, strict=True):
        assert bool(gradient.any()) and off(frozen, gradient) < ROUNDING


def test_what_calls_a_block_by_itself_is_refused() -> None:
    with pytest.raises(Refused, match=r"'transformer.attentions.0', 'transformer.layer_norm1.0'"):
        _ = model().blocks


def test_a_norm_before_attention_leaves_the_stream_to_no_module() -> None:
    """What a layer returns is then a sum that code outside makes: its last module is no end of it."""

    class PreNorm(nn.Module):
        """The layers of `of` with norms before what they norm."""

        def __init__(self, of: Any) -> None:
            super().__init__()
            self.config, self.head = of.config, of.pred_layer.proj
            self.transformer: Any = of.transformer
            self.main_input_name = "input_ids"

        def forward(self, input_ids: Tensor) -> Any:
            x, parts = self.transformer.embeddings(input_ids), self.transformer
            mask = torch.ones(input_ids.shape)
            for attention, first, mlp, second in zip(
                *(getattr(parts, name) for name in LAYER), strict=True
            ):
                x = x + attention(first(x), mask)[0]
                x = x + mlp(second(x))
            return CausalLMOutput(logits=self.head(x))

    of: Any = Model(PreNorm(made("XLM")).eval())
    assert " + " not in of.spec.stack and not set(SELF_SITES) & set(of.spec.refused)
    for site in ("resid_post", "unembedding", "attn_write", "mlp_out"):
        assert site in of.spec.refused and site not in of.spec.absent
    with pytest.raises(Refused, match="an attention in a list of its own, no block"):
        of.run(IDS, capture=["resid_post"])
    with torch.no_grad():
        assert torch.equal(of.run(IDS, capture=["pattern"]).logits, of.module(IDS).logits)


def test_lists_that_are_not_called_in_turn_make_no_layers() -> None:
    from interp.models.in_parts import lists_in_turn
    from interp.models.probe import probe_batch
    from interp.models.recording import record

    module = model().module
    seen = record(module, probe_batch(module))
    attentions = "transformer.attentions"
    assert lists_in_turn(seen, attentions) == model().spec.stack
    order = [seen.call(f"transformer.{name}.{i}").order for i in range(3) for name in LAYER]
    assert all(a < b for a, b in pairwise(order))
    seen.call("transformer.ffns.0").order = seen.call("transformer.layer_norm2.2").order + 1
    assert lists_in_turn(seen, attentions) == ""
