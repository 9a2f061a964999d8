"""Features ablated, steered and patched: exact against plain edits, first-order against slopes, and
along paths against runs in which everything between is frozen by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from circuits.tasks import as_pairs
from interp.data.pairs import Pairs
from interp.errors import BadInput
from interp.models.model import Model
from interp.report import Report
from interp.run.edits import Edit
from interp.sites import Site
from probes.saes.causal import (
    end_logit_diff,
    feature_patching,
    feature_paths,
    patch_features,
    steer,
    zero_features,
)
from probes.saes.model import SAE, SAEConfig
from tests.families import FAMILIES
from tests.ground_truth.induction_model import (
    INDUCTION_HEAD,
    PREVIOUS_TOKEN_HEAD,
    character_tokenizer,
    induction_model,
)
from tests.ground_truth.induction_pairs import induction_pairs
from tests.test_sae_attribute import random_sae, token_sae

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
PAIRS = Pairs.of(
    [[5, 6, 7, 8, 9], [9, 10, 11, 12, 13], [3, 6, 9, 4, 5]],
    [[5, 6, 2, 8, 9], [9, 10, 4, 12, 13], [3, 6, 8, 4, 5]],
    answers=[20, 21, 22],
    wrong=[30, 31, 32],
    positions={"name": [2, 2, 2]},
)


def site_sae(site: str) -> SAE:
    width = {"z.1": 32, "z.0.2": 8, "resid_post.0": 32, "mlp_post.1": 48}[site]
    return SAE(SAEConfig(d_in=width, d_sae=64, k=4, site=site), seed=5)


# --- edits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["z.1", "z.0.2", "resid_post.0", "mlp_post.1"])
def test_changes_of_features_are_changes_along_their_decoder_rows(tiny, site):
    sae, parsed = site_sae(site), Site.parse(site)
    run = tiny.run(IDS, capture=[site])
    x = run.cache[site]
    f = sae.encode(x.flatten(2)).detach()
    feature = int(f[0, 2].argmax())

    def moved(by: Tensor) -> Tensor:
        """Logits after adding `by` units [batch pos] of the feature, plainly."""
        vector = (by[..., None] * sae.W_dec[feature].detach()).reshape(x.shape)
        vector = vector if parsed.head is None else vector[:, :, None]
        return tiny.run(IDS, edits=[Edit.add(site, vector)]).logits

    def changed(edit: Edit) -> Tensor:
        return tiny.run(IDS, edits=[edit]).logits

    same = changed(patch_features(sae, tiny, [feature], f[..., [feature]]))
    assert float((same - run.logits).abs().max()) < 1e-5
    zeroed = changed(zero_features(sae, tiny, [feature]))
    torch.testing.assert_close(zeroed, moved(-f[..., feature]), atol=1e-5, rtol=1e-5)
    assert float((zeroed - run.logits).abs().max()) > 1e-3
    steered = changed(steer(sae, tiny, feature, 2.0, positions=[1]))
    torch.testing.assert_close(
        steered, moved(2.0 * torch.tensor([0, 1, 0, 0]).expand(2, 4)), atol=1e-5, rtol=1e-5
    )
    target = torch.rand(2, 4, 1)
    patched = changed(patch_features(sae, tiny, [feature], target))
    wanted = moved(target[..., 0] - f[..., feature])
    torch.testing.assert_close(patched, wanted, atol=1e-5, rtol=1e-5)


def test_taking_all_features_away_leaves_error_and_bias(tiny):
    sae = random_sae(tiny, "z.1")
    z = tiny.run(IDS, capture=["z.1"]).cache["z.1"]
    rest = z.flatten(2) - sae.encode(z.flatten(2)).detach() @ sae.W_dec.detach()
    plain = tiny.run(IDS, edits=[Edit.patch("z.1", rest.view_as(z))]).logits
    found = tiny.run(IDS, edits=[zero_features(sae, tiny, range(80))]).logits
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


def test_bad_values_are_told(tiny):
    sae = site_sae("z.1")
    with pytest.raises(BadInput, match=r"values of shape \[3\] for 2 features"):
        tiny.run(IDS, edits=[patch_features(sae, tiny, [1, 2], torch.ones(3))])
    with pytest.raises(BadInput, match="no feature 64"):
        steer(sae, tiny, 64, 1.0)


# --- patching ---------------------------------------------------------------------------------------


def metric_of(model: Model, pairs: Pairs, edits: list[Edit]) -> Tensor:
    return end_logit_diff(model.run(pairs.clean, edits=edits).logits[:, -1], pairs)


@pytest.mark.parametrize("site", ["z.0", "z.0.2", "z.1", "resid_post.0"])
def test_effects_are_those_of_plain_runs(tiny, site):
    sae = random_sae(tiny, site) if site.startswith("z") else site_sae(site)
    report = feature_patching(
        tiny, sae, PAIRS, positions=["name", "end", "all"], confirm=1000, progress=False
    )
    table = report.table
    assert set(table["position"]) == {"name", "end", "all"} and table["effect"].notna().all()
    clean = metric_of(tiny, PAIRS, [])
    x, other = (tiny.run(ids, capture=[site]).cache[site] for ids in (PAIRS.clean, PAIRS.corrupted))
    g = sae.encode(other.flatten(2)).detach()
    for row in table[table["part"] == "feature"].iloc[::7].itertuples():
        where = None if row.position == "all" else PAIRS.position(row.position)
        edit = patch_features(sae, tiny, [row.feature], g[..., [row.feature]], positions=where)
        effect = metric_of(tiny, PAIRS, [edit]) - clean
        assert row.effect == pytest.approx(float(effect.mean()), abs=2e-5)
        assert row.sem == pytest.approx(float(effect.std() / 3**0.5), abs=2e-5)
    rest = table.set_index(["part", "position"])
    for position in ("name", "end", "all"):
        where = None if position == "all" else PAIRS.position(position)
        whole = other if Site.parse(site).head is None else other[:, :, None]
        patched = metric_of(
            tiny,
            PAIRS,
            [Edit.add(site, whole - (x if whole is other else x[:, :, None]), positions=where)],
        )
        effect = float((patched - clean).mean())
        assert rest.loc[("site", position), "effect"] == pytest.approx(effect, abs=2e-5)
        # Of what is linear in the change, features and error make up the site.
        slopes = rest["first_order"].loc[(["features", "error"], position)].sum()
        assert slopes == pytest.approx(rest.loc[("site", position), "first_order"], abs=1e-5)
        own = table[(table["part"] == "feature") & (table["position"] == position)]
        both = rest.loc[("features", position), "first_order"]
        assert own["first_order"].sum() == pytest.approx(both, abs=1e-5)
    assert report.meta["clean"] == pytest.approx(float(clean.mean()), abs=1e-5)


def test_the_first_order_estimate_is_the_slope(tiny):
    """A central difference of the metric along each feature's change."""
    sae = random_sae(tiny, "z.0")
    table = feature_patching(tiny, sae, PAIRS, positions=["name"], confirm=0, progress=False).table
    features = table[table["part"] == "feature"]
    assert features["effect"].isna().all()
    x, other = (
        tiny.run(ids, capture=["z.0"]).cache["z.0"].flatten(2)
        for ids in (PAIRS.clean, PAIRS.corrupted)
    )
    change = (sae.encode(other) - sae.encode(x)).detach()
    scale = 0.02
    for row in features.iloc[:5].itertuples():
        vector = change[..., row.feature, None] * sae.W_dec[row.feature].detach()
        ends = [
            metric_of(
                tiny,
                PAIRS,
                [Edit.add("z.0", sign * scale * vector.view(3, 5, 4, 8), positions=[2])],
            ).mean()
            for sign in (1, -1)
        ]
        slope = float(ends[0] - ends[1]) / (2 * scale)
        # float32 logits of a few units, differenced over 0.04
        assert row.first_order == pytest.approx(slope, rel=0.02, abs=3e-4)


