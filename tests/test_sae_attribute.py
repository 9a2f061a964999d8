"""Attributions of SAE features sum to what they explain, on models of every kind of attention, and
planted features get the heads, sources, tokens and families that were planted."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from circuits.attribution import direct_contributions
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.run.batch import Batch
from interp.sites import Site
from probes.saes.attribute import active_parts, direct_feature_attribution, head_weights, top_heads
from probes.saes.contributions import feature_contributions
from probes.saes.families import _shuffled, feature_families, head_polysemanticity
from probes.saes.model import SAE, SAEConfig
from probes.saes.prefix import prefix_induction, prefix_kinds, prefix_prompts
from probes.saes.upstream import recursive_attribution
from probes.saes.written import feature_logits, top_tokens
from tests.families import FAMILIES
from tests.ground_truth.blank import slot
from tests.ground_truth.induction_model import (
    D_MODEL,
    D_VOCAB,
    INDUCTION_HEAD,
    N_CTX,
    N_HEADS,
    POSITION,
    PREDICTION,
    PREVIOUS,
    PREVIOUS_TOKEN_HEAD,
    TOKEN,
    _head,
    character_tokenizer,
    induction_model,
)

IDS = torch.tensor([[5, 6, 7, 8, 5, 6, 9, 3], [9, 10, 11, 12, 13, 9, 10, 4]])
KINDS = {"relu": {}, "gated": {}, "topk": {"k": 6}, "batchtopk": {"k": 6}, "jumprelu": {}}


def random_sae(model: Model, site: str, kind: str = "topk", d_sae: int = 80, seed: int = 3) -> SAE:
    """Random weights, biases included, of the right shape."""
    layer, head = Site.parse(site).layer, Site.parse(site).head
    block = model.spec.blocks[layer]
    heads = block.n_heads if head is None else 0
    d_in = block.d_head * max(heads, 1)
    config = SAEConfig(d_in, d_sae, kind, site=site, heads=heads, **KINDS[kind])
    sae = SAE(config, seed=seed)
    g = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=g))
        if kind in ("jumprelu", "batchtopk"):
            sae.threshold.abs_()
    return sae


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal to float32 sums in another order, relative to the largest entry."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max() + 1e-7)


# --- by weights ------------------------------------------------------------------------------------


def test_head_weights_are_what_was_planted():
    sae = SAE(SAEConfig(d_in=12, d_sae=3, k=1, site="z.0", heads=3))
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.W_dec[0, 4:8] = 1.0  # all of it in head 1
        sae.W_dec[1, :8] = torch.tensor([3.0, 4, 0, 0, 0, 0, 0, 15])
    weights = head_weights(sae)
    assert weights.tolist() == [[0, 1, 0], [0.25, 0.75, 0], [0, 0, 0]]
    table = top_heads(sae, [1], k=2)
    assert table["head"].tolist() == [1, 0] and table["weight"].tolist() == [0.75, 0.25]
    with pytest.raises(BadInput, match="how many heads"):
        head_weights(SAE(SAEConfig(d_in=12, d_sae=3, k=1, site="z.0")))


# --- direct feature attribution ---------------------------------------------------------------------

# Grouped heads, one pattern of sinks, fused projections, soft-capped sliding windows, latent
# attention, learned positions: v reaches z in the same way in all of them.
ATTENTIONS = ["llama", "gpt2", "gemma2", "gpt_oss", "gpt_bigcode", "deepseek_v3", "gpt_neox"]


@pytest.mark.parametrize("family", ATTENTIONS)
def test_parts_and_biases_sum_to_the_pre_activation(family):
    model = Model(FAMILIES[family](), id=family)
    sae = random_sae(model, "z.1")
    features = [0, 7, 33]
    found = direct_feature_attribution(model, sae, IDS, features)
    z = model.run(IDS, capture=["z.1"]).cache["z.1"].flatten(2)
    pre = sae.pre_activations(z)[..., features].detach()
    assert close(found.total, pre.permute(0, 2, 1))
    assert found.parts.shape == (2, 3, 8, 4, 8)
    assert close(found.parts.sum(3), found.by_source) and close(found.parts.sum(4), found.by_head)
    # A causal model reads nothing that comes later.
    later = torch.ones(8, 8).triu(1).bool()
    assert float(found.by_source[:, :, later].abs().max()) == 0


def test_parts_are_those_of_the_naive_route(tiny):
    """z's terms formed one by one, [batch target source n_heads · d_head], then encoded."""
    sae = random_sae(tiny, "z.1")
    cache = tiny.run(IDS, capture=["v", "pattern"]).cache
    v = cache["v.1"].repeat_interleave(2, dim=2)  # two query heads read one key/value head
    terms = torch.einsum("bhts,bshd->btshd", cache["pattern.1"], v)
    for features in ([11], [11, 4, 60]):
        plain = torch.einsum("btshd,fhd->bfths", terms, sae.encoder[features].view(-1, 4, 8))
        found = direct_feature_attribution(tiny, sae, IDS, features)
        assert close(found.parts, plain.detach())
        assert close(found.by_source, plain.detach().sum(3))


