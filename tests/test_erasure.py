"""LEACE and the causal check: planted directions are erased, used ones tell on the model, unused ones do not."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.covariance import oas
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from interp.data.labelled import LabelledTexts, of
from interp.errors import BadInput, InterpError
from interp.metrics import kl
from interp.models.load import weights_sha256
from interp.models.model import Model
from interp.models.passes import Passes
from interp.report import Report
from interp.run.edits import Edit
from probes.captured import capture_features, last_token_of
from probes.causal_check import check_options, probe_causal, summary
from probes.directions import direction_of
from probes.erasure import leace
from probes.two_classes import split


def labelled_vectors(n=240, width=10, classes=2, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated features in which classes of unequal size differ, but overlap."""
    rng = np.random.default_rng(seed)
    y = np.minimum(rng.integers(0, 2 * classes - 1, n), classes - 1)
    x = rng.normal(size=(n, width)) @ rng.normal(size=(width, width))
    return x + rng.normal(size=(classes, width))[y] * 1.5, y


def cross_covariance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    z = np.eye(y.max() + 1)[y]
    return (x - x.mean(0)).T @ (z - z.mean(0)) / len(x)


# --- LEACE -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("shrinkage", [0.0, None, 1.0])
def test_nothing_linear_is_left(classes, shrinkage):
    x, y = labelled_vectors(classes=classes)
    assert np.abs(cross_covariance(x, y)).max() > 0.1
    eraser = leace(x, y, shrinkage=shrinkage)
    erased = eraser(x)
    assert eraser.rank == classes - 1
    # float64, vectors of size 10: 1e-12 is a thousand roundings
    assert np.abs(cross_covariance(erased, y)).max() < 1e-12
    inside = (torch.as_tensor(erased) - eraser.centre) @ eraser.read
    assert inside.abs().max() < 1e-11
    torch.testing.assert_close(eraser.write @ eraser.read, torch.eye(classes - 1).double())
    np.testing.assert_allclose(eraser(erased), erased, atol=1e-11)


@pytest.mark.parametrize("classes", [2, 4])
def test_no_linear_classifier_beats_the_majority(classes):
    x, y = labelled_vectors(classes=classes)
    majority = np.bincount(y).max() / len(y)
    probe = LogisticRegression(C=1e6, max_iter=5000, tol=1e-8)
    assert probe.fit(x, y).score(x, y) > majority + 0.05
    erased = leace(x, y)(x)
    probe.fit(erased, y)
    assert probe.score(erased, y) == majority
    # The best it can do is to predict the frequencies: their entropy, up to the optimiser's tolerance.
    best = entropy(np.bincount(y) / len(y))
    assert log_loss(y, probe.predict_proba(erased)) == pytest.approx(best, abs=1e-5)


def test_it_is_the_smallest_change():
    x, y = labelled_vectors()
    exact = leace(x, y)
    size = ((exact(x) - x) ** 2).sum()
    # Projecting the mean difference out erases too, but costs more.
    apart = x[y == 1].mean(0) - x[y == 0].mean(0)
    unit = apart / np.linalg.norm(apart)
    projected = x - ((x - x.mean(0)) @ unit)[:, None] * unit
    assert np.abs(cross_covariance(projected, y)).max() < 1e-12
    assert size < 0.9 * ((projected - x) ** 2).sum()
    np.testing.assert_allclose(leace(x, y, shrinkage=1.0)(x), projected, atol=1e-11)
    # Any other affine map that erases: x' + (x − E x) M with M reading nothing of the classes.
    deviations = x - x.mean(0)
    cross = cross_covariance(x, y)[:, :1]
    rng = np.random.default_rng(1)
    for scale in (1e-3, 0.1, 1.0):
        M = rng.normal(size=(10, 10)) * scale
        M -= cross @ (cross.T @ M) / (cross.T @ cross)
        other = exact(x) + deviations @ M
        assert np.abs(cross_covariance(other, y)).max() < 1e-10
        assert ((other - x) ** 2).sum() > size


