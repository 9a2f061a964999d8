"""Evidence of features: a planted token's contexts are that token's, everything agrees with a plain
reference, an interrupted pass goes on, and the page carries what the report says."""

import base64
import gzip
import json
import re
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from interp.data.activations import Activations, collect_activations, origins, windows
from interp.errors import BadInput
from interp.figures import sae_page
from interp.metrics import token_loss
from interp.models.model import Model
from interp.report import Report
from interp.run.progress import Progress
from probes.saes import evidence
from probes.saes.evidence import BINS
from probes.saes.features import feature_words, sae_features
from probes.saes.model import SAE, SAEConfig
from probes.saes.splice import lead_spared, splice
from probes.saes.train import train_sae
from probes.saes.written import feature_logits
from tests.families import FAMILIES

SITE = {"site": "z.1", "heads": 4}


def texts(n: int = 24, length: int = 50, seed: int = 10) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 40, (length + i,), generator=g) for i in range(n)]


def collected(model, folder: Path, site: str = "z.1", **changed) -> Activations:
    options = {"tokens": 600, "held_out": 0.2, "context": 24, "dtype": "float32", "shard_mb": 0.02}
    return collect_activations(
        model, texts(), folder, site=site, progress=False, **(options | changed)
    )


def random_sae(kind: str = "topk", d_sae: int = 48) -> SAE:
    return SAE(SAEConfig(d_in=32, d_sae=d_sae, activation=kind, k=5, **SITE), seed=3).eval()


@pytest.fixture
def data(tiny, tmp_path) -> Activations:
    return collected(tiny, tmp_path / "activations")


def test_contexts_of_a_planted_token_are_that_tokens(tiny, tmp_path):
    """At resid_pre.0 of a model without learned positions an activation is a token's embedding."""
    data = collected(tiny, tmp_path, "resid_pre.0")
    planted, W = 17, tiny.W_E.detach()
    sae = SAE(SAEConfig(d_in=32, d_sae=6, activation="relu", site="resid_pre.0"))
    with torch.no_grad():
        sae.encoder[:] = 0
        sae.encoder[4] = W[planted]
        others = (W @ W[planted])[torch.arange(len(W)) != planted].max()
        own = W[planted] @ W[planted]
        sae.b_enc[:] = -(own + others) / 2
    assert others < own
    report = sae_features(tiny, sae, data, contexts=5, around=3, ablate=2, progress=False)
    ids = torch.cat([ids[int(data.train.key["lead"]) :] for ids in windows(data.train)])
    row = report.table.set_index("feature").loc[4]
    assert row["fired"] == int((ids == planted).sum()) > 5
    assert row["top_token"] == f"#{planted}"
    lines = report.tables["contexts"]
    assert set(lines["feature"]) == {4} and len(lines) == 5 and lines["document"].is_unique
    at = lines["start"] + lines["peak"]
    assert (report.arrays["text_ids"][at] == planted).all()
    near = report.arrays["context_activations"]
    for line, values in zip(lines.to_dict("records"), near, strict=True):
        shown = report.arrays["text_ids"][line["start"] : line["start"] + line["length"]]
        assert ((values[: line["length"]] > 0) == (shown == planted)).all()
    rest = report.table[report.table["feature"] != 4]
    assert (rest["fired"] == 0).all() and rest["max"].isna().all()
    # It alone is ever active, so it alone can be taken out.
    assert report.table["ablation_effect"].notna().tolist() == [False] * 4 + [True, False]


def test_a_feature_of_one_head_is_that_heads(tiny, data):
    sae = random_sae("relu", 8)
    with torch.no_grad():
        for weight in (sae.W_dec, sae.encoder):
            kept = weight[5, 16:24].clone()
            weight[5] = 0
            weight[5, 16:24] = kept
    report = sae_features(tiny, sae, data, ablate=0, loss_windows=0, progress=False)
    row = report.table.loc[5]
    assert (row["head"], row["head_share"]) == (2, 1.0)
    lines = report.tables["contexts"].query("feature == 5")
    x = data.train.rows(torch.arange(data.train.n_rows))
    assert lines["activation"].max() == pytest.approx(
        float((x[:, 16:24] @ sae.encoder[5, 16:24]).max().detach()), rel=1e-5
    )


