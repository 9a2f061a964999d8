"""Layers that attend several times: one pattern over two halves of the values, or two sets of heads.

Tolerance: float32, two blocks deep, as in `test_families`.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from interp.errors import BadInput, Refused
from interp.models.attention import implementation
from interp.models.model import Model
from interp.run.edits import Edit, Seen
from interp.run.statistics import Entropy, Mass
from interp.sites import AXES

ROUNDING = 1e-5
IDS = torch.randint(10, 97, (2, 6), generator=torch.Generator().manual_seed(1))
SHAPE = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}
MADE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "diffllama": (
        "DiffLlamaForCausalLM",
        "DiffLlamaConfig",
        {**SHAPE, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2},
    ),
    "longcat_flash": (
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        {
            **SHAPE,
            "num_layers": 2,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 16,
            "n_routed_experts": 4,
            "zero_expert_num": 1,
            "moe_topk": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "head_dim": 4,
            "v_head_dim": 8,
        },
    ),
}
N_HEADS = {"diffllama": 4, "longcat_flash": 8}
every = pytest.mark.parametrize("name", MADE)


@cache
def model_of(name: str) -> Model:
    stem, config, options = MADE[name]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = getattr(transformers, stem)(getattr(transformers, config)(**options)).eval()
        for parameter in module.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(0.1 * noise) if parameter.ndim < 2 else parameter.copy_(0.2 * noise)
    return Model(module, id=name)


def close(got: Tensor, wanted: Tensor) -> bool:
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max()) < ROUNDING * max(1.0, float(wanted.abs().max()))


@torch.no_grad()
def plain(model: Model) -> Tensor:
    return model.module(input_ids=IDS, use_cache=False).logits


@every
def test_every_site_that_there_is_verifies(name: str) -> None:
    model = model_of(name)
    spec = model.spec
    assert set(spec.refused) == set(spec.absent) and all(check.passed for check in spec.checks)
    assert {"window", "writes", "unembedding"} <= {check.name for check in spec.checks}
    assert spec.n_heads == N_HEADS[name]
    sites = [site for site in AXES if site not in spec.refused and model.layers_with(site)]
    run = model.run(IDS, capture=sites)
    assert close(run.logits, plain(model))
    assert run.cache["z"].shape[:4] == (2, 6, 2, N_HEADS[name])
    assert run.cache["pattern"].shape == (2, 2, N_HEADS[name], 6, 6)
    for layer in range(2):
        at = {site: run.cache[f"{site}.{layer}"] for site in ("pattern", "v", "z")}
        v = at["v"].repeat_interleave(N_HEADS[name] // at["v"].shape[2], 2)
        assert close(torch.einsum("bhqk,bkhd->bqhd", at["pattern"], v), at["z"])
        total = run.cache[f"resid_pre.{layer}"]
        calls: dict[str, Tensor] = {}
        hooks = [
            model.module.get_submodule(write.module).register_forward_hook(
                keep(calls, write.module)
            )
            for write in spec.blocks[layer].writes
        ]
        model.module(input_ids=IDS)
        for hook in hooks:
            hook.remove()
        for write in spec.blocks[layer].writes:
            total = total + calls[write.module].detach()
        assert close(total, run.cache[f"resid_post.{layer}"])


def keep(calls: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: Any, args: tuple, output: Any) -> None:
        calls[name] = output[0] if isinstance(output, tuple) else output

    return hook


@torch.no_grad()
def test_heads_that_share_a_pattern_are_as_many_times_wider() -> None:
    """The differential combination of z, written down from its paper, gives attn_out."""
    model = model_of("diffllama")
    cache = model.run(IDS, capture=["z", "q", "pattern", "attn_out"]).cache
    assert cache["z"].shape[-1] == 2 * cache["q"].shape[-1]
    with implementation(model.module, "eager"):
        theirs = model.module(input_ids=IDS, output_attentions=True).attentions
    for layer, block in enumerate(model.blocks):
        attention: Any = block.self_attn
        assert close(cache[f"pattern.{layer}"], theirs[layer])
        one, two = (
            (attention.lambda_q1 @ attention.lambda_k1).exp(),
            (attention.lambda_q2 @ attention.lambda_k2).exp(),
        )
        first, second = cache[f"z.{layer}"].chunk(2, dim=2)
        mixed = first - (one - two + attention.lambda_init) * second
        out = attention.o_proj(
            ((1 - attention.lambda_init) * attention.groupnorm(mixed)).flatten(2)
        )
        assert close(out, cache[f"attn_out.{layer}"])
    with pytest.raises(Refused, match="no attention output projection"):
        model.W_O(0)


@torch.no_grad()
def test_calls_with_patterns_of_their_own_are_more_heads() -> None:
    """The first four heads through the first W_O, the others through the second."""
    model = model_of("longcat_flash")
    outs: dict[str, Tensor] = {}
    names = [f"model.layers.1.self_attn.{i}" for i in (0, 1)]
    hooks = [model.module.get_submodule(n).register_forward_hook(keep(outs, n)) for n in names]
    z = model.run(IDS, capture=["z"]).cache["z.1"]
    for hook in hooks:
        hook.remove()
    for name, heads in zip(names, z.split(4, dim=2), strict=True):
        projection: Any = model.module.get_submodule(f"{name}.o_proj")
        assert close(projection(heads.flatten(2)), outs[name])
    for site in ("attn_out", "attn_write"):
        assert "no one attention output" in model.spec.refused[site]
    assert "besides attention and MLP" in model.spec.not_a_sum


@torch.no_grad()
def test_a_head_of_the_second_call_can_be_removed() -> None:
    """Head 5 of 8 is head 1 of the second call: columns 8 to 15 of what its W_O reads."""
    model = model_of("longcat_flash")

    def remove(module: Any, args: tuple) -> tuple:
        x = args[0].clone()
        x[..., 8:16] = 0
        return (x, *args[1:])

    reader = model.module.get_submodule("model.layers.1.self_attn.1.o_proj")
    hook = reader.register_forward_pre_hook(remove)
    wanted = plain(model)
    hook.remove()
    one = Edit.zero("z", heads=[(1, 5)])
    run = model.run(IDS, edits=[one], capture=["z"])
    assert close(run.logits, wanted) and not close(wanted, plain(model))
    assert not run.cache["z.1.5"].any() and run.cache["z.1.1"].any()
    clean = model.run(IDS, capture=["resid_pre"])
    (replayed,) = model.replay(clean, [[one]], lambda run: run.logits)
    assert close(replayed, wanted)


@every
def test_patterns_are_edited_in_every_call(name: str) -> None:
    model = model_of(name)
    for head in range(N_HEADS[name]):
        by_pattern = model.run(IDS, edits=[Edit.zero("pattern", heads=[(0, head)])]).logits
        by_z = model.run(IDS, edits=[Edit.zero("z", heads=[(0, head)])]).logits
        assert close(by_pattern, by_z) and not close(by_z, plain(model))
    same = [Edit.apply(site, lambda x, seen: x) for site in ("q", "k", "v", "z", "pattern")]
    assert close(model.run(IDS, edits=same).logits, plain(model))
    # From another run: every call gets its own part.
    other = model.run(IDS.flip(0), capture=["z"]).cache
    patched = model.run(IDS, edits=[Edit.patch("z", other.by_layer("z"))], capture=["z"])
    assert close(patched.cache["z"], other["z"])


@every
def test_an_edit_that_mixes_the_calls_is_refused(name: str) -> None:
    mix = Edit.apply("z", lambda x, seen: x - x.mean(dim=(2, 3), keepdim=True))
    with pytest.raises(BadInput, match="attention calls of this layer"):
        model_of(name).run(IDS, edits=[mix])


@every
def test_a_comparison_between_the_calls_is_refused_though_it_leaves_no_nan(name: str) -> None:
    """What is compared with the unknown parts is false, and an edit that keeps the largest would keep nothing."""

    def of_largest(x: Tensor, seen: Seen) -> Tensor:
        return x * (x == x.amax((2, 3), keepdim=True))

    def of_first_in_order(x: Tensor, seen: Seen) -> Tensor:
        rows = x.flatten(2)
        return torch.where(rows == rows.sort(-1).values[..., -1:], 0.0, rows).reshape(x.shape)

    for change in (of_largest, of_first_in_order):
        with pytest.raises(BadInput, match="attention calls of this layer"):
            model_of(name).run(IDS, edits=[Edit.apply("z", change)])
    drawn = Edit.apply("z", lambda x, seen: x + torch.randn_like(x))
    assert not close(model_of(name).run(IDS, edits=[drawn]).logits, plain(model_of(name)))


@every
def test_statistics_know_all_heads(name: str) -> None:
    model = model_of(name)
    here, rows = torch.arange(6).expand(2, -1), torch.ones(2, 6, dtype=torch.bool)
    wanted = {"first": Mass(torch.zeros(2, 6, 1, dtype=torch.long), rows)}
    wanted["entropy"] = Entropy(rows, here + 1)
    run = model.run(IDS, capture=["pattern"], statistics=wanted)
    pattern = run.cache["pattern"]
    assert close(run.statistics["first"], pattern[..., 0].mean(-1))
    nats = torch.special.entr(pattern).sum(-1) / (here[0] + 1).clamp_min(2).log()
    assert close(run.statistics["entropy"], nats.mean(-1))


@every
@pytest.mark.parametrize("site", ["q", "v", "z", "pattern"])
def test_gradients_of_a_layer_s_heads_lead_through_every_call_of_it(name: str, site: str) -> None:
    """Along the activation itself, against the model with the site of layer 0 a little larger and smaller."""
    model, step = Model(deepcopy(model_of(name).module).double()), 1e-3
    run = model.run(IDS, capture=[site], grad=True)
    slopes = run.gradients(run.logits[..., 3].sum(), f"{site}.0") * run.cache[f"{site}.0"]
    along = slopes.detach().sum([0, 2, 3] if site == "pattern" else [0, 1, 3])
    for head in range(len(along)):
        up, down = (
            model.run(IDS, edits=[Edit.scale(site, 1 + by, heads=[(0, head)])]).logits[..., 3].sum()
            for by in (step, -step)
        )
        quotient = float(up - down) / (2 * step)
        assert float(along[head]) == pytest.approx(quotient, rel=2e-2, abs=1e-3)
