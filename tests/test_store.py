"""The activation store: every row once, the same under a seed, mended after kills and damage, and
each row is what the model computes at the place that the store says."""

import bz2
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch

import interp
import interp.data.activations as activations_module
from interp.data.activations import Activations, collect_activations, origins, windows
from interp.data.texts import WIKIPEDIA_FILE, documents, plain_text, wikipedia_articles
from interp.errors import BadInput
from interp.run.store import ActivationStore, MemoryRows, write_store
from tests.ground_truth.induction_model import character_tokenizer, induction_model

ROWS = [5, 7, 4]


def rows_of(number: int) -> torch.Tensor:
    """Rows 100·shard, 100·shard + 1, …, the same number in all three columns."""
    return (100.0 * number + torch.arange(ROWS[number]))[:, None].repeat(1, 3)


def make(folder: Path, **changed) -> ActivationStore:
    options = {"key": {"seed": 0}, "shard_rows": ROWS, "width": 3, "make": rows_of}
    return write_store(folder, **{**options, **changed})


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return make(tmp_path / "store")


def test_an_epoch_is_every_row_once_and_the_same_again(store):
    all_rows = torch.cat([rows_of(n)[:, 0] for n in range(3)])
    for source in (store, MemoryRows(store.rows(torch.arange(16)))):
        for epoch in (0, 1):
            seen = torch.cat(list(source.batches(4, seed=3, epoch=epoch)))
            again = torch.cat(list(source.batches(4, seed=3, epoch=epoch)))
            assert torch.equal(seen, again)
            assert torch.equal(seen[:, 0].sort().values, all_rows)
        first, second = (torch.cat(list(source.batches(4, epoch=epoch))) for epoch in (0, 1))
        assert not torch.equal(first, second)
        assert not torch.equal(first, torch.cat(list(source.batches(4, seed=1))))


def test_the_reading_state_is_seed_epoch_and_batches_read(store):
    whole = list(store.batches(3, seed=1, epoch=2))
    assert len(whole) == 5  # of 16 rows, one is left over
    for skip in range(6):
        rest = list(store.batches(3, seed=1, epoch=2, skip=skip))
        assert len(rest) == 5 - min(skip, 5)
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[skip:], strict=True))


def test_shards_before_the_cursor_are_not_read(store):
    list(store.batches(16, skip=1))
    assert not store._verified


def test_what_is_finished_is_not_made_again(tmp_path):
    made = []
    make(tmp_path, made=lambda number, why: made.append((number, why)))
    make(tmp_path, made=lambda number, why: made.append((number, why)))
    assert made == [(0, "made"), (1, "made"), (2, "made"), (0, "kept"), (1, "kept"), (2, "kept")]


@pytest.mark.parametrize("damage", ["a byte", "cut", "gone"])
def test_a_damaged_shard_is_named_and_made_again(tmp_path, damage):
    whole = make(tmp_path).rows(torch.arange(16))
    path = tmp_path / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "a byte" else content[:-5])
    with pytest.raises(BadInput, match=r"shard-00001\.safetensors is damaged or gone"):
        ActivationStore(tmp_path).rows(torch.arange(16))
    made = []
    mended = make(tmp_path, made=lambda number, why: made.append((number, why)))
    assert made == [(0, "kept"), (1, "rebuilt"), (2, "kept")]
    assert torch.equal(mended.rows(torch.arange(16)), whole)


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from interp.run import store
ROWS, when, write = [5, 7, 4], sys.argv[2], store.write_atomically
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def rows(number):
    if number == 1 and when == "while making":
        die()
    return (100.0 * number + torch.arange(ROWS[number]))[:, None].repeat(1, 3)
def writing(path, content):
    write(path, content)
    if path.name == "shard-00001.safetensors":
        die()
if when == "before the index":
    store.write_atomically = writing
