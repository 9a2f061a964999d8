"""TransformerLens beside ours: bridges opened, sites, caches, weights and attributions compared.

Their code is the independent implementation here. On the default model: their TransformerBridge of the
same folder, plain for activations and weights, in compatibility mode (norm gains folded into the
weights, unembedding centred) for `direct_logit_attribution` and `logit_lens`. On tiny random models:
families whose blocks differ in what `hook_attn_out` is, in fused projections, grouped heads and norms.
1e-3 of the largest value allows for float32 through 30 blocks with another attention kernel and folded
weights, 1e-4 for the three blocks of a tiny model; weights are equal bit for bit.
"""

from __future__ import annotations

import copy
import pkgutil
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformer_lens
from torch import Tensor, nn
from transformer_lens import ActivationCache, TransformerBridge
from transformer_lens.tools.analysis import direct_logit_attribution
from transformer_lens.tools.analysis import logit_lens as their_logit_lens
from transformers import AutoTokenizer

import interp
from circuits.attribution import direct_contributions
from interp import transformer_lens as ours_as_theirs
from interp.errors import BadInput, Refused
from interp.lens import logit_lens
from interp.models.model import Model
from interp.run.edits import Edit
from interp.transformer_lens_elsewhere import ATTRIBUTES, OPTIONS
from interp.unembedding import Unembedding
from tests.families import FAMILIES
from tests.ground_truth.induction_model import character_tokenizer

STORE = "When Mary and John went to the store, John gave a drink to"
AGREEMENT = 1e-3
TINY = 1e-4
VERSIONS = {"transformer-lens": "4.3", "transformers": "5."}
"""What this agreement was found with; another version is worth a look before it is trusted."""

KINDS = ("llama", "gpt2", "gpt_neox", "gemma2", "olmo2", "opt", "qwen3", "granite")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [11, 9, 5, 5, 20, 41, 3]])
WEIGHTS = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out", "W_E", "W_U", "b_U")
BIASES = ("b_Q", "b_K", "b_V", "b_O", "b_in", "b_out")


def off(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_versions() -> None:
    for package, wanted in VERSIONS.items():
        assert version(package).startswith(wanted), f"{package} {version(package)}"


# --- tiny models of several families ----------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    character_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)  # their bridge asks where it came from


def bridge_of(module: nn.Module, tokenizer: Any) -> TransformerBridge:
    """Their bridge around a live module, which it changes."""
    module.config.architectures = [type(module).__name__]  # type: ignore[union-attr]
    return TransformerBridge.boot_transformers(
        "tiny/tiny", hf_model=module, tokenizer=tokenizer, dtype=torch.float32, device="cpu"
    )


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tokenizer: Any) -> tuple[Model, TransformerBridge]:
    """A tiny model opened as it is, and their bridge of another copy with the same weights."""
    module = FAMILIES[request.param]()
    return Model(FAMILIES[request.param](), tokenizer), bridge_of(module, tokenizer)


@torch.no_grad()
def test_a_bridge_opens_as_the_model_it_wraps(pair: tuple[Model, TransformerBridge]) -> None:
    plain, bridge = pair
    before = bridge(IDS)
    model = interp.load(bridge)
    assert type(model.module) is type(plain.module) and model.tokenizer is not None
    assert model.spec.refused == plain.spec.refused
    assert [block.W_O for block in model.spec.blocks] == [b.W_O for b in plain.spec.blocks]
    sites = ["z", "pattern", "resid_post"]
    ours, wanted = model.run(IDS, capture=sites), plain.run(IDS, capture=sites)
    for site in sites:
        assert off(ours.cache[site], wanted.cache[site]) < TINY
    assert off(ours.logits, before) < TINY  # type: ignore[arg-type]
    # Nothing was copied, and the bridge goes on as it was, its hooks too.
    theirs = {parameter.data_ptr() for parameter in bridge.original_model.parameters()}
    assert {parameter.data_ptr() for parameter in model.module.parameters()} <= theirs
    assert torch.equal(bridge(IDS), before)
    _, cache = bridge.run_with_cache(IDS)
    assert off(ours.cache["pattern.1"], cache["pattern", 1]) < TINY
    edited = model.run(IDS, edits=[Edit.zero("z.0.1")]).logits
    assert edited is not None and not torch.allclose(edited, before, atol=1e-3)


