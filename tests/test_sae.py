"""Sparse autoencoders: a planted dictionary is found, sparse gradients are autograd's, training goes
on after a kill as if nothing had happened, and splicing changes only what it says."""

import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import normalize

from interp.data.activations import collect_activations, windows
from interp.errors import BadInput
from interp.metrics import token_loss
from interp.report import Report
from interp.run.batch import Batch
from interp.run.edits import Edit
from interp.run.store import MemoryRows
from probes.saes import evaluate, train
from probes.saes.evaluate import (
    auc,
    density_histogram,
    evaluate_sae,
    loss_recovered,
    reconstruction,
    shuffled,
    sparse_probing,
)
from probes.saes.model import SAE, SAEConfig
from probes.saes.options import Options
from probes.saes.sparse import Codes, batch_top_k, decode, encode_at, top_k
from probes.saes.splice import splice
from probes.saes.train import train_sae
from probes.saes.training import CHECKPOINT, CURVE, Training, geometric_median
from probes.training import Diverged


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(n: int = 30_000, d: int = 32, m: int = 64, active: float = 3) -> tuple[Tensor, Tensor]:
    """(m unit directions [m d], rows that are sparse positive combinations of them plus noise).

    The seed is no autoencoder's: seed 0 would plant the very directions that one starts from.
    """
    g = generator(2718)
    directions = normalize(torch.randn(m, d, generator=g))
    strength = 0.5 + torch.rand(n, m, generator=g)
    f = strength * (torch.rand(n, m, generator=g) < active / m)
    return directions, f @ directions + 0.02 * torch.randn(n, d, generator=g)


def found(sae: SAE, directions: Tensor) -> float:
    """Mean over planted directions of the largest cosine with a decoder row."""
    return float((directions @ normalize(sae.W_dec.detach()).T).max(1).values.mean())


# --- sparse products -------------------------------------------------------------------------------


def dense_reconstruction(sae: SAE, x: Tensor, keep: Tensor, width: int) -> Tensor:
    """The same forward in plain dense torch, active latents given by a mask [rows d_sae]."""
    f = sae.pre_activations(x).relu() * keep
    f = f * (torch.arange(sae.config.d_sae) < width)
    return f @ sae.W_dec + sae.b_dec


@pytest.mark.parametrize("choose", [top_k, batch_top_k])
@pytest.mark.parametrize("prefixes", [(96,), (16, 40, 96)])
def test_sparse_gradients_are_autograds(choose, prefixes):
    g = generator(1)
    sae = SAE(SAEConfig(d_in=24, d_sae=96, k=5), seed=3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))
    x = torch.randn(50, 24, generator=g)
    weight = torch.randn(len(prefixes), 50, 24, generator=g)
    centred = sae.centred(x)
    codes = choose(centred.detach(), sae.encoder.detach(), sae.b_enc.detach(), 5)
    keep = codes.dense() > 0
    results = []
    for sparse in (True, False):
        x_leaf = x.clone().requires_grad_()
        if sparse:
            active = encode_at(sae.centred(x_leaf), sae.encoder, sae.b_enc, codes)
            parts = [active.with_value(active.value * (active.latent < w)) for w in prefixes]
            made = torch.stack([decode(part, sae.W_dec) + sae.b_dec for part in parts])
        else:
            made = torch.stack([dense_reconstruction(sae, x_leaf, keep, w) for w in prefixes])
        leaves = [x_leaf, *sae.parameters()]
        results.append((made, *torch.autograd.grad((weight * made).square().sum(), leaves)))
    for sparse, dense in zip(*results, strict=True):
        # float32 sums in another order; relative to the largest entry
        assert bool((sparse - dense).abs().max() <= 1e-5 * dense.abs().max())


def test_top_k_and_batch_top_k_choose_the_largest():
    g = generator(2)
    x, W, b = torch.randn(40, 8, generator=g), torch.randn(60, 8, generator=g), torch.zeros(60)
    x[0] *= 30  # this row alone has more than 4 k of the batch's largest
    pre = (x @ W.T + b).relu()
    by_row = pre * (pre >= pre.topk(4).values[:, -1:])
    torch.testing.assert_close(top_k(x, W, b, 4).dense(), by_row)
    bar = pre.flatten().topk(4 * 40).values.min()
    torch.testing.assert_close(batch_top_k(x, W, b, 4).dense(), pre * (pre >= bar))
    # Fewer positive pre-activations than are wanted: all of them, and no zeros.
    few = batch_top_k(x, W, torch.full((60,), -60.0), 4)
    assert torch.equal(few.dense() > 0, x @ W.T > 60)
    assert 0 < len(few.value) < 160 and bool((few.value > 0).all())


