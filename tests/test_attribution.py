"""Direct logit attribution: contributions sum to the logit, on every family whose writes are known."""

import numpy as np
import pytest
import torch

from circuits.attribution import direct_attribution
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.run.edits import Edit
from tests.families import FAMILIES

NEEDED = {"attn_out", "attn_write", "mlp_write", "unembedding"}
SUMMABLE = [
    name
    for name, family in FAMILIES.items()
    if "CausalLM" in family.model or "LMHead" in family.model
    if not NEEDED & family.refused
]


def test_at_least_twelve_families_are_summable():
    assert len(SUMMABLE) >= 12


@pytest.mark.parametrize("name", SUMMABLE)
def test_contributions_sum_to_the_logit_difference(name):
    model = Model(FAMILIES[name](), id=name)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
    report = direct_attribution(model, ids, answer=20, instead=30)
    run = model.run(ids)
    softcapped = model.spec.logit_softcap is not None
    total = report.table.groupby("prompt")["contribution"].sum()
    for row in range(2):
        logits = report.meta["logits"][row]
        # float32 sums of some thirty terms, each rounded at the size of the largest
        allowed = 1e-5 * float(report.table["contribution"].abs().max()) + 1e-5
        assert total[row] == pytest.approx(logits, abs=allowed)
        if not softcapped:
            wanted = float(run.logits[row, -1, 20] - run.logits[row, -1, 30])
            assert logits == pytest.approx(wanted, abs=allowed)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox", "granite", "olmo2"])
def test_sources_sum_to_their_head(name):
    model = Model(FAMILIES[name](), id=name)
    report = direct_attribution(model, torch.tensor([[5, 6, 7, 8, 9, 10]]), answer=20)
    heads = report.table[report.table["component"] == "head"]
    heads = heads.set_index(["layer", "head"])["contribution"].sort_index()
    sources = report.tables["sources"].groupby(["layer", "head"])["contribution"].sum()
    np.testing.assert_allclose(sources.to_numpy(), heads.to_numpy(), atol=1e-5)


def test_a_head_of_the_last_layer_contributes_what_removing_it_takes_away(tiny):
    """With the final scale frozen, a last-layer head's contribution is exact: nothing reads it later
    but the MLP; a model without that MLP's write leaves the head's direct effect alone."""
    ids = torch.tensor([[5, 6, 7, 8]])
    last = tiny.n_layers - 1
    without_mlp = Edit.zero(f"mlp_write.{last}")
    run = tiny.run(ids, capture=[f"resid_post.{last}"], edits=[without_mlp])
    removed = tiny.run(
        ids, capture=[f"resid_post.{last}"], edits=[without_mlp, Edit.zero(f"z.{last}.1")]
    )
    site = f"resid_post.{last}"
    write = (run.cache[site] - removed.cache[site])[:, -1]
    final = tiny.run(ids, capture=[site]).cache[site][:, -1]
    direction = tiny.final_norm.pull_back(tiny.W_U.T[[20]], at=final)
    report = direct_attribution(tiny, ids, answer=20)
    table = report.table
    found = table[(table["layer"] == last) & (table["head"] == 1)]["contribution"].iloc[0]
    assert found == pytest.approx(float((write * direction).sum()), abs=1e-5)


def test_padding_changes_nothing(tiny):
    short, longer = torch.tensor([[5, 6, 7]]), torch.tensor([[1, 2, 5, 6, 7], [9, 10, 11, 12, 13]])
    from interp.run.batch import Batch

    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    alone = direct_attribution(tiny, short, answer=20).table
    padded = direct_attribution(tiny, Batch.of_ids(longer, mask), answer=20).table
    padded = padded[padded["prompt"] == 0]
    np.testing.assert_allclose(alone["contribution"], padded["contribution"], atol=1e-5)


@pytest.mark.slow
def test_the_default_model_says_mary(smollm):
    prompt = "When Mary and John went to the store, John gave a drink to"
    report = direct_attribution(smollm, prompt, answer=" Mary", instead=" John")
    logits = smollm.run(prompt).logits[0, -1]
    mary, john = smollm.token_id(" Mary"), smollm.token_id(" John")
    assert float(logits.softmax(-1)[mary]) > 0.9
    assert report.meta["logits"][0] == pytest.approx(float(logits[mary] - logits[john]), abs=1e-3)
    assert report.table["contribution"].sum() == pytest.approx(report.meta["logits"][0], abs=5e-3)
    heads = report.table[report.table["component"] == "head"].nlargest(10, "contribution")
    writers = set(zip(heads["layer"].astype(int), heads["head"].astype(int), strict=True))
    # An independent exact path-patching found these to move the name to the end.
    assert (23, 0) in writers or (23, 2) in writers
    sources = report.tables["sources"]
    best = heads.iloc[0]
    of_best = sources[(sources["layer"] == best["layer"]) & (sources["head"] == best["head"])]
    source = int(of_best.loc[of_best["contribution"].idxmax(), "source"])
    assert "Mary" in report.meta["tokens"][0][source] or "John" in report.meta["tokens"][0][source]


def test_bad_input(tiny, smollm):
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(BadInput, match="outside the vocabulary"):
        direct_attribution(tiny, ids, answer=97)
    with pytest.raises(BadInput, match="position 3"):
        direct_attribution(tiny, ids, answer=1, position=3)
    with pytest.raises(BadInput, match="splits into"):
        direct_attribution(smollm, "The capital", answer=" Ouagadougou")
    bert = Model(FAMILIES["bert"](), id="bert")
    with pytest.raises(Refused, match="attn_write"):
        direct_attribution(bert, ids, answer=1)