@torch.no_grad()
def test_every_name_means_their_place(pair: tuple[Model, TransformerBridge]) -> None:
    """All their classic names that we take, post-norm and scaled residual streams included."""
    model, bridge = pair
    lens = ours_as_theirs.view(model)
    logits, theirs = bridge.run_with_cache(IDS)
    ours_logits, ours = lens.run_with_cache(IDS)
    assert off(ours_logits, logits) < TINY  # type: ignore[arg-type]
    shared = [name for name in ours if name in theirs]
    kinds = {name.split(".", 2)[-1] for name in shared}
    assert {"hook_resid_pre", "hook_resid_post", "attn.hook_pattern", "attn.hook_z"} <= kinds
    assert {"hook_attn_out", "attn.hook_out", "hook_mlp_out", "mlp.hook_out"} <= kinds
    assert "attn.hook_v" in kinds and "ln_final.hook_scale" in shared
    assert ("ln2.hook_scale" in kinds) == (model.spec.family != "olmo2")  # whose norms follow
    for name in shared:
        mine, other = ours[name], theirs[name]
        if name == "hook_embed" and "hook_pos_embed" in theirs:
            other = other + theirs["hook_pos_embed"]
        if name.endswith("hook_attn_scores"):
            if off(other, theirs[name.replace("attn_scores", "pattern")]) < TINY:
                continue  # OPT's bridge shows the pattern under this name too
            # what is masked differs: -inf or the smallest number
            mine, other = (x.tril().nan_to_num(neginf=0.0) for x in (mine, other))
        if name.endswith("ln2.hook_scale"):
            other = other.reshape(mine.shape)  # OPT's blocks flatten batch and position
        assert off(mine, other) < TINY, name
    as_projected = (
        model.spec.family == "gpt2"
    )  # OPT has no rotary positions, and scales q after the projection
    assert as_projected == ("blocks.1.attn.hook_q" in shared) == ("blocks.1.attn.hook_k" in shared)
    for key in (("pattern", 0), ("z", 1), ("resid_post", -1), ("attn_out", 1), ("post", 0)):
        if key[0] != "post" or "mlp_post" not in model.spec.refused:
            assert ours[key].shape == theirs[key].shape


@torch.no_grad()
def test_weights_are_theirs(pair: tuple[Model, TransformerBridge]) -> None:
    model, bridge = pair
    lens = ours_as_theirs.view(model)
    before = {name: x.clone() for name, x in model.module.state_dict().items()}
    for name in WEIGHTS:
        mine, other = getattr(lens, name), getattr(bridge, name)
        assert (mine is None and other is None) or torch.equal(mine, other), name
    for name in BIASES:
        try:
            other = getattr(bridge, name)
        except AttributeError:  # theirs has no attribute where the checkpoint has no bias
            other = torch.zeros_like(getattr(lens, name))
        assert torch.equal(getattr(lens, name), other), name
    assert torch.equal(lens.blocks[1].attn.W_Q, bridge.blocks[1].attn.W_Q)
    for product in ("QK", "OV"):
        assert torch.equal(getattr(lens, product).A, getattr(bridge, product).A)
        assert torch.equal(getattr(lens, product).B, getattr(bridge, product).B)
    assert torch.equal(lens.unembed.W_U, bridge.unembed.W_U)
    x = torch.randn(2, lens.cfg.d_model)
    assert off(lens.unembed(x), bridge.unembed(x)) < TINY
    assert off(lens.ln_final(x), bridge.ln_final(x)) < TINY
    assert off(lens.embed(IDS), bridge.embed(IDS)) < TINY or model.spec.family == "gemma2"
    for name in ("ln1", "ln2") if model.spec.family != "olmo2" else ():
        norm, other = getattr(lens.blocks[1], name), getattr(bridge.blocks[1], name)
        assert off(norm(x), other(x)) < TINY
        assert off(norm.w, other.w + (model.spec.family == "gemma2")) < TINY
    assert all(torch.equal(x, before[name]) for name, x in model.module.state_dict().items())
    assert not any(module._forward_hooks for module in model.module.modules())