def test_bfloat16_chooses_and_float32_computes():
    g = generator(3)
    x, W = torch.randn(64, 32, generator=g), torch.randn(128, 32, generator=g)
    b = torch.randn(128, generator=g)
    half, full = (top_k(x, W, b, 8, dtype) for dtype in (torch.bfloat16, torch.float32))
    pre = (x @ W.T + b).relu()
    torch.testing.assert_close(half.value, pre[half.row, half.latent])
    same = (half.dense() > 0) & (full.dense() > 0)
    assert int(same.sum()) > 0.97 * 64 * 8


def test_rows_without_an_active_latent():
    empty = Codes.of_dense(torch.zeros(3, 5))
    assert torch.equal(decode(empty, torch.ones(5, 2)), torch.zeros(3, 2))
    one = Codes.of_dense(torch.tensor([[0.0, 0.0], [0.0, 2.0]]))
    assert decode(one, torch.eye(2)).tolist() == [[0.0, 0.0], [0.0, 2.0]]


# --- the module ------------------------------------------------------------------------------------

KINDS = {
    "relu": {},
    "gated": {},
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "jumprelu": {},
}


def any_sae(kind: str, d_in: int = 12, d_sae: int = 30) -> SAE:
    sae = SAE(SAEConfig(d_in=d_in, d_sae=d_sae, activation=kind, **KINDS[kind]), seed=1)
    g = generator(4)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.rand(parameter.shape, generator=g))
    return sae


@pytest.mark.parametrize("kind", KINDS)
def test_codes_latents_and_leading_axes_agree(kind):
    sae, x = any_sae(kind), torch.randn(4, 7, 12, generator=generator(5))
    f = sae.encode(x)
    codes = sae.codes(x.flatten(0, 1))
    torch.testing.assert_close(codes.dense(), f.flatten(0, 1).detach())
    torch.testing.assert_close(sae.decode(codes).view_as(x), sae(x))
    assert bool((f >= 0).all()) and 0 < float((f > 0).float().mean()) < 1
    if kind == "topk":
        assert int((f > 0).sum(-1).max()) <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_folding_the_input_scale_is_exact(kind):
    sae, folded = any_sae(kind), any_sae(kind)
    x = torch.randn(20, 12, generator=generator(6))
    folded.fold_input_scale(3.0)
    torch.testing.assert_close(folded(x), sae(3.0 * x) / 3.0)
    torch.testing.assert_close(folded.encode(x), sae.encode(3.0 * x) / 3.0)


@pytest.mark.parametrize("kind", ["relu", "gated", "jumprelu"])
def test_folding_decoder_norms_changes_no_reconstruction(kind):
    sae, folded = any_sae(kind), any_sae(kind)
    x = torch.randn(20, 12, generator=generator(7))
    folded.fold_decoder_norms()
    torch.testing.assert_close(folded(x), sae(x))
    assert torch.allclose(folded.W_dec.norm(dim=1), torch.ones(30))
    with pytest.raises(BadInput, match="changes which latents"):
        any_sae("topk").fold_decoder_norms()


def test_impossible_configurations_are_told():
    for options, match in (
        ({"k": 40}, "k=40 latents cannot be active of d_sae=30"),
        ({"k": None}, "needs k"),
        ({"activation": "topkk"}, "did you mean 'topk'"),
        ({"k": 2, "prefixes": (10, 20)}, "the last of prefixes"),
        ({"k": 2, "prefixes": (20, 10, 30)}, "must grow"),
        ({"activation": "relu", "k": None, "prefixes": (10, 30)}, "need 'topk' or 'batchtopk'"),
    ):
        with pytest.raises(BadInput, match=match):
            SAEConfig(d_in=12, d_sae=30, **{"k": 4, **options})


# --- training --------------------------------------------------------------------------------------

