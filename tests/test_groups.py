"""Groups of heads that attend or write alike, on models whose duplicates are planted."""

import numpy as np
import pytest
import torch

import interp
from circuits.heads.groups import attention_likeness, cluster, head_groups, write_likeness
from interp.data.prompts import repeated_tokens
from interp.errors import BadInput
from interp.models.model import Model
from tests.families import FAMILIES
from tests.ground_truth.induction_model import (
    PREVIOUS_TOKEN_HEAD,
    character_tokenizer,
    induction_model,
)


def copied(tiny_model, pairs, parts=("q", "o")) -> Model:
    """A tiny model in which head b of layer 1 has head a's weights, both heads of one kv group."""
    model = tiny_model()
    attention = model.module.model.layers[1].self_attn
    with torch.no_grad():
        for a, b in pairs:
            here, there = slice(8 * a, 8 * a + 8), slice(8 * b, 8 * b + 8)
            if "q" in parts:
                attention.q_proj.weight[there] = attention.q_proj.weight[here]
            if "o" in parts:
                attention.o_proj.weight[:, there] = attention.o_proj.weight[:, here]
    return Model(model.module, id="copied")


def test_copies_land_in_one_cluster_and_the_others_do_not(tiny_model):
    report = head_groups(
        copied(tiny_model, [(0, 1)]), data="repeated", prompts=4, tested=0, progress=False
    )
    table = report.table[report.table["layer"] == 1].set_index("head")
    for kind in ("attend", "write"):
        assert table.loc[0, kind] == table.loc[1, kind]
        assert set(table.loc[[2, 3], kind]).isdisjoint({table.loc[0, kind]})
        assert table.loc[0, f"nearest_{kind}"] == 1
        assert table.loc[0, f"likeness_{kind}"] == pytest.approx(1, abs=1e-5)
    other = report.table[report.table["layer"] == 0]
    assert (other["likeness_attend"] < 0.9).all()
    layers = report.tables["layers"].set_index("layer")
    assert layers.loc[1, "agreement_attend"] > 0.8 and layers.loc[1, "agreement_write"] > 0.8


def test_attending_alike_is_not_writing_alike(tiny_model):
    """The same queries, but each its own output weights."""
    model = copied(tiny_model, [(0, 1)], parts=("q",))
    prompts, _ = repeated_tokens(model, 2, length=12)
    assert attention_likeness(model, prompts)[1][:, 0, 1].min() > 0.9999
    assert np.abs(write_likeness(model, prompts)[1][:, 0, 1]).max() < 0.7


def test_likeness_is_the_correlation_it_says(tiny):
    """Against whole patterns and whole writes."""
    prompts, _ = repeated_tokens(tiny, 2, length=10)
    run = tiny.run(prompts.batch, capture=["pattern", "z"])
    attend, write = attention_likeness(tiny, prompts), write_likeness(tiny, prompts)
    for layer in range(tiny.n_layers):
        written = torch.einsum("bphd,hdm->bphm", run.cache[f"z.{layer}"], tiny.W_O(layer))
        written = written - written.mean(1, keepdim=True)
        for row in range(2):
            flat = written[row].transpose(0, 1).flatten(1)
            expected = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
            np.testing.assert_allclose(write[layer][row], expected, atol=1e-5)
            rows = []
            for q in range(prompts.length):
                seen = run.cache[f"pattern.{layer}"][row, :, q, : q + 1]
                rows.append(seen - seen.mean(-1, keepdim=True))
            flat = torch.cat(rows, dim=-1)
            expected = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
            np.testing.assert_allclose(attend[layer][row], expected, atol=1e-5)


def test_two_planted_pairs_are_two_clusters(tiny_model):
    model = copied(tiny_model, [(0, 1), (2, 3)])
    report = head_groups(model, data="repeated", prompts=4, tested=0, progress=False)
    layer = report.table[report.table["layer"] == 1]
    assert layer["attend"].tolist() == layer["write"].tolist() == [0, 0, 1, 1]
    # both pairs share keys and values, so each kv group is one unit, more alike than any other pair
    groups = report.tables["kv_groups"].set_index(["layer", "kv_group"]).loc[1]
    assert (groups["attend_within"] > 0.999).all() and (groups["attend_between"] < 0.9).all()
    assert (groups["attend_above"] >= 4 / 6).all()