@torch.no_grad()
def test_their_cache_methods_run_on_our_capture(pair: tuple[Model, TransformerBridge]) -> None:
    model, bridge = pair
    _, theirs = bridge.run_with_cache(IDS)
    ours = model.run(IDS, capture=model_sites(model)).cache.to_transformer_lens(model)
    assert isinstance(ours, ActivationCache)
    assert off(ours.accumulated_resid(layer=2), theirs.accumulated_resid(layer=2)) < TINY
    assert off(ours.stack_activation("pattern"), theirs.stack_activation("pattern")) < TINY
    if model.spec.family not in ("olmo2", "opt") and "resid_mid" not in model.spec.refused:
        for layer in (1, 2):
            mine, other = (
                c.accumulated_resid(layer=layer, apply_ln=True, mlp_input=True)
                for c in (ours, theirs)
            )
            assert off(mine, other) < TINY
    parts, labels = ours.decompose_resid(return_labels=True)
    last = ours["resid_post", -1]
    assert (
        labels[0] == "embed" and off(parts.sum(0), last) < TINY
    )  # ours adds up: it is what is written
    heads = ours.stack_head_results(incl_remainder=True)
    assert heads.shape[0] == len(model.spec.heads) + 1 and off(heads.sum(0), last) < TINY
    assert off(heads[:-1], theirs.stack_head_results()) < TINY


def model_sites(model: Model) -> list[str]:
    wanted = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_write", "mlp_write")
    return [site for site in (*wanted, "z", "pattern") if site not in model.spec.refused]


@torch.no_grad()
def test_logit_attributions_sum_to_the_logit(pair: tuple[Model, TransformerBridge]) -> None:
    """With the final norm's scale frozen, all parts' attributions plus its bias are the logit."""
    model, _ = pair
    if model.spec.logit_softcap is not None:
        pytest.skip("a soft-cap is no linear map")
    run = model.run(IDS, capture=["embed", "attn_write", "mlp_write", "resid_post"])
    cache = run.cache.to_transformer_lens(model)
    token = 17
    parts = cache.logit_attrs(cache.decompose_resid(), token).sum(0) * model.spec.logit_scale
    lens = ours_as_theirs.view(model)
    bias = model.final_norm.bias @ lens.W_U[:, token] + lens.b_U[token]
    wanted = run.logits[..., token]  # type: ignore[index]
    assert float((parts + bias * model.spec.logit_scale - wanted).abs().max()) < TINY * 10


@torch.no_grad()
def test_hooks_by_their_signature(pair: tuple[Model, TransformerBridge]) -> None:
    model, bridge = pair
    lens = ours_as_theirs.view(model)
    seen = []

    def ablate(value: Tensor, hook: Any) -> Tensor:
        seen.append((hook.name, hook.layer()))
        value[:, :, 1] = 0.0
        return value

    hooks = [("blocks.1.attn.hook_z", ablate)]
    ours, theirs = (
        lens.run_with_hooks(IDS, fwd_hooks=hooks),
        bridge.run_with_hooks(IDS, fwd_hooks=hooks),
    )
    assert seen[0] == ("blocks.1.attn.hook_z", 1) and off(ours, theirs) < TINY  # type: ignore[arg-type]
    assert not torch.allclose(ours, lens(IDS))  # type: ignore[arg-type]

    def in_place(value: Tensor, hook: Any) -> None:
        value[:, :, 1] = 0.0

    for hook in (in_place, lambda value, hook: None):
        hooks = [("blocks.1.attn.hook_z", hook)]
        changed = lens.run_with_hooks(IDS, fwd_hooks=hooks)
        assert off(changed, bridge.run_with_hooks(IDS, fwd_hooks=hooks)) < TINY  # type: ignore[arg-type]
        assert off(changed, ours if hook is in_place else lens(IDS)) < TINY  # type: ignore[arg-type]
    few, cache = lens.run_with_cache(
        IDS, lambda name: name.endswith("hook_pattern"), return_type="loss"
    )
    assert {name.split(".")[-1] for name in cache} == {"hook_pattern"}
    assert float(few - bridge(IDS, return_type="loss")) == pytest.approx(0, abs=TINY)  # type: ignore[operator]


def test_latent_attention_refuses_weights_that_it_has_not() -> None:
    lens = ours_as_theirs.view(Model(FAMILIES["deepseek_v3"]()))
    with pytest.raises(Refused, match="latent"):
        _ = lens.W_Q
    assert lens.W_O.shape == (3, 4, 8, 32)  # z's width, where their bridge goes by the config's


