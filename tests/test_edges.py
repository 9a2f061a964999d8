"""Edges: the fast engines agree with the plain ones on every kind of family, and identities hold."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

import circuits.edge_scores as scores_module
from circuits.circuit_find import circuit_find
from circuits.edge_engines import PlainJob, engine
from circuits.edge_gradients import LAYERS_AT_ONCE
from circuits.edge_replay import EdgeReplay
from circuits.edge_scores import _groups, atp, importance, score_edges, weaker_end
from circuits.edges import edge_attribution
from circuits.edges_plain import (
    plain_circuit_logits,
    plain_edge_scores,
    plain_state,
    sender_writes,
)
from circuits.evaluation import circuit_evaluate
from circuits.graph import Graph, overlap
from circuits.passes import Parts, Task, task_of
from circuits.reads import find_reads
from interp.data.pairs import Pairs
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.run.edits import Edit
from interp.run.resume import Checkpoint
from tests.families import FAMILIES
from tests.ground_truth.induction_model import D_VOCAB, induction_model
from tests.ground_truth.induction_pairs import CIRCUIT, induction_pairs

KINDS = {
    "llama": "grouped heads, RMSNorm",
    "gpt2": "fused qkv, LayerNorm, biases",
    "gpt_neox": "parallel, a norm each, fused by head",
    "phi": "parallel, one norm for both, partial rotary",
    "gemma2": "norms after attention and MLP, softcap",
    "exaone4": "norms only after, q and k normed by head",
    "olmo2": "q and k normed over all heads: not split",
    "deepseek_v3": "latent attention: not split",
    "gpt_bigcode": "one kv head",
    "granitemoe": "scaled residual, experts, a cache handed to blocks",
    "gpt_oss": "sinks, sliding window, biases",
    "opt": "flattened MLP, learned positions",
}
RTOL = 1e-5
"""float32 through three random blocks of width 32, the plain engine summing in another order."""


def pairs_of(n: int = 3, length: int = 6, seed: int = 3) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(5, 95, (n, length), generator=generator)
    corrupted = clean.clone()
    corrupted[:, [2, 4]] = torch.randint(5, 95, (n, 2), generator=generator)
    return Pairs.of(
        clean, corrupted, answers=list(range(10, 10 + n)), wrong=list(range(20, 20 + n))
    )


def task_on(model: Model, **options) -> Task:
    return task_of(Parts.of(model), pairs_of(**options))


def with_post_norm_bias(model: Model) -> Model:
    """A bias in W_O of every layer, which a norm after attention then divides."""
    for block in model.spec.blocks:
        linear = model.module.get_submodule(block.W_O or "")
        linear.bias = torch.nn.Parameter(torch.randn(linear.weight.shape[0]) * 0.3)
    return Model(model.module, id=model.id)


def family(name: str) -> Model:
    return Model(FAMILIES[name](), id=name)


def plain(task: Task, columns: list[int], alphas: list[float]) -> torch.Tensor:
    pairs, graph = task.pairs, task.parts.graph
    return plain_edge_scores(
        task.parts.model,
        graph,
        pairs.clean_batch,
        pairs.corrupted_batch,
        task.measure,
        alphas=alphas,
        receivers=columns,
    )


# --- the graph ---------------------------------------------------------------------------------


def test_the_default_model_has_123_211_edges(smollm):
    graph = Graph.of(smollm)
    assert graph.n_edges == 123_211 and graph.shape == (301, 841)


def test_allowed_is_the_order_of_computation(tiny):
    graph = Graph.of(tiny)
    assert graph.allowed[graph.sender("0.1"), graph.receiver("mlp.0")]
    assert not graph.allowed[graph.sender("mlp.0"), graph.receiver("0.1.q")]
    assert not graph.allowed[graph.sender("0.1"), graph.receiver("0.2.q")]
    assert graph.allowed[:, -1].all() and graph.allowed[0].all()
    parallel = Graph.of(family("phi"))
    assert not parallel.allowed[parallel.sender("0.1"), parallel.receiver("mlp.0")]
    assert parallel.allowed[parallel.sender("0.1"), parallel.receiver("mlp.1")]


def test_node_of_every_receiver_and_slices_by_layer(tiny):
    graph = Graph.of(tiny)
    for column, receiver in enumerate(graph.receivers[:-1]):
        assert receiver.name.startswith(graph.senders[int(graph.node[column])].name)
    assert [s.layer for s in graph.senders[graph.rows(1)]] == [1] * 5
    assert [r.layer for r in graph.receivers[graph.columns(0)]] == [0] * 13


def test_pruning_keeps_paths_and_nothing_else(tiny):
    graph = Graph.of(tiny)
    path = [("embed", "0.1.v"), ("0.1", "mlp.0"), ("mlp.0", "1.2.k"), ("1.2", "logits")]
    dead = [("embed", "0.3.q"), ("0.2", "logits"), ("mlp.0", "1.3.q")]
    pruned = graph.prune(graph.circuit(path + dead))
    assert torch.equal(pruned, graph.circuit(path))
    assert torch.equal(graph.prune(pruned), pruned)
    assert torch.equal(graph.prune(graph.whole), graph.whole)
    assert not graph.prune(graph.circuit(path[:-1])).any()


def test_a_table_gives_the_scores_back(tiny):
    graph = Graph.of(tiny)
    scores = graph.random_scores(3)
    torch.testing.assert_close(graph.from_table(graph.to_table(scores)), scores)
    assert int(graph.top_edges(scores, 7).sum()) == 7
    assert graph.nodes(graph.node_circuit(["0.1"])) == ["embed", "0.1"]


def test_the_graph_tells_wrong_names_and_shapes(tiny):
    graph = Graph.of(tiny)
    with pytest.raises(BadInput, match="did you mean"):
        graph.sender("mlp.10")
    with pytest.raises(BadInput, match="no edge"):
        graph.circuit([("1.0", "0.1.q")])
    with pytest.raises(BadInput, match="another model"):
        graph.check(torch.zeros(3, 4))
    with pytest.raises(BadInput, match="NaN"):
        graph.check(torch.full(graph.shape, torch.nan))
    with pytest.raises(Refused, match="sum of head"):
        Graph.of(family("bert"))
    assert overlap(["1.1", "1.2"], ["1.2"]) == 1.0


# --- how parts read and write -------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_parts_are_found_and_writes_sum_to_the_stream(name):
    model = family(name)
    reads = find_reads(model)
    not_split = "not split" in KINDS[name]
    assert all(bool(own.why) == not_split == (not own.split) for own in reads)
    parts = Parts.of(model)
    assert bool(parts.notes) == not_split
    task = task_of(parts, pairs_of())
    run = model.run(task.pairs.clean_batch, capture=["resid_post"])
    other = model.run(task.pairs.corrupted_batch, capture=["resid_post"])
    side = task.sides[0]
    total = side.clean.less(side.corrupted, parts.graph, parts.writers).sum(0)
    last = f"resid_post.{model.n_layers - 1}"
    wanted = run.cache[last] - other.cache[last]
    torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_writes_of_normed_attention_with_a_bias_sum_too():
    model = with_post_norm_bias(family("gemma2"))
    task = task_on(model)
    side, parts = task.sides[0], task.parts
    last = f"resid_post.{model.n_layers - 1}"
    ends = [
        model.run(batch, capture=[last]).cache[last]
        for batch in (task.pairs.clean_batch, task.pairs.corrupted_batch)
    ]
    total = side.clean.less(side.corrupted, parts.graph, parts.writers).sum(0)
    torch.testing.assert_close(total, ends[0] - ends[1], rtol=1e-4, atol=1e-4)
    graph = parts.graph
    replay = EdgeReplay(task)
    values = replay.logits([graph.whole, graph.empty])
    torch.testing.assert_close(values[0], task.measure.clean_logits, rtol=1e-4, atol=1e-4)


# --- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("steps", [None, 3])
def test_scores_are_those_of_the_plain_engine(name, steps):
    task = task_on(family(name))
    graph = task.parts.graph
    method = "eap" if steps is None else "eap-ig"
    found = score_edges(task, method, steps=steps or 1)
    columns = [*range(0, graph.shape[1], 7), graph.shape[1] - 2, graph.shape[1] - 1]
    wanted = plain(task, columns, [1.0] if steps is None else [0.0, 1 / 3, 2 / 3])
    allowed = RTOL * float(wanted.abs().max())
    torch.testing.assert_close(found[:, columns], wanted[:, columns], rtol=RTOL, atol=allowed)
    assert float(wanted.abs().max()) > 1e-4 and not found[~graph.allowed].any()


def test_portions_of_pairs_and_groups_of_layers_change_nothing(tiny_model, monkeypatch):
    model = tiny_model(num_hidden_layers=LAYERS_AT_ONCE + 2)
    whole = task_on(model)
    size = 4 * whole.parts.graph.shape[0] * 32 * whole.pairs.length
    monkeypatch.setattr("circuits.passes.BUFFER_BYTES", 2 * size)
    parted = task_on(model)
    assert [len(side.pairs) for side in parted.sides] == [2, 1]
    graph = whole.parts.graph
    for method in ("eap-ig", "atp"):
        a, b = score_edges(whole, method), score_edges(parted, method)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    columns = [graph.receiver(f"{model.n_layers - 1}.0.q"), graph.shape[1] - 1]
    wanted = plain(whole, columns, [1.0])
    found = score_edges(parted, "eap")
    torch.testing.assert_close(found[:, columns], wanted[:, columns], rtol=1e-4, atol=1e-6)


def test_eap_ig_is_complete_over_the_embedding(tiny):
    """Σ_r score[embed, r] is the integral of the metric's change; a sum of m terms is off by O(1/m)."""
    task = task_on(tiny)
    wanted = float((task.measure.corrupted - task.measure.clean).mean())
    off = [abs(float(score_edges(task, steps=m)[0].sum()) - wanted) for m in (32, 128)]
    assert off[1] < 0.35 * off[0] and off[1] < 0.02 * abs(wanted)


