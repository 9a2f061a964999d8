"""Activation patching: identities, the plain engine, hooks written by hand, and the default model.

Tolerances: float32. `ROUNDING` is of the metric's size, for sums taken in another order; two engines
agree to `RELATIVE` of the largest change, and a wrong head, layer, position or sign is off by order one.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from circuits import patch_sweep, patching
from circuits.measure import measure
from circuits.patch_sweep import Place, Sweep, metric_gradients, replaced
from circuits.patching import SITES, patch
from circuits.tasks import as_pairs
from interp.data.pairs import Pairs
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.run.edits import Edit
from interp.run.resume import Checkpoint
from tests.families import FAMILIES
from tests.ground_truth.induction_model import (
    INDUCTION_HEAD,
    PREVIOUS_TOKEN_HEAD,
    character_tokenizer,
    induction_model,
)

ROUNDING, RELATIVE = 1e-5, 1e-4
LAST = torch.tensor([6])
COMPARED = [
    "llama",
    "gpt2",
    "gpt_neox",
    "gemma2",
    "olmo2",
    "mixtral",
    "gpt_bigcode",
    "granite",
    "opt",
    "qwen3_next",
    "deepseek_v3",
    "bert",
]


def random_pairs(n: int = 3) -> Pairs:
    """Two tokens of seven differ; "it" is the first of them."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(10, 97, (n, 7), generator=generator)
    corrupted = clean.clone()
    corrupted[:, [2, 4]] = torch.randint(10, 97, (n, 2), generator=generator)
    answers, wrong = list(range(20, 20 + n)), list(range(40, 40 + n))
    return Pairs.of(clean, corrupted, answers=answers, wrong=wrong, positions={"it": [2] * n})


@cache
def model_of(name: str) -> Model:
    return Model(FAMILIES[name](), id=name)


def table_of(model, pairs, **options):
    return patch(model, pairs, progress=False, **options).table


def close(got, wanted) -> bool:
    got, wanted = np.asarray(got, float), np.asarray(wanted, float)
    return bool(np.abs(got - wanted).max() <= RELATIVE * np.abs(wanted).max() + ROUNDING)


# --- the fast engine against plain ones --------------------------------------------------------


def test_at_least_eight_families_are_compared():
    assert len(COMPARED) >= 8


@pytest.mark.parametrize("name", COMPARED)
def test_fast_is_naive(name):
    model, pairs = model_of(name), random_pairs()
    compared = 0
    for site in SITES:
        if site in model.spec.refused:
            continue
        positions = None if site in ("z", "k", "mlp_write") else ["it", "5"]
        options = {"site": site, "positions": positions, "direction": "noise"}
        fast = table_of(model, pairs, **options)
        plain = table_of(model, pairs, naive=True, **options)
        assert close(fast["change"], plain["change"]), (site, positions)
        assert list(fast["position"]) == list(plain["position"])
        compared += int(fast["exact"].sum())
    assert compared > 50


@pytest.mark.parametrize("site", ["z", "v"])
def test_a_head_is_what_hooks_on_the_module_say(site):
    """Hugging Face's own modules with plain hooks: nothing of ours but the numbers compared."""
    module, pairs = FAMILIES["llama"](), random_pairs()
    module.set_attn_implementation("eager")
    layer, d_head = 1, 8
    attention = module.model.layers[layer].self_attn

    def metric(logits):
        rows = torch.arange(len(pairs))
        last = logits[:, -1]
        return last[rows, pairs.answers[:, 0]] - last[rows, pairs.wrong[:, 0]]

    @torch.no_grad()
    def seen(ids):
        kept = {}
        hooks = [
            attention.o_proj.register_forward_pre_hook(lambda m, a: kept.update(z=a[0].clone())),
            attention.v_proj.register_forward_hook(lambda m, a, out: kept.update(v=out.clone())),
        ]
        out = module(input_ids=ids, output_attentions=True, use_cache=False)
        for hook in hooks:
            hook.remove()
        return metric(out.logits), out.attentions[layer], kept["z"], kept["v"]

    base, pattern, _, _ = seen(pairs.corrupted)
    _, _, z, v = seen(pairs.clean)
    wanted = []
    for head in range(4):
        columns = slice(head * d_head, (head + 1) * d_head)
        if site == "v":  # two kv heads: query heads 0 and 1 read the first, 2 and 3 the second
            group = slice(head // 2 * d_head, (head // 2 + 1) * d_head)
            new = pattern[:, head] @ v[..., group]
        else:
            new = z[..., columns]

        def put(m, args, new=new, columns=columns):
            changed = args[0].clone()
            changed[..., columns] = new
            return (changed,)

        hook = attention.o_proj.register_forward_pre_hook(put)
        with torch.no_grad():
            wanted.append(float((metric(module(input_ids=pairs.corrupted).logits) - base).mean()))
        hook.remove()
    table = table_of(Model(FAMILIES["llama"]()), pairs, site=site)
    assert close(table.loc[table["layer"] == layer, "change"], wanted)


# --- identities --------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post"])
def test_the_whole_residual_stream_is_the_source_run(tiny, site, direction):
    pairs = random_pairs()
    found = measure(tiny, pairs)
    table = table_of(tiny, pairs, site=site, direction=direction, positions=["all"])
    source = found.clean if direction == "denoise" else found.corrupted
    assert close(table["value"], [float(source.mean())] * tiny.n_layers)
    assert close(table["normalised"], [float(direction == "denoise")] * tiny.n_layers)
    assert close(table["effect"], [1.0 if direction == "denoise" else -1.0] * tiny.n_layers)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "granite", "gpt_neox"])
