"""Identities that hold for every family of the table in `families.py`, with no code for any of them.

Tolerances: everything is float32, three blocks deep, with weights of standard deviation 0.2.
`ROUNDING` is about a hundred float32 steps of the largest value, the room that a different order of
additions needs over that depth; errors of a wrong address or a forgotten factor are of order one.
Where nothing is reordered, equality is exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from interp.errors import Refused
from interp.models import attention
from interp.models.attention import implementation
from interp.models.model import Model
from interp.models.probe import call_model, output_tensor, probe
from interp.run.batch import Batch
from interp.run.edits import Edit
from interp.sites import AXES
from tests.families import FAMILIES, IMAGE, TEXT, WINDOWED
from tests.ground_truth.induction_model import induction_model

ROUNDING = 1e-5
LENGTH = 9
READS_TOKENS = [name for name, family in FAMILIES.items() if family.traits[0] != "vision"]
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
every_family = pytest.mark.parametrize("name", FAMILIES)
every_window = pytest.mark.parametrize("name", WINDOWED)


@cache
def model_of(name: str) -> Model:
    return Model(FAMILIES[name](), id=name)


def inputs_of(name: str, seed: int = 1) -> Batch:
    """Two rows that the probe has not seen; token ids from 10 on, clear of special tokens."""
    generator = torch.Generator().manual_seed(seed)
    if FAMILIES[name].traits[0] == "vision":
        return Batch({"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)})
    return Batch.of_ids(torch.randint(10, 97, (2, LENGTH), generator=generator))


def sites_of(model: Model) -> list[str]:
    """The sites this model gives in at least one layer."""
    return [site for site in AXES if site not in model.spec.refused and model.layers_with(site)]


@torch.no_grad()
def plain_forward(module: nn.Module, batch: Batch, **options: Any) -> Any:
    return call_model(module, batch, **options)


def off(got: Tensor, wanted: Tensor) -> float:
    """Largest error over the largest wanted value."""
    assert got.shape == wanted.shape
    got, wanted = got.detach(), wanted.detach()
    return float((got - wanted).abs().max() / wanted.abs().max())


def state_of(module: nn.Module) -> tuple:
    """Everything that a run must leave as it was."""
    weights = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        weights.update(key.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    hooks = {
        path: [list(getattr(part, kind)) for kind in HOOKS] for path, part in module.named_modules()
    }
    patched = [path for path, part in module.named_modules() if "forward" in vars(part)]
    implementations = [
        (path, part.config._attn_implementation)
        for path, part in module.named_modules()
        if hasattr(part, "config")
    ]
    return (
        weights.hexdigest(),
        hooks,
        patched,
        implementations,
        len(attention._listeners),
        module.training,
        torch.is_grad_enabled(),
    )


# --- the map ---------------------------------------------------------------------------------


@every_family
def test_what_is_seen_is_what_the_table_says(name: str) -> None:
    family, spec = FAMILIES[name], model_of(name).spec
    assert set(spec.refused) == family.refused
    failed = {check.name for check in spec.checks if not check.passed}
    if family.expected == "full":
        assert failed == ({"stream"} if "several stacks" in family.traits else set())
    assert all(reason.strip() for reason in spec.refused.values())
    if family.expected == "no window":
        assert "atten" in spec.refused["z"]


@every_window
def test_traits_are_found(name: str) -> None:
    """What the table calls the model is what the probe found out about it."""
    traits, spec = FAMILIES[name].traits, model_of(name).spec
    blocks = [block for block in spec.blocks if block.attention]
    assert ("grouped heads" in traits) == any(b.n_kv_heads < b.n_heads for b in blocks)
    assert ("parallel" in traits) == any(b.parallel for b in blocks)
    assert (traits[0] == "decoder") == spec.causal
    scaled = [w.scale for b in blocks for w in (b.attn_write, b.mlp_write) if w and w.scale != 1]
    assert ("scaled residual" in traits) == bool(scaled)


@every_family
def test_refused_sites_raise_with_the_reason(name: str) -> None:
    model = model_of(name)
    for site in FAMILIES[name].refused & set(AXES):
        with pytest.raises(Refused, match=site):
            model.run(inputs_of(name), capture=[site])


# --- the window --------------------------------------------------------------------------------


@every_window
def test_logits_and_patterns_equal_eager(name: str) -> None:
    """With every site captured. Exact, but for grouped heads: ours share one product a group."""
    model, batch = model_of(name), inputs_of(name)
    eager = FAMILIES[name]()
    eager.load_state_dict(model.module.state_dict())
    with implementation(eager, "eager"):  # Falcon ignores set_attn_implementation
        wanted = plain_forward(eager, batch, output_attentions=True)
    run = model.run(batch, capture=sites_of(model))
    patterns = [pattern for pattern in wanted.attentions if pattern is not None]
    pairs = [(run.logits, output_tensor(wanted))]
    if "windows" not in FAMILIES[name].traits:  # SAM returns no patterns
        pairs += zip(run.cache.by_layer("pattern").values(), patterns, strict=True)
    for got, reference in pairs:
        if {"grouped heads", "windows"} & set(FAMILIES[name].traits):  # SAM's own kernel is SDPA
            assert off(got, reference) < ROUNDING
        else:
            assert torch.equal(got, reference)


@every_family
def test_an_empty_edit_changes_no_bit(name: str) -> None:
    model, batch = model_of(name), inputs_of(name)
    plain = output_tensor(plain_forward(model.module, batch))
    assert torch.equal(model.run(batch).logits, plain)
    if FAMILIES[name].expected == "no window":
        return
    assert torch.equal(model.run(batch, edits=[Edit.zero("z", heads=[])]).logits, plain)
    # An edit that runs and returns what it was given: z, q, k, v do not need the pattern formed.
    same = [Edit.apply(site, lambda x, seen: x) for site in ("q", "k", "v", "z")]
    if {"softcap", "sinks", "no SDPA"} & set(FAMILIES[name].traits):
        # For these transformers runs eager: its SDPA has no softcap and no sinks, or is not called.
        assert off(model.run(batch, edits=same).logits, plain) < ROUNDING
    else:
        assert torch.equal(model.run(batch, edits=same).logits, plain)


@every_family
def test_an_identity_edit_of_any_site_changes_nothing(name: str) -> None:
    """To rounding: a scaled write is divided by its scale again, resid_mid is taken apart."""
    model, batch = model_of(name), inputs_of(name)
    plain = model.run(batch).logits
    for site in sites_of(model):
        edited = model.run(batch, edits=[Edit.scale(site, 1.0)]).logits
        assert off(edited, plain) < ROUNDING, site


# --- sums --------------------------------------------------------------------------------------


@every_window
def test_heads_and_bias_sum_to_the_attention_output(name: str) -> None:
    model = model_of(name)
    if "attn_out" in model.spec.refused:
        pytest.skip("no projection reads z in this family")
    cache = model.run(inputs_of(name), capture=["z", "attn_out"]).cache
    for layer in model.layers_with("attn_out"):
        if model.spec.blocks[layer].between or model.spec.blocks[layer].W_O is None:
            with pytest.raises(Refused, match=r"reads z|no attention output projection"):
                model.W_O(layer)
            continue
        heads = torch.einsum("bphd,hdm->bphm", cache[f"z.{layer}"], model.W_O(layer))
        total = heads.sum(2) + model.b_O(layer)
        assert off(total, cache[f"attn_out.{layer}"]) < ROUNDING


@every_window
def test_neurons_and_bias_sum_to_the_mlp_output(name: str) -> None:
    model = model_of(name)
    if "mlp_post" in model.spec.refused:
        pytest.skip("no one linear layer makes this family's MLP output")
    cache = model.run(inputs_of(name), capture=["mlp_post", "mlp_out"]).cache
    for layer in model.layers_with("mlp_post"):
        total = cache[f"mlp_post.{layer}"] @ model.W_out(layer)
        bias = getattr(
            model.module.get_submodule(model.spec.blocks[layer].W_out or ""), "bias", None
        )
        total = total if bias is None else total + bias
        assert off(total, cache[f"mlp_out.{layer}"]) < ROUNDING


@every_window
def test_embedding_and_writes_sum_to_the_final_residual(name: str) -> None:
    model = model_of(name)
    if model.spec.not_a_sum:
        with pytest.raises(Refused, match="sum of attn_write and mlp_write"):
            model.require_sum("this test")
        return
    cache = model.run(
        inputs_of(name), capture=["embed", "attn_write", "mlp_write", "resid_post"]
    ).cache
    writes = [*cache.by_layer("attn_write").values(), *cache.by_layer("mlp_write").values()]
    assert len(writes) == 2 * model.n_layers
    total = cache["embed"] + torch.stack(writes).sum(0)
    assert off(total, cache[f"resid_post.{model.n_layers - 1}"]) < ROUNDING


@every_window
def test_resid_mid_lies_between_the_two_writes(name: str) -> None:
    model = model_of(name)
    if "resid_mid" in model.spec.refused:
        pytest.skip("nothing lies between attention and MLP")
    sites = ["resid_pre", "attn_write", "resid_mid", "mlp_write", "resid_post"]
    for edited in (None, "attn_write", "resid_mid"):
        edits = [Edit.scale(edited, 0.7)] if edited else []
        cache = model.run(inputs_of(name), capture=sites, edits=edits).cache
        for layer in model.layers_with("resid_mid"):
            block = model.spec.blocks[layer]
            if block.others:
                continue  # what neither attention nor the MLP writes has no site
            pre, attn, mid, mlp, post = (cache[f"{site}.{layer}"] for site in sites)
            norm_pre, norm_mid, norm_post = (
                nn.Identity() if norm is None else model.module.get_submodule(norm)
                for norm in (block.norm_pre, block.norm_mid, block.norm_post)
            )
            carry_mid, carry_post = (
                carry or nn.Identity() for carry in (block.carry_mid, block.carry_post)
            )
            with torch.no_grad():
                if edited != "resid_mid":
                    assert off(norm_mid(carry_mid(norm_pre(pre)) + attn), mid) < ROUNDING
                assert off(norm_post(carry_post(mid) + mlp), post) < ROUNDING


@every_family
def test_unembedding_the_final_residual_gives_the_logits(name: str) -> None:
    model = model_of(name)
    if model.spec.unembedding is None:
        pytest.skip("no unembedding")
    if "unembedding" in model.spec.refused and not model.spec.readout:
        pytest.skip("logits are made of more than the final residual")
    last = f"resid_post.{model.n_layers - 1}"
    run = model.run(inputs_of(name), capture=[last])
    assert off(model.unembed(run.cache[last]), run.logits) < ROUNDING


# --- replay ------------------------------------------------------------------------------------


@every_family
def test_replay_from_every_block_reproduces_the_run(name: str) -> None:
    model, batch = model_of(name), inputs_of(name)
    run = model.run(batch, capture=["resid_pre"])
    same = [[Edit.scale(f"resid_pre.{layer}", 1.0)] for layer in range(model.n_layers)]
    for logits in model.replay(run, [*same, *same, []], lambda variant: variant.logits):
        assert off(logits, run.logits) < ROUNDING


def edits_of(model: Model, width: int) -> list[Edit]:
    """One telling edit for every site and layer that a replay may start from."""
    vector = torch.randn(width, generator=torch.Generator().manual_seed(2))
    kinds: dict[str, Callable[[int], Edit]] = {
        "z": lambda layer: Edit.zero("z", heads=[(layer, 1)]),
        "resid_post": lambda layer: Edit.add(f"resid_post.{layer}", vector, positions=[0]),
        "attn_write": lambda layer: Edit.scale(f"attn_write.{layer}", 0.3),
        "mlp_write": lambda layer: Edit.zero(f"mlp_write.{layer}", positions=[0, 2]),
        "resid_mid": lambda layer: Edit.add(f"resid_mid.{layer}", vector),
        "pattern": lambda layer: Edit.zero(f"pattern.{layer}.1", positions=[0, 2]),
        "v": lambda layer: Edit.zero(f"v.{layer}.0"),
    }
    return [
        kind(layer)
        for site, kind in kinds.items()
        if site not in model.spec.refused
        for layer in model.layers_with(site)
    ]


@every_family
def test_replay_of_an_edit_equals_a_run_with_it(name: str) -> None:
    model, batch = model_of(name), inputs_of(name)
    run = model.run(batch, capture=["resid_pre"])
    edits = edits_of(model, model.spec.d_model)
    assert edits
    replayed = model.replay(run, [[edit] for edit in edits], lambda variant: variant.logits)
    for edit, logits in zip(edits, replayed, strict=True):
        rerun = model.run(batch, edits=[edit]).logits
        assert off(logits, rerun) < ROUNDING, edit.site
        assert off(rerun, run.logits) > 100 * ROUNDING, f"{edit.site} has no effect"


@every_window
def test_patching_all_writes_reproduces_the_source_run(name: str) -> None:
    model = model_of(name)
    if any(block.others or len(block.mixed) > 2 for block in model.spec.blocks):
        pytest.skip("some writes are neither attention's nor the MLP's: they have no site")
    if not model.spec.chained:
        pytest.skip("the embedding enters the stream again between blocks, where there is no site")
    kind = "out" if model.spec.n_streams > 1 else "write"
    sites = ["embed", f"attn_{kind}", f"mlp_{kind}"]
    source = model.run(inputs_of(name, seed=3), capture=sites)
    patches = [Edit.patch(site, source.cache.by_layer(site)) for site in sites]
    patched = model.run(inputs_of(name), edits=patches)
    assert off(patched.logits, source.logits) < ROUNDING


# --- padding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", READS_TOKENS)
def test_padding_changes_nothing_at_real_positions(name: str, side: str) -> None:
    """ROUNDING, since a padded row is summed in another order than the same row on its own."""
    if side == "left" and "positions are not told" in FAMILIES[name].traits:
        pytest.skip(
            "its forward takes no position_ids, so Hugging Face counts padding as positions"
        )
    if side == "left" and "compressed keys" in FAMILIES[name].traits:
        pytest.skip("its own forward makes one key of several positions, padding among them")
    if "pooled queries" in FAMILIES[name].traits:
        pytest.skip("its own forward takes the mean of neighbours, padding among them")
    model = model_of(name)
    generator = torch.Generator().manual_seed(4)
    lengths = (3, 6, LENGTH)
    rows = [torch.randint(10, 97, (length,), generator=generator) for length in lengths]
    ids = torch.zeros(len(rows), LENGTH, dtype=torch.long)
    mask = torch.zeros(len(rows), LENGTH, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(LENGTH - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, True
    capture = [] if FAMILIES[name].expected == "no window" else ["pattern", "z"]
    padded = model.run(Batch.of_ids(ids, mask), capture=capture)
    # A padding row that is all hidden must not become NaN: statistics weigh it with 0.
    every = [x for site in capture for x in padded.cache.by_layer(site).values()]
    assert all(x.isfinite().all() for x in every)
    for i, row in enumerate(rows):
        alone = model.run(row, capture=capture)
        assert off(padded.logits[i, mask[i]], alone.logits[0]) < ROUNDING
        for layer, pattern in alone.cache.by_layer("pattern").items():
            # Some models have keys besides those of the positions: behind them.
            real = padded.cache[f"pattern.{layer}"][i][:, mask[i], :LENGTH]
            pattern = pattern[..., : len(row)]
            assert off(real[:, :, mask[i]], pattern[0]) < ROUNDING
            assert not real[:, :, ~mask[i]].any(), "a real token attends to padding"


# --- nothing left behind -----------------------------------------------------------------------


class _Boom(Exception):
    """Raised by an edit, to see what a failing run leaves behind."""


def boom(x: Tensor, seen: Any) -> Tensor:
    raise _Boom


@every_family
def test_the_model_is_left_as_it_was(name: str) -> None:
    module = FAMILIES[name]()
    before = state_of(module)
    model, batch = Model(module, id=name), inputs_of(name)
    assert state_of(module) == before
    clean = model.run(batch, capture=["resid_pre", *sites_of(model)], grad=True)
    model.replay(
        clean, [[edit] for edit in edits_of(model, model.spec.d_model)], lambda r: r.logits
    )
    model.run(batch, capture=["resid_post.0"], logits=False)
    assert state_of(module) == before
    for site in sites_of(model):
        failing = Edit.apply(site, boom)
        with pytest.raises(_Boom):
            model.run(batch, edits=[failing], grad=True)
        with pytest.raises(_Boom):
            model.replay(clean, [[failing]], lambda r: r)
    late = Edit.apply(f"resid_post.{model.n_layers - 1}", boom)
    with pytest.raises(_Boom):
        model.replay(clean, [[late]], lambda r: r)
    assert state_of(module) == before


# --- what the probe found about special blocks ------------------------------------------------------


def test_what_stands_between_z_and_the_projection_is_told():
    kinds = {"llama": "", "qwen3_next": "gate", "bitnet": "function"}
    for name, between in kinds.items():
        model = model_of(name)
        found = {block.between for block in model.spec.blocks if block.attention}
        assert found == {between}
        layer = model.spec.attention_layers[0]
        assert model.layers_with("attn_out") == model.spec.attention_layers
        if between:
            with pytest.raises(Refused, match="reads z"):
                model.W_O(layer)


def test_without_an_output_projection_none_is_made_up():
    """What attends and adds z as it is: the next linear layer reads the stream, and is the MLP's."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97,
        n_embd=32,
        n_inner=32,  # as wide as the stream
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    module = transformers.GPT2LMHeadModel(config).eval()
    for block in module.transformer.h:
        block.attn.c_proj = torch.nn.Identity()
    model = Model(module, id="no W_O")
    for block in model.spec.blocks:
        assert block.W_O is None and block.attn_out == block.attention and not block.between
    ids = torch.randint(0, 97, (2, 9))
    cache = model.run(ids, capture=["z", "attn_out", "attn_write"]).cache
    assert torch.equal(cache["attn_out"], cache["z"].flatten(3))
    assert torch.equal(cache["attn_write"], cache["attn_out"])
    with pytest.raises(Refused, match="no attention output projection"):
        model.W_O(0)


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next", "falcon_h1"])
def test_mixers_are_not_taken_for_mlps(name: str) -> None:
    """A layer's MLP is what works on each position by itself; a convolution or state space is not."""
    for block in model_of(name).spec.blocks:
        assert block.mlp_write is not None
        assert any(part in block.mlp_write.module for part in ("feed_forward", "mlp"))
        mixers = [write.module for write in block.others]
        assert len(mixers) == (1 if block.attention is None or name == "falcon_h1" else 0)
        assert all(part not in mixer for mixer in mixers for part in ("mlp", "feed_forward"))
        assert block.before_mid and block.mlp_write not in block.before_mid