def test_activation_scores_are_complete_for_every_group():
    """Of a left sum of 16 terms: off by O(1/16) of how much the slope changes on the way."""
    for name in ("gemma2", "phi"):
        model = family(name)
        task = task_on(model, n=1)
        scores = score_edges(task, "eap-ig-activations", steps=16)
        pairs, side = task.pairs, task.sides[0]
        change = side.corrupted.less(side.clean, task.parts.graph, task.parts.writers)
        for site, rows, _ in _groups(task.parts):
            moved = model.run(pairs.clean_batch, edits=[Edit.add(site, change[rows].sum(0))])
            wanted = float((task.measure(moved.logits[:, -1]) - task.measure.clean).mean())
            assert float(scores[rows].sum()) == pytest.approx(wanted, rel=0.1, abs=0.02), (
                name,
                site,
            )


def linear_model(tiny_model) -> Model:
    """A Llama without norms or MLPs whose heads attend evenly, and so linear in its embeddings."""
    model = tiny_model(num_hidden_layers=3)

    class Same(torch.nn.Module):
        def forward(self, x):
            return x

    module = model.module
    with torch.no_grad():
        for block in module.model.layers:
            block.input_layernorm = Same()
            block.self_attn.q_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    module.model.norm = Same()
    return Model(module, id="linear")