def test_every_site_at_once_is_the_source_run(name):
    """Embedding, all heads' z, all MLPs: the clean logits come out of the corrupted prompt."""
    model, pairs = model_of(name), random_pairs()
    sites = ["embed", "z", "mlp_write"]
    clean = model.run(pairs.clean_batch, capture=sites)
    base = model.run(pairs.corrupted_batch, capture=["resid_pre"])
    edits = [Edit.patch(site, clean.cache.by_layer(site)) for site in sites]
    logits = model.replay(base, [edits], lambda run: run.logits)[0]
    assert close(logits, clean.logits)
    assert not close(base.logits, clean.logits)


def test_each_and_named_positions_agree(tiny):
    pairs = random_pairs()
    each = table_of(tiny, pairs, site="resid_pre").set_index(["layer", "position"])["change"]
    named = table_of(tiny, pairs, site="resid_pre", positions=["it", "end"])
    numbered = table_of(tiny, pairs, site="resid_pre", positions=[2, 6])
    assert numbered["change"].tolist() == named["change"].tolist()
    assert numbered["position"].tolist() == ["2", "6"] * tiny.n_layers
    for row in named.to_dict("records"):
        place = {"it": "2", "end": "6"}[row["position"]]
        assert row["change"] == pytest.approx(each[row["layer"], place], abs=ROUNDING)
    same = each[0]  # before layer 0, only the two tokens that differ matter
    assert same.abs().nlargest(2).index.tolist() in (["2", "4"], ["4", "2"])
    assert same.drop(["2", "4"]).abs().max() < ROUNDING


def test_places_where_the_prompts_agree_are_not_replayed(tiny, monkeypatch):
    """Before the first token that differs every activation is the base run's own."""
    clean, corrupted = [[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]], [[5, 6, 3, 8, 9], [9, 8, 2, 6, 5]]
    pairs = Pairs.of(clean, corrupted, answers=[3, 11], wrong=[4, 12])
    replayed = []
    replay = tiny.replay

    def counted(base, variants, *args, **options):
        replayed.append(len(variants))
        return replay(base, variants, *args, **options)

    monkeypatch.setattr(tiny, "replay", counted)
    table = patch(tiny, pairs, site="resid_pre", progress=False).table
    assert replayed == [1, 1, 3]  # the check that replay is exact, then layer by layer
    moved = [(0, "2"), (1, "2"), (1, "3"), (1, "4")]
    for row in table.to_dict("records"):
        assert (row["change"] != 0) == ((row["layer"], row["position"]) in moved)


def test_noise_is_denoise_of_the_pairs_exchanged(tiny):
    pairs = random_pairs()
    noise = table_of(tiny, pairs, direction="noise")
    swapped = table_of(tiny, pairs.swapped)
    assert close(noise["value"], -swapped["value"]) and close(noise["change"], -swapped["change"])


def test_replacing_all_that_makes_z_replaces_z(tiny):
    """In layer 0 nothing before it differs but the embedding: pattern and v together are z."""
    pairs = random_pairs()
    sweeps = {
        site: Sweep.of(tiny, pairs, site, "denoise", "patch", "logit_diff", ["all"], 0, False)
        for site in ("z", "pattern", "v")
    }
    base, clean = sweeps["z"].base, tiny.run(pairs.clean_batch, capture=["v", "pattern", "z"])
    both = [Edit.patch(f"{site}.0", clean.cache[f"{site}.0"]) for site in ("v", "pattern")]
    z = tiny.run(base.batch, capture=["z.0"], edits=both).cache["z.0"]
    assert torch.allclose(z, clean.cache["z.0"], atol=ROUNDING)
    one = sweeps["v"].replacements["all"].values[0]
    assert not torch.allclose(one, clean.cache["z.0"], atol=1e-3)
    assert torch.allclose(
        one, tiny.run(base.batch, capture=["z.0"], edits=both[:1]).cache["z.0"], atol=ROUNDING
    )


