"""Blocks of two streams whose attention modules serve both: the calls for the other stream are at no site.

LiLT's attention mixes words, and then boxes, with patterns of their own that it makes of both. LXMERT's attention
between words and objects is one module, called for the words and then for the objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.block_map import Aside
from interp.models.model import Model
from interp.run.edits import Edit

ROUNDING = 1e-5
"""A few float32 roundings, two blocks deep."""
MOVED = 1e-3
"""A hundred times that: an effect, and no rounding."""
COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
KINDS = {
    "lilt": (
        transformers.LiltModel,
        transformers.LiltConfig(**COMMON, num_hidden_layers=2, channel_shrink_ratio=2),
    ),
    "lxmert": (
        transformers.LxmertModel,
        transformers.LxmertConfig(
            **COMMON, l_layers=1, r_layers=1, x_layers=2, visual_feat_dim=16, visual_pos_dim=4
        ),
    ),
}
every = pytest.mark.parametrize("kind", KINDS)


def off(got: Tensor | None, wanted: Tensor) -> float:
    assert got is not None and got.shape == wanted.shape
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


@cache
def opened(kind: str) -> Model:
    made, config = KINDS[kind]
    torch.manual_seed(0)
    module: Any = made(config).eval()
    assert sum(parameter.numel() for parameter in module.parameters()) < 500_000
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.15) * torch.randn_like(parameter))
    return Model(module, id=kind)


def inputs(kind: str, n_objects: int = 5) -> dict[str, Tensor]:
    """Two rows of seven words, each in a box, or beside so many objects."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (2, 7), generator=generator)
    if kind == "lilt":
        corners = torch.randint(0, 500, (2, 7, 4), generator=generator)
        corners[..., 2:] += corners[..., :2]
        return {"input_ids": ids, "bbox": corners}
    of_objects = {"visual_feats": 16, "visual_pos": 4}
    return {"input_ids": ids} | {
        name: torch.randn(2, n_objects, width, generator=generator)
        for name, width in of_objects.items()
    }


def plain(kind: str, given: dict[str, Tensor]) -> list[Tensor]:
    """The last words, and with LXMERT the last objects, of a plain forward."""
    with torch.no_grad():
        out = opened(kind).module(**given)
    return [out[0]] if kind == "lilt" else [out.language_output, out.vision_output]


def part(kind: str, layer: int, name: str) -> nn.Module:
    """The attention module of "z" or "cross_z", or what comes after it in the block."""
    block: Any = opened(kind).blocks[layer]
    if kind == "lilt":
        return {"z": block.attention.self, "W_O": block.attention.output.dense}[name]
    of_self, of_both = block.lang_self_att, block.visual_attention
    return {
        "z": of_self.self,
        "W_O": of_self.output.dense,
        "cross_z": of_both.att,
        "cross_W_O": of_both.output.dense,
    }[name]


