"""Massive activations: planted ones are found, and what hangs on them falls when they are removed."""

import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import interp
from circuits.heads.massive import check_options, massive, massive_entries
from interp.errors import BadInput
from tests.families import FAMILIES
from tests.ground_truth.induction_model import character_tokenizer

BOS, DIMENSION, CONSTANT = 1, 5, 6
SINK = (1, 0)
SIZE = 3e5


@pytest.fixture(scope="module")
def planted(tiny_model):
    """BOS carries one huge entry, written by the first MLP, and head L1H0 looks for nothing else.

    The MLP's neuron 0 is on for BOS alone. The constant entry of every token gives the head its query,
    in the slowest rotary pair, which 64 positions hardly turn.
    """
    model = tiny_model()
    body = model.module.model
    with torch.no_grad():
        embed = body.embed_tokens.weight
        embed[:, DIMENSION] = 0.0
        embed[:, CONSTANT] = 3.0
        embed[:, 7] = 0.0
        embed[BOS, 7] = 6.0
        for layer in body.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.fill_(1.0)
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)
        mlp = body.layers[0].mlp
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight[0] = 0.0
            projection.weight[0, 7] = 10.0
        mlp.down_proj.weight[DIMENSION] = 0.0
        mlp.down_proj.weight[DIMENSION, 0] = SIZE / 1000
        attention = body.layers[1].self_attn
        attention.q_proj.weight[:8] = 0.0
        attention.q_proj.weight[3, CONSTANT] = 60.0
        attention.k_proj.weight[:8] = 0.0
        attention.k_proj.weight[3, DIMENSION] = 10.0
    return model


@pytest.fixture(scope="module")
def report(planted):
    return massive(planted, n=4, progress=False)


def test_the_planted_entry_is_found_and_no_other(report):
    table = report.table
    assert list(table["layer"]) == [0, 1]
    assert set(table["dimension"]) == {DIMENSION} and set(table["token_id"]) == {BOS}
    assert table["first"].all() and (table["prompts"] == 4).all()
    first = table.iloc[0] if table.iloc[0]["layer"] == 0 else table.iloc[1]
    # what the MLP wrote is all of it: the stream held nothing there
    assert first["mlp_write"] == pytest.approx(first["value"], rel=1e-2)
    assert abs(first["attn_write"]) < 1e-3 * first["value"]
    behind = table[table["layer"] == 1].iloc[0]
    assert abs(behind["mlp_write"]) < 1e-2 * behind["value"]  # it is only carried on
    assert (table["times_median"] > 1000).all()


def test_layers_tell_its_size_and_the_peak_of_its_token(report):
    layers = report.tables["layers"]
    assert layers["largest"].tolist() == pytest.approx(
        [report.table["largest"].max()] * 2, rel=0.01
    )
    assert (layers["second"] < 100).all()
    assert (layers["first_peak"] > 100).all()
    assert layers["peak"].tolist() == pytest.approx(layers["first_peak"].tolist())


def test_the_sink_hangs_on_it(report):
    """Removed, the head that looks for it attends evenly; as many other entries make no difference."""
    heads = report.tables["heads"].set_index(["layer", "head"])
    assert heads.loc[SINK, "sink"] and heads.loc[SINK, "first_token"] > 0.95
    effects = report.tables["interventions"].set_index("condition")
    kept, gone = effects.loc["clean"], effects.loc["set to 0"]
    assert kept["sink_rate"] - gone["sink_rate"] >= 1 / 8 - 1e-6
    assert effects.loc["others set to 0", "sink_rate"] == kept["sink_rate"]
    # all prompts begin with the same token, so its mean is its value
    assert effects.loc["set to their mean", "loss"] == pytest.approx(kept["loss"], rel=1e-5)


def test_writers_add_up_to_the_entry_and_name_the_planted_one(report):
    """By linearity: embedding, heads, biases and MLPs sum to the entry."""
    writers = report.tables["writers"]
    top = writers.iloc[0]
    assert (top["writer"], top["at"], top["dimension"]) == ("mlp", 0, DIMENSION)
    assert top["share"] == pytest.approx(1, abs=1e-2)
    value = report.table.set_index(["layer", "dimension"]).loc[(top["layer"], DIMENSION), "value"]
    assert writers["adds"].sum() == pytest.approx(value, rel=1e-5)


def test_a_head_that_writes_it_is_named(planted):
    """The same entry, written by a head instead: BOS attends to itself alone, so z is its v."""
    model = interp.load(copy.deepcopy(planted.module))
    body = model.module.model
    with torch.no_grad():
        attention = body.layers[0].self_attn
        attention.v_proj.weight[:8] = 0.0
        attention.v_proj.weight[2, 7] = 10.0
        attention.o_proj.weight[DIMENSION] = 0.0
        attention.o_proj.weight[DIMENSION, 2] = SIZE / 100
        body.layers[0].mlp.down_proj.weight[DIMENSION] = 0.0
    found = massive(model, n=4, intervene=False, progress=False).tables["writers"]
    top = found.iloc[0]
    assert (top["writer"], top["at"], top["head"], top["dimension"]) == ("head", 0, 0, DIMENSION)
    assert top["share"] == pytest.approx(1, abs=1e-2)


