"""Two images of an input, whose attention goes from the one to the other: sites and edits against plain hooks.

EfficientLoFTR holds a pair as [batch, image, channels, height, width]; cells of several positions attend, first each
image to itself, then one image after the other to the other one. LightGlue's rows of cross-attention have the
queries of one image and the keys of the other. Tolerance: float64, three blocks deep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.architectures import runs
from benchmarks.tiny_configs import tiny_model
from interp.errors import BadInput, Refused
from interp.models.calls import output_tensor
from interp.models.find_placed import _parts_of
from interp.models.layout import PARTED, held, shown
from interp.models.model import Model
from interp.models.probe import probe_batch
from interp.run.edits import Edit
from interp.run.statistics import Expected
from interp.sites import AXES
from tests.identities.test_needed_inputs import check_all_sites

ROUNDING = 1e-11
HEADS = 8
"""Of each attention: the layer has those of the first, to an image's own cells, and behind them those of the second."""
SIDES = (64, 96)
CELLS = 6
"""Of an image: eight by eight pixels are a position, four by four positions a cell. Two rows of three cells."""
SOME = pytest.mark.parametrize("pairs", [1, 2])


@cache
def model_of(model_type: str, name: str) -> Model:
    module = tiny_model(model_type, name, partial(runs, kind="vision", strict=True))
    for path, part in module.named_modules():
        if path.endswith("mlp.layer_norm") and model_type == "efficientloftr":
            part.weight.data *= 100  # writes as large as the stream
    return Model(module.double(), id=name)


def close(got: Tensor, wanted: Tensor) -> bool:
    assert got.shape == wanted.shape
    return float((got - wanted).detach().abs().max()) < ROUNDING * float(wanted.abs().max())


def loftr() -> Model:
    return model_of("efficientloftr", "EfficientLoFTRModel")