store.write_store(Path(sys.argv[1]), key={"seed": 0}, shard_rows=ROWS, width=3, make=rows)
"""


@pytest.mark.parametrize("when", ["while making", "before the index"])
def test_a_killed_writer_loses_one_shard_and_repeats_none(tmp_path, when):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), when], check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(BadInput, match="2 of 3 shards are missing"):
        ActivationStore(tmp_path)
    made = []
    store = make(tmp_path, made=lambda number, why: made.append((number, why)))
    assert made == [(0, "kept"), (1, "made"), (2, "made")]
    assert torch.equal(store.rows(torch.arange(16)), torch.cat([rows_of(n) for n in range(3)]))


def test_another_store_is_refused_and_kept(tmp_path):
    make(tmp_path)
    with pytest.raises(BadInput, match="made with seed=0, now 1 is wanted"):
        make(tmp_path, key={"seed": 1})
    assert ActivationStore(tmp_path).n_rows == 16
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="other files"):
        make(tmp_path / "other")
    with pytest.raises(BadInput, match=r"no activation store in .*nothing"):
        ActivationStore(tmp_path / "nothing")


def test_values_that_do_not_fit_are_not_stored(tmp_path):
    with pytest.raises(BadInput, match="give dtype='bfloat16'"):
        make(tmp_path / "a", make=lambda n: rows_of(n) * 1e5)
    assert make(tmp_path / "b", make=lambda n: rows_of(n) * 1e5, dtype="bfloat16").n_rows == 16
    with pytest.raises(BadInput, match="NaN or infinite"):
        make(tmp_path / "c", make=lambda n: rows_of(n) * torch.nan)
    with pytest.raises(BadInput, match="did you mean 'float16'"):
        make(tmp_path / "d", dtype="float61")


# --- activations -----------------------------------------------------------------------------------

TEXT = [torch.arange(5, 5 + n) for n in (40, 33, 9, 41, 3, 38, 50, 36, 44, 37, 35, 39)]


def collected(model, folder, **changed) -> Activations:
    options = {"site": "z.1", "tokens": 250, "context": 16, "shard_mb": 0.006, "progress": False}
    return collect_activations(model, TEXT, folder, **{**options, **changed})


def test_rows_are_what_the_model_computes_at_their_origin(tiny, tmp_path):
    made = collected(tiny, tmp_path, dtype="float32")
    for store in (made.train, made.held_out):
        table = origins(store, torch.arange(store.n_rows))
        rows = store.rows(torch.arange(store.n_rows))
        texts = windows(store)
        for window, mine in table.groupby("window"):
            ids = texts[int(window)]
            z = tiny.run(ids[None], capture=["z.1"], logits=False).cache["z.1"][0].flatten(-2)
            # float32, and a padded batch adds in another order than one row alone
            torch.testing.assert_close(
                rows[torch.tensor(mine["row"].tolist())], z[1:], atol=1e-5, rtol=1e-5
            )
        for row in table.itertuples():
            assert int(TEXT[row.document][row.token]) == row.token_id
    assert made.train.n_rows == 250 and len(made.train.shards) > 3
    assert made.train.key["lead"] == 1 and made.train.key["heads"] == 4


def test_no_document_is_on_both_sides_and_shards_mix_documents(tiny, tmp_path):
    made = collected(tiny, tmp_path)
    sides = [
        set(origins(store, torch.arange(store.n_rows))["document"])
        for store in (made.train, made.held_out)
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    first = origins(made.train, torch.arange(made.train.shards[0]["rows"]))
    assert first["document"].nunique() > 1
    again = Activations.open(tmp_path)
    assert again.train.n_rows == made.train.n_rows


def test_the_same_seed_gives_the_same_store(tiny, tmp_path):
    one, same, other = (
        collected(tiny, tmp_path / str(i), seed=seed).train for i, seed in enumerate((0, 0, 1))
    )
    assert [s["sha256"] for s in one.shards] == [s["sha256"] for s in same.shards]
    assert [s["sha256"] for s in one.shards] != [s["sha256"] for s in other.shards]


def test_a_rerun_mends_one_damaged_shard_and_says_which(tiny, tmp_path, caplog):
    before = collected(tiny, tmp_path).train
    path = tmp_path / "train" / before.shards[1]["name"]
    path.write_bytes(b"x" + path.read_bytes()[1:])
    caplog.clear()
    after = collected(tiny, tmp_path).train
    assert [s["sha256"] for s in after.shards] == [s["sha256"] for s in before.shards]
    assert "shard 1 of" in caplog.text and "shard 0" not in caplog.text


def test_another_model_or_site_in_the_same_folder_is_refused(tiny, tiny_model, tmp_path):
    collected(tiny, tmp_path)
    with pytest.raises(BadInput, match=r"made with site='z\.1'"):
        collected(tiny, tmp_path, site="z.0")
    with pytest.raises(BadInput, match="made with model="):
        collected(tiny_model(seed=1), tmp_path)


@pytest.mark.parametrize(
    ("site", "width"),
    [("resid_post.0", 32), ("mlp_post.1", 48), ("z.1.2", 8), ("v.0", 16), (None, 32)],
)
def test_any_site_with_a_width_can_be_stored(tiny, tmp_path, site, width):
    store = collected(tiny, tmp_path, site=site, tokens=40).train
    assert store.width == width
    assert store.key["site"] == (site or "z.0")


def test_bad_input_is_told_before_the_pass(tiny, tmp_path):
    def refused(match, source=TEXT, **options):
        with pytest.raises(BadInput, match=match):
            collect_activations(tiny, source, tmp_path / "x", **options)

    refused("no width of its own", site="pattern.0")
    refused("one is stored at a time", site="z")
    refused(
        "7 tokens in 1 documents, less than one context of 16", TEXT[:1][0][None, :7], context=16
    )
    refused("no document is left for", [TEXT[0]], context=16)
    refused("without a tokenizer", ["some text"])
    refused("held_out=2", held_out=2)
    assert not (tmp_path / "x").exists()


def test_text_goes_through_the_tokenizer(tiny, tmp_path):
    tiny.tokenizer = character_tokenizer()
    texts = ["the cat sat on the mat", "a dog ran", "the sun is low", "an old red barn"]
    made = collect_activations(
        tiny, texts, tmp_path, tokens=30, held_out=0.3, context=8, progress=False
    )
    row = origins(made.train, torch.tensor([4])).iloc[0]
    letters = "".join(tiny.tokens(tiny.tokenizer(texts[row["document"]])["input_ids"]))
    assert tiny.tokens([row["token_id"]])[0] == letters[row["token"]]
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(BadInput, match="has no text in it"):
        collect_activations(tiny, tmp_path / "empty.txt", tmp_path / "y")


# --- texts -----------------------------------------------------------------------------------------


def test_documents_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("One.\nStill one.\n\nStill.\n\n\nTwo.\n")
    (tmp_path / "b.txt").write_text("One.\n\n\nStill one.<|endoftext|>Two.")
    lines = [{"text": "One."}, {"text": "Two.", "more": 1}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    pd.DataFrame({"text": ["One.", None, "Two."]}).to_parquet(tmp_path / "d.parquet")
    assert list(documents(tmp_path / "a.txt")) == ["One.\nStill one.\n\nStill.", "Two.\n"]
    assert len(list(documents(tmp_path / "b.txt"))) == 2
    assert list(documents(tmp_path / "c.jsonl")) == ["One.", "Two."]
    assert list(documents(str(tmp_path / "d.parquet"))) == ["One.", "Two."]
    assert len(list(documents(tmp_path))) == 8
    for name, match in (("c.jsonl", "line 1 has no text field 'body'"), ("d.parquet", "no column")):
        with pytest.raises(BadInput, match=match):
            list(documents(tmp_path / name, field="body"))
    with pytest.raises(BadInput, match="no file"):
        list(documents(tmp_path / "nothing.txt"))
    (tmp_path / "e.jsonl").write_text("{")
    with pytest.raises(BadInput, match="line 1 is not JSON"):
        list(documents(tmp_path / "e.jsonl"))


def test_documents_of_a_hub_dataset(monkeypatch):
    class Fake:
        @staticmethod
        def load_dataset(path, config, *, split, streaming):
            if path == "gone/gone":
                raise OSError("cannot reach the hub\nmore")
            assert (path, config, split, streaming) == ("org/name", "small", "train", True)
            return iter([{"text": "One."}, {"text": "Two."}])

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "datasets", Fake)
    assert list(documents("org/name:small")) == ["One.", "Two."]
    with pytest.raises(BadInput, match="no text field 'body'; it has text"):
        list(documents("org/name:small", field="body"))
    with pytest.raises(BadInput, match=r"'gone/gone' could be opened: cannot reach the hub$"):
        list(documents("gone/gone"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install datasets"):
        list(documents("org/name"))


def test_wikipedia_articles_come_without_markup(tmp_path, monkeypatch):
    long = (
        "Ada was a [[thinker]].<ref>no</ref> {{box|{{inner}}}}[[File:a.png|thumb|of [[her]]]]\n"
        * 60
    )
    pages = "".join(
        f"<page><title>{title}</title><ns>{ns}</ns>{extra}<revision><text>{text}</text></revision></page>"
        for title, ns, extra, text in (
            ("Ada", 0, "", long.replace("<", "&lt;") + "==See also==\n* [[Other]]\n"),
            ("Short", 0, "", "short"),
            ("Talk", 1, "", long.replace("<", "&lt;")),
            ("Moved", 0, '<redirect title="x" />', long.replace("<", "&lt;")),
        )
    )
    xml = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{pages}</mediawiki>'
    wheel = tmp_path / "gensim.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(f"gensim/test/{WIKIPEDIA_FILE}", bz2.compress(xml.encode()))
    (article,) = wikipedia_articles(wheel)
    assert article.startswith("Ada\n\nAda was a thinker.") and "Other" not in article
    assert not any(mark in article for mark in ("[", "{", "<", "png", "her"))
    monkeypatch.setattr("importlib.metadata.distribution", _not_found)
    with pytest.raises(BadInput, match="pip install --no-deps gensim"):
        wikipedia_articles()


def _not_found(name: str):
    raise importlib.metadata.PackageNotFoundError(name)


def test_markup_that_never_closes_loses_no_text():
    assert plain_text("before {{open and after") == "before {{open and after"
    assert plain_text("a (; ) b") == "a b"
    assert os.linesep not in plain_text("one line")


def test_activations_of_a_licensed_text_keep_its_notice(tmp_path, monkeypatch):
    articles = [f"article {i} says a few words more." for i in range(12)]
    monkeypatch.setattr(activations_module, "documents", lambda source, field: iter(articles))
    model = interp.load(induction_model(), tokenizer=character_tokenizer())
    options = {"site": "z.1", "tokens": 100, "context": 24, "progress": False}
    collect_activations(model, "wikipedia", tmp_path / "named", **options)
    notice = (tmp_path / "named" / "LICENCE.txt").read_text()
    assert "CC BY-SA 3.0" in notice and "creativecommons.org" in notice
    collect_activations(model, articles, tmp_path / "own", **options)
    assert not (tmp_path / "own" / "LICENCE.txt").exists()