def test_one_layer_of_shared_ones_can_be_edited():
    """ALBERT calls one block three times: an edit of layer 1 leaves layer 0 as it was."""
    model, batch = model_of("albert"), inputs_of("albert")
    sites = ["resid_post", "z", "pattern", "mlp_post"]
    clean = model.run(batch, capture=sites).cache
    edited = model.run(batch, capture=sites, edits=[Edit.zero("z", heads=[(1, 2)])]).cache
    for site in sites:
        assert torch.equal(edited[f"{site}.0"], clean[f"{site}.0"])
        assert not torch.equal(edited[f"{site}.2"], clean[f"{site}.2"])
    assert not edited["z.1"][:, :, 2].any() and edited["z.2"][:, :, 2].all()


def test_layer_scale_of_a_parameter_is_part_of_the_write():
    model = model_of("beit")
    cache = model.run(inputs_of("beit"), capture=["attn_out", "attn_write"]).cache
    for layer in range(model.n_layers):
        gain = model.module.get_parameter(model.spec.blocks[layer].attn_write.gain)
        assert off(cache[f"attn_out.{layer}"] * gain, cache[f"attn_write.{layer}"]) < ROUNDING


def test_several_stacks_name_the_parts_to_pass():
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=IMAGE)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    with pytest.raises(Refused, match=r"`model\.vision_model` or `model\.text_model`"):
        probe(transformers.CLIPModel(config).eval(), Batch(inputs))


