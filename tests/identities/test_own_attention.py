"""Attention in a model's own code: seen and edited as where it goes through the attention interface."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.attention import Watch, implementation, window
from interp.models.model import Model
from interp.models.own_attention import own
from interp.models.probe import call_model, output_tensor
from interp.models.weights import linear_map
from interp.run.batch import Batch
from interp.run.edits import Edit
from tests.families import FAMILIES

OWN = ("gptj", "gpt_neo", "falcon", "bloom", "codegen")
IDS = torch.randint(10, 97, (2, 9), generator=torch.Generator().manual_seed(0))
EXACT = (
    1e-6  # the module's own functions on the same numbers; a change of kernel only in Falcon's SDPA
)

every = pytest.mark.parametrize("name", OWN)


def model_of(name: str) -> Model:
    return Model(FAMILIES[name](), id=name)


def logits_of(module: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return output_tensor(call_model(module, Batch.of_ids(ids)))


@every
def test_patterns_are_those_that_the_model_returns(name):
    model = model_of(name)
    with implementation(model.module, "eager"), torch.no_grad():
        wanted = model.module(IDS, output_attentions=True).attentions
    seen = model.run(IDS, capture=["pattern"]).cache
    for layer, pattern in enumerate(wanted):
        torch.testing.assert_close(seen[f"pattern.{layer}"], pattern, atol=EXACT, rtol=0)


@every
def test_what_is_seen_fits_together(name):
    """Rows sum to 1; pattern @ v is z; softmax(scores) is the pattern; z through W_O is the output."""
    model = model_of(name)
    cache = model.run(IDS, capture=["q", "k", "v", "scores", "pattern", "z", "attn_out"]).cache
    for layer in range(model.n_layers):
        pattern, z = cache[f"pattern.{layer}"], cache[f"z.{layer}"]
        torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
        torch.testing.assert_close(cache[f"scores.{layer}"].softmax(-1), pattern)
        groups = model.spec.n_heads // model.spec.n_kv_heads
        v = cache[f"v.{layer}"].repeat_interleave(groups, 2)
        made = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        torch.testing.assert_close(made, z, atol=EXACT, rtol=1e-5)
        W, b = linear_map(model.module.get_submodule(model.spec.blocks[layer].W_O), 32)
        out = z.flatten(2) @ W + b
        if name == "bloom":  # its `dense` is the projection alone: the residual is added after it
            assert model.spec.blocks[layer].attn_out.endswith("dense")
        torch.testing.assert_close(out, cache[f"attn_out.{layer}"], atol=EXACT, rtol=1e-5)


@every
def test_queries_times_keys_are_the_scores_where_nothing_is_hidden(name):
    """Up to a scale and, in BLOOM, ALiBi's slope: differences of neighbouring queries tell."""
    model = model_of(name)
    cache = model.run(IDS, capture=["q", "k", "scores"]).cache
    q, k, scores = (cache[f"{site}.1"] for site in ("q", "k", "scores"))
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    product = torch.einsum("bqhd,bkhd->bhqk", q, k)
    seen = (scores[:, :, 8, :8] - scores[:, :, 7, :8]).flatten()
    made = (product[:, :, 8, :8] - product[:, :, 7, :8]).flatten()
    if name == "gpt_neo":  # its second layer sees a window, wider than this prompt
        assert model.module.config.window_size > 9
    scale = float(seen @ made / (made @ made))
    torch.testing.assert_close(seen, scale * made, atol=1e-5, rtol=1e-4)
    assert scale == pytest.approx(1.0 if name == "gpt_neo" else 8**-0.5, rel=1e-4)


@every
def test_a_head_without_output_is_w_o_without_its_rows(name):
    model, layer, head = model_of(name), 1, 2
    edited = model.run(IDS, edits=[Edit.zero(f"z.{layer}.{head}")]).logits
    projection = model.module.get_submodule(model.spec.blocks[layer].W_O)
    with torch.no_grad():
        projection.weight[:, 8 * head : 8 * head + 8] = 0
    torch.testing.assert_close(edited, logits_of(model.module), atol=1e-5, rtol=1e-5)
    assert (edited - model_of(name).run(IDS).logits).abs().max() > 1e-3


