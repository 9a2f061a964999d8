"""Heads and neurons as words: every vector against the model's own numbers and plain formulas.

Tolerances: float32; a direction is checked through dot products with residuals of a few units, so
1e-4 of the largest score is what rounding of one block leaves.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from circuits.word_vectors import word_vectors
from circuits.words import _line, loudest, words
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.models.weights import FrozenNorm, linear_map
from interp.run.batch import Batch
from tests.families import FAMILIES, GROUPED

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
STORE = "When Mary and John went to the store, John gave a drink to"
NEEDED = {"attn_out", "attn_write", "unembedding"}
READABLE = [
    name
    for name, family in FAMILIES.items()
    if "CausalLM" in family.model or "LMHead" in family.model
    if family.sums and not NEEDED & family.refused
]
WITHOUT_BIASES = ["llama", "gemma2", "gemma3", "olmo2", "qwen3", "granite", "mixtral", "cohere"]
"""Rotary positions; grouped heads; norms before, after and on queries and keys; a scaled stream."""


def model_of(name: str) -> Model:
    return Model(FAMILIES[name](), id=name)


def close(got: Tensor, wanted: Tensor, allowed: float = 1e-4) -> bool:
    return float((got - wanted).detach().abs().max()) <= allowed * float(
        wanted.detach().abs().max()
    )


@pytest.mark.parametrize("name", READABLE)
def test_every_family_is_read(name: str) -> None:
    model = model_of(name)
    report = words(model, IDS, top_k=3, neurons=4)
    heads = report.tables["heads"]
    assert len(heads) == 2 * len(model.spec.heads)
    assert (heads[["output", "value"]] != "").all(axis=None)
    has_neurons = "mlp_post" not in model.spec.refused
    assert len(report.tables["neurons"]) == (8 if has_neurons else 0)
    assert has_neurons or any("No neurons are named" in note for note in report.meta["notes"])
    assert (heads.groupby("prompt")["norm"].diff().dropna() <= 0).all()
    counted = report.table.groupby(["prompt", "kind", "layer", "index", "what"]).size()
    assert (counted == 3).all()
    for module in model.module.modules():
        assert not module._forward_hooks


@pytest.mark.parametrize("name", WITHOUT_BIASES)
def test_a_querys_direction_gives_its_score(name: str) -> None:
    """u · resid_j = q_i · k_j: the direction looks for exactly what the score counts."""
    model = model_of(name)
    found = word_vectors(model, IDS, position=-1)
    sites = ["resid_pre", "q", "k"]
    cache = model.run(IDS, capture=sites, logits=False).cache
    for layer, heads in found.heads.items():
        q, k, pre = (cache[f"{site}.{layer}"] for site in ("q", "k", "resid_pre"))
        for row in range(2):
            for head in range(model.spec.blocks[layer].n_heads):
                j = int(heads.sources[row, head])
                score = q[row, -1, head] @ k[row, j, model.spec.kv_group(layer, head)]
                assert heads.scores[row, head] == pytest.approx(float(score), abs=1e-4)
        rows = torch.arange(2)[:, None]
        looked_for = (heads.vectors["query"] * pre[rows, heads.sources]).sum(-1)
        answered = (heads.vectors["key"] * pre[:, -1:]).sum(-1)
        assert close(looked_for, heads.scores) and close(answered, heads.scores)


def test_a_prompt_reads_the_same_beside_longer_ones() -> None:
    """Also where the first row begins with padding, whose vectors may be zero."""
    for name in ("llama", "gpt2", "gpt_oss"):
        module = FAMILIES[name]()
        with torch.no_grad():
            module.get_input_embeddings().weight[0] = 0  # type: ignore[operator]
        model = Model(module, id=name)
        alone = word_vectors(model, IDS[:1, :3], neurons=3)
        ids = torch.stack([torch.cat([torch.zeros(3).long(), IDS[0, :3]]), IDS[1]])
        beside = word_vectors(model, Batch.of_ids(ids, ids > 0), neurons=3)
        for layer, heads in alone.heads.items():
            assert torch.equal(beside.heads[layer].sources[:1] - 3, heads.sources)
            for what, vector in heads.vectors.items():
                assert close(beside.heads[layer].vectors[what][:1], vector), (name, layer, what)
        for one, same in zip(alone.neurons, beside.neurons, strict=False):
            assert all(close(same.vectors[what], x) for what, x in one.vectors.items()), name


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_precision_with_a_massive_first_token(name: str) -> None:
    """A thousand times the massive entry is no number in float16; 2e-2 is what its rounding leaves."""
    module = FAMILIES[name]()
    with torch.no_grad():
        module.get_input_embeddings().weight[5, 3] = 300.0  # type: ignore[operator]
    exact = word_vectors(Model(module, id=name), IDS[:1], neurons=0)
    half = word_vectors(Model(module.half(), id=name), IDS[:1], neurons=0)
    assert [(n.site, n.name) for n in half.norms] == [(n.site, n.name) for n in exact.norms]
    for layer, heads in exact.heads.items():
        same = heads.sources == half.heads[layer].sources
        assert bool(same.any())
        for what, vector in heads.vectors.items():
            assert close(half.heads[layer].vectors[what][same], vector[same], 2e-2), what


@pytest.mark.parametrize("act", ["silu", "tanh", "sigmoid"])
def test_an_activation_that_saturates_is_no_norm(act: str) -> None:
    """What excites a neuron is the gradient of its activation, the norm's scale alone being held."""
    torch.manual_seed(0)
    config = LlamaConfig(**(GROUPED | {"intermediate_size": 32, "hidden_act": act}))
    module = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for block in module.model.layers:
            block.mlp.gate_proj.weight *= 20  # type: ignore[operator]
    model = Model(module, id=act)
    for neuron in word_vectors(model, IDS[:1], neurons=4).neurons:
        block = model.blocks[neuron.layer]
        mid = model.run(IDS[:1], capture=["resid_mid"], logits=False).cache["resid_mid"]
        x = mid[0, -1, neuron.layer].detach().requires_grad_()
        norm = FrozenNorm(block.post_attention_layernorm, 32)  # type: ignore[arg-type]
        h, mlp = norm.gain * x / norm.scale(x), block.mlp
        active = mlp.act_fn(mlp.gate_proj(h)) * mlp.up_proj(h)  # type: ignore[operator, union-attr]
        (wanted,) = torch.autograd.grad(active[neuron.index], x)
        assert close(neuron.vectors["key"], wanted)