@pytest.mark.parametrize("kind", ["topk", "relu"])
@pytest.mark.parametrize("block", [50, 10_000])
def test_evidence_is_what_a_plain_reference_finds(tiny, data, kind, block, monkeypatch):
    """All latents at once, one feature at a time; in one block, and in many that are merged."""
    monkeypatch.setattr(evidence, "BLOCK_ROWS", block)
    monkeypatch.setattr(evidence, "LATENTS_AT_ONCE", 48 * 64)
    sae, store, k, around = random_sae(kind), data.train, 4, 5
    assert len(store.shards) > 2
    report = sae_features(
        tiny, sae, data, contexts=k, around=around, ablate=0, loss_windows=0, progress=False
    )
    f = sae.encode(store.rows(torch.arange(store.n_rows))).detach().numpy()
    origin = origins(store, torch.arange(store.n_rows))
    table, lines, given = report.table, report.tables["contexts"], report.arrays
    np.testing.assert_array_equal(table["fired"], (f > 0).sum(0))
    np.testing.assert_allclose(table["max"].fillna(0), f.max(0), rtol=1e-5)
    np.testing.assert_allclose(
        table["mean"].fillna(0) * table["fired"], f.sum(0), rtol=1e-4, atol=1e-4
    )
    for i in range(f.shape[1]):
        edges = 2.0 ** given["histogram_exponent"][i] * np.arange(BINS + 1) / BINS
        active = f[:, i][f[:, i] > 0]
        if len(active):
            assert edges[-1] > active.max() >= edges[-1] / 2
            counts, _ = np.histogram(active, edges)
            # A value within rounding of an edge may lie on either side of it.
            assert np.abs(counts - given["histogram"][i]).sum() <= 2
        best = pd.Series(f[:, i]).groupby(origin["document"]).max().sort_values(ascending=False)
        best = best[best > 0].head(k)
        mine = lines[lines["feature"] == i]
        np.testing.assert_allclose(mine["activation"], best, rtol=1e-5)
        assert sorted(mine["rank"]) == list(range(len(best)))
        for place, line in zip(mine.index, mine.to_dict("records"), strict=True):
            here = origin[origin["window"] == line["window"]]
            peak = here.index[here["position"] == line["position"]][0]
            rows = [r for r in range(peak - around, peak + around + 1) if r in here.index]
            where = slice(line["start"], line["start"] + line["length"])
            assert given["text_ids"][where].tolist() == origin["token_id"][rows].tolist()
            assert given["text_token"][where].tolist() == origin["token"][rows].tolist()
            assert rows[line["peak"]] == peak and line["length"] == len(rows)
            np.testing.assert_allclose(
                given["context_activations"][place, : len(rows)], f[rows, i], rtol=1e-4, atol=1e-5
            )
            assert not given["context_activations"][place, len(rows) :].any()


def test_removal_is_splicing_without_the_feature_error_kept(tiny, data):
    sae = random_sae()
    report = sae_features(tiny, sae, data, contexts=5, ablate=3, loss_windows=0, progress=False)
    lines = report.tables["contexts"].dropna(subset="ablation_effect")
    assert lines["feature"].nunique() == 3 and lines["rank"].max() == 3
    lead = int(data.train.key["lead"])
    every = windows(data.train)
    for line in lines.to_dict("records"):
        ids = every[line["window"]][None]

        def change(f, seen, feature=line["feature"]):
            return f.index_fill(-1, torch.tensor([feature]), 0.0)

        where = lead_spared(None, lead, ids.shape)
        edit = splice(sae, tiny, change=change, keep_error=True, positions=where)
        clean, changed = (
            token_loss(tiny.run(ids, edits=edits).logits[:, :-1], ids[:, 1:])[0]
            for edits in ([], [edit])
        )
        rise = (changed - clean)[lead:]
        # float32: a sum of 24 differences of losses of about 5
        assert line["ablation_effect"] == pytest.approx(float(rise.sum()), abs=2e-4)
        if line["position"] < ids.shape[1] - 1:
            peak = float(rise[line["position"] - lead])
            assert line["ablation_at_peak"] == pytest.approx(peak, abs=5e-5)
    means = lines.groupby("feature")["ablation_effect"].mean()
    found = report.table.set_index("feature")["ablation_effect"].dropna()
    pd.testing.assert_series_equal(found, means, check_names=False)


def test_words_are_the_largest_logits_of_the_direct_path(tiny, data):
    sae = random_sae()
    report = sae_features(tiny, sae, data, words=3, ablate=0, loss_windows=0, progress=False)
    logits = feature_logits(tiny, sae, torch.arange(48)).detach()
    best = logits.topk(3)
    np.testing.assert_array_equal(report.arrays["up_ids"], best.indices)
    np.testing.assert_allclose(report.arrays["up_logits"], best.values, rtol=1e-4)
    np.testing.assert_allclose(report.arrays["down_logits"], -(-logits).topk(3).values, rtol=1e-4)


