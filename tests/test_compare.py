"""Models side by side: planted permutations, planted changes and planted roles are found, and no others."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from circuits.heads.classify import classify_heads
from circuits.heads.comparable import names_of
from circuits.heads.compare import compare_reports
from circuits.heads.compare_weights import compare_weights
from circuits.heads.head_weights import DISTANCES, HeadWeights, head_weights
from circuits.heads.low_rank import Circuit, changes, cosines, invariants, norms
from circuits.heads.matching import match_heads, standardised
from circuits.heads.profiles import profile_distances, role_counts
from circuits.heads.weight_matching import match_by_features
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.models.weights import FrozenNorm
from interp.report import Report
from tests.families import FAMILIES
from tests.ground_truth.head_zoo import ZOO, head_zoo
from tests.ground_truth.induction_model import (
    INDUCTION_HEAD,
    PREVIOUS_TOKEN_HEAD,
    character_tokenizer,
    induction_model,
)
from tests.other_device import other_device

# query heads 0, 1 share key and value head 0, heads 2, 3 share head 1: the groups swap, and heads inside the first
ORDER, GROUPS = [2, 3, 1, 0], [1, 0]


def heads_of(module, id: str = "model", **options) -> Report:
    model = module if isinstance(module, Model) else Model(module, character_tokenizer(), id)
    options = {"prompts": 6, **options}
    return classify_heads(model, ablate=False, evidence=0, progress=False, **options)


def rearranged(model: Model, layer: int = 1) -> Model:
    """The same Llama, the heads of one layer in another order: head ORDER[i] now stands at place i."""
    module = copy.deepcopy(model.module)
    attention = module.model.layers[layer].self_attn
    with torch.no_grad():
        for name, order in (("q_proj", ORDER), ("k_proj", GROUPS), ("v_proj", GROUPS)):
            weight = getattr(attention, name).weight
            weight.copy_(weight.unflatten(0, (len(order), 8))[order].flatten(0, 1))
        weight = attention.o_proj.weight
        weight.copy_(weight.unflatten(1, (4, 8))[:, ORDER].flatten(1, 2))
    return Model(module, id="rearranged")


def changed(model: Model, name: str, rows: slice, layer: int = 1) -> Model:
    """The same Llama, some rows (columns of o_proj) of one projection moved by noise."""
    module = copy.deepcopy(model.module)
    weight = getattr(module.model.layers[layer].self_attn, name).weight
    with torch.no_grad():
        part = weight[:, rows] if name == "o_proj" else weight[rows]
        part.add_(0.1 * torch.randn(part.shape, generator=torch.Generator().manual_seed(0)))
    return Model(module, id="tuned")


def pairs_of(matches: pd.DataFrame) -> dict[tuple[int, int], tuple[int, int]]:
    found = matches[matches["matched"]]
    rows = found[["layer_a", "head_a", "layer_b", "head_b"]].to_numpy().tolist()
    return {(a, b): (c, d) for a, b, c, d in rows}


# --- a model with itself, rearranged, changed ---------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_report(tiny_model) -> Report:
    return heads_of(tiny_model())


def test_a_model_matches_itself_head_by_head_and_nothing_changed(tiny_report):
    both = compare_reports([tiny_report, tiny_report])
    places = [(layer, head) for layer in range(2) for head in range(4)]
    assert pairs_of(both.tables["matches"]) == {place: place for place in places}
    assert both.table.loc[0, ["matched", "same_place", "changed_heads"]].tolist() == [8, 1.0, 0]
    assert not both.tables["score_changes"]["change"].any()
    assert not len(both.tables["unmatched"])


def test_a_comparison_read_backwards_says_the_same(tiny_model, tiny_report):
    other = heads_of(tiny_model(seed=1))
    there, back = (
        compare_reports(pair).tables["matches"]
        for pair in ([tiny_report, other], [other, tiny_report])
    )
    there = there.sort_values(["layer_b", "head_b"], ignore_index=True)
    for column in ("distance", "chance", "p"):
        np.testing.assert_allclose(there[column], back[column], atol=1e-12)
    assert (there["layer_a"] == back["layer_b"]).all() and (there["head_a"] == back["head_b"]).all()


def test_rearranged_heads_are_found_by_behaviour(tiny_model, tiny_report):
    both = compare_reports([tiny_report, heads_of(rearranged(tiny_model()))])
    want = {(0, head): (0, head) for head in range(4)}
    want |= {(1, head): (1, place) for place, head in enumerate(ORDER)}
    assert pairs_of(both.tables["matches"]) == want


def test_rearranged_heads_are_found_by_weights(tiny_model):
    report = compare_weights([tiny_model(), rearranged(tiny_model())], prompts=0, progress=False)
    want = {(0, head): (0, head) for head in range(4)}
    want |= {(1, head): (1, place) for place, head in enumerate(ORDER)}
    assert pairs_of(report.tables["matches"]) == want
    # the same numbers summed in another order
    assert report.tables["matches"]["likeness"].min() > 1 - 1e-5
    moved = report.table[report.table["weights_changed"]]
    assert set(zip(moved["layer"], moved["head"], strict=True)) == {(1, head) for head in range(4)}


@pytest.mark.parametrize(
    ("name", "rows", "heads", "kind"),
    [
        ("q_proj", slice(8, 16), [1], "qk"),
        ("o_proj", slice(16, 24), [2], "ov"),
        ("k_proj", slice(0, 8), [0, 1], "qk"),
        ("v_proj", slice(8, 16), [2, 3], "ov"),
    ],
)
def test_exactly_the_changed_heads_are_changed(tiny_model, name, rows, heads, kind):
    tuned = changed(tiny_model(), name, rows)
    report = compare_weights([tiny_model(), tuned], prompts=0, progress=False)
    seen = report.table.set_index(["layer", "head"])
    where = {(1, head) for head in heads}
    assert set(seen.index[seen["weights_changed"]]) == where
    other = "ov" if kind == "qk" else "qk"
    assert set(seen.index[seen[f"{kind}_change"] > 0]) == where
    assert (seen[f"{other}_change"] == 0).all()
    assert report.tables["matches"]["matched"].all()  # moved a little, and still themselves


def test_a_change_is_as_large_as_the_whole_matrices_say(tiny_model):
    a, b = tiny_model(), changed(tiny_model(), "q_proj", slice(8, 16))
    found = compare_weights([a, b], prompts=0, progress=False).table.set_index(["layer", "head"])
    whole = []
    for model in (a, b):
        circuit = head_weights(model).qk[1]
        whole.append(torch.cat([left[1] @ circuit.right[1].T for left in circuit.left]).double())
    before, after = whole
    change = float((after - before).norm() / before.norm())
    cosine = float((after * before).sum() / after.norm() / before.norm())
    assert found.loc[(1, 1), "qk_change"] == pytest.approx(change, rel=1e-5)
    assert found.loc[(1, 1), "qk_cosine"] == pytest.approx(cosine, rel=1e-5)


def test_a_change_that_only_distance_shows_is_seen(tiny_model):
    """The planes of a head's rotary dimensions change places: q · k stays as it is at the same position."""
    module = copy.deepcopy(tiny_model().module)
    attention = module.model.layers[1].self_attn
    order = [1, 0, 2, 3, 5, 4, 6, 7]  # planes (0, 4) and (1, 5)
    with torch.no_grad():
        for weight, heads in ((attention.q_proj.weight, (0, 1)), (attention.k_proj.weight, (0,))):
            for head in heads:
                part = weight[8 * head : 8 * head + 8]
                part.copy_(part[order].clone())
    a, b = (head_weights(model).qk[1] for model in (tiny_model(), Model(module)))
    here = [Circuit(circuit.left[:1], circuit.right) for circuit in (a, b)]
    assert changes(*here).max() < 1e-5
    assert changes(a, b)[:2].min() > 0.05
    assert (changes(a, b)[2:] == 0).all()


