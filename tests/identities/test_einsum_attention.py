"""Attention written as einsum (XLNet, Funnel), against the models' own patterns and their own code changed.

Tolerance: float32, three blocks deep. XLNet adds a bias to its queries before each of two products, and
holds positions before rows of the batch; Funnel pools queries in the first block of a stage.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.model import Model
from interp.models.tape import Tape
from interp.run.batch import Batch
from interp.run.edits import Edit
from tests.families import FAMILIES

ROUNDING = 1e-5
NAMES = ("xlnet", "funnel")
every = pytest.mark.parametrize("name", NAMES)


@cache
def model_of(name: str) -> Model:
    return Model(FAMILIES[name](), id=name)


def ids(n: int = 2, length: int = 8) -> Tensor:
    return torch.randint(10, 97, (n, length), generator=torch.Generator().manual_seed(n))


def off(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


@every
@pytest.mark.parametrize("shape", [(2, 8), (8, 8), (5, 4)])  # as many rows as positions, too
def test_patterns_are_those_of_hugging_face(name: str, shape: tuple[int, int]) -> None:
    model, batch = model_of(name), ids(*shape)
    run = model.run(batch, capture=["pattern"])
    with torch.no_grad():
        theirs = model.module(batch, output_attentions=True)
    assert off(run.logits, theirs.logits) < ROUNDING
    for got, wanted in zip(run.cache.by_layer("pattern").values(), theirs.attentions, strict=True):
        assert off(got, wanted) < ROUNDING


@every
def test_every_row_is_as_it_is_alone(name: str) -> None:
    model, batch = model_of(name), ids(3)
    sites = ["resid_pre", "resid_post", "q", "k", "v", "pattern", "z"]
    joint = model.run(batch, capture=sites)
    for row in range(3):
        alone = model.run(batch[row : row + 1], capture=sites)
        assert off(joint.logits[row], alone.logits[0]) < ROUNDING
        for site in sites:
            for layer, x in alone.cache.by_layer(site).items():
                assert off(joint.cache[f"{site}.{layer}"][row], x[0]) < ROUNDING, site


def test_rows_of_different_lengths_are_as_they_are_alone() -> None:
    """XLNet, padded right: the same logits, patterns and z at real positions."""
    model, batch = model_of("xlnet"), ids(3)
    mask = torch.arange(8) < torch.tensor([[8], [3], [5]])
    sites = ["pattern", "z", "resid_post"]
    padded = model.run(Batch.of_ids(batch, mask), capture=sites)
    for row, length in enumerate((8, 3, 5)):
        alone = model.run(batch[row : row + 1, :length], capture=sites)
        assert off(padded.logits[row, :length], alone.logits[0]) < ROUNDING
        for layer in range(3):
            for site in ("z", "resid_post"):
                got = padded.cache[f"{site}.{layer}"][row, :length]
                assert off(got, alone.cache[f"{site}.{layer}"][0]) < ROUNDING
            pattern = padded.cache[f"pattern.{layer}"][row, :, :length]
            assert off(pattern[..., :length], alone.cache[f"pattern.{layer}"][0]) < ROUNDING
            assert not pattern[..., length:].any()


@pytest.mark.parametrize("site", ["q", "k", "v", "z", "pattern", "scores"])
def test_an_edit_is_the_model_s_own_code_changed(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 1, head 2, position 3 in XLNet's layer 1 (q, k, v are [pos batch head d_head] there)."""
    model, batch = model_of("xlnet"), ids(4, 6)
    attention: Any = model.module.transformer.layer[1].rel_attn
    clean = model.run(batch, capture=[f"{site}.1"])
    core = attention.rel_attn_core

    def other(q: Tensor, k: Tensor, v: Tensor, *args: Any, **named: Any) -> Any:
        parts = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
        if site in parts:
            shown = clean.cache[f"{site}.1"].transpose(0, 1)
            assert torch.equal(parts[site], shown)
            parts[site][3, 1, 2] = 0
        named["output_attentions"] = True
        z, pattern = core(parts["q"], parts["k"], parts["v"], *args, **named)
        if site == "pattern":
            pattern = pattern.clone()
            pattern[3, :, 1, 2] = 0
            z = torch.einsum("ijbn,jbnd->ibnd", pattern, parts["v"])
        if site == "scores":  # all alike at this query
            pattern = pattern.clone()
            pattern[3, :, 1, 2] = 1 / 6
            z = torch.einsum("ijbn,jbnd->ibnd", pattern, parts["v"])
        if site == "z":
            z = z.clone()
            z[3, 1, 2] = 0
        return z

    edit = Edit.zero(f"{site}.1.2", positions=[3]).on_rows(slice(1, 2))
    got = model.run(batch, edits=[edit]).logits
    monkeypatch.setattr(attention, "rel_attn_core", other)
    with torch.no_grad():
        wanted = model.module(batch).logits
    assert off(got, wanted) < ROUNDING < off(wanted, clean.logits)
    assert torch.equal(got[0], clean.logits[0])


