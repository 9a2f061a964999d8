"""Information flow: identities, brute force, known circuits, bad input.

Tolerances: float32 sums over d_model of 32 to 576; a wrong part, gain or scale is off by order one.
"""

from __future__ import annotations

import itertools

import networkx
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import interp
from circuits.flow import flow_graph, information_flow
from circuits.flow_cuts import held_effects, unread_edges
from circuits.flow_parts import SITES, Rule, Sum, attention_parts, kept_parts, sums
from circuits.flow_words import route_neurons
from circuits.relevance import (
    Target,
    attention_flow,
    chefer_relevance,
    gradient_times_input,
    integrated_gradients,
    mixing,
    one_prompt,
    pattern_gradients,
    rollout,
    target_of,
)
from interp.direction import logit_direction
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.run.edits import Edit
from tests.families import FAMILIES
from tests.ground_truth.induction_model import (
    INDUCTION_HEAD,
    PREVIOUS_TOKEN_HEAD,
    character_tokenizer,
    induction_model,
)

IDS = [11, 42, 5, 42, 17, 60, 11, 42, 33]
KINDS = ["llama", "gpt2", "gemma2", "gpt_neox", "granite"]
SENTENCE = "When Mary and John went to the store, John gave a drink to"


def model_of(name: str) -> Model:
    return Model(FAMILIES[name](), id=name)


def captured(model: Model, ids: list[int]):
    return model.run(torch.tensor([ids]), capture=SITES, logits=False)


# --- the definition, by brute force ------------------------------------------------------------


