"""`interp sae train | eval | features | show`: from a text file to a page, bad input, kills and damage."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

import interp
from interp import cli
from probes.saes import commands, train
from probes.saes.commands import TRAINING, disk_needed, sae_train
from probes.saes.interop import load_sae, save_sae
from probes.saes.model import SAE, SAEConfig
from probes.saes.training import Training

TRAIN = ("--site", "z.1", "--d-sae", 32, "--k", 4, "--tokens", 700, "--context", 24)
TRAIN += ("--batch-size", 100, "--shard-mb", 0.2, "--store-dtype", "float32")
"""A store of several shards and 28 steps."""

Shell = Callable[..., tuple[int, str, str]]
WORDS = ["cat", "mat", "owl", "fog", "hat", "sun", "box", "jam", "ink", "elk", "yak", "urn"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A text file of twelve documents."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    documents = [f"the {word} sat by an old {word}, and so on. " * 4 for word in WORDS]
    path.write_text("\n\n\n".join(documents))
    return path


@pytest.fixture
def trained(run, folder, text, tmp_path) -> Path:
    out = tmp_path / "z1"
    code, _, err = run("sae", "train", folder, text, *TRAIN, "--out", out)
    assert code == 0, err
    return out


def told(err: str) -> str:
    """The last line: the error. Before it stand estimates."""
    assert "Traceback" not in err
    return err.strip().split("\n")[-1]


def test_from_a_text_to_a_page(run, folder, text, tmp_path, caplog):
    out = tmp_path / "z1"
    caplog.set_level("INFO", logger="interp")
    code, shown, err = run("sae", "train", folder, text, *TRAIN, "--out", out)
    assert code == 0, err
    first = [record.message for record in caplog.records][:2]
    assert "MB" in first[0] and "MB on disk" in first[1] and "fvu" in shown
    kept = {path.name for path in out.iterdir()}
    assert {"activations", "training", "sae", "report.html", "curve.parquet"} <= kept
    assert not (out / ".partial").exists()
    sae = load_sae(out / "sae")
    assert (sae.config.d_sae, sae.config.k, sae.config.site) == (32, 4, "z.1")
    report = interp.Report.load(out)
    assert len(report.tables["curve"]) == 28 and report.meta["disk_estimate_mb"] >= 0
    assert report.meta["data"]["text"]["name"] == str(text)

    code, shown, err = run("sae", "eval", folder, out, "--windows", 4, "--out", tmp_path / "judged")
    assert code == 0, err
    assert all(name in shown for name in ("clean", "sae", "zero", "mean"))
    judged = interp.Report.load(tmp_path / "judged")
    # The same held-out rows, once stored and once judged.
    assert judged.table["fvu"][0] == pytest.approx(report.table["fvu"][0], rel=1e-6)

    pages = tmp_path / "features"
    code, shown, err = run("sae", "features", folder, out, "--ablate", 3, "--out", pages)
    assert code == 0, err
    features = interp.Report.load(pages)
    assert len(features.table) == 32 and features.meta["ablated"] == 3
    pd.testing.assert_frame_equal(features.tables["curve"], report.tables["curve"])
    assert not (pages / ".partial").exists()

    page = (pages / "report.html").read_bytes()
    (pages / "report.html").unlink()
    code, again, err = run("sae", "show", pages)
    assert code == 0, err
    assert (pages / "report.html").read_bytes() == page
    assert again.split("open ")[0].strip() == shown.split("\n" + shown.split("\n")[-3])[0].strip()
    assert run("show", out)[0] == 0


def test_another_text_is_read_for_the_time_being(run, folder, text, trained, tmp_path):
    out = tmp_path / "features"
    arguments = (
        "sae",
        "features",
        folder,
        trained / "sae",
        text,
        "--features",
        "3,5",
        "--tokens",
        200,
    )
    code, _, err = run(*arguments, "--context", 16, "--out", out)
    assert code == 0, err
    report = interp.Report.load(out)
    assert report.table["feature"].tolist() == [3, 5]
    assert report.meta["text"]["name"] == str(text)
    assert {path.name for path in out.iterdir() if path.is_dir()} == set()
    code, _, err = run("sae", "eval", folder, trained / "sae", text, "--tokens", 200, "--context", 16,
                       "--out", tmp_path / "judged")  # fmt: skip
    assert code == 0, err


def test_the_browser_is_asked_for_the_page(run, trained, monkeypatch):
    asked = []
    monkeypatch.setattr(cli.webbrowser, "open", asked.append)
    assert run("sae", "show", trained, "--open")[0] == 0
    assert asked == [(trained / "report.html").resolve().as_uri()]


# --- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--d-sae", 16, "--k", 32), "k=32 latents cannot be active of d_sae=16"),
        (("--activation", "topc"), "did you mean 'topk'"),
        (
            ("--prefixes", "4,8", "--k", 2, "--d-sae", 16),
            "the last of prefixes=[4, 8] must be d_sae=16",
        ),
        (("--site", "zz.1"), "no site 'zz'"),
        (("--epochs", 0), "epochs=0"),
        (("--precision", "float8"), "no precision 'float8'"),
        (("--store-dtype", "float23"), "did you mean 'float32'"),
    ],
)
def test_options_are_told_before_the_model_is_loaded(run, text, tmp_path, options, words):
    code, _, err = run(
        "sae", "train", tmp_path / "no-model", text, *options, "--out", tmp_path / "o"
    )
    assert code == 2 and words in told(err)


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "has no text in it"), (" \n\n\n ", "has no text in it"), (None, "no file")],
)
def test_an_empty_or_missing_text_is_told_before_the_model_is_loaded(run, tmp_path, content, words):
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_text(content)
    for command in (("train",), ("eval", tmp_path), ("features", tmp_path)):
        first, *rest = command
        code, _, err = run(
            "sae", first, tmp_path / "no-model", *rest, path, "--out", tmp_path / "o"
        )
        assert code == 2 and words in told(err)


def test_a_text_without_a_name_is_not_the_folder_one_stands_in(run, folder, tmp_path):
    code, _, err = run("sae", "train", folder, "", *TRAIN, "--out", tmp_path / "o")
    assert code == 2 and "no text is named" in told(err)


def test_a_text_shorter_than_a_context_is_told(run, folder, tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("a few words")
    code, _, err = run(
        "sae", "train", folder, path, "--site", "z.1", "--context", 32, "--out", tmp_path / "o"
    )
    assert code == 2 and "has 11 tokens in 1 documents, less than one context of 32" in told(err)


def test_what_does_not_fit_is_told_before_anything_is_computed(
    run, folder, text, tmp_path, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("activations were collected")

    monkeypatch.setattr(commands, "collect_activations", never)
    arguments = ("sae", "train", folder, text, *TRAIN, "--out", tmp_path / "o")
    with monkeypatch.context() as small:
        small.setattr(train, "_free_memory", lambda: 1000)
        code, _, err = run(*arguments)
        assert code == 2 and "smaller d_sae" in told(err)
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        code, _, err = run(*arguments)
        assert code == 2 and "on disk" in told(err) and "fewer tokens" in told(err)


def test_the_disk_estimate_holds(trained):
    report = interp.Report.load(trained)
    width = report.meta["sae"]["d_in"]
    needed = disk_needed(SAEConfig(width, 32, "topk", 4), round(700 * 1.15), 4)
    parts = ("activations", "training", "sae")
    taken = sum(f.stat().st_size for part in parts for f in (trained / part).rglob("*"))
    # The checkpoint is there twice while it is replaced; indices and token ids come on top.
    assert taken < 1.1 * needed < 2.2 * taken


def test_an_sae_of_another_model_or_site_is_refused(run, folder, text, trained, tmp_path):
    other = tmp_path / "other"
    save_sae(SAE(SAEConfig(d_in=8, d_sae=16, k=2, site="z.0")), other)
    code, _, err = run("sae", "eval", folder, other, text, "--out", tmp_path / "o")
    assert code == 2 and "another model or site" in told(err)
    config = json.loads((trained / "sae" / "cfg.json").read_text())
    config["metadata"]["interp"]["sha256"] = "f" * 64
    (trained / "sae" / "cfg.json").write_text(json.dumps(config))
    code, _, err = run("sae", "features", folder, trained, "--out", tmp_path / "o")
    assert code == 2 and "was trained on" in told(err)
    code, _, err = run("sae", "features", folder, tmp_path / "nothing", "--out", tmp_path / "o")
    assert code == 2 and "no SAE at" in told(err)
    save_sae(SAE(SAEConfig(d_in=8, d_sae=16, k=2)), tmp_path / "unknown")
    code, _, err = run("sae", "eval", folder, tmp_path / "unknown", text, "--out", tmp_path / "o")
    assert code == 2 and "does not say its site" in told(err)


def test_without_activations_beside_it_a_text_is_asked_for(run, folder, trained, tmp_path):
    moved = tmp_path / "elsewhere" / "sae"
    shutil.copytree(trained / "sae", moved)
    code, _, err = run("sae", "features", folder, moved, "--out", tmp_path / "o")
    assert code == 2 and "give a text to read" in told(err)


def test_a_folder_without_a_report_is_told(run, tmp_path):
    code, _, err = run("sae", "show", tmp_path)
    assert code == 2 and "no report in" in told(err)


# --- kills and damage ------------------------------------------------------------------------------


def test_interrupted_training_goes_on_with_the_same_curve(
    run, folder, text, trained, tmp_path, monkeypatch
):
    out, real = tmp_path / "killed", Training.step
    monkeypatch.setattr(
        commands, "train_sae", lambda *a, **o: train.train_sae(*a, checkpoint_every=5, **o)
    )

    def dying(self, x):
        if self.done == 17:
            raise KeyboardInterrupt
        real(self, x)

    arguments = ("sae", "train", folder, text, *TRAIN, "--out", out)
    with monkeypatch.context() as killing:
        killing.setattr(Training, "step", dying)
        code, _, err = run(*arguments)
    assert code == 130 and "--resume" in told(err) and str(out) in told(err)
    assert (out / TRAINING).exists() and not (out / "report.json").exists()
    steps: list[int] = []

    def counting(self, x):
        steps.append(self.done)
        real(self, x)

    monkeypatch.setattr(Training, "step", counting)
    assert run(*arguments, "--resume")[0] == 0
    assert steps == list(range(15, 28))
    curves = [interp.Report.load(path).tables["curve"] for path in (trained, out)]
    pd.testing.assert_frame_equal(*curves)


def test_a_damaged_shard_is_named_and_made_again(run, folder, text, trained, caplog):
    shard = sorted((trained / "activations" / "train").glob("shard-*"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8] + bytes(byte ^ 1 for byte in whole[-8:]))
    code, _, err = run("sae", "features", folder, trained, "--out", trained / "features")
    assert code == 2 and shard.name in told(err)
    with caplog.at_level("WARNING", logger="interp"):
        code, _, err = run("sae", "train", folder, text, *TRAIN, "--out", trained, "--resume")
    assert code == 0, err
    assert "shard 1 of" in caplog.text and shard.read_bytes() == whole


def test_other_activations_in_the_folder_are_refused(run, folder, text, trained):
    arguments = ["sae", "train", folder, text, *TRAIN, "--out", trained]
    arguments[arguments.index(24)] = 16
    code, _, err = run(*arguments)
    assert code == 2 and "context" in told(err) and "another folder" in told(err)


def test_python_and_shell_are_one(folder, text, trained):
    model = interp.load(folder)
    report = sae_train(
        model, text, site="z.1", d_sae=32, k=4, tokens=700, context=24, batch_size=100,
        shard_mb=0.2, store_dtype="float32", progress=False,
    )  # fmt: skip
    saved = interp.Report.load(trained)
    for name, table in saved.tables.items():
        pd.testing.assert_frame_equal(report.tables[name], table)
