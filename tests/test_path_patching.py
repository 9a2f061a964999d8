"""Path patching: against a forward written out by hand, against full forwards, and where the answer is known.

Tolerances: a change is a difference of two float32 logits three blocks deep, so beside 1e-4 of itself it
is off by float32 steps of the logits, which are a few times the largest change: `close` allows 2e-5 of
the largest. A wrong path, head or position is off by order one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import interp
from circuits import path_effects, path_screen
from circuits.columns import as_mask
from circuits.edges import edge_attribution
from circuits.graph import Receiver, Sender
from circuits.heads_alone import require_heads_alone
from circuits.ioi_roles import ioi_roles
from circuits.path_effects import Senders
from circuits.path_patching import both_runs, path_patch
from circuits.path_plain import plain_effect
from circuits.path_replay import PathReplay
from circuits.path_screen import Screen, screened_effects, z_gradients
from circuits.tasks import as_pairs
from interp.data.pairs import Pairs
from interp.direction import logit_direction
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.report import Report
from tests.families import FAMILIES
from tests.ground_truth.induction_model import character_tokenizer, induction_model
from tests.ground_truth.induction_pairs import induction_pairs

RECEIVERS = ["logits", "2.1.q", "2.3.k", "1.2.v", "2.0.v", "mlp.1", "mlp.2"]
FAST_FAMILIES = [
    "llama",
    "gpt2",
    "gpt_neox",
    "falcon",
    "gptj",
    "cohere",
    "olmo2",
    "gemma2",
    "gpt_oss",
    "deepseek_v3",
    "opt",
    "mistral",
]


def pairs_of(n: int = 3, length: int = 8) -> Pairs:
    """Random tokens, some of them changed; position "a" is not the same in every prompt."""
    generator = torch.Generator().manual_seed(3)
    clean = torch.randint(10, 97, (n, length), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 2:5] = torch.randint(10, 97, (n, 3), generator=generator)
    return Pairs.of(
        clean,
        corrupted,
        answers=[11] * n,
        wrong=[21] * n,
        positions={"a": [3 + i % 2 for i in range(n)]},
    )


def changes(report: Report) -> dict[tuple[str, str], float]:
    table = report.table
    return dict(
        zip(zip(table["sender"], table["receiver"], strict=True), table["change"], strict=True)
    )


def both(model: Model, pairs: Pairs, **options) -> tuple[np.ndarray, np.ndarray, Report]:
    """The same paths by the fast and the plain engine."""
    fast = path_patch(model, pairs, progress=False, **options)
    plain = changes(path_patch(model, pairs, naive=True, progress=False, **options))
    found = changes(fast)
    assert found.keys() == plain.keys()
    return np.array(list(found.values())), np.array([plain[path] for path in found]), fast


def close(found: np.ndarray, wanted: np.ndarray | list[float]) -> None:
    largest = np.abs(wanted).max()
    assert largest > 1e-3
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5 * largest)


# --- against a forward written out by hand ------------------------------------------------------


def llama_by_hand(
    module: nn.Module,
    ids: Tensor,
    *,
    z: dict[tuple[int, int], Tensor] | None = None,
    mlp: dict[int, Tensor] | None = None,
    reads: dict[tuple[str, int, int], Tensor] | None = None,
    at: Tensor | None = None,
) -> dict:
    """A Llama in plain arithmetic: every head's z, every MLP's write and any head's q, k, v can be given.

    `reads` replaces q, k or v of one *query* head at the positions `at` [n pos] only.
    """
    config, body = module.config, module.model
    length = ids.shape[1]
    d_head = config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    frequencies = 10000.0 ** (-torch.arange(0, d_head, 2) / d_head)
    angles = torch.cat([torch.arange(length)[:, None] * frequencies] * 2, dim=1)

    def norm(x, weight):
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def rotate(x):
        half = torch.cat([-x[..., d_head // 2 :], x[..., : d_head // 2]], -1)
        return x * angles.cos() + half * angles.sin()

    seen: dict = {}
    x = body.embed_tokens.weight[ids]
    for layer, block in enumerate(body.layers):
        attention, normed = block.self_attn, norm(x, block.input_layernorm.weight)
        out = torch.zeros_like(x)
        for head in range(config.num_attention_heads):
            rows, shared = (slice(i * d_head, (i + 1) * d_head) for i in (head, head // group))
            parts = {
                "q": rotate(normed @ attention.q_proj.weight[rows].T),
                "k": rotate(normed @ attention.k_proj.weight[shared].T),
                "v": normed @ attention.v_proj.weight[shared].T,
            }
            for part in "qkv":
                if reads and (part, layer, head) in reads:
                    new = reads[part, layer, head]
                    parts[part] = torch.where(at[..., None], new, parts[part])
                seen[part, layer, head] = parts[part]
            scores = parts["q"] @ parts["k"].transpose(1, 2) / d_head**0.5
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            made = scores.masked_fill(later, -torch.inf).softmax(-1) @ parts["v"]
            made = z[layer, head] if z and (layer, head) in z else made
            seen["z", layer, head] = made
            out = out + made @ attention.o_proj.weight[:, rows].T
        x = x + out
        normed = norm(x, block.post_attention_layernorm.weight)
        gated = nn.functional.silu(normed @ block.mlp.gate_proj.weight.T)
        write = (gated * (normed @ block.mlp.up_proj.weight.T)) @ block.mlp.down_proj.weight.T
        seen["mlp", layer] = write
        x = x + (mlp[layer] if mlp and layer in mlp else write)
    seen["logits"] = norm(x, body.norm.weight) @ module.lm_head.weight.T
    return seen


def effect_by_hand(
    module: nn.Module, pairs: Pairs, sender: str, receiver: str, at: Tensor, mlps: str
) -> float:
    """Wang et al.'s four steps, with the forward above."""

    def metric(seen: dict) -> Tensor:
        last = seen["logits"][:, -1]
        return (last.gather(1, pairs.answers) - last.gather(1, pairs.wrong)).mean()

    corrupted, clean = (llama_by_hand(module, ids) for ids in (pairs.corrupted, pairs.clean))
    z = {key[1:]: value for key, value in clean.items() if key[0] == "z"}
    writes = {layer: clean["mlp", layer] for layer in range(3)} if mlps == "frozen" else {}
    if sender.startswith("mlp"):
        layer = int(sender[4:])
        writes[layer] = corrupted["mlp", layer]
    else:
        place = tuple(map(int, sender.split(".")))
        z[place] = corrupted["z", *place]
    third = llama_by_hand(module, pairs.clean, z=z, mlp=writes)
    if receiver == "logits":
        fourth = third
    elif receiver.startswith("mlp"):
        layer = int(receiver[4:])
        heard = torch.where(at[..., None], third["mlp", layer], clean["mlp", layer])
        fourth = llama_by_hand(module, pairs.clean, mlp={layer: heard})
    else:
        layer, head, part = receiver.split(".")
        node = (part, int(layer), int(head))
        fourth = llama_by_hand(module, pairs.clean, reads={node: third[node]}, at=at)
    return float(metric(fourth) - metric(clean))


