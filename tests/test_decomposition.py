"""Contextual decomposition: a plain reference, sums, path attribution, hand-built circuits, bad input.

Tolerances: float32 through a few blocks; the relevant part is a difference of two activations, so its
error is that of the activation, not of itself. A wrong part, gain or scale is off by order one.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from circuits.contextual import Decomposition
from circuits.decomposition import decompose, search
from circuits.frozen import Frozen
from circuits.tasks import as_pairs
from interp.data.pairs import Pairs
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.report import Report
from interp.run.edits import Edit
from tests.families import FAMILIES
from tests.ground_truth.induction_model import (
    INDUCTION_HEAD,
    PREVIOUS_TOKEN_HEAD,
    induction_model,
)
from tests.ground_truth.induction_pairs import induction_pairs
from tests.ground_truth.two_hop_model import (
    FIRST_HOP_HEAD,
    SECOND_HOP_HEAD,
    two_hop_model,
    two_hop_pairs,
)
from tests.ground_truth.two_hop_model import (
    PREVIOUS_TOKEN_HEAD as TWO_HOP_PREVIOUS,
)

PAIRS = Pairs.of(
    [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]],
    [[5, 16, 7, 18, 9], [10, 21, 12, 13, 24]],
    answers=[[3, 4], [5]],
    wrong=[[4], [3]],
    positions={"second": [1, 1]},
)
KINDS = ["llama", "gpt2", "gemma2", "gpt_neox", "granite", "olmo2", "cohere", "gpt_oss", "qwen3"]
KINDS += ["opt", "mixtral", "lfm2"]


def model_of(name: str) -> Model:
    return Model(FAMILIES[name](), id=name)


# --- the rules, written out ----------------------------------------------------------------------


def share(bias: Tensor, r: Tensor, i: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """The bias's part of the relevant and of the irrelevant side."""
    if not shared:
        return torch.zeros_like(r), bias.expand_as(i)
    part = (r.abs() / (r.abs() + i.abs())).nan_to_num(0.0)
    return part * bias, (1 - part) * bias