def images(pairs: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(pairs)
    return {"pixel_values": torch.randn(pairs, 2, 3, *SIDES, generator=generator).double()}


@contextmanager
def seen(model: Model, calls: dict[str, list[Tensor]], **changes: Callable) -> Iterator[None]:
    """Inside, what modules of layer 1 return is kept in `calls`, in order; or changed: (number of the call, x) -> x."""
    block = model.blocks[1]
    with ExitStack() as stack:
        for name in (*calls, *changes):
            numbers = count()

            def hook(
                module: nn.Module, args: tuple, out: Any, name: str = name, numbers: Any = numbers
            ) -> Any:
                if name in calls:
                    calls[name].append(out)
                return changes[name](next(numbers), out) if name in changes else None

            part = block.get_submodule(name.replace("__", "."))
            stack.callback(part.register_forward_hook(hook).remove)
        yield


@torch.no_grad()
def plain(model: Model, given: dict[str, Tensor], *kept: str, **changes: Callable) -> Any:
    """The model's own output with these changes, and what these modules of layer 1 returned in each of their calls."""
    calls: dict[str, list[Tensor]] = {name: [] for name in kept}
    with seen(model, calls, **changes):
        out = output_tensor(model.module(**given))
    return (out, *calls.values()) if kept else out


def in_row(x: Tensor, pairs: int) -> Tensor:
    """[pairs·image height width channels] as sites show it."""
    return x.reshape(pairs, -1, x.shape[-1])


@SOME
def test_every_site_that_a_matcher_of_images_has_is_the_model_s_own(pairs: int) -> None:
    model, given = loftr(), images(pairs)
    spec = model.spec
    assert set(spec.refused) == spec.absent == {"attn_out", "attn_write"}
    assert all(check.passed for check in spec.checks)
    assert {"window", "neurons", "block writes", "writes"} <= {check.name for check in spec.checks}
    check_all_sites(model, given)
    sites = [site for site in AXES if site not in spec.refused and model.layers_with(site)]
    cache = model.run(given, capture=sites).cache
    mlp = "self_attention.mlp"
    _, mid, post, write, neurons = plain(
        model, given, "self_attention", "", mlp, f"{mlp}.activation"
    )
    turned = mid[0].permute(0, 2, 3, 1)
    assert close(cache["resid_mid.1"], in_row(turned, pairs))
    assert close(cache["resid_post.1"], in_row(post[0].permute(0, 1, 3, 4, 2), pairs))
    assert close(cache["resid_post.1"], cache["resid_pre.2"])
    assert close(cache["mlp_write.1"], in_row(write[0], pairs))
    assert close(cache["mlp_post.1"], in_row(neurons[0], pairs))


@SOME
def test_cells_of_an_image_attend_to_their_own_then_to_the_other_s(pairs: int) -> None:
    model, given = loftr(), images(pairs)
    cache = model.run(given, capture=["q", "k", "v", "scores", "pattern", "z"]).cache
    at = {name: cache[f"{name}.1"] for name in cache}
    kinds = ("self_attention", "cross_attention")
    _, own, crossed = plain(model, given, *(f"{kind}.attention.v_proj" for kind in kinds))
    assert len(crossed) == 2  # the first image asks the second, then the second the first
    v = torch.cat([in_row(own[0], pairs), torch.cat([crossed[1], crossed[0]], 1)], -1)
    assert close(at["v"], v.unflatten(-1, (2 * HEADS, -1)))
    assert at["q"].shape == at["k"].shape == at["z"].shape == (pairs, 2 * CELLS, 2 * HEADS, 4)
    assert close(torch.einsum("bhqk,bkhd->bqhd", at["pattern"], at["v"]), at["z"])
    scores = torch.einsum("bqhd,bkhd->bhqk", at["q"], at["k"]) / 2
    image = torch.arange(2 * CELLS) // CELLS
    sees = (image[:, None] == image) == (torch.arange(2 * HEADS) < HEADS)[:, None, None]
    assert close(scores[:, sees], at["scores"][:, sees])
    assert bool((at["scores"][:, ~sees] == -torch.inf).all())
    assert bool(((at["pattern"] > 0) == sees).all())


def ablated(head: int, rows: slice | None = None) -> Callable[[int, Tensor], Tensor]:
    """A change of a linear layer's output: one head's columns are zero in these rows."""

    def change(call: int, x: Tensor) -> Tensor:
        x = x.clone()
        x[slice(None) if rows is None else rows, :, 4 * head : 4 * head + 4] = 0
        return x

    return change


@SOME
@pytest.mark.parametrize("image", [0, 1])
def test_a_head_ablated_in_one_image_is_what_plain_hooks_make_of_it(pairs: int, image: int) -> None:
    model, given = loftr(), images(pairs)
    cells = list(range(image * CELLS, (image + 1) * CELLS))
    clean = plain(model, given)

    def edited(site: str, head: int) -> Tensor:
        run = model.run(given, edits=[Edit.zero(site, heads=[(1, head)], positions=cells)])
        assert not close(run.logits, clean)
        return run.logits

    def hooked(**changes: Callable) -> Tensor:
        return plain(model, given, **changes)

    own = ablated(3, slice(image, None, 2))
    assert close(edited("v", 3), hooked(self_attention__attention__v_proj=own))

    def to_other(
        call: int, x: Tensor
    ) -> Tensor:  # the values of the first image are those of the second call
        return ablated(3)(call, x) if call == 1 - image else x

    assert close(edited("v", HEADS + 3), hooked(cross_attention__attention__v_proj=to_other))

    def without_z(kind: str, calls: slice, rows: slice) -> Tensor:
        made: list[int] = []

        def hook(module: nn.Module, args: tuple) -> Any:
            made.append(1)
            return (ablated(5, rows)(0, args[0]),) if len(made) - 1 in range(2)[calls] else None

        part = model.blocks[1].get_submodule(f"{kind}.attention.o_proj")
        handle = part.register_forward_pre_hook(hook)
        try:
            return plain(model, given)
        finally:
            handle.remove()

    rows = slice(image, None, 2)
    assert close(edited("z", 5), without_z("self_attention", slice(None), rows))
    mine = slice(image, image + 1)
    assert close(edited("z", HEADS + 5), without_z("cross_attention", mine, slice(None)))


@SOME
def test_streams_and_patterns_are_edited_where_positions_say(pairs: int) -> None:
    model, given = loftr(), images(pairs)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(5)).double()
    half = SIDES[0] * SIDES[1] // 64
    place, row = half + 5, 5  # in the second image: its first row

    def moved(call: int, x: Tensor) -> Tensor:
        x = x.clone()
        x.view(pairs, 2, 32, -1)[:, 1, :, row] += vector
        return x

    def wrote(call: int, x: Tensor) -> Tensor:
        x = x.clone()
        x.view(pairs, 2, half, 32)[:, 1, row] += vector
        return x

    for site, name, change in (
        ("resid_mid", "self_attention", moved),
        ("resid_post", "", moved),
        ("mlp_write", "self_attention__mlp", wrote),
    ):
        run = model.run(given, edits=[Edit.add(f"{site}.1", vector, positions=[place])])
        assert close(run.logits, plain(model, given, **{name: change}))
    before = model.run(given, edits=[Edit.add("resid_post.0", vector, positions=[place])])
    run = model.run(given, edits=[Edit.add("resid_pre.1", vector, positions=[place])])
    assert close(run.logits, before.logits)
    # A head that looks at every cell of the other image alike returns the mean of its values.
    head = HEADS + 2
    even = torch.zeros(2 * CELLS, 2 * CELLS).double()
    even[:CELLS, CELLS:] = even[CELLS:, :CELLS] = 1 / CELLS
    edit = Edit.apply("pattern", lambda x, seen: even.expand_as(x), heads=[(1, head)])
    run = model.run(given, capture=["v", "z"], edits=[edit])
    v, z = (run.cache[f"{name}.1"][:, :, head].unflatten(1, (2, CELLS)) for name in ("v", "z"))
    assert close(z, v.flip(1).mean(2, keepdim=True).expand_as(z))
    assert not close(run.logits, plain(model, given))