def test_directions_by_hand(tiny: Model) -> None:
    """Llama: query gain ⊙ (R_jᵀ q_i) W_Kᵀ / σ_j and key gain ⊙ (R_iᵀ k_j) W_Qᵀ / σ_i, rotations by HF."""
    module = tiny.module
    cache = tiny.run(IDS, capture=["resid_pre", "q", "k"], logits=False).cache
    found = word_vectors(tiny, IDS, position=3)
    places = torch.arange(6)[None]
    cos, sin = module.model.rotary_emb(torch.zeros(1, 6, 32), places)  # type: ignore[union-attr]

    def unrotated(x: Tensor, at: int) -> Tensor:
        """Rᵀ x: the rotation by minus the angle."""
        x = x[None, None, None]
        turned, _ = apply_rotary_pos_emb(x, x, cos[:, at : at + 1], -sin[:, at : at + 1])
        return turned[0, 0, 0]

    for layer, block in enumerate(tiny.blocks):
        norm = FrozenNorm(block.input_layernorm, 32)  # type: ignore[arg-type]
        W_Q = block.self_attn.q_proj.weight.T.reshape(32, 4, 8)  # type: ignore[union-attr]
        W_K = block.self_attn.k_proj.weight.T.reshape(32, 2, 8)  # type: ignore[union-attr]
        q, k, pre = (cache[f"{site}.{layer}"] for site in ("q", "k", "resid_pre"))
        for row in range(2):
            for head in range(4):
                j, group = int(found.heads[layer].sources[row, head]), head // 2
                query = norm.gain * (W_K[:, group] @ unrotated(q[row, 3, head], j))
                key = norm.gain * (W_Q[:, head] @ unrotated(k[row, j, group], 3))
                vectors = found.heads[layer].vectors
                assert close(vectors["query"][row, head], query / norm.scale(pre[row, j]))
                assert close(vectors["key"][row, head], key / norm.scale(pre[row, 3]))


