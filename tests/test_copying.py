"""Copying and suppression by weights and on prompts, on models where they are planted."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import circuits
import circuits.heads.own_token as own_token_module
import interp
from circuits.heads.claims import claims
from circuits.heads.copying import COPYING, eigenvalue_positivity, own_token_rank
from circuits.heads.copying_on_text import attended_token_z
from circuits.heads.own_token import own_token_z, token_samples, token_vectors
from circuits.heads.qk_matching import own_key_z
from circuits.heads.scan import Scores
from circuits.heads.suppression import SUPPRESSION
from interp.data.prompts import repeated_tokens
from tests.families import FAMILIES
from tests.ground_truth.copying_model import (
    COPY,
    ELSEWHERE,
    MATCH,
    SUPPRESS,
    copying_model,
    looking_at_their_own_token,
)
from tests.ground_truth.induction_model import (
    INDUCTION_HEAD,
    character_tokenizer,
    induction_model,
)

BY_WEIGHTS = ["copying", "suppression", "copying_rank", "copying_eigenvalues", "qk_matching"]
REFERENCE = pd.read_csv(Path(__file__).parent / "reference" / "smollm2_heads.csv")


@pytest.fixture(scope="module")
def planted():
    return interp.load(copying_model())


@pytest.fixture(scope="module")
def report(planted):
    return circuits.classify_heads(
        planted, detectors=BY_WEIGHTS, prompts=8, ablate=False, evidence=0, progress=False
    )


def test_exactly_the_planted_heads_are_labelled(report):
    labels = {(r.layer, r.head): r.labels for r in report.table.itertuples() if r.labels}
    assert labels == {COPY: "copying", SUPPRESS: "suppression"}


def test_every_score_tells_the_planted_heads_from_their_neighbours(report):
    table = report.table.set_index(["layer", "head"])
    assert table.loc[COPY, "copying"] == pytest.approx(-table.loc[SUPPRESS, "copying"], rel=1e-5)
    others = table.drop([COPY, SUPPRESS])
    assert others["copying"].abs().max() < 1.5
    assert table.loc[COPY, "copying_rank"] < 1.5 and table.loc[SUPPRESS, "copying_rank"] > 95
    assert others["copying_rank"].between(4, 90).all()
    # W_U E is a Gram matrix, so all eigenvalues of the identity's circuit are positive
    assert table.loc[COPY, "copying_eigenvalues"] == pytest.approx(1, abs=1e-4)
    assert table.loc[SUPPRESS, "copying_eigenvalues"] == pytest.approx(-1, abs=1e-4)
    assert table["qk_matching"].idxmax() == MATCH and table.loc[MATCH, "qk_matching"] > 3
    assert table.drop([MATCH])["qk_matching"].abs().max() < 1.5
    assert (table[[f"{name}_null" for name in ("copying", "qk_matching")]].abs() < 1).all(axis=None)


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2", "gemma2"])
def test_z_is_that_of_the_whole_vector_of_logits(family):
    """The plain way, a token at a time: [d_vocab] logits of one head's write, by the model's own modules."""
    model = interp.load(FAMILIES[family]())
    samples = token_samples(model, 2, 0, size=3)
    stream = token_vectors(model, samples.flatten())
    own, other = own_token_z(model, samples)
    rank, _ = own_token_rank(model, samples)
    layer, head = 2, 3
    block, spec = model.spec.blocks[layer], model.spec
    get = model.module.get_submodule
    width = block.d_head

    @torch.no_grad()
    def head_write(x):
        """What the block writes of v(x) in this head's slot, its other heads and its biases left out."""
        normed = x if block.v.input == "resid_pre" else get(block.v.input)(x)
        nothing = torch.zeros_like(x)
        bias_in = nothing if block.v.input == "resid_pre" else get(block.v.input)(nothing)
        read = get(block.v.module)
        v = (read(normed) - read(bias_in))[..., block.v.columns[spec.kv_group(layer, head)]]
        z = torch.zeros(1, block.n_heads * width)
        z[:, head * width : (head + 1) * width] = v
        out = get(block.W_O)(z) - get(block.W_O)(torch.zeros_like(z))
        if block.direct:
            return out
        norm = get(block.attn_write.module)
        return norm(out) - norm(torch.zeros_like(out))

    with torch.no_grad():
        W_U = get(spec.unembedding).weight
        norm = get(spec.final_norm)
        found, ranks = [], []
        for token, x in zip(samples.flatten(), stream.effective, strict=True):
            write = head_write(x[None])
            logits = ((norm(write) - norm(torch.zeros_like(write))) @ W_U.T)[0]
            z = (logits - logits.mean()) / logits.std(correction=0)
            found.append(z)
            ranks.append(float((logits > logits[token]).sum() + 1))
    flat = samples.flatten()
    mine = torch.stack([z[t] for z, t in zip(found, flat, strict=True)]).view(2, 3)
    theirs = samples.roll(-1, 1).flatten()
    another = torch.stack([z[t] for z, t in zip(found, theirs, strict=True)]).view(2, 3)
    # float32; a norm's epsilon beside writes of size 0.1 is worth a few 1e-4 of the scale only
    torch.testing.assert_close(own[:, layer, head], mine.mean(1), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(other[:, layer, head], another.mean(1), rtol=2e-3, atol=2e-3)
    log_rank = torch.tensor(ranks).view(2, 3).log().mean(1)
    torch.testing.assert_close(rank[:, layer, head].log(), log_rank, rtol=0, atol=1e-3)


def test_the_effective_embedding_is_the_embedding_and_the_first_mlp(tiny):
    ids = torch.arange(10)
    body = tiny.module.model
    with torch.no_grad():
        embed = body.embed_tokens(ids)
        block = body.layers[0]
        effective = embed + block.mlp(block.post_attention_layernorm(embed))
    found = token_vectors(tiny, ids)
    torch.testing.assert_close(found.embed, embed)
    torch.testing.assert_close(found.effective, effective)
    assert found.read_by(0) is found.embed and found.read_by(1) is found.effective


def test_eigenvalues_are_those_of_the_whole_token_to_token_matrix(tiny):
    ids = torch.arange(97)
    found = eigenvalue_positivity(tiny, ids[None])
    body, layer, head = tiny.module.model, 1, 3
    with torch.no_grad():
        x = body.layers[layer].input_layernorm(token_vectors(tiny, ids).effective)
        attention = body.layers[layer].self_attn
        v = (x @ attention.v_proj.weight.T).view(97, 2, 8)[:, head // 2]
        write = v @ attention.o_proj.weight.T[head * 8 : (head + 1) * 8]
        full = (write * body.norm.weight) @ tiny.module.lm_head.weight.T
        centred = full - full.mean(1, keepdim=True)
    for name, matrix in (("score", full), ("centred", centred)):
        # float64: the 89 eigenvalues that are 0 would add noise to the sum of sizes
        values = torch.linalg.eigvals(matrix.double())
        expected = float(values.real.sum() / values.abs().sum())
        assert float(found[name][0, layer, head]) == pytest.approx(expected, abs=1e-3)


def test_own_keys_are_scored_by_the_models_own_queries_and_keys(tiny):
    samples = torch.arange(8).view(2, 4)
    own, other = own_key_z(tiny, samples)
    body, head = tiny.module.model, 3
    with torch.no_grad():
        x = body.layers[1].input_layernorm(token_vectors(tiny, samples.flatten()).effective)
        attention = body.layers[1].self_attn
        q = (x @ attention.q_proj.weight.T).view(8, 4, 8)[:, head]
        k = (x @ attention.k_proj.weight.T).view(8, 2, 8)[:, head // 2]
        z = q @ k.T
        z = (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)
    torch.testing.assert_close(own[:, 1, head], z.diagonal().view(2, 4).mean(1))
    away = z[torch.arange(8), samples.roll(-1, 1).flatten()].view(2, 4).mean(1)
    torch.testing.assert_close(other[:, 1, head], away)


@pytest.mark.parametrize("seed", range(3))
def test_random_models_get_no_label(tiny_model, seed):
    model = tiny_model(seed)
    report = circuits.classify_heads(
        model, detectors=BY_WEIGHTS, prompts=8, seed=seed, ablate=False, evidence=0, progress=False
    )
    assert (report.table["labels"] == "").all()
    assert report.table["copying"].abs().max() < 1


def test_on_repeats_the_induction_head_copies_what_it_attends_to():
    model = interp.load(induction_model(), tokenizer=character_tokenizer())
    prompts, _ = repeated_tokens(model, 4)
    score, null = (x.mean(0) for x in attended_token_z(model, prompts, prompts.second_half[0]))
    # one logit of 58 raised, the others equal: z = √57
    assert float(score[INDUCTION_HEAD]) == pytest.approx(57**0.5, rel=0.02)
    assert abs(float(null[INDUCTION_HEAD])) < 1
    score[INDUCTION_HEAD] = 0
    assert score.nan_to_num().abs().max() < 1e-4  # the others write nothing that is unembedded


def test_heads_that_look_at_what_they_write_of_copy_or_suppress_it():
    model = interp.load(looking_at_their_own_token())
    prompts, _ = repeated_tokens(model, 4)
    score, null = (x.mean(0) for x in attended_token_z(model, prompts, prompts.positions[0] >= 1))
    assert score[COPY] > 3 and score[SUPPRESS] < -3
    assert score[ELSEWHERE].abs() < 1
    assert null.abs().max() < 1


def test_a_model_whose_weights_cannot_be_read_says_so():
    report = circuits.classify_heads(
        interp.load(FAMILIES["bert"]()),
        detectors=["copying", "suppression"],
        prompts=4,
        ablate=False,
        evidence=0,
        progress=False,
    )
    assert report.table["copying"].isna().all() and (report.table["labels"] == "").all()
    assert any("by their weights" in note for note in report.meta["notes"])


def test_values_read_from_a_latent_are_refused():
    seen = COPYING.observe(interp.load(FAMILIES["deepseek_v3"]()), 4, 0)
    assert np.isnan(seen["score"]).all()


@pytest.mark.slow
def test_copying_heads_of_the_default_model(smollm):
    """An independent computation with other tokens: 4.4, 4.1, 3.9, 3.3 and -4.2, -4.0.

    The score depends on the kind of token: capitalised words 5.2, lower-case ones 3.7 for L23H2, 4.0 and
    2.5 for L23H1. Two choices of tokens may therefore differ by more than half a unit.
    """
    own, other = (x.numpy() for x in own_token_z(smollm, token_samples(smollm, 32, 0)))
    copying = own.mean(0)
    independent = {(23, 2): 4.4, (23, 0): 4.1, (24, 5): 3.9, (23, 1): 3.3}
    independent |= {(23, 3): -4.2, (24, 4): -4.0}
    for head, value in independent.items():
        assert copying[head] == pytest.approx(value, abs=0.6)
    assert np.abs(other.mean(0)).max() < 1
    found = claims([Scores(COPYING, own, other), Scores(SUPPRESSION, -own, -other)])
    copies, suppresses = (set(zip(*np.nonzero(claim.label), strict=True)) for claim in found)
    assert copies >= {(23, 2), (23, 0), (24, 5)} and len(copies) <= 5
    assert suppresses == {(23, 3), (24, 4)}


@pytest.mark.slow
def test_eigenvalues_agree_with_the_independent_table_and_do_not_single_out_copying(smollm):
    """The table has the whole vocabulary; 1,024 tokens of it are enough for a correlation of 0.99."""
    samples = token_samples(smollm, 1, 0, size=1024)
    found = eigenvalue_positivity(smollm, samples)["score"][0].numpy().ravel()
    independent = REFERENCE.sort_values(["layer", "head"])["ov_eigen_copying"].to_numpy()
    assert np.corrcoef(found, independent)[0, 1] > 0.99
    assert np.abs(found - independent).mean() < 0.08
    by_head = found.reshape(smollm.n_layers, -1)
    copiers = [(23, 2), (23, 0), (24, 5), (23, 1)]
    lowest = min(by_head[head] for head in copiers)
    assert 8 < (found >= lowest).sum() < 40  # high, among heads that copy nothing
    assert by_head[23, 3] < -0.9  # the strongest suppressor


@pytest.mark.slow
def test_heads_that_attend_to_copies_of_their_token_match_it_by_their_weights(smollm):
    """Attention to duplicates is from the independent table, of whole prompts; this is of weights alone.

    All five heads with a fifth of their attention on the earlier copy have queries that prefer a token's own
    key by two standard deviations and more. Induction heads, which attend to the successor of that copy
    with up to 0.9, do not: what they match is not the token itself.
    """
    own, other = (x.mean(0).numpy() for x in own_key_z(smollm, token_samples(smollm, 16, 0, 8)))
    table = REFERENCE.set_index(["layer", "head"])
    duplicates = table.index[table["duplicate_token"] > 0.2]
    inductive = table.index[table["induction"] > 0.4]
    assert len(duplicates) == 5 and len(inductive) >= 5
    assert min(own[head] for head in duplicates) > 1.5
    assert max(own[head] for head in inductive) < 1.2
    assert np.median(own) < 0.6 and np.abs(other).max() < 0.5
    ranks = np.argsort(np.argsort(-own, axis=None)).reshape(own.shape)
    assert max(ranks[head] for head in duplicates) < 27  # within the first tenth of 270


def test_copying_and_suppression_are_observed_once(tiny_model, monkeypatch):
    calls = []
    monkeypatch.setattr(
        own_token_module, "own_token_z", lambda *a: calls.append(1) or own_token_z(*a)
    )
    report = circuits.classify_heads(
        tiny_model(), detectors=["copying", "suppression"], prompts=4, progress=False
    )
    assert len(calls) == 1
    assert (report.table["copying"] == -report.table["suppression"]).all()