SMALL = {"d_sae": 96, "batch_size": 512, "epochs": 8, "lr": 3e-3, "progress": False}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"k": 3}, 0.95),
        ({"k": 3, "init": "data"}, 0.95),
        ({"k": 3, "revive": "resample"}, 0.95),
        ({"k": 3, "precision": "bfloat16"}, 0.95),
        ({"k": 3, "activation": "batchtopk"}, 0.95),
        ({"activation": "relu"}, 0.95),
        ({"activation": "gated", "lr": 1e-2}, 0.95),
        ({"k": 3, "activation": "jumprelu"}, 0.95),
        # A nested dictionary keeps the first 16 latents broad: less is found, still most.
        ({"k": 3, "activation": "batchtopk", "prefixes": (16, 48, 96)}, 0.85),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_planted_dictionary_is_recovered(options, wanted):
    directions, x = planted()
    sae, report = train_sae(x, **{**SMALL, **options})
    assert found(sae, directions) > wanted
    assert report.table["fvu"][0] < 0.25
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(96))
    if "k" in options:
        assert report.table["l0"][0] == pytest.approx(3, rel=0.15)


def test_a_shuffled_control_is_not_recovered():
    """Every coordinate in an order of its own: the same marginals, no directions."""
    directions, x = planted()
    g = generator(8)
    apart = torch.stack([column[torch.randperm(len(x), generator=g)] for column in x.T], dim=1)
    sae, _ = train_sae(apart, k=3, **SMALL)
    assert found(sae, directions) < 0.6
    sae, _ = train_sae(x, k=3, **SMALL)
    assert found(shuffled(sae), directions) < 0.6
    fvu = [reconstruction(s, MemoryRows(x))[0]["fvu"] for s in (sae, shuffled(sae))]
    assert fvu[0] < 0.25 < fvu[1]


def test_dead_latents_are_revived():
    """Half of the latents begin so far below zero that none of them is ever active."""
    _, x = planted(8000)
    dead = {}
    for revive in ("none", "auxk", "resample"):
        config = SAEConfig(d_in=32, d_sae=96, k=3)
        options = Options(
            rows=80_000, batch_size=400, lr=1e-2, warmup=0, decay=0.2, sparsity=0, init="random",
            encoder_scale=0.1, revive=revive, aux=1 / 32, dead_after=4000, precision="float32", seed=0,
        )  # fmt: skip
        training = Training(config, options, MemoryRows(x))
        with torch.no_grad():
            training.sae.b_enc[:48] = -2.0
        for epoch in range(10):
            for batch in training.source.batches(400, epoch=epoch):
                training.step(batch)
        numbers, _ = reconstruction(training.finished(), MemoryRows(x))
        dead[revive] = numbers["dead"]
    assert dead["none"] >= 0.5
    assert dead["auxk"] < 0.35 and dead["resample"] < 0.2


def test_the_same_seed_gives_the_same_curve():
    _, x = planted(4000)
    options = {**SMALL, "epochs": 1, "k": 3}
    curves = [train_sae(x, seed=seed, **options)[1].tables["curve"] for seed in (0, 0, 1)]
    assert curves[0].equals(curves[1]) and not curves[0].equals(curves[2])
    assert list(curves[0]) == list(CURVE) and len(curves[0]) == 7


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from probes.saes.train import train_sae
from probes.saes.training import Training
torch.set_num_threads(1)
step = Training.step
def dying(self, batch):
    if self.done == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, batch)