def all_parts(whole: Sum, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """π of the others [pos n_others] and of every attention part [pos heads·keys], nothing left out.

    As published: ‖w‖₁ − ‖w − p‖₁, at least 1e-5; 0 where a position does not attend.
    """
    w = whole.whole.to(dtype)
    size = w.abs().sum(-1)

    def pi(p: Tensor, w: Tensor, size: Tensor) -> Tensor:
        return (size - (w - p).abs().sum(-1)).clamp_min(1e-5)

    others = torch.stack([pi(p.to(dtype), w, size) for p in whole.others.values()], 1)
    if whole.weights is None:
        return others, others[:, :0]
    heads = []
    for A, v, W in zip(whole.weights, whole.v, whole.W_O, strict=True):
        u = v.to(dtype) @ W.to(dtype)
        values = torch.stack(
            [pi(A[i].to(dtype)[:, None] * u, w[i], size[i]) for i in range(len(w))]
        )
        heads.append(torch.where(A > 0, values, 0.0))
    return others, torch.stack(heads, 1).flatten(1)


def brute_force_kept(
    whole: Sum, rule: Rule, dtype: torch.dtype = torch.float64
) -> dict[tuple[int, int, int, int], float]:
    """{(position, other, head, source): weight} of the parts that the rule keeps."""
    others, heads = all_parts(whole, dtype)
    kept = {}
    n_keys = 1 if whole.weights is None else whole.weights.shape[2]
    for i, row in enumerate(torch.cat([others, heads], 1)):
        values, order = row.sort(descending=True)
        if rule.threshold is None:
            k = min(int((values.cumsum(0) < rule.mass * row.sum()).sum()) + 1, len(row))
        else:
            k = int((values > rule.threshold * row.sum()).sum())
        for value, part in zip(values[:k].tolist(), order[:k].tolist(), strict=True):
            if value == 0:
                continue
            j = part - others.shape[1]
            key = (i, part, -1, i) if j < 0 else (i, -1, j // n_keys, j % n_keys)
            kept[key] = value / float(values[:k].sum())
    return kept


def bounded_kept(whole: Sum, rule: Rule) -> dict[tuple[int, int, int, int], float]:
    kept = kept_parts(whole, range(len(whole.whole)), rule)
    keys = zip(kept.position, kept.other, kept.head, kept.source, strict=True)
    return {tuple(map(int, key)): w for key, w in zip(keys, kept.weight.tolist(), strict=True)}


RULES = [Rule(0.5), Rule(0.8), Rule(0.95), Rule(1.0), Rule(threshold=0.04), Rule(threshold=0.3)]


@pytest.mark.parametrize("exclude_sink", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_bounds_keep_what_brute_force_keeps(name: str, exclude_sink: bool) -> None:
    model = model_of(name)
    run = captured(model, IDS)
    for layer, rule in itertools.product(range(model.n_layers), RULES):
        for whole in sums(model, run, layer, exclude_sink=exclude_sink):
            wanted, got = brute_force_kept(whole, rule), bounded_kept(whole, rule)
            assert got.keys() == wanted.keys()
            assert got == pytest.approx(wanted, abs=1e-5)


def test_bounds_keep_what_brute_force_keeps_on_the_default_model(smollm: Model) -> None:
    run = captured(smollm, torch.arange(1000, 1032).tolist())
    for layer, rule in itertools.product([0, 1, 12, 29], [Rule(0.9), Rule(threshold=0.04)]):
        for whole in sums(smollm, run, layer):
            assert bounded_kept(whole, rule).keys() == brute_force_kept(whole, rule).keys()


def brute_force_edges(
    model: Model, run, position: int, rule: Rule
) -> dict[tuple[int, str, str, int, int], float]:
    """{(layer, stage, kind, position, source): weight}: every part of every sum, then the search."""
    edges: dict[tuple[int, str, str, int, int], float] = {}
    reached = {position}
    for layer in reversed(range(model.n_layers)):
        for whole in reversed(sums(model, run, layer)):
            names, sources = [*whole.others, "attention"], set()
            for (i, other, _, j), weight in brute_force_kept(whole, rule).items():
                if i in reached:
                    key = (layer, whole.stage, names[other], i, j)
                    edges[key] = edges.get(key, 0.0) + weight
                    sources |= {j} if names[other] != "bias" else set()
            reached = sources
    return edges


def lazy_edges(model: Model, run, position: int, rule: Rule):
    table = flow_graph(model, run, position=position, mass=rule.mass, threshold=rule.threshold)
    place = ["layer", "stage", "kind", "position", "source_position"]
    return table.edges.set_index(place)["weight"].to_dict()


@pytest.mark.parametrize("rule", [Rule(0.7), Rule(0.9), Rule(threshold=0.02)])
@pytest.mark.parametrize("name", KINDS)
def test_the_search_finds_the_edges_of_the_whole_graph(name: str, rule: Rule) -> None:
    model = model_of(name)
    run = captured(model, IDS)
    for position in (3, 8):
        wanted = brute_force_edges(model, run, position, rule)
        assert lazy_edges(model, run, position, rule) == pytest.approx(wanted, abs=1e-5)


def test_the_search_finds_the_edges_of_the_whole_graph_on_the_default_model(smollm: Model) -> None:
    run = captured(smollm, torch.arange(1000, 1024).tolist())
    wanted = brute_force_edges(smollm, run, 23, Rule(0.9))
    assert lazy_edges(smollm, run, 23, Rule(0.9)) == pytest.approx(wanted, abs=1e-5)


def test_few_parts_are_computed(smollm: Model) -> None:
    run = captured(smollm, torch.arange(1000, 1064).tolist())
    kept = kept_parts(sums(smollm, run, 12)[0], range(64), Rule(threshold=0.04))
    assert kept.computed < 0.1 * kept.parts


# --- the parts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_parts_sum_to_the_whole(name: str) -> None:
    model = model_of(name)
    run = captured(model, IDS)
    for layer in range(model.n_layers):
        for whole in sums(model, run, layer):
            total = torch.stack(list(whole.others.values())).sum(0)
            if whole.weights is not None:
                total = total + torch.einsum("hqk,hkd,hdm->qm", whole.weights, whole.v, whole.W_O)
            torch.testing.assert_close(total, whole.whole, rtol=1e-4, atol=1e-4)
        assert whole.stage == "post"
        torch.testing.assert_close(whole.whole, run.cache[f"resid_post.{layer}"][0].detach())


@pytest.mark.parametrize("name", KINDS)
def test_contributions_sum_to_one_at_every_place(name: str) -> None:
    graph = flow_graph(model_of(name), IDS, mass=1.0)
    total = graph.edges.groupby(["layer", "position", "stage"])["weight"].sum()
    np.testing.assert_allclose(total, 1, atol=1e-6)
    heads = graph.heads.groupby(["layer", "position", "source_position"])["weight"].sum()
    attention = graph.edges[graph.edges["kind"] == "attention"]
    edges = attention.set_index(["layer", "position", "source_position"])["weight"].sort_index()
    np.testing.assert_allclose(heads.sort_index(), edges, atol=1e-9)


def test_biases_are_a_part_and_parallel_blocks_are_one_sum() -> None:
    gpt2 = flow_graph(model_of("gpt2"), IDS, mass=1.0).edges
    assert {"attention", "residual", "bias", "mlp", "residual-mlp"} == set(gpt2["kind"])
    neox = flow_graph(model_of("gpt_neox"), IDS, mass=1.0).edges
    assert set(neox["stage"]) == {"post"} and set(neox["source_stage"]) == {"pre"}
    assert {"attention", "residual", "mlp"} <= set(neox["kind"])


def test_every_edge_leads_to_the_chosen_token(tiny: Model) -> None:
    edges = flow_graph(tiny, IDS, position=4, mass=0.7).edges
    last = edges[edges["layer"] == tiny.n_layers - 1]
    assert set(last["position"]) == {4}
    assert edges["source_position"].max() <= 4
    for layer in range(tiny.n_layers - 1):
        above = edges[(edges["layer"] == layer + 1) & (edges["source_stage"] == "pre")]
        here = edges[(edges["layer"] == layer) & (edges["stage"] == "post")]
        assert set(here["position"]) == set(above["source_position"])
    start = edges[(edges["layer"] == 0) & (edges["source_stage"] == "pre")]
    assert start["through"].sum() == pytest.approx(1, abs=1e-6)  # tiny has no bias to lose to


def test_excluding_the_sink_leaves_no_edge_from_it(tiny: Model) -> None:
    edges = flow_graph(tiny, IDS, mass=1.0, exclude_sink=True).edges
    attention = edges[edges["kind"] == "attention"]
    assert not ((attention["source_position"] == 0) & (attention["position"] > 0)).any()
    total = edges.groupby(["layer", "position", "stage"])["weight"].sum()
    np.testing.assert_allclose(total, 1, atol=1e-6)


# --- neurons and words -------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_neurons_are_those_of_the_definition(name: str) -> None:
    """π of every neuron's write, the bias and the rest, in float64 and as it is published."""
    model = model_of(name)
    run = model.run(torch.tensor([IDS]), capture=[*SITES, "mlp_post", "mlp_out"], logits=False)
    edges = flow_graph(model, run, mass=0.95 if name != "granite" else 0.9999).edges
    found = route_neurons(model, run, edges, top=3)
    places = edges.loc[edges["kind"] == "mlp", ["layer", "position", "through", "weight"]]
    assert len(found) == 3 * len(places) > 0
    for (layer, i), group in found.groupby(["layer", "position"]):
        block = model.spec.blocks[layer]
        whole, acts, out, written = (
            run.cache[f"{site}.{layer}"][0, i].double()
            for site in ("resid_post", "mlp_post", "mlp_out", "mlp_write")
        )
        W = model.W_out(layer).double()
        if block.mlp_write.module != block.mlp_out:  # gemma2: RMSNorm, gain 1 + weight, no bias
            gain = 1 + model.module.get_submodule(block.mlp_write.module).weight.double()
            W = W * gain / (out.pow(2).mean() + model.module.config.rms_norm_eps).sqrt()
        W = W * block.mlp_write.scale
        bias = written - acts @ W
        parts = [*(acts[:, None] * W), whole - written]
        parts += [bias] if float(bias.abs().max()) > 1e-5 else []
        pi = torch.stack([whole.abs().sum() - (whole - p).abs().sum() for p in parts])
        pi = pi.clamp_min(1e-5)
        best = (pi[: len(acts)] / pi.sum()).topk(3)
        assert group["neuron"].tolist() == best.indices.tolist()
        np.testing.assert_allclose(group["weight"], best.values, rtol=1e-3)
        place = places.query("layer == @layer and position == @i").iloc[0]
        np.testing.assert_allclose(
            group["through"], group["weight"] * place["through"] / place["weight"]
        )


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "granite"])
def test_words_are_what_a_part_adds_to_the_logits(name: str) -> None:
    """Each word's number against the answer's direction pulled back through the frozen norm."""
    model = model_of(name)
    report = information_flow(model, IDS, mass=0.99, words=20)
    run = model.run(
        torch.tensor([IDS]), capture=["v", "z", "pattern", "mlp_post", "mlp_out", "resid_post"]
    )
    final = run.cache[f"resid_post.{model.n_layers - 1}"][0, -1:].detach()
    words = report.tables["flow_words"]
    assert set(words["kind"]) == {"head", "neuron"}
    assert len(words) == 5 * min(20, len(report.tables["flow_heads"])) + 5 * min(
        20, len(report.tables["flow_neurons"])
    )
    for row in words.groupby("kind").head(10).to_dict("records"):
        token = int(row["token"].removeprefix("#"))
        direction = logit_direction(model, final, torch.tensor([token]), None).vector[0]
        layer, i, j, index = (row[n] for n in ("layer", "position", "source_position", "index"))
        if row["kind"] == "head":
            A = run.cache[f"pattern.{layer}"][0, index, i, j]
            v = run.cache[f"v.{layer}"][0, j, model.spec.kv_group(layer, index)]
            part = A * v @ model.W_O(layer)[index]
            write, out = model.spec.blocks[layer].attn_write, None
        else:
            part = run.cache[f"mlp_post.{layer}"][0, i, index] * model.W_out(layer)[index]
            write, out = model.spec.blocks[layer].mlp_write, run.cache[f"mlp_out.{layer}"][0, i]
        if name == "gemma2":
            norm = model.module.get_submodule(write.module)
            if out is None:
                out = torch.einsum("hd,hdm->m", run.cache[f"z.{layer}"][0, i], model.W_O(layer))
            part = part * (1 + norm.weight) / (out.pow(2).mean() + 1e-6).sqrt()
        assert row["logit"] == pytest.approx(
            float(part * write.scale @ direction), rel=1e-3, abs=1e-5
        )
    first = words.groupby(["kind", "layer", "position", "source_position", "index"])["logit"]
    assert (first.diff().dropna() <= 0).all()


def test_a_model_without_neurons_says_so() -> None:
    report = information_flow(model_of("mixtral"), IDS)
    assert not len(report.tables["flow_neurons"])
    assert any("not split into neurons in layers 0–2" in note for note in report.meta["notes"])


# --- a known circuit ---------------------------------------------------------------------------


def test_the_induction_circuit_is_the_route() -> None:
    """The attention edges are exactly the two of the circuit.

    By proximity alone there is one more, the previous-token head at the last position itself: it is
    as large a part of the residual stream there, and nothing reads it.
    """
    model = interp.load(induction_model(), tokenizer=character_tokenizer())
    letters = "qgtbxnepqgtbx"  # at the last x (12) comes n: 5, the token after the first x (4)
    again, successor, copy = 12 + 1, 5 + 1, 4 + 1  # a BOS stands first
    ids = [0, *model.tokenizer(letters, add_special_tokens=False)["input_ids"]]
    found = information_flow(model, ids, answer="n")
    assert found.meta["target"]["value"] == model.run(torch.tensor([ids])).logits[0, -1].max()
    circuit = {
        (INDUCTION_HEAD[0], again, successor, INDUCTION_HEAD[1]),
        (PREVIOUS_TOKEN_HEAD[0], successor, copy, PREVIOUS_TOKEN_HEAD[1]),
    }
    unread = (PREVIOUS_TOKEN_HEAD[0], again, again - 1, PREVIOUS_TOKEN_HEAD[1])
    place = ["layer", "position", "source_position", "head"]
    heads = found.tables["flow_heads"][place]
    assert set(heads.itertuples(index=False, name=None)) == circuit
    into = found.table.query("kind == 'attention'")
    assert set(into[place[:3]].itertuples(index=False, name=None)) == {e[:3] for e in circuit}
    assert (found.table["kind"] == "residual").any()
    assert any("1 attention edges are left out" in note for note in found.meta["notes"])

    every = information_flow(model, ids, answer="n", unread=0).tables["flow_heads"][place]
    assert set(every.itertuples(index=False, name=None)) == circuit | {unread}
    matters = information_flow(model, ids, answer="n", min_effect=1.0)
    heads = matters.tables["flow_heads"][place]
    assert set(heads.itertuples(index=False, name=None)) == circuit
    assert (matters.table["kind"] == "residual").any()


def test_an_edge_effect_is_what_cutting_it_does(tiny: Model) -> None:
    report = information_flow(tiny, IDS, mass=0.9, min_effect=-1e6)
    edge = report.table[report.table["kind"] == "attention"].iloc[-1]
    layer, i, j = (int(edge[name]) for name in ("layer", "position", "source_position"))
    heads = report.tables["flow_heads"].query(
        "layer == @layer and position == @i and source_position == @j"
    )["head"]

    def cut(x: Tensor, seen) -> Tensor:
        x = x.clone()
        x[:, heads.tolist(), i, j] = 0
        return x

    without = tiny.run(torch.tensor([IDS]), edits=[Edit.apply(f"pattern.{layer}", cut)]).logits
    answer = report.meta["target"]["answer"]["id"]
    clean = report.meta["target"]["value"]
    assert edge["effect"] == pytest.approx(clean - float(without[0, -1, answer]), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_with_norms_held_an_edge_of_the_last_layer_is_worth_what_it_writes(name: str) -> None:
    """Its part · the logit's direction, where no MLP stands behind it; what it wrote elsewhere: nothing."""
    model = Model(FAMILIES[name](), id=name)
    last = model.n_layers - 1
    for module in model.blocks[last].modules():
        if type(module).__name__.endswith("MLP"):
            for weight in module.parameters():
                weight.zero_()
    run = captured(model, IDS)
    batch = one_prompt(model, IDS)
    target = target_of(model, batch, position=-1, answer=3, instead=7)
    final = run.cache[f"resid_post.{last}"][:, -1]
    d = logit_direction(model, final, torch.tensor([3]), torch.tensor([7])).vector[0]
    weights, v, W_O, _ = attention_parts(model, run, last)
    places = [(6, 5), (8, 6), (8, 7)]  # (to, from): nothing reads the first one's position
    heads = [(last, *place, head) for place in places for head in (0, 1)]
    table = pd.DataFrame(heads, columns=["layer", "position", "source_position", "head"])
    found = held_effects(model, batch, target, table)
    wanted = [
        sum(float((weights[h, i, j] * v[h, j] @ W_O[h]) @ d) for h in (0, 1)) for i, j in places
    ]
    wanted[0] = 0.0
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max())
    unread = unread_edges(model, batch, target, table)
    assert unread.values.tolist() == [[last, 6, 5]]


def test_the_strongest_edges_are_cut_and_all_are_kept(tiny: Model) -> None:
    every = information_flow(tiny, IDS, mass=0.9, min_effect=-1e6, words=0).table
    some = information_flow(tiny, IDS, mass=0.9, effects=3, unread=0, words=0).table
    assert len(some) == len(every)
    attention = some[some["kind"] == "attention"]
    cut = attention.dropna(subset="effect")
    assert set(cut.index) == set(attention["through"].nlargest(3).index)
    both = cut.merge(every, on=["kind", "layer", "position", "source_position"])
    np.testing.assert_allclose(both["effect_x"], both["effect_y"], atol=1e-5)
    assert some.loc[some["kind"] != "attention", "effect"].isna().all()


# --- patterns alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("exclude_sink", [False, True])
@pytest.mark.parametrize(
    "name", ["llama", "gpt_oss", "bert"]
)  # gpt_oss: rows of A sum to under one
def test_rollout_rows_sum_to_one(name: str, exclude_sink: bool) -> None:
    run = model_of(name).run(torch.tensor([IDS]), capture=["pattern"])
    shares = rollout(run.cache["pattern"][0], exclude_sink=exclude_sink)
    torch.testing.assert_close(shares.sum(-1), torch.ones(len(IDS)))
    assert (shares >= 0).all()


@pytest.mark.parametrize("exclude_sink", [False, True])
def test_attention_flow_is_the_minimum_cut(exclude_sink: bool) -> None:
    """Two layers, five tokens, against every cut there is, and against networkx."""
    patterns = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)).tril()
    patterns = patterns / patterns.sum(-1, keepdim=True)
    got = attention_flow(patterns, 4, exclude_sink=exclude_sink)
    mixed = mixing(patterns.double(), exclude_sink=exclude_sink).numpy()
    graph = networkx.DiGraph()
    for layer, i, j in itertools.product(range(2), range(5), range(5)):
        graph.add_edge((layer, j), (layer + 1, i), capacity=float(mixed[layer, i, j]))
    for token in range(5):
        # From (0, token) through any middle set on the source's side to (2, 4).
        cuts = [
            sum(mixed[0, i, token] for i in range(5) if i not in side)
            + sum(mixed[1, 4, i] for i in side)
            for n in range(6)
            for side in itertools.combinations(range(5), n)
        ]
        assert got[token] == pytest.approx(min(cuts), abs=1e-7)
        wanted = networkx.maximum_flow_value(graph, (0, token), (2, 4))
        assert got[token] == pytest.approx(wanted, abs=1e-7)