@pytest.fixture(scope="module")
def broken():
    """The hand-built model whose induction head no longer asks for anything."""
    module = induction_model()
    with torch.no_grad():
        first = INDUCTION_HEAD[1] * 119
        module.transformer.h[INDUCTION_HEAD[0]].attn.c_attn.weight[:, first : first + 119] = 0
    return module


def test_a_head_that_lost_its_role_is_the_only_one_reported(broken):
    """L1H2's queries are zeroed: only its scores change, and it loses "induction", by reports and in pairs."""
    base = Model(induction_model(), character_tokenizer(), "base")
    tuned = Model(broken, character_tokenizer(), "tuned")
    by_reports = compare_reports([heads_of(base), heads_of(tuned)])
    by_prompts = compare_weights([base, tuned], prompts=6, progress=False)
    for heads in (by_reports.tables["changes"], by_prompts.table):
        row = heads[heads["changed_scores"] > 0]
        assert row[["layer", "head"]].to_numpy().tolist() == [list(INDUCTION_HEAD)]
        assert row["lost"].tolist() == ["induction"] and row["gained"].tolist() == [""]
        assert heads.drop(row.index)[["gained", "lost"]].eq("").all(axis=None)
    for scores in (by_reports.tables["score_changes"], by_prompts.tables["score_changes"]):
        of_head = scores[(scores["layer"] == 1) & (scores["head"] == 2)].set_index("score")
        # it attends evenly now: of about 40 tokens one is the right one
        assert of_head.loc["induction", ["low", "high"]].between(-1.0, -0.9).all()
        assert of_head.loc["induction", "changed"] and not of_head.loc["copying", "changed"]
    changed_weights = by_prompts.table[by_prompts.table["weights_changed"]]
    assert changed_weights[["layer", "head"]].to_numpy().tolist() == [list(INDUCTION_HEAD)]
    assert changed_weights["ov_change"].tolist() == [0.0]


