"""A CLIP's image embedding as a sum over heads, and the texts that name them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import interp
from circuits.clip_heads import clip_heads, default_texts, text_bank
from circuits.clip_parts import image_parts, text_embeddings, vision_tower
from circuits.text_span import by_chance, text_span
from interp.data.images import image_prompts
from tests.ground_truth.clip_model import (
    PLANTED,
    SHAPE,
    TEXT,
    TEXTS,
    clip_folder,
    planted,
    tiny_clip,
    word_tokenizer,
)

IMAGE = SHAPE | {"image_size": 32, "patch_size": 8}
WORDS = SHAPE | {"vocab_size": 97, "max_position_embeddings": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return clip_folder(tmp_path_factory.mktemp("clip"), planted())


@pytest.fixture(scope="module")
def report(folder):
    return clip_heads([folder], texts=TEXTS, n=48, layers=2, k=3, progress=False)


def pixels(clip, n=20):
    return image_prompts(vision_tower(clip), n).pixels


# --- the sum ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CLIP", "ChineseCLIP", "AltCLIP", "MetaClip2"])
def test_direct_contributions_sum_to_the_image_embedding(name):
    """Found in every model with one normed position and a projection, by no name."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        text_config=dict(WORDS), vision_config=dict(IMAGE), projection_dim=16
    )
    clip = getattr(transformers, f"{name}Model")(config).eval()
    shown = pixels(clip)
    parts = image_parts(clip, vision_tower(clip), shown)
    with torch.no_grad():
        wanted = clip.get_image_features(pixel_values=shown).pooler_output
    # float32 sums over 3 layers of 4 heads
    torch.testing.assert_close(
        parts.total, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
    )
    torch.testing.assert_close(parts.embedding, wanted, rtol=1e-5, atol=1e-6)


def test_a_heads_contribution_is_what_its_write_changes_with_the_norm_held():
    """Plain reference: the embedding's derivative along the write, by autograd with σ held."""
    clip = tiny_clip()
    vision, shown = vision_tower(clip), pixels(clip, 4)
    parts = image_parts(clip, vision, shown)
    run = vision.run({"pixel_values": shown}, capture=["z", "resid_post.2"])
    final = run.cache["resid_post.2"][:, 0]
    norm = clip.vision_model.post_layernorm
    sigma = (final.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    for layer, head in ((0, 3), (2, 1)):
        W_O = clip.vision_model.encoder.layers[layer].self_attn.out_proj.weight[
            :, 8 * head : 8 * head + 8
        ]
        write = run.cache[f"z.{layer}"][:, 0, head] @ W_O.T
        held = (write - write.mean(-1, keepdim=True)) / sigma * norm.weight
        torch.testing.assert_close(
            parts.heads[:, layer, head], clip.visual_projection(held), rtol=1e-4, atol=1e-5
        )


def test_models_without_such_a_sum_are_refused_with_the_reason(tiny):
    siglip = transformers.SiglipModel(
        transformers.SiglipConfig(text_config=dict(WORDS), vision_config=dict(IMAGE))
    ).eval()
    with pytest.raises(interp.InterpError, match="pooled by attention"):
        image_parts(siglip, vision_tower(siglip), pixels(siglip))
    blip = transformers.BlipModel(
        transformers.BlipConfig(text_config=dict(WORDS), vision_config=dict(IMAGE))
    ).eval()
    with pytest.raises(interp.InterpError, match="no exact sum over heads"):
        image_parts(blip, vision_tower(blip), torch.zeros(2, 3, 32, 32))
    with pytest.raises(interp.InterpError, match="embeds both images and texts"):
        clip_heads([tiny.module], texts=TEXTS)


def test_what_stands_between_norm_and_projection_is_not_overlooked():
    clip = tiny_clip()

    class Shift(nn.Module):
        def forward(self, x):
            return x + 1e-2

    clip.visual_projection = nn.Sequential(Shift(), clip.visual_projection)
    with pytest.raises(interp.InterpError, match="no linear map of one normed position"):
        image_parts(clip, vision_tower(clip), pixels(clip))


# --- the texts ----------------------------------------------------------------------------------


def test_the_planted_head_is_described_by_its_text_and_by_nothing_else(report):
    row = report.table.set_index(["layer", "head"]).loc[PLANTED]
    assert row["text"] == TEXTS[TEXT]
    texts = report.tables["texts"].set_index(["layer", "head"]).loc[[PLANTED]]
    assert len(texts) == 1 and texts["explained"].iloc[0] > 0.999
    assert row["by_chance"] < 0.8  # one direction in 24, seven texts to choose from
    others = report.table.drop(index=report.table.index[(report.table["layer"] == PLANTED[0])
                                                        & (report.table["head"] == PLANTED[1])])  # fmt: skip
    first = (
        report.tables["texts"].query("rank == 0").set_index(["layer", "head"]).drop(index=PLANTED)
    )
    assert len(others) == 7 and first["explained"].max() < 0.9


def test_without_the_planted_weights_the_head_is_described_by_nothing_so_well(tmp_path):
    """The control: the same model before its head was planted."""
    found = clip_heads(
        [clip_folder(tmp_path, tiny_clip())], texts=TEXTS, n=48, layers=1, k=1, progress=False
    )
    assert found.table.set_index(["layer", "head"]).loc[PLANTED]["explained"] < 0.9


def test_text_span_takes_directions_in_the_order_of_their_variance():
    rng = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=rng))[0]
    codes = torch.linalg.qr(torch.randn(50, 3, generator=rng))[0]
    codes = torch.linalg.qr(codes - codes.mean(0))[0]  # uncorrelated over images
    sizes = torch.tensor([2.0, 3.0, 1.0])
    c = codes * sizes @ basis[:3] + 7 * basis[5]  # a mean changes nothing
    span = text_span(c, basis, 5)
    assert span.chosen == [1, 0, 2]  # and stops: no variance is left
    np.testing.assert_allclose(span.explained, [9 / 14, 13 / 14, 1], atol=1e-5)
    torch.testing.assert_close(span.rebuilt, c, atol=1e-4, rtol=1e-4)