# --- gradients ---------------------------------------------------------------------------------


def linear_model() -> Model:
    """One layer without MLP or norms whose queries and keys are zero: logits are affine in embeddings."""
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 4}
    torch.manual_seed(0)
    module = GPT2LMHeadModel(
        GPT2Config(
            **shape, vocab_size=20, n_positions=16, tie_word_embeddings=False, bos_token_id=0
        )
    )
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
        block = module.transformer.h[0]
        block.attn.c_attn.weight[:, :32] = 0
        block.mlp.c_proj.weight.zero_()
    model = Model(module, id="linear")
    block.ln_1 = nn.Identity()
    module.transformer.ln_f = nn.Identity()
    return model


LINEAR_IDS = [3, 7, 1, 12]


def test_gradient_times_input_is_exact_on_a_linear_model() -> None:
    model = linear_model()
    batch = one_prompt(model, LINEAR_IDS)
    target = Target(3, answer=5, instead=9)

    def value(x: Tensor) -> float:
        edit = Edit.patch("resid_pre.0", x)
        return float(target.of(model.run(batch, edits=[edit]).logits[:, 3])[0])

    x = model.run(batch, capture=["resid_pre.0"]).cache["resid_pre.0"]
    nothing = value(torch.zeros_like(x))
    scores = gradient_times_input(model, batch, target)
    assert float(scores.sum()) == pytest.approx(value(x) - nothing, abs=1e-4)
    for token in range(4):
        without = x.clone()
        without[:, token] = 0
        assert float(scores[token]) == pytest.approx(value(x) - value(without), abs=1e-4)
    zero = integrated_gradients(model, batch, target, baseline=torch.zeros_like(x))
    torch.testing.assert_close(zero.scores, scores, rtol=1e-3, atol=1e-4)