def test_on_a_linear_model_eap_is_exact_patching(tiny_model):
    model = linear_model(tiny_model)
    task = task_on(model)
    graph = task.parts.graph
    scores = score_edges(task, "eap")
    replay = EdgeReplay(task)
    chosen = [("embed", "0.1.v"), ("0.1", "2.3.v"), ("1.2", "logits"), ("embed", "1.2.v")]
    circuits = [graph.whole & ~graph.circuit([edge]) for edge in chosen]
    exact = replay.values(circuits).mean(-1) - task.measure.clean.mean()
    for (sender, receiver), effect in zip(chosen, exact.tolist(), strict=True):
        found = float(scores[graph.sender(sender), graph.receiver(receiver)])
        assert found == pytest.approx(effect, rel=1e-3, abs=1e-5)
    assert float(exact.abs().min()) > 1e-3
    # The sum over receivers is the node's effect; every integration step is alike.
    without = graph.whole
    without[graph.sender("0.1")] = False
    effect = float(replay.values([without]).mean() - task.measure.clean.mean())
    assert float(graph.node_scores(scores)[graph.sender("0.1")]) == pytest.approx(effect, rel=1e-3)
    torch.testing.assert_close(score_edges(task, "eap-ig", steps=3), scores, rtol=1e-3, atol=1e-5)


