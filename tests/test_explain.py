"""`explain`: its facts against the model and the tables, what it says of models that cannot, its page.

Tolerances: float32 logits of tiny models are known to about 1e-5, bytes of 255·√A to half a step.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import interp
from circuits.explain import _lens_facts, explain
from circuits.relevance import Target
from interp.errors import BadInput, Refused
from interp.figures.attention_grid import attention_patterns
from interp.figures.waterfall import waterfall_steps
from interp.models.model import Model
from interp.report import Report
from tests.families import FAMILIES
from tests.ground_truth.induction_model import (
    INDUCTION_HEAD,
    PREVIOUS_TOKEN_HEAD,
    character_tokenizer,
    induction_model,
)

IDS = [11, 42, 5, 42, 17, 60, 11, 42, 33]
SENTENCE = "When Mary and John went to the store, John gave a drink to"


def model_of(name: str) -> Model:
    return Model(FAMILIES[name](), id=name)


def facts_of(report: Report, name: str) -> list[dict]:
    table = report.table
    return table.loc[table["fact"] == name].to_dict("records")


@pytest.fixture(scope="module")
def made(tiny_model) -> tuple[Model, Report]:
    model = tiny_model()
    return model, explain(model, IDS, answer=3, instead=7, position=6)


# --- facts --------------------------------------------------------------------------------------


def test_the_prediction_is_the_models(made: tuple[Model, Report]) -> None:
    model, report = made
    logits = model.run(torch.tensor([IDS])).logits[0, 6]
    top = logits.softmax(-1).topk(5)
    found = facts_of(report, "predicted")
    assert [row["token"] for row in found] == [f"#{i}" for i in top.indices.tolist()]
    assert [row["value"] for row in found] == pytest.approx(top.values.tolist(), abs=1e-5)
    [answer], [rank] = facts_of(report, "answer"), facts_of(report, "answer rank")
    assert answer["value"] == pytest.approx(float(logits.softmax(-1)[3]), abs=1e-5)
    assert rank["value"] == int((logits > logits[3]).sum())
    [gap] = facts_of(report, "logit difference")
    assert gap["value"] == pytest.approx(float(logits[3] - logits[7]), abs=1e-4)
    assert report.meta["target"]["value"] == pytest.approx(gap["value"])


def test_contributions_sum_to_the_explained_difference(made: tuple[Model, Report]) -> None:
    _, report = made
    [gap] = facts_of(report, "logit difference")
    sums = report.table[report.table["fact"].str.startswith("sum ")]["value"].sum()
    assert sums == pytest.approx(gap["value"], abs=1e-4)
    read = report.tables["sources"].groupby("source")["contribution"].sum()
    for row in facts_of(report, "heads read"):
        assert row["value"] == pytest.approx(read[row["position"]], abs=1e-5)
        assert row["token"] == f"#{IDS[row['position']]}"


def test_the_named_heads_are_the_largest(made: tuple[Model, Report]) -> None:
    _, report = made
    heads = report.tables["attribute"].query("component == 'head'")
    for fact, best in (
        ("raises most", heads.loc[heads["contribution"].idxmax()]),
        ("lowers most", heads.loc[heads["contribution"].idxmin()]),
    ):
        first = facts_of(report, fact)[0]
        assert (first["layer"], first["head"]) == (best["layer"], best["head"])
        assert f"L{first['layer']}H{first['head']} (" in " ".join(report.meta["headline"])
        mine = report.tables["sources"].query("layer == @first['layer'] and head == @first['head']")
        signed = mine["contribution"] * np.sign(first["value"])
        assert first["position"] == mine.loc[signed.idxmax(), "source"]


def test_patterns_are_the_models(made: tuple[Model, Report]) -> None:
    model, report = made
    A = model.run(torch.tensor([IDS]), capture=["pattern"]).cache["pattern"][0]
    seen = torch.from_numpy(report.arrays["pattern"][0].astype(np.float32) / 255)
    assert float((seen - A.sqrt()).abs().max()) <= 0.5 / 255 + 1e-6
    about, packed = attention_patterns(report)
    n = len(IDS)
    assert about == {"n": n, "causal": True, "has": [True] * 8}
    triangle = np.frombuffer(packed, np.uint8).reshape(2, 4, n * (n + 1) // 2)
    assert triangle[1, 2, 5 * 6 // 2 + 3] == report.arrays["pattern"][0, 1, 2, 5, 3]


@pytest.mark.parametrize(
    ("ranks", "first", "stays"),
    [([4, 2, 0, 1, 0, 0], 2, 4), ([0, 0, 0], 0, 0), ([3, 1, 0], 2, 2), ([0, 2, 1], 0, None)],
)
def test_the_lens_sentence_counts_from_the_right_layer(ranks, first, stays) -> None:
    layers = range(len(ranks))
    table = pd.DataFrame({"position": 5, "layer": layers, "target_rank": ranks, "lens": "logit"})
    other = table.assign(position=4, target_rank=0)
    rows = _lens_facts(pd.concat([other, table]), Target(5, answer=1))
    found = {row["fact"]: row.get("layer") for row in rows}
    assert found.pop("lens first") == first
    assert found == ({} if stays is None else {"lens stays first": stays})
    never = _lens_facts(table.assign(target_rank=1), Target(5, answer=1))
    assert [row["fact"] for row in never] == ["lens never first"]


def test_the_same_passes_as_their_own_commands(made: tuple[Model, Report]) -> None:
    from circuits.attribution import direct_attribution
    from circuits.flow import information_flow

    model, report = made
    ids = torch.tensor([IDS])
    own = direct_attribution(model, ids, answer=3, instead=7, position=6)
    pd.testing.assert_frame_equal(own.table, report.tables["attribute"])
    flow = information_flow(model, ids, answer=3, instead=7, position=6)
    shared = [name for name in flow.table if name != "effect"]
    pd.testing.assert_frame_equal(flow.table[shared], report.tables["flow"][shared])


# --- known answers ------------------------------------------------------------------------------


def test_the_two_step_route_of_the_induction_circuit() -> None:
    """Cutting an edge costs the prediction exactly on the route: previous-token head, induction head."""
    model = interp.load(induction_model(), tokenizer=character_tokenizer())
    letters = (
        "qgtbxnepqgtbx"  # at the last x (13) comes n: token 6, after the first x (5); BOS is 0
    )
    ids = [0, *model.tokenizer(letters, add_special_tokens=False)["input_ids"]]
    report = explain(model, ids)
    assert report.meta["target"]["answer"]["text"] == "n"
    cut = report.tables["flow"].dropna(subset="effect").query("effect > 1")
    route = {(INDUCTION_HEAD[0], 13, 6), (PREVIOUS_TOKEN_HEAD[0], 6, 5)}
    place = cut[["layer", "position", "source_position"]]
    assert set(place.itertuples(index=False, name=None)) == route
    writer = facts_of(report, "raises most")[0]
    assert (writer["layer"], writer["head"], writer["position"]) == (*INDUCTION_HEAD, 6)
    cuts = [row for row in facts_of(report, "edge cut") if row["value"] > 1]
    assert {(row["layer"], row["to"], row["position"]) for row in cuts} == route


def test_mary_on_the_default_model(smollm: Model) -> None:
    report = explain(smollm, SENTENCE, answer=" Mary", instead=" John", lens="logit")
    best = facts_of(report, "predicted")[0]
    assert best["token"] == " Mary" and best["value"] > 0.9
    assert report.meta["skipped"] == {}

    # The heads that write Mary − John, by the sum over what they wrote, not by the analysis's own table.
    run = smollm.run(SENTENCE, capture=["z", "resid_post.29"])
    norm = smollm.final_norm
    gap = smollm.W_U[:, smollm.token_id(" Mary")] - smollm.W_U[:, smollm.token_id(" John")]
    d = gap * norm.gain / norm.scale(run.cache["resid_post.29"][0, -1])
    wrote = torch.stack(
        [
            torch.einsum("hd,hdm,m->h", run.cache[f"z.{layer}"][0, -1], smollm.W_O(layer), d)
            for layer in range(30)
        ]
    )
    order = wrote.flatten().argsort(descending=True)[:4].tolist()
    named = [(row["layer"], row["head"]) for row in facts_of(report, "raises most")]
    assert named == [divmod(i, 9) for i in order]
    assert all(f"L{layer}H{head}" in report.meta["headline"][2] for layer, head in named)

    # The flow comes from the first Mary: by direct contribution, by weight, by cutting, by relevance.
    read, edge, cut, relevant = (
        facts_of(report, name)[0] for name in ("heads read", "edge into", "edge cut", "relevant")
    )
    assert read["value"] > 2
    for row in (read, edge, cut, relevant):
        assert (row["token"], row["position"]) == (" Mary", 1)
    assert edge["to"] == 13 and cut["value"] > 0.5

    complete, scores = report.meta["integrated_gradients"], report.tables["relevance"]
    shares = scores["integrated_gradients"]
    assert shares.sum() == pytest.approx(complete["change"], rel=0.01)
    assert shares.abs().idxmax() == 1


# --- models that cannot -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "skipped", "there"),
    [
        ("bert", {"lens", "attribute", "flow", "words"}, {"relevance"}),
        ("mamba", {"attention", "attribute", "flow", "words"}, {"lens", "relevance"}),
        ("lfm2", {"attribute", "flow", "words"}, {"lens", "relevance"}),
    ],
)
def test_what_a_model_cannot_give_is_named(name: str, skipped: set[str], there: set[str]) -> None:
    report = explain(model_of(name), IDS)
    assert set(report.meta["skipped"]) == skipped
    assert there <= set(report.tables) and not skipped & set(report.tables)
    assert ("pattern" in report.arrays) == ("attention" not in skipped)
    page = report.to_html()
    assert "Not possible on this model" in page
    for reason in report.meta["skipped"].values():
        assert reason.split("'")[0] in page  # quotes are escaped
    with pytest.raises(BadInput, match=r"has no table 'attribute': .*cannot"):
        report.figure("waterfall")


def test_bad_input_is_told_before_any_pass(tiny: Model, smollm: Model) -> None:
    with pytest.raises(BadInput, match="one token"):
        explain(tiny, [5])
    with pytest.raises(BadInput, match="positions are 0 to 8"):
        explain(tiny, IDS, position=9)
    with pytest.raises(BadInput, match="tiny has ids 0 to 96"):
        explain(tiny, IDS, answer=97)
    with pytest.raises(BadInput, match=r"splits into ' Mary' \+ ' John'; name one"):
        explain(smollm, "Hello there", answer=" Mary John")
    with pytest.raises(BadInput, match="give answer= too"):
        explain(tiny, IDS, instead=3)
    with pytest.raises(BadInput, match="no lens 'logits'; did you mean 'logit'"):
        explain(tiny, IDS, lens="logits")
    with pytest.raises(BadInput, match="mass=2"):
        explain(tiny, IDS, mass=2)
    with pytest.raises(Refused, match="no language-model head"):
        explain(model_of("siglip_text"), IDS)


# --- figures and page ---------------------------------------------------------------------------


def test_the_waterfall_adds_up(made: tuple[Model, Report]) -> None:
    _, report = made
    steps = waterfall_steps(report, shown=3)
    *parts, total = steps
    assert total.kind == "total" and total.start == 0
    assert total.value == pytest.approx(report.meta["logits"][0], abs=1e-4)
    for before, after in itertools.pairwise(parts):
        assert after.start == pytest.approx(before.start + before.value)
    assert sum(step.kind in ("head", "mlp") for step in parts) == 3
    own = report.tables["attribute"].query("component in ('head', 'mlp')")["contribution"]
    shown = {round(abs(step.value), 5) for step in parts if step.kind in ("head", "mlp")}
    assert shown == {round(x, 5) for x in own.abs().nlargest(3)}
    values = [step.value for step in parts if step.kind in ("head", "mlp")]
    assert values == sorted(values, reverse=True)
    assert len(report.figure("waterfall").data[0].y) == len(waterfall_steps(report))
    with pytest.raises(BadInput, match="no prompt 3"):
        report.figure("waterfall", prompt=3)


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "\u2028",
    "${x}",
    "\ud800",
]


def hostile(report: Report) -> Report:
    """The same report with tokens that want to be markup."""
    meta = json.loads(json.dumps(report.meta))
    meta["tokens"][: len(HOSTILE)] = HOSTILE
    meta["prompts"][0]["tokens"] = meta["tokens"]
    meta["target"]["answer"]["text"] = meta["answers"][0] = HOSTILE[0]
    meta["headline"].append(f"It says ‘{HOSTILE[0]}’.")
    tables = {name: table.copy() for name, table in report.tables.items()}
    for table, column in (
        ("lens", "top_token"),
        ("top", "token"),
        ("flow_words", "token"),
        ("word_heads", "output"),
    ):
        tables[table][column] = HOSTILE[1]
    return Report(report.analysis, tables, report.arrays, meta)


def test_no_token_becomes_markup(made: tuple[Model, Report]) -> None:
    page = hostile(made[1]).to_html()
    assert page.count("<script") == 2  # the data and the page's own
    assert "<img" not in page and "alert(1)</script>" not in page
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in page
    assert not re.search(r"https?://", page)
    assert "default-src 'none'" in page and page.isprintable() is False
    page.encode("utf-8")


def test_a_flow_report_has_the_same_page(tiny: Model) -> None:
    from circuits.flow import information_flow

    page = information_flow(tiny, IDS).to_html()
    assert 'id="flow"' in page and 'id="relevance"' in page and 'id="lens"' not in page


def test_the_script_is_small_and_writes_text_only() -> None:
    from interp.figures.explain_page import SCRIPTS

    folder = Path(interp.__file__).parent / "figures"
    script = "".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    assert len(script.encode()) <= 40_000
    for unsafe in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "fetch(",
    ):
        assert unsafe not in script