def test_relevance_on_a_linear_model_is_its_formula() -> None:
    """∂target/∂A^h_ij = v_hj · W_O^h · W_U at i = target and 0 elsewhere; one layer: R = I + mean (∇A A)⁺."""
    model = linear_model()
    batch = one_prompt(model, LINEAR_IDS)
    target = Target(3, answer=5)
    run = model.run(batch, capture=["v", "pattern"])
    W_U = model.module.lm_head.weight.T
    v, A = run.cache["v.0"][0].transpose(0, 1), run.cache["pattern.0"][0]
    grad = v @ model.W_O(0) @ W_U[:, 5]
    wanted = torch.eye(4)
    wanted[3] += (grad * A[:, 3]).clamp_min(0).mean(0).detach()
    torch.testing.assert_close(chefer_relevance(model, batch, target), wanted, rtol=1e-4, atol=1e-5)


def test_pattern_gradients_are_finite_differences(tiny: Model) -> None:
    batch = one_prompt(tiny, IDS)
    target = Target(8, answer=4)
    found = pattern_gradients(tiny, batch, target)
    assert sorted(found) == [0, 1]
    step = 1e-2
    for layer, head, i, j in [(0, 1, 8, 3), (0, 2, 5, 2), (1, 0, 8, 8)]:

        def moved(by: float, layer=layer, head=head, i=i, j=j) -> float:
            def change(x: Tensor, seen) -> Tensor:
                x = x.clone()
                x[:, head, i, j] += by
                return x

            logits = tiny.run(batch, edits=[Edit.apply(f"pattern.{layer}", change)]).logits
            return float(logits[0, 8, 4])

        slope = (moved(step) - moved(-step)) / (2 * step)
        assert float(found[layer][1][head, i, j]) == pytest.approx(slope, rel=0.05, abs=2e-3)