def test_text_span_explains_more_with_every_text_and_all_with_enough():
    rng = torch.Generator().manual_seed(0)
    c, texts = torch.randn(30, 6, generator=rng), torch.randn(40, 6, generator=rng)
    span = text_span(c, texts, 6)
    assert sorted(span.explained) == span.explained and span.explained[-1] == pytest.approx(1)
    assert len(set(span.chosen)) == 6
    # the first is the text with most variance, by a plain loop over texts
    left = c - c.mean(0)
    assert span.chosen[0] == max(range(40), key=lambda j: float((left @ texts[j]).var()))


def test_directions_at_random_explain_what_chance_does_and_those_of_texts_more():
    rng = torch.Generator().manual_seed(0)
    texts = nn.functional.normalize(torch.randn(60, 64, generator=rng), dim=-1)
    codes = torch.randn(40, 5, generator=rng)
    anywhere = codes @ torch.linalg.qr(torch.randn(64, 5, generator=rng))[0].T
    along = codes @ texts[:5]
    assert sorted(text_span(along, texts, 5).chosen) == list(range(5))
    for c, least, most in ((anywhere, -0.1, 0.1), (along, 0.15, 1.0)):
        chance = by_chance(c, texts, 2, torch.Generator().manual_seed(1))
        assert least < text_span(c, texts, 2).explained[-1] - chance < most


def test_images_at_the_ends_of_a_text_are_those_with_the_largest_products(folder, report):
    rows = report.tables["images"].set_index(["layer", "head"]).loc[[PLANTED]]
    most = rows[rows["side"] == "most"]["along"]
    assert len(rows) == 6 and most.is_monotonic_decreasing and most.iloc[0] > 0


def test_a_head_that_says_the_same_of_every_image_has_no_text():
    assert text_span(torch.ones(5, 4), torch.eye(4), 3).chosen == []


# --- the report ---------------------------------------------------------------------------------


def test_shares_of_all_parts_sum_to_one(report):
    parts = report.tables["parts"]
    assert parts["share"].sum() == pytest.approx(1, abs=1e-4)
    assert len(parts) == 1 + 3 * (4 + 2)
    assert set(report.table["layer"]) == {1, 2}


def test_ablation_keeps_all_of_everything_and_none_of_nothing(report):
    rows = report.tables["ablation"].set_index("kept")
    assert rows.loc["everything", "variance"] == pytest.approx(1, abs=1e-4)
    assert rows.loc["everything", "same_text"] == 1
    assert rows.loc["nothing", "variance"] == pytest.approx(0, abs=1e-6)


def test_the_report_comes_back_and_is_drawn(report, tmp_path):
    assert report.figure("map").to_json() and report.figure("parts").to_json()
    loaded = interp.Report.load(report.save(tmp_path))
    assert loaded.table["text"].tolist() == report.table["text"].tolist()
    assert TEXTS[TEXT] in (tmp_path / "report.html").read_text()


def test_a_module_in_memory_gives_what_its_folder_gives(report):
    again = clip_heads(
        [planted()], tokenizer=word_tokenizer(), texts=TEXTS, n=48, layers=2, k=3, progress=False
    )
    assert again.table["text"].tolist() == report.table["text"].tolist()
    np.testing.assert_allclose(again.table["share"], report.table["share"], atol=1e-6)


def test_texts_are_embedded_as_the_model_compares_them():
    clip, tokenizer = tiny_clip(), word_tokenizer()
    found = text_embeddings(clip, tokenizer, TEXTS)
    alone = clip.get_text_features(**tokenizer(TEXTS[2], return_tensors="pt")).pooler_output
    torch.testing.assert_close(
        found[2], nn.functional.normalize(alone, dim=-1)[0], atol=1e-5, rtol=1e-4
    )  # padding changes the order of float32 sums
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(len(TEXTS)))


def test_texts_come_from_lists_and_files(tmp_path):
    bank = tmp_path / "bank.txt"
    bank.write_text("a dog\n\n a cat \na dog\n")
    assert text_bank([str(bank), "a line"]) == ["a dog", "a cat", "a line"]
    assert text_bank(str(bank)) == ["a dog", "a cat"]
    assert len(set(default_texts())) == len(default_texts()) > 40


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"texts": ["none.txt"]}, "no file of texts 'none.txt'"),
        ({"texts": []}, "no texts"),
        ({"k": 0}, "k=0"),
        ({"n": 3}, "n=3"),
        ({"images": "nowhere"}, "no folder 'nowhere'"),
    ],
)
def test_what_cannot_be_done_is_told(folder, options, words):
    with pytest.raises(interp.InterpError) as told:
        clip_heads([folder], progress=False, **{"texts": TEXTS, **options})
    assert words in str(told.value)


def test_the_command_describes_a_checkpoint(run, folder, tmp_path):
    bank = tmp_path / "bank.txt"
    bank.write_text("\n".join(TEXTS))
    out = tmp_path / "out"
    code, shown, err = run("clip-heads", folder, "--texts", bank, "--n", 24, "--k", 2, "--out", out)
    assert code == 0, err
    assert TEXTS[TEXT] in shown and Path(out / "report.html").exists()
