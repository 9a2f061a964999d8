"""Direct logit attribution: contributions sum to the logit, on every family whose writes are known."""

import numpy as np
import pytest
import torch

from circuits.attribution import direct_attribution, direct_contributions, rows_at, strongest
from interp.direction import places_of
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.models.weights import FrozenNorm
from interp.run.batch import Batch
from interp.run.edits import Edit
from tests.families import FAMILIES
from tests.ground_truth.induction_model import (
    INDUCTION_HEAD,
    character_tokenizer,
    induction_model,
)

NEEDED = {"attn_out", "attn_write", "mlp_write", "unembedding"}
SUMMABLE = [
    name
    for name, family in FAMILIES.items()
    if "CausalLM" in family.model or "LMHead" in family.model
    if family.sums and not NEEDED & family.refused
]
WITH_NEURONS = [name for name in SUMMABLE if "mlp_post" not in FAMILIES[name].refused]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


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


@pytest.mark.parametrize("name", SUMMABLE)
def test_parts_are_what_the_modules_write(name):
    """Heads and biases against z W_O formed whole, MLPs against their writes: no part is a remainder."""
    model = Model(FAMILIES[name](), id=name)
    found = direct_contributions(model, IDS, answer=20, instead=30)
    last = f"resid_post.{model.n_layers - 1}"
    sites = ["z", "attn_out", "attn_write", "mlp_write", last]
    cache = model.run(IDS, capture=sites, logits=False).cache
    d = model.final_norm.pull_back(
        (model.W_U[:, 20] - model.W_U[:, 30])[None], at=cache[last][:, -1]
    )
    d = d * model.spec.logit_scale
    allowed = 1e-5 * float(max(found.heads.abs().max(), found.mlps.abs().max())) + 1e-6
    for layer, block in enumerate(model.spec.blocks):
        if block.mlp_write is not None:
            write = cache[f"mlp_write.{layer}"][:, -1]
            assert torch.allclose(found.mlps[:, layer], (write * d).sum(-1), atol=allowed)
        if block.attn_write is None:
            continue
        z, W, b = cache[f"z.{layer}"][:, -1], model.W_O(layer), model.b_O(layer)
        written = torch.einsum("bhd,hdm->bhm", z, W)
        bias, shift = b, torch.zeros_like(b)
        if not block.direct:
            norm = FrozenNorm(model.module.get_submodule(block.attn_write.module), len(b))
            scale = norm.scale(cache[f"attn_out.{layer}"][:, -1])
            written = norm.gain * norm.centre(written) / scale[:, None]
            bias, shift = norm.gain * norm.centre(b) / scale, norm.bias
        written, bias = written * block.attn_write.scale, (bias + shift) * block.attn_write.scale
        assert torch.allclose(found.heads[:, layer], (written * d[:, None]).sum(-1), atol=allowed)
        assert torch.allclose(found.attn_biases[:, layer], (bias * d).sum(-1), atol=allowed)


@pytest.mark.parametrize("name", WITH_NEURONS)
def test_neurons_and_bias_sum_to_their_mlp(name):
    model = Model(FAMILIES[name](), id=name)
    found = direct_contributions(model, IDS, answer=20, instead=30, neurons=True)
    assert list(found.neurons) == model.layers_with("mlp_post") == list(found.activations)
    active = model.run(IDS, capture=["mlp_post"], logits=False).cache
    for layer, neurons in found.neurons.items():
        allowed = 1e-5 * float(neurons.abs().sum(1).max()) + 1e-6
        total = neurons.sum(1) + found.mlp_biases[:, layer]
        assert torch.allclose(total, found.mlps[:, layer], atol=allowed)
        values = active[f"mlp_post.{layer}"][:, -1]
        assert torch.allclose(found.activations[layer], values, atol=1e-5)


def test_the_strongest_neurons_are_named(tiny):
    found = direct_contributions(tiny, IDS, answer=20, neurons=True)
    table = direct_attribution(tiny, IDS, answer=20, neurons=5).tables["neurons"]
    assert len(table) == 10
    for prompt, rows in table.groupby("prompt"):
        every = torch.cat([found.neurons[layer][prompt] for layer in range(2)])
        best = every[every.abs().topk(5).indices]
        np.testing.assert_allclose(rows["contribution"], best, rtol=1e-5)
        for row in rows.itertuples():
            # float32; with sources, attention is computed by another kernel
            expected = (
                x[row.layer][prompt, row.neuron] for x in (found.neurons, found.activations)
            )
            assert (row.contribution, row.activation) == pytest.approx(
                tuple(map(float, expected)), abs=1e-5
            )


