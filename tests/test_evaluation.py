"""Evaluation: faithfulness against its formula, circuits whose faithfulness is known, plain statements."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import interp
from circuits.circuit_overlap import circuit_overlap, node_overlap
from circuits.edges import edge_attribution
from circuits.evaluation import circuit_evaluate
from circuits.faithfulness import areas, faithfulness, sized_circuits
from circuits.graph import Graph
from circuits.removals import without_nodes
from interp.data.pairs import Pairs
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.report import Report
from tests.families import FAMILIES
from tests.ground_truth.induction_model import character_tokenizer, induction_model
from tests.ground_truth.induction_pairs import CIRCUIT, induction_pairs

QUICK = {"sizes": [1, 5, 20, 100], "random": 2, "subsets": 3, "progress": False}


@pytest.fixture(scope="module")
def induction() -> Model:
    return interp.load(induction_model(), tokenizer=character_tokenizer())


@pytest.fixture(scope="module")
def judged(induction) -> Report:
    return circuit_evaluate(induction, induction_pairs(12), steps=16, at=10, **QUICK)


# --- formulas ----------------------------------------------------------------------------------


def test_faithfulness_is_a_ratio_of_means():
    whole, empty = np.array([4.0, 8.0]), np.array([0.0, 2.0])
    values = np.array([[2.0, 5.0], [4.0, 8.0], [0.0, 2.0], [-2.0, 0.0]])
    np.testing.assert_allclose(faithfulness(values, whole, empty), [0.5, 1, 0, -0.4])
    # A mean of ratios would be another number where the pairs' gaps differ.
    values = np.array([[4.0, 2.0]])
    assert faithfulness(values, whole, empty)[0] == pytest.approx(4 / 10)
    weights = np.array([[1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(faithfulness(values, whole, empty, weights), [[1.0, 0.0]])


def test_areas_are_trapezoids_over_the_share_of_edges_unclipped():
    sizes = [0.1, 50.0, 100.0]
    cpr, cmd = areas(sizes, np.array([2.0, 1.0, 1.0]))
    assert cpr == pytest.approx(0.499 * 1.5 + 0.5)
    assert cmd == pytest.approx(0.499 * 0.5)


def test_overlap_counts_heads_and_what_chance_gives(tiny):
    graph = Graph.of(tiny)
    a = graph.node_circuit(["0.0", "0.1", "1.2"])
    b = graph.node_circuit(["0.1", "1.2", "1.3", "mlp.0"])
    found = node_overlap(graph, a, b)
    assert (found["heads_a"], found["heads_b"], found["heads_shared"]) == (3, 3, 2)
    assert found["share_of_a"] == pytest.approx(2 / 3) and found["by_chance"] == 3 / 8
    same = node_overlap(graph, a, a)
    assert same["share_of_a"] == same["jaccard"] == same["edge_jaccard"] == 1.0
    assert np.isnan(node_overlap(graph, graph.empty, a)["share_of_a"])


def test_sized_circuits_are_connected_and_nested(tiny):
    graph = Graph.of(tiny)
    circuits = sized_circuits(graph, graph.random_scores(), [5, 20, 50, 100])
    for small, large in pairwise(circuits):
        assert not (small & ~large).any()
    assert torch.equal(circuits[-1], graph.allowed)
    assert not without_nodes(graph, graph.whole, ["0.1"])[graph.sender("0.1")].any()


# --- a circuit that is known -------------------------------------------------------------------


def test_the_known_circuit_is_faithful_at_its_size(judged, induction):
    f = judged.table.set_index(["ranking", "size"])["faithfulness"]
    share = 100 * len(CIRCUIT) / judged.meta["n_edges"]
    assert 5 < share < 20
    for ranking in ("signed", "absolute"):
        assert f[ranking, 20.0] == pytest.approx(1.0, abs=1e-3)
        assert f[ranking, 100.0] == 1.0
    assert max(abs(f[f"random {i}", 5.0]) for i in range(2)) < 0.2
    areas_of = judged.tables["areas"].set_index(["area", "ranking"])["value"]
    assert areas_of["CPR", "signed"] > areas_of["CPR", "random"] + 0.05
    assert areas_of["CMD", "absolute"] < areas_of["CMD", "random"] - 0.05


def test_intervals_hold_the_value_and_the_protocol_is_told(judged):
    table = judged.table
    assert (table["low"] <= table["faithfulness"] + 1e-9).all()
    assert (table["faithfulness"] <= table["high"] + 1e-9).all()
    for word in ("corrupted", "ratio of means", "12 pairs", "nominal"):
        assert word in judged.meta["protocol"]


def test_small_circuits_that_lead_nowhere_are_said_to_be_empty(judged):
    empty = judged.table[judged.table["edges"] == 0]
    assert len(empty) and (empty["faithfulness"] == 0).all()
    (note,) = (note for note in judged.meta["notes"] if "0 by definition" in note)
    told = {
        (part.rsplit(" at ", 1)[0], size)
        for part in note.split(": ", 1)[1].split("; ")
        for size in part.rsplit(" at ", 1)[1].removesuffix(" %").split(", ")
    }
    assert told == {(row.ranking, f"{row.size:g}") for row in empty.itertuples(index=False)}


def test_the_known_circuit_is_complete_and_its_heads_are_needed(judged):
    completeness = judged.tables["completeness"]
    assert len(completeness) == 3 and (completeness["difference"].abs() < 1e-3).all()
    minimal = judged.tables["minimality"].set_index("node")["alone"]
    # Where nothing is known the metric is near 0, half way from one answer to the other.
    assert minimal["0.1"] > 0.4 and minimal["1.2"] > 0.9
    others = minimal.drop(["0.1", "1.2"])
    assert (others.abs() < 1e-3).all()


def test_a_saved_report_is_judged_like_its_scores(induction, tmp_path):
    pairs = induction_pairs(8)
    edges = edge_attribution(induction, pairs, steps=8, progress=False)
    edges.save(tmp_path / "edges")
    told = circuit_evaluate(induction, pairs, scores=str(tmp_path / "edges"), **QUICK)
    fresh = circuit_evaluate(induction, pairs, scores="eap-ig", steps=8, **QUICK)
    columns = ["ranking", "size", "edges", "faithfulness"]
    for row, other in zip(told.table[columns].values, fresh.table[columns].values, strict=True):
        assert list(row[:3]) == list(other[:3]) and row[3] == pytest.approx(other[3], abs=1e-5)
    assert any("same" in note for note in told.meta["notes"])
    unsaved = circuit_evaluate(induction, pairs, scores=edges, **QUICK)
    assert unsaved.table.equals(told.table)
    assert unsaved.meta["options"]["scores"] == "the report 'edges'"
    with pytest.raises(
        BadInput, match="is a report of 'circuit_evaluate'; give one of `interp edges`"
    ):
        circuit_evaluate(induction, pairs, scores=told, **QUICK)


def test_a_saved_circuit_is_a_point_of_its_own(induction, tmp_path):
    pairs = induction_pairs(8)
    graph = Graph.of(induction)
    report = edge_attribution(induction, pairs, steps=4, progress=False)
    found = Report(
        "circuit_find",
        {"circuit_find": report.table},
        {"mask": graph.circuit(CIRCUIT).numpy(), "scores": report.arrays["scores"]},
        report.meta,
    )
    found.save(tmp_path / "found")
    judged = circuit_evaluate(induction, pairs, scores=str(tmp_path / "found"), **QUICK)
    row = judged.table[judged.table["ranking"] == "circuit"].iloc[0]
    assert row["edges"] == len(CIRCUIT) and row["faithfulness"] == pytest.approx(1.0, abs=1e-3)
    found.arrays["mask"] = np.zeros_like(found.arrays["mask"])
    found.save(tmp_path / "empty")
    with pytest.raises(BadInput, match="no edge on a path"):
        circuit_evaluate(induction, pairs, scores=str(tmp_path / "empty"), **QUICK)


def test_zero_and_mean_ablation_have_ends_of_their_own(tiny):
    pairs = Pairs.of(
        torch.randint(5, 95, (4, 6), generator=torch.Generator().manual_seed(1)),
        torch.randint(5, 95, (4, 6), generator=torch.Generator().manual_seed(2)),
        answers=[1, 2, 3, 4],
        wrong=[5, 6, 7, 8],
    )
    values = {}
    for ablation in ("resample", "mean", "zero"):
        report = circuit_evaluate(tiny, pairs, scores="eap", ablation=ablation, **QUICK)
        values[ablation] = report.meta["empty_value"]
        whole = report.table[report.table["size"] == 100]
        assert (whole["faithfulness"] == 1).all()
    assert len(set(values.values())) == 3


def test_scores_come_from_other_pairs_where_a_task_is_named(tiny):
    report = circuit_evaluate(tiny, "induction", scores="eap", n=3, **QUICK)
    assert not any("same pairs" in note for note in report.meta["notes"])


# --- overlap -----------------------------------------------------------------------------------


def test_circuits_of_two_tasks_overlap(induction):
    report = circuit_overlap(
        induction, "induction,induction:successor", edges=8, steps=8, n=6, progress=False
    )
    table = report.table.set_index(["a", "b"])
    assert table.loc[("induction", "induction"), "share_of_a"] == 1.0
    assert table.loc[("induction", "induction"), "faithfulness"] > 0.9
    assert {"0.1", "1.2"} <= set(report.meta["shared_by_all"])
    figure = report.figure("overlap")
    assert figure.data[0].z.shape == (2, 2)


# --- figures and bad input ---------------------------------------------------------------------


def test_the_figure_shows_every_curve(judged):
    figure = judged.figure("faithfulness")
    names = " ".join(trace.name or "" for trace in figure.data)
    assert "CPR" in names and "CMD" in names and "random" in names


def test_bad_input_is_told(tiny, tmp_path):
    for options, match in (
        ({"scores": "eap-gi"}, "did you mean 'eap-ig'"),
        ({"sizes": [5]}, "at least two"),
        ({"sizes": [20, 5]}, "growing"),
        ({"sizes": [5, 500]}, "0 to 100"),
        ({"ablation": "means"}, "did you mean 'mean'"),
        ({"at": 0}, "at=0"),
        ({"n": 1}, "n=1"),
        ({"random": -1}, "random=-1"),
    ):
        with pytest.raises(BadInput, match=match):
            circuit_evaluate(tiny, "induction", progress=False, **options)
    one = Pairs.of([[5, 6, 7]], [[5, 9, 7]], answers=[3], wrong=[4])
    with pytest.raises(BadInput, match="at least two"):
        circuit_evaluate(tiny, one, progress=False)
    with pytest.raises(BadInput, match="at least two different"):
        circuit_overlap(tiny, "induction", progress=False)
    with pytest.raises(BadInput, match="did you mean"):
        circuit_overlap(tiny, "induction,inductoin", progress=False)
    with pytest.raises(Refused):
        circuit_evaluate(Model(FAMILIES["bert"](), id="bert"), "induction", progress=False)
    other = edge_attribution(tiny, one, method="eap", progress=False)
    other.save(tmp_path)
    with pytest.raises(BadInput, match="another than this model's"):
        circuit_evaluate(
            Model(FAMILIES["llama"](), id="llama"),
            "induction",
            scores=str(tmp_path),
            n=2,
            progress=False,
        )


@pytest.mark.slow
def test_a_small_circuit_of_the_default_model_does_the_task(smollm):
    """EAP-IG's first 5 % of the edges, found on other prompts, do most of IOI; 5 % at random do not."""
    report = circuit_evaluate(
        smollm, "ioi", sizes=[5, 100], steps=3, n=8, random=1, subsets=0, at=0.5, progress=False
    )
    f = report.table.set_index(["ranking", "size"])["faithfulness"]
    assert f["absolute", 5.0] > 0.5 and abs(f["random 0", 5.0]) < 0.3
