"""Repair: a broken hand-built circuit is mended by telling one head where to look; random heads mend nothing.

Tolerances: float32 logits through three blocks; an unrepaired model is off by several logits.
"""

from __future__ import annotations

import pytest
import torch

from circuits.repair import look_at, repair
from interp.data.pairs import Pairs
from interp.errors import BadInput
from interp.models.model import Model
from interp.report import Report
from tests.families import FAMILIES
from tests.ground_truth.two_hop_model import (
    D_MODEL,
    FIRST_HOP_HEAD,
    N_HEADS,
    two_hop_model,
    two_hop_pairs,
)

PAIRS = two_hop_pairs(16)


def broken_two_hop() -> Model:
    """The first lookup's query is zero: it attends evenly, and the second lookup has no key."""
    module = two_hop_model()
    layer, head = FIRST_HOP_HEAD
    first = head * (D_MODEL // N_HEADS)
    with torch.no_grad():
        weight = module.transformer.h[layer].attn.c_attn.weight
        weight[:, first : first + D_MODEL // N_HEADS] = 0
    return Model(module, id="broken")


def conditions(report: Report) -> dict[str, dict[str, float]]:
    return {row["condition"]: row for row in report.table.to_dict("records")}


def test_a_head_told_where_to_look_mends_what_its_query_broke():
    found = conditions(
        repair(broken_two_hop(), PAIRS, heads=["1.2"], attend=["first"], progress=False)
    )
    whole = Model(two_hop_model(), id="whole").run(PAIRS.clean_batch).logits[:, -1]
    rows = torch.arange(len(PAIRS))
    wanted = (whole[rows, PAIRS.answers[:, 0]] - whole[rows, PAIRS.wrong[:, 0]]).mean()
    assert found["before"]["accuracy"] < 0.7
    assert found["after"]["accuracy"] == 1.0
    # Other positions' lookups stay broken: their norms have another scale, and the second lookup's keys
    # with them. Unrepaired it is some 7 logits lower.
    assert found["after"]["logit_diff"] == pytest.approx(float(wanted), abs=0.3)
    assert found["control"]["logit_diff"] == pytest.approx(found["before"]["logit_diff"], abs=1.0)
    assert found["after"]["change_low"] > 1 > found["control"]["change_high"]


def test_looking_elsewhere_does_not_mend_it():
    report = repair(
        broken_two_hop(), PAIRS, heads=["1.2"], attend=["second"], controls=5, progress=False
    )
    assert conditions(report)["after"]["accuracy"] < 0.5


def test_a_restored_head_restores_what_only_it_writes():
    model = Model(two_hop_model(), id="two hops")
    report = repair(
        model, PAIRS, heads=["2.0"], restore=True, on="corrupted", controls=6, progress=False
    )
    found = conditions(report)
    assert found["before"]["accuracy"] == 0.0 and found["after"]["accuracy"] == 1.0
    run = model.run(PAIRS.clean_batch).logits[:, -1]
    rows = torch.arange(len(PAIRS))
    clean = (run[rows, PAIRS.answers[:, 0]] - run[rows, PAIRS.wrong[:, 0]]).mean()
    # Only the distractor's write, which nothing reads, differs in the last norm's scale.
    assert found["after"]["logit_diff"] == pytest.approx(float(clean), rel=1e-2)
    assert report.meta["as_good"] == 0.0
    assert not any("2.0" in heads for heads in report.tables["controls"]["heads"])


def test_scaling_by_one_changes_nothing_and_silencing_is_zero():
    model = Model(FAMILIES["llama"](), id="llama")
    pairs = Pairs.of([[5, 6, 7], [8, 9, 7]], [[5, 9, 7], [8, 6, 7]], answers=[3, 4], wrong=[4, 3])
    same = conditions(repair(model, pairs, heads=["0.1"], scale=1.0, controls=2, progress=False))
    # float32: batched variants add up in another order
    assert same["after"]["logit_diff"] == pytest.approx(same["before"]["logit_diff"], abs=1e-5)
    zero = conditions(repair(model, pairs, heads=["0.1"], scale=0.0, controls=2, progress=False))
    silent = repair(
        model, pairs, heads=["1.1"], scale=1.0, silence=["0.1"], controls=2, progress=False
    )
    assert conditions(silent)["after"]["logit_diff"] == pytest.approx(
        zero["after"]["logit_diff"], abs=1e-5
    )


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "t5_encoder", "opt"])
def test_heads_look_where_they_are_told(name):
    model = Model(FAMILIES[name](), id=name)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    layer = model.spec.attention_layers[-1]
    edit = look_at([(layer, 2)], [torch.tensor([1, 2]), torch.tensor([2, 2])], torch.tensor([3, 2]))
    run = model.run(ids, capture=[f"pattern.{layer}", f"z.{layer}", f"v.{layer}"], edits=[edit])
    pattern = run.cache[f"pattern.{layer}.2"]
    assert pattern[0, 3].tolist() == [0, 0.5, 0.5, 0] and pattern[1, 2].tolist() == [0, 0, 1, 0]
    plain = model.run(ids, capture=[f"pattern.{layer}"]).cache[f"pattern.{layer}"]
    assert torch.equal(pattern[0, :3], plain[0, 2, :3])
    v = run.cache[f"v.{layer}"][:, :, model.spec.kv_group(layer, 2)]
    assert torch.allclose(run.cache[f"z.{layer}.2"][0, 3], (v[0, 1] + v[0, 2]) / 2, atol=1e-6)


def test_controls_are_of_the_same_layers_and_the_report_comes_back(tmp_path):
    model = Model(two_hop_model(), id="two hops")
    report = repair(
        model, PAIRS, heads=["1.2", "2.0"], scale=0.0, silence=["1.0"], controls=8, progress=False
    )
    for heads in report.tables["controls"]["heads"]:
        assert sorted(name.split(".")[0] for name in heads.split(", ")) == ["1", "2"]
    loaded = Report.load(report.save(tmp_path))
    figure = loaded.figure("bars")
    assert figure.data[0].y[1] == pytest.approx(conditions(report)["after"]["accuracy"])


def test_bad_input(tiny):
    pairs = Pairs.of([[5, 6, 7]], [[5, 9, 7]], answers=[3], wrong=[4], positions={"name": [1]})
    for options, message in (
        ({"heads": []}, "no head"),
        ({"heads": ["x"]}, "write layer.head"),
        ({"heads": ["0.7"], "scale": 0.0}, "no head '0.7'"),
        ({"heads": ["0.1"]}, "none of attend"),
        ({"heads": ["0.1"], "scale": 1.0, "restore": True}, "several of attend"),
        ({"heads": ["0.1"], "attend": ["nam"]}, "did you mean 'name'"),
        ({"heads": ["0.1"], "attend": ["end"], "at": "name"}, "lies after 'name'"),
        ({"heads": ["0.1"], "scale": 1.0, "on": "cleaned"}, "did you mean 'clean'"),
        ({"heads": ["0.1"], "scale": 1.0, "silence": ["0.1"]}, "both repaired and silenced"),
        ({"heads": [f"0.{h}" for h in range(4)] + ["1.0"], "scale": 1.0}, "too few are left"),
    ):
        with pytest.raises(BadInput, match=message):
            repair(tiny, pairs, progress=False, **options)