def test_targets_and_single_heads_and_padding(tiny):
    whole = random_sae(tiny, "z.1")
    every = direct_feature_attribution(tiny, whole, IDS, [2, 5])
    same = direct_feature_attribution(tiny, whole, IDS, [2, 5], targets=[3, 7])
    assert torch.equal(same.by_source, every.by_source[:, :, [3, 7]])
    own = direct_feature_attribution(tiny, whole, IDS, [2, 5], targets=torch.tensor([4, 6]))
    assert torch.equal(own.parts[1, :, 0], every.parts[1, :, 6])
    one = random_sae(tiny, "z.1.3")
    found = direct_feature_attribution(tiny, one, IDS, [2])
    z = tiny.run(IDS, capture=["z.1.3"]).cache["z.1.3"]
    assert found.heads == (3,) and close(found.total[:, 0], one.pre_activations(z)[..., 2].detach())
    mask = torch.ones_like(IDS).bool()
    mask[0, :3] = False
    padded = direct_feature_attribution(tiny, whole, Batch.of_ids(IDS, mask), [2], targets=[7])
    short = direct_feature_attribution(tiny, whole, IDS[:1, 3:], [2], targets=[4])
    assert close(padded.parts[0, ..., 3:], short.parts[0])
    assert float(padded.parts[0, ..., :3].abs().max()) == 0


