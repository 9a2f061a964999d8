"""Learned lenses against maps that were planted, finite differences, exact KL and lenses in closed form.

Tolerances: float32 throughout. A KL is a difference of numbers as large as the logits of the tiny
models (about 10), good to some 1e-6 a row. Resuming is exact: the tests run on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.affine_lens import AffineLens, cached_lens, load_maps
from interp.data.prompts import prose
from interp.errors import BadInput, Refused
from interp.lens import logit_lens, read
from interp.lens_text import parts_of
from interp.metrics import kl
from interp.models.model import Model
from interp.report import Report
from interp.ridge_lens import fit_ridge_lens
from interp.unembedding import Unembedding
from probes.head_lens import HeadLens
from probes.lens_inputs import Inputs
from probes.lens_rows import Rows, judged
from probes.lens_start import Start
from probes.lens_training import Training
from probes.lenses import LENS, tune_lens
from probes.part_of_vocabulary import PartOfVocabulary, part_for
from probes.training import Diverged
from tests.families import FAMILIES

FAST = {"window": 32, "steps": 24, "checks": 4, "batch_size": 64, "progress": False}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lenses that a test keeps go nowhere else."""
    monkeypatch.setattr("interp.affine_lens.cache_folder", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def stream() -> Tensor:
    return torch.randint(97, (4000,), generator=torch.Generator().manual_seed(0))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_lens(report: Report, value: str = "kl"):
    """layer × lens."""
    return report.table.pivot_table(index="layer", columns="lens", values=value)


# --- the loss of a step ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite"])
@pytest.mark.parametrize("size", [0, 60])
def test_the_gradient_is_that_of_the_loss(family: str, size: int) -> None:
    """Against autograd through the plainly written loss: norms, soft-cap and scale included."""
    model = Model(FAMILIES[family](), id=family)
    d = model.spec.d_model
    final, y = noise(9, d), noise(9, d, seed=1).requires_grad_()
    generator = torch.Generator().manual_seed(3)
    frequency = torch.full((97,), 1 / 97)
    part = part_for(model, final, frequency, size, generator)
    got, gradient = part(y, part.target(final))

    tokens = torch.arange(97)
    weight = torch.zeros(97)
    if size:
        # The same draw again, from how it is described.
        likely = model.unembed(final).topk(max(1, min(16, size // 18))).indices.unique()
        assert len(part.W) < 97
        tokens = torch.tensor(
            [int((row == model.W_U.T).all(1).nonzero()[0, 0]) for row in part.W.detach()]
        )
        assert set(likely.tolist()) <= set(tokens.tolist())
        assert part.correction is not None
        weight = part.correction
        assert (weight[[i for i, t in enumerate(tokens) if t in likely]] == 0).all()
    p = (model.unembed(final)[:, tokens] + weight).log_softmax(-1)
    q = (model.unembed(y)[:, tokens] + weight).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    assert torch.allclose(got, expected, atol=1e-4)
    (wanted,) = torch.autograd.grad(expected.sum(), y)
    assert torch.allclose(gradient, wanted, atol=1e-4 * float(wanted.abs().max()) + 1e-6)


def test_a_part_of_the_vocabulary_estimates_the_whole(tiny: Model) -> None:
    """Averaged over draws the loss is the exact KL, from below; and it is 0 at the truth in each."""
    final = noise(6, 32) * 3
    y = final + 0.5 * noise(6, 32, seed=1)
    exact = kl(tiny.unembed(final), tiny.unembed(y))
    generator = torch.Generator().manual_seed(0)
    frequency = tiny.unembed(final).softmax(-1).mean(0).detach()
    found = []
    for _ in range(200):
        part = part_for(tiny, final, frequency, 48, generator)
        assert float(part(final, part.target(final))[0].abs().max()) < 1e-4
        found.append(part(y, part.target(final))[0])
    mean, spread = torch.stack(found).mean(0), torch.stack(found).std(0)
    assert float(spread.max()) > 1e-3  # it is an estimate
    # Each token is seen about every other time: the bias stays within a fifth of what is estimated.
    assert torch.allclose(mean, exact, rtol=0.2, atol=3 * float(spread.max()) / 200**0.5)


def test_the_whole_vocabulary_is_exact(tiny: Model) -> None:
    final, y = noise(6, 32), noise(6, 32, seed=1)
    part = PartOfVocabulary(tiny, None, None)
    exact = kl(tiny.unembed(final), tiny.unembed(y))
    assert torch.allclose(part(y, part.target(final))[0], exact, atol=1e-4)
    told = judged(Unembedding(tiny), y[None], final, torch.arange(6))
    assert torch.allclose(told["kl"].float(), exact.mean(), atol=1e-4)
    loss = -tiny.unembed(y).log_softmax(-1).gather(1, torch.arange(6)[:, None]).mean()
    assert torch.allclose(told["loss"].float(), loss, atol=1e-4)
    same = tiny.unembed(y).argmax(-1) == tiny.unembed(final).argmax(-1)
    assert float(told["agreement"]) == pytest.approx(float(same.float().mean()))
    assert float(judged(Unembedding(tiny), final[None], final)["kl"]) == 0


# --- planted truth --------------------------------------------------------------------------------


def rotated(tiny_model: Callable[..., Model]) -> Model:
    """A model whose final residual is a known affine map of the input of its block 1."""
    model = tiny_model()
    A, b = torch.eye(32) + 0.3 * noise(32, 32, seed=5), noise(32, seed=6)
    block = model.blocks[1]

    def planted(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states @ A + b

    block.forward = planted
    return model


def test_a_planted_affine_map_is_found_by_training(
    tiny_model: Callable[..., Model], stream: Tensor
) -> None:
    """From the identity, not from least squares, which would find it at once."""
    model = rotated(tiny_model)
    inputs = Inputs.of(model, "layers", [0, 1])
    parts, _ = parts_of(model, stream, "", 32)
    choose = {"text": Rows.of(inputs, parts.choose["token ids"], 16)}
    x, final = inputs.read(parts.fit[:16], slice(1, None))
    maps = {"A": torch.eye(32).repeat(2, 1, 1, 1), "b": torch.zeros(2, 1, 32)}
    sample = torch.stack([x[0], x[1]])
    start = Start(maps, sample.mean(-2), sample.std(-2), final.std(0), torch.full((97,), 1 / 97))
    from probes.lens_training import Options

    options = Options(
        kind="layers", rank=None, steps=400, batch_size=128, vocabulary=0, optimiser="adam",
        lr=0.03, weight_decay=0.0, clip=1.0, checks=4, patience=4, seed=0,
    )  # fmt: skip
    training = Training(inputs, options, start, parts, choose, train=[1], key={})
    from interp.run.progress import Progress

    before = float(training.best_kl[1, 0])
    with Progress(False) as bars:
        training.run(bars)
    after = float(training.best_kl[1, 0])
    assert before > 0.5 and after < 0.01 * before
    # The final norm forgets a vector's size, so the map is known up to one factor a row: its
    # predictions point where the final residuals do.
    held = choose["text"]
    found = inputs.translated(training.best, 1, held.x[1])[0]
    centred = torch.cosine_similarity(found, held.final, dim=-1)
    assert float(centred.min()) > 0.99
    # and the layer that was not trained is as it was
    assert torch.equal(training.best["A"][0], maps["A"][0])
    assert torch.isinf(training.best_kl[0, 0])


def test_the_ridge_start_is_the_planted_map(
    tiny_model: Callable[..., Model], stream: Tensor, tmp_path: Path
) -> None:
    """The smallest penalty tried, 1e-4 of each coordinate's variance, shrinks the map a little."""
    model = rotated(tiny_model)
    report = tune_lens(model, stream, layers=[1], out=tmp_path, **{**FAST, "steps": 0})
    assert by_lens(report).loc[1, "tuned"] < 1e-3 < 0.5 < by_lens(report).loc[1, "logit"]
    lens = AffineLens.load(tmp_path / LENS, model)
    cache = model.run(stream[:50][None], capture=["resid_pre.1", "resid_post.1"]).cache
    x, final = cache["resid_pre.1"][0, 1:], cache["resid_post.1"][0, 1:]
    error = (lens(x, 1) - final).norm() / (final - final.mean(0)).norm()
    assert float(error) < 0.01


# --- what is kept of the truth ----------------------------------------------------------------------


def test_zero_steps_are_the_ridge_lens(tiny: Model, stream: Tensor, tmp_path: Path) -> None:
    ridge = fit_ridge_lens(tiny, text=stream, window=32, keep=False, progress=False)
    report = tune_lens(tiny, stream, out=tmp_path, **{**FAST, "steps": 0})
    lens = AffineLens.load(tmp_path / LENS, tiny)
    assert lens.A is not None and ridge.A is not None
    assert torch.equal(lens.A, ridge.A) and torch.equal(lens.b, ridge.b)
    wide = by_lens(report)
    assert (wide["tuned"] == wide["ridge"]).all()


def test_training_lowers_the_held_out_kl(tiny: Model, stream: Tensor) -> None:
    report = tune_lens(tiny, stream, **{**FAST, "steps": 120})
    wide = by_lens(report)
    assert (wide.loc[2] == 0).all()  # the final residual is read as the model reads it
    before_last = wide.loc[[0, 1]]
    assert (before_last["tuned"] < before_last["ridge"]).all()
    assert (before_last["ridge"] < before_last["logit"]).all()
    bits = by_lens(report, "bits")
    assert bits.loc[2].nunique() == 1 and (by_lens(report, "agreement").loc[2] == 1).all()
    curve = report.tables["curve"]
    assert set(curve["step"]) == {0, 30, 60, 90, 120} and set(curve["layer"]) == {0, 1}
    first = curve[curve["step"] == 0].set_index("layer")["kl"]
    last = curve.groupby("layer")["best_kl"].last()
    assert (last < first).all()


def test_numbers_are_those_of_a_plain_reading(tiny: Model, stream: Tensor, tmp_path: Path) -> None:
    """The table's KL and bits, again from logits of the model and of the saved lens."""
    report = tune_lens(tiny, stream, out=tmp_path, **FAST)
    lens = AffineLens.load(tmp_path / LENS, tiny)
    where = [note for note in report.meta["notes"] if "the lens is" in note]
    assert len(where) == 1 and all(path in where[0] for path in report.meta["saved"])
    assert len(report.meta["saved"]) == 2
    parts, _ = parts_of(tiny, stream, "", 32)
    windows = parts.test["token ids"]
    places = 1 + ((torch.arange(16) + 0.5) * (windows.shape[1] - 2) / 16).long()
    run = tiny.run(windows, capture=["resid_pre.1"])
    assert run.logits is not None
    x = run.cache["resid_pre.1"][:, places].flatten(0, 1)
    final = run.logits[:, places].flatten(0, 1)
    following = windows[:, places + 1].flatten()
    row = report.table.query("layer == 1 and lens == 'tuned'").iloc[0]
    own = tiny.unembed(lens(x, 1)).detach()
    assert row["kl"] == pytest.approx(float(kl(final, own).mean()), abs=1e-4)
    nats = -own.log_softmax(-1).gather(1, following[:, None]).mean()
    assert row["bits"] == pytest.approx(float(nats) / np.log(2), abs=1e-4)
    assert row["positions"] == len(x)


def test_no_unit_gets_worse_on_the_text_to_choose_on(tiny: Model, stream: Tensor) -> None:
    """A learning rate that only spoils leaves the start."""
    report = tune_lens(tiny, stream, **{**FAST, "lr": 3.0})
    curve = report.tables["curve"]
    assert curve.query("step > 0")["kl"].min() > curve.query("step == 0")["kl"].max()
    wide = by_lens(report)
    assert (wide["tuned"] == wide["ridge"]).all()


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_both_optimisers_learn(
    tiny: Model, stream: Tensor, optimiser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From least squares alone: moved along the quiet direction it starts where a hundred steps end."""
    monkeypatch.setattr("interp.ridge_lens.QUIETS", (0.0,))
    report = tune_lens(tiny, stream, optimiser=optimiser, vocabulary=48, **FAST)
    curve = report.tables["curve"]
    assert (curve.groupby("layer")["best_kl"].last() < curve.groupby("layer")["kl"].first()).all()


def test_training_that_was_killed_goes_on_to_the_same_result(
    tiny: Model, stream: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**FAST, "vocabulary": 60, "batch_size": 100}
    whole = tune_lens(tiny, stream, out=tmp_path / "whole", **options)
    plain, calls = Training.step, 0

    def step(self: Training, *args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 15:
            raise KeyboardInterrupt
        plain(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Training, "step", step)
    folder = tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        tune_lens(tiny, stream, checkpoint=folder, **options)
    monkeypatch.setattr(Training, "step", plain)
    again = tune_lens(
        tiny, stream, checkpoint=folder, resume=True, out=tmp_path / "again", **options
    )
    for name, table in whole.tables.items():
        assert table.equals(again.tables[name]), name
    a, b = (load_maps(tmp_path / place / LENS, tiny)[0] for place in ("whole", "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(BadInput, match="it was made with lr="):
        tune_lens(tiny, stream, checkpoint=folder, resume=True, lr=0.5, **options)


def test_a_loss_that_is_no_number_stops(tiny: Model, stream: Tensor, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="the last good checkpoint is"):
        tune_lens(tiny, stream, lr=1e38, checkpoint=tmp_path, **FAST)
    tensors, _ = _tensors(tmp_path / "training.safetensors")
    assert all(
        bool(x[~x.isnan()].isfinite().all()) for n, x in tensors.items() if "best_kl" not in n
    )
    assert bool(tensors["inner.A"].isfinite().all())


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "granite", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_family_in_any_precision(family: str, dtype: torch.dtype, stream: Tensor) -> None:
    """Also where logits are capped and scaled, and where norms and weights have 16 bits."""
    model = Model(FAMILIES[family]().to(dtype), id=family)
    report = tune_lens(model, stream, **{**FAST, "steps": 40})
    curve = report.tables["curve"].groupby("layer")
    assert (curve["best_kl"].last() < curve["kl"].first()).all()
    assert (by_lens(report).loc[model.n_layers] == 0).all()


# --- low rank ----------------------------------------------------------------------------------------


def test_a_low_rank_lens_of_full_rank_is_the_full_one(
    tiny: Model, stream: Tensor, tmp_path: Path
) -> None:
    start = {**FAST, "steps": 0}
    lenses = {}
    for rank in (None, 32, 4):
        tune_lens(tiny, stream, rank=rank, out=tmp_path / str(rank), keep=False, **start)
        lenses[rank] = AffineLens.load(tmp_path / str(rank) / LENS, tiny)
    x = noise(20, 32)
    for layer in (0, 1):
        full = lenses[None](x, layer)
        # products of 32 terms in another order
        assert torch.allclose(lenses[32](x, layer), full, atol=1e-4 * float(full.abs().max()))
        assert not torch.allclose(lenses[4](x, layer), full, atol=1e-2 * float(full.abs().max()))
    assert lenses[4].A is None and lenses[4].U is not None and lenses[4].U.shape == (2, 32, 4)


def test_more_rank_is_no_worse_and_training_helps(tiny: Model, stream: Tensor) -> None:
    starts = {rank: tune_lens(tiny, stream, rank=rank, **{**FAST, "steps": 0}) for rank in (2, 16)}
    assert by_lens(starts[16]).loc[0, "tuned"] < by_lens(starts[2]).loc[0, "tuned"]
    trained = tune_lens(tiny, stream, rank=2, **FAST)
    assert by_lens(trained).loc[0, "tuned"] < by_lens(starts[2]).loc[0, "tuned"]


# --- heads -----------------------------------------------------------------------------------------------


def test_the_lens_of_heads(tiny: Model, stream: Tensor, tmp_path: Path) -> None:
    options = {**FAST, "steps": 60, "kind": "heads"}
    report = tune_lens(tiny, stream, out=tmp_path, **options)
    table = report.table
    assert set(table["layer"]) == {0, 1} and set(table["head"]) == {0, 1, 2, 3}
    wide = table.pivot_table(index=["layer", "head"], columns="lens", values="kl")
    assert (wide["ridge"] < wide["logit"]).all()
    assert wide["tuned"].mean() < wide["ridge"].mean()
    lens = HeadLens.load(tmp_path / LENS, tiny)
    assert lens.b.shape == (2, 4, 32)
    ids = stream[:20][None]
    cache = tiny.run(ids, capture=["z.1", "resid_post.1"]).cache
    predicted = lens(cache["z.1"][0], 1)
    assert predicted.shape == (20, 4, 32) and lens.A is not None
    expected = cache["z.1"][0, :, 2] @ lens.A[1, 2] + lens.b[1, 2]
    assert torch.allclose(predicted[:, 2], expected, atol=1e-4)
    reading = read(tiny, predicted.transpose(0, 1), final=cache["resid_post.1"][0])
    assert reading.kl is not None and reading.kl.shape == (4, 20)
    with pytest.raises(BadInput, match="it has layers"):
        lens(cache["z.1"][0], 7)
    with pytest.raises(BadInput, match="no lens of residual streams"):
        AffineLens.load(tmp_path / LENS, tiny)
    assert cached_lens(tiny, "tuned") is None  # a lens of heads is read by nobody else
    places = [Path(place) for place in report.meta["saved"]]
    assert len(places) == 2 and torch.equal(HeadLens.load(places[1], tiny).b, lens.b)


def test_a_heads_logit_lens_is_its_write(tiny: Model, stream: Tensor) -> None:
    inputs = Inputs.of(tiny, "heads", [1])
    x, _ = inputs.read(stream[:20][None], slice(1, None))
    cache = tiny.run(stream[:20][None], capture=["attn_write.1"]).cache
    assert torch.allclose(inputs.plainly(0, x[0]).sum(0), cache["attn_write.1"][0, 1:], atol=1e-4)


def test_heads_behind_a_norm_are_refused(stream: Tensor) -> None:
    with pytest.raises(Refused, match="normalises what attention writes"):
        tune_lens(Model(FAMILIES["gemma2"](), id="gemma2"), stream, kind="heads", **FAST)


# --- where it is found, and what is said --------------------------------------------------------------------


def test_the_tuned_lens_is_found_and_read(tiny: Model, stream: Tensor) -> None:
    ids = stream[:7][None]
    with pytest.raises(BadInput, match="interp tune-lens"):
        logit_lens(tiny, ids, lens="tuned")
    tune_lens(tiny, stream, layers=[1], **FAST)
    assert cached_lens(tiny, "tuned") is None  # not of all layers
    tune_lens(tiny, stream, **FAST)
    for asked in ("tuned", "best"):
        report = logit_lens(tiny, ids, lens=asked)
        assert report.meta["lens"]["kind"] == "tuned"
        assert set(report.table["lens"]) == {"tuned"}
        assert list(report.tables["held_out"]) == [
            *("text", "layer", "kl_logit", "kl_ridge", "kl_tuned")
        ]
    assert (report.table.query("layer == 1")["kl"] == 0).all()


class _Letters:
    """A tokenizer of characters."""

    bos_token_id = cls_token_id = eos_token_id = pad_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 97 for letter in text]}


def test_the_english_at_hand_is_judged_by_kind(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a text: several kinds, and the ridge lens of the same text is not fitted twice."""
    tiny.tokenizer = _Letters()
    monkeypatch.setattr("interp.lens_text.FIT_TOKENS", 6_000)
    monkeypatch.setattr(
        "interp.ridge_lens.QUIETS", (0.0,)
    )  # least squares leaves something to learn
    ridge = fit_ridge_lens(tiny, window=32, progress=False)
    monkeypatch.setattr("probes.lens_start.fit_ridge_lens", None)
    report = tune_lens(tiny, **FAST)
    assert {"prose", "documentation"} <= set(report.table["text"])
    best = report.tables["curve"].groupby("layer")
    assert (best["best_kl"].last() < best["kl"].first()).all()
    assert report.meta["lens"]["text"]["recipe"] == ridge.about["text"]["recipe"]
    found = cached_lens(tiny, "tuned")
    assert found is not None and set(found.held_out["text"]) == set(ridge.held_out["text"])


def test_a_lens_of_another_model_is_refused(
    tiny: Model, tiny_model: Callable[..., Model], stream: Tensor, tmp_path: Path
) -> None:
    tune_lens(tiny, stream, out=tmp_path, **{**FAST, "steps": 0})
    with pytest.raises(BadInput, match="was fitted on tiny with weights"):
        AffineLens.load(tmp_path / LENS, tiny_model(seed=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "head"}, "did you mean 'heads'"),
        ({"optimiser": "adm"}, "did you mean 'adam'"),
        ({"rank": 33}, "rank=33 is above d_model=32"),
        ({"rank": 9, "kind": "heads"}, "rank=9 is above d_head=8"),
        ({"rank": 0}, "rank=0"),
        ({"layers": [2]}, "blocks 0 to 1"),
        ({"layers": []}, "layers is empty"),
        ({"steps": -1}, "steps=-1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"vocabulary": -1}, "vocabulary=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"window": 2}, "window=2"),
    ],
)
def test_bad_input_says_what_to_do(
    tiny: Model, stream: Tensor, options: dict, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        tune_lens(tiny, stream, **{**FAST, **options})


def test_what_a_model_or_text_cannot_give(tiny: Model, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="give more text"):
        tune_lens(tiny, torch.arange(90), **FAST)
    with pytest.raises(BadInput, match="no file"):
        tune_lens(tiny, str(tmp_path / "nothing.txt"), **FAST)
    with pytest.raises(BadInput, match="without a tokenizer"):
        tune_lens(tiny, **FAST)
    headless = Model(FAMILIES["bert"](), id="bert")
    with pytest.raises(Refused, match="unembedd"):
        tune_lens(headless, torch.arange(90), **FAST)


def test_the_figures_show_the_table(tiny: Model, stream: Tensor) -> None:
    report = tune_lens(tiny, stream, **FAST)
    figure = report.figure("curves")
    lines = {trace.legendgroup: trace for trace in figure.data}
    assert list(lines) == ["logit", "ridge", "tuned"]
    assert np.allclose(lines["tuned"].y, by_lens(report)["tuned"])
    assert len(report.figure("training").data) == 2
    with pytest.raises(BadInput, match="did you mean 'bits'"):
        report.figure("curves", quantity="bit")
    with pytest.raises(BadInput, match="no kind of text"):
        report.figure("curves", text="prose")
    heads = tune_lens(tiny, stream, kind="heads", **{**FAST, "steps": 2})
    marks = heads.figure("curves").data
    assert len(marks) == 3 and all(len(mark.y) == 8 for mark in marks)


# --- the default model ----------------------------------------------------------------------------------------


def test_two_layers_of_the_default_model(smollm: Model) -> None:
    """Fitted on a page of the shipped prose; of so little text a lens of low rank learns most."""
    ids = torch.tensor(smollm.tokenizer(prose()[:4_500])["input_ids"])
    report = tune_lens(
        smollm, ids, layers=[10, 25], rank=8, steps=6, batch_size=128, checks=2, window=32,
        vocabulary=1024, progress=False,
    )  # fmt: skip
    wide = by_lens(report).loc[[10, 25]]
    assert (wide["tuned"] < 0.7 * wide["logit"]).all()
    curve = report.tables["curve"].groupby("layer")
    assert (curve["best_kl"].last() < curve["kl"].first()).all()