# --- what is put in ----------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["z", "mlp_write"])
@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_kinds_put_in_what_they_say(tiny, site, kind):
    pairs = random_pairs(4)
    source = tiny.run(pairs.corrupted_batch, capture=[site]).cache.by_layer(site)
    if kind == "resample":
        rows = [
            next(i for i in range(4) if torch.equal(source[1][i], x))
            for x in replaced(source, "resample", 5)[1]
        ]
        assert sorted(rows) == [0, 1, 2, 3] and all(i != row for i, row in enumerate(rows))
        new = source[1][rows]
    else:
        new = torch.zeros_like(source[1]) if kind == "zero" else sum(source[1]) / 4 + 0 * source[1]
    table = table_of(tiny, pairs, site=site, kind=kind, direction="noise", seed=5)
    found = measure(tiny, pairs)
    heads = [(1, 2)] if site == "z" else None
    edit = Edit.patch(site if heads else f"{site}.1", {1: new}, heads=heads)
    wanted = found(tiny.run(pairs.clean_batch, edits=[edit]).logits[:, -1])
    row = table[(table["layer"] == 1) & ((table["head"] == 2) if heads else True)].iloc[0]
    assert row["value"] == pytest.approx(float(wanted.mean()), abs=ROUNDING)
    assert row["change"] == pytest.approx(float((wanted - found.clean).mean()), abs=ROUNDING)
    spread = float((wanted - found.clean).std() / 2)
    assert row["se"] == pytest.approx(spread, abs=ROUNDING)


@pytest.mark.parametrize("metric", ["prob_diff", "kl", "loss"])
def test_metrics_run_from_corrupted_to_clean(tiny, metric):
    table = table_of(tiny, random_pairs(), site="resid_pre", metric=metric, positions=["all"])
    assert close(table["normalised"], [1.0] * tiny.n_layers)


# --- the first-order screen --------------------------------------------------------------------


def test_gradients_are_central_differences(tiny_model):
    model, pairs = tiny_model(), random_pairs()
    model.module.double()
    found = measure(model, pairs)
    gradients = metric_gradients(model, pairs.clean_batch, found, ["z", "resid_mid"])
    assert not model.module.model.norm.weight.grad
    generator = torch.Generator().manual_seed(0)
    for site in gradients:
        gradient = gradients[site][1]
        step = 1e-3 * torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        ends = [
            model.run(pairs.clean_batch, edits=[Edit.add(f"{site}.1", sign * step)])
            for sign in (1, -1)
        ]
        up, down = (found(run.logits[:, -1]) for run in ends)
        rise = (up - down) / 2
        # A row of the gradient is its own pair's; the metric reads float32 logits.
        assert torch.allclose(rise, (gradient * step).sum((1, *range(2, step.ndim))), atol=1e-6)


def test_estimates_are_exact_where_the_rest_is_linear(tiny):
    """Without a final norm, what the last layer writes at the end adds to the logits."""
    tiny.module.model.norm = nn.Identity()
    model, pairs = Model(tiny.module, id="no final norm"), random_pairs()
    for site in ("resid_post", "mlp_write"):
        table = table_of(model, pairs, site=site, positions=["end"], screen=True)
        last = table[table["layer"] == 1].iloc[0]
        assert last["exact"] and last["estimate"] == pytest.approx(last["change"], rel=1e-4)
        first = table[table["layer"] == 0].iloc[0]
        assert first["estimate"] != pytest.approx(first["change"], rel=1e-2)


def test_a_screen_says_which_rows_are_exact(tiny, monkeypatch):
    monkeypatch.setattr(patching, "CONFIRMED", 2.0)
    pairs = random_pairs()
    exact, screened = table_of(tiny, pairs), table_of(tiny, pairs, screen=True)
    sure = screened["exact"]
    assert 1 < sure.sum() < len(screened) and exact["exact"].all()
    assert close(screened.loc[sure, "change"], exact.loc[sure, "change"])
    guessed = screened[~sure]
    assert list(guessed["change"]) == list(guessed["estimate"]) and guessed["se"].isna().all()
    assert screened.loc[sure, "estimate"].abs().min() >= guessed["estimate"].abs().max()