def test_two_reports_on_one_model_show_no_change(tiny_model, tiny_report):
    other = heads_of(tiny_model(), seed=1)
    both = compare_reports([tiny_report, other])
    assert both.table["changed_heads"].tolist() == [0]
    assert names_of([tiny_report, other]) == ["tiny, seed 0", "tiny, seed 1"]


# --- models with nothing in common --------------------------------------------------------------------


def test_heads_of_random_models_are_not_matched(tiny_model):
    """Six pairs of random models, 96 pairs of heads: at most alpha of them matched."""
    reports = [heads_of(tiny_model(seed=seed, num_hidden_layers=4)) for seed in range(4)]
    both = compare_reports(reports)
    assert len(both.table) == 6
    assert both.table["matched"].sum() <= 0.05 * both.table["heads_a"].sum()


def test_random_weights_are_not_matched(tiny_model):
    report = compare_weights([tiny_model(), tiny_model(seed=1)], prompts=0, progress=False)
    assert not report.tables["matches"]["matched"].any()
    assert report.table["weights_changed"].all()


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_matches_hold_their_level_and_their_power(correlation):
    """Unrelated heads with correlated scores are seldom matched, noisy copies nearly always to their own."""
    generator = np.random.default_rng(0)
    shared = generator.normal(size=(12, 12))
    mix = (1 - correlation) * np.eye(12) + correlation * shared / 12**0.5
    false, right = [], []
    for seed in range(10):
        heads, others = generator.normal(size=(2, 40, 12)) @ mix
        copies = heads + 0.2 * generator.normal(size=heads.shape)
        false.append(match_heads(*standardised(heads, others)[:2], seed=seed)["matched"].mean())
        order = generator.permutation(40)
        found = match_heads(*standardised(heads, copies[order])[:2], seed=seed)
        right.append((found["matched"] & (order[found["b"]] == found["a"])).mean())
    assert np.mean(false) <= 0.05
    assert np.mean(right) > 0.9