@pytest.mark.parametrize("length", [8, 32])  # as many keys as the stream is wide, too
def test_the_heads_that_xlnet_adds_up_are_its_attention_output(length: int) -> None:
    """Its projection is a parameter: what returns attn_out is a dropout, called on the pattern before."""
    model, batch = model_of("xlnet"), ids(length=length)
    assert {min(block.repeated) for block in model.spec.blocks} == {
        f"transformer.layer.{layer}.rel_attn.dropout" for layer in range(3)
    }
    sites = ["z", "attn_out", "attn_write", "resid_pre", "resid_mid", "mlp_write", "resid_post"]
    cache = model.run(batch, capture=sites).cache
    for layer, block in enumerate(model.blocks):
        attention: Any = block.rel_attn
        heads = torch.einsum("bpnd,hnd->bph", cache[f"z.{layer}"], attention.o)
        assert off(heads, cache[f"attn_out.{layer}"]) < ROUNDING
        assert torch.equal(cache[f"attn_out.{layer}"], cache[f"attn_write.{layer}"])
        mid = attention.layer_norm(cache[f"resid_pre.{layer}"] + heads)
        assert off(mid, cache[f"resid_mid.{layer}"]) < ROUNDING
        post = block.ff.layer_norm(mid + cache[f"mlp_write.{layer}"])
        assert off(post, cache[f"resid_post.{layer}"]) < ROUNDING
    with pytest.raises(Refused, match="no attention output projection"):
        model.W_O(0)


def test_an_edit_of_what_xlnet_s_attention_writes_is_its_own_code_changed() -> None:
    model, batch = model_of("xlnet"), ids(4, 6)
    attention: Any = model.module.transformer.layer[1].rel_attn
    projection = attention.o.detach().clone()
    with torch.no_grad():
        attention.o.mul_(0.3)
        wanted = model.module(batch).logits
        attention.o.copy_(projection)
    for site in ("attn_out.1", "attn_write.1", "z.1"):
        got = model.run(batch, edits=[Edit.scale(site, 0.3)]).logits
        assert off(got, wanted) < ROUNDING < off(got, model.run(batch).logits)


def test_a_stream_read_again_behind_its_stage_is_told() -> None:
    """Funnel's last blocks read the first stage's stream besides: a replay runs every block."""
    spec = model_of("funnel").spec
    assert "read by more than the block after them" in spec.bypassed and not spec.chained


@pytest.mark.parametrize(
    "equation", ["bnij,jbnd->ibnd", "ibnd,jbnd->bnij", "bind,bjnd->bnij", "bnij,bjnd->bind"]
)
def test_an_einsum_is_seen_as_the_product_that_it_is(equation: str) -> None:
    sizes = {"b": 2, "n": 3, "i": 5, "j": 4, "d": 6}
    inputs, out = equation.split("->")
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn([sizes[axis] for axis in axes], generator=generator)
        for axes in inputs.split(",")
    )
    seen: list[str] = []

    def attended(tape: Tape, name: str, function: Any, args: tuple, kwargs: dict) -> Any:
        seen.append(name)
        return function(*args, **kwargs)

    with Tape(attended):
        made = torch.einsum(equation, x, y)
    wanted = torch.einsum(equation, x, y)
    assert made.shape == tuple(sizes[axis] for axis in out)
    assert off(made, wanted) < ROUNDING
    assert any("matmul" in name for name in seen) and "einsum" not in seen


def test_what_is_no_such_product_stays_an_einsum() -> None:
    seen: list[str] = []

    def attended(tape: Tape, name: str, function: Any, args: tuple, kwargs: dict) -> Any:
        seen.append(name)
        return function(*args, **kwargs)

    linear = nn.Parameter(torch.ones(6, 3, 4))
    with Tape(attended):
        torch.einsum("ibnd,hnd->ibh", torch.ones(5, 2, 3, 4), linear)
        torch.einsum("bnij->ijbn", torch.ones(2, 3, 5, 5))
    assert seen.count("einsum") == 2