def test_directions_of_a_layer_norm_with_biases() -> None:
    """GPT-2, positions learned: query gain ⊙ (q W_Kᵀ) / σ, less its mean; biases add a constant."""
    model = model_of("gpt2")
    cache = model.run(IDS, capture=["resid_pre", "q", "k"], logits=False).cache
    found = word_vectors(model, IDS)
    for layer, block in enumerate(model.blocks):
        norm = FrozenNorm(block.ln_1, 32)  # type: ignore[arg-type]
        W, b = linear_map(block.attn.c_attn, 32)  # type: ignore[arg-type]
        W_K, b_K = W[:, 32:64].reshape(32, 4, 8), b[32:64].reshape(4, 8)
        q, pre = cache[f"q.{layer}"], cache[f"resid_pre.{layer}"]
        heads = found.heads[layer]
        for row in range(2):
            for head in range(4):
                at = pre[row, int(heads.sources[row, head])]
                u = norm.pull_back(W_K[:, head] @ q[row, -1, head], at=at)
                constant = (norm.bias @ W_K[:, head] + b_K[head]) @ q[row, -1, head]
                assert close(heads.vectors["query"][row, head], u)
                score = float(heads.vectors["query"][row, head] @ at + constant)
                assert score == pytest.approx(float(heads.scores[row, head]), abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "granite", "gpt_neox", "gpt2"])
def test_outputs_sum_to_what_attention_writes(name: str) -> None:
    model = model_of(name)
    sites = ["attn_out", "attn_write", "v", "pattern"]
    cache = model.run(IDS, capture=sites, logits=False).cache
    found = word_vectors(model, IDS, position=2)
    for layer, heads in found.heads.items():
        block = model.spec.blocks[layer]
        assert block.attn_write is not None
        b_O = model.b_O(layer) * block.attn_write.scale
        write = cache[f"attn_write.{layer}"][:, 2]
        if block.direct:
            write = write - b_O
        assert close(heads.vectors["output"].sum(1), write)
        # An output is the values' mean, weighted with the pattern; the source is the largest part.
        groups = [model.spec.kv_group(layer, head) for head in range(block.n_heads)]
        v, weights = cache[f"v.{layer}"][:, :, groups], cache[f"pattern.{layer}"][:, :, 2]
        parts = torch.einsum("bshd,hdm->bhsm", v, model.W_O(layer)) * weights[..., None]
        if block.direct:
            assert torch.equal(parts.norm(dim=-1).argmax(-1), heads.sources)
            rows, columns = torch.arange(2)[:, None], torch.arange(block.n_heads)
            largest = parts[rows, columns, heads.sources] * block.attn_write.scale
            assert close(heads.vectors["value"] * heads.weights[..., None], largest)


def test_neurons_by_hand(tiny: Model) -> None:
    """Llama: a = silu(g) u writes a W_out; ∂a = (silu'(g) u W_gate + silu(g) W_up), gain and σ outside."""
    found = word_vectors(tiny, IDS, neurons=96)
    assert len(found.neurons) == 2 * 96  # every neuron there is
    cache = tiny.run(IDS, capture=["mlp_post", "resid_mid"], logits=False).cache
    for prompt in range(2):
        norms = [neuron.norm for neuron in found.neurons if neuron.prompt == prompt]
        assert norms == sorted(norms, reverse=True)
    for neuron in found.neurons[::7]:
        mlp = tiny.blocks[neuron.layer].mlp
        norm = FrozenNorm(tiny.blocks[neuron.layer].post_attention_layernorm, 32)  # type: ignore[arg-type]
        mid = cache[f"resid_mid.{neuron.layer}"][neuron.prompt, -1]
        x = norm.module(mid)  # type: ignore[misc]
        W_gate, W_up = mlp.gate_proj.weight[neuron.index], mlp.up_proj.weight[neuron.index]  # type: ignore[union-attr]
        g, u = (W_gate @ x).detach(), (W_up @ x).detach()
        active = torch.nn.functional.silu(g) * u
        assert neuron.activation == pytest.approx(float(active), rel=1e-3, abs=1e-5)
        write = active * tiny.W_out(neuron.layer)[neuron.index]
        assert torch.allclose(neuron.vectors["up"], write, atol=1e-5)
        assert torch.equal(neuron.vectors["down"], -neuron.vectors["up"])
        assert neuron.norm == pytest.approx(float(write.norm()), rel=1e-3, abs=1e-6)
        slope = torch.sigmoid(g) * (1 + g * (1 - torch.sigmoid(g)))
        key = slope * u * W_gate + torch.nn.functional.silu(g) * W_up
        wanted = (norm.gain * key / norm.scale(mid)).detach()
        assert torch.allclose(neuron.vectors["key"], wanted, atol=1e-4 * float(wanted.abs().max()))