def test_neurons_are_screened_and_the_largest_are_exact(tiny, monkeypatch):
    monkeypatch.setattr(patching, "CONFIRMED", 3.0)
    pairs = random_pairs()
    report = patch(tiny, pairs, site="mlp_post", positions=["end"], progress=False)
    table = report.table
    assert report.arrays["estimate"].shape == (2, 48) and len(table) == 2 * 48
    assert 2 <= table["exact"].sum() < 10
    clean = tiny.run(pairs.clean_batch, capture=["mlp_post"])
    found = measure(tiny, pairs)
    for row in table[table["exact"]].to_dict("records"):

        def put(x, seen, row=row):
            x = x.clone()
            x[:, -1, row["neuron"]] = clean.cache[f"mlp_post.{row['layer']}"][:, -1, row["neuron"]]
            return x

        run = tiny.run(pairs.corrupted_batch, edits=[Edit.apply(f"mlp_post.{row['layer']}", put)])
        assert row["value"] == pytest.approx(float(found(run.logits[:, -1]).mean()), abs=ROUNDING)


# --- long runs, failing models, bad input ------------------------------------------------------


def test_an_interrupted_sweep_resumes(tiny, tmp_path, monkeypatch):
    pairs, whole = random_pairs(), table_of(tiny, random_pairs())
    done: list[int] = []
    replayed = Sweep._replayed

    def stopping(self, places, advance):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(places[0].layer)
        return replayed(self, places, advance)

    monkeypatch.setattr(Sweep, "_replayed", stopping)
    with pytest.raises(KeyboardInterrupt):
        table_of(tiny, pairs, checkpoint=tmp_path / "units")
    assert done == [0]

    def counting(self, places, advance):
        done.append(places[0].layer)
        return replayed(self, places, advance)

    monkeypatch.setattr(Sweep, "_replayed", counting)
    again = table_of(tiny, pairs, checkpoint=tmp_path / "units", resume=True)
    assert done == [0, 1] and again.equals(whole)
    with pytest.raises(BadInput, match="cannot resume"):
        table_of(tiny, pairs.swapped, checkpoint=tmp_path / "units", resume=True)


def test_a_model_that_does_not_replay_is_run_plainly(tiny, monkeypatch):
    pairs = random_pairs()
    wanted = table_of(tiny, pairs)
    monkeypatch.setattr(patch_sweep, "_replay_error", lambda *args: 0.5)
    report = patch(tiny, pairs, progress=False)
    assert any("plain full forwards" in note for note in report.meta["notes"])
    assert report.meta["options"]["naive"] and close(report.table["change"], wanted["change"])


def test_a_replay_that_is_off_is_noticed(tiny, monkeypatch):
    pairs = random_pairs()
    base = tiny.run(pairs.clean_batch, capture=["resid_pre"], logits=LAST)
    assert patch_sweep._replay_error(tiny, base, pairs.end) == 0
    base.cache.put("resid_pre", 1, base.cache["resid_pre.1"] * 1.1)
    assert patch_sweep._replay_error(tiny, base, pairs.end) > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "resid_pst"}, "did you mean 'resid_post'"),
        ({"direction": "denoize"}, "did you mean 'denoise'"),
        ({"kind": "means"}, "did you mean 'mean'"),
        ({"metric": "logit_dif"}, "did you mean 'logit_diff'"),
        ({"positions": ["itt"]}, "did you mean 'it'"),
        ({"positions": ["7"]}, "no position"),
        ({"positions": []}, "positions is empty"),
        ({"screen": True, "metric": "kl", "direction": "noise"}, "gradient is 0"),
        ({"screen": True, "naive": True}, "leave out"),
    ],
)
def test_bad_options_are_told(tiny, options, message):
    with pytest.raises(BadInput, match=message):
        table_of(tiny, random_pairs(), **options)


def test_bad_tasks_and_models_are_told(tiny):
    with pytest.raises(BadInput, match="did you mean 'ioi'"):
        patching.check_options(task="iou")
    with pytest.raises(BadInput, match="at least two pairs"):
        table_of(tiny, random_pairs(1), kind="resample")
    with pytest.raises(Refused, match="no softmax attention"):
        table_of(model_of("mamba"), random_pairs())
    with pytest.raises(Refused, match="language-model head"):
        table_of(model_of("clip_text"), random_pairs())
    same = random_pairs()
    with pytest.raises(BadInput, match="changes nothing"):
        table_of(tiny, Pairs("x", same.clean, same.clean, same.answers, same.wrong))
    notes = [
        note
        for pairs in (random_pairs(), random_pairs().swapped)
        for note in patch(tiny, pairs, progress=False).meta["notes"]
    ]
    assert any("does not prefer the answer" in note for note in notes)