def test_interchangeable_heads_are_no_match():
    """Six heads that do the same and two of their own kind: only the two are matched."""
    heads = np.zeros((8, 4))
    heads[2], heads[5] = (4, 1, 0, 3), (0, 2, 5, -1)
    found = match_heads(heads, heads[::-1])
    assert found[found["matched"]][["a", "b"]].to_numpy().tolist() == [[2, 5], [5, 2]]


def test_a_score_that_is_only_noise_counts_for_nothing():
    heads = np.array([[0.0, 3.0], [1.0, -3.0], [2.0, 1.0]])
    noise = np.array([[0.0, 9.0]] * 3)
    one, other, unit = standardised(heads, heads + np.array([0, 5]), noise, noise)
    assert unit[1] == 0 and unit[0] > 0
    np.testing.assert_allclose(one, other)


def test_depth_decides_between_partners_that_behave_alike():
    heads = np.array([[1.0], [1.0]])
    options = {"depth_a": np.array([0.1, 0.9]), "depth_b": np.array([0.9, 0.1])}
    assert match_heads(heads, heads, penalty=1.0, **options)["b"].tolist() == [1, 0]


# --- roles at other depths ----------------------------------------------------------------------------


def deeper_induction_model(n_layer: int, places: dict[tuple[int, int], tuple[int, int]]):
    """The hand-built induction model with more layers, its heads moved; all others have no weights."""
    small = induction_model()
    deep = GPT2LMHeadModel(GPT2Config(**{**small.config.to_dict(), "n_layer": n_layer})).eval()
    d_head = small.config.n_embd // small.config.n_head
    with torch.no_grad():
        for name, parameter in deep.named_parameters():
            if "ln_" not in name:
                parameter.zero_()
        for name in ("transformer.wte", "transformer.wpe", "lm_head"):
            deep.get_submodule(name).weight.copy_(small.get_submodule(name).weight)
        for (layer, head), (to, place) in places.items():
            source, target = (m.transformer.h[i].attn for m, i in ((small, layer), (deep, to)))
            shape = (3, small.config.n_head, d_head)
            target.c_attn.weight.unflatten(1, shape)[:, :, place] = source.c_attn.weight.unflatten(
                1, shape
            )[:, :, head]
            target.c_proj.weight.unflatten(0, shape[1:])[place] = source.c_proj.weight.unflatten(
                0, shape[1:]
            )[head]
    return deep


def test_planted_roles_align_whatever_their_layer():
    deeper = deeper_induction_model(5, {PREVIOUS_TOKEN_HEAD: (1, 3), INDUCTION_HEAD: (4, 0)})
    both = compare_reports([heads_of(induction_model(), "small"), heads_of(deeper, "deep")])
    assert pairs_of(both.tables["matches"]) == {PREVIOUS_TOKEN_HEAD: (1, 3), INDUCTION_HEAD: (4, 0)}
    roles = both.tables["roles"].set_index(["model", "role"])
    for role, small, deep in (("previous_token", "L0H1", "L1H3"), ("induction", "L1H2", "L4H0")):
        assert roles.loc[("small", role), ["heads", "strongest"]].tolist() == [1, small]
        assert roles.loc[("deep", role), ["heads", "strongest"]].tolist() == [1, deep]
        assert roles.loc[("deep", role), "share"] == 1 / 20
    apart = both.tables["profile_distances"].set_index("role")["distance"]
    assert apart["previous_token"] == pytest.approx(1.5 / 5 - 0.5 / 2)
    assert apart["induction"] == pytest.approx(4.5 / 5 - 1.5 / 2)
    left = both.tables["unmatched"]
    assert (left["labels"] == "").all() and len(left) == 6 + 18
    assert (left["why"] == "small has fewer heads").sum() == 12
    assert not len(both.tables["changes"]) and both.figure("changes").layout.annotations