@pytest.mark.parametrize("name", [*KINDS, "bert"])
def test_integrated_gradients_are_complete(name: str) -> None:
    model = model_of(name)
    batch = one_prompt(model, IDS)
    found = integrated_gradients(model, batch, target_of(model, batch, position=6))
    assert abs(float(found.scores.sum()) - found.change) == pytest.approx(found.gap, abs=1e-6)
    assert found.gap <= max(0.01 * abs(found.change), 1e-4)


# --- the default model -------------------------------------------------------------------------


def test_the_flow_comes_from_the_first_mary(smollm: Model) -> None:
    report = information_flow(
        smollm, SENTENCE, answer=" Mary", instead=" John", mass=0.8, min_effect=0.1, integrate=True
    )
    tokens = report.meta["tokens"]
    into = report.table[(report.table["kind"] == "attention") & (report.table["effect"] > 0)]
    best = into.loc[into["effect"].idxmax()]
    assert tokens[int(best["source_position"])] == " Mary"
    scores = report.tables["relevance"].set_index("position")
    for name in ("relevance", "integrated_gradients"):
        assert tokens[int(scores[name].iloc[1:].idxmax())] == " Mary"
    integrated = report.meta["integrated_gradients"]
    assert integrated["gap"] <= 0.01 * abs(integrated["change"])
    assert scores["integrated_gradients"].sum() == pytest.approx(
        integrated["change"], abs=integrated["gap"] + 1e-4
    )
    assert integrated["points"] < 200  # a path through the first token takes six hundred