def test_only_the_features_asked_for(tiny, data):
    sae = random_sae()
    whole = sae_features(tiny, sae, data, ablate=0, loss_windows=0, progress=False)
    some = sae_features(tiny, sae, data, features=[30, 2], loss_windows=0, progress=False)
    assert some.table["feature"].tolist() == [2, 30]
    columns = ["feature", "fired", "max", "head", "up", "top_token"]
    wanted = whole.table.loc[[2, 30], columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(some.table[columns], wanted)
    assert some.table["ablation_effect"].notna().all()
    with pytest.raises(BadInput, match="no feature 48"):
        sae_features(tiny, sae, data, features=[48])
    with pytest.raises(BadInput, match="contexts=0"):
        sae_features(tiny, sae, data, contexts=0)


def test_an_interrupted_pass_goes_on(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "BLOCK_ROWS", 60)
    sae = random_sae()
    options = {"contexts": 3, "ablate": 2, "loss_windows": 0, "progress": False}
    whole = sae_features(tiny, sae, data, **options)
    real, calls = evidence._of_block, []

    def dying(*arguments):
        calls.append(arguments[3])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(evidence, "_of_block", dying)
    with pytest.raises(KeyboardInterrupt):
        sae_features(tiny, sae, data, checkpoint=tmp_path / "kept", **options)
    again = sae_features(tiny, sae, data, checkpoint=tmp_path / "kept", resume=True, **options)
    assert len(calls) == len(set(calls)) + 1
    for name, table in whole.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table)
    changed = options | {"contexts": 4}
    with pytest.raises(BadInput, match="cannot resume"):
        sae_features(tiny, sae, data, checkpoint=tmp_path / "kept", resume=True, **changed)


def test_contexts_come_from_distinct_windows_where_documents_are_few(tiny, tmp_path):
    one_book = [torch.cat(texts()), torch.cat(texts(seed=3))]
    data = collect_activations(
        tiny, one_book, tmp_path, site="z.1", tokens=500, held_out=0.5, context=24, progress=False
    )
    report = sae_features(tiny, random_sae(), data, contexts=4, ablate=0, progress=False)
    lines = report.tables["contexts"]
    assert report.meta["distinct"] == "window" and lines["document"].nunique() == 1
    assert not lines.duplicated(["feature", "window"]).any()
    assert lines.groupby("feature").size().max() == 4


def test_an_sae_that_is_never_active_has_no_contexts(tiny, data, tmp_path):
    sae = random_sae()
    with torch.no_grad():
        sae.b_enc[:] = -1e6
    report = sae_features(tiny, sae, data, ablate=3, progress=False)
    assert (report.table["fired"] == 0).all() and report.table["ablation_effect"].isna().all()
    assert len(report.tables["contexts"]) == 0
    assert report.to_html() and Report.load(report.save(tmp_path / "report")).to_html()


def test_an_sae_of_a_residual_site_has_no_heads_but_words(tiny, tmp_path):
    data = collected(tiny, tmp_path, "resid_post.0")
    sae = SAE(SAEConfig(d_in=32, d_sae=16, k=3, site="resid_post.0"))
    report = sae_features(tiny, sae, data, ablate=2, progress=False)
    assert "heads" not in report.arrays and "head" not in report.table
    assert report.table["up"].str.startswith("#").all()
    assert report.table["ablation_effect"].notna().sum() == 2
    assert report.to_html()


def test_a_site_without_a_path_to_the_logits_says_so(tiny, tmp_path):
    data = collected(tiny, tmp_path, "mlp_post.0")
    sae = SAE(SAEConfig(d_in=data.train.width, d_sae=16, k=3, site="mlp_post.0"))
    report = sae_features(tiny, sae, data, ablate=0, progress=False)
    assert "mlp_post.0" in report.meta["skipped"]["logits"] and "up" not in report.table
    assert "No logits" in report.to_html()


# --- the page --------------------------------------------------------------------------------------


def unpacked(html: str) -> tuple[dict, dict[str, np.ndarray]]:
    """What the page carries, read as its script reads it."""
    packed = re.search(r'<script type="text/plain" id="data">([^<]*)</script>', html)
    assert packed
    raw = gzip.decompress(base64.b64decode(packed[1]))
    (length,) = struct.unpack("<I", raw[:4])
    header, at, arrays = json.loads(raw[4 : 4 + length]), 4 + length, {}
    for name, kind, shape in header["arrays"]:
        size = int(np.prod(shape)) * int(kind[1:])
        arrays[name] = np.frombuffer(raw[at : at + size], "<" + kind).reshape(shape)
        at += size
    assert at == len(raw)
    return header, arrays