def test_every_kind_of_head_of_the_zoo_is_matched_to_its_own_in_another_layer():
    small, big = head_zoo(), head_zoo()
    order = np.random.default_rng(0).permutation(len(ZOO)).tolist()
    d_head = small.config.n_embd // len(ZOO)
    with torch.no_grad():
        source, target = (big.transformer.h[layer].attn.c_attn.weight for layer in (0, 1))
        parts = source.unflatten(1, (3, len(ZOO), d_head))[:, :, order]
        target.copy_(parts.flatten(1, 3))
        source.zero_()
    both = compare_reports([heads_of(small, "small"), heads_of(big, "moved")])
    found = pairs_of(both.tables["matches"])
    kinds = [head for head, name in enumerate(ZOO) if name]
    assert {a: b for a, b in found.items() if a[0] == 0 and a[1] in kinds} == {
        (0, head): (1, order.index(head)) for head in kinds
    }
    # what does nothing is interchangeable: no match is claimed for it
    assert len(found) == len(kinds)
    assert both.table["same_labels"].tolist() == [1.0]


def test_role_counts_and_profiles_by_hand():
    table = pd.DataFrame({"layer": [0, 1, 2, 3], "head": 0, "labels": ["x", "", "x,y", ""]})
    for role, confidence in (("x", [1.0, 0.0, 0.5, 0.0]), ("y", [0.0, 0.0, 1.0, 1.0])):
        table[role] = [0.9, 0.1, 0.8, 0.2]
        table[f"{role}_low"], table[f"{role}_high"] = table[role] - 0.1, table[role] + 0.1
        table[f"{role}_confidence"], table[f"{role}_p"] = confidence, [0.0, 0.0, 0.0, 0.5]
    counts = role_counts({"m": table}, {"m": 4}, ["x", "y"], {"m": 0.01}).set_index("role")
    assert counts.loc["x", ["heads", "heads_low", "heads_high", "share"]].tolist() == [2, 1, 2, 0.5]
    assert counts.loc["x", "depth"] == pytest.approx((0.125 + 0.625) / 2)
    assert counts.loc["y", ["heads", "heads_low", "heads_high"]].tolist() == [1, 1, 1]
    later = table.assign(labels=["", "x", "", "x"])
    apart = profile_distances({"a": table, "b": later}, {"a": 4, "b": 4}, ["x", "y"])
    assert apart[["role", "distance"]].to_numpy().tolist() == [["x", 0.25]]
    assert apart["p"].isna().all()  # two heads each say nothing


# --- weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "gemma", "smollm3", "ernie4_5", "qwen3", "gemma3", "olmo2"]
)
def test_qk_circuits_give_the_models_own_scores(family):
    """x_i W_Q R_Δ W_Kᵀ x_j / σ_i σ_j is the score one position back; up to |q| |k| where those are normalised."""
    model = Model(FAMILIES[family](), id=family)
    ids = torch.tensor([[5, 11], [7, 3], [40, 2], [9, 9]])
    run = model.run(ids, capture=["resid_pre", "q", "k"], logits=False)
    weights = head_weights(model)
    assert sorted(weights.qk) == model.spec.attention_layers
    normalised = any("normalised" in note for note in weights.notes)
    assert normalised == (family in ("qwen3", "gemma3", "olmo2"))
    for layer, circuit in weights.qk.items():
        x = run.cache[f"resid_pre.{layer}"]
        name = model.spec.blocks[layer].v.input
        if name != "resid_pre":
            x = x / FrozenNorm(model.module.get_submodule(name), 32).scale(x)
        q, k = run.cache[f"q.{layer}"][:, 1], run.cache[f"k.{layer}"][:, 0]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = (q * k).sum(-1)
        q_made = torch.einsum("bm,hmd->bhd", x[:, 1], circuit.left[DISTANCES.index(1)])
        k_made = torch.einsum("bm,hmd->bhd", x[:, 0], circuit.right)
        made = (q_made * k_made).sum(-1)
        if normalised:
            scores = scores / (q.norm(dim=-1) * k.norm(dim=-1))
            made = made / (q_made.norm(dim=-1) * k_made.norm(dim=-1))
        # float32, and the norm's epsilon
        torch.testing.assert_close(made, scores, rtol=2e-3, atol=2e-3 * float(scores.abs().max()))