def test_a_pattern_is_edited_between_parts_that_see_each_other_alone() -> None:
    model, given = loftr(), images(2)
    even = Edit.apply("pattern", lambda x, seen: torch.full_like(x, 1 / x.shape[-1]))
    with pytest.raises(
        BadInput, match=r"the edit of 'pattern\.\d' has values where queries see no"
    ):
        model.run(given, edits=[even])


def test_replays_statistics_and_gradients_of_parts() -> None:
    model, given = loftr(), images(2)
    clean = model.run(given, capture=["resid_pre", "pattern"])
    variants = [[Edit.zero("z", heads=[(layer, HEADS + 1)])] for layer in range(3)]
    runs_ = [model.run(given, edits=variant).logits for variant in variants]
    replayed = model.replay(clean, variants, lambda run: run.logits)
    assert all(close(a, b) for a, b in zip(replayed, runs_, strict=True))
    rows = torch.ones(2, 2 * CELLS, dtype=torch.bool)
    first = (torch.arange(2 * CELLS) == 0).float().expand(2, -1)
    told = model.run(given, statistics={"on_first": Expected(first, rows)}).statistics["on_first"]
    assert torch.allclose(told, clean.cache["pattern"][..., 0].mean(-1).float())
    weights = torch.randn(runs_[0].shape, generator=torch.Generator().manual_seed(7))
    for site in ("v", "z", "pattern"):
        run = model.run(given, capture=[site], grad=True)
        slope = run.gradients((run.logits * weights).sum(), f"{site}.1") * run.cache[f"{site}.1"]
        where = [0, 2, 3] if site == "pattern" else [0, 1, 3]
        step, head = 1e-3, HEADS + 1
        up, down = (
            model.run(given, edits=[Edit.scale(site, 1 + by, heads=[(1, head)])]).logits
            for by in (step, -step)
        )
        quotient = float(((up - down) * weights).sum()) / (2 * step)
        assert float(slope.detach().sum(where)[head]) == pytest.approx(quotient, rel=1e-4)


def test_an_edit_across_what_is_computed_one_after_the_other_is_refused() -> None:
    model, given = loftr(), images(1)
    mixed = Edit.apply("z", lambda x, seen: x.flip(1), heads=[(1, HEADS)])
    with pytest.raises(BadInput, match="one after the other"):
        model.run(given, edits=[mixed])
    inside = Edit.apply("z", lambda x, seen: x.unflatten(1, (2, -1)).flip(2).flatten(1, 2))
    assert torch.isfinite(model.run(given, edits=[inside]).logits).all()