def test_shrinkage_is_that_of_scikit_learn_and_helps_new_items():
    x, y = labelled_vectors(n=40, width=60)
    rho = oas(x)[1]
    torch.testing.assert_close(leace(x, y, shrinkage=None).read, leace(x, y, shrinkage=rho).read)
    # About as many items as dimensions: what exact LEACE reads is fitted to noise.
    rng = np.random.default_rng(0)
    labels = np.arange(460) % 2
    signal = rng.normal(size=(460, 60))
    signal[:, 0] += 3 * labels
    right = {}
    for shrinkage in (0.0, None):
        eraser = leace(signal[:60], labels[:60], shrinkage=shrinkage)
        read = (torch.as_tensor(signal[60:]) - eraser.centre) @ eraser.read @ eraser.write
        right[shrinkage] = ((read[:, 0] > 0).numpy() == labels[60:]).mean()
    assert right[None] > right[0.0] + 0.1


def test_fewer_items_than_dimensions_and_constant_features():
    x, y = labelled_vectors(n=20, width=30)
    x[:, 3] = 7.0
    erased = leace(x, y)(x)
    assert np.abs(cross_covariance(erased, y)).max() < 1e-11
    np.testing.assert_allclose(erased[:, 3], 7.0, atol=1e-9)
    same = np.ones((6, 4))
    eraser = leace(same, [0, 1, 0, 1, 0, 1])
    assert eraser.rank == 0 and (eraser(same) == same).all()


FIXED_X = np.sin(np.arange(1, 37).reshape(12, 3) * np.array([1.0, 1.7, 2.9]))
FIXED_Y = np.array([0, 0, 1, 2, 1, 0, 2, 2, 1, 0, 1, 2])
FIXED_P = np.array(
    [
        [0.8678175, -0.12529764, -0.21814538],
        [-0.25478526, 0.03678653, 0.06404598],
        [-0.37950058, 0.05479323, 0.09539598],
    ]
)


def test_it_is_the_map_of_the_authors_package():
    eraser = leace(FIXED_X, FIXED_Y)
    np.testing.assert_allclose(
        np.eye(3) - (eraser.read @ eraser.write).T.numpy(), FIXED_P, atol=1e-6
    )


def test_it_is_what_the_authors_package_does():
    package = pytest.importorskip("concept_erasure")
    for classes in (2, 4):
        x, y = labelled_vectors(classes=classes)
        z = torch.nn.functional.one_hot(torch.as_tensor(y))
        theirs = package.LeaceEraser.fit(torch.as_tensor(x), z, shrinkage=False)
        np.testing.assert_allclose(leace(x, y)(x), theirs(torch.as_tensor(x)).numpy(), atol=1e-10)


def test_types_are_kept_and_bad_input_is_told():
    x, y = labelled_vectors()
    eraser = leace(x, y)
    assert isinstance(eraser(x.astype(np.float32)), np.ndarray)
    assert eraser(torch.as_tensor(x).bfloat16()).dtype == torch.bfloat16
    assert eraser(torch.zeros(2, 5, 10)).shape == (2, 5, 10)
    for call, message in [
        (lambda: eraser(x[:, :4]), "width 4.*width 10"),
        (lambda: leace(x, y[:5]), "5 labels"),
        (lambda: leace(x, np.zeros(len(x))), "one class"),
        (lambda: leace(x * np.nan, y), "NaN"),
        (lambda: leace(x, y, shrinkage=2.0), "from 0 to 1"),
        (lambda: eraser.edit("pattern.1"), "attention weights"),
    ]:
        with pytest.raises(BadInput, match=message):
            call()


def test_the_edit_erases_in_a_run_at_its_positions_only(tiny):
    ids = torch.randint(97, (30, 5), generator=torch.Generator().manual_seed(0))
    clean = tiny.run(ids, capture=["resid_post.0", "z.1.2"])
    x, y = clean.cache["resid_post.0"][:, -1], np.arange(30) % 2
    eraser = leace(x, y)
    run = tiny.run(
        ids, capture=["resid_post.0"], edits=[eraser.edit("resid_post.0", positions=[4])]
    )
    new = run.cache["resid_post.0"]
    torch.testing.assert_close(new[:, :4], clean.cache["resid_post.0"][:, :4])
    torch.testing.assert_close(new[:, 4], eraser(x))
    assert np.abs(cross_covariance(new[:, 4].double().numpy(), y)).max() < 1e-5  # float32
    of_head = leace(clean.cache["z.1.2"][:, -1], y)
    run = tiny.run(ids, capture=["z.1"], edits=[of_head.edit("z", heads=[(1, 2)], positions=[4])])
    torch.testing.assert_close(run.cache["z.1.2"][:, 4], of_head(clean.cache["z.1.2"][:, 4]))
    torch.testing.assert_close(run.cache["z.1.2"][:, :4], clean.cache["z.1.2"][:, :4])