@pytest.mark.parametrize("mlps", ["recompute", "frozen"])
@torch.no_grad()
def test_both_engines_agree_with_a_forward_written_out_by_hand(mlps):
    module, pairs = FAMILIES["llama"](), pairs_of()
    model = Model(module, id="llama")
    logits = llama_by_hand(module, pairs.clean)["logits"]
    assert torch.allclose(logits, module(pairs.clean).logits, atol=1e-5)
    fast, plain, report = both(
        model,
        pairs,
        senders="0.1,1.3,mlp.0",
        receiver=RECEIVERS,
        positions="a",
        mlps=mlps,
    )
    at = as_mask([pairs.position("a")], len(pairs), pairs.length)
    by_hand = [effect_by_hand(module, pairs, *path, at, mlps) for path in changes(report)]
    close(plain, by_hand)
    close(fast, by_hand)


# --- fast against plain ----------------------------------------------------------------------------


@pytest.mark.parametrize("mlps", ["recompute", "frozen"])
@pytest.mark.parametrize("name", FAST_FAMILIES)
def test_the_fast_engine_agrees_with_full_forwards(name, mlps):
    model, pairs = Model(FAMILIES[name](), id=name), pairs_of()
    last = model.n_layers - 1
    receivers = [receiver.replace("2.", f"{last}.", 1) for receiver in RECEIVERS]
    fast, plain, report = both(
        model,
        pairs,
        senders=["0.0", "0.3", "1.1", "mlp.0", "mlp.1"],
        receiver=receivers,
        positions="a" if mlps == "frozen" else None,
        mlps=mlps,
    )
    assert report.meta["engine"] == "replay", report.meta["notes"]
    close(fast, plain)


