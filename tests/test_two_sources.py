"""Blocks that attend to two sources: SAM 3's decoder, whose queries attend to the text and then to the image."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.sam3.configuration_sam3 import Sam3DETRDecoderConfig
from transformers.models.sam3.modeling_sam3 import Sam3Attention

from benchmarks.architectures import runs
from benchmarks.tiny_configs import tiny_model
from interp.errors import BadInput, Refused
from interp.models.attention import implementation
from interp.models.find_stack import SeveralStacks
from interp.models.model import Model
from interp.run.edits import Edit
from interp.sites import AXES, CROSS_SITES

STACK = "detr_decoder.layers"
MODULES = {"": "self_attn", "cross_": "text_cross_attn", "cross2_": "vision_cross_attn"}
"""Where the sites of a block of the decoder are, by their prefix."""
SUFFIXES = ("q", "k", "v", "z", "scores", "pattern")
ROUNDING = 1e-9
"""float64, three blocks deep: the model looks at boxes that it refines, and makes much of a rounding of float32."""
N_TEXT = 7


def off(got: Tensor | None, wanted: Tensor | None) -> float:
    assert got is not None and wanted is not None and got.shape == wanted.shape
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


@cache
def sam3() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        module = tiny_model("sam3", "Sam3Model", runs).double()
    assert sum(x.numel() for x in module.parameters()) < 2_000_000
    return module


@cache
def decoder() -> Model:
    return Model(sam3(), id="sam3", stack=STACK)


def inputs(seed: int = 0) -> dict[str, Tensor]:
    config: Any = sam3().config
    side = config.vision_config.backbone_config.image_size
    pixels = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 90, (2, N_TEXT), generator=torch.Generator().manual_seed(1))
    return {
        "pixel_values": torch.randn(2, 3, side, side, generator=pixels).double(),
        "input_ids": ids,
    }


def ends(given: dict[str, Tensor]) -> Tensor:
    """What the last block of the decoder returns in a plain forward."""
    kept: list[Tensor] = []
    last = sam3().get_submodule(f"{STACK}.2")

    def keep(module: nn.Module, args: tuple, out: Tensor) -> None:
        kept.append(out)

    hook = last.register_forward_hook(keep)
    with torch.no_grad():
        sam3()(**given)
    hook.remove()
    return kept[0]


def everything(model: Model) -> list[str]:
    return [site for site in AXES if model.layers_with(site)]


def test_no_stack_is_the_models_own_and_the_decoder_verifies_by_name() -> None:
    with pytest.raises(SeveralStacks) as told:
        Model(sam3(), id="sam3")
    assert len(told.value.parts) == 4 and told.value.parts[STACK] == ""
    model = decoder()
    assert not model.spec.refused and model.n_layers == 3
    names = {check.name for check in model.spec.checks if check.passed}
    assert {"window", "stack", "heads", "cross heads", "cross2 heads", "writes"} <= names
    for block in model.spec.blocks:
        found = [block.attention, *(cross.attention for cross in block.crosses)]
        assert found == [f"{block.name}.{name}" for name in MODULES.values()]
        assert len(block.firsts) == 2 and not block.others and not block.lates


def test_looking_at_everything_changes_nothing() -> None:
    model, given = decoder(), inputs()
    run = model.run(given, capture=everything(model))
    assert set(CROSS_SITES) <= set(run.cache)
    assert off(run.cache["resid_post.2"], ends(given)) < ROUNDING
    same = [Edit.apply(site, lambda x, seen: x) for site in everything(model)]
    again = model.run(given, edits=same, capture=["resid_post.2"])
    assert off(again.cache["resid_post.2"], ends(given)) < ROUNDING


def test_patterns_are_those_that_each_attention_returns() -> None:
    model, given = decoder(), inputs()
    run = model.run(given, capture=[f"{of}pattern" for of in MODULES])
    kept: dict[str, Tensor] = {}

    def keep(at: str, module: nn.Module, args: tuple, out: tuple[Tensor, Tensor]) -> None:
        kept[at] = out[1]

    hooks = [
        sam3()
        .get_submodule(f"{STACK}.{layer}.{name}")
        .register_forward_hook(partial(keep, f"{of}pattern.{layer}"))
        for layer in range(3)
        for of, name in MODULES.items()
    ]
    with torch.no_grad(), implementation(sam3(), "eager"):
        sam3()(**given)
    for hook in hooks:
        hook.remove()
    assert len(kept) == 9 and len({x.shape for x in kept.values()}) == 3
    for at, wanted in kept.items():
        assert off(run.cache[at], wanted) < 1e-3  # eager attention has its softmax in float32


def test_each_source_is_shown_at_its_own_sites() -> None:
    """The text is made of the tokens alone: another image changes what cross2_ reads, and nothing that cross_ does."""
    model = decoder()
    sites = ["cross_k", "cross_v", "cross2_k", "cross2_v"]
    one, other = (model.run(inputs(seed), capture=sites).cache for seed in (0, 1))
    for layer in range(3):
        for which in ("k", "v"):
            text, image = f"cross_{which}.{layer}", f"cross2_{which}.{layer}"
            assert one[text].shape[1] == N_TEXT and torch.equal(one[text], other[text])
            assert one[image].shape[1] == 16 and off(one[image], other[image]) > 0.01


@torch.no_grad()
def test_heads_and_writes_add_up() -> None:
    model = decoder()
    cache = model.run(inputs(), capture=everything(model)).cache
    for layer, block in enumerate(model.spec.blocks):
        at = {site: cache[f"{site}.{layer}"] for site in cache if site != "embed"}
        for number, of in enumerate(MODULES):
            mixed = torch.einsum("bhqk,bkhd->bqhd", at[f"{of}pattern"], at[f"{of}v"])
            assert off(mixed, at[f"{of}z"]) < ROUNDING
            heads = torch.einsum("bphd,hdm->bpm", mixed, model.W_O(layer, cross=number))
            out = at[f"{of}out" if of else "attn_out"]
            assert off(heads + model.b_O(layer, cross=number), out) < ROUNDING
        x = at["resid_pre"]
        norms = [first.norm for first in block.firsts] + [block.norm_mid]
        for write, norm in zip(("attn_write", "cross_write", "cross2_write"), norms, strict=True):
            x = model.module.get_submodule(norm or "")(x + at[write])
        assert off(x, at["resid_mid"]) < ROUNDING
        x = model.module.get_submodule(block.norm_post or "")(x + at["mlp_write"])
        assert off(x, at["resid_post"]) < ROUNDING


@pytest.mark.parametrize("of", MODULES)
def test_a_head_without_output_is_a_plain_forward_without_it(of: str) -> None:
    model, given = decoder(), inputs()
    d_head = model.spec.d_head

    def without(module: nn.Module, args: tuple) -> tuple:
        x = args[0].clone()
        x[..., 2 * d_head : 3 * d_head] = 0
        return (x,)

    o_proj = sam3().get_submodule(f"{STACK}.1.{MODULES[of]}.o_proj")
    hook = o_proj.register_forward_pre_hook(without)
    wanted = ends(given)
    hook.remove()
    edit = Edit.zero(f"{of}z", heads=[(1, 2)])
    got = model.run(given, edits=[edit], capture=["resid_post.2"]).cache["resid_post.2"]
    assert off(got, wanted) < ROUNDING < off(got, ends(given)) / 10
    clean = model.run(given, capture=["resid_pre"])
    variants = model.replay(
        clean, [[edit], []], lambda run: run.cache["resid_post.2"], capture=["resid_post"]
    )
    assert off(variants[0], wanted) < ROUNDING and off(variants[1], ends(given)) < ROUNDING


@pytest.mark.parametrize(
    ("site", "place"),
    [
        ("cross2_write.1", "vision_cross_attn_dropout"),
        ("cross_out.1", "text_cross_attn.o_proj"),
        ("resid_mid.1", "vision_cross_attn_layer_norm"),
    ],
)
def test_an_edit_of_what_is_written_is_a_hook_there(site: str, place: str) -> None:
    model, given = decoder(), inputs()
    change = torch.randn(64, generator=torch.Generator().manual_seed(2)).double()
    module = sam3().get_submodule(f"{STACK}.1.{place}")

    def add(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        return out + change

    hook = module.register_forward_hook(add)
    wanted = ends(given)
    hook.remove()
    run = model.run(given, edits=[Edit.add(site, change)], capture=["resid_post.2"])
    assert off(run.cache["resid_post.2"], wanted) < ROUNDING < off(wanted, ends(given)) / 10


def test_a_source_that_there_is_not_is_refused() -> None:
    with pytest.raises(BadInput, match=r"cross=3: a block attends to a first source \(1\)"):
        decoder().W_O(0, cross=3)
    with pytest.raises(Refused, match="no block attends to a second source"):
        opened(1).run(IDS, capture=["cross2_z"])


# --- blocks made by hand --------------------------------------------------------------------------

IDS = torch.randint(10, 97, (2, N_TEXT), generator=torch.Generator().manual_seed(1))
CONFIG = Sam3DETRDecoderConfig(hidden_size=32, num_attention_heads=4, intermediate_size=48)
ARGUMENTS = ("first", "second", "third")
Given = Callable[[int], dict[str, int]]


class Block(nn.Module):
    """Attention to itself, to each source one after the other, and an MLP; each added to the stream."""

    def __init__(self, n_sources: int) -> None:
        super().__init__()
        self.itself = Sam3Attention(CONFIG)
        for name in ARGUMENTS[:n_sources]:
            self.add_module(f"to_{name}", Sam3Attention(CONFIG))
        self.norms = nn.ModuleDict(
            {name: nn.LayerNorm(32) for name in ("itself", *ARGUMENTS[:n_sources], "mlp")}
        )
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor, **sources: Tensor) -> Tensor:
        y = self.norms["itself"](x)
        x = x + self.itself(y, y, y)[0]
        for name, source in sources.items():
            y = self.norms[name](x)
            x = x + self.get_submodule(f"to_{name}")(y, source, source)[0]
        return x + self.down(self.up(self.norms["mlp"](x)).relu())


class Net(nn.Module):
    """Blocks whose sources are tables; `given` says which table a layer gets in which argument."""

    main_input_name = "input_ids"

    def __init__(self, lengths: tuple[int, ...], given: Given) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 32)
        self.tables = nn.ParameterList([nn.Parameter(torch.randn(1, n, 32)) for n in lengths])
        self.layers = nn.ModuleList([Block(len(lengths)) for _ in range(2)])
        self.config, self.given = CONFIG, given

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        x = self.embed(input_ids)
        for number, layer in enumerate(self.layers):
            sources = self.given(number).items()
            x = layer(x, **{name: self.tables[i].expand(len(x), -1, -1) for name, i in sources})
        return SimpleNamespace(last_hidden_state=x)


def opened(
    n_sources: int, given: Given | None = None, lengths: tuple[int, ...] = (9, 5, 6)
) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        in_order = lambda layer: {name: i for i, name in enumerate(ARGUMENTS[:n_sources])}  # noqa: E731
        module = Net(lengths[:n_sources], given or in_order).double().eval()
    CONFIG.vocab_size = 97
    return Model(module, id="net")


@pytest.mark.parametrize("lengths", [(9, 5), (N_TEXT, 5), (N_TEXT, N_TEXT)])
def test_a_source_as_long_as_the_stream_is_told_from_it(lengths: tuple[int, ...]) -> None:
    model = opened(2, lengths=lengths)
    assert not set(model.spec.refused) - model.spec.absent
    run = model.run(IDS, capture=["z", "cross_v", "cross2_v", "cross_write", "cross2_write"])
    assert run.cache["z"].shape[3] == 4
    for layer, block in enumerate(model.blocks):
        for of, name, table in (("cross_", "first", 0), ("cross2_", "second", 1)):
            attention: Any = block.get_submodule(f"to_{name}")
            source = attention.v_proj(model.module.tables[table])  # type: ignore[index]
            values = run.cache[f"{of}v.{layer}"]
            assert off(values.flatten(-2), source.expand(2, -1, -1)) < ROUNDING
            assert model.spec.blocks[layer].others == ()


@pytest.mark.parametrize(
    "given",
    [
        lambda layer: {"first": 0, "second": 1} if layer else {"second": 1, "first": 0},
        lambda layer: {"first": 0, "second": 1} if layer else {"first": 1, "second": 0},
    ],
)
def test_sources_in_another_order_are_refused(given: Given) -> None:
    """By the calls, or by what is given in an argument: a site would show the first source here, the other there."""
    model = opened(2, given)
    with pytest.raises(Refused, match="not to the same ones in the same order"):
        model.run(IDS, capture=["cross_pattern"])
    assert set(CROSS_SITES) <= set(model.spec.refused)


def test_more_sources_than_there_are_sites_for_are_refused() -> None:
    model = opened(3)
    assert {"z", "pattern", "attn_write"} <= set(model.spec.refused)
    with pytest.raises(Refused, match="attends 4 times"):
        model.run(IDS, capture=["cross_pattern"])