# --- the causal check --------------------------------------------------------------------------------

GROUPS, USED, UNUSED = 16, 0, 1
PLAIN = ["<unk>", "so", "it", "is", "yes", "no", "left", "right"]
CODES = [(f"w{i}{a}{b}", i, a, b) for i in range(GROUPS) for a, b in itertools.product("pm", "pm")]


@pytest.fixture(scope="module")
def planted() -> Model:
    """Words carry two signs, one that only "yes" and "no" read, and one that nothing reads.

    No layer writes anything: what reaches the unembedding is the last word's embedding, normed. The
    four words of a group differ in the signs alone.
    """
    vocabulary = {word: i for i, word in enumerate([*PLAIN, *(word for word, *_ in CODES)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(vocabulary),
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = LlamaForCausalLM(config)
        noise = torch.randn(GROUPS, 32)
        noise[:, [USED, UNUSED]] = 0.0
        for word, i, a, b in CODES:
            x = noise[i].clone()
            x[USED] = 3.0 if a == "p" else -3.0
            x[UNUSED] = 3.0 if b == "p" else -3.0
            module.model.embed_tokens.weight[vocabulary[word]] = x
        for layer in module.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        W_U = torch.randn(len(vocabulary), 32) * 0.3
        W_U[:, [USED, UNUSED]] = 0.0
        W_U[vocabulary["yes"], USED], W_U[vocabulary["no"], USED] = 1.0, -1.0
        module.lm_head.weight.copy_(W_U)
    return Model(module, PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))


def words_by(sign: int) -> LabelledTexts:
    """The words, in sentences of two lengths, labelled by their first or second sign."""
    texts = [("so it is " if i % 2 else "it is ") + word for word, i, *_ in CODES]
    labels = [{"p": "plus", "m": "minus"}[code[2 + sign]] for code in CODES]
    return of(texts, labels, groups=[code[1] for code in CODES], words=[c[0] for c in CODES])


ANSWERS = ["plus=yes", "minus=no"]
FEW = {"draws": 9, "control_prompts": 3, "progress": False}


@pytest.mark.parametrize("direction", ["mean", "ridge", "leace"])
def test_a_direction_that_is_used(planted, direction):
    before = weights_sha256(planted.module)
    report = probe_causal(
        planted, words_by(USED), sites=["resid_post.0"], directions=[direction], answers=ANSWERS,
        doses=[-1, 1, 2], **FEW,
    )  # fmt: skip
    table = report.table.set_index(["intervention", "dose"])
    assert (table["accuracy"] == 1.0).all() and table["shuffled_accuracy"].max() < 0.8
    gap = table.loc["swap", "clean"].item()
    assert gap > 2  # logits
    erase, swap = table.loc["erase"].iloc[0], table.loc["swap"].iloc[0]
    # Nothing of the gap is left, or all of it reversed: to the ridge's and shrinkage's tilt.
    assert erase["effect"] == pytest.approx(-gap, rel=0.05)
    assert swap["effect"] == pytest.approx(-2 * gap, rel=0.05)
    up, down = table.loc[("add", 1.0)], table.loc[("add", -1.0)]
    assert up["effect"] > 1 and down["effect"] < -1
    for row in (erase, swap, up, down):
        assert row["p"] == 1 / 10
        assert not row["random_low"] <= row["effect"] <= row["random_high"]
        assert abs(row["random"]) < 0.5 * abs(row["effect"])
    assert weights_sha256(planted.module) == before


def test_a_direction_that_is_there_but_unused(planted):
    data = words_by(UNUSED)
    options = {"sites": ["resid_post.0"], "doses": [1], **FEW}
    told = probe_causal(planted, data, answers=ANSWERS, **options).table
    assert (told["accuracy"] == 1.0).all()
    # Both answers read another axis, on which the two classes are alike.
    assert told.query("intervention != 'add'")["effect"].abs().max() < 1e-5
    blind = probe_causal(planted, data, **options).table.set_index("intervention")
    # Reflected, a vector keeps its norm, and no token reads the axis: the same distribution.
    assert blind.loc["swap", "effect"] < 1e-9 < 1e-3 < blind.loc["swap", "random_low"]
    used = probe_causal(planted, words_by(USED), **options).table.set_index("intervention")
    assert used.loc["swap", "effect"] > 0.1
    assert set(blind["unit"]) == {"nats"} and np.allclose(blind["effect"], blind["kl"])


def test_the_table_is_what_plain_runs_give(tiny_model, planted):
    """Of a random model: every effect again by one forward a text, without replay, padding or batching."""
    model = Model(
        tiny_model(vocab_size=len(planted.tokenizer)).module, planted.tokenizer, id="random"
    )
    data = words_by(USED)
    swapped = of([t + " so" for t in data.texts], data.labels, data.groups, data.words)
    report = probe_causal(
        model, swapped, sites=["resid_post.0", "z.1.2"], answers=ANSWERS, doses=[0.5], items=12, **FEW
    )  # fmt: skip
    y = np.array([label == "plus" for label in swapped.labels])
    train, test = split(swapped, y, 12, 0)
    assert not {swapped.groups[i] for i in train} & {swapped.groups[i] for i in test}
    x = capture_features(model, swapped, ["resid_post.0", "z.1.2"], positions="word")
    for key, table in (
        ("resid_post.0", report.table.query("site == 'resid_post'")),
        ("z.1.2", report.table.query("site == 'z'")),
    ):
        found = direction_of(x[key][train].astype(float), y[train], "mean")
        step = torch.as_tensor(found.step).float()
        done = {
            "erase": lambda v, seen, found=found: found.eraser(v),
            "swap": lambda v, seen, found=found: v - 2 * found.eraser.removed(v),
            "add": lambda v, seen, step=step: v + 0.5 * step,
        }
        for kind, change in done.items():
            moved, away = [], []
            for i in test:
                at = last_token_of(model, swapped.texts[i], swapped.words[i])
                edit = Edit.apply(key, change, positions=[at])
                clean, new = (
                    model.run(swapped.texts[i], edits=edits).logits[0, -1] for edits in ((), [edit])
                )
                yes, no = model.token_id("yes"), model.token_id("no")
                moved.append(float((new - clean)[yes] - (new - clean)[no]))
                away.append(float(kl(clean, new)))
            row = table.set_index("intervention").loc[kind]
            effect = np.array(moved)
            wanted = effect.mean()
            if kind != "add":
                wanted = effect[y[test]].mean() - effect[~y[test]].mean()
            # float32 logits of size 10, in batches of another shape
            assert row["effect"] == pytest.approx(wanted, abs=2e-5)
            assert row["kl"] == pytest.approx(np.mean(away), abs=1e-5)
            assert row["low"] <= row["effect"] <= row["high"]


def test_features_that_differ_by_rounding_alone_are_no_direction() -> None:
    """Divided by its deviation, what float32 rounds of a large constant would outweigh everything."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2 == 1
    x = rng.normal(size=(60, 40)) + 2.0 * y[:, None] * (np.arange(40) == 0)
    steps = np.spacing(np.float32(5000)) * rng.integers(0, 2, size=(60, 8))
    more = np.concatenate([x, 5000 + steps], 1).astype(np.float32).astype(np.float64)
    wanted, found = direction_of(x, y, "ridge"), direction_of(more, y, "ridge")
    assert np.abs(found.eraser.read[40:, 0].numpy()).max() == 0
    assert np.allclose(found.step[:40], wanted.step, atol=1e-4)


def test_random_directions_are_matched_and_seeded(planted):
    options = {"sites": ["resid_post.1"], "answers": ANSWERS, "doses": [1], "draws": 5}
    options |= {"control_prompts": 2, "progress": False}
    one, again, other = (
        probe_causal(planted, words_by(USED), seed=seed, **options) for seed in (0, 0, 1)
    )
    assert one.tables["draws"].equals(again.tables["draws"])
    assert not one.tables["draws"].equals(other.tables["draws"])
    data = probe_causal(planted, words_by(USED), random_from="data", **options)
    assert len(data.tables["draws"]) == 3 * 5
    # As the data vary within classes: never along the signs, which do not.
    assert data.table["random"].abs().max() < 0.4 * data.table["effect"].abs().min()


def test_the_report_is_saved_and_drawn(planted, tmp_path):
    report = probe_causal(
        planted, {"up": [f"so w{i}pp" for i in range(9)], "down": [f"it w{i}mp" for i in range(9)]},
        sites=["embed", "resid_post.1"], directions=["mean", "leace"], doses=[-1, 1], **FEW,
    )  # fmt: skip
    assert len(report.table) == 2 * 2 * 4 and report.meta["classes"] == ["down", "up"]
    figure = report.figure()
    assert len(figure.data) == 4 * 6
    assert figure.layout.xaxis.title.text == "dose: down ← → up"
    told = summary(report)
    assert told["site"].unique().tolist() == ["embed.0", "resid_post.1"]
    assert told["change"].tolist()[:4] == ["erase", "swap", "add -1", "add +1"]
    loaded = Report.load(report.save(tmp_path))
    assert loaded.table.shape == report.table.shape
    assert loaded.figure("doses").to_json() == figure.to_json()


BAD = [
    ({"sites": ["resid_pst.1"]}, "resid_post"),
    ({"sites": ["resid_post.9"]}, "layers 0–1"),
    ({"sites": ["pattern.0"]}, "pattern"),
    ({"directions": ["maen"]}, "did you mean 'mean'"),
    ({"directions": []}, "no direction"),
    ({"position": "wrod"}, "did you mean 'word'"),
    ({"answers": ["yes"]}, "label=word"),
    ({"answers": ["plus=yes", "minsu=no"]}, "did you mean 'minus'"),
    ({"answers": ["plus=yes"]}, "class 'minus' has no answer"),
    ({"answers": ["plus=yes", "minus=yes"]}, "both classes"),
    ({"answers": ["plus=yes no", "minus=no"]}, "tokens of"),
    ({"classes": ["plus", "mins"]}, "did you mean 'minus'"),
    ({"classes": ["plus"]}, "name two"),
    ({"doses": [0.0]}, "other than 0"),
    ({"doses": []}, "doses"),
    ({"draws": 1}, "at least two"),
    ({"items": 2}, "at least four"),
    ({"control_prompts": 0}, "control_prompts=0"),
    ({"template": "no place"}, "template"),
    ({"random_from": "dta"}, "did you mean 'data'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_told_before_a_forward(planted, monkeypatch, options, message):
    def no_forward(*args, **kwargs):
        raise AssertionError("a forward was run")

    monkeypatch.setattr(Passes, "forward", no_forward)
    with pytest.raises(BadInput, match=message):
        probe_causal(planted, words_by(USED), progress=False, **options)


def test_bad_data_are_told_before_a_forward(planted, monkeypatch):
    monkeypatch.setattr(Passes, "forward", None)
    of_three = of(["so", "it", "is"] * 4, ["a", "b", "c"] * 4)
    few = of(["so", "it", "is", "no"], ["a", "b", "a", "b"])
    lone = of(
        [f"w{i}pp" for i in range(12)], ["a"] * 11 + ["b"], groups=[str(i) for i in range(12)]
    )
    for data, options, message in [
        (of_three, {}, "3 classes"),
        (few, {}, "4 groups"),
        (lone, {}, "lack a class"),
        (few, {"until_word": True}, "which word"),
        (few, {"position": "word"}, "has no words"),
        ({"a": ["so"]}, {}, "one class"),
        ("sentimnt", {}, "did you mean 'sentiment'"),
    ]:
        with pytest.raises(InterpError, match=message):
            probe_causal(planted, data, progress=False, **options)
    with pytest.raises(BadInput, match="did you mean 'number'"):
        check_options(data="nummber")


def test_constant_features_are_told(planted):
    data = of([f"w{i}{s}p so" for i in range(9) for s in "pm"], ["a", "b"] * 9)
    with pytest.raises(BadInput, match=r"same mean at resid_post\.0"):
        probe_causal(planted, data, sites=["resid_post.0"], **FEW)


def test_number_of_the_subject_in_the_default_model(smollm):
    report = probe_causal(
        smollm, "number", sites=["resid_post.20"], until_word=True, items=16, doses=[1], draws=4,
        answers=["singular=is", "singular=was", "plural=are", "plural=were"], control_prompts=2,
        classes=["singular", "plural"], progress=False,
    )  # fmt: skip
    table = report.table.set_index("intervention")
    assert table.loc["swap", "clean"] > 1  # the model agrees its verb with the noun
    assert (table["accuracy"] > 0.85).all()
    assert table.loc["swap", "effect"] < table.loc["swap", "random_low"]
    assert table.loc["add", "effect"] > table.loc["add", "random_high"]
