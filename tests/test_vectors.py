"""Vectors that steer: planted directions, a planted task head, closed-form memories, and what is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from interp.data.contrasts import CONTRASTS, Contrast, contrast
from interp.data.two_hop import OTHER_WORDS, TWO_HOP
from interp.data.word_pairs import word_pairs
from interp.errors import BadInput, Refused
from interp.generate import generate
from interp.last_token import replay_last
from interp.models.model import Model
from interp.run.edits import Edit
from interp.run.resume import Checkpoint
from probes.vectors import task as learning
from probes.vectors.answers import answers_under
from probes.vectors.function import vector_function
from probes.vectors.heads import (
    best_heads,
    function_vector,
    head_writes,
    indirect_effects,
    last_means,
)
from probes.vectors.in_context import Asked, word_task
from probes.vectors.injection import injection, random_vectors
from probes.vectors.memory import first_token, memory_vector, two_hop_prompts, vector_inject
from probes.vectors.steering import contrast_of, steering_vector, vector_steer
from probes.vectors.task import learn_weights, task_vectors, vector_task
from tests.families import FAMILIES
from tests.ground_truth.task_model import (
    N_WORDS,
    PAIRS,
    PREVIOUS_TOKEN_HEAD,
    TASK_HEAD,
    letters,
    prompts,
    task_model,
)

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
ASKED = {"shots": 3, "prompts": 8, "template": "{source}", "progress": False}


@pytest.fixture(scope="module")
def planted() -> Model:
    return Model(task_model(), letters(), id="planted")


def asked(model: Model, n: int, *, right: bool, seed: int = 0) -> Asked:
    ids, answers = prompts(n, right=right, seed=seed)
    return Asked(model.as_batch(ids), answers)


def zero_shot(model: Model, words: range) -> Asked:
    ids = torch.tensor(words)[:, None]
    return Asked(model.as_batch(ids), ids[:, 0] + N_WORDS)


# --- injection ----------------------------------------------------------------------------------------


def planted_direction(model: Model, token: int) -> torch.Tensor:
    """What a token's logit reads of the final residual stream, the norm's scale aside."""
    return model.final_norm.gain * model.W_U[:, token]


def test_a_planted_direction_flips_the_answer_and_a_random_one_does_not(tiny):
    before = tiny.run(IDS).logits[:, -1].argmax(-1)
    vector = planted_direction(tiny, 50)
    vector = vector / vector.norm() * 60
    assert 50 not in before.tolist()
    edit = injection(tiny, vector, "resid_post.1")
    assert tiny.run(IDS, edits=[edit]).logits[:, -1].argmax(-1).tolist() == [50, 50]
    tiny.module.generation_config.eos_token_id = None
    assert generate(tiny, IDS, edits=[edit], max_new_tokens=3).ids.unique().tolist() == [50]
    away = injection(tiny, vector, "resid_post.1", strength=-1.0)
    lower, plain = (tiny.run(IDS, edits=e).logits[..., 50] for e in ([away], []))
    assert bool((lower < plain).all())
    for other in random_vectors(vector, 4, seed=3):
        assert float(other.norm()) == pytest.approx(60, rel=1e-5)
        logits = tiny.run(IDS, edits=[injection(tiny, other, "resid_post.1")]).logits[:, -1]
        assert 50 not in logits.argmax(-1).tolist()


def test_a_strength_of_zero_changes_no_bit(tiny):
    edit = injection(tiny, torch.randn(32), "resid_post.0", strength=0.0)
    assert torch.equal(tiny.run(IDS, edits=[edit]).logits, tiny.run(IDS).logits)


def test_positions_are_kept(tiny):
    vector = torch.ones(32)
    edit = injection(tiny, vector, "resid_pre.1", strength=2.0, positions=[2])
    moved = tiny.run(IDS, capture=["resid_pre.1"], edits=[edit]).cache["resid_pre.1"]
    plain = tiny.run(IDS, capture=["resid_pre.1"]).cache["resid_pre.1"]
    wanted = torch.zeros(2, 4, 32)
    wanted[:, 2] = 2.0
    torch.testing.assert_close(moved - plain, wanted)


@pytest.mark.parametrize(
    ("vector", "site", "message"),
    [
        (torch.ones(31), "resid_post.0", "d_model = 32"),
        (torch.ones(32) * torch.nan, "resid_post.0", "not finite"),
        (torch.ones(32), "resid_post", "names no layer"),
        (torch.ones(32), "resid_post.2", "its layers are 0 to 1"),
        (torch.ones(32), "z.0", "as wide as the residual stream"),
        (torch.ones(32), "resid_pst.0", "did you mean 'resid_post'"),
    ],
)
def test_bad_vectors_and_sites_are_told(tiny, vector, site, message):
    with pytest.raises(BadInput, match=message):
        injection(tiny, vector, site)


# --- steering -----------------------------------------------------------------------------------------


def test_a_steering_vector_is_the_difference_of_means(tiny):
    positive, negative = torch.tensor([[5, 6, 7], [8, 9, 3]]), torch.tensor([[1, 2, 4]])
    for read, pick in (("last", lambda x: x[:, -1]), ("mean", lambda x: x.mean(1))):
        x, y = (
            pick(tiny.run(ids, capture=["resid_post.0"]).cache["resid_post.0"])
            for ids in (positive, negative)
        )
        found = steering_vector(tiny, positive, negative, "resid_post.0", read=read)
        torch.testing.assert_close(found, x.mean(0) - y.mean(0), atol=1e-5, rtol=1e-5)


CASES = Contrast(
    "case",
    positive=("aA", "bB", "cC"),
    negative=("aB", "bC", "cA"),
    prompts=("d", "e", "f", "g"),
    towards=("D", "E", "F", "G"),
    away=("d", "e", "f", "g"),
    neutral=("hHi", "jJk"),
)
"""Pairs that are right against pairs that are wrong: in the planted model, the match feature."""


def test_steering_by_right_pairs_moves_words_and_random_vectors_do_not(planted):
    """At layer 0 the two kinds differ in the match feature, which the task head carries on."""
    report = vector_steer(
        planted, CASES, site="resid_post.0", strengths=(-1.0, 0.0, 1.0, 2.0), progress=False
    )
    table = report.table.set_index(["vector", "strength"])
    change = table["change"]
    assert abs(change["steering", 0.0]) < 1e-6 and abs(change["random", 0.0]) < 1e-6
    assert table.loc[("steering", 0.0), "kl_neutral"] < 1e-6  # float32, in batches of other sizes
    assert table.loc[("random", 2.0), "kl_neutral"] >= 0
    assert change["steering", 2.0] > 1.0 < change["steering", 1.0]
    assert change["steering", 2.0] > 3 * abs(change["random", 2.0])
    low, high = table.loc[("random", 2.0), ["log_odds_low", "log_odds_high"]]
    assert not low <= table.loc[("steering", 2.0), "log_odds"] <= high
    assert report.arrays["log_odds"].shape == (6, 4, 4)
    again = vector_steer(
        planted, CASES, site="resid_post.0", strengths=(-1.0, 0.0, 1.0, 2.0), progress=False
    )
    pd.testing.assert_frame_equal(report.table, again.table)


def test_each_dose_is_a_plain_run(planted):
    report = vector_steer(
        planted, CASES, site="resid_mid.1", strengths=(1.5,), positions="last", progress=False
    )
    vector = torch.from_numpy(report.arrays["vector"])
    for i, prompt in enumerate(CASES.prompts):
        edit = injection(planted, vector, "resid_mid.1", strength=1.5, positions=[0])
        p = planted.run(planted.tokenize(prompt), edits=[edit]).logits[0, -1].softmax(-1)
        towards, away = (
            p[[planted.token_id(word) for word in words]].sum()
            for words in (CASES.towards, CASES.away)
        )
        odds = report.arrays["log_odds"][0, 0, i]
        assert odds == pytest.approx(float((towards / away).log()), abs=1e-4)


def test_bad_contrasts_are_told(planted, tiny, tmp_path):
    strange = Contrast("x", ("a", "b"), ("c", "d"), ("e", "f"), ("zz",), ("D",), ("g",))
    for call, message in (
        (lambda: vector_steer(planted, strange), "none of 'zz' is one token"),
        (lambda: vector_steer(planted, CASES, strengths=[]), "finite numbers"),
        (lambda: vector_steer(planted, CASES, positions="first"), "no choice of positions"),
        (lambda: vector_steer(planted, CASES, random=1), "needs 2 or more"),
        (lambda: vector_steer(planted, CASES, site="resid_post.7"), "its layers are 0 to 1"),
        (lambda: vector_steer(tiny, CASES), "without a tokenizer"),
        (lambda: steering_vector(tiny, IDS, IDS[:0], "resid_post.0"), "no negative texts"),
        (lambda: steering_vector(tiny, IDS, IDS, "resid_post.0", read="first"), "no way to read"),
        (lambda: contrast("sentimant"), "did you mean 'sentiment'"),
        (lambda: contrast_of(tmp_path / "none.json"), "no file"),
        (lambda: Contrast("x", ("a", "b"), (), ("a", "b"), ("c",), ("d",)), "negative has 0"),
        (lambda: Contrast("x", ("a", "b"), ("c", "d"), ("e", "f"), ("g",), ("g",)), "in both"),
    ):
        with pytest.raises(BadInput, match=message):
            call()


def test_a_contrast_comes_from_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(
        '{"positive": ["a", "b"], "negative": ["c", "d"], "prompts": ["e", "f"], '
        '"towards": ["g"], "away": ["h"]}'
    )
    found = contrast_of(path)
    assert (found.name, found.positive, found.away) == ("mine", ("a", "b"), ("h",))
    path.write_text('{"positive": ["a", "b"]}')
    with pytest.raises(BadInput, match="has no 'negative'"):
        contrast_of(path)
    path.write_text("positive")
    with pytest.raises(BadInput, match="is not JSON"):
        contrast_of(path)


def test_shipped_contrasts_are_pairs_of_texts():
    for name in CONTRASTS:
        one = contrast(name)
        assert len(one.positive) == len(one.negative) >= 10
        assert not set(one.positive) & set(one.negative)


# --- function vectors ---------------------------------------------------------------------------------


def test_the_head_that_carries_the_task_is_first(planted):
    means = last_means(planted, asked(planted, 30, right=True).batch)["z"]
    mixed = asked(planted, 10, right=False, seed=1)
    effects = indirect_effects(planted, mixed, means)
    assert effects.shape == (10, 2, 4)
    aie = effects.mean(0)
    assert best_heads(aie, 1) == [TASK_HEAD] and aie[TASK_HEAD] > 0.9
    others = np.abs(np.delete(aie.flatten(), TASK_HEAD[0] * 4 + TASK_HEAD[1]))
    assert others.max() < 0.01
    # The control: means over prompts that do not tell the task bring nothing back.
    empty = last_means(planted, asked(planted, 30, right=False, seed=2).batch)["z"]
    assert np.abs(indirect_effects(planted, mixed, empty)).max() < 0.01


def test_effects_are_those_of_plain_runs(planted):
    means = last_means(planted, asked(planted, 5, right=True).batch)["z"]
    mixed = asked(planted, 4, right=False, seed=1)
    effects = indirect_effects(planted, mixed, means)
    rows = torch.arange(4)
    plain = planted.run(mixed.batch).logits[:, -1].softmax(-1)[rows, mixed.answers]
    for layer in range(2):
        for head in range(4):
            edit = Edit.patch(f"z.{layer}.{head}", means[layer], positions=[6])
            run = planted.run(mixed.batch, edits=[edit])
            patched = run.logits[:, -1].softmax(-1)[rows, mixed.answers]
            np.testing.assert_allclose(
                effects[:, layer, head], (patched - plain).numpy(), atol=1e-5
            )


def test_means_are_of_the_last_real_token(tiny):
    ids = torch.tensor([[0, 0, 5, 6], [9, 10, 11, 12]])
    batch = tiny.as_batch(
        {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1], [1] * 4])}
    )
    found = last_means(tiny, batch)
    for name in ("z", "resid_post"):
        alone = [
            tiny.run(row, capture=[name]).cache[f"{name}.1"][0, -1]
            for row in (torch.tensor([[5, 6]]), ids[1:])
        ]
        torch.testing.assert_close(found[name][1], sum(alone) / 2, atol=1e-5, rtol=1e-5)


def test_the_vector_is_what_the_heads_write(tiny):
    """Against the model: the mean of attn_write with all other heads at zero."""
    means = last_means(tiny, tiny.as_batch(IDS))["z"]
    heads = [(1, 0), (1, 3)]
    found = function_vector(tiny, means, heads)
    edit = Edit.zero("z", heads=[(1, 1), (1, 2)])
    wrote = tiny.run(IDS, capture=["attn_write.1"], edits=[edit]).cache["attn_write.1"]
    torch.testing.assert_close(found, wrote[:, -1].mean(0), atol=1e-5, rtol=1e-5)


def test_the_planted_vector_does_the_task_without_examples(planted):
    means = last_means(planted, asked(planted, 20, right=True).batch)["z"]
    vector = function_vector(planted, means, [TASK_HEAD])
    q = zero_shot(planted, range(N_WORDS))
    plain = planted.run(q.batch).logits[:, -1].argmax(-1)
    assert float((plain == q.answers).float().mean()) == 0
    edit = injection(planted, vector, "resid_post.0")
    assert torch.equal(planted.run(q.batch, edits=[edit]).logits[:, -1].argmax(-1), q.answers)
    written = generate(planted, ["c", "f"], edits=[edit], max_new_tokens=1)
    assert written.texts == ("C", "F")
    for other in random_vectors(vector, 5):
        edit = injection(planted, other, "resid_post.0")
        right = planted.run(q.batch, edits=[edit]).logits[:, -1].argmax(-1) == q.answers
        assert float(right.float().mean()) < 0.3


def test_the_analysis_finds_head_layer_and_accuracy(planted):
    report = vector_function(planted, {"upper": PAIRS}, mixed=4, heads=(1, 2), **ASKED)
    table = report.table.set_index("condition")
    assert table.loc["zero_shot", "accuracy"] == 0 and table.loc["in_context", "accuracy"] == 1
    row = table.loc["function_vector"]
    assert row["accuracy"] == 1 and row["layer"] == 0
    assert row["over_zero_shot"] == 1 and row["over_random_low"] > 0.5
    assert table.loc["random", "accuracy"] < 0.3 and table.loc["random", "draws"] == 5
    assert report.tables["heads"].loc[0, ["layer", "head"]].tolist() == list(TASK_HEAD)
    layers = report.tables["layers"]
    assert layers[layers["layer"] == 0]["accuracy"].max() == 1
    assert layers[layers["layer"] == 1]["accuracy"].max() == 0  # nothing reads the feature there
    assert report.arrays["vectors"].shape == (1, planted.spec.d_model)
    assert report.meta["options"]["tasks"] == {"upper": [8, 6, 6]}


def test_an_interrupted_analysis_goes_on_to_the_same(planted, tmp_path, monkeypatch):
    tasks = {"upper": PAIRS, "again": PAIRS[:15]}
    options = {"mixed": 3, "heads": (1,), "checkpoint": tmp_path / "kept", **ASKED}
    whole = vector_function(planted, tasks, **options | {"checkpoint": None})
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return indirect_effects(*args, **kwargs)

    monkeypatch.setattr("probes.vectors.function.indirect_effects", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vector_function(planted, tasks, **options)
    found = vector_function(planted, tasks, resume=True, **options)
    assert len(calls) == 3  # the first task's effects were kept
    for name in whole.tables:
        pd.testing.assert_frame_equal(whole.tables[name], found.tables[name])
    with pytest.raises(BadInput, match="made with mixed=3, now 4"):
        vector_function(planted, tasks, resume=True, **options | {"mixed": 4})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "capitel"}, "did you mean 'capital'"),
        ({"tasks": ""}, "no task is named"),
        ({"tasks": {"few": PAIRS[:9]}}, "has 9 of 9 pairs"),
        ({"shots": 9}, "shots=9: 'upper' has 8 training pairs"),
        ({"shots": 1}, "shots=1: wanted 2"),
        ({"layers": [5]}, "no layer 5"),
        ({"layers": []}, "layers is empty"),
        ({"heads": (99,)}, "heads=99: planted has 8"),
        ({"strengths": ()}, "strengths is empty"),
        ({"template": "Q: "}, "must contain {source}"),
        ({"random": 1}, "random=1: wanted 2"),
    ],
)
def test_bad_options_of_function_vectors_are_told(planted, options, message):
    given = {"tasks": {"upper": PAIRS}, **ASKED, **options}
    with pytest.raises(BadInput, match=message):
        vector_function(planted, given.pop("tasks"), **given)


def test_bad_heads_are_told(tiny):
    means = last_means(tiny, tiny.as_batch(IDS))["z"]
    with pytest.raises(BadInput, match=r"no head 1\.4"):
        function_vector(tiny, means, [(1, 4)])
    with pytest.raises(BadInput, match="at least one head"):
        function_vector(tiny, means, [])
    gemma = Model(FAMILIES["gemma2"]().eval(), id="gemma2")
    means = last_means(gemma, gemma.as_batch(IDS))["z"]
    with pytest.raises(Refused, match="a norm stands between"):
        function_vector(gemma, means, [(0, 1)])


# --- pairs --------------------------------------------------------------------------------------------


def test_parts_share_no_pair_and_shots_are_of_the_training_part(planted):
    task = word_task(planted, "upper", PAIRS, template="{source}")
    parts = [set(task.train), set(task.valid), set(task.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == N_WORDS
    for shuffled in (False, True):
        shown = task.in_context(planted, "test", shots=3, seed=1, shuffled=shuffled)
        held = {planted.token_id(pair.source) for pair in task.test}
        train = {planted.token_id(pair.source) for pair in task.train}
        assert shown.batch.ids.shape == (6, 7)
        assert set(shown.batch.ids[:, -1].tolist()) == held
        assert set(shown.batch.ids[:, 0:6:2].flatten().tolist()) <= train
        right = shown.batch.ids[:, 1:6:2] == shown.batch.ids[:, 0:6:2] + N_WORDS
        assert bool(right.all()) is not shuffled and bool(right.any()) is not shuffled
        assert torch.equal(shown.answers, shown.batch.ids[:, -1] + N_WORDS)
        again = task.in_context(planted, "test", shots=3, seed=1, shuffled=shuffled)
        assert torch.equal(shown.batch.ids, again.batch.ids)


def test_pairs_that_tokens_cannot_tell_apart_are_left_out(planted):
    twins = [("a", "AB"), ("b", "AC"), ("c", "cD"), ("d", "!")]
    task = word_task(planted, "mine", PAIRS[4:] + twins, template="{source}")
    kept = {*task.train, *task.valid, *task.test}
    assert len(kept) == 16 and not kept & set(map(tuple, twins))
    assert dict(task.left_out) == {
        "the target begins with the same token as another one": 2,
        "target and source begin with the same token": 1,
        "the tokenizer does not know the target": 1,
    }
    with pytest.raises(BadInput, match="without a tokenizer"):
        word_task(Model(task_model()), "mine", PAIRS, template="{source}")


# --- learned task vectors -----------------------------------------------------------------------------


def learned(model: Model, layer: int | None, **options):
    means = last_means(model, asked(model, 20, right=True).batch)["z"]
    writes = head_writes(model, means)
    train, valid = (zero_shot(model, words) for words in (range(12), range(12, 16)))
    return writes, learn_weights(
        model, train, valid, writes, layer=layer, **{"epochs": 6, "lr": 0.3, **options}
    )


def test_learned_weights_find_the_planted_head(planted):
    writes, (weights, curve) = learned(planted, 0)
    sizes = {(at, head): float((weights[at][head] * writes[at][head]).norm())
             for at in writes for head in range(4)}  # fmt: skip
    assert max(sizes, key=sizes.get) == TASK_HEAD
    assert float(weights[1][2]) > 0.5
    idle = [place for place in sizes if place not in (TASK_HEAD, PREVIOUS_TOKEN_HEAD)]
    assert all(sizes[place] == 0 for place in idle)
    assert curve["valid_loss"].iloc[-1] < 0.1 < curve["valid_loss"].iloc[0]
    q = zero_shot(planted, range(16, 20))
    edits = [Edit.add(f"resid_post.{at}", v) for at, v in task_vectors(writes, weights, 0).items()]
    assert torch.equal(planted.run(q.batch, edits=edits).logits[:, -1].argmax(-1), q.answers)


def test_the_gradient_is_that_of_a_whole_pass(planted, monkeypatch):
    """Read on from a cache, and by whole passes: the same weights."""
    _, (cached, _) = learned(planted, None, epochs=2)
    monkeypatch.setattr(learning, "read_prefix", lambda model, batch: None)
    _, (plain, _) = learned(planted, None, epochs=2)
    for layer in cached:
        torch.testing.assert_close(cached[layer], plain[layer], atol=1e-4, rtol=1e-4)


def test_the_gradient_is_that_of_a_whole_pass_on_longer_prompts(tiny, monkeypatch):
    means = last_means(tiny, tiny.as_batch(IDS))["z"]
    writes, data = head_writes(tiny, means), Asked(tiny.as_batch(IDS), torch.tensor([3, 4]))
    found = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(learning, "read_prefix", lambda model, batch: None)
        found.append(learn_weights(tiny, data, data, writes, epochs=2, batch_size=1)[0])
    for layer in (0, 1):
        torch.testing.assert_close(found[0][layer], found[1][layer], atol=1e-4, rtol=1e-4)
        assert float(found[0][layer].abs().min()) > 1e-3
    assert all(parameter.grad is None for parameter in tiny.module.parameters())


def test_learning_stops_early_and_keeps_the_best(planted):
    """Answers that cannot be learned: the loss on others rises, and the weights stay where it was lowest."""
    means = last_means(planted, asked(planted, 20, right=True).batch)["z"]
    writes = head_writes(planted, means)
    train, valid = zero_shot(planted, range(8)), zero_shot(planted, range(8, 16))
    wrong = Asked(train.batch, train.batch.ids[:, 0])
    right = Asked(valid.batch, valid.answers)
    weights, curve = learn_weights(
        planted, wrong, right, writes, layer=0, epochs=20, patience=2, lr=0.3
    )
    assert len(curve) < 12
    best = curve["valid_loss"].idxmin()
    assert len(curve) - 1 - best == 2
    if best == 0:
        assert all(float(w.abs().max()) == 0 for w in weights.values())


def test_interrupted_learning_goes_on_to_the_same_weights(planted, tmp_path):
    key = {"a": 1}
    _, (whole, curve) = learned(planted, 0, epochs=4)
    _, (part, _) = learned(planted, 0, epochs=2, kept=Checkpoint(tmp_path / "kept", key))
    steps = []
    kept = Checkpoint(tmp_path / "kept", key, resume=True)
    compute = kept.compute

    def counted(name, unit):
        return compute(name, lambda: steps.append(name) or unit())

    kept.compute = counted
    _, (found, again) = learned(planted, 0, epochs=4, kept=kept)
    assert steps == ["epoch.2", "epoch.3"]
    pd.testing.assert_frame_equal(curve, again)
    for layer in whole:
        assert torch.equal(whole[layer], found[layer])
        assert layer == 0 or not torch.equal(part[layer], found[layer])


def test_the_learning_analysis_beats_its_controls(planted):
    options = {"layer": 0, "epochs": 6, "lr": 0.3, **ASKED}
    report = vector_task(planted, {"upper": PAIRS}, **options)
    table = report.table.set_index("condition")
    assert table.loc["zero_shot", "accuracy"] == 0
    assert table.loc["task_vector", "accuracy"] == 1
    assert table.loc["mixed_up", "accuracy"] < 0.5 and table.loc["random", "accuracy"] < 0.3
    assert table.loc["task_vector", "over_random_low"] > 0.5
    assert report.tables["weights"].loc[0, ["layer", "head"]].tolist() == list(TASK_HEAD)
    again = vector_task(planted, {"upper": PAIRS}, **options)
    pd.testing.assert_frame_equal(report.table, again.table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "capital,past"}, "one task at a time"),
        ({"layer": 9}, "no layer 9"),
        ({"epochs": 0}, "epochs=0"),
        ({"lr": 0.0}, "lr=0"),
        ({"task": {"few": PAIRS[:5]}}, "wanted at least 13"),
    ],
)
def test_bad_options_of_learning_are_told(planted, options, message):
    given = {"task": {"upper": PAIRS}, **ASKED, **options}
    with pytest.raises(BadInput, match=message):
        vector_task(planted, given.pop("task"), **given)


# --- memories -----------------------------------------------------------------------------------------


@pytest.fixture
def open_ended(tiny_model) -> Model:
    """A tiny model whose last attention write goes straight to the logits: no final norm, no last MLP."""
    module = tiny_model().module
    module.model.norm = nn.Identity()
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight.mul_(1e-20)
    return Model(module, id="open-ended")


def test_a_memory_raises_its_tokens_logit_by_the_closed_form(open_ended):
    """logits ← logits + τ W_Uᵀ B, exactly so where nothing follows the write."""
    tokens, tau = [7, 40], 0.5
    B = memory_vector(open_ended, tokens)
    torch.testing.assert_close(B, open_ended.W_U[:, 7] + open_ended.W_U[:, 40])
    edit = injection(open_ended, B, "attn_write.1", strength=tau, positions=[3])
    moved = open_ended.run(IDS, edits=[edit]).logits - open_ended.run(IDS).logits
    wanted = tau * open_ended.W_U.T @ B
    torch.testing.assert_close(moved[:, -1], wanted.expand(2, -1), atol=2e-4, rtol=1e-4)
    assert float(moved[:, :-1].abs().max()) == 0
    assert float(wanted[7]) > 0 and float(wanted[40]) > 0


HOPS = [(prompt, prompt[-1], prompt[-1].upper()) for prompt in ("aAb", "bBcd", "cCe", "dDf", "eEg")]


def test_each_gain_is_that_of_a_plain_run(planted):
    report = vector_inject(
        planted, HOPS, strengths=(0.5, 2.0), others=list("klm"), template="{word}", progress=False
    )
    assert report.arrays["gain"].shape == (3, 2, 2, 5)
    table = report.table.set_index(["vector", "layer", "strength"])
    for at in (0, 1):
        for j, by in enumerate((0.5, 2.0)):
            gains = []
            for prompt, memory, answer in HOPS:
                ids = planted.tokenize(prompt)
                edit = injection(
                    planted,
                    memory_vector(planted, memory),
                    f"attn_write.{at}",
                    strength=by,
                    positions=[len(prompt) - 1],
                )
                token = planted.token_id(answer)
                logp = [
                    planted.run(ids, edits=e).logits[0, -1].log_softmax(-1)[token]
                    for e in ([], [edit])
                ]
                gains.append(float(logp[1] - logp[0]))
            np.testing.assert_allclose(report.arrays["gain"][0, at, j], gains, atol=1e-4)
            assert table.loc[("memory", at, by), "gain"] == pytest.approx(np.mean(gains), abs=1e-4)
    chosen = report.tables["chosen"]
    assert chosen["vector"].tolist() == ["memory", "other", "random"]
    assert chosen["prompts"].tolist() == [2, 2, 2]
    at, by = chosen.loc[0, ["layer", "strength"]]
    place = report.arrays["gain"][:, int(at), [0.5, 2.0].index(by)]
    np.testing.assert_allclose(chosen["same"], place[:, 1::2].mean(1), atol=1e-6)
    best = report.arrays["gain"][0][..., ::2].mean(-1)
    assert best[int(at), [0.5, 2.0].index(by)] == best.max()
    again = vector_inject(
        planted, HOPS, strengths=(0.5, 2.0), others=list("klm"), template="{word}", progress=False
    )
    pd.testing.assert_frame_equal(report.table, again.table)


def test_the_answer_itself_as_memory_gains_most(planted):
    """A memory that is the answer, at the last layer: its own logit rises, other words lower its share."""
    rows = [(prompt, "S", "S") for prompt, _, _ in HOPS]
    report = vector_inject(
        planted, rows, layers=[1], strengths=(1.0,), others=list("klm"), template="{word}",
        progress=False,
    )  # fmt: skip
    gain = report.table.set_index("vector")["gain"]
    assert gain["memory"] > 0.1 > gain["other"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": HOPS[:3]}, "3 two-hop prompts"),
        ({"prompts": [*HOPS, ("a", "", "A")]}, "prompt 5 has an empty"),
        ({"prompts": [*HOPS, ("a", "b", "!")]}, "does not know the answer"),
        ({"prompts": "two_hops"}, "no prompts 'two_hops'"),
        ({"layers": [4]}, "no layer 4"),
        ({"strengths": [float("inf")]}, "finite numbers"),
        ({"others": ["k"]}, "1 other words for 2"),
        ({"template": "word"}, "must contain {word}"),
        ({"random": 0}, "random=0"),
    ],
)
def test_bad_options_of_memories_are_told(planted, change, message):
    given = {"prompts": HOPS, "others": list("klm"), "template": "{word}", **change}
    with pytest.raises(BadInput, match=message):
        vector_inject(planted, given.pop("prompts"), progress=False, **given)


def test_bad_memories_and_files_are_told(tiny, tmp_path):
    with pytest.raises(BadInput, match="no tokens"):
        memory_vector(tiny, [])
    with pytest.raises(BadInput, match="outside the vocabulary"):
        memory_vector(tiny, [97])
    with pytest.raises(BadInput, match="give token ids"):
        memory_vector(tiny, "word")
    with pytest.raises(Refused, match="no language-model head"):
        memory_vector(Model(FAMILIES["clip_text"]().eval(), id="clip"), [3])
    path = tmp_path / "mine.csv"
    path.write_text("prompt,memory\na,b\n")
    with pytest.raises(BadInput, match="no column 'answer'"):
        two_hop_prompts(path)
    path.write_text("prompt,memory,answer\n" + "The a is,b,c\n" * 4)
    assert two_hop_prompts(path)[3].answer == "c"


def test_shipped_two_hop_prompts_do_not_say_their_memory():
    assert len(TWO_HOP) >= 20
    for row in TWO_HOP:
        words = row.prompt.lower()
        assert row.memory.lower() not in words and row.answer.lower() not in words.split()
        assert row.memory not in OTHER_WORDS and row.answer not in OTHER_WORDS
    assert len(set(TWO_HOP)) == len(TWO_HOP)


# --- the default model --------------------------------------------------------------------------------


def test_the_default_models_batched_patches_are_plain_runs(smollm):
    """Three heads patched in one forward, against one run each; and real pairs and prompts fit."""
    task = word_task(smollm, "antonym", word_pairs("antonym")[:60])
    mixed = task.in_context(smollm, "train", shots=3, n=2, shuffled=True)
    means = last_means(smollm, task.in_context(smollm, "train", shots=3, n=2).batch, ["z"])["z"]
    places = [(4, 1), (14, 2), (28, 8)]
    found = replay_last(
        smollm,
        mixed.batch,
        [[Edit.patch("z", means, heads=[place])] for place in places],
        lambda logits: logits.clone(),
    )
    end = mixed.batch.ids.shape[1] - 1
    for place, logits in zip(places, found, strict=True):
        edit = Edit.patch("z", means, heads=[place], positions=[end])
        whole = smollm.run(mixed.batch, edits=[edit], logits=torch.tensor([end])).logits[:, -1]
        # 30 layers of float32: about 1e-6 of the logits' size a layer.
        torch.testing.assert_close(logits, whole, atol=5e-3, rtol=1e-3)
    for row in TWO_HOP:
        first_token(smollm, row.prompt, row.answer)


TASK_HEADS = [
    (20, 5),
    (18, 6),
    (14, 1),
    (18, 7),
    (20, 6),
    (20, 0),
    (23, 3),
    (20, 3),
    (22, 5),
    (17, 5),
]
"""The heads of the default model with the largest indirect effect over four tasks (`vector_function`)."""


def test_function_vectors_do_three_tasks_of_the_default_model(smollm):
    """On held-out pairs, over no vector and over every random one of equal norm."""
    gains = {}
    for name in ("past", "plural", "gerund", "antonym"):
        task = word_task(smollm, name, most=67)
        shown = task.in_context(smollm, "train", shots=8, n=8)
        means = last_means(smollm, shown.batch, ["z"])["z"]
        vector = function_vector(smollm, means, TASK_HEADS)
        tried = [[], *([injection(smollm, v, "resid_post.14", strength=2.0)]
                       for v in (vector, *random_vectors(vector, 3)))]  # fmt: skip
        plain, found, *drawn = answers_under(smollm, task.zero_shot(smollm, "test"), tried)
        best = max(one.right.mean() for one in (plain, *drawn))
        gains[name] = float(found.right.mean() - best)
    # 20 pairs a task: 0.2 are four more right answers, where random vectors bring none.
    assert sum(gain >= 0.2 for gain in gains.values()) >= 3, gains