def test_the_page_carries_the_report_in_bytes(tiny, data):
    report = sae_features(tiny, random_sae(), data, contexts=4, ablate=3, progress=False)
    header, given = unpacked(report.to_html())
    table, lines = report.table, report.tables["contexts"]
    np.testing.assert_allclose(given["density"], table["density"], rtol=1e-6)
    assert given["first"].tolist() == [
        int((lines["feature"] < i).sum()) for i in range(len(table) + 1)
    ]
    near = report.arrays["context_activations"]
    largest = table["max"].to_numpy()[lines["feature"]][:, None]
    # Half of one of 255 steps, and a little for rounding; what is not zero does not become it.
    close = np.abs(given["near"] / 255 * largest - near) <= 0.503 / 255 * largest
    assert (close | (given["near"] == 1)).all()
    assert ((given["near"] > 0) == (near > 0)).all()
    texts_of = [header["tokens"][i] for i in given["text"]]
    assert texts_of == [f"#{i}" for i in report.arrays["text_ids"]]
    ups = np.array(header["tokens"])[given["up_token"]]
    assert (ups[:, 0] == table["up"]).all()
    logits = given["up_logit"] / 127 * given["up_scale"][:, None]
    steps = given["up_scale"][:, None] / 127
    assert (np.abs(logits - report.arrays["up_logits"]) <= 1.01 * steps).all()
    run = np.searchsorted(given["run"], given["start"], side="right") - 1
    first = given["run_token"][run] + given["start"] - given["run"][run]
    assert (given["run_document"][run] == lines["document"]).all()
    assert (first + given["peak"] == lines["token"]).all()
    assert np.isnan(given["ablation_effect"]).sum() == len(table) - 3


def test_tokens_stay_text_and_nothing_is_fetched(tiny, data):
    report = sae_features(tiny, random_sae(), data, ablate=0, progress=False)
    report.tables["tokens"]["text"] = "</script><img src=x onerror=alert(1)>"
    html = report.to_html()
    addresses = set(re.findall(r"https?://[^\"' ]+", html))
    assert "onerror" not in html and addresses <= {"http://www.w3.org/2000/svg"}
    assert html.count("<script") == 2 and "default-src 'none'" in html


def test_a_small_byte_is_not_nothing():
    packed = sae_page._bytes(np.array([[1000.0, 0.1, 0.0]]), np.array([1000.0]), np.uint8)
    assert packed.tolist() == [[255, 1, 0]]
    signed = sae_page._bytes(np.array([[-5.0, 0.001, 5.0]]), np.array([5.0]), np.int8)
    assert signed.tolist() == [[-127, 1, 127]]


# --- the default model -----------------------------------------------------------------------------


def test_features_of_the_default_model(smollm, tmp_path):
    """A small SAE of z.12 on prose: what is shown is consistent, and heads and words are there."""
    prose = Path(evidence.__file__).parents[2] / "interp/data/prose.txt"
    paragraphs = prose.read_text(encoding="utf-8").split("\n\n")
    documents = ["\n\n".join(paragraphs[i : i + 12]) for i in range(0, 240, 12)]
    data = collect_activations(
        smollm, documents, tmp_path / "z", site="z.12", tokens=1200, context=40, progress=False
    )
    sae, _ = train_sae(data, d_sae=768, k=16, epochs=4, batch_size=300, progress=False)
    report = sae_features(smollm, sae, data, contexts=4, ablate=2, loss_windows=2, progress=False)
    table, lines = report.table, report.tables["contexts"]
    assert len(table) == 768 and report.arrays["heads"].shape == (768, 9)
    assert report.arrays["heads"].sum(1) == pytest.approx(np.ones(768), abs=1e-4)
    text = report.tables["tokens"].set_index("token_id")["text"]
    best = lines[lines["rank"] == 0].set_index("feature")
    shown = text.loc[report.arrays["text_ids"][best["start"] + best["peak"]]].to_numpy()
    assert (table.loc[best.index, "top_token"] == shown).all()
    assert table["ablation_effect"].notna().sum() == 2
    assert set(report.tables["loss"]["condition"]) == {"clean", "sae", "zero", "mean"}
    saved = Report.load(report.save(tmp_path / "report"))
    assert unpacked(saved.to_html())[1]["near"].shape == report.arrays["context_activations"].shape


@pytest.mark.parametrize("name", ["gpt2", "granite"])
def test_words_pass_the_final_norm_as_the_model_has_it(name):
    """A LayerNorm centres before its gain; Granite scales its logits: the same tokens and sizes as feature_logits."""
    model = Model(FAMILIES[name](), id=name)
    heads = model.spec.blocks[1].n_heads
    width = heads * model.spec.blocks[1].d_head
    sae = SAE(SAEConfig(d_in=width, d_sae=64, k=4, site="z.1", heads=heads))
    chosen = torch.arange(64)
    with Progress(False) as bars:
        found = feature_words(model, sae, chosen, 3, bars)
    best = feature_logits(model, sae, chosen).topk(3, dim=1)
    np.testing.assert_array_equal(found["up_ids"], best.indices)
    np.testing.assert_allclose(found["up_logits"], best.values, rtol=1e-5)