def test_atp_is_exact_for_q_k_and_v_on_their_own_z():
    """With the metric read straight off one head's z, AtP's q, k, v effects are exact patching's."""
    model = family("llama")
    task = task_on(model)
    senders, receivers = atp(task, Checkpoint())
    graph, pairs = task.parts.graph, task.pairs
    # Last layer, logits only: what a last-layer head's change does is linear up to the final norm and MLP.
    eps, last = 1e-3, model.n_layers - 1
    caches = {
        side: model.run(batch, capture=["q", "k", "v", "z"]).cache
        for side, batch in (("clean", pairs.clean_batch), ("corrupted", pairs.corrupted_batch))
    }
    for head in range(4):
        for kind, place in (("q", head), ("k", head // 2), ("v", head // 2)):
            patched = model.run(
                pairs.clean_batch,
                capture=[f"z.{last}"],
                edits=[Edit.patch(f"{kind}.{last}.{place}", caches["corrupted"][f"{kind}.{last}"])],
            ).cache[f"z.{last}"]
            clean = caches["clean"][f"z.{last}"]
            step = Edit.patch(f"z.{last}.{head}", clean + eps * (patched - clean))
            run = model.run(pairs.clean_batch, edits=[step])
            slope = float((task.measure(run.logits[:, -1]) - task.measure.clean).mean()) / eps
            found = float(receivers[graph.receiver(f"{last}.{head}.{kind}")])
            assert found == pytest.approx(slope, rel=0.05, abs=2e-3)
    assert torch.isinf(receivers[-1]) and receivers[:-1].isfinite().all()
    assert float(senders.abs().max()) > 0


def test_atp_sees_q_through_a_saturated_softmax():
    """In the hand-built induction model patterns are 1.0: the plain gradient of q and k is zero."""
    model = Model(induction_model(), id="induction")
    task = task_of(Parts.of(model), induction_pairs(16))
    graph = task.parts.graph
    plain_scores = score_edges(task, "eap")
    _, receivers = atp(task, Checkpoint())
    key = graph.receiver("1.2.k")
    assert float(plain_scores[:, key].abs().max()) < 1e-3
    assert float(receivers[key]) < -1.0


def test_the_weaker_end_gives_an_edge_its_score(tiny):
    graph = Graph.of(tiny)
    senders, receivers = torch.randn(graph.shape[0]), torch.randn(graph.shape[1])
    scores = weaker_end(graph, senders, receivers)
    i, j = graph.sender("0.1"), graph.receiver("1.2.k")
    wanted = min(senders[i], receivers[j], key=abs)
    assert float(scores[i, j]) == float(wanted)


# --- ground truth ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def induction() -> Task:
    return task_of(Parts.of(Model(induction_model(), id="induction")), induction_pairs(12))


@pytest.mark.parametrize("method", ["eap-ig", "eap-ig-activations"])
def test_the_known_circuit_is_recovered(induction, method):
    graph = induction.parts.graph
    scores = score_edges(induction, method, steps=16)
    truth = graph.circuit(CIRCUIT)
    ranked = scores.abs()[graph.allowed].numpy()
    assert roc_auc_score(truth[graph.allowed].numpy(), ranked) == 1.0
    between = graph.allowed[1:5, :].clone()
    between[:, -1] = False
    best = (scores[1:5].abs() * between).flatten().argmax()
    row, column = divmod(int(best), graph.shape[1])
    assert graph.senders[row + 1].name == "0.1" and graph.receivers[column].name == "1.2.k"


def test_resampling_everything_outside_the_known_circuit_changes_nothing(induction):
    graph, replay = induction.parts.graph, EdgeReplay(induction)
    circuit = graph.circuit(CIRCUIT)
    broken = circuit & ~graph.circuit([("0.1", "1.2.k")])
    inside, cut = replay.logits([circuit, broken])
    torch.testing.assert_close(inside, induction.measure.clean_logits, rtol=1e-4, atol=1e-3)
    # In some pairs the corrupted prompt's answer stands at the same place.
    assert float(induction.measure(cut).mean()) < 0.25 * float(induction.measure.clean.mean())
    assert induction.measure.clean_logits.shape[-1] == D_VOCAB


# --- running a circuit -------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_circuit_runs_as_in_the_plain_engine(name):
    model = family(name)
    task = task_on(model)
    graph, pairs = task.parts.graph, task.pairs
    circuits = [
        graph.top_edges(graph.random_scores(seed), graph.n_edges // part)
        for seed, part in ((1, 2), (2, 5))
    ]
    nodes = graph.node_circuit(["0.1", "1.2", "mlp.1", f"{model.n_layers - 1}.0"])
    found = EdgeReplay(task).logits([graph.whole, graph.empty, *circuits, nodes])
    size = float(found.abs().max())
    other = model.run(pairs.corrupted_batch).logits[:, -1].float()
    torch.testing.assert_close(found[0], task.measure.clean_logits, rtol=0, atol=RTOL * size)
    torch.testing.assert_close(found[1], other, rtol=0, atol=RTOL * size)
    state = plain_state(model, graph, pairs.corrupted_batch)
    for circuit, logits in zip(circuits, found[2:], strict=False):
        wanted = plain_circuit_logits(model, graph, circuit, pairs.clean_batch, state)
        torch.testing.assert_close(logits, wanted, rtol=0, atol=RTOL * size)
        assert float((logits - found[0]).abs().max()) > 1e-3 * size  # the circuit matters


def test_a_node_circuit_is_patching_of_nodes(tiny):
    """Dropping all edges of some heads is patching their z with the corrupted run's."""
    task = task_on(tiny)
    graph, pairs = task.parts.graph, task.pairs
    circuit = graph.whole
    circuit[[graph.sender("0.1"), graph.sender("1.2")]] = False
    z = tiny.run(pairs.corrupted_batch, capture=["z"]).cache.by_layer("z")
    patched = tiny.run(pairs.clean_batch, edits=[Edit.patch("z", z, heads=[(0, 1), (1, 2)])])
    found = EdgeReplay(task).logits([circuit])[0]
    torch.testing.assert_close(found, patched.logits[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "granite"])
@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_mean_and_zero_ablation_carry_means_and_zeros(name, ablation):
    model = family(name)
    task = task_on(model)
    graph, pairs = task.parts.graph, task.pairs
    replay = EdgeReplay(task, ablation)
    whole = replay.logits([graph.whole])[0]
    torch.testing.assert_close(whole, task.measure.clean_logits, rtol=1e-4, atol=1e-4)
    state = plain_state(model, graph, pairs.corrupted_batch)
    new = state.writes.mean(1, keepdim=True).expand_as(state.writes)
    new = torch.zeros_like(new) if ablation == "zero" else new
    streams = {}
    for site, stream in state.stream.items():
        kind, layer = site.split(".")
        wanted = {"resid_pre": ("q", "mlp"), "resid_mid": ("mlp",), "resid_post": ("logits",)}[kind]
        at = int(layer) + (kind == "resid_post")
        readers = [
            column for column, r in enumerate(graph.receivers) if r.layer == at and r.kind in wanted
        ]
        if readers:
            reads = graph.allowed[:, readers[0]].float()
            streams[site] = stream + torch.einsum("s,sbpm->bpm", reads, new - state.writes)
    circuit = graph.top_edges(graph.random_scores(1), graph.n_edges // 2)
    circuit[0] = graph.allowed[0]  # a norm of next to nothing would only blow up rounding
    wanted = plain_circuit_logits(
        model, graph, circuit, pairs.clean_batch, replace(state, writes=new, stream=streams)
    )
    found = replay.logits([circuit])[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_many_circuits_are_run_in_portions(tiny_model, monkeypatch):
    model = tiny_model(num_hidden_layers=LAYERS_AT_ONCE + 1)
    task = task_on(model)
    graph = task.parts.graph
    circuits = [graph.top_edges(graph.random_scores(i), 50 * (i + 1)) for i in range(5)]
    together = EdgeReplay(task).values(circuits)
    size = 4 * graph.shape[0] * task.sides[0].clean.embed.numel()
    monkeypatch.setattr("circuits.edge_replay.BUFFER_BYTES", 2 * size)
    torch.testing.assert_close(EdgeReplay(task).values(circuits), together, rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was(tiny):
    wanted = [parameter.requires_grad for parameter in tiny.module.parameters()]
    task = task_on(tiny)
    score_edges(task)
    EdgeReplay(task).values([task.parts.graph.empty])
    assert [parameter.requires_grad for parameter in tiny.module.parameters()] == wanted
    for module in tiny.module.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in module.__dict__


# --- the analysis ------------------------------------------------------------------------------


def test_the_report_names_its_axes_and_agrees_with_naive(tiny):
    pairs = pairs_of(n=2)
    fast = edge_attribution(tiny, pairs, steps=2, progress=False)
    slow = edge_attribution(tiny, pairs, steps=2, naive=True, progress=False)
    np.testing.assert_allclose(fast.arrays["scores"], slow.arrays["scores"], atol=1e-6, rtol=1e-4)
    graph = Graph.of(tiny)
    assert fast.meta["senders"] == graph.sender_names
    assert fast.meta["receivers"] == graph.receiver_names
    row = fast.table.iloc[0]
    place = fast.meta["senders"].index(row["sender"]), fast.meta["receivers"].index(row["receiver"])
    assert fast.arrays["scores"][place] == pytest.approx(row["score"], rel=1e-6)
    gap = fast.meta["clean"] - fast.meta["corrupted"]
    assert row["importance"] == pytest.approx(-row["score"] / gap, rel=1e-6)
    assert re.search(r"α = 0 … 0\.5", fast.meta["protocol"])


def test_atp_lists_nodes_with_their_q_k_and_v(tiny):
    report = edge_attribution(tiny, pairs_of(), method="atp", progress=False)
    kinds = set(report.tables["nodes"]["kind"])
    assert kinds == {"embed", "head", "mlp", "q", "k", "v"}


def test_a_long_method_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch):
    pairs = pairs_of()
    options = {"method": "eap-ig-activations", "steps": 2, "progress": False}
    wanted = edge_attribution(tiny, pairs, **options).arrays["scores"]
    real, done, limit = scores_module.Gradients, [], [2]

    def counted(*args, **kwargs):
        if len(done) == limit[0]:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(scores_module, "Gradients", counted)
    with pytest.raises(KeyboardInterrupt):
        edge_attribution(tiny, pairs, checkpoint=tmp_path / "units", **options)
    limit[0] = 100
    again = edge_attribution(tiny, pairs, checkpoint=tmp_path / "units", resume=True, **options)
    np.testing.assert_allclose(again.arrays["scores"], wanted, rtol=1e-5, atol=1e-7)
    assert len(done) == len(list(_groups(Parts.of(tiny))))  # none was made twice


def test_a_lower_metric_that_is_better_keeps_importance_upright(tiny):
    task = task_of(Parts.of(tiny), pairs_of(), "loss")
    scores = torch.tensor([1.0])
    sign = 1 if float(task.measure.clean.mean()) < float(task.measure.corrupted.mean()) else -1
    assert float(importance(scores, task.measure)) * sign > 0


def test_bad_input_is_told(tiny):
    pairs = pairs_of()
    for options, match in (
        ({"method": "eap_ig"}, "did you mean 'eap-ig'"),
        ({"metric": "logit_dif"}, "did you mean 'logit_diff'"),
        ({"steps": 0}, "steps=0"),
        ({"top": 0}, "top=0"),
        ({"naive": True, "method": "atp"}, "naive"),
    ):
        with pytest.raises(BadInput, match=match):
            edge_attribution(tiny, pairs, progress=False, **options)
    same = Pairs.of(pairs.clean, pairs.clean, answers=[1, 2, 3], wrong=[4, 5, 6])
    with pytest.raises(BadInput, match="alike"):
        edge_attribution(tiny, same, progress=False)
    with pytest.raises(BadInput, match="ablation"):
        EdgeReplay(task_on(tiny), "resampled")
    with pytest.raises(Refused, match="attn_write"):
        edge_attribution(family("bert"), pairs, progress=False)


def test_a_model_whose_mlp_is_not_found_falls_back_to_the_plain_engine(tiny, monkeypatch):
    def refuse(model):
        raise Refused("the input of the MLP could not be told apart")

    monkeypatch.setattr("circuits.passes.find_reads", refuse)
    report = edge_attribution(tiny, pairs_of(n=2), method="eap", progress=False)
    assert "plain engine" in report.meta["notes"][1]
    with pytest.raises(Refused):
        edge_attribution(tiny, pairs_of(n=2), method="atp", progress=False)


def test_the_figure_shows_the_strongest_edges_and_the_slider_prunes(tiny):
    report = edge_attribution(tiny, pairs_of(), progress=False)
    report.meta["model"]["id"] = "<b>x"
    figure = report.figure("graph", edges=30)
    assert "<b>" not in figure.layout.title.text
    steps = figure.layout.sliders[0].steps
    assert all(steps[-1].args[0]["visible"]) and not all(steps[0].args[0]["visible"])
    drawn = [t for t in figure.data if t.mode == "lines"]
    assert sum(len([x for x in trace.x if x is None]) for trace in drawn) == 30
    with pytest.raises(BadInput, match="edges=0"):
        report.figure("graph", edges=0)
    assert isinstance(report.tables["nodes"], pd.DataFrame)


@pytest.mark.slow
def test_the_default_model_agrees_with_the_plain_engine_on_some_receivers(smollm):
    """One receiver of each kind, exact gradients in full forwards; float32 through 30 layers."""
    from circuits.tasks import as_pairs

    task = task_of(Parts.of(smollm), as_pairs(smollm, "ioi", n=4))
    graph = task.parts.graph
    assert not task.parts.notes
    found = score_edges(task, "eap")
    names = ["23.0.q", "20.0.k", "17.4.v", "mlp.12", "logits"]
    columns = [graph.receiver(name) for name in names]
    wanted = plain(task, columns, [1.0])
    largest = float(found.abs().max())
    assert float((found - wanted)[:, columns].abs().max()) < 1e-5 * largest
    writes = sender_writes(smollm, graph, task.pairs.clean_batch)
    assert writes.shape[0] == graph.shape[0]
    whole = EdgeReplay(task).values([graph.whole])[0]
    torch.testing.assert_close(whole, task.measure.clean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_the_plain_engine_runs_the_same_circuits(tiny, ablation):
    pairs = task_on(tiny).pairs
    jobs = [engine(tiny, "eap", naive=naive)[0](pairs, "logit_diff") for naive in (False, True)]
    assert isinstance(jobs[1], PlainJob)
    graph = jobs[0].graph
    circuits = [graph.top_edges(graph.random_scores(1), graph.n_edges // 2), graph.whole]
    circuits[0][0] = graph.allowed[0]
    fast, plain = (job.replay(ablation).values(circuits) for job in jobs)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
    scores = [job.scores("eap-ig", steps=2) for job in jobs]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-5 * float(scores[0].abs().max()))


def test_a_model_whose_readers_cannot_be_told_apart_is_served_by_the_plain_engine(
    tiny, monkeypatch
):
    def refused(model):
        raise Refused("the input of the MLP could not be told")

    pairs = task_on(tiny).pairs
    options = {"method": "eap", "edges": 40, "progress": False}
    judged = {"scores": "eap", "sizes": [10, 100], "random": 0, "subsets": 1, "progress": False}
    found, rated = circuit_find(tiny, pairs, **options), circuit_evaluate(tiny, pairs, **judged)
    monkeypatch.setattr(Parts, "of", staticmethod(refused))
    for plain, fast in (
        (circuit_find(tiny, pairs, **options), found),
        (circuit_evaluate(tiny, pairs, **judged), rated),
    ):
        assert any("plain engine was used: the input" in note for note in plain.meta["notes"])
        pd.testing.assert_frame_equal(plain.table, fast.table, rtol=1e-4, atol=1e-5)
    with pytest.raises(Refused, match="could not be told"):
        edge_attribution(tiny, pairs, method="atp", progress=False)
    with pytest.raises(BadInput, match="naive=True is there for eap and eap-ig"):
        circuit_find(tiny, pairs, method="atp", naive=True)