def test_keys_of_a_row_that_asks_another_image_are_that_image_s() -> None:
    model = model_of("lightglue", "LightGlueForKeypointMatching")
    block = model.spec.blocks[1]
    assert [(place.queries, place.keys) for place in block.placed] == [
        ((0, 1), (0, 1)),
        ((0, 1), (1, 0)),
    ]
    given = images(1)
    cache = model.run(given, capture=["v", "pattern", "z", "resid_mid", "resid_pre"]).cache
    attention: Any = model.blocks[1]
    n_kv = block.n_kv_heads // 2
    with torch.no_grad():
        own, crossed = (
            getattr(attention, kind).v_proj(cache[f"{site}.1"]).unflatten(-1, (n_kv, -1))
            for kind, site in (("self_attention", "resid_pre"), ("cross_attention", "resid_mid"))
        )
    v, z = cache["v.1"], cache["z.1"]
    assert close(v, torch.cat([own, crossed], 2))
    shared = v.repeat_interleave(z.shape[2] // v.shape[2], 2)
    assert close(torch.einsum("bhqk,bkhd->bqhd", cache["pattern.1"], shared), z)


def test_where_some_inputs_stop_early_whose_row_is_whose_is_not_guessed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("lightglue", "LightGlueForKeypointMatching")
    known = probe_batch(model.module).inputs
    assert model.run(known, capture=["resid_pre.1", "z.1"]).cache["z.1"].shape[0] == 2

    def stops_first(confidences: Tensor, layer_index: int, mask: Tensor, **given: Any) -> Tensor:
        pairs = len(mask) // 2
        return torch.arange(pairs) == 0 if layer_index == 0 else torch.ones(pairs).bool()

    monkeypatch.setattr(model.module, "_get_early_stopped_image_pairs", stops_first)
    assert model.run(known, capture=["resid_pre.0", "z.0"]).cache["z.0"].shape[0] == 2
    for site in ("resid_pre.1", "resid_post.1", "mlp_write.1", "z.1", "pattern.1"):
        with pytest.raises(Refused, match="stopped early"):
            model.run(known, capture=[site])


def test_rows_are_told_apart_where_each_is_of_one_part_in_the_order_of_inputs() -> None:
    assert _parts_of(torch.tensor([1, 0, 3, 2]), 2, 2) == (1, 0)
    assert _parts_of(torch.tensor([0, 2]), 2, 2) == (0,)
    for wrong in ([0, 1, 1, 2], [2, 3, 0, 1], [0, -1, 2, 3], [0, 0, 2, 2], [0, 1, 2]):
        assert _parts_of(torch.tensor(wrong), 2, 2) == ()


def test_a_stream_in_parts_is_shown_part_after_part_and_held_again() -> None:
    x = torch.arange(48.0).reshape(2, 2, 3, 2, 2)
    seen_ = shown(x, PARTED, 2)
    assert torch.equal(seen_[1, 4 + 2], x[1, 1, :, 1, 0])
    assert torch.equal(held(seen_, PARTED, x.shape), x)


def test_a_matcher_whose_blocks_are_given_the_other_images_besides() -> None:
    """SuperGlue: its blocks attend to their own image and to the other one in turn, in a row for each image."""
    model = model_of("superglue", "SuperGlueForKeypointMatching")
    assert [[place.keys for place in block.placed] for block in model.spec.blocks[:2]] == [
        [],
        [(1, 0)],
    ]
    cache = model.run(images(1), capture=["v", "pattern", "z", "resid_pre"]).cache
    for layer, block in enumerate(model.spec.blocks[:2]):
        attention: Any = model.module.get_submodule(f"{block.name}.attention.self")
        v, z = cache[f"v.{layer}"], cache[f"z.{layer}"]
        with torch.no_grad():
            wanted = attention.value(cache[f"resid_pre.{layer}"]).unflatten(-1, v.shape[2:])
        assert close(v, wanted)
        assert close(torch.einsum("bhqk,bkhd->bqhd", cache[f"pattern.{layer}"], v), z)


def test_a_layer_whose_rows_are_of_several_parts_refuses_its_own_attention() -> None:
    module = loftr().module
    values = module.get_submodule(f"{loftr().spec.blocks[1].attention}.v_proj")
    hook = values.register_forward_hook(lambda part, args, out: out + out.flip(0))
    try:
        spec = Model(module, id="mixed").spec
    finally:
        hook.remove()
    assert "which parts of an input" in spec.refused["z.1"]
    assert not {"z", "z.0", "z.2"} & set(spec.refused)


def test_where_a_model_returns_next_to_nothing_what_its_blocks_return_is_compared() -> None:
    """Matches of random images are none: an attention that computes something else would look the same."""
    module = loftr().module
    assert "stack" not in {check.name for check in loftr().spec.checks}
    hook = module.register_forward_hook(
        lambda part, args, out: type(out)(feature_maps=tuple(0 * x for x in out.feature_maps))
    )
    try:
        spec = Model(module, id="silent").spec
    finally:
        hook.remove()
    assert spec.refused.keys() == spec.absent
    assert any(check.name == "stack" and check.passed for check in spec.checks)