def test_a_head_that_another_can_replace_is_missed_only_with_it():
    """Two copies of the previous-token head: either is free, both together cost the whole recall."""
    module = induction_model()
    attention = module.transformer.h[0].attn
    d_model, d_head = attention.embed_dim, attention.head_dim
    old, new = PREVIOUS_TOKEN_HEAD[1] * d_head, 3 * d_head
    with torch.no_grad():
        for part in range(3):
            source = attention.c_attn.weight[:, part * d_model + old :][:, :d_head].clone()
            attention.c_attn.weight[:, part * d_model + new :][:, :d_head] = source
        attention.c_proj.weight[new : new + d_head] = attention.c_proj.weight[old : old + d_head]
    model = interp.load(module, tokenizer=character_tokenizer())
    report = head_groups(model, data="repeated", prompts=4, by="write", progress=False)
    assert len(report.tables["redundancy"]) == 1
    found = report.tables["redundancy"].iloc[0]
    assert found["layer"] == 0 and found["heads"] == "1,3" and found["likeness"] > 0.999
    assert found["largest"] < 0.5 and found["all"] > 3
    assert found["gap_low"] > 2


def test_heads_without_weights_are_like_none():
    model = interp.load(induction_model(), tokenizer=character_tokenizer())
    prompts, _ = repeated_tokens(model, 2)
    for likeness in (attention_likeness(model, prompts), write_likeness(model, prompts)):
        for layer in likeness.values():
            np.testing.assert_array_equal(layer, np.broadcast_to(np.eye(4), layer.shape))


@pytest.mark.parametrize("seed", range(3))
def test_unrelated_heads_stay_alone(seed):
    """Likenesses of independent random rows: no clusters."""
    rows = np.random.default_rng(seed).normal(size=(9, 400))
    labels, _ = cluster(np.corrcoef(rows))
    assert len(set(labels)) == 9


def test_layers_with_few_heads():
    assert cluster(np.eye(1))[0].tolist() == [0]
    assert cluster(np.array([[1, 0.8], [0.8, 1]]))[0].tolist() == [0, 0]
    assert cluster(np.array([[1, 0.2], [0.2, 1]]))[0].tolist() == [0, 1]
    assert cluster(np.full((5, 5), 0.9) + 0.1 * np.eye(5))[0].tolist() == [0] * 5


def test_an_encoder_is_compared_but_not_ablated():
    model = Model(FAMILIES["siglip_text"](), id="siglip")
    report = head_groups(model, data="repeated", prompts=2, progress=False)
    assert len(report.table) == 12 and report.tables["redundancy"].empty
    whole = attention_likeness(model, repeated_tokens(model, 1, length=8)[0])[0]
    assert whole.shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"by": "atend"}, "did you mean 'attend'"),
        ({"data": "texts"}, "did you mean 'text'"),
        ({"prompts": 1}, "at least 2"),
        ({"tested": -1}, "0 or more"),
    ],
)
def test_bad_options_are_told(tiny, options, told):
    with pytest.raises(BadInput, match=told):
        head_groups(tiny, **options)


@pytest.mark.slow
def test_on_the_default_model(smollm):
    """Prose: likeness is a correlation, clusters are few, and heads of a kv group attend more alike."""
    report = head_groups(smollm, prompts=2, tested=0, progress=False)
    table, kv = report.table, report.tables["kv_groups"]
    assert len(table) == 270 and len(kv) == 90
    assert table["likeness_attend"].between(-1, 1).all()
    assert kv["attend_within"].mean() > kv["attend_between"].mean()
    layers = report.tables["layers"]
    assert layers["clusters_attend"].between(1, 9).all()
    assert layers["agreement_attend"].mean() > 0.3
