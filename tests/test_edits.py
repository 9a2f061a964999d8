"""Every edit against a plain torch reference: on heads, positions, rows, and in query chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.errors import BadInput
from interp.models import attention
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.edits import Edit, Seen

BATCH, POS, N_HEADS, D_HEAD, D_MODEL = 3, 5, 4, 8, 32
SHAPES = {
    "z": (BATCH, POS, N_HEADS, D_HEAD),
    "resid_post": (BATCH, POS, D_MODEL),
    "pattern": (BATCH, N_HEADS, POS, POS),
}
VECTOR = torch.arange(1.0, D_HEAD + 1)


def activation(site: str, seed: int = 0) -> Tensor:
    return torch.randn(SHAPES[site], generator=torch.Generator().manual_seed(seed))


# --- what is put in place, everywhere ---------------------------------------------------------------

OTHER = activation("z", seed=1)
KINDS: dict[str, tuple[Callable[..., Edit], Callable[[Tensor], Tensor]]] = {
    "zero": (Edit.zero, torch.zeros_like),
    "scale": (lambda site, **where: Edit.scale(site, -2.0, **where), lambda x: -2 * x),
    "add": (lambda site, **where: Edit.add(site, VECTOR, **where), lambda x: x + VECTOR),
    "mean": (Edit.mean, lambda x: x.mean(dim=(0, 1)).expand_as(x)),
    "given mean": (
        lambda site, **where: Edit.mean(site, mean={2: OTHER[0, 0]}, **where),
        lambda x: OTHER[0, 0].expand_as(x),
    ),
    "patch": (lambda site, **where: Edit.patch(site, OTHER, **where), lambda x: OTHER),
    "patch by layer": (
        lambda site, **where: Edit.patch(site, {2: OTHER}, **where),
        lambda x: OTHER,
    ),
    "apply": (
        lambda site, **where: Edit.apply(site, lambda x, s: x.square(), **where),
        torch.square,
    ),
}
ROWS = torch.arange(BATCH)
EYE = torch.eye(BATCH, POS, dtype=torch.bool)
A_ROW = torch.tensor([4, 0, 2])
ALL = slice(None)
PLACES: dict[str, tuple[dict[str, Any], Any]] = {
    "everywhere": ({}, ...),
    "one head": ({"heads": [(2, 1)]}, (ALL, ALL, 1)),
    "heads of two layers": ({"heads": [(2, 3), (0, 2), (2, 0)]}, (ALL, ALL, [0, 3])),
    "positions": ({"positions": [0, 3]}, (ALL, [0, 3])),
    "a position a row": ({"positions": A_ROW}, (ROWS, A_ROW)),
    "a mask": ({"positions": EYE}, EYE),
    "a head at a position a row": ({"heads": [(2, 1)], "positions": A_ROW}, (ROWS, A_ROW, 1)),
}
"""How an edit names a place of z in layer 2, and the plain index of the same place."""


def where_of(place: str) -> Tensor:
    on = torch.zeros(SHAPES["z"], dtype=torch.bool)
    on[PLACES[place][1]] = True
    return on


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_changes_what_it_names_and_nothing_else(kind: str, place: str) -> None:
    make, reference = KINDS[kind]
    x = activation("z")
    before = x.clone()
    new = make("z", **PLACES[place][0])(x, Seen(layer=2))
    on = where_of(place)
    assert on.any()
    assert torch.equal(new, torch.where(on, reference(x), x))
    assert torch.equal(x, before)


def test_a_head_in_the_site_is_the_same_as_in_heads() -> None:
    x = activation("z")
    assert torch.equal(
        Edit.zero("z.2.1")(x, Seen(layer=2)), Edit.zero("z", heads=[(2, 1)])(x, Seen(layer=2))
    )


@pytest.mark.parametrize("place", ["positions", "a position a row", "a mask"])
def test_positions_of_the_residual_stream(place: str) -> None:
    x = activation("resid_post")
    new = Edit.zero("resid_post", **PLACES[place][0])(x, Seen(layer=2))
    on = where_of(place)[:, :, 0, :1]
    assert torch.equal(new, x.masked_fill(on, 0))


def test_rows_of_a_larger_batch() -> None:
    """Positions, masks and means of an edit on some rows count within these rows."""
    x = activation("z")
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    new = Edit.mean("z").on_rows(slice(0, 2))(x, Seen(layer=2, mask=mask))
    assert torch.allclose(new[:2], torch.cat([x[0, :2], x[1, :3]]).mean(0).expand(2, POS, 4, 8))
    assert torch.equal(new[2], x[2])
    new = Edit.zero("z", positions=torch.tensor([4, 0])).on_rows(slice(1, 3))(x, Seen(layer=2))
    wanted = x.clone()
    wanted[1, 4] = wanted[2, 0] = 0
    assert torch.equal(new, wanted)


def test_mean_ablation_ignores_padding() -> None:
    x = activation("z")
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    new = Edit.mean("z")(x, Seen(layer=2, mask=mask))
    real = [x[b, p] for b in range(BATCH) for p in range(POS) if mask[b, p]]
    assert torch.allclose(new, torch.stack(real).mean(0).expand_as(x), atol=1e-6)
    spoiled = torch.where(mask[..., None, None], x, torch.nan)
    assert torch.equal(Edit.mean("z")(spoiled, Seen(layer=2, mask=mask)), new)


@pytest.mark.parametrize("n_rows", [2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_resampling_moves_every_row(n_rows: int, seed: int) -> None:
    """A derangement without repeats: every row comes from another one, none is used twice."""
    x = torch.arange(float(n_rows))[:, None, None].expand(n_rows, 2, 3)
    sources = Edit.resample("resid_post", seed=seed)(x, Seen(layer=0))[:, 0, 0].tolist()
    assert sorted(sources) == list(range(n_rows))
    assert all(source != row for row, source in enumerate(sources))


def test_resampling_is_drawn_by_the_seed() -> None:
    x = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0))
    draws = [Edit.resample("resid_post", seed=seed)(x, Seen(0)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# --- patterns, whole and in chunks ------------------------------------------------------------------


def test_query_positions_of_a_pattern() -> None:
    x = activation("pattern")
    new = Edit.zero("pattern.2.1", positions=[1, 4])(x, Seen(layer=2))
    wanted = x.clone()
    wanted[:, 1, [1, 4]] = 0
    assert torch.equal(new, wanted)


@pytest.mark.parametrize(
    "positions",
    [None, [3, 20, 39], torch.tensor([17, 38]), torch.arange(80).view(2, 40) % 3 == 0],
    ids=["all", "list", "a row", "mask"],
)
def test_a_pattern_edit_is_the_same_in_chunks(
    positions: Any, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(0))
    other = tiny.run(ids.flip(1), capture=["pattern"]).cache.by_layer("pattern")
    edits = [
        Edit.patch("pattern", other, heads=[(0, 1), (1, 3)], positions=positions),
        Edit.scale("scores.1.0", 0.5, positions=positions),
    ]
    whole = tiny.run(ids, capture=["pattern"], edits=edits)
    monkeypatch.setattr(attention, "CHUNK_BYTES", 1)
    chunked = tiny.run(ids, capture=["pattern"], edits=edits)
    # Two blocks in float32: 1e-5 is about a hundred steps of rounding.
    for site in ("pattern.0", "pattern.1"):
        assert (whole.cache[site] - chunked.cache[site]).abs().max() < 1e-5
    assert (whole.logits - chunked.logits).abs().max() < 1e-5 * whole.logits.abs().max()
    clean = tiny.run(ids, capture=["pattern"]).cache["pattern.0"]
    on = torch.zeros(2, 40, dtype=torch.bool)
    if positions is None:
        on[:] = True
    elif isinstance(positions, Tensor) and positions.dtype == torch.bool:
        on = positions
    elif isinstance(positions, Tensor):
        on[torch.arange(2), positions] = True
    else:
        on[:, positions] = True
    wanted = clean.clone()
    wanted[:, 1] = torch.where(on[..., None], other[0][:, 1], clean[:, 1])
    assert torch.equal(whole.cache["pattern.0"], wanted)


# --- in a model -------------------------------------------------------------------------------------


def test_edits_apply_in_order_and_captures_show_the_result(tiny: Model) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    clean = tiny.run(ids, capture=["resid_post.0"]).cache["resid_post.0"]
    one = torch.ones(32)
    edits = [Edit.add("resid_post.0", one), Edit.scale("resid_post.0", 2.0)]
    assert torch.equal(
        tiny.run(ids, capture=["resid_post.0"], edits=edits).cache["resid_post.0"],
        (clean + one) * 2,
    )
    assert torch.equal(
        tiny.run(ids, capture=["resid_post.0"], edits=edits[::-1]).cache["resid_post.0"],
        clean * 2 + one,
    )


@pytest.mark.parametrize(
    ("site", "place"),
    [("z.1.2", {}), ("pattern.1.0", {}), ("resid_post.0", {"positions": [3]}), ("resid_pre.1", {})],
)
def test_a_function_that_works_in_place_changes_what_is_named_alone(
    site: str, place: dict, tiny: Model
) -> None:
    """Neither other heads and positions, nor what was captured before."""
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    functions = (lambda x, seen: x.mul_(0.3), lambda x, seen: x * 0.3)
    edits = [Edit.apply(site, function, **place) for function in functions]
    mine, wanted = (tiny.run(ids, ["resid_post"], [edit]) for edit in edits)
    assert mine.logits is not None and torch.equal(mine.logits, wanted.logits)
    assert torch.equal(mine.cache["resid_post"], wanted.cache["resid_post"])


def test_zeroing_a_head_takes_its_output_away(tiny: Model) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    clean = tiny.run(ids, capture=["z", "attn_out"]).cache
    edited = tiny.run(ids, capture=["attn_out.1"], edits=[Edit.zero("z", heads=[(1, 2)])]).cache
    lost = clean["z.1.2"] @ tiny.W_O(1)[2]
    # One projection in float32.
    assert torch.allclose(clean["attn_out.1"] - lost, edited["attn_out.1"], atol=1e-5)


def test_mean_ablation_in_a_padded_batch(tiny: Model) -> None:
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    batch = Batch.of_ids(ids, ids != 0)
    clean = tiny.run(batch, capture=["z.0"]).cache["z.0"]
    edited = tiny.run(batch, capture=["z.0"], edits=[Edit.mean("z.0.1")]).cache["z.0"]
    wanted = torch.cat([clean[0, :3, 1], clean[1, :, 1]]).mean(0)
    assert torch.allclose(edited[:, :, 1], wanted.expand(2, 5, 8), atol=1e-6)
    assert torch.equal(edited[:, :, [0, 2, 3]], clean[:, :, [0, 2, 3]])


def test_kv_heads_are_edited_by_their_own_number(tiny: Model) -> None:
    ids = torch.tensor([[5, 6, 7]])
    cache = tiny.run(ids, capture=["z.0", "v.0"], edits=[Edit.zero("v.0.1")]).cache
    assert not cache["v.0.1"].any() and cache["v.0.0"].abs().min() > 0
    assert not cache["z.0"][:, :, 2:].any() and cache["z.0"][:, :, :2].abs().min() > 0
    assert [tiny.spec.kv_group(0, head) for head in range(4)] == [0, 0, 1, 1]


# --- what is refused --------------------------------------------------------------------------------


def test_edits_that_cannot_be_meant() -> None:
    with pytest.raises(BadInput, match="did you mean 'resid_post'"):
        Edit.zero("resid_pst")
    with pytest.raises(BadInput, match="has no heads"):
        Edit.zero("resid_post", heads=[(0, 1)])
    with pytest.raises(BadInput, match="not in both"):
        Edit.zero("z.0", heads=[(0, 1)])
    with pytest.raises(BadInput, match="at least two rows"):
        Edit.resample("z")(torch.zeros(1, 2, 3, 4), Seen(layer=0))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit.zero("z", heads=[(0, 4)]), "heads 0 to 3, not 4"),
        (Edit.zero("z", heads=[(0, -1)]), "heads 0 to 3, not -1"),
        (Edit.zero("v.0.2"), "heads 0 to 1, not 2"),
        (Edit.zero("pattern.1.9"), "heads 0 to 3, not 9"),
        (Edit.zero("z", heads=[(2, 0)]), "layer 2; layers with this site: 0–1"),
        (Edit.zero("resid_post.7"), "layer 7; layers with this site: 0–1"),
        (Edit.zero("resid_post", positions=[3]), "position 3"),
        (Edit.zero("resid_post", positions=[-1]), "position -1"),
        (Edit.zero("pattern", positions=[3]), "position 3"),
        (Edit.zero("z", positions=torch.tensor([3, 0])), "position 3"),
        (Edit.zero("z", positions=torch.tensor([0, -2])), "position -2"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.site),
)
def test_out_of_range_is_an_error_and_not_an_edit_of_nothing(
    edit: Edit, message: str, tiny: Model
) -> None:
    with pytest.raises(BadInput, match=message):
        tiny.run(torch.tensor([[5, 6, 7], [8, 9, 10]]), edits=[edit])


@pytest.mark.parametrize(
    "positions",
    [
        torch.tensor([0, 1, 2]),
        torch.ones(3, 3, dtype=torch.bool),
        torch.ones(2, 2, dtype=torch.bool),
        torch.ones(2, 4, dtype=torch.bool),
    ],
    ids=["three rows", "a mask of three rows", "too short a mask", "too long a mask"],
)
@pytest.mark.parametrize("site", ["resid_post.0", "z.0.1", "pattern.0"])
def test_positions_of_other_rows_are_refused(positions: Tensor, site: str, tiny: Model) -> None:
    if site == "pattern.0" and positions.shape[-1] == 4:
        return  # a chunk of queries does not know how many there are
    with pytest.raises(
        BadInput, match="for 2 rows of 3 positions; the same positions in every row"
    ):
        tiny.run(
            torch.tensor([[5, 6, 7], [8, 9, 10]]), edits=[Edit.zero(site, positions=positions)]
        )


def test_positions_of_several_rows_do_not_make_one_row_several(tiny: Model) -> None:
    """A tensor is one position a row: [0, 2] of one prompt would give two rows of logits."""
    ids = torch.tensor([[5, 6, 7]])
    both = Edit.zero("resid_post.0", positions=[0, 2])
    assert tiny.run(ids, edits=[both]).logits.shape == (1, 3, 97)
    with pytest.raises(BadInput, match=r"shape \[2\] for 1 rows"):
        tiny.run(ids, edits=[Edit.zero("resid_post.0", positions=torch.tensor([0, 2]))])
    clean = tiny.run(ids, capture=["resid_pre"])
    wrong = [[Edit.zero("resid_post.0", positions=torch.tensor([0, 2]))]] * 2
    with pytest.raises(BadInput, match=r"shape \[2\] for 1 rows"):
        tiny.replay(clean, wrong, lambda run: run.logits)


@pytest.mark.parametrize(
    "positions",
    [slice(0, 2), "end", [0.0, 1.0], [[0, 1], [1, 2]], [True, False], torch.tensor(1)],
    ids=str,
)
def test_what_is_no_position_is_told_when_the_edit_is_written(positions: Any) -> None:
    with pytest.raises(BadInput, match=r"a list \(\[3, 5\]\), one position a row is a LongTensor"):
        Edit.zero("resid_post", positions=positions)


def test_values_that_an_edit_cannot_take_are_told(tiny: Model) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(BadInput, match="a tensor, not a list"):
        Edit.add("resid_post.0", [0.0] * 32)  # type: ignore[arg-type]
    cache = tiny.run(ids, capture=["resid_post.0"]).cache
    with pytest.raises(BadInput, match=r'run.cache.by_layer\("resid_post"\)'):
        Edit.patch("resid_post", cache)  # type: ignore[arg-type]
    some = Edit.patch("resid_post", cache.by_layer("resid_post"))
    with pytest.raises(BadInput, match=r"no value for layer 1, only for 0; .* 'resid_post.0'"):
        tiny.run(ids, edits=[some])
    with pytest.raises(BadInput, match=r"edits are interp.Edit, not function"):
        tiny.run(ids, edits=[lambda x: x])  # type: ignore[list-item]


def test_an_edit_says_what_and_where() -> None:
    edits = [
        Edit.zero("z.5.1", positions=[3, 4]),
        Edit.add("resid_post.2", torch.ones(32), positions=A_ROW),
        Edit.mean("z").on_rows(slice(0, 2)),
    ]
    assert list(map(repr, edits)) == [
        "Edit.zero('z', heads=[(5, 1)], positions=[3, 4])",
        "Edit.add('resid_post.2', positions=a tensor [3])",
        "Edit.mean('z', rows 0 to 2)",
    ]


def test_the_mean_pattern_is_that_of_each_query_and_key_over_rows(tiny: Model) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
    clean = tiny.run(ids, capture=["pattern.1"]).cache["pattern.1"]
    edited = tiny.run(ids, capture=["pattern.1"], edits=[Edit.mean("pattern.1.2")]).cache[
        "pattern.1"
    ]
    wanted = clean.clone()
    wanted[:, 2] = clean[:, 2].mean(0)
    assert torch.allclose(edited, wanted, atol=1e-6)
    padded = Batch.of_ids(ids, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]).bool())
    with pytest.raises(BadInput, match="padded rows"):
        tiny.run(padded, edits=[Edit.mean("pattern.1")])


def test_a_vector_of_the_wrong_width_is_told_with_the_right_one(tiny: Model) -> None:
    with pytest.raises(BadInput, match="give one of width 32"):
        tiny.run(torch.tensor([[5, 6]]), edits=[Edit.add("resid_post.0", torch.ones(31))])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x, "two arguments.*change\\(activation, seen\\)"),
        (lambda x, seen, more: x, "'more'.*change\\(activation, seen\\)"),
        (3.0, "by 3.0, which is no function"),
    ],
)
def test_a_function_that_cannot_be_called_so_is_told_where_the_edit_is_made(change, words) -> None:
    with pytest.raises(BadInput, match=words):
        Edit.apply("z.1", change)
    assert Edit.apply("z.1", torch.nn.functional.relu).kind == "apply"  # with an option of its own
    assert Edit.apply("z.1", lambda *given: given[0]).kind == "apply"


@pytest.mark.parametrize(
    ("site", "change", "words"),
    [
        ("resid_post.0", lambda x: x[:, 0], r"\(3, 32\) .* \(3, 3, 32\) \(batch, pos, d_model\)"),
        ("resid_post.0", lambda x: x.mean(0), r"\(3, 32\) .* \(3, 3, 32\)"),
        ("resid_post.0", lambda x: x[0, 0], r"\(32,\) .* or one number"),
        ("resid_post.0", lambda x: x[:, :1], r"\(3, 1, 32\)"),
        ("z.1", lambda x: x.sum(-1, keepdim=True), r"\(3, 3, 4, 1\) .* \(3, 3, 4, 8\)"),
        ("pattern.0", lambda x: x[:, 0, 0], r"\(3, 3\) .* \(3, 4, 3, 3\)"),
        ("scores.1", lambda x: x[:, :1], r"\(3, 1, 3, 3\)"),
    ],
)
def test_what_a_function_returns_is_not_broadcast(
    site: str, change: Callable[[Tensor], Tensor], words: str, tiny: Model
) -> None:
    """Three rows of three positions: a value for each row would be taken for one for each position."""
    ids = torch.arange(9).view(3, 3) + 5
    edits = [Edit.apply(site, lambda x, seen: change(x))]
    with pytest.raises(BadInput, match=f"edit of '{site}' gives values of shape {words}"):
        tiny.run(ids, edits=edits)
    whole = [Edit.apply(site, lambda x, seen: x.new_tensor(2.0))]
    filled = [Edit.apply(site, lambda x, seen: torch.full_like(x, 2.0))]
    assert torch.equal(tiny.run(ids, edits=whole).logits, tiny.run(ids, edits=filled).logits)


@pytest.mark.parametrize("made", [Edit.patch, lambda site, value: Edit.mean(site, mean={1: value})])
@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((3, 3, 32), True),
        ((3, 32), True),
        ((1, 3, 32), True),
        ((32,), True),
        ((1, 1, 32), True),
        ((), True),
        ((3, 1, 32), False),
        ((3, 3, 1), False),
        ((3, 1), False),
        ((1, 1, 3, 32), False),
        ((2, 3, 32), False),
        ((31,), False),
    ],
)
def test_a_given_value_may_leave_out_rows_and_positions_and_nothing_else(
    made: Callable[..., Edit], shape: tuple[int, ...], fits: bool, tiny: Model
) -> None:
    ids = torch.arange(9).view(3, 3) + 5
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if fits:
        run = tiny.run(ids, capture=["resid_post.1"], edits=[made("resid_post.1", value)])
        assert torch.equal(run.cache["resid_post.1"], value.expand(3, 3, 32))
        return
    with pytest.raises(BadInput, match=r"gives values of shape .* \(3, 3, 32\)"):
        tiny.run(ids, edits=[made("resid_post.1", value)])


def test_a_pattern_given_for_every_row_and_head_is_cut_into_the_chunks_of_queries(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(5, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    even = torch.ones(9, 9).tril()
    even = even / even.sum(-1, keepdim=True)
    whole = tiny.run(ids, edits=[Edit.patch("pattern.1", even)]).logits
    monkeypatch.setattr(attention, "CHUNK_BYTES", 1)
    for value in (even, even.expand(4, 9, 9), even.expand(2, 4, 9, 9)):
        cut = tiny.run(ids, edits=[Edit.patch("pattern.1", value)]).logits
        assert torch.allclose(cut, whole, atol=1e-5)