def test_the_norms_of_latent_attention_are_the_blocks() -> None:
    """Not the norm of the latent, which the values are made from."""
    model = Model(FAMILIES["deepseek_v3"]())
    _, cache = ours_as_theirs.view(model).run_with_cache(IDS)
    eps = model.module.config.rms_norm_eps  # type: ignore[union-attr]
    for name, site in (("ln1", "resid_pre"), ("ln2", "resid_mid")):
        wanted = (cache[site, 1].pow(2).mean(-1, keepdim=True) + eps).sqrt()
        assert off(cache["scale", 1, name], wanted) < TINY
    gain = model.module.get_parameter("model.layers.1.input_layernorm.weight")
    assert off(ours_as_theirs.view(model).blocks[1].ln1.w, gain) < TINY


@pytest.mark.parametrize("family", ["albert", "funnel", "muse_spark", "qwen4_exp", "t5_encoder"])
def test_what_is_not_found_does_not_stop_a_cache(family: str) -> None:
    """Shared layers, a least length, gates, several streams, a table of positions inside attention."""
    model = Model(FAMILIES[family]())
    lens = ours_as_theirs.view(model)
    _, cache = lens.run_with_cache(IDS)
    assert cache["pattern", 0].shape[1] == model.spec.n_heads
    scales = [name for name in cache if "hook_scale" in name]
    assert not scales or family in ("muse_spark", "t5_encoder")
    if family != "t5_encoder":
        with pytest.raises(Refused):
            _ = lens.W_Q if family != "muse_spark" else lens.W_O


def test_weights_of_a_model_of_images_are_refused() -> None:
    with pytest.raises(Refused, match="token ids, and this model reads 'pixel_values'"):
        _ = ours_as_theirs.view(Model(FAMILIES["vit"]())).W_Q


def test_a_cache_without_its_model_is_indexed_and_stacked(tiny: Model) -> None:
    run = tiny.run(IDS, capture=["resid_post", "pattern", "z"])
    cache = run.cache.to_transformer_lens()
    assert cache["resid_post", -1] is run.cache["resid_post.1"]
    assert cache["blocks.0.attn.hook_pattern"].shape == (2, 4, 7, 7)
    assert cache["blocks.0.attn.o.hook_in"] is cache["z", 0]
    assert cache.stack_activation("z").shape == (2, 2, 7, 4, 8)
    assert ("resid_pre", 0) not in cache.cache_dict
    for key, told in (
        (
            ("resid_pre", 0),
            "'blocks.0.hook_resid_pre' was not captured; write model.run(…, capture=[",
        ),
        (("attn_scores", 1), "capture=['scores']); captured: attn.hook_pattern, "),
        (
            ("z", 9),
            "'blocks.9.attn.hook_z' was not captured: of 'z' there are layers 0–1; captured: ",
        ),
        (("zz", 1), "no 'blocks.1.hook_zz'; did you mean "),
        (("q", 1), "ask for 'blocks.1.attn.hook_rot_q'"),
        (("scale", 1, "ln2"), "works it out from 'blocks.1.hook_resid_mid'"),
    ):
        with pytest.raises(KeyError) as raised:  # as their code catches it
            _ = cache[key]
        assert told in str(raised.value) and isinstance(raised.value, BadInput)


# --- bridges with processed weights, and what is no bridge of a Hugging Face model --------------------


