"""Site names: what they parse to, TransformerLens's names for them, and what a typo is told."""

from __future__ import annotations

import re

import pytest

from interp.errors import BadInput
from interp.sites import (
    ATTENTION_SITES,
    AXES,
    MODULE_SITES,
    TRANSFORMER_LENS,
    Site,
    has_heads,
    head_axis,
    ranges,
    to_transformer_lens,
)


@pytest.mark.parametrize("name", AXES)
def test_every_name_parses_with_and_without_a_layer(name: str) -> None:
    assert Site.parse(name) == Site(name)
    assert Site.parse(f"{name}.5") == Site(name, 5)
    for text in (name, f"{name}.5"):
        assert str(Site.parse(text)) == text
    site = Site(name, 0)
    assert Site.parse(site) is site


@pytest.mark.parametrize("name", AXES)
def test_only_attention_sites_have_heads(name: str) -> None:
    assert has_heads(name) == (name in ATTENTION_SITES) == (name not in MODULE_SITES)
    if has_heads(name):
        assert Site.parse(f"{name}.5.11") == Site(name, 5, 11)
        assert AXES[name][head_axis(name)] in ("n_heads", "n_kv_heads")
    else:
        with pytest.raises(BadInput, match=f"'{name}' has no heads; write '{name}.5'"):
            Site.parse(f"{name}.5.1")


@pytest.mark.parametrize(
    ("lens", "ours"),
    [
        ("hook_embed", Site("embed")),
        ("blocks.3.hook_resid_pre", Site("resid_pre", 3)),
        ("blocks.0.hook_resid_mid", Site("resid_mid", 0)),
        ("blocks.11.hook_resid_post", Site("resid_post", 11)),
        ("blocks.1.hook_attn_out", Site("attn_write", 1)),
        ("blocks.1.hook_mlp_out", Site("mlp_write", 1)),
        ("blocks.1.attn.hook_rot_q", Site("q", 1)),
        ("blocks.1.attn.hook_rot_k", Site("k", 1)),
        ("blocks.1.attn.hook_v", Site("v", 1)),
        ("blocks.1.attn.hook_z", Site("z", 1)),
        ("blocks.1.attn.hook_attn_scores", Site("scores", 1)),
        ("blocks.1.attn.hook_pattern", Site("pattern", 1)),
        ("blocks.0.hook_in", Site("resid_pre", 0)),
        ("blocks.0.hook_out", Site("resid_post", 0)),
        ("blocks.0.attn.o.hook_in", Site("z", 0)),
        ("blocks.0.attn.v.hook_out", Site("v", 0)),
        ("blocks.0.attn.hook_out", Site("attn_out", 0)),
        ("blocks.0.mlp.hook_out", Site("mlp_out", 0)),
        ("blocks.0.mlp.out.hook_in", Site("mlp_post", 0)),
        ("attn.hook_pattern", Site("pattern")),
        ("hook_resid_post", Site("resid_post")),
    ],
)
def test_transformer_lens_names_mean_the_same_place(lens: str, ours: Site) -> None:
    assert Site.parse(lens) == ours


@pytest.mark.parametrize(
    ("lens", "instead"),
    [
        ("blocks.2.attn.hook_result", "'blocks.2.attn.hook_z'"),
        ("blocks.2.hook_mlp_in", "'blocks.2.hook_resid_mid'"),
        ("blocks.2.attn.k.hook_out", "'blocks.2.attn.hook_rot_k'"),
        ("blocks.2.mlp.hook_pre", "'blocks.2.mlp.hook_post'"),
        ("blocks.2.ln1.hook_scale", "'blocks.2.hook_resid_pre'"),
        ("ln_final.hook_normalized", "'hook_resid_post'"),
        ("unembed.hook_out", "run.logits"),
        ("unembed.hook_in", "'hook_resid_post'"),
        ("embed.hook_in", "model.tokenize"),
        ("pos_embed.hook_out", "'embed'"),
        ("blocks.2.ln2.hook_in", "'blocks.2.hook_resid_mid'"),
        ("blocks.2.ln1_post.hook_out", "model.module"),
        ("blocks.2.mlp.gate.hook_out", "'blocks.2.mlp.hook_post'"),
    ],
)
def test_a_name_without_a_counterpart_says_where_to_look(lens: str, instead: str) -> None:
    with pytest.raises(BadInput, match=re.escape(lens)) as caught:
        Site.parse(lens)
    assert instead in str(caught.value)


@pytest.mark.parametrize("lens", TRANSFORMER_LENS)
def test_names_go_there_and_back(lens: str) -> None:
    site = Site.parse(f"blocks.4.{lens}")
    names = to_transformer_lens(site)
    assert f"blocks.4.{lens}" in names and {Site.parse(name) for name in names} == {site}


@pytest.mark.parametrize("name", ["q", "k"])
def test_q_and_k_before_rotary_are_not_passed_off_as_ours(name: str) -> None:
    with pytest.raises(BadInput, match=rf"before rotary.*'blocks\.2\.attn\.hook_rot_{name}'"):
        Site.parse(f"blocks.2.attn.hook_{name}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resid_pst", "no site 'resid_pst'; did you mean 'resid_post'?"),
        ("patern.3", "no site 'patern'; did you mean 'pattern'?"),
        ("Z", "no site 'Z'"),
        ("", "no site ''"),
        ("z.one", "'z.one' is not a site; write 'z', 'z.5' or 'z.5.1'"),
        ("z.-1", "'z.-1' is not a site"),
        ("z.", "'z.' is not a site"),
        ("z.1.2.3", "'z.1.2.3' is not a site"),
        ("z.1.5e0", "'z.1.5e0' is not a site"),
        ("blocks.1.attn.hook_zz", "did you mean 'blocks.1.attn.hook_z'?"),
        ("blocks.x.attn.hook_z", "did you mean 'blocks.0.attn.hook_z'?"),
        ("blocks.1.hook_resid_pst", "did you mean 'blocks.1.hook_resid_post'?"),
        ("block.3.attn.hook_z", "did you mean 'blocks.3.attn.hook_z'?"),
        ("hook_z.3", "did you mean 'blocks.3.attn.hook_z'?"),
        ("blocks.3.attn.z", "did you mean 'blocks.3.attn.hook_z'?"),
        ("blocks.3.mlp", "did you mean 'blocks.3.hook_mlp_out'?"),
        ("blocks.-1.hook_resid_post", "layers are counted from 0"),
        ("blocks.3.hook_q", "ask for 'blocks.3.attn.hook_rot_q'"),
        ("blocks.3.ln2.hook_scale", "works it out from 'blocks.3.hook_resid_mid'"),
        ("blocks.1.hook_cross_attn_ot", "did you mean 'blocks.1.hook_cross_attn_out'?"),
        ("hook_tokens", "no site 'hook_tokens'; known, behind"),
    ],
)
def test_a_wrong_name_is_told_the_nearest(text: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        Site.parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], "none"), ([4], "4"), ([3, 1, 2], "1–3"), ([0, 2, 3, 9], "0, 2–3, 9")],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text