def test_words_are_the_unembedding_of_the_vector(tiny: Model) -> None:
    report, found = words(tiny, IDS, top_k=4, neurons=3), word_vectors(tiny, IDS, neurons=3)
    table = report.table.set_index(["prompt", "kind", "layer", "index", "what"]).sort_index()
    for what in ("output", "value", "query", "key"):
        vector = found.heads[1].vectors[what][1, 2]
        rows = table.loc[(1, "head", 1, 2, what)].sort_values("place")
        probabilities = tiny.unembed(vector).softmax(-1)
        assert rows["token_id"].tolist() == probabilities.topk(4).indices.tolist()
        assert rows["probability"].to_numpy() == pytest.approx(
            probabilities.topk(4).values.tolist()
        )
        line = report.tables["heads"].query("prompt == 1 and layer == 1 and head == 2")[what].item()
        assert line == _line(rows["token"].tolist())
    neuron = found.neurons[0]
    rows = table.loc[(0, "neuron", neuron.layer, neuron.index, "down")]
    lowest = tiny.unembed(-neuron.vectors["up"]).topk(4).indices.tolist()
    assert rows["token_id"].tolist() == lowest


def test_what_enters_through_a_norm(tiny: Model) -> None:
    table = words(tiny, IDS, top_k=5).tables["norms"]
    assert set(table["site"]) == {"resid_pre", "resid_mid", "final"}
    cache = tiny.run(IDS, capture=["resid_mid"], logits=False).cache
    x = cache["resid_mid.1"][0, -1]
    normed = tiny.blocks[1].post_attention_layernorm(x)  # type: ignore[operator]
    before, after = (set(tiny.unembed(y).topk(5).indices.tolist()) for y in (x, normed))
    rows = table.query("prompt == 0 and layer == 1 and site == 'resid_mid'")
    assert rows["norm"].unique().tolist() == ["post_attention_layernorm"]
    assert set(rows.query("change == 'enters'")["token_id"]) == after - before
    assert set(rows.query("change == 'leaves'")["token_id"]) == before - after
    assert (rows.query("change == 'enters'")["place_before"] >= 5).all()
    assert (rows.query("change == 'enters'")["place_after"] < 5).all()


def test_a_norm_without_a_gain_changes_nothing(tiny: Model) -> None:
    with torch.no_grad():
        for name, parameter in tiny.module.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
    assert words(Model(tiny.module), IDS).tables["norms"].empty


def test_padding_changes_nothing(tiny: Model) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    padded = word_vectors(tiny, Batch.of_ids(IDS, mask), position=-2)
    alone = word_vectors(tiny, IDS[:1, 2:], position=-2)
    for layer in range(2):
        assert torch.equal(padded.heads[layer].sources[0], alone.heads[layer].sources[0] + 2)
        for what, vectors in alone.heads[layer].vectors.items():
            assert close(padded.heads[layer].vectors[what][0], vectors[0])


@pytest.mark.slow
def test_the_name_movers_say_mary(smollm: Model) -> None:
    report = words(smollm, STORE, top_k=5)
    heads = report.tables["heads"].set_index(["layer", "head"])
    movers = heads.loc[[(23, 0), (23, 3)]]
    assert movers["output"].str.contains("‘ Mary’").any()
    assert movers["source_token"].str.contains("Mary").any()
    assert len(report.tables["norms"]) and set(report.tables["norms"]["site"]) >= {"final"}
    final = report.tables["norms"].query("site == 'final' and change == 'enters'")
    assert (final["place_after"] < 5).all()


def test_bad_input(tiny: Model) -> None:
    with pytest.raises(BadInput, match="top_k=0"):
        words(tiny, IDS, top_k=0)
    with pytest.raises(BadInput, match="neurons=-1"):
        words(tiny, IDS, neurons=-1)
    with pytest.raises(BadInput, match="position 6"):
        words(tiny, IDS, position=6)
    assert "neurons" in words(tiny, IDS[:, :1], neurons=0).tables  # a prompt of one token
    with pytest.raises(Refused, match="attn_write"):
        words(model_of("bert"), IDS)
    with pytest.raises(Refused, match="no softmax attention"):
        words(model_of("mamba"), IDS)


def test_the_summary_has_the_heads_that_write_most(tiny: Model) -> None:
    report = words(tiny, torch.tensor([[5, 6, 7]]), top_k=2)
    shown = loudest(report)
    assert shown["norm"].tolist() == report.tables["heads"]["norm"].nlargest(15).tolist()
    assert {"layer", "head", "source_token", "output"} <= {*shown}