@contextmanager
def first_calls(*parts: nn.Module) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """What each of these modules was given and returned first."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack:
        for each in parts:
            hook = each.register_forward_hook(
                lambda module, args, out: seen.setdefault(module, (args[0], out)) and None
            )
            stack.callback(hook.remove)
        yield seen


@every
def test_calls_for_the_other_stream_are_told_apart(kind: str) -> None:
    model = opened(kind)
    assert not set(model.spec.refused) - model.spec.absent
    for layer, block in enumerate(model.spec.blocks):
        if kind == "lilt":
            name = f"encoder.layer.{layer}.attention.self"
            assert block.attention == name and block.asides == (Aside(name, 0),)
            assert not block.crosses and block.d_head == 12
        else:
            name = f"encoder.x_layers.{layer}"
            both = f"{name}.visual_attention.att"
            assert block.attention == f"{name}.lang_self_att.self" and block.cross
            assert block.cross.attention == both
            assert block.asides == (Aside(both, 1), Aside(f"{name}.visn_self_att.self"))
    assert any("another stream" in note for note in model.notes)


def test_lilt_shows_the_softmax_of_the_words() -> None:
    """Whose scores are made of words and of boxes: q and k alone do not make them."""
    model, given = opened("lilt"), inputs("lilt")
    sites = ["q", "k", "v", "scores", "pattern", "z", "attn_out"]
    cache = model.run(given, capture=sites).cache
    for layer in range(model.n_layers):
        attention: Any = part("lilt", layer, "z")
        names = ("query", "key", "value", "layout_query", "layout_key")
        parts = [getattr(attention, name) for name in names]
        with first_calls(*parts, part("lilt", layer, "W_O")) as seen, torch.no_grad():
            own = model.module(**given, output_attentions=True).attentions[layer]
        q, k, v, box_q, box_k = (seen[each][1].unflatten(-1, (4, -1)) for each in parts)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        boxes = torch.einsum("bqhd,bkhd->bhqk", box_q, box_k) / box_q.shape[-1] ** 0.5
        at = {name: cache[f"{name}.{layer}"] for name in sites}
        assert off(at["pattern"], own) < ROUNDING
        assert off(at["scores"], scores + boxes) < ROUNDING
        assert off(at["scores"], scores) > MOVED
        for name, wanted in (("q", q), ("k", k), ("v", v)):
            assert off(at[name], wanted) < ROUNDING
        assert off(at["z"], torch.einsum("bhqk,bkhd->bqhd", own, v)) < ROUNDING
        read, made = seen[part("lilt", layer, "W_O")]
        assert off(at["z"].flatten(2), read) < ROUNDING and off(at["attn_out"], made) < ROUNDING


def test_lxmert_shows_both_attentions_of_the_words() -> None:
    model, given = opened("lxmert"), inputs("lxmert")
    sites = ["pattern", "z", "attn_out", "cross_pattern", "cross_z", "cross_out"]
    cache = model.run(given, capture=sites).cache
    for layer in range(model.n_layers):
        for prefix in ("", "cross_"):
            attention: Any = part("lxmert", layer, f"{prefix}z")
            W_O = part("lxmert", layer, f"{prefix}W_O")
            parts = [attention.query, attention.key, attention.value]
            with first_calls(*parts, W_O) as seen:
                plain("lxmert", given)
            q, k, v = (seen[each][1].unflatten(-1, (4, -1)) for each in parts)
            assert k.shape[1] == (5 if prefix else 7)
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
            at = (
                {name: cache[f"{prefix}{name}.{layer}"] for name in ("pattern", "z", "out")}
                if (prefix)
                else {
                    "pattern": cache[f"pattern.{layer}"],
                    "z": cache[f"z.{layer}"],
                    "out": cache[f"attn_out.{layer}"],
                }
            )
            assert off(at["pattern"], scores.softmax(-1)) < ROUNDING
            assert off(at["z"], torch.einsum("bhqk,bkhd->bqhd", at["pattern"], v)) < ROUNDING
            read, made = seen[W_O]
            assert off(at["z"].flatten(2), read) < ROUNDING and off(at["out"], made) < ROUNDING


@contextmanager
def head_without(W_O: nn.Module, head: int) -> Iterator[None]:
    """Inside, the first call of W_O reads zeros where this head's z is."""
    calls = 0

    def without(module: nn.Module, args: tuple) -> tuple | None:
        nonlocal calls
        calls += 1
        if calls > 1:
            return None
        z = args[0].unflatten(-1, (4, -1)).clone()
        z[..., head, :] = 0
        return (z.flatten(-2),)

    hook = W_O.register_forward_pre_hook(without)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("kind", "prefix"), [("lilt", ""), ("lxmert", ""), ("lxmert", "cross_")])
def test_a_head_taken_out_is_taken_out_for_its_stream_alone(
    kind: str, prefix: str, layer: int
) -> None:
    model, given = opened(kind), inputs(kind)
    edits = [Edit.zero(f"{prefix}z", heads=[(layer, 1)])]
    with head_without(part(kind, layer, f"{prefix}W_O"), 1):
        wanted = plain(kind, given)
    clean = plain(kind, given)
    with model.hooked(given, edits=edits):
        got = plain(kind, given)
    assert all(off(a, b) < ROUNDING for a, b in zip(got, wanted, strict=True))
    assert off(wanted[0], clean[0]) > MOVED
    assert off(model.run(given, edits=edits).logits, wanted[0]) < ROUNDING
    run = model.run(given, capture=["resid_pre"])
    (again,) = model.replay(run, [edits], lambda each: each.logits)
    assert off(again, wanted[0]) < ROUNDING


def test_a_write_is_that_of_the_words() -> None:
    model, given = opened("lxmert"), inputs("lxmert")
    run = model.run(given, edits=[Edit.zero("cross_write.0")])
    block: Any = model.blocks[0]
    calls: list[Tensor] = []

    def without(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        calls.append(out)
        return torch.zeros_like(out) if len(calls) == 1 else out

    hook = block.visual_attention.output.dropout.register_forward_hook(without)
    try:
        wanted = plain("lxmert", given)[0]
    finally:
        hook.remove()
    assert len(calls) == 2 and off(run.logits, wanted) < ROUNDING
    assert off(wanted, plain("lxmert", given)[0]) > MOVED


def test_as_many_objects_as_words_leave_writes_in_doubt_and_heads_known() -> None:
    """Which of two calls of W_O is of the words is told by their number; which of attention by their order."""
    model, given = opened("lxmert"), inputs("lxmert", n_objects=7)
    with pytest.raises(Refused, match="which call is the stream's cannot be told"):
        model.run(given, capture=["cross_write"])
    cache = model.run(given, capture=["cross_z.0"]).cache
    with first_calls(part("lxmert", 0, "cross_W_O")) as seen:
        plain("lxmert", given)
    read, _ = seen[part("lxmert", 0, "cross_W_O")]
    assert off(cache["cross_z.0"].flatten(2), read) < ROUNDING
