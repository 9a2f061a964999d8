"""Linear probes: planted truth, equality with scikit-learn's own loop, controls, and what is refused.

Balanced accuracies of chance on the sets below (120 items or more) have a standard deviation of 0.05
or less, so that "at chance" is asserted as within 0.15 of it. Fits are compared in float64: 1e-8 is what
a Gram matrix of condition 1e6 leaves.
"""

from __future__ import annotations

import hashlib
import string

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

import interp
from interp.data.labelled import LabelledTexts, labelled_texts, of
from interp.errors import BadInput, Refused
from interp.report import Report
from probes import captured, linear
from probes.balanced import balanced_accuracy, group_interval
from probes.captured import capture_features, features_of, last_token_of
from probes.estimators import METHODS, estimator, linear_form
from probes.folds import Task, folds_by_group
from probes.held_features import without_rounding
from probes.linear import check_options, linear_probes
from probes.ridge_sweep import ridge_sweep
from tests.families import FAMILIES
from tests.ground_truth.induction_model import character_tokenizer

CHANCE = 0.15
"""How far from chance counts as chance (see above)."""


def model_of(family: str = "llama") -> interp.Model:
    return interp.load(FAMILIES[family](), tokenizer=character_tokenizer())


def words(n: int, seed: int = 0, low: int = 5, high: int = 10) -> list[str]:
    """Different random strings of letters."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < n:
        found["".join(rng.choice(list(string.ascii_lowercase), rng.integers(low, high)))] = None
    return list(found)


def coin(text: str) -> int:
    """A label that no part of a text tells."""
    return hashlib.sha256(text.encode()).digest()[0] % 2


@pytest.fixture(scope="module")
def coins() -> LabelledTexts:
    texts = words(160)
    return of(texts, ["heads" if coin(text) else "tails" for text in texts], name="coins")


PLANTED_AT = 1


@pytest.fixture(scope="module")
def planted():
    """A tiny Llama whose layer 1 adds ± a direction to every position, by the label of the text."""
    model = model_of()
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3))
    read: dict[str, torch.Tensor] = {}

    def see(module, args, kwargs):
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        real = torch.ones_like(ids) if mask is None else mask
        texts = [
            "".join(model.tokens(row[keep.bool()].tolist()))
            for row, keep in zip(ids, real, strict=True)
        ]
        read["sign"] = torch.tensor([2.0 * coin(text) - 1 for text in texts])

    def write(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        x = x + 2 * read["sign"][:, None, None] * direction
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handles = [
        model.module.register_forward_pre_hook(see, with_kwargs=True),
        model.blocks[PLANTED_AT].register_forward_hook(write),
    ]
    yield model, direction
    for handle in handles:
        handle.remove()


# --- planted truth --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_direction_is_found_from_its_layer_on(planted, coins, method):
    model, direction = planted
    options = {"alphas": [10.0]} if method == "logistic" else {}
    report = linear_probes(
        model, coins, sites="resid_pre.0,resid_post", method=method, progress=False, **options
    )
    table = report.table.set_index(["site", "layer"])
    for place in (("resid_pre", 0), ("resid_post", 0)):
        # folds that hold out a class's last examples push a probe that knows nothing below chance
        assert table.loc[place, "accuracy"] < 0.5 + CHANCE
        assert table.loc[place, "q"] > 0.05
    for layer in (PLANTED_AT, PLANTED_AT + 1):
        row = table.loc["resid_post", layer]
        assert row["accuracy"] > 0.95 and row["q"] < 1e-6
        assert row["low"] <= row["accuracy"] <= row["high"] and row["low"] > 0.9
        assert row["selectivity"] > 0.5 - CHANCE
    # every control, at every site: the weights of the random model know nothing of the hook
    for control in ("shuffled", "control", "random_model"):
        assert table[control].max() < 0.5 + CHANCE, control
    found = report.arrays[f"direction.resid_post.{PLANTED_AT}"][0]
    assert report.meta["classes"] == ["heads", "tails"]
    cosine = float(np.dot(found, direction) / np.linalg.norm(found) / direction.norm())
    # the second class is "tails", which is the minus side; only the difference of means is not
    # turned by the covariance of the rest
    assert cosine < (-0.95 if method == "mean_difference" else -0.3)


def test_the_best_sites_get_a_description_length(planted, coins):
    model, _ = planted
    report = linear_probes(model, coins, sites="resid_post", mdl=1, progress=False)
    (row,) = report.tables["mdl"].to_dict("records")
    assert (row["site"], row["position"], row["items"]) == ("resid_post", "last", len(coins))
    assert row["layer"] >= PLANTED_AT
    assert row["bits"] < row["uniform_bits"] / 2 and row["compression"] > 2
    # labels of no relation cost about what no knowledge costs
    assert 0.7 < row["shuffled"] < 1.2 and 0.7 < row["random_model"] < 1.2


def test_directions_are_the_probe_on_raw_activations(planted, coins):
    model, _ = planted
    report = linear_probes(
        model, coins, sites="resid_post.1", method="ridge", random_model=False, progress=False
    )
    x = capture_features(model, coins, "resid_post.1")["resid_post.1"]
    score = x @ report.arrays["direction.resid_post.1"].T + report.arrays["intercept.resid_post.1"]
    second = np.array([label == report.meta["classes"][1] for label in coins.labels])
    assert ((score[:, 0] > 0) == second).mean() > 0.97
    assert report.table["random_model"].isna().all()


def test_heads_are_probed_one_by_one(planted, coins):
    model, _ = planted
    report = linear_probes(model, coins, sites="z", random_model=False, progress=False)
    table = report.table
    assert list(zip(table["layer"], table["head"], strict=True)) == model.spec.heads
    # attention of layer 1 reads the stream before the plant, that of layer 2 behind it
    assert (table.loc[table["layer"] <= PLANTED_AT, "accuracy"] - 0.5).abs().max() < CHANCE
    assert table.loc[table["layer"] == 2, "accuracy"].max() > 0.9
    assert report.figure().data[0].z.shape == (3, 4)


# --- the sweep is scikit-learn's loop -------------------------------------------------------------


def problem(n: int, d: int, classes: int, sites: int = 3):
    """Features of very different sizes, one of them constant, and uneven classes."""
    rng = np.random.default_rng(n + d)
    x = rng.normal(size=(sites, n, d)) * rng.lognormal(size=d) * 3 + 5
    x[:, :, 2] = 4.0
    y = rng.choice(classes, size=(2, n), p=np.arange(1, classes + 1) / sum(range(classes + 1)))
    x[1, :, 0] += 8 * y[0]
    return x, y, rng.permutation(n) % 5


SHAPES = [(80, 7, 2), (60, 90, 2), (81, 7, 3), (60, 90, 4)]


@pytest.mark.parametrize(("n", "d", "classes"), SHAPES)
@pytest.mark.parametrize("alpha", [0.1, 10.0, 1000.0])
def test_a_sweep_equals_the_scikit_learn_loop(n, d, classes, alpha):
    x, y, folds = problem(n, d, classes)
    sweep = ridge_sweep(x, y, folds, alphas=[alpha], refit=True)
    assert (sweep.alpha == alpha).all()
    for site in range(len(x)):
        for row in range(len(y)):
            for fold in range(5):
                train, test = folds != fold, folds == fold
                plain = estimator("ridge", alpha).fit(x[site, train], y[row, train])
                scores = plain.decision_function(x[site, test])
                found = sweep.scores[site, row, test]
                np.testing.assert_allclose(found, scores.reshape(found.shape), atol=1e-8)
                assert (plain.predict(x[site, test]) == sweep.predicted[site, row, test]).all()
        direction, intercept = linear_form(estimator("ridge", alpha).fit(x[site], y[0]))
        np.testing.assert_allclose(sweep.directions[site], direction, atol=1e-8)
        np.testing.assert_allclose(sweep.intercepts[site], intercept, atol=1e-8)


@pytest.mark.parametrize(("n", "d", "classes"), SHAPES)
def test_the_strength_is_the_one_a_nested_loop_chooses(n, d, classes):
    x, y, folds = problem(n, d, classes)
    alphas = [1.0, 10.0, 100.0, 1000.0]
    sweep = ridge_sweep(x, y, folds, alphas=alphas)
    for site in range(len(x)):
        for fold in range(5):
            train = folds != fold
            scaled = StandardScaler().fit_transform(x[site, train])
            labels = y[0, train]
            weights = (len(labels) / (classes * np.bincount(labels, minlength=classes)))[labels]
            columns = np.arange(1 if classes == 2 else 0, classes)
            targets = 2.0 * (labels[:, None] == columns) - 1
            errors = []
            for alpha in alphas:
                error = 0.0
                for inner in {*range(5)} - {fold}:
                    kept, left = folds[train] != inner, folds[train] == inner
                    plain = Ridge(alpha).fit(scaled[kept], targets[kept], weights[kept])
                    missed = targets[left] - plain.predict(scaled[left]).reshape(
                        -1, targets.shape[1]
                    )
                    error += float((weights[left, None] * missed**2).sum())
                errors.append(error)
            assert sweep.alpha[site, fold] == alphas[int(np.argmin(errors))]
    assert len(np.unique(sweep.alpha)) > 1
    fixed = ridge_sweep(x, y, folds, alphas=alphas, given=sweep.alpha)
    np.testing.assert_array_equal(fixed.scores, sweep.scores)
    # a control gets the strength of the labels it is a control of
    alone = ridge_sweep(x, y[1:], folds, given=sweep.alpha)
    np.testing.assert_allclose(alone.scores[:, 0], sweep.scores[:, 1], atol=1e-8)


def test_chunks_of_sites_change_nothing(monkeypatch):
    x, y, folds = problem(80, 7, 2, sites=7)
    whole = ridge_sweep(x, y, folds)
    monkeypatch.setattr("probes.ridge_sweep.BYTES", 1 << 15)
    done: list[int] = []
    np.testing.assert_allclose(ridge_sweep(x, y, folds, advance=done.append).scores, whole.scores)
    assert sum(done) == 7 and len(done) > 2


def test_a_sweep_says_what_does_not_fit():
    x, y, folds = problem(60, 7, 2)
    for features, labels, held_out, alphas, told in (
        (x[0], y, folds, [1.0], "shape"),
        (x, y[:, 1:], folds, [1.0], "shape"),
        (x, np.zeros_like(y), folds, [1.0], "one class only"),
        (x, y, np.zeros_like(folds), [1.0], "two folds"),
        (x, y, 2 * folds, [1.0], "every number used"),
        (x, y, folds, [], "above 0"),
        (x, y, folds, [0.0], "above 0"),
        (x, y, folds % 2, [1.0, 10.0], "one fold only, of which none can be left out"),
        (np.repeat(x, 10, -1), y, folds % 2, [1.0, 10.0], "one fold only"),
    ):
        with pytest.raises(BadInput, match=told):
            ridge_sweep(features, labels, held_out, alphas=alphas)
    assert ridge_sweep(x, y, folds % 2, alphas=[1.0]).alpha.tolist() == [[1.0, 1.0]] * len(x)


@pytest.mark.parametrize("method", METHODS)
def test_accuracies_are_those_of_a_plain_loop(coins, method):
    """From texts to the table: by group, inside the fold, one estimator at a time."""
    model = model_of("gpt2")
    vowels = [min(2, sum(letter in "aeiou" for letter in text)) for text in coins.texts]
    data = of(coins.texts, vowels, groups=[text[0] for text in coins.texts])
    options = {"alphas": [10.0]} if method in ("ridge", "logistic") else {}
    report = linear_probes(
        model,
        data,
        sites="resid_post",
        method=method,
        random_model=False,
        progress=False,
        **options,
    )
    classes, y = np.unique(data.labels, return_inverse=True)
    folds = folds_by_group(y, data.groups, 5, 0)
    for group in set(data.groups):
        assert len(set(folds[np.array(data.groups) == group])) == 1
    for layer, x in enumerate(capture_features(model, data, "resid_post").values()):
        predicted = np.empty_like(y)
        for fold in range(5):
            train = folds != fold
            plain = estimator(method, 10.0, len(classes)).fit(x[train].astype(float), y[train])
            predicted[~train] = plain.predict(x[~train].astype(float))
        assert report.table["accuracy"][layer] == pytest.approx(balanced_accuracy(predicted, y))
        direction, intercept = linear_form(plain)
        score = x[~train] @ direction.T + intercept
        assert (score.argmax(1) == predicted[~train]).mean() > 0.99  # ties apart
    assert report.table["majority"].eq(1 / len(classes)).all()


# --- controls ----------------------------------------------------------------------------------------


def test_words_that_recur_are_memorised_by_the_control():
    """The embedding of a word tells the word, so a label drawn for each word is learned by heart."""
    letters = list("abcdefghijklmnop")
    texts, asked, labels = [], [], []
    for word in letters:
        for around in words(10, seed=ord(word), low=3, high=6):
            texts.append(f"{around.upper()} {word} end")
            asked.append(word)
            labels.append("ab"[letters.index(word) % 2])
    data = of(texts, labels, words=asked)
    report = linear_probes(
        model_of(), data, sites="embed", position="word", random_model=False, progress=False
    )
    row = report.table.iloc[0]
    assert row["control"] > 0.95
    # whole words are held out of the true task, and their letters do not tell their label
    assert row["accuracy"] < 0.75 and row["selectivity"] < -0.2
    assert not report.meta["notes"]


@pytest.mark.parametrize(
    ("asked", "groups", "keys"),
    [
        (["ab", "cd", "ab", "cd"], ["p", "q", "p", "q"], "words"),
        (["ab", "cd", "ef", "gh"], ["p", "q", "p", "q"], "groups"),
        (["ab", "cd", "ef", "gh"], ["p", "q", "r", "s"], "none"),
    ],
)
def test_the_control_is_of_what_recurs(asked, groups, keys):
    """Words if one occurs twice, else groups; and a note where neither does."""
    texts = [f"{i} {word}" for i, word in zip("xyzw", asked, strict=True)]
    task = Task.of(of(texts, [0, 1, 1, 0], groups, asked), 2, 0)
    assert bool(task.notes) == (keys == "none")
    if keys != "none":
        of_key = {"words": asked, "groups": groups}[keys]
        for key in set(of_key):
            items = [i for i, other in enumerate(of_key) if other == key]
            assert len(set(task.control[items])) == 1  # one label a key …
            assert len(set(task.control_folds[items])) == len(items)  # … seen and asked
    assert task.folds[0] == task.folds[2] or keys == "none"


def test_near_duplicates_of_a_group_do_not_leak():
    """Twenty-four texts, each four times with another first letter, with one random label each."""
    bases = words(24, seed=5, low=7, high=8)
    texts = [f"{start}{base}" for base in bases for start in "ABCD"]
    labels = [coin(base) for base in bases for _ in "ABCD"]
    groups = [base for base in bases for _ in "ABCD"]
    model = model_of()
    whole = {"sites": "embed", "position": "mean", "random_model": False, "progress": False}
    split = linear_probes(model, of(texts, labels), **whole).table["accuracy"][0]
    kept = linear_probes(model, of(texts, labels, groups), **whole)
    assert split > 0.9
    assert abs(kept.table["accuracy"][0] - 0.5) < 0.25  # 24 groups: a deviation of 0.1
    assert kept.table["q"][0] > 0.01


def test_the_interval_is_of_groups_not_of_items():
    rng = np.random.default_rng(0)
    labels, groups = np.arange(200) % 2, np.arange(200) // 10
    right = (rng.random((1, 20)) < 0.8).repeat(10, axis=1)
    low, high, error = group_interval(right, labels, groups)
    _, _, of_items = group_interval(right, labels, np.arange(200))
    mean = right.mean()
    assert low[0] < mean < high[0]
    # ten copies of a group are one trial
    assert error[0] == pytest.approx(np.sqrt(mean * (1 - mean) / 20), rel=0.1)
    assert of_items[0] == pytest.approx(np.sqrt(mean * (1 - mean) / 200), rel=0.1)


def test_the_same_seed_gives_the_same_report_and_another_other_folds(coins):
    options = {"sites": "resid_post.1", "progress": False}
    first, again = (linear_probes(model_of(), coins, **options) for _ in range(2))
    pd.testing.assert_frame_equal(first.table, again.table)
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])
    other = linear_probes(model_of(), coins, seed=1, **options)
    assert not other.table[["accuracy", "shuffled"]].equals(first.table[["accuracy", "shuffled"]])


# --- capture ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bert", "mixtral"])
def test_features_are_those_of_each_text_alone(family, monkeypatch):
    """Padded batches of several texts, and one plain run a text; 1e-4 of units: float32, 3 layers."""
    monkeypatch.setattr(captured, "TOKENS_PER_FORWARD", 40)
    model = model_of(family)
    texts = words(17, low=3, high=12)
    data = of(texts, [i % 2 for i in range(17)], words=texts)
    found = capture_features(
        model, data, ["resid_post", "z.1", "k.2.1", "embed"], positions="last,mean,-2,0"
    )
    assert found["z.1.2@mean"].dtype == np.float32
    for i, text in enumerate(texts):
        cache = model.run(text, capture=["resid_post", "z.1", "k.2", "embed"]).cache
        for key, x in found.items():
            site, place = key.split("@")
            one = cache[site][0].numpy()
            wanted = {"last": one[-1], "mean": one.mean(0), "-2": one[-2], "0": one[0]}[place]
            np.testing.assert_allclose(x[i], wanted, atol=1e-4, err_msg=key)


def test_only_what_is_needed_is_computed(coins):
    model = model_of()
    ran: list[str] = []
    handles = [
        model.module.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: ran.append(name)
        )
        for name in ("model.layers.1", "model.layers.2", "lm_head")
    ]
    capture_features(model, coins, "resid_post.0,z.1.0")
    for handle in handles:
        handle.remove()
    assert set(ran) <= {"model.layers.1"}


def test_the_word_is_its_last_occurrence():
    model = model_of()
    assert last_token_of(model, "an art, the art of part", "art") == 14
    data = of(["x ab yz", "ab then ab"], [0, 1], words=["ab", "ab"])
    found = capture_features(model, data, "resid_post.1", positions="word")["resid_post.1"]
    for x, text, at in zip(found, data.texts, (3, 9), strict=True):
        one = model.run(text, capture=["resid_post.1"]).cache["resid_post.1"][0, at]
        np.testing.assert_allclose(x, one.numpy(), atol=1e-4)
    model.tokenizer.clean_up_tokenization_spaces = False
    fast = model.tokenizer

    class Slow:  # a tokenizer that gives no offsets
        bos_token_id = None

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": fast(text)["input_ids"]}

    model.tokenizer = Slow()
    assert last_token_of(model, "an art, the art of part", "art") == 14


# --- what is refused, and when ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sites": "resid_pst"}, "did you mean 'resid_post'"),
        ({"sites": ""}, "no sites"),
        ({"sites": "pattern"}, "not a vector a token"),
        ({"sites": "resid_post.7"}, "layers 0–2"),
        ({"sites": "z.1.9"}, "heads are 0 to 3"),
        ({"method": "rigde"}, "did you mean 'ridge'"),
        ({"position": "lst"}, "no position 'lst'"),
        ({"position": "-1,-1"}, "each once"),
        ({"position": "-9"}, "position -9 is outside text"),
        ({"position": "word"}, "which word each text is asked about"),
        ({"folds": 1}, "at least 2"),
        ({"folds": 2}, "folds=2: outside of a fold there is one fold only"),
        ({"folds": 2, "method": "logistic"}, "or one strength, such as"),
        ({"sites": [12]}, "12 is no site; a site is a text"),
        ({"folds": 500}, "fewer than folds=500"),
        ({"alphas": []}, "above 0"),
        ({"alphas": [1.0, -1.0]}, "above 0"),
        ({"method": "mean_difference", "alphas": [1.0]}, "no penalty"),
    ],
)
def test_bad_options_are_told_before_capture(coins, options, told, monkeypatch):
    model = model_of()
    monkeypatch.setattr(type(model), "run", lambda *args, **kwargs: pytest.fail("captured"))
    with pytest.raises(BadInput, match=told):
        linear_probes(model, coins, progress=False, **options)


def test_bad_data_is_told_before_capture(coins, monkeypatch):
    model = model_of()
    monkeypatch.setattr(type(model), "run", lambda *args, **kwargs: pytest.fail("captured"))
    texts, half = coins.texts, tuple("ab"[i % 2] for i in range(len(coins)))
    own = tuple(texts)
    for data, told in (
        (LabelledTexts("one", texts, ("a",) * len(texts), own), "one class only"),
        (LabelledTexts("short", texts, half[:-1], own), "160 texts but 159 labels"),
        (LabelledTexts("few", texts[:4], half[:4], own[:4]), "4 items, fewer than folds=5"),
        (LabelledTexts("groups", texts, half, ("g", "h") * 80), "2 groups, fewer than folds=5"),
        (
            LabelledTexts("rare", texts, ("b", *("a",) * 159), own),
            "class 'b' of rare is in 1 groups",
        ),
        (of(["a" * 70, *texts], [0, *map(coin, texts)]), "text 1 has 70 tokens"),
        ("sentimnt", "did you mean 'sentiment'"),
        ((texts, half), r"interp.data.labelled.of\(texts, labels\)"),
    ):
        with pytest.raises(BadInput, match=told):
            linear_probes(model, data, progress=False)
    with pytest.raises(BadInput, match="without a tokenizer"):
        linear_probes(interp.load(FAMILIES["llama"]()), coins, progress=False)
    with pytest.raises(BadInput, match="did you mean 'sentiment'"):
        check_options(data="sentimnt")


def test_a_site_that_the_model_lacks_is_refused(coins):
    with pytest.raises(Refused, match="'z'"):
        linear_probes(model_of("mamba"), coins, sites="z", progress=False)
    assert len(features_of(model_of("mamba"), "resid_post")) == 3


def test_features_that_differ_by_rounding_alone_are_not_in_the_direction() -> None:
    rng = np.random.default_rng(0)
    y, folds = np.arange(60) % 2, np.arange(60) // 12
    x = rng.normal(size=(60, 40)) + 2.0 * y[:, None] * (np.arange(40) == 0)
    steps = np.spacing(np.float32(5000)) * rng.integers(0, 2, size=(60, 8))
    more = np.concatenate([x, 5000 + steps], 1).astype(np.float32)
    noisy = ridge_sweep(more[None], y[None], folds, refit=True).directions[0, 0]
    assert np.abs(noisy[40:]).max() > np.abs(noisy[:40]).max()
    clean = ridge_sweep(without_rounding(more)[None], y[None], folds, refit=True).directions[0, 0]
    assert np.abs(clean[40:]).max() < 1e-6 and np.abs(clean[:40]).max() > 1e-2


def test_constant_features_are_told_with_their_site():
    texts = [f"{text}!" for text in words(40)]
    data = of(texts, [coin(text) for text in texts])
    with pytest.raises(BadInput, match=r"activation at embed is the same for all 40 texts"):
        linear_probes(model_of(), data, sites="embed,resid_post", progress=False)
    assert len(linear_probes(model_of(), data, progress=False).table) == 3


# --- reports ----------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(coins, monkeypatch, tmp_path):
    model, options = model_of(), {"sites": "resid_post", "progress": False}
    monkeypatch.setattr(linear, "BLOCK", 1)
    whole = linear_probes(model, coins, **options)
    calls: list[list[str]] = []
    real = linear._fitted

    def counted(held, keys, *args):
        calls.append(keys)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(held, keys, *args)

    monkeypatch.setattr(linear, "_fitted", counted)
    with pytest.raises(KeyboardInterrupt):
        linear_probes(model, coins, checkpoint=tmp_path / "kept", **options)
    resumed = linear_probes(model, coins, checkpoint=tmp_path / "kept", resume=True, **options)
    assert calls[2:] == [["resid_post.2"], ["resid_post.2"]]
    pd.testing.assert_frame_equal(resumed.table, whole.table)
    with pytest.raises(BadInput, match="seed"):
        linear_probes(model, coins, seed=3, checkpoint=tmp_path / "kept", resume=True, **options)


def test_the_report_and_its_maps(coins, tmp_path):
    report = linear_probes(
        model_of(), coins, sites="resid_post,mlp_out,z.1", position="-1,-2", progress=False
    )
    assert len(report.table) == 2 * (3 + 3 + 4)
    assert report.meta["keys"][:2] == ["resid_post.0@-1", "resid_post.0@-2"]
    loaded = Report.load(report.save(tmp_path))
    pd.testing.assert_frame_equal(loaded.table, report.table, check_dtype=False)
    drawn = report.figure()
    assert drawn.layout.xaxis.ticktext == (
        "resid_post @-1", "resid_post @-2", "mlp_out @-1", "mlp_out @-2",
    )  # fmt: skip
    at = report.table.set_index(["site", "layer", "position"])
    assert drawn.data[0].z[2, 1] == at.loc[("resid_post", 2, "-2"), "accuracy"]
    heads = report.figure(score="selectivity", site="z")
    assert heads.data[0].z.shape == (3, 8) and np.isnan(heads.data[0].z[0]).all()
    assert len(report.figure("selectivity").data[0].x) == len(report.table)
    with pytest.raises(BadInput, match="did you mean 'accuracy'"):
        report.figure(score="acuracy")
    with pytest.raises(BadInput, match="site of this report"):
        report.figure(site="q")


@pytest.mark.slow
def test_the_default_model_knows_number(smollm):
    """Singular or plural, at the noun: by layer 8 nearly always right, and not so with random weights."""
    report = linear_probes(
        smollm,
        labelled_texts("number"),
        sites="resid_post.8,z.8.0",
        position="word",
        progress=False,
    )
    row = report.table.iloc[0]
    assert row["accuracy"] > 0.9 and row["q"] < 1e-6
    # the noun itself stands there and can be memorised: most of this accuracy could be that
    assert 0.02 < row["selectivity"] < 0.2
    assert row["random_model"] < row["accuracy"] - 0.1
    assert abs(row["shuffled"] - 0.5) < CHANCE


def test_the_page_leaves_out_what_a_site_does_not_have(coins):
    report = linear_probes(model_of(), coins, sites="resid_post.1", progress=False)
    assert report.table["head"].isna().all()
    assert "NA&gt;" not in report.to_html() and ">nan<" not in report.to_html().lower()
