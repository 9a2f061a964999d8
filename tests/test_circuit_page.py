"""The page of a circuit, read back without a browser: its nodes, edges, words, and what is known of heads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import interp
from circuits.circuit_find import circuit_find
from circuits.edges import edge_attribution
from circuits.heads.classify import classify_heads
from interp import cli
from interp.errors import BadInput
from interp.figures.circuit_page import MOST, circuit_page
from interp.models.model import Model
from interp.report import Report
from tests.browser.synthetic import HOSTILE, head_report
from tests.browser.synthetic_circuit import circuit_report
from tests.ground_truth.induction_model import character_tokenizer, induction_model
from tests.ground_truth.induction_pairs import CIRCUIT, induction_pairs
from tests.test_page import unpacked


@pytest.fixture(scope="module")
def model() -> Model:
    return interp.load(induction_model(), tokenizer=character_tokenizer())


@pytest.fixture(scope="module")
def heads(model: Model) -> Report:
    return classify_heads(model, prompts=8, progress=False)


@pytest.fixture(scope="module")
def found(model: Model, heads: Report, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The induction circuit with what is known of its heads, saved and loaded."""
    folder = heads.save(tmp_path_factory.mktemp("heads"))
    report = circuit_find(model, induction_pairs(8), edges=14, heads=folder, progress=False)
    return Report.load(report.save(tmp_path_factory.mktemp("circuit")))