# --- bad input ---------------------------------------------------------------------------------


def test_bad_input_is_told_in_one_line(tiny: Model, smollm: Model) -> None:
    with pytest.raises(BadInput, match="one token"):
        information_flow(tiny, [5])
    for position in (9, -10):
        with pytest.raises(BadInput, match=r"positions are 0 to 8"):
            information_flow(tiny, IDS, position=position)
    with pytest.raises(BadInput, match="tiny has ids 0 to 96"):
        information_flow(tiny, IDS, answer=97)
    with pytest.raises(BadInput, match="without a tokenizer"):
        information_flow(tiny, IDS, answer=" Mary")
    with pytest.raises(BadInput, match=r"splits into ' Mary' \+ ' John'"):
        information_flow(smollm, "Hello there", answer=" Mary John")
    with pytest.raises(BadInput, match="give answer="):
        information_flow(tiny, IDS, instead=3)
    with pytest.raises(BadInput, match="2 prompts"):
        information_flow(tiny, torch.tensor([IDS, IDS]))
    with pytest.raises(BadInput, match="mass=0"):
        information_flow(tiny, IDS, mass=0)
    with pytest.raises(BadInput, match="unread=-1"):
        information_flow(tiny, IDS, unread=-1)
    with pytest.raises(BadInput, match="threshold=2"):
        information_flow(tiny, IDS, threshold=2)