@pytest.mark.parametrize("metric", ["prob_diff", "kl", "loss"])
def test_other_metrics(tiny, metric):
    fast, plain, report = both(tiny, pairs_of(), receiver=["logits", "1.0.q"], metric=metric)
    close(fast, plain)
    assert report.meta["unit"] in ("nats", "probability")


@pytest.mark.slow
def test_a_sample_of_paths_of_the_default_model(smollm):
    pairs = as_pairs(smollm, "ioi", n=4)
    for positions, receivers in (("end", ["logits", "23.0.q"]), ("S1+1", ["17.4.k", "20.0.v"])):
        fast, plain, report = both(
            smollm, pairs, senders="16.0,19.2,20.0,mlp.18", receiver=receivers, positions=positions
        )
        assert report.meta["engine"] == "replay"
        # thirty blocks deep, logits of size 20: a hundred float32 steps are 2e-4
        np.testing.assert_allclose(fast, plain, rtol=1e-4, atol=2e-4)
        assert np.abs(plain).max() > 0.1


def test_models_that_the_fast_engine_does_not_reproduce_fall_back_to_full_forwards():
    model = Model(FAMILIES["bert"](), id="bert")
    report = path_patch(
        model, pairs_of(), senders="0.1", receiver=["logits", "1.0.k"], progress=False
    )
    assert report.meta["engine"] == "plain" and "full forwards" in report.meta["notes"][-1]
    assert report.table["exact"].all() and (report.table["change"] != 0).all()
    with pytest.raises(Refused, match="mlp_write"):
        path_patch(model, pairs_of(), mlps="frozen", progress=False)


# --- where the answer is known ----------------------------------------------------------------------


def test_one_path_of_the_induction_model_is_not_zero():
    model = interp.load(induction_model(), tokenizer=character_tokenizer())
    for options in ({}, {"naive": True}, {"mlps": "frozen"}):
        report = path_patch(model, induction_pairs(4), receiver="all", progress=False, **options)
        assert len(report.table) == 48  # 4 heads × 4 heads × q, k, v
        moved = report.table[report.table["change"] != 0]
        assert moved[["sender", "receiver"]].to_numpy().tolist() == [["0.1", "1.2.k"]], options
        assert moved["change"].item() < -1 and moved["normalised"].item() < -0.1
    screen = path_patch(model, induction_pairs(4), receiver="all", confirm=0, progress=False).table
    assert screen["receiver"][0] == "1.2.k" and screen["change"][0] < -1
    assert screen["change"][1:].abs().max() < 1e-30


