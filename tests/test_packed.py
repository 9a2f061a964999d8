"""All rows of a batch in one: Pixtral's images lie one after the other, a mask keeping them apart.

Every site must be each image's own, as it is when the image is run alone. Tolerance: float32, a few blocks deep.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import PixtralVisionConfig, PixtralVisionModel

from interp.errors import BadInput, Refused
from interp.models.attention import implementation
from interp.models.hooks import hidden_of
from interp.models.layout import PACKED, held, held_inside, shown
from interp.models.model import Model
from interp.models.packed import diagonal_blocks, require_apart
from interp.models.probe import probe
from interp.run.batch import Batch
from interp.run.edits import Edit
from interp.run.statistics import Mass
from interp.sites import AXES, Site

ROUNDING = 1e-5
PLACES = 6
"""Two rows of three patches of 4 × 4 pixels."""


def randomised() -> PixtralVisionModel:
    config = PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    )
    module = PixtralVisionModel(config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in module.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(0.1 * noise) if parameter.ndim < 2 else parameter.copy_(0.2 * noise)
    return module.eval()


@cache
def model() -> Model:
    return Model(randomised(), id="packed")


def images(n: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch({"pixel_values": torch.randn(n, 3, 8, 12, generator=generator)})


def off(got: Tensor | None, wanted: Tensor | None) -> float:
    assert got is not None and wanted is not None and got.shape == wanted.shape
    got, wanted = (x.detach().clamp_min(-1e9).nan_to_num(neginf=0.0) for x in (got, wanted))
    return float((got - wanted).abs().max() / wanted.abs().max())


def sites() -> list[str]:
    return [site for site in AXES if model().layers_with(site)]


def test_it_is_told_and_verified_in_full() -> None:
    spec = model().spec
    assert {block.axes for block in spec.blocks} == {PACKED}
    assert not spec.refused and all(check.passed for check in spec.checks)
    assert {"heads", "neurons", "writes", "window"} <= {check.name for check in spec.checks}
    assert not spec.causal


@pytest.mark.parametrize("n", [1, 2, 3, PLACES])  # as many images as positions, too
def test_every_row_is_as_it_is_alone(n: int) -> None:
    batch = images(n)
    joint = model().run(batch, capture=sites())
    with torch.no_grad():
        theirs = model().module(**batch.inputs).last_hidden_state
    assert joint.logits is not None and joint.logits.shape == (n, PLACES, 32)
    assert off(joint.logits, theirs.reshape(n, PLACES, 32)) < ROUNDING
    for row in range(n):
        alone = model().run(batch.rows(slice(row, row + 1)), capture=sites())
        assert off(joint.logits[row : row + 1], alone.logits) < ROUNDING
        for site in sites():
            for layer, x in alone.cache.by_layer(site).items():
                got = joint.cache[Site(site, layer)]
                assert len(got) == n and off(got[row : row + 1], x) < 10 * ROUNDING, site


@torch.no_grad()
def test_patterns_are_the_blocks_of_hugging_faces() -> None:
    batch = images(3)
    keys, rows = torch.randint(PLACES, (3, PLACES, 2)), torch.arange(PLACES).expand(3, -1) > 1
    mass = {"mass": Mass(keys, rows)}
    run = model().run(batch, capture=["pattern", "scores"], statistics=mass)
    with implementation(model().module, "eager"):
        theirs = model().module(**batch.inputs, output_attentions=True).attentions
    for layer, wanted in enumerate(theirs):
        pattern = run.cache[f"pattern.{layer}"]
        for i in range(3):
            part = slice(i * PLACES, (i + 1) * PLACES)
            assert off(pattern[i], wanted[0, :, part, part]) < ROUNDING
        assert off(run.cache[f"scores.{layer}"].softmax(-1), pattern) < ROUNDING
        picked = pattern.gather(-1, keys[:, None].expand(-1, 4, -1, -1)).sum(-1)
        mean = (picked * rows[:, None]).sum(-1) / rows.sum(-1)[:, None]
        assert off(run.statistics["mass"][:, layer], mean) < ROUNDING


@pytest.mark.parametrize(
    "site",
    [
        "resid_pre",
        "resid_mid",
        "resid_post",
        "attn_out",
        "mlp_out",
        "mlp_post",
        "q",
        "k",
        "v",
        "z",
        "pattern",
        "scores",
    ],
)
def test_an_edit_of_a_row_is_of_that_image_alone(site: str) -> None:
    batch = images()
    edit = Edit.scale(f"{site}.1", 0.3)
    clean = model().run(batch, capture=[f"{site}.1"]).logits  # SDPA rounds in another way
    both = model().run(batch, edits=[edit]).logits
    one = model().run(batch, edits=[edit.on_rows(slice(1, 2))]).logits
    alone = model().run(batch.rows(slice(1, 2)), edits=[edit]).logits
    assert clean is not None and both is not None and one is not None and alone is not None
    assert torch.equal(one[0], clean[0]) and torch.equal(one[1], both[1])
    assert off(one[1:], alone) < ROUNDING and off(one[1], clean[1]) > 100 * ROUNDING


def test_an_edit_of_a_position_is_of_that_vector() -> None:
    batch = images()

    def zero(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        out = out.clone()
        out[0, PLACES + 4] = 0  # position 4 of image 1
        return out

    for site, name in (
        ("resid_post.0", "transformer.layers.0"),
        ("mlp_out.1", model().spec.blocks[1].mlp_out),
    ):
        hook = model().module.get_submodule(name or "").register_forward_hook(zero)
        wanted = model().run(batch).logits
        hook.remove()
        edit = Edit.zero(site, positions=[4]).on_rows(slice(1, 2))
        got = model().run(batch, edits=[edit]).logits
        assert got is not None and wanted is not None and torch.equal(got, wanted)


def test_an_empty_edit_changes_nothing() -> None:
    batch = images()
    clean = model().run(batch, capture=sites())
    for site in sites():
        same = Edit.apply(site, lambda x, seen: x.clone())
        wanted = model().run(batch, capture=[site]).logits
        got = model().run(batch, edits=[same]).logits
        assert got is not None and wanted is not None and torch.equal(got, wanted), site
    assert off(clean.logits, model().run(batch).logits) < ROUNDING


def test_a_replay_is_a_rerun() -> None:
    batch = images()
    clean = model().run(batch, capture=["resid_pre"])
    vector = torch.randn(32, generator=torch.Generator().manual_seed(5))
    edits: list[Edit] = []
    for layer in range(3):
        edits += [
            Edit.zero("z", heads=[(layer, 1)]),
            Edit.add(f"resid_post.{layer}", vector, positions=[1, 3]),
            Edit.add(f"resid_mid.{layer}", vector),
            Edit.scale(f"mlp_post.{layer}", 0.3),
            Edit.zero(f"pattern.{layer}.1", positions=[0, 2]),
            Edit.zero(f"v.{layer}.2"),
        ]
    replayed = model().replay(clean, [[edit] for edit in edits], lambda run: run.logits)
    for edit, got in zip(edits, replayed, strict=True):
        wanted = model().run(batch, edits=[edit]).logits
        assert off(got, wanted) < ROUNDING, edit.site
        assert off(wanted, clean.logits) > 100 * ROUNDING, f"{edit.site} has no effect"


@pytest.mark.parametrize("site", ["resid_post", "z", "mlp_out", "pattern", "scores", "q"])
def test_gradients_are_of_the_rows_shown(site: str) -> None:
    """Those of row 1 are those that it has alone; of row 0, which the loss does not read, none."""
    batch = images()

    def gradient(of: Batch) -> Tensor:
        run = model().run(of, capture=[f"{site}.1"], grad=True)
        assert run.logits is not None
        return torch.autograd.grad(run.logits[-1].pow(3).sum(), run.cache[f"{site}.1"])[0]

    joint, alone = gradient(batch), gradient(batch.rows(slice(1, 2)))
    assert off(joint[1:], alone) < 10 * ROUNDING and not joint[0].any()


def test_images_of_other_sizes_are_refused_and_of_one_size_read() -> None:
    pixels = images().inputs["pixel_values"]
    for sizes in ([[8, 12], [8, 4]], [[4, 12], [4, 4]]):  # 6 + 2 and 3 + 1 could be halved
        batch = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
        with pytest.raises(BadInput, match=f"these have {sizes[0][0] * sizes[0][1] // 16}, "):
            model().run(batch, capture=["resid_post"])
    batch = {"pixel_values": pixels, "image_sizes": torch.tensor([[8, 4], [4, 8]])}
    run = model().run(batch, capture=["resid_post"])
    for i, part in enumerate((pixels[:1, :, :8, :4], pixels[1:, :, :4, :8])):
        alone = model().run({"pixel_values": part}, capture=["resid_post"])
        assert off(run.cache["resid_post.2"][i : i + 1], alone.cache["resid_post.2"]) < ROUNDING


def test_rows_that_see_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.pixtral import modeling_pixtral

    monkeypatch.setattr(
        modeling_pixtral,
        "generate_block_attention_mask",
        lambda lengths, x: torch.zeros(1, 1, x.shape[1], x.shape[1]),
    )
    with pytest.raises(Refused, match="which of them are whose was not found"):
        probe(randomised())
    one = randomised()
    del one.transformer.layers[1:]
    with pytest.raises(Refused, match="attends from one to another"):
        probe(one)
    with pytest.raises(Refused, match="layer 0"):
        model().run(images(), capture=["pattern"])


def test_what_is_held_is_the_inverse_of_what_is_shown() -> None:
    x = torch.randn(1, 12, 5)
    y = shown(x, PACKED, 3)
    assert torch.equal(y[1], x[0, 4:8]) and torch.equal(held(y, PACKED, x.shape), x)
    assert torch.equal(held_inside(y, PACKED, (12, 5)), x[0])
    assert torch.equal(
        shown(held(y.repeat(2, 1, 1), PACKED, x.shape), PACKED, 6), y.repeat(2, 1, 1)
    )
    whole = torch.block_diag(torch.ones(2, 2), 2 * torch.ones(2, 2))[None, None]
    assert torch.equal(diagonal_blocks(whole, 2)[:, 0, 0, 0], torch.tensor([1.0, 2.0]))
    whole[0, 0, 1, 2] = 1e-30
    with pytest.raises(Refused, match="'a' holds all 2 rows"):
        require_apart(whole, 2, "a")


def test_what_calls_blocks_on_its_own_is_refused() -> None:
    with pytest.raises(Refused, match="does not know"):
        hidden_of((torch.zeros(1, 12, 32),), {}, model().spec, 0)
