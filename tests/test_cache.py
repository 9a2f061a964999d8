"""What a run leaves: shapes that follow from the names of the axes, and errors for what is not there."""

from __future__ import annotations

import pytest
import torch

from interp.errors import BadInput
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.cache import Cache
from interp.sites import ATTENTION_SITES, AXES, CROSS_SITES, Site

SITES = [name for name in AXES if name not in CROSS_SITES]
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
SIZES = {
    "batch": 2,
    "pos": 5,
    "query_pos": 5,
    "key_pos": 5,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_head": 8,
    "d_mlp": 48,
}


@pytest.fixture
def cache(tiny: Model) -> Cache:
    return tiny.run(IDS, capture=SITES).cache


@pytest.mark.parametrize("name", SITES)
def test_shapes_follow_from_the_axes(name: str, cache: Cache) -> None:
    texts = [name] if name == "embed" else [name, f"{name}.1"]
    texts += [f"{name}.1.0"] if name in ATTENTION_SITES else []
    for text in texts:
        axes = cache.axes(text)
        assert cache[text].shape == tuple(SIZES[axis] for axis in axes), text
        assert ("n_layers" in axes) == (text == name != "embed")


def test_axes_are_where_they_are_said_to_be(cache: Cache) -> None:
    assert cache.axes("z") == ("batch", "pos", "n_layers", "n_heads", "d_head")
    assert cache.axes("pattern") == ("batch", "n_layers", "n_heads", "query_pos", "key_pos")
    assert torch.equal(cache["z"][:, :, 1, 3], cache["z.1.3"])
    assert torch.equal(cache["z.1"][:, :, 3], cache["z.1.3"])
    assert torch.equal(cache["pattern"][:, 1, 3], cache["pattern.1.3"])
    assert torch.equal(cache["resid_post"][:, :, 1], cache["resid_post.1"])
    assert torch.equal(cache["resid_pre.1"], cache["resid_post.0"])
    assert torch.equal(cache["embed"], cache["resid_pre.0"])


def test_transformer_lens_names_and_sites_read_too(cache: Cache) -> None:
    assert cache["blocks.1.attn.hook_z"] is cache["z.1"]
    assert cache[Site("z", 1)] is cache["z.1"]


def test_a_cache_is_a_mapping(cache: Cache) -> None:
    assert list(cache) == sorted(SITES) and len(cache) == len(SITES)
    assert "z" in cache and "z.1" in cache and "z.2" not in cache and 3 not in cache
    assert set(cache.keys()) == {name for name, _ in cache.items()}
    assert cache.layers("z") == [0, 1]
    assert list(cache.by_layer("z")) == [0, 1]


def test_what_was_not_captured_is_an_error(tiny: Model) -> None:
    cache = tiny.run(IDS, capture=["z.1", "resid_post"]).cache
    assert cache.layers("z") == [1]
    assert cache["z"].shape == (2, 5, 1, 4, 8)
    assert "z.0" not in cache
    for text in ("z.0", "pattern", "z.0.1"):
        kept = r"resid_post \(layers 0–1\), z \(layers 1\)"
        with pytest.raises(BadInput, match=f"'{text}' was not captured; captured: {kept}"):
            cache[text]
    with pytest.raises(BadInput, match="captured: nothing"):
        tiny.run(IDS).cache["z"]
    with pytest.raises(BadInput, match="did you mean 'resid_post'"):
        cache["resid_pst"]


def test_a_run_says_what_it_holds_and_prints_no_tensor(tiny: Model) -> None:
    run = tiny.run(IDS, capture=["pattern.1", "resid_post"])
    assert repr(run) == (
        "Run(Batch(input_ids [2, 5]), logits=[2, 5, 97], "
        "Cache(pattern (layers 1) [batch 2, n_heads 4, query_pos 5, key_pos 5]; "
        "resid_post (layers 0–1) [batch 2, pos 5, d_model 32]))"
    )
    padded = Batch.of_ids(IDS, IDS != 14)
    assert repr(padded) == (
        "Batch(input_ids [2, 5], attention_mask [2, 5], position_ids [2, 5], real positions [5, 4])"
    )


def test_layers_of_different_shapes_are_read_singly() -> None:
    cache = Cache()
    cache.put("z", 0, torch.zeros(1, 2, 4, 8))
    cache.put("z", 1, torch.zeros(1, 2, 2, 8))
    assert cache["z.1"].shape == (1, 2, 2, 8)
    with pytest.raises(BadInput, match=r"differ in shape; read them singly: 'z\.0'"):
        cache["z"]


def test_a_later_run_does_not_change_what_was_kept(tiny: Model) -> None:
    first = tiny.run(IDS, capture=SITES).cache
    kept = {name: first[name].clone() for name in first}
    tiny.run(IDS.flip(1), capture=SITES)
    assert all(torch.equal(first[name], kept[name]) for name in first)