def test_qk_circuits_of_fused_projections_and_ov_circuits_are_the_weights():
    module = FAMILIES["gpt2"]()
    model = Model(module, id="gpt2")
    weights = head_weights(model)
    module.requires_grad_(False)
    for layer, block in enumerate(module.transformer.h):
        gain = block.ln_1.weight[:, None]
        W_Q, W_K, W_V = (
            (gain * part).unflatten(1, (4, 8)).transpose(0, 1)
            for part in block.attn.c_attn.weight.split(32, dim=1)
        )
        W_O = block.attn.c_proj.weight.unflatten(0, (4, 8))
        centre = torch.eye(32) - 1 / 32
        want = centre @ W_Q @ W_K.transpose(-1, -2) @ centre * (32 / 31)
        circuit = weights.qk[layer]
        for left in circuit.left:  # learned positions: the same at every distance
            made = left @ circuit.right.transpose(-1, -2)
            torch.testing.assert_close(made, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
        circuit = weights.ov[layer]
        torch.testing.assert_close(circuit.left[0] @ circuit.right.transpose(-1, -2), W_V @ W_O)


def test_low_rank_products_are_those_of_the_whole_matrices():
    generator = torch.Generator().manual_seed(0)
    a, b = (
        Circuit(
            torch.randn(2, 3, 20, 4, generator=generator),
            torch.randn(3, 20, 4, generator=generator),
        )
        for _ in range(2)
    )
    whole_a, whole_b = (
        (c.left @ c.right.transpose(-1, -2)).transpose(0, 1).flatten(1) for c in (a, b)
    )
    torch.testing.assert_close(norms(a), whole_a.norm(dim=1))
    unit_a, unit_b = (x / x.norm(dim=1, keepdim=True) for x in (whole_a, whole_b))
    torch.testing.assert_close(cosines(a, b), unit_a @ unit_b.T)
    want = (whole_b - whole_a).norm(dim=1) / whole_a.norm(dim=1)
    torch.testing.assert_close(changes(a, b).float(), want)
    tiny = Circuit(a.left * (1 + 2**-20), a.right)
    torch.testing.assert_close(changes(a, tiny), torch.full((3,), 2.0**-20, dtype=torch.float64))


def test_invariants_do_not_know_the_basis_and_read_planted_circuits():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 3, 24, 4, generator=generator)
    turn = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0]
    inner = torch.randn(4, 4, generator=generator)
    same = Circuit((turn @ left @ inner)[None], turn @ right @ torch.linalg.inv(inner).T)
    for name, values in invariants(Circuit(left[None], right)).items():
        torch.testing.assert_close(invariants(same)[name], values, rtol=1e-4, atol=1e-4)
    W = left @ right.transpose(-1, -2)
    s = torch.linalg.svdvals(W.double()) ** 2
    torch.testing.assert_close(
        invariants(same)["top"], (s[:, 0] / s.sum(1)).float(), rtol=1e-4, atol=1e-5
    )
    # a projection copies what it reads, its opposite writes the opposite; their spectra are flat
    copying = turn[:, :4][None]
    both = invariants(Circuit(torch.cat([copying, copying])[None], torch.cat([copying, -copying])))
    torch.testing.assert_close(both["sign"], torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(both["symmetry"], torch.ones(2))
    torch.testing.assert_close(both["rank"], torch.ones(2))
    dead = invariants(Circuit(torch.zeros(1, 1, 24, 4), torch.zeros(1, 24, 4)))
    assert all(value.isnan().all() for value in dead.values())


def test_heads_moved_into_a_wider_stream_are_found_by_what_no_basis_changes():
    """W and P W Pᵀ, P into more dimensions: every invariant is the same, so every head is its own partner."""
    generator = torch.Generator().manual_seed(0)
    wider = torch.linalg.qr(torch.randn(60, 24, generator=generator))[0]
    order = torch.randperm(10, generator=generator).tolist()
    small, wide = {}, {}
    for kind in ("qk", "ov"):
        left, right = torch.randn(2, 10, 24, 6, generator=generator)
        # spectra that fall at their own pace, and heads that copy a little or the opposite
        left = left * torch.rand(10, 1, 1, generator=generator) ** torch.arange(6)
        right = right + 2 * torch.randn(10, 1, 1, generator=generator) * left
        small[kind] = {0: Circuit(left[None], right)}
        wide[kind] = {0: Circuit((wider @ left)[None, order], (wider @ right)[order])}
    found = match_by_features(HeadWeights(**small), HeadWeights(**wide))
    assert [order[head] for head in found["head_b"]] == found["head_a"].tolist()
    assert found["matched"].all() and found["distance"].max() < 1e-3


def test_models_of_other_shapes_are_matched_by_what_no_basis_changes(tiny_model):
    wide = tiny_model(hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    report = compare_weights([tiny_model(), wide], prompts=0, progress=False)
    assert len(report.table) == 0 and len(report.tables["matches"]) == 8
    assert len(report.tables["features"]) == 8 + 16
    assert "another shape" in report.meta["notes"][0]
    assert (
        report.tables["matches"]["matched"].mean() <= 0.125
    )  # random weights have no counterparts
    assert report.figure().layout.annotations


def test_a_model_whose_weights_cannot_be_read_is_refused():
    with pytest.raises(Refused, match="latent"):
        head_weights(Model(FAMILIES["deepseek_v3"](), id="mla"))


# --- bad input ----------------------------------------------------------------------------------------


def without(report: Report, **meta) -> Report:
    return Report("heads", report.tables, report.arrays, copy.deepcopy(report.meta) | meta)


def test_what_cannot_be_compared_is_told(tiny_report):
    meta = tiny_report.meta
    other = {
        "one report": ([tiny_report], "at least two"),
        "another analysis": (
            [tiny_report, Report("massive", {}, {}, {"model": {"id": "m"}})],
            "a report of 'massive'",
        ),
        "tokens": (
            [tiny_report, without(tiny_report, options=meta["options"] | {"tokens": 32})],
            "--tokens 128",
        ),
        "alpha": (
            [tiny_report, without(tiny_report, options=meta["options"] | {"alpha": 0.1})],
            "alpha=0.01, tiny with alpha=0.1",
        ),
        "detectors": (
            [tiny_report, without(tiny_report, detectors=meta["detectors"][:2])],
            "only tiny has .*previous_token.*--detectors",
        ),
        "versions": (
            [
                tiny_report,
                without(
                    tiny_report,
                    detectors=[d | {"threshold": 9} for d in meta["detectors"]],
                ),
            ],
            "another threshold",
        ),
    }
    for reports, message in other.values():
        with pytest.raises(BadInput, match=message):
            compare_reports(reports)


def test_bad_options_are_told(tiny_report, tiny_model):
    for options, message in (
        ({"pairs": "al"}, "did you mean 'all'"),
        ({"penalty": -1.0}, "0 or more"),
        ({"bins": 0}, "at least one bin"),
        ({"alpha": 1.0}, "between 0 and 1"),
    ):
        with pytest.raises(BadInput, match=message):
            compare_reports([tiny_report, tiny_report], **options)
    with pytest.raises(BadInput, match="at least two models"):
        compare_weights([tiny_model()])
    with pytest.raises(BadInput, match="0 compares weights alone"):
        compare_weights([tiny_model(), tiny_model()], prompts=2)


def test_a_detector_that_one_model_cannot_have_is_left_out_and_named(tiny_model, tiny_report):
    shallow = heads_of(tiny_model(num_hidden_layers=1))
    both = compare_reports([tiny_report, shallow])
    assert "induction" in shallow.meta["skipped"]
    assert any(note.startswith("induction is not compared") for note in both.meta["notes"])
    assert "induction" not in set(both.tables["roles"]["role"])


def test_one_score_matches_nothing_and_still_makes_a_page(tiny_model):
    """Heads with one score and no label lie on a line: any other model's could be put together of them."""
    reports = [heads_of(tiny_model(seed=s), detectors=["induction_copying"]) for s in (0, 0)]
    both = compare_reports(reports)
    assert both.table["matched"].tolist() == [0] and not len(both.tables["roles"])
    assert "no head of any model has a role" in both.to_html()


def test_a_model_on_another_device_is_the_same_model(tiny_model):
    with other_device():
        there = Model(tiny_model().module.to("other"), id="there")
        report = compare_weights([tiny_model(), there], prompts=4, progress=False)
    assert not report.table["weights_changed"].any() and report.tables["matches"]["matched"].all()
    assert not report.tables["score_changes"]["change"].any()


def test_scores_are_not_compared_where_a_model_has_no_tokenizer(tiny_model):
    module = induction_model()
    models = [Model(module, character_tokenizer(), "a"), Model(induction_model(), id="b")]
    report = compare_weights(models, prompts=4, progress=False)
    assert "without a tokenizer" in report.meta["notes"][-1]
    assert report.table["gained"].isna().all() and not report.table["weights_changed"].any()


def test_pairs_are_all_or_with_the_first_or_in_a_row(tiny_report):
    three = [tiny_report] * 3
    names = [f"tiny ({n})" for n in (1, 2, 3)]
    for pairs, want in (("first", [(0, 1), (0, 2)]), ("next", [(0, 1), (1, 2)])):
        table = compare_reports(three, pairs=pairs).table
        found = list(zip(table["model_a"], table["model_b"], strict=True))
        assert found == [(names[a], names[b]) for a, b in want]
    assert len(compare_reports(three).table) == 3


# --- pages and the shell ------------------------------------------------------------------------------


def test_the_page_links_to_each_report_whose_folder_is_known(tiny_model, tmp_path):
    one = heads_of(tiny_model())
    odd = without(one, model=one.meta["model"] | {"id": "<b>$x$"}, folder=str(tmp_path / "in <1>"))
    both = compare_reports([one, odd], out=tmp_path / "out")
    assert both.tables["models"]["page"].tolist() == ["", "../in <1>/report.html"]
    page = both.to_html()
    assert (
        'href="../in &lt;1&gt;/report.html"' in page
        and "<b>$x$" not in page.split("</h1>")[1][:500]
    )
    for name in ("roles", "depth", "matches", "changes"):
        assert both.figure(name).layout.title.text
    assert "induction" in both.figure("changes", score="induction").layout.title.text
    with pytest.raises(BadInput, match="no score 'x'"):
        both.figure("changes", score="x")
    with pytest.raises(BadInput, match="pairs 0 to 0"):
        both.figure("matches", pair=3)


def test_from_the_shell(run, folder, tmp_path):
    """Two reports of the hand-built checkpoint, compared; its weights with themselves."""
    paths: list[Path] = []
    for seed in (0, 1):
        paths.append(tmp_path / f"report-{seed}")
        heads_of(Model(induction_model(), character_tokenizer(), "m"), seed=seed).save(paths[-1])
    code, out, err = run("compare", *paths, "--pairs", "next", "--out", tmp_path / "both")
    assert code == 0, err
    loaded = Report.load(tmp_path / "both")
    assert loaded.analysis == "compare" and "m, seed 0" in out
    code, out, err = run(
        "compare-weights", folder, folder, "--prompts", "0", "--out", tmp_path / "w"
    )
    assert code == 0, err
    assert not Report.load(tmp_path / "w").table["weights_changed"].any()
    code, _, err = run("compare", paths[0], "--out", tmp_path / "one")
    assert code == 2 and "at least two" in err


@pytest.mark.slow
def test_the_default_model_is_itself_on_other_prompts(smollm):
    """Most heads are matched, nearly all of those to themselves, and no head is reported as changed."""
    both = compare_reports([heads_of(smollm, prompts=4, tokens=64, seed=seed) for seed in (0, 1)])
    row = both.table.loc[0]
    assert row["share"] > 0.6 and row["same_place"] > 0.9
    assert row["changed_heads"] <= 0.02 * row["heads_a"]