def test_wrong_sites_features_and_positions_are_told(tiny):
    sae = random_sae(tiny, "z.1")
    stream = SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="resid_post.0"))
    for options, match in (
        ({"sae": stream, "features": [1]}, "attention outputs, such as 'z.12'"),
        ({"features": [80]}, "no feature 80: this SAE has features 0 to 79"),
        ({"features": []}, "at least one"),
        ({"features": [1], "targets": [8]}, "target position 8 .* 0 to 7"),
        ({"features": [1], "targets": torch.tensor([1])}, "for each of 2 prompts"),
    ):
        with pytest.raises(BadInput, match=match):
            direct_feature_attribution(tiny, options.pop("sae", sae), IDS, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_active_parts_are_the_dense_ones_where_features_are_active(tiny, kind):
    sae = random_sae(tiny, "z.1", kind)
    z = tiny.run(IDS, capture=["z.1"]).cache["z.1"].flatten(2)
    f = sae.encode(z).detach()
    some = torch.arange(0, 80, 2)
    dense = direct_feature_attribution(tiny, sae, IDS, range(80)).by_source
    rows = list(active_parts(tiny, sae, Batch.of_ids(IDS), some, place=(1, (0, 1, 2, 3)), lead=1))
    assert len(rows) == 2
    for row, (place, latent, value, by_source) in enumerate(rows):
        expected = f[row].clone()
        expected[0], expected[:, 1::2] = 0, 0
        assert len(place) == int((expected > 0).sum()) > 0
        assert close(value, expected[place, latent])
        assert close(by_source, dense[row][latent, place])


# --- what a feature writes --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite", "gpt_neox"])
def test_features_error_and_bias_sum_to_every_heads_attribution(family):
    model = Model(FAMILIES[family](), id=family)
    answers, wrong = torch.tensor([3, 4]), torch.tensor([20, 21])
    expected = direct_contributions(model, IDS, answer=answers, instead=wrong).heads
    for site in ("z.1", "z.1.2", "z.2"):
        sae = random_sae(model, site)
        found = feature_contributions(model, sae, IDS, answer=answers, instead=wrong)
        heads = expected[:, Site.parse(site).layer]
        heads = heads if site != "z.1.2" else heads[:, 2:3]
        assert close(found.heads, heads, 1e-4)  # two orders of products with W_O
        assert close(found.total, found.heads)
        table = found.table()
        sums = table.groupby("prompt")["contribution"].sum()
        np.testing.assert_allclose(sums, found.heads.sum(1), rtol=1e-4, atol=1e-5)
        assert set(table["part"]) == {"feature", "error", "bias"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite"])
def test_feature_logits_are_the_contributions_of_a_unit_times_sigma(family):
    """For every feature and prompt, contribution = activation · effect / σ, one σ a prompt."""
    model = Model(FAMILIES[family](), id=family)
    sae = random_sae(model, "z.2")
    found = feature_contributions(model, sae, IDS, answer=3)
    codes = found.codes
    active = codes.value > 0
    effect = feature_logits(model, sae, codes.latent)[:, 3] * codes.value
    ratio = (effect / found.features.sum(1))[active]
    for prompt in (0, 1):
        sigma = ratio[codes.row[active] == prompt]
        assert float(sigma.median()) > 0
        torch.testing.assert_close(sigma, sigma.median().expand_as(sigma), rtol=2e-3, atol=0)


def test_top_tokens_are_the_ends_of_the_order(tiny):
    sae = random_sae(tiny, "z.1")
    logits = feature_logits(tiny, sae, [4, 9])
    table = top_tokens(tiny, sae, [4, 9], k=3)
    assert table["feature"].tolist() == [4] * 6 + [9] * 6
    for i, feature in enumerate((4, 9)):
        order = logits[i].argsort()
        own = table[table["feature"] == feature]
        assert own[own["side"] == "up"]["token_id"].tolist() == order.flip(0)[:3].tolist()
        assert own[own["side"] == "down"]["token_id"].tolist() == order[:3].tolist()
        np.testing.assert_allclose(own["logit"], logits[i, own["token_id"].tolist()])
    assert table["token"].tolist() == [f"#{i}" for i in table["token_id"]]


# --- recursive attribution --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma2", "olmo2", "granite", "gpt_neox", "qwen2"]
)
def test_recursive_attribution_sums_to_the_direct_one_by_source(family):
    model = Model(FAMILIES[family](), id=family)
    sae, first = random_sae(model, "z.2"), random_sae(model, "z.0", seed=8)
    upstream = [first, random_sae(model, "z.1.2", "relu", seed=9)]
    ids = IDS[:1]
    direct = direct_feature_attribution(model, sae, ids, [7], targets=[6])
    for saes in ([], upstream):
        table = recursive_attribution(model, sae, ids, 7, position=6, upstream=saes)
        sums = table[table["component"] != "encoder_bias"].groupby("source")["contribution"].sum()
        assert int(sums.index.max()) == 6  # what stands later is not read
        sums = sums.reindex(range(8), fill_value=0.0)
        # float32 through three blocks, relative to the largest source
        wanted = direct.by_source[0, 0, 0]
        assert close(torch.tensor(sums.to_numpy()).float(), wanted, 1e-4), family
        assert table["contribution"].sum() == pytest.approx(float(direct.total), rel=1e-3, abs=1e-4)
    has_sae = table[table["layer"] == 0]
    assert not (has_sae["component"] == "head").any()
    assert {"feature", "error", "sae_bias", "attn_bias", "mlp"} <= set(has_sae["component"])
    assert set(table[table["component"] == "head"].query("layer == 1")["head"]) == {0, 1, 3}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_under_a_feature_sum_to_it(kind):
    model = Model(FAMILIES["llama"](), id="llama")
    saes = [random_sae(model, f"z.{layer}", kind, seed=layer) for layer in range(3)]
    table = recursive_attribution(model, saes[2], IDS[:1], 7, upstream=saes[:2], depth=3, branch=2)
    parents = table.groupby("parent")["contribution"].sum().drop(-1)
    assert set(table["depth"]) == {1, 2, 3} and len(parents) >= 4
    for parent, total in parents.items():
        row = table.loc[parent]
        assert row["component"] == "feature"
        assert total == pytest.approx(row["contribution"], rel=1e-3, abs=1e-5)
    children = table[table["parent"] == parents.index[0]]
    assert (children["target"] == table.loc[parents.index[0], "source"]).all()
    assert (children["source"] <= children["target"]).all()


def test_recursion_is_refused_where_v_is_not_linear_in_the_stream():
    model = Model(FAMILIES["deepseek_v3"](), id="latent")
    with pytest.raises(Refused, match="layer 1 of latent: v is"):
        recursive_attribution(model, random_sae(model, "z.1"), IDS[:1], 7)


def test_recursion_checks_what_it_is_given(tiny):
    sae, early = random_sae(tiny, "z.1"), random_sae(tiny, "z.0")
    for options, match in (
        ({"prompt": IDS}, "2 prompts were given"),
        ({"upstream": [sae]}, "upstream SAE of layer 1"),
        ({"upstream": [early, early]}, "two upstream SAEs are of layer 0"),
        ({"position": 8}, "position 8 is not in a prompt of 8 tokens"),
        ({"depth": 0}, "at least 1"),
    ):
        with pytest.raises(BadInput, match=match):
            recursive_attribution(tiny, sae, feature=7, **{"prompt": IDS[:1], **options})


# --- families ---------------------------------------------------------------------------------------

D_HEAD = D_MODEL // N_HEADS


def token_sae(head: tuple[int, int], above: float = 0.1) -> SAE:
    """Feature i is how much of token i the head has copied into its z; all of it is about 20."""
    config = SAEConfig(D_MODEL, D_VOCAB, "relu", site=f"z.{head[0]}", heads=N_HEADS)
    sae = SAE(config)
    with torch.no_grad():
        sae.encoder.zero_()
        i = torch.arange(D_VOCAB)
        sae.encoder[i, head[1] * D_HEAD + i] = 1.0
        sae.W_dec.copy_(sae.encoder)
        sae.b_enc.fill_(-above)
    return sae


@pytest.fixture(scope="module")
def planted() -> Model:
    """The induction model, and beside it a head of the second layer that attends evenly to everything."""
    module = induction_model()
    tokens = torch.arange(D_VOCAB)
    v = module.transformer.h[1].attn.c_attn.weight[:, 2 * D_MODEL :]
    with torch.no_grad():
        v[:, 0 * D_HEAD + tokens] = slot(TOKEN, D_VOCAB, D_MODEL).T
    return Model(module, character_tokenizer(), id="planted")


def random_tokens(repeat: bool, n: int = 6, length: int = 25) -> Tensor:
    g = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(n):
        drawn = torch.randperm(D_VOCAB - 2, generator=g)[: 2 * length] + 2
        rows.append(torch.cat([torch.zeros(1).long(), drawn[:length]]))
        rows[-1] = torch.cat([rows[-1], drawn[:length] if repeat else drawn[length:]])
    return torch.stack(rows)


def test_planted_features_get_their_families(planted):
    ids = random_tokens(repeat=True, n=16)
    for head, family in (
        (PREVIOUS_TOKEN_HEAD, "local"),
        (INDUCTION_HEAD, "induction"),
        ((1, 0), "long_range"),
    ):
        # Where it finds nothing the induction head attends evenly: not active on that.
        sae = token_sae(head, above=5.0 if head == INDUCTION_HEAD else 0.1)
        table = feature_families(planted, sae, ids)
        named = table[table["feature"] > 0]  # BOS itself is read as the lead token
        # A token that stands beside its copy by chance is read locally.
        assert (named["family"] == family).mean() > 0.9, family
        assert named[family].mean() > 0.6
        shares = table[["induction", "local", "long_range", "lead"]].sum(axis=1)
        np.testing.assert_allclose(shares, 1, rtol=1e-6)
    # With nothing repeated, nothing is induction.
    table = feature_families(planted, token_sae(INDUCTION_HEAD), random_tokens(repeat=False))
    assert not (table["family"] == "induction").any() and table["possible"].max() == 0
    missing = feature_families(planted, token_sae(INDUCTION_HEAD), ids, [0, 1, 5])
    assert missing["feature"].tolist() == [0, 1, 5]
    assert missing["family"].tolist()[1] == "inactive"  # <unk> is in no prompt


def test_padding_changes_no_family(tiny):
    """A prompt of its own, and padded on the left beside a longer one."""
    g = torch.Generator().manual_seed(6)
    ids = torch.randint(3, 12, (2, 30), generator=g)
    mask = torch.ones_like(ids).bool()
    mask[0, :9] = False
    sae = random_sae(tiny, "z.1")
    together = feature_families(tiny, sae, Batch.of_ids(ids, mask))
    apart = [feature_families(tiny, sae, ids[:1, 9:]), feature_families(tiny, sae, ids[1:])]
    counts = pd.concat(apart).groupby("feature")["n"].sum()
    assert together["n"].tolist() == counts.tolist()
    alone = apart[0].set_index("feature").drop(apart[1]["feature"], errors="ignore")
    assert len(alone) > 3
    same = together.set_index("feature").loc[alone.index]
    pd.testing.assert_frame_equal(same, alone, rtol=1e-3, atol=1e-4)


def test_the_null_of_shuffled_positions_is_that_of_real_shuffles():
    g = torch.Generator().manual_seed(2)
    mass = torch.rand(1, 12, generator=g).double() ** 3
    pool = torch.ones(1, 12).bool()
    pool[0, :3] = False
    kind = torch.zeros(1, 12).bool()
    kind[0, [4, 7, 8]] = True
    mean, variance = _shuffled(mass, kind, pool)
    places = pool[0].nonzero()[:, 0]
    drawn = []
    for _ in range(20_000):
        shuffled = mass[0].clone()
        shuffled[places] = mass[0, places[torch.randperm(9, generator=g)]]
        drawn.append(shuffled[kind[0]].sum())
    drawn = torch.stack(drawn)
    # standard errors of 20,000 draws: 0.7 % of a deviation, 1 % of a variance
    assert float(mean) == pytest.approx(float(drawn.mean()), abs=0.03 * float(drawn.std()))
    assert float(variance) == pytest.approx(float(drawn.var()), rel=0.05)


def test_a_head_whose_features_agree_is_told_from_one_whose_features_do_not(tiny):
    """Ten features of head 0 write one direction, those of the other heads each its own."""
    g = torch.Generator().manual_seed(4)
    sae = random_sae(tiny, "z.1", d_sae=60)
    with torch.no_grad():
        sae.W_dec.zero_()
        one = torch.randn(8, generator=g)
        sae.W_dec[:10, :8] = one + 0.2 * torch.randn(10, 8, generator=g)
        for head in (1, 2, 3):
            rows = slice(15 * head - 5, 15 * head + 10)
            sae.W_dec[rows, 8 * head : 8 * head + 8] = torch.randn(15, 8, generator=g)
    table = head_polysemanticity(tiny, sae).set_index("head")
    assert table["kind"].tolist() == ["one kind"] + 3 * ["several kinds"]
    assert sorted(table.loc[0, "features"]) == list(range(10))
    assert table.loc[0, "agreement"] > 0.8 and table.loc[0, "p"] < 0.01
    # The cosines are those of the logit vectors themselves.
    logits = feature_logits(tiny, sae, range(10))
    unit = normalize(logits - logits.mean(1, keepdim=True))
    pairs = (unit @ unit.T)[torch.ones(10, 10).triu(1).bool()]
    assert table.loc[0, "agreement"] == pytest.approx(float(pairs.mean()), rel=1e-4)
    # Features that write alike and read unlike are not of one kind.
    read = pd.DataFrame({"feature": range(60), "family": ["local", "induction"] * 30})
    assert head_polysemanticity(tiny, sae, read)["kind"].tolist() == 4 * ["several kinds"]
    same = read.assign(family="local")
    assert head_polysemanticity(tiny, sae, same)["kind"].tolist()[0] == "one kind"


# --- prefixes ---------------------------------------------------------------------------------------


def long_prefix_model() -> Model:
    """L1H3 looks for the place before which both the last two tokens stood, and else at the BOS.

    L0H2 copies the token before the previous one into the slot of predictions; L1H3 matches its own
    token with the previous-token slot and the previous token with that one. BOS gets the score of one
    and a half matches, so that a single match is not enough.
    """
    module = induction_model()
    attention = module.transformer.h[1].attn.c_attn
    first = 3 * D_HEAD
    i = torch.arange(D_VOCAB)
    assert 2 * D_VOCAB < D_HEAD
    with torch.no_grad():
        _head(module, (0, 2), query=POSITION, key=POSITION, width=N_CTX, shift=2, out=PREDICTION)
        _head(module, (1, 3), query=TOKEN, key=PREVIOUS, width=D_VOCAB, shift=0, out=PREDICTION)
        attention.weight[:, first + D_VOCAB + i] = slot(PREVIOUS, D_VOCAB, D_MODEL).T
        attention.weight[:, D_MODEL + first + D_VOCAB + i] = slot(PREDICTION, D_VOCAB, D_MODEL).T
        # One match: its two factors, as LayerNorm leaves them, about 20 each.
        attention.bias[first + D_HEAD - 1] = 30.0
        attention.weight[:, D_MODEL + first + D_HEAD - 1] = slot(TOKEN, D_VOCAB, D_MODEL)[0]
    return Model(module, character_tokenizer(), id="long prefix")


def test_prefix_prompts_repeat_what_they_say(planted):
    for prefix in range(6):
        whole = prefix_prompts(planted, 4, prefix=prefix, longest=5, seed=3)
        broken = prefix_prompts(planted, 4, prefix=prefix, longest=5, seed=3, corrupted=True)
        x, end = whole.followed, whole.ids.shape[1]
        for prompts, kept in ((whole, prefix), (broken, min(prefix, 1))):
            back = [
                torch.equal(prompts.ids[:, x - k], prompts.ids[:, end - k]) for k in range(1, 6)
            ]
            assert back == [k <= kept for k in range(1, 6)]
            # Nothing else repeats: all tokens but the repeated ones are distinct.
            assert all(len(row.unique()) == end - kept for row in prompts.ids)
        assert torch.equal(whole.ids[:, x:], broken.ids[:, x:])


def test_short_and_long_prefix_heads_are_told_apart():
    model = long_prefix_model()
    short, long = INDUCTION_HEAD, (1, 3)
    table = prefix_induction(model, [short, long], longest=4, n=8)
    score = table.set_index(["head", "condition", "prefix"])["score"]
    assert score[short[1], "intact", 0] < 0.1 and score[long[1], "intact", 0] < 0.01
    assert score[short[1], "intact", 1] > 0.95 and score[long[1], "intact", 1] < 0.05
    for prefix in (2, 3, 4):
        assert score[short[1], "intact", prefix] > 0.95 < score[short[1], "corrupted", prefix]
        assert score[long[1], "intact", prefix] > 0.95
        assert score[long[1], "corrupted", prefix] < 0.05
    kinds = prefix_kinds(table).set_index("head")["kind"]
    assert kinds[short[1]] == "short" and kinds[long[1]] == "long"


def test_features_are_scored_by_their_activation(planted):
    """On the last position the induction head copies the token that followed."""
    sae = token_sae(INDUCTION_HEAD)
    prompts = prefix_prompts(planted, 1, prefix=1, longest=3, seed=5)
    token = int(prompts.ids[0, prompts.followed])
    table = prefix_induction(planted, sae=sae, features=[token], longest=3, n=1, seed=5)
    scores = table.set_index(["condition", "prefix"])["score"]
    assert scores["intact", 0] < 1 < 10 < scores["intact", 1]
    assert table["head"].isna().all() and set(table["feature"]) == {token}


def test_prefix_options_are_checked(planted):
    for options, match in (
        ({"heads": [(2, 0)]}, r"no head \(2, 0\)"),
        ({"features": [1]}, "sae= and features= together"),
        ({"longest": 40}, "distinct tokens"),
    ):
        with pytest.raises(BadInput, match=match):
            prefix_induction(planted, n=1, **options)


# --- the default model ------------------------------------------------------------------------------


def test_identities_hold_on_the_default_model(smollm):
    early, late = (
        SAE(SAEConfig(576, 1024, k=32, site=f"z.{layer}", heads=9), seed=layer) for layer in (6, 12)
    )
    batch = smollm.tokenize(["When Mary and John went to the store, John gave a drink to"])
    last = batch.ids.shape[1] - 1
    z = smollm.run(batch, capture=["z.12"], logits=False).cache["z.12"].flatten(2)
    feature = int(late.encode(z)[0, -1].argmax())
    direct = direct_feature_attribution(smollm, late, batch, [feature], targets=[last])
    assert close(direct.total[0, 0], late.pre_activations(z)[0, last:, feature].detach(), 1e-4)
    table = recursive_attribution(smollm, late, batch, feature, upstream=[early])
    sums = table[table["component"] != "encoder_bias"].groupby("source")["contribution"].sum()
    # twelve blocks of float32, whose largest writes are hundreds of times their sum at the first token
    by_source = direct.by_source[0, 0, 0]
    assert close(torch.tensor(sums.to_numpy()).float(), by_source, 2e-3)
    found = feature_contributions(smollm, late, batch, answer=" Mary", instead=" John")
    expected = direct_contributions(smollm, batch, answer=" Mary", instead=" John").heads[:, 12]
    assert close(found.heads, expected, 1e-3) and close(found.total, found.heads)


def test_a_negative_target_is_counted_from_the_end_of_each_prompt(tiny):
    sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="z.1", heads=4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    batch = Batch.of_ids(torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0]]), mask)
    last = direct_feature_attribution(tiny, sae, batch, [3], targets=[-1])
    same = direct_feature_attribution(tiny, sae, batch, [3], targets=torch.tensor([3, 2]))
    assert last.targets.tolist() == [[3], [2]]
    torch.testing.assert_close(last.total, same.total)