HABITS: dict[str, tuple[Callable[[Model, Any], Any], str]] = {
    "method": (lambda model, ids: model.run_with_cache(ids), "view(model).run_with_cache"),
    "config": (lambda model, ids: model.cfg, "view(model).cfg"),
    "weights": (lambda model, ids: model.W_Q, "view(model).W_Q"),
    "filter": (lambda model, ids: model.run(ids, capture=lambda name: True), "list of sites"),
    "hook": (lambda model, ids: model.run(ids, capture=["hook_z"]), "'blocks.0.attn.hook_z'"),
    "pair": (
        lambda model, ids: model.run(ids, capture=["z"]).cache["z", 0],
        "write 'z.0', or index cache.to_transformer_lens()",
    ),
    "fwd_hooks": (
        lambda model, ids: model.run(ids, edits=[("z.0", lambda z, hook: z)]),
        "Edit.apply(name, function)",
    ),
    "in place": (
        lambda model, ids: model.run(ids, edits=[Edit.apply("z.0", lambda z, hook: None)]),
        "return the new activation",
    ),
    "one edit": (lambda model, ids: model.run(ids, edits=Edit.zero("z.0")), "edits=[edit]"),
    "one head": (lambda model, ids: Edit.zero("z", heads=(0, 1)), "heads=[(5, 1)]"),
    "pair from the end": (
        lambda model, ids: model.run(ids, capture=["z"]).cache["z", -1],
        "write 'z.1', or index",
    ),
    "every layer": (lambda model, ids: model.run(ids, capture=["hook_z"]), "'z' for all layers"),
    "layer twice": (
        lambda model, ids: Edit.zero("blocks.1.attn.hook_z", heads=[(1, 2)]),
        "'z' with heads=, or one head as 'z.1.2'",
    ),
    "cache": (
        lambda model, ids: model.run(ids, capture=["z"]).cache.stack_activation("z"),
        "cache.to_transformer_lens(model).stack_activation",
    ),
    "generate": (lambda model, ids: model.generate("a"), "interp.generate.generate"),
    "size": (lambda model, ids: model.d_head, "model.spec.d_head"),
    "circuit": (lambda model, ids: model.W_OV, "view(model).OV"),
    "trace": (lambda model, ids: model.trace("a"), "model.run(text, capture=[…], edits=[…])"),
    "call": (lambda model, ids: model(ids), "model.run(text).logits"),
    "run as cache": (lambda model, ids: model.run(ids)["z"], "run.cache['z']"),
    "site of a run": (lambda model, ids: model.run(ids).resid_post, 'run.cache["resid_post"]'),
    "loss of a run": (lambda model, ids: model.run(ids).loss, "run.logits[:, :-1], run.batch.ids"),
    "module": (lambda model, ids: model.eval(), "model.module.eval"),
    "standing hook": (
        lambda model, ids: ours_as_theirs.view(model).add_hook("blocks.0.attn.hook_z", print),
        "edits=[interp.Edit.apply(name, change)]",
    ),
    "stop": (
        lambda model, ids: ours_as_theirs.view(model).run_with_cache(ids, stop_at_layer=1),
        "names_filter=[…], return_type=None",
    ),
    "backward": (
        lambda model, ids: ours_as_theirs.view(model).run_with_hooks(ids, bwd_hooks=[]),
        "run.gradients(metric, site)",
    ),
    "misspelt": (
        lambda model, ids: ours_as_theirs.view(model)(ids, return_tpye="loss"),
        "it takes fwd_hooks, return_type",
    ),
    "called": (lambda model, ids: model(ids), "model.run(text).logits"),
    "called for a loss": (
        lambda model, ids: model(ids, return_type="loss"),
        "interp.transformer_lens.view(model)(text",
    ),
    "size of theirs": (
        lambda model, ids: ours_as_theirs.view(model).cfg.rms_norm_eps,
        "see model.module.config.rms_norm_eps",
    ),
    "several rows of ids": (
        lambda model, ids: ours_as_theirs.view(model).to_str_tokens(ids.repeat(2, 1)),
        "to_str_tokens(ids[0])",
    ),
    "kept on a hook": (
        lambda model, ids: ours_as_theirs.view(model).run_with_hooks(
            ids, fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: hook.ctx)]
        ),
        "a variable of your own",
    ),
    "rows": (lambda model, ids: model.tokens(ids), "tokenize(text).ids[0]"),
}
"""What a user of TransformerLens writes, and what the answer must hold."""


@pytest.mark.parametrize("habit", HABITS)
def test_a_habit_is_told_where_to_go(tiny: Model, habit: str) -> None:
    write, wanted = HABITS[habit]
    with pytest.raises((BadInput, AttributeError, TypeError)) as raised:
        write(tiny, torch.tensor([[5, 6, 7]]))
    assert wanted in str(raised.value)
    assert not hasattr(tiny, "z") and "view" not in str(no_attribute(tiny, "zz"))


