"""Retrieval and streaming heads: planted gates, the null, both attentions against plain ones, memory by count."""

import numpy as np
import pytest
import torch

import interp
from circuits.heads import gates
from circuits.heads.duo import duo_attention
from circuits.heads.gates import Units, final_states, gated, optimise_gates
from circuits.heads.passkeys import CUE, passkeys
from circuits.heads.streaming import (
    cache_bytes,
    far_mass,
    streaming_edits,
    streaming_keys,
    streaming_losses,
    token_bytes,
)
from interp.errors import BadInput, Refused
from interp.metrics import token_loss
from interp.models.load import weights_sha256
from interp.models.model import Model
from interp.report import Report
from interp.run.resume import Checkpoint
from tests.families import FAMILIES
from tests.ground_truth.induction_model import (
    INDUCTION_HEAD,
    PREVIOUS_TOKEN_HEAD,
    character_tokenizer,
    induction_model,
)

SMALL = {"length": 64, "keys": 2, "width": 6, "sink": 1, "recent": 8}
QUICK = {"prompts": 4, "held_out": 2, "points": 3, "progress": False}
TINY = SMALL | QUICK | {"steps": 12}


@pytest.fixture(scope="module")
def bare():
    """One head copies what followed its token last time, another looks one token back; the rest do nothing."""
    return interp.load(induction_model())


@pytest.fixture(scope="module")
def planted(bare) -> Report:
    return duo_attention(bare, **SMALL | QUICK, steps=20, learning_rate=0.15)


def by_head(report: Report):
    return report.tables["heads"].set_index(["layer", "head"])


# --- planted truth -----------------------------------------------------------------------------


def test_the_head_that_must_look_far_stays_open_and_every_other_closes(planted):
    for column in ("gate", "gate_again"):
        gate = by_head(planted)[column]
        assert gate[INDUCTION_HEAD] > 0.9
        assert gate.drop(INDUCTION_HEAD).max() < 0.05
    heads = by_head(planted)
    assert heads.index[heads["label"] == "retrieval"].tolist() == [INDUCTION_HEAD]
    assert planted.table["stable"].all()
    assert heads.loc[INDUCTION_HEAD, "far_mass"] > 0.9
    assert heads.loc[PREVIOUS_TOKEN_HEAD, "far_mass"] < 0.1


def test_where_nothing_far_is_needed_every_gate_closes(planted):
    assert by_head(planted)["gate_null"].max() < 0.05


def test_one_full_head_is_enough_and_only_the_right_one(planted):
    table = planted.tables["tradeoff"].set_index(["chosen_by", "draw", "full"])
    every, none = table.loc["any", 0, 8], table.loc["any", 0, 0]
    assert every["passkey_recall"] == 1 and none["passkey_recall"] < 0.2
    assert none["passkey_loss"] > every["passkey_loss"] + 1
    gate = table.loc["gate"].droplevel("draw")
    assert gate.index.min() == 1  # as many as are labelled
    assert (gate["passkey_loss"] - every["passkey_loss"]).abs().max() < 0.01
    told = planted.meta["duo"]["saving"]
    assert told["gate"]["full"] == 1 and told["gate"]["loss_increase"] < 0.01
    entries = 1 * 64 + 7 * (1 + 8)  # of 8 heads with 64 each
    assert told["gate"]["saved"] == pytest.approx(1 - entries / (8 * 64))


def test_closing_the_open_gate_costs_what_masking_the_head_costs(bare, planted):
    """The best choice but for the induction head is no better than none at all."""
    prompts = passkeys(bare, 4, **SMALL, seed=7)
    streams = torch.ones(3, 2, 4, dtype=torch.bool)
    streams[0], streams[1][INDUCTION_HEAD] = False, False
    losses, recall = streaming_losses(
        bare, prompts.ids, prompts.judged, list(streams), sink=1, recent=8
    )
    assert recall[:2].min() == 1 and recall[2].max() < 0.2
    # what the previous-token head loses beyond the window is under 1e-4 of its attention
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-3)
    assert (losses[2] > losses[0] + 1).all()