def linear(module, r: Tensor, i: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """GPT-2's Conv1D or a torch Linear on both parts."""
    W = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
    bias = torch.zeros(W.shape[1]) if module.bias is None else module.bias
    r, i = r @ W, i @ W
    of_r, of_i = share(bias, r, i, shared)
    return r + of_r, i + of_i


def layer_norm(module, r: Tensor, i: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    x = r + i
    scale = (x.var(-1, unbiased=False, keepdim=True) + module.eps).sqrt()
    r, i = (module.weight * (part - part.mean(-1, keepdim=True)) / scale for part in (r, i))
    of_r, of_i = share(module.bias, r, i, shared)
    return r + of_r, i + of_i


@torch.no_grad()
def plain_gpt2(module, ids: Tensor, other: Tensor, head: tuple[int, int], shared: bool) -> Tensor:
    """The relevant part of GPT-2's final residual, both parts carried layer by layer."""
    body, n_heads = module.transformer, module.config.n_head
    place = torch.arange(ids.shape[1])

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)

    def z_of(x: Tensor, block) -> Tensor:
        q, k, v = map(heads, block.attn.c_attn(block.ln_1(x)).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        causal = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
        return scores.masked_fill(~causal, -torch.inf).softmax(-1), v

    x = body.wte(ids) + body.wpe(place)
    y = body.wte(other) + body.wpe(place)
    r, i = torch.zeros_like(x), x
    for layer, block in enumerate(body.h):
        pattern, v = z_of(r + i, block)
        normed = layer_norm(block.ln_1, r, i, shared)
        r_v, i_v = (
            heads(part.chunk(3, -1)[2]) for part in linear(block.attn.c_attn, *normed, shared)
        )
        r_z, i_z = pattern @ r_v, pattern @ i_v
        if layer == head[0]:  # the source: r is what exceeds the corrupted activation
            other_pattern, other_v = z_of(y, block)
            base = (other_pattern @ other_v)[:, head[1]]
            r_z[:, head[1]], i_z[:, head[1]] = (pattern @ v)[:, head[1]] - base, base
        joined = (z.transpose(1, 2).flatten(2) for z in (r_z, i_z))
        r_attn, i_attn = linear(block.attn.c_proj, *joined, shared)
        r, i = r + r_attn, i + i_attn
        hidden = linear(block.mlp.c_fc, *layer_norm(block.ln_2, r, i, shared), shared)
        both, rest = block.mlp.act(hidden[0] + hidden[1]), block.mlp.act(hidden[1])
        r_mlp, i_mlp = linear(block.mlp.c_proj, both - rest, rest, shared)
        r, i = r + r_mlp, i + i_mlp
        if layer <= head[0]:  # the corrupted run is needed up to the source
            y = block(y)
            y = y[0] if isinstance(y, tuple) else y
    return r


@pytest.mark.parametrize("shared", [False, True], ids=["rest", "shared"])
@pytest.mark.parametrize("head", [(0, 1), (1, 3)])
def test_it_is_what_the_rules_give_written_out(head, shared):
    model = model_of("gpt2")
    wanted = plain_gpt2(model.module, PAIRS.clean, PAIRS.corrupted, head, shared)
    whole = Decomposition(
        model, PAIRS, bias="shared" if shared else "rest", capture=["resid_post.2"]
    )
    (part,) = whole.split([f"{head[0]}.{head[1]}"], capture=["resid_post.2"])
    # A share |r| / (|r| + |i|) of nearly nothing is ill-conditioned; everything else is not.
    assert torch.allclose(part.relevant["resid_post.2"], wanted, atol=1e-3 if shared else 1e-5)
    assert wanted.abs().max() > 0.1


# --- sums and known answers ------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["values", "all"])
@pytest.mark.parametrize("name", KINDS)
def test_the_parts_sum_to_the_model(name, attention):
    model = model_of(name)
    site = f"z.{model.spec.attention_layers[-1]}"
    whole = Decomposition(model, PAIRS, attention=attention, capture=["q", "k", "v"])
    assert whole.frozen.held and whole.frozen.error < 1e-5
    first = f"{model.spec.attention_layers[0]}.1"
    parts = whole.split([first, "embed"], capture=[site, site.replace("z", "q")])
    run = model.run(PAIRS.clean_batch, capture=[site])
    diff = whole.logit_diff
    if model.spec.logit_softcap is None:
        logits = run.logits[:, -1]
        wanted = torch.stack([logits[0, [3, 4]].mean() - logits[0, 4], logits[1, 5] - logits[1, 3]])
        assert torch.allclose(diff, wanted, atol=1e-4)
    for part in parts:
        total = part.relevant[site] + part.irrelevant[site]
        assert torch.allclose(total, run.cache[site], atol=1e-5)
        allowed = 1e-5 * float(part.logit_diff.abs().max()) + 1e-4
        assert torch.allclose(part.logit_diff + part.rest, diff, atol=allowed)


def test_without_biases_all_of_it_comes_from_the_embedding(tiny):
    whole = Decomposition(tiny, PAIRS, baseline="zero")
    (part,) = whole.split(["embed"])
    assert torch.allclose(part.logit_diff, whole.logit_diff, atol=1e-5)
    assert part.rest.abs().max() < 1e-5


def attention_only(tiny: Model) -> Model:
    with torch.no_grad():
        for layer in tiny.module.model.layers:
            layer.mlp.down_proj.weight.zero_()
    return tiny


def test_on_a_linear_model_it_is_path_attribution(tiny):
    """Patterns and scales held, no MLPs: a head's write goes to the logits straight and through the
    OV circuit of every later head; nothing else."""
    model = attention_only(tiny)
    sites = ["z", "pattern", "resid_pre", "resid_post.1"]
    run = model.run(PAIRS.clean_batch, capture=sites)
    whole = Decomposition(model, PAIRS, baseline="zero")
    for head in range(4):
        write = run.cache[f"z.0.{head}"] @ model.W_O(0)[head]
        scale = run.cache["resid_pre.1"].pow(2).mean(-1, keepdim=True)
        scale = (scale + model.module.config.rms_norm_eps).sqrt()
        paths = write.clone()
        for later in range(4):
            v = (write / scale) @ model.W_V(1)[model.spec.kv_group(1, later)]
            paths += run.cache[f"pattern.1.{later}"] @ v @ model.W_O(1)[later]
        wanted = (paths[:, -1] * whole.direction.vector).sum(-1)
        (part,) = whole.split([f"0.{head}"])
        assert torch.allclose(part.logit_diff, wanted, atol=1e-5)
    # Linear: what two heads of one layer give together is the sum of what each gives.
    both, one, two = whole.split(["0.0+0.1", "0.0", "0.1"])
    assert torch.allclose(both.logit_diff, one.logit_diff + two.logit_diff, atol=1e-5)


def test_the_last_layers_heads_give_their_direct_effect(tiny):
    """Nothing but the last MLP reads them; with it silenced, patching with the final scale held."""
    model = attention_only(tiny)
    whole = Decomposition(model, PAIRS)
    corrupted = model.run(PAIRS.corrupted_batch, capture=["z"], logits=False).cache
    for head in range(4):
        change = whole.clean[f"z.1.{head}"] - corrupted[f"z.1.{head}"]
        wanted = (change[:, -1] @ model.W_O(1)[head] * whole.direction.vector).sum(-1)
        assert torch.allclose(whole.split([f"1.{head}"])[0].logit_diff, wanted, atol=1e-5)


def test_attention_all_is_ablation_with_the_scales_held(tiny):
    """Where no norm follows but the final one, patterns free to move make it plain patching."""
    model = attention_only(tiny)  # the last block's second norm would follow
    whole = Decomposition(model, PAIRS, attention="all", capture=["resid_post.1"])
    (part,) = whole.split(["1.2"], capture=["resid_post.1"])
    corrupted = model.run(PAIRS.corrupted_batch, capture=["z"], logits=False).cache
    edits = [Edit.patch("z.1.2", corrupted["z.1"])]
    patched = model.run(PAIRS.clean_batch, capture=["resid_post.1"], edits=edits).cache
    assert torch.allclose(part.irrelevant["resid_post.1"], patched["resid_post.1"], atol=1e-5)


def test_positions_and_baselines(tiny):
    whole = Decomposition(tiny, PAIRS, baseline="zero")
    at_second = whole.split(["0.1"], positions="second", capture=["z.0", "resid_post.1"])[0]
    taken = at_second.relevant["z.0"].abs().amax((0, 3)) > 1e-4  # more than rounding
    assert taken.nonzero().tolist() == [[1, 1]]
    assert torch.equal(at_second.irrelevant["z.0"][:, 1, 1], torch.zeros(2, 8))
    mean = Decomposition(tiny, PAIRS, baseline="mean")
    irrelevant = mean.split(["0.1"], capture=["z.0"])[0].irrelevant["z.0.1"]
    corrupted = tiny.run(PAIRS.corrupted_batch, capture=["z"]).cache["z.0.1"]
    assert torch.allclose(irrelevant, corrupted.mean(0, keepdim=True).expand(2, -1, -1), atol=1e-6)


def test_relevance_to_a_node_is_its_gradient_times_its_change(tiny):
    """By finite differences: moving z of the target along its relevant part moves the logits so."""
    whole = Decomposition(tiny, PAIRS)
    found = whole.relevance(["0.1"])
    (part,) = whole.split(["0.1"], capture=["z.1"])
    step = 1e-2

    def moved(size: float) -> Tensor:
        edits = [Edit.patch("z.1.2", whole.clean["z.1"] + size * part.relevant["z.1"])]
        logits = tiny.run(PAIRS.clean_batch, edits=edits).logits[:, -1]
        return torch.stack([logits[0, [3, 4]].mean() - logits[0, 4], logits[1, 5] - logits[1, 3]])

    slope = float((moved(step) - moved(-step)).mean() / (2 * step))
    by_value = found.to_nodes[0, found.nodes.index("1.2"), 1]
    # Second-order terms of the step, and float32 logits divided by it.
    assert by_value == pytest.approx(slope, rel=2e-2, abs=1e-3)
    assert not found.to_nodes[0, : found.nodes.index("mlp.0")].any()


# --- hand-built circuits ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "pairs", "known"),
    [
        (induction_model, induction_pairs(16), {PREVIOUS_TOKEN_HEAD, INDUCTION_HEAD}),
        (
            two_hop_model,
            two_hop_pairs(16),
            {TWO_HOP_PREVIOUS, FIRST_HOP_HEAD, SECOND_HOP_HEAD},
        ),
    ],
    ids=["induction", "two hops"],
)
def test_the_search_keeps_exactly_the_known_heads(module, pairs, known):
    report = decompose(Model(module(), id="known"), pairs, progress=False)
    table = report.table.set_index(["layer", "head"])["score"]
    assert table[[place for place in table.index if place in known]].min() > 1
    assert table[[place for place in table.index if place not in known]].max() < 1e-3


def test_the_search_goes_through_what_is_kept():
    model = Model(two_hop_model(), id="two hops")
    found = Decomposition(model, two_hop_pairs(8)).relevance()
    scores, target = search(found)
    best = {found.nodes[i]: [*found.nodes, "logits"][target[i]] for i in scores.argsort()[-3:]}
    # The previous-token head's information enters both lookups' keys, the first hop the second's query.
    assert best == {"0.1": "2.0", "1.2": "2.0", "2.0": "logits"}
    pattern, value = found.to_nodes[found.nodes.index("1.2"), found.nodes.index("2.0")]
    assert pattern > 1 and abs(value) < 1e-3


# --- default model -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_default_models_name_movers_are_near_the_top(smollm):
    pairs = as_pairs(smollm, "ioi", n=8)
    late = [f"{layer}.{head}" for layer in range(22, 30) for head in range(9)]
    report = decompose(smollm, pairs, sources=late, progress=False)
    top = report.table["source"].head(8).tolist()
    # Independent exact path patching names 23.0 a name mover, 23.3 the largest direct writer, 29.1 a
    # late readout.
    assert {"23.0", "23.3", "29.1"} <= set(top)


# --- the analysis ------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "units"
    whole = decompose(tiny, PAIRS, progress=False)
    decompose(tiny, PAIRS, progress=False, checkpoint=folder)

    def broken(*args, **options):
        raise AssertionError("nothing is left to compute")

    monkeypatch.setattr(Frozen, "replay", lambda *a, **k: [torch.zeros(2, 5, 32)])
    monkeypatch.setattr(Frozen, "_error", lambda self: 0.0)
    monkeypatch.setattr(Decomposition, "_replay", broken)
    again = decompose(tiny, PAIRS, progress=False, checkpoint=folder, resume=True)
    assert again.table.equals(whole.table)
    with pytest.raises(BadInput, match="baseline"):
        decompose(tiny, PAIRS, baseline="zero", progress=False, checkpoint=folder, resume=True)


def test_the_report_and_its_figure(tiny, tmp_path):
    report = decompose(tiny, PAIRS, progress=False)
    assert report.table["contribution"].abs().is_monotonic_decreasing
    assert (report.table["low"] <= report.table["contribution"]).all()
    loaded = Report.load(report.save(tmp_path))
    figure = loaded.figure("map")
    cell = loaded.table[loaded.table["source"] == "1.2"].iloc[0]
    assert figure.data[0].z[1][2] == pytest.approx(cell["contribution"])
    onto = loaded.figure("map", target="1.2")
    index = loaded.meta["nodes"].index("1.2")
    source = loaded.meta["sources"].index("0.1")
    wanted = loaded.arrays["to_nodes"][source, index].sum()
    assert onto.data[0].z[0][1] == pytest.approx(wanted)
    with pytest.raises(BadInput, match="did you mean"):
        loaded.figure("map", target="1.22")


def test_bad_input(tiny):
    with pytest.raises(BadInput, match="did you mean 'corrupted'"):
        decompose(tiny, PAIRS, baseline="corupted", progress=False)
    with pytest.raises(BadInput, match=r"no node '0\.9'"):
        decompose(tiny, PAIRS, sources=["0.9"], progress=False)
    with pytest.raises(BadInput, match="did you mean 'second'"):
        decompose(tiny, PAIRS, positions="secnd", progress=False)
    with pytest.raises(BadInput, match="no source"):
        decompose(tiny, PAIRS, sources=[], progress=False)
    whole = Decomposition(tiny, PAIRS)
    with pytest.raises(BadInput, match="empty"):
        whole.split([[]])
    with pytest.raises(BadInput, match="capture="):
        whole.split(["0.1"], capture=["q.1"])
    with pytest.raises(BadInput, match="every head and MLP"):
        search(whole.relevance(["0.1"]))
    with pytest.raises(Refused, match="cannot be unembedded"):
        Decomposition(model_of("bert"), PAIRS)
    with pytest.raises(Refused, match="pattern"):
        Decomposition(model_of("mamba"), PAIRS)