UNANSWERED = {
    "block_hooks",
    "block_submodules",
    "blocks_with",
    "boot_native",
    "boot_tl_legacy",
    "check_hooks_to_add",
    "items",
    "keys",
    "values",
    "check_model_support",
    "clear_hook_registry",
    "close",
    "composition_layer_indices",
    "diffusion_generate",
    "mps",
    "hook_aliases",
    "init_weights",
    "list_supported_models",
    "mod_dict",
    "predict_next_sentence",
    "get",
    "logit_lens",
    "prepare_multimodal_inputs",
    "stack_params_for",
    "to_sentence_pair_tokens",
    "compute_ssm_effective_attention",
    "compute_ssm_state",
    "ssm_layers",
}
"""Theirs, with nothing to say: how a bridge is built, or kinds of model it serves."""


def test_every_name_of_theirs_is_there_or_answered(tiny: Model) -> None:
    """Whatever a bridge has for its users, a view has too, or says what to write instead."""
    lens = ours_as_theirs.view(tiny)
    there = {name for name in dir(TransformerBridge) if name[:1] != "_"} - {*dir(nn.Module)}
    bare = {n for n in there if not hasattr(lens, n) and "here:" not in str(no_attribute(lens, n))}
    assert bare <= UNANSWERED
    caches = {name for name in dir(ActivationCache) if name[:1] != "_"} - {*dir(dict)}
    told = " ".join([*ATTRIBUTES.values(), *OPTIONS.values()])
    for name in re.findall(r"\b(?:interp|circuits)\.[\w.]*\w", told):
        assert pkgutil.resolve_name(name), name
    seen = tiny.run(torch.tensor([[5, 6]]), capture=["z"]).cache
    assert {n for n in caches if "to_trans" not in str(no_attribute(seen, n))} <= UNANSWERED


def no_attribute(value: Any, name: str) -> AttributeError:
    with pytest.raises(AttributeError) as raised:
        getattr(value, name)
    return raised.value


@torch.no_grad()
def test_compatibility_mode_is_said(tokenizer: Any) -> None:
    bridge = bridge_of(FAMILIES["llama"](), tokenizer)
    plain = bridge(IDS)
    bridge.enable_compatibility_mode(disable_warnings=True)
    model = interp.load(bridge)
    assert any("folded" in note for note in model.notes)
    assert off(model.run(IDS).logits, bridge(IDS)) < TINY  # type: ignore[arg-type]
    ours, theirs = (x.log_softmax(-1) for x in (model.run(IDS).logits, plain))  # type: ignore[union-attr]
    assert off(ours, theirs) < TINY
    assert torch.allclose(model.W_U.mean(-1), torch.zeros(32), atol=1e-6)  # centred: processed


@torch.no_grad()
def test_rewritten_projections_are_read_again_from_the_folder(
    tokenizer: Any, tmp_path: Path
) -> None:
    """Compatibility mode splits GPT-2's fused projection for good: what is wrapped is not the model."""
    FAMILIES["gpt2"]().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), dtype=torch.float32, device="cpu")
    bridge.enable_compatibility_mode(disable_warnings=True)
    model = interp.load(bridge)
    assert any(note.startswith("read again from") for note in model.notes)
    ours, theirs = (x.log_softmax(-1) for x in (model.run(IDS).logits, bridge(IDS)))  # type: ignore[union-attr]
    assert off(ours, theirs) < TINY
    (tmp_path / "config.json").unlink()
    with pytest.raises(Refused, match="pass the checkpoint's name"):
        interp.load(bridge)


def test_a_changed_bridge_is_opened_with_its_changed_weights(tokenizer: Any) -> None:
    bridge = bridge_of(FAMILIES["llama"](), tokenizer)
    with torch.no_grad():
        bridge.original_model.lm_head.weight.mul_(2)  # type: ignore[union-attr]
        assert off(interp.load(bridge).run(IDS).logits, bridge(IDS)) < TINY  # type: ignore[arg-type]


def test_what_holds_no_hugging_face_model_is_refused() -> None:
    bridge = TransformerBridge.boot_native(
        transformer_lens.config.TransformerBridgeConfig(
            d_model=16, d_head=4, n_heads=4, n_layers=1, n_ctx=8, d_vocab=9, act_fn="gelu", d_mlp=16
        )
    )
    with pytest.raises(Refused, match="no Hugging Face model: give"):
        interp.load(bridge)
    with pytest.raises(BadInput, match="device='cpu' was given with a live module"):
        interp.load(bridge, device="cpu")