# --- prompts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [None, character_tokenizer()])
@pytest.mark.parametrize("near", [False, True])
def test_answers_stand_far_off_or_near_as_asked(tokenizer, near):
    model = interp.load(induction_model(), tokenizer=tokenizer)
    keys = 1 if tokenizer else 2
    form = SMALL | {"keys": keys, "recent": 12, "sink": 3}
    prompts = passkeys(model, 20, **form, near=near, seed=3)
    assert prompts.ids.shape == (20, 64)
    assert len(prompts.judged) == keys * (6 - CUE)
    assert torch.equal(prompts.ids.gather(1, prompts.sources), prompts.answers)
    back = prompts.judged - prompts.sources
    if near:
        assert back.max() < 12
    else:
        assert back.min() >= 12 and prompts.sources.min() >= 3
    if tokenizer is None:  # the tokens of a passkey stand in the text only where they are planted
        counts = (prompts.ids[:, :, None] == prompts.answers[:, None]).sum(1)
        assert (counts == 2).all()


def test_the_control_has_the_tokens_of_the_real_prompts(tiny):
    real, control = (passkeys(tiny, 3, **SMALL, near=near, seed=1) for near in (False, True))
    assert torch.equal(real.ids.sort(1).values, control.ids.sort(1).values)


# --- the two kinds of attention ----------------------------------------------------------------


def plain_streaming(scores: torch.Tensor, sink: int, recent: int) -> torch.Tensor:
    """Softmax over the visible keys alone, row by row, in float64."""
    out = torch.zeros_like(scores, dtype=torch.float64)
    length = scores.shape[-1]
    for q in range(length):
        visible = [k for k in range(q + 1) if k < sink or q - k < recent]
        out[:, :, q, visible] = scores[:, :, q, visible].double().softmax(-1)
    return out


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral", "gpt_neox"])
def test_streaming_attention_is_softmax_over_the_visible_keys(family):
    model = interp.load(FAMILIES[family]())
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    scores = model.run(ids, capture=["scores.0"]).cache["scores.0"]
    expected = plain_streaming(scores, 2, 5)
    units = Units.of_model(model)
    every = torch.ones(model.n_layers, model.spec.n_heads, dtype=torch.bool)
    runs = [
        model.run(ids, capture=["pattern.0"], edits=edits)
        for edits in ([gated(torch.zeros(len(units)), units, 2, 5)], streaming_edits(every, 2, 5))
    ]
    for run in runs:
        # float32 softmax over 20 keys, divided once more by the mass on 7 of them
        torch.testing.assert_close(run.cache["pattern.0"].double(), expected, atol=2e-6, rtol=1e-4)
    # three layers of float32
    torch.testing.assert_close(runs[0].logits, runs[1].logits, atol=2e-4, rtol=1e-4)


def test_a_sink_logit_takes_its_share_of_streaming_attention_too():
    model = interp.load(FAMILIES["gpt_oss"]())
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    units = Units.of_model(model)
    every = torch.ones(model.n_layers, model.spec.n_heads, dtype=torch.bool)
    mixed, masked = (
        model.run(ids, capture=["pattern.0"], edits=edits)
        for edits in ([gated(torch.zeros(len(units)), units, 2, 3)], streaming_edits(every, 2, 3))
    )
    assert masked.cache["pattern.0"].sum(-1).mean() < 0.95
    torch.testing.assert_close(
        mixed.cache["pattern.0"], masked.cache["pattern.0"], atol=2e-6, rtol=1e-4
    )


def test_open_gates_change_nothing_bit_for_bit(tiny):
    ids = passkeys(tiny, 2, **SMALL).ids
    units = Units.of_model(tiny)
    plain = tiny.run(ids, capture=["pattern"])  # patterns are formed here too, not SDPA
    opened = tiny.run(ids, capture=["pattern"], edits=[gated(torch.ones(4), units, 1, 8)])
    assert torch.equal(plain.logits, opened.logits)