def test_models_that_cannot_are_refused_by_name() -> None:
    with pytest.raises(Refused, match="no language-model head"):
        information_flow(model_of("siglip_text"), IDS)
    with pytest.raises(Refused, match="attn_write"):
        information_flow(model_of("bert"), IDS)
    with pytest.raises(Refused, match="no softmax attention"):
        information_flow(model_of("mamba"), IDS)


# --- figures -----------------------------------------------------------------------------------


def test_figures_draw_what_the_report_holds(tiny: Model) -> None:
    from interp.figures.flow_graph import flow_graph as draw
    from interp.figures.relevance_text import relevance_text

    report = information_flow(tiny, IDS, mass=0.9)
    report.meta["tokens"][2] = "<b>&"
    report.tables["relevance"].loc[2, "token"] = "<b>&"
    report.tables["flow_words"]["token"] = "<i>&"
    for figure in (draw(report), draw(report, by="weight"), relevance_text(report)):
        page = figure.to_json()
        assert "<b>&" not in page and "&lt;b&gt;&amp;" in page
    assert "&lt;i&gt;&amp;" in draw(report).to_json() and "<i>" not in draw(report).to_json()
    figure = draw(report)
    assert len(figure.data) < 40 and len(figure.layout.sliders[0].steps) > 3
    with pytest.raises(BadInput, match="rolout"):
        relevance_text(report, score="rolout")