Training.step = dying
options = eval(sys.argv[3])
train_sae(torch.load(sys.argv[1]), checkpoint=Path(sys.argv[2]), **options)
"""


@pytest.mark.parametrize("revive", ["auxk", "resample"])
def test_killed_training_goes_on_with_the_same_curve(tmp_path, revive):
    """Thirty steps, killed in the eighteenth; the last checkpoint is of the fourteenth."""
    _, x = planted(2050)
    torch.save(x, tmp_path / "x.pt")
    options = {"k": 3, "d_sae": 96, "batch_size": 200, "epochs": 3, "dead_after": 1000}
    options |= {"revive": revive, "checkpoint_every": 7, "progress": False}
    line = [sys.executable, "-c", KILLED, str(tmp_path / "x.pt"), str(tmp_path / "kept")]
    done = subprocess.run([*line, repr(options)], check=False)
    assert done.returncode == -signal.SIGKILL
    whole_sae, whole = train_sae(x, **options)
    sae, report = train_sae(x, checkpoint=tmp_path / "kept", resume=True, **options)
    assert len(whole.tables["curve"]) == 30
    assert report.tables["curve"].equals(whole.tables["curve"])
    assert torch.equal(sae.W_dec, whole_sae.W_dec)
    assert whole.tables["curve"]["dead"].max() > 0  # or nothing would have been revived


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    _, x = planted(1000)
    options = {**SMALL, "epochs": 1, "k": 3, "checkpoint": tmp_path}
    train_sae(x, **options)
    with pytest.raises(BadInput, match=r"cannot resume .* it was made with lr=0\.003, now 0\.002"):
        train_sae(x, **{**options, "lr": 2e-3, "resume": True})
    (tmp_path / CHECKPOINT).write_bytes(b"nothing")
    with pytest.raises(BadInput, match="is damaged"):
        train_sae(x, **{**options, "resume": True})


def test_a_loss_that_is_not_a_number_keeps_the_last_checkpoint(tmp_path):
    _, x = planted(4096)

    class Turning(MemoryRows):
        def batches(self, size, **options):
            for i, batch in enumerate(super().batches(size, **options)):
                yield batch * (torch.nan if i == 5 and options.get("epoch") == 0 else 1.0)

    options = {**SMALL, "epochs": 1, "k": 3, "checkpoint": tmp_path, "checkpoint_every": 2}
    with pytest.raises(
        Diverged, match=r"loss of step 6 is nan; the last good checkpoint is .*smaller lr"
    ):
        train_sae(Turning(x), **options)
    from safetensors import safe_open

    with safe_open(tmp_path / CHECKPOINT, "pt") as file:
        assert file.metadata()["done"] == "4"
        assert bool(file.get_tensor("sae.W_dec").isfinite().all())
    with pytest.raises(Diverged, match="no checkpoint was kept"):
        train_sae(Turning(x), **{**options, "checkpoint": None})


def test_bad_options_are_told_before_training(monkeypatch):
    _, x = planted(100)
    for options, match in (
        ({"k": 300}, "k=300 latents cannot be active"),
        ({"init": "dat"}, "did you mean 'data'"),
        ({"revive": "aux"}, "did you mean 'auxk'"),
        ({"precision": "float16"}, "no precision 'float16'"),
        ({"warmup": 0.9}, "at most 1 together"),
        ({"epochs": 0}, "must be above 0"),
    ):
        with pytest.raises(BadInput, match=match):
            train_sae(x, **{**SMALL, **options})
    with pytest.raises(BadInput, match="all the same, or not all numbers"):
        train_sae(torch.ones(10, 4), k=1)
    with pytest.raises(BadInput, match="at least 2"):
        train_sae(torch.ones(1, 4), k=1)
    monkeypatch.setattr(train, "_free_memory", lambda: 10_000_000_000)
    with pytest.raises(BadInput, match=r"takes about 34\d\.\d GB, 10\.0 GB are free: .*d_sae"):
        train_sae(torch.randn(10, 576), d_sae=10_000_000, k=32)


def test_the_memory_estimate_is_near_what_training_takes():
    """Weights, gradients and moments are most of it: counted here from the tensors themselves."""
    config = SAEConfig(d_in=64, d_sae=4096, k=8)
    x = torch.randn(512, 64, generator=generator())
    options = {"d_sae": 4096, "k": 8, "batch_size": 256, "epochs": 1, "progress": False}
    _, report = train_sae(x, **options)
    kept = 4 * (2 * 4096 * 64) * 4  # weights, gradients, two moments
    needed = train.memory_needed(config, 256)
    assert kept < needed < 6 * kept
    assert report.meta["memory_estimate_mb"] == round(needed / 1e6)


def test_the_median_is_not_moved_by_an_outlier():
    x = torch.randn(200, 5, generator=generator())
    x[0] = 1e6
    assert float(geometric_median(x).norm()) < 0.3 < float(x.mean(0).norm())


# --- evaluation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_reconstruction_is_what_plain_sums_give(kind, monkeypatch):
    monkeypatch.setattr(evaluate, "ROWS", 17)
    sae, x = any_sae(kind), torch.randn(60, 12, generator=generator(9)) + 1
    numbers, density = reconstruction(sae, MemoryRows(x))
    with torch.no_grad():
        f, made = sae.encode(x), sae(x)
    fvu = float((x - made).square().sum() / (x - x.mean(0)).square().sum())
    assert numbers["fvu"] == pytest.approx(fvu, rel=1e-5)
    assert numbers["l0"] == pytest.approx(float((f > 0).float().sum(-1).mean()))
    np.testing.assert_allclose(density, (f > 0).double().mean(0))
    assert numbers["dead"] == pytest.approx(float((~(f > 0).any(0)).float().mean()))
    assert numbers["dense"] == pytest.approx(float((density > 0.1).mean()))
    assert density_histogram(density)["latents"].sum() == 30


def identity_sae(d: int, **origin) -> SAE:
    """x = relu(x) − relu(−x): an SAE that loses nothing."""
    sae = SAE(SAEConfig(d_in=d, d_sae=2 * d, activation="relu", **origin))
    with torch.no_grad():
        sae.encoder.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
        sae.W_dec.copy_(sae.encoder)
    return sae


@pytest.fixture
def activations(tiny, tmp_path):
    g = generator(10)
    text = [torch.randint(3, 15, (20 + n,), generator=g) for n in range(24)]
    return collect_activations(
        tiny,
        text,
        tmp_path,
        site="z.1",
        tokens=480,
        held_out=0.3,
        context=24,
        dtype="float32",
        progress=False,
    )


ORIGIN = {"site": "z.1", "heads": 4}


def test_loss_recovered_has_its_two_ends(tiny, activations):
    store = activations.held_out
    table = loss_recovered(tiny, identity_sae(32, **ORIGIN), store, progress=False)
    table = table.set_index("condition")
    assert table.loc["sae", "increase"] == pytest.approx(0, abs=1e-5)
    for name in ("zero", "mean"):
        assert abs(table.loc[name, "increase"]) > 1e-3
        assert table.loc["sae", f"recovered_vs_{name}"] == pytest.approx(1, abs=1e-2)
    nothing = SAE(SAEConfig(d_in=32, d_sae=4, activation="relu", **ORIGIN))
    with torch.no_grad():
        nothing.encoder.zero_()
    found = loss_recovered(tiny, nothing, store, progress=False).set_index("condition")
    assert found.loc["sae", "recovered_vs_zero"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        nothing.b_dec.copy_(store.rows(torch.arange(store.n_rows)).mean(0))
    found = loss_recovered(tiny, nothing, store, progress=False).set_index("condition")
    assert found.loc["sae", "recovered_vs_mean"] == pytest.approx(0, abs=1e-4)


def test_the_clean_loss_is_the_models_own(tiny, activations):
    store = activations.held_out
    table = loss_recovered(tiny, identity_sae(32, **ORIGIN), store, progress=False)
    losses = []
    for ids in windows(store):
        logits = tiny.run(ids[None]).logits
        losses.append(
            token_loss(logits[:, :-1], ids[None, 1:])[0, 1:]
        )  # not what the lead predicts
    every = torch.cat(losses)
    assert table["tokens"][0] == len(every)
    assert table["loss"][0] == pytest.approx(float(every.mean()), abs=1e-5)


def test_probing_finds_a_latent_that_is_a_token_and_the_controls_do_not(activations):
    """Rows are replaced by a random direction of the current token, which is one latent, and noise."""
    directions = normalize(torch.randn(97, 32, generator=generator(12)))
    for store in (activations.train, activations.held_out):
        table = evaluate.origins(store, torch.arange(store.n_rows))
        rows = directions[torch.tensor(table["token_id"].tolist())]
        rows = rows + 0.1 * torch.randn(rows.shape, generator=generator(13))
        store.rows = lambda where, rows=rows: rows[where]
    sae = SAE(SAEConfig(d_in=32, d_sae=97, k=1, **ORIGIN))
    with torch.no_grad():
        sae.encoder.copy_(directions)
        sae.W_dec.copy_(directions)
    table = sparse_probing(sae, activations.train, activations.held_out, tasks=8, latents=(1,))
    means = table.groupby([table["task"].str.split().str[0], "representation"])["auc"].mean()
    assert means["current", "sae"] > 0.99
    assert means["current", "activation"] < 0.97 and means["current", "shuffled sae"] < 0.8
    # Tokens are drawn independently: the previous one cannot be told.
    assert means["previous"].max() < 0.75


def test_auc_is_scikit_learns():
    g = generator(11)
    label = torch.rand(200, generator=g) < 0.3
    score = (torch.randn(200, generator=g) + label).round(decimals=1)  # with ties
    assert auc(score, label) == pytest.approx(roc_auc_score(label, score))


def test_everything_at_once_comes_back_from_disk(tiny, activations, tmp_path):
    sae, report = train_sae(activations, d_sae=64, k=4, batch_size=100, progress=False)
    assert report.table["rows_of"][0] == "held-out documents"
    assert sae.config.site == "z.1" and sae.config.heads == 4 and sae.config.model == "tiny"
    judged = evaluate_sae(tiny, sae, activations, tasks=4, progress=False)
    assert judged.table["fvu"][0] < judged.table["fvu"][1]
    assert set(judged.tables) == {"sae_eval", "loss", "probing", "histogram"}
    for made in (report, judged):
        loaded = Report.load(made.save(tmp_path / made.analysis))
        assert loaded.meta["model"]["sha256"] == sae.config.sha256
        for name, table in made.tables.items():
            pd.testing.assert_frame_equal(loaded.tables[name], table, check_dtype=False)


# --- splicing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["z.1", "z.0.2", "resid_post.0", "mlp_post.1"])
def test_splicing_with_the_error_kept_changes_no_logit(tiny, site):
    width = {"z.1": 32, "z.0.2": 8, "resid_post.0": 32, "mlp_post.1": 48}[site]
    sae = SAE(SAEConfig(d_in=width, d_sae=64, k=4, site=site), seed=5)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    clean = tiny.run(ids).logits
    kept = tiny.run(ids, edits=[splice(sae, tiny, keep_error=True)]).logits
    assert float((kept - clean).abs().max()) < 1e-5
    spliced = tiny.run(ids, edits=[splice(sae, tiny)]).logits
    assert float((spliced - clean).abs().max()) > 1e-3


def test_splicing_puts_the_reconstruction_there(tiny):
    sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="z.1", heads=4), seed=5)
    ids = torch.tensor([[5, 6, 7, 8]])
    z = tiny.run(ids, capture=["z.1"]).cache["z.1"]
    made = sae(z.flatten(-2)).view_as(z).detach()
    patched = tiny.run(ids, edits=[Edit.patch("z.1", made)]).logits
    torch.testing.assert_close(tiny.run(ids, edits=[splice(sae, tiny)]).logits, patched)
    # A latent that is ablated with the error kept takes f W_dec away, and nothing else.
    f = sae.encode(z.flatten(-2)).detach()
    latent = int(f[0, -1].argmax())
    mask = torch.ones(64).index_fill(0, torch.tensor([latent]), 0.0)
    without = z - (f[..., latent, None] * sae.W_dec[latent].detach()).view_as(z)
    patched = tiny.run(ids, edits=[Edit.patch("z.1", without)]).logits
    ablated = splice(sae, tiny, change=lambda f, seen: f * mask, keep_error=True)
    torch.testing.assert_close(tiny.run(ids, edits=[ablated]).logits, patched, atol=1e-5, rtol=1e-5)


def test_splicing_spares_positions(tiny):
    sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="z.1", heads=4), seed=5)
    batch = Batch.of_ids(torch.tensor([[5, 6, 7, 8]]))
    where = torch.tensor([[False, False, True, True]])
    clean, spliced = (
        tiny.run(batch, edits=edits).logits for edits in ([], [splice(sae, tiny, positions=where)])
    )
    assert torch.equal(clean[:, :2], spliced[:, :2])
    assert not torch.allclose(clean[:, 2:], spliced[:, 2:])


def test_an_sae_of_another_model_or_site_is_refused(tiny, tiny_model, activations):
    def sae(**changed):
        options = {"d_in": 32, "d_sae": 64, "k": 4, "site": "z.1", "heads": 4, **changed}
        return SAE(SAEConfig(**options))

    hash_ = activations.train.key["model"]["sha256"]
    assert sae(sha256=hash_).site(tiny).layer == 1
    for made, match in (
        (sae(d_in=48, heads=6), "reads 48 numbers of 6 heads at 'z.1'.*has 32 of 4 heads"),
        (sae(heads=8), "32 numbers of 8 heads"),
        (sae(site="z.7"), "layers 0 to 1"),
        (sae(site=""), "does not say its site"),
        (sae(sha256="0" * 64), "was trained on .* with weights 0000"),
    ):
        with pytest.raises(BadInput, match=match):
            splice(made, tiny)
    with pytest.raises(BadInput, match="was trained on"):
        splice(sae(sha256=hash_), tiny_model(seed=1))
    with pytest.raises(BadInput, match=r"has site z\.0, the activations .* have z\.1"):
        loss_recovered(tiny, sae(site="z.0"), activations.held_out, progress=False)
    with pytest.raises(BadInput, match="rows have width 32, this SAE reads 12"):
        reconstruction(any_sae("topk"), activations.held_out)