# --- figures -----------------------------------------------------------------------------------


def test_the_map_marks_what_is_not_exact(tiny, monkeypatch):
    monkeypatch.setattr(patching, "CONFIRMED", 2.0)
    pairs = random_pairs()
    heat = patch(tiny, pairs, screen=True, progress=False)
    drawn = heat.figure().data[0]
    table = heat.table
    for row in table.to_dict("records"):
        assert drawn.z[row["layer"]][row["head"]] == pytest.approx(row["effect"])
        assert drawn.text[row["layer"]][row["head"]] == ("" if row["exact"] else "·")
    assert drawn.zmax == -drawn.zmin == pytest.approx(table["effect"].abs().max())
    each = patch(tiny, pairs, site="resid_pre", progress=False).figure()
    assert len(each.layout.xaxis.ticktext) == 7 and each.layout.xaxis.ticktext[2] == "2 it"
    assert "each position alone" in each.layout.title.text
    assert "all positions" in heat.figure().layout.title.text
    two = patch(tiny, pairs, positions=["it", "end"], progress=False)
    assert two.figure(position="it").data[0].z[0][0] == pytest.approx(two.table["effect"].iloc[0])
    with pytest.raises(BadInput, match="did you mean 'end'"):
        two.figure(position="ends")
    neurons = patch(tiny, pairs, site="mlp_post", progress=False)
    assert len(neurons.figure().data[0].x) == 40


# --- known circuits ----------------------------------------------------------------------------


def test_the_hand_built_circuit_is_found():
    """Two of eight heads matter, each through the input it is built on; the MLPs do not."""
    model = Model(induction_model(), character_tokenizer(), id="induction")
    pairs = as_pairs(model, "induction", n=6)

    def heads(**options):
        table = table_of(model, pairs, direction="noise", **options)
        return {(r["layer"], r["head"]) for r in table.to_dict("records") if abs(r["effect"]) > 0.1}

    assert heads() == {PREVIOUS_TOKEN_HEAD, INDUCTION_HEAD}
    assert heads(site="k") == heads(site="pattern", positions=["end"]) == {INDUCTION_HEAD}
    assert heads(site="v") == {PREVIOUS_TOKEN_HEAD}
    assert heads(positions=["next"]) == {PREVIOUS_TOKEN_HEAD}
    assert heads(positions=["end"]) == {INDUCTION_HEAD}
    assert heads(site="q") == set()
    with pytest.raises(Refused, match="no layer"):  # MLPs that write nothing are not seen to write
        heads(site="mlp_write")


@pytest.fixture(scope="module")
def ioi(smollm):
    """Noising z on the reference's task; sixteen pairs of it are enough for the size of an effect."""
    pairs = as_pairs(smollm, "ioi", n=16)
    return Sweep.of(smollm, pairs, "z", "noise", "patch", "logit_diff", ["all"], 0, False)


def test_the_default_models_heads_have_the_reference_effects(ioi):
    """Other names than the reference's: within a quarter of the largest effect, order kept on top."""
    wanted = {(23, 3): -2.38, (20, 0): -1.37, (16, 0): -1.30, (29, 1): -1.21, (17, 4): -1.01}
    places = [Place(*head, "all") for head in wanted]
    values = ioi.exact(places, Checkpoint(), lambda done: None)
    changes = values.mean(1) - float(ioi.base_values.mean())
    np.testing.assert_allclose(changes, list(wanted.values()), atol=0.6)
    assert changes.argmin() == 0


def test_fast_is_naive_on_the_default_model(smollm):
    pairs = as_pairs(smollm, "ioi", n=2)
    for site, heads in (("z", [(23, 3), (5, 0)]), ("k", [(17, 4)])):
        places = [Place(*head, "all") for head in heads]
        fast, plain = (
            Sweep.of(smollm, pairs, site, "denoise", "patch", "logit_diff", ["all"], 0, naive)
            for naive in (False, True)
        )
        got = fast.exact(places, Checkpoint(), lambda done: None)
        wanted = plain.exact(places, Checkpoint(), lambda done: None)
        assert not fast.naive and plain.naive
        # Thirty layers deep: about thirty times the rounding of a logit of size twenty.
        np.testing.assert_allclose(got, wanted, atol=1e-4 * float(np.abs(wanted).max()) + 1e-4)