def named_edges(data: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    """(from, to, what it ends in) -> score."""
    names, edges = data["nodes"]["name"], data["edges"]
    columns = (edges["from"], edges["to"], edges["into"], edges["score"])
    return {(names[a], names[b], into): score for a, b, into, score in zip(*columns, strict=True)}


def test_the_induction_heads_card_has_its_edges_and_its_role(found: Report) -> None:
    data, _ = unpacked(found.to_html())
    edges = named_edges(data)
    for sender, receiver in CIRCUIT:
        node, into = (receiver, receiver) if receiver == "logits" else receiver.rsplit(".", 1)
        row = found.table.query("sender == @sender and receiver == @receiver").iloc[0]
        assert edges[sender, node, into] == pytest.approx(row["score"], rel=1e-5)
    into_it = {key: score for key, score in edges.items() if key[1] == "1.2"}
    assert ("0.1", "1.2", "k") in into_it
    claims = data["claims"]
    places = list(zip(claims["columns"]["layer"], claims["columns"]["head"], strict=True))
    assert claims["labels"][places.index((1, 2))] == ["induction", "copying"]
    assert claims["labels"][places.index((0, 1))] == ["previous_token"]


def test_what_is_known_of_heads_is_that_of_the_heads_report(found: Report, heads: Report) -> None:
    pd.testing.assert_frame_equal(found.tables["head_claims"], heads.table, check_dtype=False)
    data, _ = unpacked(circuit_page(found))
    theirs, _ = unpacked(heads.to_html())
    for name in ("detectors", "columns", "labels"):
        assert data["claims"][name] == theirs[name]


def test_heads_can_be_given_to_the_page_itself(found: Report, heads: Report) -> None:
    tables = {name: table for name, table in found.tables.items() if name != "head_claims"}
    bare = Report(found.analysis, tables, found.arrays, found.meta)
    assert unpacked(circuit_page(bare))[0]["claims"] is None
    assert unpacked(circuit_page(bare, heads))[0] == unpacked(circuit_page(found))[0]
    assert set(bare.tables) == set(tables)  # the report is left as it was


def test_numbers_are_the_reports(found: Report) -> None:
    data, _ = unpacked(circuit_page(found))
    nodes = found.tables["nodes"].set_index("node")
    total = nodes["score"].abs().sum()
    shares = 0.0
    for i, name in enumerate(data["nodes"]["name"]):
        if name == "logits":
            assert data["nodes"]["score"][i] is None
            continue
        row = nodes.loc[name]
        assert data["nodes"]["score"][i] == pytest.approx(row["score"], rel=1e-5)
        assert data["nodes"]["share"][i] == pytest.approx(abs(row["score"]) / total, rel=1e-5)
        assert data["nodes"]["contribution"][i] == pytest.approx(row["contribution"], rel=1e-5)
        shares += data["nodes"]["share"][i]
    assert shares == pytest.approx(1, abs=1e-4)
    said = found.tables["words"].query("node == '1.2' and pair == 0").sort_values("place")["token"]
    assert data["words"][str(data["nodes"]["name"].index("1.2"))][0] == list(said)


def test_attribution_patching_of_nodes_counts_each_node_once(model: Model) -> None:
    """Its table of nodes has the heads' q, k and v beside the heads."""
    report = edge_attribution(model, induction_pairs(4), method="atp", progress=False)
    assert "1.2.q" in set(report.tables["nodes"]["node"])
    data, _ = unpacked(report.to_html())
    assert sum(filter(None, data["nodes"]["share"])) <= 1 + 1e-4
    assert data["scoreOf"].endswith("itself")
    row = report.tables["nodes"].set_index("node").loc["1.2"]
    place = data["nodes"]["name"].index("1.2")
    assert data["nodes"]["importance"][place] == pytest.approx(row["importance"], rel=1e-5)


@pytest.mark.parametrize("analysis", [edge_attribution, circuit_find])
def test_heads_of_another_model_are_told_before_the_scores(
    model: Model, analysis: Any, heads: Report, tiny: Model, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Model, "run", lambda *_, **__: pytest.fail("a pass was run"))
    pairs = induction_pairs(4)
    with pytest.raises(BadInput, match=r"other weights.*interp heads"):
        analysis(tiny, pairs, heads=heads, progress=False)
    with pytest.raises(BadInput, match="no report in"):
        analysis(model, pairs, heads=tmp_path, progress=False)


def test_the_page_refuses_heads_of_another_model(found: Report, tiny: Model) -> None:
    with pytest.raises(BadInput, match="other weights"):
        circuit_page(found, head_report(2, 4, lengths=()))
    with pytest.raises(BadInput, match="report of 'circuit_find'; give one of `interp heads`"):
        circuit_page(found, found)


def test_from_the_command_line(
    heads: Report, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    folder = tmp_path / "hand-built"
    induction_model().save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    known = heads.save(tmp_path / "heads")

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["interp", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().err

    for command in (["circuit", "find"], ["edges"]):
        out = tmp_path / command[0]
        code, told = run(*command, folder, "induction", "--n", 4, "--heads", known, "--out", out)
        assert code == 0, told
        saved = Report.load(out)
        assert len(saved.tables["head_claims"]) == 8
        data, _ = unpacked((out / "report.html").read_text(encoding="utf-8"))
        assert ("0.1", "1.2", "k") in named_edges(data)
        assert data["claims"]["labels"]
        # told before the model is opened: there is none of that name
        code, told = run(*command, "no-such-model", "induction", "--heads", out)
        assert code == 2 and "give one of `interp heads`" in told


def test_hostile_text_stays_inside_the_data() -> None:
    name = "</title><script>alert(1)</script>\ud800\x00"
    heads = head_report(3, 2, lengths=(), model_id=name)
    heads.meta["detectors"][0]["title"] = HOSTILE[1]
    report = circuit_report(20, 3, 2, model_id=name, token=HOSTILE[0])
    report.meta["notes"] = [HOSTILE[0], HOSTILE[1]]
    report.meta["options"]["task"] = HOSTILE[0]
    document = circuit_page(report, heads)
    assert document.encode("utf-8")
    assert document.count("<script") == document.count("</script") == 2
    assert "<img" not in document
    data, _ = unpacked(document)
    assert data["claims"]["detectors"][0]["title"] == HOSTILE[1]
    assert next(iter(data["words"].values()))[0][0] == HOSTILE[0]


def test_nothing_is_fetched_and_no_style_or_script_but_the_pages_may_run() -> None:
    document = circuit_page(circuit_report(40))
    assert "default-src &#39;none&#39;" in document or "default-src 'none'" in document
    assert "https://" not in document and "http://" not in document
    assert " style=" not in document and " onclick=" not in document


def test_large_circuits_keep_the_strongest_edges() -> None:
    report = circuit_report(MOST + 500)
    document = circuit_page(report)
    data, _ = unpacked(document)
    assert len(data["edges"]["score"]) == MOST and data["start"] == 300
    kept = np.abs(data["edges"]["score"])
    assert (np.diff(kept) <= 0).all()
    assert kept[-1] >= np.sort(report.table["score"].abs())[499] * (1 - 1e-5)
    assert f"{MOST} strongest of {MOST + 500} edges" in document
    assert len(document) < 700_000


def test_what_may_be_absent() -> None:
    report = circuit_report(12, 2, 2)
    bare = Report(
        "circuit_find", {"circuit_find": report.table}, {}, {"model": report.meta["model"]}
    )
    data, _ = unpacked(circuit_page(bare))
    assert "score" not in data["nodes"] and data["words"] == {} and data["claims"] is None
    magnitudes = Report("circuit_find", report.tables, {}, report.meta | {"signed": False})
    assert "it has no sign" in circuit_page(magnitudes)
    report.meta["options"]["metric"] = "kl"
    assert "whose score is positive" in circuit_page(report)


def test_the_notebooks_figure_is_as_it_was(found: Report) -> None:
    figure = found.figure("graph")
    lines = [trace for trace in figure.to_dict()["data"] if trace["mode"] == "lines"]
    assert {trace["name"] for trace in lines} <= {"q", "k", "v", "mlp", "logits"}
    assert figure.layout.sliders