def test_value_columns_that_look_alike_on_the_probe_are_told_apart():
    """In the hand-built model most value columns are 0 on any prompt: v has its own columns all the same."""
    module = induction_model()
    model = Model(module, id="induction")
    for layer in range(2):
        fused = module.transformer.h[layer].attn.c_attn.weight[:, 2 * model.spec.d_model :]
        gain = module.transformer.h[layer].ln_1.weight
        wanted = (gain[:, None] * fused).unflatten(1, (model.spec.n_heads, -1)).transpose(0, 1)
        # The norm's gain is read off its output, which its eps of 1e-5 makes smaller by half of that.
        torch.testing.assert_close(model.W_V(layer), wanted, rtol=1e-5, atol=0)


def test_value_columns_are_told_apart_in_16_bits_and_for_grouped_heads(tiny_model):
    model = tiny_model()
    projection = model.module.model.layers[0].self_attn.v_proj
    with torch.no_grad():
        projection.weight[3] = projection.weight[5] = 0
    for dtype in (torch.float32, torch.bfloat16):
        module = model.module.to(dtype)
        again = Model(module, id="tiny")
        W = module.model.layers[0].self_attn.v_proj.weight
        gain = module.model.layers[0].input_layernorm.weight
        wanted = (W * gain).unflatten(0, (again.spec.blocks[0].n_kv_heads, -1)).transpose(1, 2)
        torch.testing.assert_close(again.W_V(0), wanted, rtol=1e-2, atol=1e-6)
        assert again.spec.blocks[0].v.columns.flatten().tolist() == list(range(len(W)))


def test_values_from_a_latent_are_refused():
    model = Model(FAMILIES["deepseek_v3"](), id="deepseek_v3")
    with pytest.raises(Refused, match="layer 0 of deepseek_v3: v is"):
        model.W_V(0)
