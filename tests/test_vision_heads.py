"""Head labels of image models: the grid is found, planted heads are found on it, and shuffled grids are not."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import ViTConfig, ViTModel

import circuits
import interp
from circuits.heads.patch_distance import PATCH_DISTANCE
from circuits.heads.patch_offset import PATCH_OFFSET
from circuits.heads.patch_sink import PATCH_SINK
from circuits.heads.patch_window import PATCH_WINDOW
from circuits.heads.patches import distances, neighbours, shuffled
from circuits.heads.scan import one_pass
from interp.data.drawn_images import drawn_images
from interp.data.images import image_prompts, patch_grid
from interp.models import attention
from interp.models.model import Model
from tests.families import FAMILIES, IMAGE
from tests.ground_truth.vision_model import OFFSET, SIDE, SINK, VISION_ZOO, patch, vision_zoo

VISION = [
    name
    for name, family in FAMILIES.items()
    if family.traits[0] == "vision" and "pattern" not in family.refused
]
PADDED = "sam_vision"
"""Its windows are filled up with keys that are no patches."""


@pytest.fixture(scope="module")
def zoo() -> Model:
    return interp.load(vision_zoo())


@pytest.fixture(scope="module")
def report(zoo):
    return circuits.classify_heads(zoo, prompts=8, progress=False)


# --- planted heads ------------------------------------------------------------------------------


def test_exactly_the_planted_heads_get_exactly_their_labels(report):
    table = report.table
    assert table[table["layer"] == 0]["labels"].tolist() == list(VISION_ZOO)
    assert (table[table["layer"] == 1]["labels"] == "").all()  # heads without weights


def test_planted_attention_scores_over_95_percent(report):
    table = report.table[report.table["layer"] == 0].set_index("head")
    for head, labels in enumerate(VISION_ZOO):
        for name in labels.split(","):
            if name not in ("", "broad"):
                assert table[name][head] > 0.95, name


def test_the_offset_of_a_head_is_told(report):
    row = report.tables["patch_offsets"].iloc[0]
    assert (row["layer"], row["head"], row["dy"], row["dx"]) == (0, 0, *OFFSET)


def test_the_distance_of_planted_heads_is_what_was_planted(report):
    table = report.table[report.table["layer"] == 0].set_index("head")["patch_distance"]
    assert table[list(VISION_ZOO).index("current_token")] == pytest.approx(0, abs=0.01)
    # a 3 × 3 window that ends at the edge of the grid: its mean by hand
    places = [(r, c) for r in range(SIDE) for c in range(SIDE)]
    near = [
        np.mean([math.dist(a, b) for b in places if max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= 1])
        for a in places
    ]
    assert table[list(VISION_ZOO).index("patch_window")] == pytest.approx(np.mean(near), abs=0.02)
    even = np.mean([math.dist(a, b) for a in places for b in places])
    assert table[list(VISION_ZOO).index("")] == pytest.approx(even, abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_random_models_get_no_labels(seed):
    """As transformers initialises them; at alpha 0.01 not one of 12 heads × 8 roles is expected."""
    torch.manual_seed(seed)
    model = interp.load(ViTModel(ViTConfig(**IMAGE | {"image_size": 48})))
    found = circuits.classify_heads(model, prompts=6, seed=seed, evidence=0, progress=False)
    assert sum(map(bool, found.table["labels"])) <= 1


def test_a_head_whose_offset_is_shuffled_away_is_none(zoo):
    """The control: position embeddings dealt out anew keep every number but the grid."""
    model = vision_zoo()
    with torch.no_grad():
        places = model.embeddings.position_embeddings
        order = torch.randperm(SIDE**2, generator=torch.Generator().manual_seed(1))
        places[0, 2:] = places[0, 2:][order]
    found = circuits.classify_heads(
        interp.load(model),
        detectors=["patch_offset", "patch_window", "patch_sink"],
        prompts=6,
        evidence=0,
        progress=False,
    )
    assert found.table["labels"].tolist()[:6] == ["", "", "", "", "", "patch_sink"]


# --- against plain references -------------------------------------------------------------------


def test_neighbours_and_distances_are_those_of_the_grid(zoo):
    grid = patch_grid(zoo)
    far = distances(grid)
    for dy, dx in ((0, 0), (1, -2), (-1, 0), (2, 2), (SIDE, 0)):
        keys = neighbours(grid, dy, dx)
        for r in range(SIDE):
            for c in range(SIDE):
                inside = 0 <= r + dy < SIDE and 0 <= c + dx < SIDE
                assert keys[patch(r, c)] == (patch(r + dy, c + dx) if inside else -1)
                if inside:
                    assert far[patch(r, c), keys[patch(r, c)]] == pytest.approx(math.hypot(dy, dx))
        assert (keys[:2] == -1).all()


def test_the_shuffle_keeps_the_relation_between_places_and_moves_them(zoo):
    images = image_prompts(zoo, 3)
    keys = neighbours(images.grid, 0, 1)
    moved = shuffled(images, keys)
    assert (moved >= 0).sum(1).tolist() == [int((keys >= 0).sum())] * 3
    assert not moved[0].equal(moved[1]) and not moved[0].equal(keys)
    # following the relation still walks along rows of SIDE patches, one for each row
    for row in moved.tolist():
        starts = set(range(2, len(row))) - set(row)
        assert len(starts) == SIDE
        for place in starts:
            steps = 1
            while (place := row[place]) >= 0 and steps < 99:
                steps += 1
            assert steps == SIDE


@pytest.mark.parametrize("name", ["vit", "dinov3", "siglip_vision"])
def test_scores_are_those_of_the_whole_pattern(name, monkeypatch):
    """Streamed in chunks of 16 rows or of all: the same numbers as from [head, query, key]."""
    model = Model(FAMILIES[name]())
    images = image_prompts(model, 3)
    detectors = [PATCH_OFFSET, PATCH_DISTANCE, PATCH_SINK]
    whole = one_pass(model, detectors, images)
    monkeypatch.setattr(attention, "CHUNK_BYTES", 1)
    assert len(attention.row_chunks(1, images.length, images.length)) == -(-images.length // 16)
    chunked = one_pass(model, detectors, images)
    for key, value in whole.items():
        np.testing.assert_allclose(chunked[key], value, atol=1e-5, err_msg=key)  # float32 sums
    A = model.run(images.batch, capture=["pattern"]).cache["pattern"]
    patches = images.grid.places.flatten().tolist()
    places = {p: divmod(i, 4) for i, p in enumerate(patches)}
    distance = sum(
        A[..., q, k] * math.dist(places[q], places[k]) for q in patches for k in patches
    ) / len(patches)
    np.testing.assert_allclose(whole["patch_distance.far"], distance, atol=1e-4)
    right = [(q, k) for q in patches for k in patches
             if (places[k][0] - places[q][0], places[k][1] - places[q][1]) == (0, 1)]  # fmt: skip
    mean = torch.stack([A[..., q, k] for q, k in right]).mean(0)
    np.testing.assert_allclose(whole["patch_offset.there 0 1"], mean, atol=1e-5)
    columns = [
        torch.stack([A[..., q, k] for q in patches if math.dist(places[q], places[k]) >= 2]).mean(0)
        for k in patches
    ]
    np.testing.assert_allclose(whole["patch_sink.score"], torch.stack(columns).amax(0), atol=1e-5)


# --- the grid -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VISION)
def test_the_grid_is_found_whatever_stands_before_it(name):
    grid = patch_grid(Model(FAMILIES[name]()))
    others = {"deit": 2, "siglip_vision": 0, PADDED: 0}.get(name, 1)
    assert grid.places.flatten().tolist() == list(range(others, others + 16))
    assert grid.others == list(range(others))
    assert grid.labels[others:][:5] == ["0,0", "0,1", "0,2", "0,3", "1,0"]


def test_tokens_after_the_patches_and_images_that_are_not_square_are_no_trouble():
    options = IMAGE | {"image_size": [16, 32], "num_detection_tokens": 5}
    model = Model(transformers.YolosModel(transformers.YolosConfig(**options)).eval())
    grid = patch_grid(model)
    assert grid.places.shape == (2, 4) and grid.others == [0, *range(9, 14)]
    assert grid.labels[0] == "CLS" and grid.labels[9] == "+1"
    found = circuits.classify_heads(model, prompts=4, progress=False)
    assert found.arrays["pattern"].shape[-1] == 14


def test_registers_of_dinov2_are_found():
    options = {name: value for name, value in IMAGE.items() if name != "intermediate_size"}
    config = transformers.Dinov2WithRegistersConfig(num_register_tokens=3, **options)
    model = Model(transformers.Dinov2WithRegistersModel(config).eval())
    assert patch_grid(model).others == [0, 1, 2, 3]
    assert "register" in circuits.classify_heads(model, prompts=4, progress=False).table


def test_keys_that_fill_up_a_window_are_no_patches():
    """Distances, masses and their baselines are of the 16 patches, not of the 20 keys behind them."""
    model = Model(FAMILIES[PADDED]())
    images = image_prompts(model, 3)
    found = one_pass(model, [PATCH_DISTANCE, PATCH_WINDOW], images)
    pattern = model.run(images.batch, capture=["pattern"]).cache["pattern.0"]
    assert pattern.shape[2:] == (16, 36) and pattern[..., 16:].sum() > 1
    places = images.grid.rows_and_columns
    far, seen = torch.cdist(places, places), pattern[..., :16]
    got = found["patch_distance.far"][:, 0] / found["patch_distance.mass"][:, 0]
    wanted = (seen * far).sum((-1, -2)) / seen.sum((-1, -2))
    assert np.allclose(got, wanted, atol=1e-5)  # float32 sums of 256 weights
    near = ((places[:, None] - places[None]).abs().amax(-1) <= 1).float()
    mean = (seen * near).sum((-1, -2)) / 16
    assert np.allclose(found["patch_window.score"][:, 0], mean, atol=1e-5)


def test_models_without_a_grid_are_refused_with_the_reason(tiny):
    windows = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1]}
    windows |= {"num_heads": [2, 2], "window_size": 4}
    swin = Model(transformers.Swinv2Model(transformers.Swinv2Config(**windows)).eval())
    with pytest.raises(
        interp.InterpError,
        match=r"no one grid of patches: .*in stages, on 64, 16 positions of an image",
    ):
        patch_grid(swin)
    sizes = {name: value for name, value in IMAGE.items() if name != "image_size"}
    cut = Model(
        transformers.Siglip2VisionModel(
            transformers.Siglip2VisionConfig(**sizes | {"patch_size": 4, "num_patches": 16})
        ).eval()
    )
    with pytest.raises(interp.InterpError, match=r"cut into patches already \(16 of 48 numbers\)"):
        image_prompts(cut, 2)
    unsaid = Model(FAMILIES["vit"]())
    unsaid.module.config = SimpleNamespace(image_size=32)
    with pytest.raises(interp.InterpError, match="no patch_size"):
        patch_grid(unsaid)
    with pytest.raises(interp.InterpError, match="reads no images"):
        patch_grid(tiny)


def test_attention_over_fewer_positions_than_the_grid_is_refused(zoo, monkeypatch):
    """What windowed and pooled models do in deeper layers, with the first block as it should be."""
    from interp.data import images

    real = Model.run

    def pooled(self, *args, **kwargs):
        run = real(self, *args, **kwargs)
        if "k" in run.cache:
            run.cache.put("k", 1, run.cache["k.1"][:, ::4])
        return run

    monkeypatch.setattr(Model, "run", pooled)
    monkeypatch.setattr(images, "_grids", {})
    with pytest.raises(interp.InterpError, match="layer 1 attends over 1 × 10 positions"):
        patch_grid(zoo)


def test_skipped_on_images_is_only_what_could_have_been(zoo, report):
    assert not report.meta["skipped"]
    plain = circuits.classify_heads(
        Model(FAMILIES["siglip_vision"]()), prompts=4, evidence=0, progress=False
    )
    assert plain.meta["skipped"]["cls"] == "no token stands before the patches"
    assert set(plain.meta["skipped"]) == {"cls", "cls_reads", "register"}
    with pytest.raises(interp.InterpError, match="this one reads images"):
        circuits.classify_heads(zoo, detectors=["induction", "copying"], progress=False)


# --- images -------------------------------------------------------------------------------------


def test_drawn_images_are_the_same_again_and_have_the_spectrum_of_scenes():
    pixels, titles = drawn_images(8, 64, 64, seed=3)
    again, _ = drawn_images(8, 64, 64, seed=3)
    other, _ = drawn_images(8, 64, 64, seed=4)
    assert pixels.equal(again) and not pixels.equal(other)
    assert pixels.min() >= 0 and pixels.max() <= 1 and pixels.std((1, 2, 3)).min() > 0.02
    clouds = torch.stack([x for x, title in zip(pixels, titles, strict=True) if title == "noise"])
    power = torch.fft.fft2(clouds.mean(1)).abs().mean(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64)))
    inside = (frequency > 2 / 64) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[inside]), np.log(power.numpy()[inside]), 1)[0]
    assert -1.4 < slope < -0.7  # 1/f is -1; the squashing and clamping of colours bends it a little


def test_the_users_own_images_are_scaled_cropped_and_normalised(tmp_path, zoo):
    rng = np.random.default_rng(0)
    for name in "abcde":
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    side = SIDE * 4
    images = image_prompts(zoo, 4, images=tmp_path)
    assert images.pixels.shape == (4, 3, side, side) and images.titles[0] == "a.npy"
    exact = torch.rand(4, 3, side, side)
    mean, deviation = images_mean()
    found = image_prompts(zoo, 4, images=exact).pixels
    torch.testing.assert_close(found * deviation + mean, exact, atol=1e-6, rtol=0)
    report = circuits.classify_heads(zoo, prompts=5, images=tmp_path, evidence=2, progress=False)
    assert [shown["title"] for shown in report.meta["prompts"]] == ["a.npy", "b.npy"]
    assert report.meta["options"]["images"]["from"] == str(tmp_path)
    assert report.table["labels"].tolist()[:6] == list(VISION_ZOO)[:6]


def images_mean():
    from interp.data.images import IMAGENET

    return (torch.tensor(values)[:, None, None] for values in IMAGENET)


def test_pictures_are_read_where_pillow_is_installed(tmp_path, zoo):
    image = pytest.importorskip("PIL.Image")
    for i in range(4):
        image.new("RGB", (50, 40), (255, 60 * i, 0)).save(tmp_path / f"{i}.png")
    pixels = image_prompts(zoo, 4, images=tmp_path).pixels
    mean, deviation = images_mean()
    red = (pixels * deviation + mean)[:, 0]
    torch.testing.assert_close(red, torch.ones_like(red))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nowhere", "no folder 'nowhere'"),
        (torch.full((4, 3, 24, 24), 2.0), "outside 0 to 1"),
        (torch.rand(3, 24, 24), "wanted [n channels height width]"),
        (torch.rand(2, 3, 24, 24), "needs at least 4"),
        (torch.rand(4, 1, 24, 24), "reads 3"),
    ],
)
def test_images_that_cannot_be_used_are_told_before_the_pass(zoo, given, words):
    with pytest.raises(interp.InterpError) as told:
        circuits.classify_heads(zoo, images=given, progress=False)
    assert words in str(told.value)


def test_images_for_a_model_of_text_are_refused(tiny):
    with pytest.raises(interp.InterpError, match="reads text"):
        circuits.classify_heads(tiny, images=torch.rand(4, 3, 8, 8), progress=False)


def test_normalisation_is_the_checkpoints_own(tmp_path):
    import json

    FAMILIES["vit"]().save_pretrained(tmp_path)
    written = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    images = image_prompts(interp.load(tmp_path), 2, images=torch.zeros(2, 3, 32, 32))
    assert images.note == ""
    assert images.pixels.unique().tolist() == [-2.0]


# --- the page and the command -------------------------------------------------------------------


def test_the_page_names_patches_by_row_and_column(report, tmp_path):
    tokens = report.meta["prompts"][0]["tokens"]
    assert tokens[:4] == [" CLS", " +1", " 0,0", " 0,1"] and len(tokens) == SIDE**2 + 2
    pattern = report.arrays["pattern"]
    assert pattern.shape == (4, 2, len(VISION_ZOO), SIDE**2 + 2, SIDE**2 + 2)
    q, k = tokens.index(" 2,3"), tokens.index(f" {2 + OFFSET[0]},{3 + OFFSET[1]}")
    assert pattern[0, 0, 0, q, k] == 255
    assert (pattern[0, 0, 5, :, SINK] == 255).all()
    assert report.meta["causal"] is False
    assert report.figure("pattern", head=(0, 0)).to_json()
    assert report.to_html().startswith("<!") or "<!doctype" in report.to_html()[:20].lower()
    loaded = interp.Report.load(report.save(tmp_path))
    assert loaded.table["labels"].tolist() == report.table["labels"].tolist()


def test_the_command_reads_image_models(run, tmp_path):
    vision_zoo().save_pretrained(tmp_path / "zoo")
    code, shown, _ = run(
        "heads", tmp_path / "zoo", "--prompts", 6, "--out", tmp_path / "out"
    )  # fmt: skip
    assert code == 0
    assert "Patch offset" in shown and "6 × 6 patches" in shown
    code, _, told = run("heads", tmp_path / "zoo", "--images", tmp_path / "none", "--out", tmp_path)
    assert code == 2 and "no folder" in told
