"""Several residual streams: sites show them one after the other, and what is mixed into them is found."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from circuits.heads.evidence import Evidence, evidence_patterns
from interp.errors import Refused
from interp.models.block_map import BlockMap
from interp.models.draft import Draft
from interp.models.layout import PLAIN, STREAMS, axes_of, held, shown
from interp.models.mixed import mixed_blocks
from interp.models.model import Model
from interp.models.recording import record
from interp.models.relative import relative_error
from interp.models.stack import layers_of
from interp.models.written import combined
from interp.run.batch import Batch
from interp.run.edits import Edit
from interp.run.statistics import Expected
from tests.families import FAMILIES

IDS = torch.randint(10, 97, (2, 9), generator=torch.Generator().manual_seed(1))
NAMES = [name for name, family in FAMILIES.items() if "several streams" in family.traits]
WIDTH, N = 32, 3
ROUNDING = 1e-5
"""A few float32 roundings, three blocks deep; another stream or module would be off by order one."""


@cache
def model_of(name: str) -> Model:
    return Model(FAMILIES[name](), id=name)


def stream_of(x: Tensor, i: int, name: str) -> Tensor:
    """One stream of a hidden state as the model holds it, [batch pos width]."""
    if name == "qwen4_exp":  # the streams one after the other in the last axis
        return x[..., WIDTH * i : WIDTH * (i + 1)]
    return x[i] if name == "gemma3n" else x[:, :, i]


def read_by(model: Model, layer: int) -> Tensor:
    """What a block is called with in a plain forward, seen by a plain hook."""
    kept = []
    hook = model.blocks[layer].register_forward_pre_hook(
        lambda module, args, kwargs: kept.append((*args, *kwargs.values())[0].clone()),
        with_kwargs=True,
    )
    with torch.no_grad():
        model.module(IDS, use_cache=False)
    hook.remove()
    return kept[0]


def test_all_layouts_are_tested() -> None:
    assert {model_of(name).spec.hidden_axes for name in NAMES} == {*STREAMS, PLAIN}


@pytest.mark.parametrize("name", NAMES)
def test_resid_pre_is_what_the_block_reads_one_stream_after_the_other(name: str) -> None:
    model = model_of(name)
    assert (model.spec.n_streams, model.spec.d_model) == (N, N * WIDTH)
    resid = model.run(IDS, capture=["resid_pre", "resid_post"]).cache
    for layer in range(model.n_layers):
        raw = read_by(model, layer)
        assert len(raw.shape) == len(model.spec.hidden_axes)
        for i in range(N):
            mine = resid[f"resid_pre.{layer}"][..., WIDTH * i : WIDTH * (i + 1)]
            assert torch.equal(mine, stream_of(raw, i, name))
        if layer:
            assert torch.equal(resid[f"resid_pre.{layer}"], resid[f"resid_post.{layer - 1}"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("site", ["resid_pre.1", "resid_post.1"])
def test_an_edit_that_returns_what_it_was_given_changes_no_bit(name: str, site: str) -> None:
    model = model_of(name)
    same = Edit.apply(site, lambda x, seen: x.clone())
    assert torch.equal(model.run(IDS, edits=[same]).logits, model.run(IDS).logits)


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_of_one_stream_is_that_stream_changed(name: str) -> None:
    model, columns = model_of(name), slice(WIDTH, 2 * WIDTH)

    def without(x: Tensor, seen: object) -> Tensor:
        x = x.clone()
        x[..., columns] = 0
        return x

    def zero(module: nn.Module, args: tuple, output: object) -> object:
        first = output[0] if isinstance(output, tuple) else output
        stream_of(first, 1, name).zero_()
        return output

    edited = model.run(IDS, edits=[Edit.apply("resid_post.0", without)]).logits
    hook = model.blocks[0].register_forward_hook(zero)
    with torch.no_grad():
        wanted = model.module(IDS, use_cache=False).logits
    hook.remove()
    assert torch.equal(edited, wanted)
    assert not torch.equal(edited, model.run(IDS).logits)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_is_that_of_the_stream(name: str) -> None:
    model = model_of(name)
    run = model.run(IDS, capture=["resid_post.0"], grad=True)
    gradient = run.gradients(run.logits[0, -1, 5], "resid_post.0")
    kept = []
    hook = model.blocks[0].register_forward_hook(
        lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    score = model.module(IDS, use_cache=False).logits[0, -1, 5]
    hook.remove()
    (wanted,) = torch.autograd.grad(score, kept)
    assert float(wanted.abs().max()) > 0.01
    for i in range(N):
        mine = gradient[..., WIDTH * i : WIDTH * (i + 1)]
        assert torch.allclose(
            mine, stream_of(wanted, i, name), atol=ROUNDING * float(wanted.abs().max())
        )


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_unembedding_takes_vectors_of_any_leading_shape(name: str) -> None:
    model = model_of(name)
    last = model.run(IDS, capture=["resid_post.2"])
    vectors, logits = last.cache["resid_post.2"].detach(), last.logits
    assert relative_error(model.unembed(vectors), logits)[0] < ROUNDING
    assert relative_error(model.unembed(vectors[1, 3]), logits[1, 3])[0] < ROUNDING
    many = (
        vectors.flatten(0, 1).flip(0)[:, None].expand(-1, 20, -1)
    )  # more than go into one forward
    assert relative_error(model.unembed(many)[:, 7], logits.flatten(0, 1).flip(0))[0] < ROUNDING


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_sum_says_so(name: str) -> None:
    model = model_of(name)
    with pytest.raises(Refused, match="3 residual streams"):
        model.require_sum("this test")
    with pytest.raises(Refused, match=r"normed residual|no linear layer"):
        model.W_V(0)
    assert {"attn_write", "mlp_write", "resid_mid"} <= model.spec.absent
    for site in ("attn_write", "mlp_write", "resid_mid"):
        with pytest.raises(Refused, match="mixes several residual streams"):
            model.run(IDS, capture=[site])
    sizes = model.run(IDS, capture=["attn_out", "mlp_out"]).cache
    assert sizes["attn_out.0"].shape == sizes["mlp_out.0"].shape == (2, 9, WIDTH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_16_bits_find_the_same_modules(name: str, dtype: torch.dtype) -> None:
    """A rounding of the stream may be larger than what an MLP writes: still nothing else is taken for it."""
    model = Model(FAMILIES[name]().to(dtype), id=name)
    assert not set(model.spec.refused) - model.spec.absent
    for mine, wide in zip(model.spec.blocks, model_of(name).spec.blocks, strict=True):
        assert (mine.mlp_out, mine.attn_out) == (wide.mlp_out, wide.attn_out)


def test_keys_that_are_no_positions_come_behind_them() -> None:
    """Where a model makes one key of several positions: patterns have them, statistics and pages do not."""
    model = model_of("deepseek_v4")
    batch = Batch.of_ids(IDS)
    here = torch.arange(9).expand(2, -1)
    wanted = {"where": Expected(here.float(), torch.ones(2, 9, dtype=torch.bool))}
    run = model.run(batch, capture=["pattern"], statistics=wanted)
    pattern = run.cache["pattern.1"]
    assert pattern.shape == (2, 4, 9, 11)
    assert model.spec.causal and (pattern[..., 9:] > 0).any()
    by_hand = (pattern[..., :9] * here[:, None, None]).sum(-1).mean(-1)
    assert torch.allclose(run.statistics["where"][:, 1].float(), by_hand, rtol=ROUNDING)
    (shown_there,) = evidence_patterns(model, [Evidence("", Batch.of_ids(IDS[:1]), ["a"] * 9)])
    assert shown_there.shape == (model.n_layers, 4, 9, 9)


# --- what is mixed in, on a block made by hand ------------------------------------------------------


class Mixing(nn.Module):
    """Streams with weights that depend on the token, an MLP, a low-rank branch, and a decoy."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH))
        self.decoy = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.ReLU(), nn.Linear(48, WIDTH))
        self.gate = nn.Linear(WIDTH, N * N + 2 * N)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        collapsed = x.mean(2)
        weights = torch.tanh(self.gate(collapsed)).unflatten(-1, (N, N + 2))
        mixed = weights[..., :N] @ x
        mixed = mixed + weights[..., N:-1] * self.low(collapsed).unsqueeze(2)
        out = self.mlp(collapsed + 0 * self.decoy(collapsed))
        mixed = mixed + weights[..., -1:] * out.unsqueeze(2)
        return mixed + out.sin().unsqueeze(2) if self.hidden else mixed