def test_a_model_without_neurons_says_so():
    experts = next(name for name in SUMMABLE if name not in WITH_NEURONS)
    report = direct_attribution(Model(FAMILIES[experts](), id=experts), IDS[:1], answer=20)
    assert report.tables["neurons"].empty
    assert any("MLPs are given whole" in note for note in report.meta["notes"])
    assert len(report.table.query("component == 'mlp'")) == 3


def test_only_the_read_row_is_kept(tiny):
    """Of every activation one row a prompt: [batch, …] and no view into something larger."""
    batch = tiny.as_batch(IDS)
    kept = rows_at(tiny, batch, places_of(batch, -1), ["z", "mlp_out", "mlp_post"])
    for (name, _), value in kept.items():
        assert len(value) == 2 and value.ndim == (3 if name == "z" else 2)
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_chunks_of_pattern_rows_give_the_same_sources(tiny, monkeypatch):
    whole = direct_attribution(tiny, IDS, answer=20, position=4).tables["sources"]
    monkeypatch.setattr("interp.models.attention.row_chunks", lambda *_: [(0, 2), (2, 3), (3, 6)])
    parts = direct_attribution(tiny, IDS, answer=20, position=4).tables["sources"]
    np.testing.assert_allclose(parts["contribution"], whole["contribution"], atol=1e-6)
    assert (parts.query("source > 4")["weight"] == 0).all()
    assert parts.groupby(["prompt", "layer", "head"])["weight"].sum().to_numpy() == pytest.approx(1)


def test_an_answer_of_its_own_for_every_prompt(tiny):
    both = direct_contributions(
        tiny, IDS, answer=torch.tensor([20, 21]), instead=torch.tensor([3, 4])
    )
    for row in range(2):
        alone = direct_contributions(tiny, IDS[[row]], answer=20 + row, instead=3 + row)
        assert torch.allclose(both.heads[row], alone.heads[0], atol=1e-5)
    with pytest.raises(BadInput, match="wanted one a prompt"):
        direct_contributions(tiny, IDS, answer=torch.tensor([20]))
    without = direct_contributions(tiny, IDS)
    assert torch.equal(without.answers, tiny.run(IDS).logits[:, -1].argmax(-1))


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


def test_the_summary_has_the_largest_contributions_first(tiny):
    report = direct_attribution(tiny, IDS[:1])
    shown, sizes = strongest(report), report.table["contribution"].abs()
    assert shown["contribution"].abs().tolist() == sizes.nlargest(15).tolist()


def test_a_model_of_attention_alone_is_taken_apart():
    """The hand-built one: its induction head writes the answer, and no MLP is looked for."""
    model = Model(induction_model(), id="hand-built", tokenizer=character_tokenizer())
    report = direct_attribution(model, "qgtbxnepqgtbx", answer="n", instead="e")
    assert set(report.table["component"]) == {"embed", "constant", "head", "attn_bias"}
    assert report.table["contribution"].sum() == pytest.approx(report.meta["logits"][0], abs=1e-4)
    best = report.table.loc[report.table["contribution"].idxmax()]
    assert (best["layer"], best["head"]) == INDUCTION_HEAD


def test_a_token_that_the_tokenizer_does_not_know():
    model = Model(induction_model(), id="hand-built", tokenizer=character_tokenizer())
    assert model.tokens([model.token_id("<unk>")]) == ["<unk>"]
    with pytest.raises(BadInput, match="'é' is not in the vocabulary of hand-built: <unk> there"):
        direct_attribution(model, "qgt", answer="é")


def test_bad_input(tiny, smollm):
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(BadInput, match="outside the vocabulary"):
        direct_attribution(tiny, ids, answer=97)
    for position in (3, -4):
        with pytest.raises(BadInput, match="positions are 0 to 2, or -1 to -3 from the end"):
            direct_attribution(tiny, ids, answer=1, position=position)
    with pytest.raises(BadInput, match="the token is empty: wanted"):
        direct_attribution(smollm, "The capital", answer="")
    with pytest.raises(BadInput, match="splits into"):
        direct_attribution(smollm, "The capital", answer=" Ouagadougou")
    bert = Model(FAMILIES["bert"](), id="bert")
    with pytest.raises(Refused, match="attn_write"):
        direct_attribution(bert, ids, answer=1)