@pytest.fixture(scope="module")
def planted() -> Model:
    return Model(induction_model(), character_tokenizer(), id="planted")


def test_the_answers_feature_is_found_and_carries_everything(planted):
    """The induction head's z at the end is one token's feature, of the clean or the corrupted answer."""
    pairs = induction_pairs(6)
    report = feature_patching(
        planted, token_sae(INDUCTION_HEAD), pairs, positions=["end"], confirm=200, progress=False
    )
    table = report.table
    features = table[table["part"] == "feature"]
    tokens = {*pairs.answers[:, 0].tolist(), *pairs.wrong[:, 0].tolist()}
    strong = features[features["effect"].abs() > 0.05]
    assert set(strong["feature"]) == tokens
    site = table[table["part"] == "site"]["effect"].item()
    # The final norm sees all of them at once, so single effects sum only nearly.
    assert features["effect"].sum() == pytest.approx(site, rel=0.2)
    assert report.meta["clean"] + site == pytest.approx(report.meta["corrupted"], abs=1e-3)
    error = table[table["part"] == "error"]["effect"].item()
    assert abs(error) < 0.02 * abs(site)


# --- paths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "granite"])
def test_paths_are_those_of_runs_with_everything_between_frozen(family):
    model = Model(FAMILIES[family](), id=family)
    sender, receiver = random_sae(model, "z.0"), random_sae(model, "z.2", seed=4)
    table = feature_paths(
        model, sender, receiver, PAIRS, senders=range(80), sender_position="name",
        receiver_position="end", confirm=40, progress=False,
    )  # fmt: skip
    assert len(table) > 40 and table["effect"].notna().sum() == 40
    between = ["mlp_write.0", "attn_write.1", "mlp_write.1"]
    clean = model.run(PAIRS.clean, capture=[*between, "z.2", "resid_pre.2"])
    freeze = [Edit.patch(site, clean.cache[site]) for site in between]
    g = sender.encode(model.run(PAIRS.corrupted, capture=["z.0"]).cache["z.0"].flatten(2)).detach()
    f = receiver.encode(clean.cache["z.2"].flatten(2)).detach()
    base = end_logit_diff(clean.logits[:, -1], PAIRS)
    for row in table.iloc[[0, 1, 5, 17, 39]].itertuples():
        edit = patch_features(
            sender, model, [row.sender], g[..., [row.sender]], positions=PAIRS.position("name")
        )
        through = model.run(PAIRS.clean, capture=["z.2"], edits=[edit, *freeze]).cache["z.2"]
        new = receiver.encode(through.flatten(2)).detach()[..., [row.receiver]]
        change = (new[..., 0] - f[..., row.receiver])[:, -1]
        assert row.change == pytest.approx(float(change.mean()), abs=1e-4)
        edit = patch_features(receiver, model, [row.receiver], new, positions=PAIRS.position("end"))
        effect = metric_of(model, PAIRS, [edit]) - base
        assert row.effect == pytest.approx(float(effect.mean()), abs=1e-4)