class Net(nn.Module):
    main_input_name = "input_ids"

    def __init__(self, hidden: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, WIDTH)
        self.layers = nn.ModuleList([Mixing(hidden), Mixing(hidden)])

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embed(input_ids).unsqueeze(2).expand(-1, -1, N, -1)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(last_hidden_state=x)


@torch.no_grad()
def found_in(module: nn.Module) -> tuple[list[BlockMap], dict[str, str], float]:
    torch.manual_seed(0)
    batch = Batch.of_ids(IDS[:, :7])
    seen = record(module, batch)
    layers = layers_of(seen, "layers", STREAMS[0])
    refused: dict[str, str] = {}
    plain = [BlockMap(layer.name) for layer in layers]
    blocks = mixed_blocks(Draft(seen, batch, 0, layers, plain, refused))
    error, _ = relative_error(combined(layers[1], 0, blocks[1].mixed), layers[1].output)
    return blocks, refused, error


def test_the_modules_that_are_mixed_in_are_found_and_the_decoy_is_not() -> None:
    torch.manual_seed(0)
    blocks, refused, error = found_in(Net())
    for layer, block in enumerate(blocks):
        assert {name.removeprefix(f"layers.{layer}.")[:3] for name in block.mixed} == {"low", "mlp"}
    assert not refused
    assert error < ROUNDING


def test_a_part_that_no_module_returns_is_not_explained() -> None:
    torch.manual_seed(0)
    blocks, refused, error = found_in(Net(hidden=True))
    assert "residual streams" in refused["mlp_out"]
    assert not any(block.mixed for block in blocks)
    assert error > 0.01


# --- layouts --------------------------------------------------------------------------------------


def test_layouts_are_told_by_the_batch() -> None:
    batch = Batch.of_ids(IDS)
    assert axes_of(torch.Size([2, 9, 3, 8]), batch) == STREAMS[0]
    assert axes_of(torch.Size([3, 2, 9, 8]), batch) == STREAMS[1]
    assert axes_of(torch.Size([2, 3, 9, 8]), batch) is None
    assert axes_of(torch.Size([2, 9, 8]), batch) == ("batch", "pos", "d_model")


@pytest.mark.parametrize("axes", STREAMS)
def test_what_is_held_is_the_inverse_of_what_is_shown(axes: tuple[str, ...]) -> None:
    sizes = {"batch": 2, "pos": 5, "n_streams": 3, "d_model": 4}
    x = torch.randn([sizes[axis] for axis in axes])
    assert shown(x, axes, 2).shape == (2, 5, 12)
    assert torch.equal(held(shown(x, axes, 2), axes, x.shape), x)