@every
def test_edits_on_the_way_are_edits_of_what_follows(name):
    """An edit of q, k or v, of scores or of the pattern gives the z that its own equation gives."""
    model = model_of(name)
    cache = model.run(IDS, capture=["q", "k", "v", "scores", "pattern", "z"]).cache
    q, v, scores, pattern = (cache[f"{site}.1"] for site in ("q", "v", "scores", "pattern"))
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)

    def z_with(edit: Edit) -> Tensor:
        return model.run(IDS, capture=["z.1"], edits=[edit]).cache["z.1"]

    def mixed(weights: Tensor) -> Tensor:
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    near = {"atol": 1e-5, "rtol": 1e-4}
    even = torch.zeros_like(pattern) + 1 / 9
    torch.testing.assert_close(
        z_with(Edit.apply("pattern.1", lambda x, seen: even)), mixed(even), **near
    )
    torch.testing.assert_close(
        z_with(Edit.scale("scores.1", 0.5)), mixed((scores / 2).softmax(-1)), **near
    )
    torch.testing.assert_close(z_with(Edit.scale("v.1", 3.0)), 3 * cache["z.1"], **near)
    # Twice the queries and twice the keys are the same scores; without queries only what is added is left.
    twice, double = z_with(Edit.scale("q.1", 2.0)), z_with(Edit.scale("k.1", 2.0))
    torch.testing.assert_close(twice, double, **near)
    assert (twice - cache["z.1"]).abs().max() > 1e-3
    if name != "bloom":  # the rest is the mask alone
        mean = pattern.gt(0).float() / pattern.gt(0).float().sum(-1, keepdim=True)
        torch.testing.assert_close(z_with(Edit.zero("q.1")), mixed(mean), **near)


@every
def test_replayed_variants_and_padding_are_as_elsewhere(name):
    model = model_of(name)
    variants = [[Edit.zero(f"z.1.{head}")] for head in range(4)] + [[Edit.scale("q.1", 2.0)]]
    run = model.run(IDS, capture=["resid_pre"])
    found = model.replay(run, variants, lambda one: one.logits.clone())
    for variant, replayed in zip(variants, found, strict=True):
        whole = model.run(IDS, edits=variant).logits
        torch.testing.assert_close(replayed, whole, atol=1e-5, rtol=1e-5)
    left = Batch.of_ids(
        torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1),
        torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(IDS)], 1),
    )
    padded = model.run(left, capture=["pattern", "z"])
    alone = model.run(IDS, capture=["pattern", "z"])
    torch.testing.assert_close(padded.logits[:, 3:], alone.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        padded.cache["pattern.1"][:, :, 3:, 3:], alone.cache["pattern.1"], atol=1e-5, rtol=1e-4
    )


def test_ordinary_models_have_no_tape_and_others_none_outside_a_window():
    ordinary = model_of("llama")
    assert not any(module in own for module in ordinary.module.modules())
    model = model_of("gptj")
    attention = model.module.get_submodule(model.spec.blocks[0].attention)
    before = logits_of(model.module)
    with window(model.module, lambda module: Watch()):
        assert "forward" in vars(attention)
        assert torch.equal(logits_of(model.module), before)
    assert "forward" not in vars(attention)
    assert torch.equal(model.run(IDS, edits=[Edit.scale("z", 1.0)]).logits, before)