def test_half_a_gate_is_the_mean_of_both_outputs(tiny):
    ids = passkeys(tiny, 2, **SMALL).ids
    units = Units.of_model(tiny)
    full, stream, half = (
        tiny.run(ids, capture=["z.0"], edits=[gated(torch.tensor(g), units, 1, 8)]).cache["z.0"]
        for g in ([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.5, 1.0, 0.0, 0.0])
    )
    # heads 0 and 1 read kv head 0; float32
    torch.testing.assert_close(half[:, :, :2], (full + stream)[:, :, :2] / 2, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(half[:, :, 2:], full[:, :, 2:], atol=1e-6, rtol=1e-5)
    assert (full - stream).abs().max() > 0.01


def test_the_gradient_of_a_gate_is_the_change_of_the_loss():
    """Central differences in float64 (GPT-2's LayerNorm keeps it; RMSNorm would go through float32)."""
    model = Model(FAMILIES["gpt2"]().double(), id="double")
    prompts = passkeys(model, 2, **SMALL)
    units = Units.of_model(model)
    target = final_states(model, prompts.ids, prompts.judged)

    def away(gates: torch.Tensor, grad: bool = False) -> torch.Tensor:
        edits = [gated(gates, units, 1, 8)]
        h = final_states(model, prompts.ids, prompts.judged, edits=edits, grad=grad)
        return (h - target).square().mean()

    at = torch.linspace(0.1, 0.9, len(units), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(away(at, grad=True), [at])
    for i in range(0, len(units), 3):
        step = torch.zeros(len(units), dtype=torch.float64)
        step[i] = 1e-4
        change = (away(at.detach() + step) - away(at.detach() - step)) / 2e-4
        # the third derivative times 1e-8
        assert float(gradient[i]) == pytest.approx(float(change), rel=1e-4, abs=1e-9)


def test_heads_that_stream_for_real_equal_a_plain_masked_forward():
    """transformers' own attention with a mask for each head, every layer alike."""
    module = FAMILIES["llama"]()
    model = interp.load(module)
    prompts = passkeys(model, 3, **SMALL)
    query = torch.arange(64)[:, None]
    key = torch.arange(64)
    causal = key <= query
    visible = causal & ((key < 1) | (key > query - 8))
    for heads in ([0, 1, 2, 3], [1, 2]):
        streams = torch.zeros(3, 4, dtype=torch.bool)
        streams[:, heads] = True
        mask = torch.stack([visible if head in heads else causal for head in range(4)])
        mask = torch.zeros(mask.shape).masked_fill(~mask, -1e9).expand(3, -1, -1, -1)
        with torch.no_grad():
            logits = module(prompts.ids, attention_mask=mask).logits[:, prompts.judged]
        expected = token_loss(logits, prompts.answers).mean(-1)
        hit = (logits.argmax(-1) == prompts.answers).float().mean(-1)
        losses, recall = streaming_losses(
            model, prompts.ids, prompts.judged, [streams], sink=1, recent=8
        )
        np.testing.assert_allclose(losses[0], expected, rtol=1e-4)  # three layers of float32
        np.testing.assert_array_equal(recall[0], hit)


def test_far_mass_is_the_pattern_outside_sink_and_window(tiny):
    prompts = passkeys(tiny, 3, **SMALL)
    pattern = tiny.run(prompts.ids, capture=["pattern"]).cache["pattern"]
    hidden = ~streaming_keys(0, 64, 64, 1, 8)
    expected = (pattern * hidden).sum(-1)[..., prompts.judged].mean((0, -1))
    np.testing.assert_allclose(far_mass(tiny, prompts, 1, 8), expected, atol=1e-6)


def test_left_padding_is_told(tiny):
    batch = interp.run.batch.Batch.of_ids(
        torch.tensor([[0, 5, 6], [4, 5, 6]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    )
    with pytest.raises(BadInput, match="padded on the left"):
        tiny.run(batch, edits=streaming_edits(torch.ones(2, 4, dtype=torch.bool), 1, 1))


# --- memory ------------------------------------------------------------------------------------


def test_cache_bytes_are_those_of_a_real_cache_and_of_entries_counted_one_by_one(tiny):
    sizes = token_bytes(tiny)
    per_token = np.array([sizes[place] for place in sorted(sizes)])
    with torch.no_grad():
        kept = tiny.module(torch.ones(1, 40, dtype=torch.long), use_cache=True).past_key_values
    real = sum(x.nbytes for layer in kept.layers for x in (layer.keys, layer.values))
    assert int(cache_bytes(per_token, np.ones(4, bool), 40, 2, 8)) == real
    full = np.array([True, False, False, True])
    one_query = streaming_keys(39, 1, 40, 2, 8)[0].sum().item()
    counted = sum(
        size * (40 if keeps else one_query) for size, keeps in zip(per_token, full, strict=True)
    )
    assert int(cache_bytes(per_token, full, 40, 2, 8)) == counted
    assert (
        int(cache_bytes(per_token, ~full, 5, 2, 8)) == 5 * per_token.sum()
    )  # nothing to forget yet


def test_a_kv_head_is_kept_while_any_of_its_heads_is_full(tiny):
    report = duo_attention(tiny, unit="head", **TINY, context=100)
    assert len(report.table) == 8 and len(report.tables["heads"]) == 8
    table = report.tables["tradeoff"]
    size = 16 * 4  # bytes of k and v of one token
    for row in table[table["full"] == 2].itertuples():
        assert row.cache_bytes in (size * (2 * 100 + 2 * 9), size * (100 + 3 * 9))
    by_gate = table[(table["chosen_by"] == "gate") & (table["full"] == 2)].iloc[0]
    first = report.table.assign(far=-report.table["far_mass"], close=-report.table["gate"])
    first = first.sort_values(["close", "far"]).head(2)
    groups = first.groupby(["layer", "kv_head"]).ngroups
    assert by_gate["cache_bytes"] == size * (groups * 100 + (4 - groups) * 9)


# --- the optimisation --------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_gates_and_leaves_the_model_alone(tiny):
    before = weights_sha256(tiny.module)
    first, again = (duo_attention(tiny, **TINY) for _ in range(2))
    for name in first.tables:
        assert first.tables[name].equals(again.tables[name]), name
    assert weights_sha256(tiny.module) == before
    assert all(p.requires_grad and p.grad is None for p in tiny.module.parameters())
    assert first.table["gate"].between(0, 1).all()
    assert len(first.tables["training"]) == 3 * 12


def test_an_interrupted_call_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch):
    whole = duo_attention(tiny, **TINY)
    calls, plain = [], gates.final_states

    def counted(*args, **options):
        if options.get("grad"):
            calls.append(1)
            if len(calls) == 18:  # in the second job, past its first five steps
                raise KeyboardInterrupt
        return plain(*args, **options)

    monkeypatch.setattr(gates, "final_states", counted)
    with pytest.raises(KeyboardInterrupt):
        duo_attention(tiny, **TINY, checkpoint=tmp_path / "units")
    calls.clear()
    monkeypatch.setattr(
        gates, "final_states", lambda *a, **o: calls.append(o.get("grad")) or plain(*a, **o)
    )
    again = duo_attention(tiny, **TINY, checkpoint=tmp_path / "units", resume=True)
    assert (
        sum(map(bool, calls)) == 19
    )  # neither the first job nor the second one's first five steps are made again
    for name in whole.tables:
        assert whole.tables[name].equals(again.tables[name]), name


def test_moments_are_kept_within_a_job(tiny, tmp_path):
    """A job resumed after its first steps equals the same job in one go."""
    prompts, units = passkeys(tiny, 4, **SMALL), Units.of_model(tiny)
    options = {"sink": 1, "recent": 8, "steps": 14, "seed": 5}
    whole = optimise_gates(tiny, prompts, units, **options)
    kept = Checkpoint(tmp_path / "units", {})
    optimise_gates(tiny, prompts, units, **options, checkpoint=kept)
    newest = max(
        (tmp_path / "units").glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns
    )
    newest.unlink()
    again = optimise_gates(tiny, prompts, units, **options, checkpoint=kept)
    np.testing.assert_array_equal(whole.value, again.value)
    np.testing.assert_array_equal(whole.curve, again.curve)


def test_a_dearer_gate_is_opened_less(tiny):
    prompts, units = passkeys(tiny, 4, **SMALL), Units.of_model(tiny)
    means = [
        optimise_gates(
            tiny, prompts, units, sink=1, recent=8, steps=30, learning_rate=0.1, weight=weight
        ).value.mean()
        for weight in (1e-6, 10.0)
    ]
    assert means[0] > means[1] + 0.3 and means[1] < 0.01


def test_the_report_comes_back_and_is_drawn(planted, tmp_path):
    loaded = Report.load(planted.save(tmp_path))
    for name in ("gates", "tradeoff"):
        assert loaded.figure(name).to_json()
    cells = planted.figure("gates").data[0]
    assert cells.z[INDUCTION_HEAD] > 0.9 and cells.text[INDUCTION_HEAD] == "R"
    assert any("1 of 8 gates" in note for note in planted.meta["notes"])


def test_prose_is_judged_too_where_there_is_a_tokenizer(run, folder, tmp_path):
    """The command line, on the hand-built model on disk."""
    form = ["--length", 64, "--keys", 1, "--width", 6, "--sink", 1, "--recent", 16]
    quick = ["--prompts", 2, "--steps", 2, "--held-out", 1, "--points", 2]
    code, out, _ = run("duo-attention", folder, *form, *quick, "--out", tmp_path / "report")
    assert code == 0 and "null" in out.split("\n")[1]
    report = Report.load(tmp_path / "report")
    assert report.tables["tradeoff"]["text_loss"].notna().all()
    assert report.meta["duo"]["context"] == 64
    page = report.to_html()
    assert "prose, full heads by gate" in page


def test_one_layer_is_enough(tiny_model):
    report = duo_attention(tiny_model(num_hidden_layers=1), **TINY)
    assert len(report.table) == 2


# --- the default model -------------------------------------------------------------------------


def test_the_strongest_retrieval_head_of_the_default_model_stays_open(smollm):
    """L18H6 copies far-off tokens (retrieval score 0.77); it reads kv head 2 of its layer."""
    prompts, units = passkeys(smollm, 2, seed=11), Units.of_model(smollm)
    wanted, neighbour = units.kv_heads.index((18, 2)), units.kv_heads.index((18, 1))
    plain = final_states(smollm, prompts.ids, prompts.judged)
    away = []
    for closed in (wanted, neighbour):
        gates = torch.ones(len(units))
        gates[closed] = 0
        edits = [gated(gates, units, 4, 16)]
        h = final_states(smollm, prompts.ids, prompts.judged, edits=edits)
        away.append(float((h - plain).square().mean() / plain.square().mean()))
    assert away[0] > 0.05 and away[0] > 100 * away[1]
    found = optimise_gates(smollm, prompts, units, steps=8, learning_rate=0.2).value
    assert found[wanted] > 0.8, found
    assert found[wanted] > np.median(found) + 0.3 and found[wanted] >= np.quantile(found, 0.8), (
        found
    )


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"unit": "kvs"}, "did you mean 'kv'"),
        ({"steps": 0}, "at least 1"),
        ({"width": 2}, "at least 3"),
        ({"weight": 0}, "above 0"),
        ({"threshold": 1.0}, "between 0 and 1"),
        ({"max_loss_increase": -1.0}, "0 or more"),
        ({"sink": 32, "recent": 32}, "would miss nothing"),
        ({"length": 256}, "reads at most 64 tokens"),
        ({"recent": 50}, "give length="),
        ({"recent": 6}, "recent=7 or more"),
        ({"keys": 20, "width": 5, "length": 64}, "give length="),
    ],
)
def test_bad_options_are_told(tiny, options, told):
    with pytest.raises(BadInput, match=told):
        duo_attention(tiny, **TINY | options)


def test_the_length_that_an_error_asks_for_is_enough(tiny_model):
    model = tiny_model(max_position_embeddings=99)
    with pytest.raises(BadInput, match="give length=69 or more"):
        passkeys(model, 1, **SMALL | {"keys": 5, "length": 64})
    assert passkeys(model, 1, **SMALL | {"keys": 5, "length": 69}).ids.shape == (1, 69)
    with pytest.raises(BadInput, match="give length=69 or more"):
        passkeys(model, 1, **SMALL | {"keys": 5, "length": 68})


@pytest.mark.parametrize(
    ("text", "told"), [("the cat sat on the mat.", "longer text"), ("a b a b", "kinds of tokens")]
)
def test_a_text_too_short_is_told(hand_built, text, told):
    with pytest.raises(BadInput, match=told):
        passkeys(hand_built, 1, **SMALL | {"keys": 1, "recent": 12}, text=text)


def test_models_without_a_cache_or_a_seen_pattern_are_refused():
    with pytest.raises(Refused, match="both directions"):
        duo_attention(Model(FAMILIES["bert"](), id="bert"), **TINY)
    with pytest.raises(Refused, match="pattern"):
        duo_attention(Model(FAMILIES["mamba"](), id="mamba"), **TINY)