def test_each_head_has_its_attention_without_the_entry(report):
    """The head that looks for it attends evenly then; it stays without that head: an MLP writes it."""
    heads = report.tables["heads"].set_index(["layer", "head"])
    lost = heads["first_token"] - heads["first_token_without"]
    assert lost.idxmax() == SINK and heads.loc[SINK, "first_token_without"] < 0.2
    effects = report.tables["interventions"].set_index("condition")
    assert effects.loc["set to 0", "largest"] < 100
    whole = effects.loc["clean", "largest"]
    assert effects.loc["z of sink heads set to 0", "largest"] == pytest.approx(whole, rel=1e-2)


def test_the_sink_rate_is_that_of_the_patterns(planted, report):
    """By whole patterns: mean over rows and prompts of A[q, 0], then the share of heads over 0.3."""
    from interp.data.prompts import repeated_tokens

    _, plain = repeated_tokens(planted, 4, length=32)
    pattern = planted.run(plain.batch, capture=["pattern"]).cache["pattern"]
    first = pattern[..., 0].mean((0, -1))
    assert report.meta["sink_rate"] == pytest.approx(float((first > 0.3).float().mean()))
    found = report.tables["heads"]["first_token"].to_numpy().reshape(2, 4)
    assert found == pytest.approx(first.numpy(), abs=1e-5)


def test_both_thresholds_are_needed():
    x = torch.ones(1, 4, 8)
    x[0, 0, 0] = 150.0  # large, but not a thousand times the median
    assert not massive_entries(x).any()
    x = x / 1000
    x[0, 0, 0] = 50.0  # a thousand times the median, but not large
    assert not massive_entries(x).any()
    x[0, 0, 0] = -150.0
    assert massive_entries(x).sum() == 1


def test_medians_are_those_of_the_prompt_alone():
    x = torch.ones(2, 4, 8)
    x[0, 0, 0] = x[1, 0, 0] = 1500.0
    x[1, 1:] *= 10
    assert massive_entries(x).flatten(1).any(1).tolist() == [True, False]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bert", "bloom", "mamba"])
def test_random_models_have_none(family):
    report = massive(interp.load(FAMILIES[family]()), n=2, length=20, progress=False)
    assert len(report.table) == 0
    assert list(report.tables["interventions"]["condition"]) == ["clean"]
    assert any("No activation" in note for note in report.meta["notes"])
    assert ("sink_rate" in report.meta) == (family != "mamba")  # it has no attention
    assert len(report.figure("layers").data) >= 6


def test_a_model_of_attention_alone_has_no_write_of_an_mlp(hand_built):
    assert not hand_built.layers_with("mlp_write")
    report = massive(hand_built, n=2, length=20, progress=False)
    assert len(report.tables["layers"]) == 2


def test_without_a_lead_token_the_first_is_ordinary_and_the_report_says_so():
    tokenizer = character_tokenizer()
    tokenizer.bos_token = None
    module = FAMILIES["llama"]()
    module.config.bos_token_id = module.config.eos_token_id = None
    report = massive(interp.load(module, tokenizer=tokenizer), n=2, length=20, progress=False)
    assert "sink_rate_without_lead" not in report.meta
    assert any("ordinary text" in note for note in report.meta["notes"])


def test_bad_options_are_told_before_anything_runs(tiny):
    for options, told in (({"n": 0}, "n=0"), ({"length": 4}, "length=4")):
        with pytest.raises(BadInput, match=told):
            check_options(**options)
    with pytest.raises(BadInput, match="no prompts"):
        massive(tiny, [])


@pytest.mark.slow
def test_the_default_model(smollm):
    """Independently: dimension 507 of BOS at 24,926; on other prose a sink rate of 0.643 with BOS.

    The sink rate moves with the prose and the context's length, so heads are compared too: with
    an independent table of mean A[q, 0] on other prose and twice as many tokens.
    """
    report = massive(smollm, n=4, intervene=False, progress=False)
    top = report.table.iloc[0]
    assert (top["dimension"], top["token_id"]) == (507, smollm.tokenizer.bos_token_id)
    assert top["largest"] == pytest.approx(24_926, rel=1e-3)
    assert top["layer"] == 11 and top["mlp_write"] > 0.99 * top["value"]
    assert report.table["first"].all()
    writers = report.tables["writers"]
    assert (writers.iloc[0]["writer"], writers.iloc[0]["at"]) == ("mlp", 11)
    assert writers.iloc[0]["share"] > 0.99
    entry = writers[writers["dimension"] == 507]["adds"].sum()
    assert entry == pytest.approx(top["value"], rel=1e-3)
    assert 0.6 < report.meta["sink_rate"] < 0.85
    assert 0.6 < report.meta["sink_rate_without_lead"] < 0.85
    reference = Path(__file__).parent / "reference" / "smollm2_heads.csv"
    heads = report.tables["heads"].merge(pd.read_csv(reference), on=["layer", "head"])
    # four short windows beside sixteen long ones: 0.89 to 0.93 over heads
    assert np.corrcoef(heads["first_token"], heads["first_token_text"])[0, 1] > 0.85