def linear_model() -> Model:
    """A GPT-2 in which everything is linear: no norms, no activation function, even attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32, n_layer=3, n_head=4, vocab_size=97, n_positions=64, activation_function="linear"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(0.2 * torch.randn_like(parameter))
            for block in module.transformer.h:
                block.attn.c_attn.weight[:, :64] = 0
                block.attn.c_attn.bias[:64] = 0
                block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
        module.transformer.ln_f = nn.Identity()
    return Model(module, id="linear")


def test_edges_sum_to_the_node_in_a_linear_model():
    model, pairs = linear_model(), pairs_of()
    sender = "0.2"
    receivers = ["logits", "mlp.0", "mlp.1", "mlp.2"]
    receivers += [
        f"{layer}.{head}.{part}" for layer in (1, 2) for head in range(4) for part in "qkv"
    ]
    report = path_patch(
        model, pairs, senders=sender, receiver=receivers, mlps="frozen", progress=False
    )
    assert report.meta["engine"] == "replay"
    found = changes(report)
    assert all(value == 0 for (_, name), value in found.items() if name[-1] in "qk")
    _, corrupted, measure = both_runs(model, pairs, "logit_diff", [])
    edit = interp.Edit.patch("z", corrupted.cache.by_layer("z"), heads=[(0, 2)])
    patched = model.run(pairs.clean_batch, edits=[edit]).logits[:, -1]
    node = float((measure(patched) - measure.clean).mean())
    assert abs(node) > 0.01
    assert sum(found.values()) == pytest.approx(node, rel=1e-4, abs=1e-5)
    # nothing bends on its way to the logits: the first-order screen is exact
    sweep = path_patch(model, pairs, receiver="all", mlps="frozen", progress=False).table
    np.testing.assert_allclose(sweep["screened"], sweep["change"], atol=1e-4)  # of logits of 25


@torch.no_grad()
def test_frozen_paths_to_the_logits_are_the_direct_attribution_of_the_difference():
    module = FAMILIES["llama"]()
    module.model.norm = nn.Identity()  # the final norm held too: nothing is left to answer
    model, pairs = Model(module, id="no final norm"), pairs_of()
    found = changes(path_patch(model, pairs, mlps="frozen", progress=False))
    capture = ["z", "resid_post.2"]
    clean, corrupted = (
        model.run(batch, capture) for batch in (pairs.clean_batch, pairs.corrupted_batch)
    )
    final = clean.cache["resid_post.2"][:, -1]
    direction = logit_direction(model, final, pairs.answers[:, 0], pairs.wrong[:, 0])
    for layer, head in model.spec.heads:
        delta = (corrupted.cache["z"] - clean.cache["z"])[:, -1, layer, head]
        attributed = ((delta @ model.W_O(layer)[head]) * direction.vector).sum(-1).mean()
        assert found[f"{layer}.{head}", "logits"] == pytest.approx(float(attributed), abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
@torch.no_grad()
def test_the_screen_is_exact_up_to_z(name):
    """Its numbers are Δz · ∂metric/∂z with Δz from full forwards, at positions that differ by prompt."""
    model, pairs = Model(FAMILIES[name](), id=name), pairs_of()
    senders = [Sender("head", 0, 1), Sender("head", 1, 2)]
    clean, corrupted, measure = both_runs(model, pairs, "logit_diff", [])
    replay = PathReplay(model, clean, measure)
    mask = as_mask([pairs.position("a")], len(pairs), pairs.length)
    with torch.enable_grad():
        gradient = z_gradients(replay)[2]
    sides = Senders(replay, corrupted, "frozen")
    (found,) = screened_effects(sides, senders, [Screen(sides, 2, mask, gradient)])

    def by_forwards(sender: Sender, part: str, head: int) -> float:
        held = [
            interp.Edit.patch(f"{site}.{layer}", clean.cache[f"{site}.{layer}"])
            for layer in (0, 1)
            for site in ("q", "k", "v", "mlp_write")
        ]
        place = f"z.{sender.layer}"
        patch = interp.Edit.patch(f"{place}.{sender.head}", corrupted.cache[place])
        heard = model.run(clean.batch, [f"{part}.2"], [*held, patch]).cache[f"{part}.2"]
        own = head if part == "q" else model.spec.kv_group(2, head)
        edit = interp.Edit.patch(f"{part}.2.{own}", heard, positions=mask)
        z = model.run(clean.batch, ["z.2"], [edit]).cache["z.2"]
        delta = (z - clean.cache["z.2"])[:, :, head]
        return float((delta * gradient[:, :, head]).sum() / len(pairs))

    for i, sender in enumerate(senders):
        for place, part in enumerate("qkv"):
            for head in (0, 3):
                wanted = by_forwards(sender, part, head)
                assert float(found[i, place, head]) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


# --- the report --------------------------------------------------------------------------------------


def test_a_sweep_screens_all_and_confirms_the_strongest(tiny):
    report = path_patch(tiny, pairs_of(), receiver="all", confirm=5, progress=False)
    table = report.table
    assert len(table) == 4 * 4 * 3 and table["exact"].sum() == 5 and table["exact"][:5].all()
    assert table["screened"].notna().all()
    kept, left = table["screened"][:5].abs(), table["screened"][5:].abs()
    assert kept.min() >= left.max()
    assert table["definition"].tolist() == ["recompute"] * 5 + ["frozen"] * 43
    assert report.meta["forwards"]["plain"] == 2 * 48 + 2
    exact = changes(path_patch(tiny, pairs_of(), receiver="1.2.k", progress=False))
    for row in table[table["exact"] & (table["receiver"] == "1.2.k")].to_dict("records"):
        assert row["change"] == pytest.approx(exact[row["sender"], "1.2.k"], rel=1e-4, abs=1e-6)


def test_normalised_is_a_share_of_the_way_to_the_corrupted_metric(tiny):
    report = path_patch(tiny, pairs_of(), progress=False)
    span = report.meta["clean"] - report.meta["corrupted"]
    np.testing.assert_allclose(report.table["normalised"] * span, report.table["change"], atol=1e-7)


def test_finished_units_are_not_made_again(tiny, tmp_path, monkeypatch):
    options = {"receiver": "all", "confirm": 6, "progress": False, "checkpoint": tmp_path / "units"}
    first = path_patch(tiny, pairs_of(), **options)

    def never(*args, **kwargs):
        raise AssertionError("made again")

    monkeypatch.setattr(path_effects, "_effects_at", never)
    monkeypatch.setattr(path_screen, "screened_effects", never)
    again = path_patch(tiny, pairs_of(), resume=True, **options)
    assert first.table.equals(again.table)
    with pytest.raises(BadInput, match="cannot resume"):
        path_patch(tiny, pairs_of(), resume=True, **{**options, "confirm": 7})


def test_the_model_is_as_it_was_when_a_block_fails(tiny, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny.blocks[1].mlp, "forward", fail)
    pairs = pairs_of()
    with pytest.raises(KeyboardInterrupt):
        path_patch(tiny, pairs, progress=False)
    monkeypatch.undo()
    for module in tiny.module.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_bad_input(tiny):
    pairs = pairs_of()
    for options, message in (
        ({"receiver": "1.2"}, "no receiver '1.2'"),
        ({"receiver": "1.9.q"}, "heads of layer 1 of tiny are 0 to 3"),
        ({"receiver": "mlp.2"}, "layers of tiny are 0 to 1"),
        ({"senders": "1.0.q"}, "no sender '1.0.q'"),
        ({"senders": "7.0"}, "layers of tiny are 0 to 1"),
        ({"senders": "1.0", "receiver": "1.2.k"}, "no path"),
        ({"mlps": "thawed"}, "definition"),
        ({"metric": "logits"}, "metric"),
        ({"positions": "b"}, "position"),
        ({"confirm": -1}, "confirm"),
    ):
        with pytest.raises(BadInput, match=message):
            path_patch(tiny, pairs, progress=False, **options)
    for name, reason in (("mamba", "no softmax attention"), ("lfm2", "no attention heads")):
        with pytest.raises(Refused, match=reason):
            path_patch(Model(FAMILIES[name](), id=name), pairs, progress=False)


def test_the_figure_offers_receivers_and_marks_what_was_screened(tiny):
    report = path_patch(tiny, pairs_of(), receiver="all", confirm=2, progress=False)
    figure = report.figure()
    assert [trace.visible for trace in figure.data].count(True) == 1
    assert len(figure.layout.updatemenus[0].buttons) == len(figure.data) == 12
    name = report.table["receiver"][0]
    one = report.figure(receiver=name)
    table = report.table[report.table["receiver"] == name]
    drawn = np.asarray(one.data[0].z, float)
    assert np.nansum(drawn) == pytest.approx(table["change"].sum())
    assert (np.asarray(one.data[0].text) == "·").sum() == (~table["exact"]).sum()
    with pytest.raises(BadInput, match="receiver"):
        report.figure(receiver="0.0.q")


def test_paths_into_the_mlp_of_a_block_come_from_its_heads_unless_parallel():
    pairs = pairs_of()
    for name, senders in (("llama", {"0.0", "1.0"}), ("gpt_neox", {"0.0"})):
        model = Model(FAMILIES[name](), id=name)
        report = path_patch(model, pairs, senders="0.0,1.0,2.0", receiver="mlp.1", progress=False)
        assert set(report.table["sender"]) == senders


@torch.no_grad()
def test_plain_effects_freeze_what_they_say(tiny):
    """With MLPs held, the input of a receiver is the clean one plus Δz W_O."""
    pairs = pairs_of()
    clean, corrupted, measure = both_runs(tiny, pairs, "logit_diff", [])
    path = Sender("head", 0, 1), Receiver("logits", 2)
    mask = as_mask([], len(pairs), pairs.length)
    found = plain_effect(tiny, clean, corrupted, measure, path, mask, "frozen")
    delta = (corrupted.cache["z.0"] - clean.cache["z.0"])[:, -1, 1] @ tiny.W_O(0)[1]
    logits = tiny.unembed(clean.cache["resid_post.1"][:, -1] + delta)
    assert torch.allclose(found, measure(logits) - measure.clean, atol=1e-5)


def test_16_bit_weights_take_the_fast_engine_too():
    model = Model(FAMILIES["llama"]().to(torch.bfloat16), id="llama")
    fast, plain, report = both(
        model, pairs_of(), senders="0.1,1.1", receiver=["logits", "2.1.q", "2.2.v"]
    )
    assert report.meta["engine"] == "replay", report.meta["notes"]
    # a bfloat16 logit of size 4 has steps of 0.03
    np.testing.assert_allclose(fast, plain, atol=0.05)


# --- roles --------------------------------------------------------------------------------------------


def test_the_head_that_copies_is_the_only_one_with_a_role():
    """In the hand-built model the induction head moves the answer to the end; no head tells it which."""
    model = interp.load(induction_model(), tokenizer=character_tokenizer())
    pairs = Pairs.of(
        [[2, 3, 4, 5, 6, 3]],
        [[2, 7, 4, 5, 6, 3]],
        answers=[4],
        wrong=[8],
        positions={"S1": [1], "S1+1": [2], "IO": [2], "S2": [5]},
    )
    report = ioi_roles(model, pairs, progress=False)
    found = report.table[["role", "layer", "head"]].to_numpy().tolist()
    assert found == [["name mover", 1, 2]]
    assert report.table["attention"].item() == pytest.approx(1.0)
    assert report.table["effect"].item() == pytest.approx(1.0, abs=0.01)
    assert report.figure().data[0].name == "name mover"
    assert any("no S-inhibition head" in note for note in report.meta["notes"])
    with pytest.raises(BadInput, match="min_effect"):
        ioi_roles(model, pairs, min_effect=2.0)
    with pytest.raises(BadInput, match="position"):
        ioi_roles(model, pairs_of(), progress=False)


def test_the_roles_of_the_default_model_are_those_found_independently(smollm):
    """The circuit of 32 IOI pairs was found before by other means: what that list has, has its role here.

    That list also names 17.5 (induction) and 9.2, 8.0, 5.6 (duplicate), whose shares lie under
    `min_effect` here.
    """
    report = ioi_roles(smollm, n=32, progress=False)
    found = {
        role: {f"{layer}.{head}" for layer, head in zip(table["layer"], table["head"], strict=True)}
        for role, table in report.table.groupby("role")
    }
    assert found["name mover"] == {"23.0", "23.1", "23.2", "23.7"}
    assert found["negative name mover"] == {"24.4"}
    assert "23.3" in found["subject suppressor"]
    assert found["S-inhibition"] == {"20.0", "19.2"}
    assert found["induction"] == {"17.4"}
    assert "8.1" in found["duplicate token"]
    assert found["previous token"] == {"16.0"}
    moved = report.table.set_index(["role", "layer", "head"])["attention"]
    # Found there: END → IO .67 by 23.0, END → S2 .80 by 20.0; other names, same template.
    assert moved["name mover", 23, 0] == pytest.approx(0.67, abs=0.05)
    assert moved["S-inhibition", 20, 0] == pytest.approx(0.80, abs=0.05)
    forwards = report.meta["forwards"]
    assert forwards["ours"] < forwards["plain"] / 50


def test_heads_that_read_the_stream_besides_are_refused(tiny: Model) -> None:
    """An indexer picks keys from the stream: with its q, k and v held, a head is not."""
    model = Model(FAMILIES["deepseek_v32"](), id="deepseek_v32")
    for naive in (False, True):
        with pytest.raises(Refused, match="by more than its q, k and v"):
            path_patch(model, pairs_of(), receiver="logits", naive=naive, progress=False)
        with pytest.raises(Refused, match="by more than its q, k and v"):
            edge_attribution(model, pairs_of(), method="eap", naive=naive, progress=False)
    require_heads_alone(tiny, "paths")


def test_an_indexer_is_seen_where_prompts_are_longer_than_what_it_picks() -> None:
    """With no more keys than it picks, it picks all: then q, k and v are all through which heads read."""
    module = FAMILIES["deepseek_v32"]()
    for part in module.modules():
        if hasattr(part, "index_topk"):
            part.index_topk = 12
    model, clean = Model(module, id="picks 12"), torch.arange(10, 30).repeat(2, 1)
    corrupted = clean.clone()
    corrupted[:, 3] = 50

    def of_length(n: int) -> Pairs:
        return Pairs.of(clean[:, :n], corrupted[:, :n], answers=[3, 5], wrong=[4, 6])

    for naive in (False, True):
        with pytest.raises(Refused, match=r"q, k and v .*on prompts of 20 tokens"):
            path_patch(model, of_length(20), receiver="logits", naive=naive, progress=False)
        with pytest.raises(Refused, match=r"q, k and v .*on prompts of 20 tokens"):
            edge_attribution(model, of_length(20), method="eap", naive=naive, progress=False)
    edge_attribution(model, of_length(12), method="eap", progress=False)
