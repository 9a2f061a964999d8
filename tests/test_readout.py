"""Nodes as words: writes sum to the logits, hand-built heads say what they were built to say.

Tolerances: float32 sums of some thirty writes, each rounded at the size of the largest.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from circuits.attribution import direct_attribution
from circuits.readout import NodeWrites, readout
from interp.data.pairs import Pairs
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.report import Report
from tests.families import FAMILIES
from tests.ground_truth.two_hop_model import two_hop_model, two_hop_pairs

PAIRS = Pairs.of(
    [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]],
    [[5, 16, 7, 18, 9], [10, 21, 12, 13, 24]],
    answers=[[3], [5]],
    wrong=[[4], [3]],
    positions={"second": [1, 1]},
)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox", "granite", "olmo2", "phi"])
def test_writes_sum_to_the_logit_difference(name):
    model = Model(FAMILIES[name](), id=name)
    writes = NodeWrites(model, PAIRS)
    total = sum(writes.at(node, "end").contribution for node in writes.graph.sender_names)
    assert total + writes.constant == pytest.approx(writes.logit_diff, abs=1e-4)
    if model.spec.logit_softcap is None:
        logits = model.run(PAIRS.clean_batch).logits[:, -1]
        wanted = [float(logits[0, 3] - logits[0, 4]), float(logits[1, 5] - logits[1, 3])]
        assert writes.logit_diff == pytest.approx(wanted, abs=1e-4)


def test_contributions_are_those_of_direct_attribution(tiny):
    report = readout(tiny, PAIRS.rows(slice(1)))
    found = report.table.set_index("node")["contribution"]
    direct = direct_attribution(tiny, PAIRS.clean[:1], answer=3, instead=4).table
    for row in direct.to_dict("records"):
        if row["component"] in ("head", "mlp"):
            name = f"{int(row['layer'])}.{int(row['head'])}" if row["component"] == "head" else None
            name = name or f"mlp.{int(row['layer'])}"
            assert found[name] == pytest.approx(row["contribution"], abs=1e-5)


def test_hand_built_heads_say_the_answer():
    model, pairs = Model(two_hop_model(), id="two hops"), two_hop_pairs(8)
    report = readout(model, pairs, nodes=["0.1", "1.2", "2.0"], positions=["end", "second"])
    table = report.table.set_index(["position", "node"])
    assert table.loc[("end", "2.0"), "answer_first"] == 1.0
    assert table.loc[("end", "2.0"), "answer_rank"] == 0
    # The lookup before it writes a slot that the unembedding does not read.
    assert abs(table.loc[("end", "1.2"), "contribution"]) < 1e-5
    assert table["contribution"]["end"]["2.0"] > 7
    assert np.isnan(table.loc[("second", "2.0"), "contribution"])
    words = report.tables["words"]
    said = words[(words["node"] == "2.0") & (words["position"] == "end") & (words["place"] == 0)]
    assert said["token"].tolist() == [f"#{i}" for i in pairs.answers[:4, 0].tolist()]
    stream = report.tables["stream"].set_index(["position", "layer"])["answer_probability"]["end"]
    assert stream[0] == pytest.approx(1 / 24, rel=1e-3) and stream[2] > 0.9


def test_the_report_and_its_figure(tiny, tmp_path):
    report = readout(tiny, PAIRS, positions=["end", "second"], top_k=2)
    loaded = Report.load(report.save(tmp_path))
    figure = loaded.figure("words")
    assert list(figure.data[0].y) == NodeWrites(tiny, PAIRS).graph.sender_names
    first = report.tables["words"].query("pair == 0 and node == 'mlp.1' and position == 'end'")
    assert first["token"].iloc[0] in figure.data[0].text[-1]
    loaded.figure("words", pair=1, position="second")
    with pytest.raises(BadInput, match="no pair 2"):
        loaded.figure("words", pair=2)


def test_bad_input(tiny):
    with pytest.raises(BadInput, match=r"did you mean 'mlp\.1'"):
        readout(tiny, PAIRS, nodes=["mlp1"])
    with pytest.raises(BadInput, match="did you mean 'second'"):
        readout(tiny, PAIRS, positions=["secnd"])
    with pytest.raises(BadInput, match="no node"):
        readout(tiny, PAIRS, nodes=[])
    with pytest.raises(BadInput, match="top_k"):
        readout(tiny, PAIRS, top_k=98)
    with pytest.raises(Refused):
        readout(Model(FAMILIES["bert"](), id="bert"), torch_pairs())


def torch_pairs() -> Pairs:
    return Pairs.of(torch.tensor([[5, 6]]), torch.tensor([[5, 7]]), answers=[3], wrong=[4])


def test_each_write_is_unembedded_once(tiny):
    rows = []
    unembedding = tiny.module.get_submodule(tiny.spec.unembedding)

    def count(module, args, logits):
        rows.append(logits.numel() // logits.shape[-1])

    counting = unembedding.register_forward_hook(count)
    report = readout(tiny, PAIRS, positions=["end", "second"])
    counting.remove()
    wanted = (len(report.table) + len(report.tables["stream"])) * len(PAIRS)
    asides = [n for n in rows if n == 1]  # one row tells the dtype of logits
    assert sum(rows) - len(asides) == wanted