def test_the_planted_path_is_found(planted):
    """Previous-token features at the target, through the induction head's keys, to the answer's feature."""
    pairs = induction_pairs(6)
    table = feature_paths(
        planted, token_sae(PREVIOUS_TOKEN_HEAD), token_sae(INDUCTION_HEAD), pairs,
        senders=range(58), sender_position="target", confirm=60, progress=False,
    )  # fmt: skip
    before = {int(pairs.clean[i, t - 1]) for i, t in enumerate(pairs.position("target").tolist())}
    best = table.loc[table["effect"].idxmin()]
    assert best["sender"] in before and best["receiver"] in pairs.answers[:, 0].tolist()
    assert best["effect"] < -0.05
    lost = table[table["effect"] < best["effect"] / 2]
    assert set(lost["sender"]) <= before


def test_options_are_checked(tiny):
    first, second = random_sae(tiny, "z.0"), random_sae(tiny, "z.1")
    for options, match in (
        ({"positions": ["nam"]}, "did you mean 'name'"),
        ({"positions": []}, "no positions"),
        ({"features": [80]}, "no feature 80"),
        ({"confirm": -1}, "confirm=-1"),
    ):
        with pytest.raises(BadInput, match=match):
            feature_patching(tiny, first, PAIRS, progress=False, **options)
    with pytest.raises(BadInput, match="a path leads to a later layer"):
        feature_paths(tiny, second, first, PAIRS, senders=[1])
    with pytest.raises(BadInput, match="attention outputs"):
        feature_paths(tiny, site_sae("resid_post.0"), second, PAIRS, senders=[1])


def test_the_report_comes_back_from_disk(tiny, tmp_path):
    report = feature_patching(tiny, random_sae(tiny, "z.0"), PAIRS, confirm=2, progress=False)
    loaded = Report.load(report.save(tmp_path))
    pd.testing.assert_frame_equal(loaded.table, report.table, check_dtype=False)


# --- the default model ------------------------------------------------------------------------------


@pytest.mark.slow
def test_patching_on_ioi_with_the_default_model(smollm):
    pairs = as_pairs(smollm, "ioi", n=4)
    sae = SAE(SAEConfig(576, 1024, k=32, site="z.12", heads=9), seed=1)
    table = feature_patching(
        smollm, sae, pairs, positions=["S2", "end"], confirm=12, progress=False
    ).table
    single = table[(table["part"] == "feature") & table["effect"].notna()]
    assert len(single) == 12
    # Eighteen blocks from here on; the estimate ranks what it has singled out.
    assert np.corrcoef(single["first_order"], single["effect"])[0, 1] > 0.8
    z = smollm.run(pairs.corrupted, capture=["z.12"], logits=False).cache["z.12"]
    base = metric_of(smollm, pairs, [])
    for position in ("S2", "end"):
        edit = Edit.patch("z.12", z, positions=pairs.position(position))
        effect = float((metric_of(smollm, pairs, [edit]) - base).mean())
        row = table[(table["part"] == "site") & (table["position"] == position)]
        assert row["effect"].item() == pytest.approx(effect, abs=2e-3)