# --- the default model -------------------------------------------------------------------------------


def boot(smollm: Model) -> TransformerBridge:
    """Their model of the same weights, made from the same folder."""
    folder = str(smollm.module.config._name_or_path)  # type: ignore[union-attr]
    return TransformerBridge.boot_transformers(folder, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def plain(smollm: Model) -> TransformerBridge:
    return boot(smollm)


@pytest.fixture(scope="module")
def bridge(smollm: Model) -> TransformerBridge:
    made = boot(smollm)
    made.enable_compatibility_mode()
    return made


@torch.no_grad()
def test_activations_agree(smollm: Model, plain: TransformerBridge) -> None:
    """pattern, z, q, k, v, neurons, residual stream and writes of every layer; the lens at each layer."""
    ids = plain.to_tokens(STORE)
    lens = ours_as_theirs.view(smollm)
    assert torch.equal(lens.to_tokens(STORE), ids)  # BOS first, as theirs
    assert lens.to_str_tokens(STORE) == plain.to_str_tokens(STORE)
    _, theirs = plain.run_with_cache(ids)
    _, ours = lens.run_with_cache(ids)
    shared = [name for name in ours if name in theirs and not name.endswith("scores")]
    assert len(shared) > 20 * smollm.n_layers
    for name in shared:
        assert off(ours[name], theirs[name]) < AGREEMENT, name
    stacked, other = (x.stack_head_results(pos_slice=-1) for x in (ours, theirs))
    assert off(stacked, other) < AGREEMENT
    unembed = Unembedding(smollm)
    for layer in range(0, smollm.n_layers, 4):
        wanted = plain.unembed(plain.ln_final(theirs["resid_post", layer]))[0]
        got = unembed(ours["resid_post", layer])[0]
        error = (got - wanted).abs().amax(-1) / wanted.abs().amax(-1)
        assert float(error.max()) < AGREEMENT


@torch.no_grad()
def test_default_weights_agree(smollm: Model, plain: TransformerBridge) -> None:
    lens = ours_as_theirs.view(smollm)
    assert lens.W_K.shape == (30, 3, 576, 64)
    for name in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out", "W_E", "W_U"):
        assert torch.equal(getattr(lens, name), getattr(plain, name)), name


@torch.no_grad()
def test_head_attribution_agrees(smollm: Model, bridge: Any) -> None:
    ids = smollm.as_batch(STORE).ids
    mary, john = smollm.token_id(" Mary"), smollm.token_id(" John")
    found = direct_logit_attribution(bridge, ids, mary, john, unit="head")
    heads = [i for i, label in enumerate(found.labels) if label.startswith("L")]
    theirs = found.attribution[heads].reshape(smollm.n_layers, smollm.spec.n_heads)
    ours = direct_contributions(smollm, ids, answer=mary, instead=john).heads[0]
    assert [found.labels[i] for i in heads] == [f"L{a}H{b}" for a, b in smollm.spec.heads]
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < AGREEMENT
    assert float(theirs.abs().max()) > 1  # logits: there is something to agree about
    # The same from their own methods over our capture.
    cache = smollm.run(ids, capture=["z", "resid_post"]).cache.to_transformer_lens(smollm)
    stack = cache.stack_head_results(pos_slice=-1)
    attrs = cache.logit_attrs(stack, " Mary", incorrect_tokens=" John", pos_slice=-1)
    assert (
        float((attrs.reshape(theirs.shape) - theirs).abs().max() / theirs.abs().max()) < AGREEMENT
    )


@torch.no_grad()
def test_logit_lens_agrees(smollm: Model, bridge: Any) -> None:
    """Every layer's input and the last one's output, at the last position."""
    ids = smollm.as_batch(STORE).ids
    theirs = their_logit_lens(bridge, ids, return_type="logits").readout.values.squeeze()
    run = smollm.run(ids, capture=["resid_pre", "resid_post"], logits=False)
    last = f"resid_post.{smollm.n_layers - 1}"
    stack = torch.cat([run.cache["resid_pre"][0, -1], run.cache[last][0, -1:]])
    ours = Unembedding(smollm)(stack)
    # Their unembedding is centred: its logits are ours but for one number a row.
    ours, theirs = (x - x.mean(-1, keepdim=True) for x in (ours, theirs.float()))
    error = (ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)
    assert float(error.max()) < AGREEMENT

    table = logit_lens(smollm, ids, sites="resid_post", lens="logit", positions=[-1]).table
    probability = theirs[1:].softmax(-1).amax(-1)
    assert torch.allclose(
        torch.tensor(table["top_probability"].to_numpy()), probability, rtol=1e-2, atol=1e-4
    )
    assert table["top_token"].tolist() == smollm.tokens(theirs[1:].argmax(-1).tolist())


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_of_several_lengths_are_padded_as_theirs(
    side: str, pair: tuple[Model, TransformerBridge]
) -> None:
    """Equal wherever a token is real; what theirs computes at padding on the right is not masked there."""
    model, bridge = pair
    lens, texts = ours_as_theirs.view(model), ["abcab", "da", "bcd"]
    ids = lens.to_tokens(texts, padding_side=side)
    logits, ours = lens.run_with_cache(texts, padding_side=side)
    expected, theirs = bridge.run_with_cache(texts, padding_side=side)
    batch = model.tokenize(texts, padding_side=side, bos=lens.cfg.default_prepend_bos)
    real = batch.mask
    assert real is not None and real.sum(1).unique().numel() == 3
    assert torch.equal(ids[real], bridge.to_tokens(texts, padding_side=side)[real])
    assert off(logits[real], expected[real]) < TINY  # type: ignore[index]
    for name in ("z", "v", "resid_pre", "resid_post"):
        assert off(ours[name, 1][real], theirs[name, 1][real]) < TINY
    pattern, other = (cache["pattern", 1].transpose(1, 2)[real] for cache in (ours, theirs))
    assert off(pattern, other) < TINY
    mask = real.long()
    for each in (False, True):
        loss = lens(texts, padding_side=side, return_type="loss", loss_per_token=each)
        given = {"return_type": "loss", "loss_per_token": each, "attention_mask": mask}
        assert off(loss, bridge(ids, **given)) < TINY  # type: ignore[arg-type]
    double = [("blocks.0.attn.hook_z", lambda z, hook: 2 * z)]
    changed = lens.run_with_hooks(texts, fwd_hooks=double, padding_side=side)
    other = bridge.run_with_hooks(texts, fwd_hooks=double, padding_side=side)
    assert off(changed[real], other[real]) < TINY  # type: ignore[index]


def test_the_side_of_padding_is_the_tokenizers(tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    lens = ours_as_theirs.view(Model(FAMILIES["llama"](), tokenizer))
    for side, shorter in (("right", [2, 0, 0]), ("left", [0, 0, 2])):
        tokenizer.padding_side = side
        assert lens.to_tokens(["abc", "a"], prepend_bos=False)[1].tolist() == shorter


def test_losses_and_token_places_are_theirs(pair: tuple[Model, TransformerBridge]) -> None:
    model, bridge = pair
    lens = ours_as_theirs.view(model)
    each = lens(IDS, return_type="loss", loss_per_token=True)
    assert off(each, bridge(IDS, return_type="loss", loss_per_token=True)) < TINY  # type: ignore[arg-type]
    logits, loss = lens(IDS, return_type="both")  # type: ignore[misc]
    assert torch.equal(loss, each.mean()) and torch.equal(logits, lens(IDS))  # type: ignore[union-attr]
    assert lens.all_head_labels[:2] == ["L0H0", "L0H1"]
    assert lens.all_head_labels == bridge.all_head_labels
    text = "abcab"
    for mode in ("first", "last"):
        theirs = bridge.get_token_position("b", text, mode=mode, prepend_bos=False)
        assert lens.get_token_position("b", text, mode, prepend_bos=False) == theirs
    assert lens.to_single_str_token(lens.to_single_token("b")) == "b"
    assert lens.to_string([3, 4]) == bridge.to_string([3, 4])
    assert lens.cfg.default_prepend_bos == bridge.cfg.default_prepend_bos
    assert lens.to_tokens(text).tolist() == bridge.to_tokens(text).tolist()
    assert lens.to_str_tokens(["ab", "ba"]) == bridge.to_str_tokens(["ab", "ba"])
    with pytest.raises(BadInput, match="not in the input"):
        lens.get_token_position("d", text)