@pytest.mark.parametrize("stem", ["Deberta", "DebertaV2"])
def test_queries_and_keys_that_enter_the_scores_twice_are_changed_in_all(stem):
    """DeBERTa multiplies queries with keys and with positions, and keys with positions."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=97,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        initializer_range=0.2,
    )
    module = getattr(transformers, f"{stem}Model")(config).eval()
    model = Model(module, id=stem)
    assert not {"q", "k"} & set(model.spec.refused)
    with implementation(module, "eager"), torch.no_grad():
        wanted = module(IDS, output_attentions=True).attentions
    cache = model.run(IDS, capture=["q", "k", "pattern"]).cache
    torch.testing.assert_close(cache["pattern.1"], wanted[1], atol=EXACT, rtol=0)
    attention = module.get_submodule(model.spec.blocks[1].attention)
    before = logits_of(module)
    parts = {"q": "query_proj", "k": "key_proj"} if stem == "DebertaV2" else {"q": 0, "k": 1}
    for site, where in parts.items():
        edited = model.run(IDS, edits=[Edit.scale(f"{site}.1", 2.0)]).logits
        twice = copy.deepcopy(attention)
        with torch.no_grad():
            if isinstance(where, str):
                for parameter in getattr(twice, where).parameters():
                    parameter *= 2
            else:  # one layer makes q, k and v of each head after the other, and adds a bias to q
                twice.in_proj.weight.view(4, 3, 8, 32)[:, where] *= 2
                twice.q_bias *= 2 if site == "q" else 1
        module.encoder.layer[1].attention.self = twice
        torch.testing.assert_close(logits_of(module), edited, atol=1e-5, rtol=1e-5)
        assert (edited - before).abs().max() > 1e-2
        module.encoder.layer[1].attention.self = attention


@pytest.mark.parametrize("landmarks", [7, 1])
def test_what_is_added_to_z_in_place_is_not_z(landmarks):
    """Nyströmformer adds a convolution of the values; with few landmarks it has no one pattern."""
    config = transformers.NystromformerConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=97,
        num_landmarks=landmarks,
        segment_means_seq_len=7,
    )
    model = Model(transformers.NystromformerModel(config).eval(), id="nystromformer")
    if landmarks == 1:
        assert "attends 9 times" in model.spec.refused["pattern"]
        return
    assert model.spec.blocks[1].between == "function"  # W_O does not read z as it is
    cache = model.run(IDS[:, :7], capture=["pattern", "v", "z"]).cache
    made = torch.einsum("bhqk,bkhd->bqhd", cache["pattern.1"], cache["v.1"])
    torch.testing.assert_close(made, cache["z.1"], atol=EXACT, rtol=1e-5)


def test_an_attention_that_works_otherwise_than_on_the_probe_is_not_left_out_silently():
    model = model_of("gptj")
    attention = model.module.get_submodule(model.spec.blocks[1].attention)
    attention._attn = lambda q, k, v, mask: (v, None)
    with pytest.raises(Refused, match="did not attend as it did on the probe"):
        model.run(IDS, edits=[Edit.zero("z.1.0")])


@every
def test_gradients_are_those_of_small_changes(name):
    """Of the correct token's logit, with respect to a head's scores, its z and the layer's keys."""
    model = model_of(name)
    torch.manual_seed(0)
    sites = ["scores.1", "z.1", "k.1"]
    run = model.run(IDS, capture=sites, grad=True)
    target = run.logits[:, -1, 5].sum()
    for site in sites:
        step = torch.randn_like(run.cache[site]) * (run.cache[site].abs() < 1e3)
        slope = float((run.gradients(target, site) * step).sum())
        near = [model.run(IDS, edits=[Edit.add(site, by * step)]).logits for by in (-1e-2, 1e-2)]
        found = float(near[1][:, -1, 5].sum() - near[0][:, -1, 5].sum()) / 2e-2
        assert found == pytest.approx(slope, rel=2e-2, abs=2e-4)


def test_positions_are_told_row_by_row():
    """XLM takes position numbers only in the shape of its ids."""
    config = transformers.XLMConfig(
        vocab_size=97, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=32, pad_index=2
    )
    torch.manual_seed(0)
    model = Model(transformers.XLMModel(config).eval())
    run = model.run(IDS, capture=["pattern", "z"])
    torch.testing.assert_close(run.cache["pattern.0"].sum(-1), torch.ones(2, 4, 9))
    assert not model.spec.refused
