"""Encoder-decoders: the decoder's stack, its attention to the source, and what padding may not change.

Families differ in where they normalise: before each branch (T5, mBART, M2M100, Pegasus) or after adding
(BART, Marian). Tolerance: float32, three blocks deep, as in `test_families`.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from benchmarks.architectures import runs
from benchmarks.tiny_configs import tiny_model
from circuits.heads.classify import classify_heads
from circuits.relevance import one_prompt
from interp.errors import BadInput, Refused
from interp.generate import generate
from interp.lens import logit_lens
from interp.models.attention import implementation
from interp.models.model import Model
from interp.models.probe import probe_batch
from interp.run.batch import Batch
from interp.run.edits import Edit
from interp.sites import AXES, CROSS_SITES, Site
from interp.skeleton import skeleton
from tests.families import FAMILIES

ROUNDING = 1e-5
SPECIAL = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
    **SPECIAL,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "vocab_size": 97,
    "decoder_start_token_id": 0,
}
MADE = {
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", BART),
    "marian": ("MarianMTModel", "MarianConfig", {**BART, "decoder_vocab_size": 97}),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", BART),
    "m2m_100": ("M2M100ForConditionalGeneration", "M2M100Config", BART),
    "fsmt": (  # positions before rows of the batch
        "FSMTForConditionalGeneration",
        "FSMTConfig",
        {**BART, "langs": ["en", "de"], "src_vocab_size": 97, "tgt_vocab_size": 97},
    ),
}
N_SOURCE, N_TARGET = 9, 6
every = pytest.mark.parametrize("name", MADE)


@cache
def module_of(name: str) -> Any:
    model, config, options = MADE[name]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
        for parameter in module.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(0.1 * noise) if parameter.ndim < 2 else parameter.copy_(0.2 * noise)
    return module


@cache
def model_of(name: str) -> Model:
    return Model(module_of(name), id=name)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 97, (2, N_SOURCE + N_TARGET), generator=generator)
    return {"input_ids": ids[:, :N_SOURCE], "decoder_input_ids": ids[:, N_SOURCE:]}


def close(got: Tensor, wanted: Tensor) -> bool:
    assert got.shape == wanted.shape
    got, wanted = got.detach(), wanted.detach()
    return float((got - wanted).abs().max()) < ROUNDING * max(1.0, float(wanted.abs().max()))


def everything(model: Model) -> list[str]:
    return [name for name in AXES if model.layers_with(name)]


@every
def test_the_decoder_verifies_in_full(name: str) -> None:
    spec = model_of(name).spec
    assert not spec.refused and all(check.passed for check in spec.checks)
    names = {check.name for check in spec.checks}
    assert {"window", "heads", "cross heads", "writes", "unembedding"} <= names
    assert spec.n_layers == 3 and spec.causal and "decoder" in spec.stack
    assert all(block.cross and block.cross.attention != block.attention for block in spec.blocks)
    assert not any(block.others for block in spec.blocks)


@every
def test_looking_changes_nothing(name: str) -> None:
    model, batch = model_of(name), inputs()
    with torch.no_grad():
        plain = module_of(name)(**batch, use_cache=False).logits
    run = model.run(batch, capture=everything(model))
    assert run.logits is not None and close(run.logits, plain)
    sizes = {"batch": 2, "pos": N_TARGET, "query_pos": N_TARGET, "key_pos": N_TARGET}
    sizes |= {"source_pos": N_SOURCE, "d_model": 32, "n_heads": 4, "n_kv_heads": 4, "d_head": 8}
    sizes |= {"d_mlp": 48}
    for site in run.cache:
        assert run.cache[Site(site, 0)].shape == tuple(sizes[axis] for axis in AXES[site]), site


@every
def test_patterns_are_those_of_hugging_face(name: str) -> None:
    model, batch, module = model_of(name), inputs(), module_of(name)
    cache = model.run(batch, capture=["pattern", "cross_pattern", "resid_pre"]).cache
    with torch.no_grad(), implementation(module, "eager"):
        theirs = module(**batch, use_cache=False, output_attentions=True, output_hidden_states=True)
    for layer in range(3):
        assert close(cache[f"cross_pattern.{layer}"], theirs.cross_attentions[layer])
        assert close(cache[f"pattern.{layer}"], theirs.decoder_attentions[layer])
        assert close(cache[f"resid_pre.{layer}"], theirs.decoder_hidden_states[layer])
    rows = cache["cross_pattern"].sum(-1)
    assert close(rows, torch.ones_like(rows))


@every
def test_heads_and_writes_add_up(name: str) -> None:
    """W_O of every head's z plus bias is cross_out; what the block adds is three writes, or two norms more."""
    model = model_of(name)
    cache = model.run(inputs(), capture=everything(model)).cache
    for layer, block in enumerate(model.spec.blocks):
        at = {site: cache[Site(site, layer)] for site in cache if site != "embed"}
        assert block.cross is not None
        heads = torch.einsum("bphd,hdm->bpm", at["cross_z"], model.W_O(layer, cross=True))
        assert close(heads + model.b_O(layer, cross=True), at["cross_out"])
        mixed = torch.einsum("bhqk,bkhd->bqhd", at["cross_pattern"], at["cross_v"])
        assert close(mixed, at["cross_z"])
        x = at["resid_pre"] + at["attn_write"]
        norm = block.firsts[0].norm if block.firsts else None
        x = norm_of(model, norm)(x) + at["cross_write"]
        x = norm_of(model, block.norm_mid)(x)
        assert close(x, at["resid_mid"])
        assert close(norm_of(model, block.norm_post)(x + at["mlp_write"]), at["resid_post"])


def norm_of(model: Model, name: str | None) -> nn.Module:
    return nn.Identity() if name is None else model.module.get_submodule(name)


@every
def test_edits_of_the_source_are_felt(name: str) -> None:
    model, batch = model_of(name), inputs()
    plain = model.run(batch, capture=["resid_pre", "cross_pattern", "cross_v"])
    for site in ("cross_q", "cross_k", "cross_scores", "cross_pattern", "cross_out", "cross_write"):
        same = model.run(batch, edits=[Edit.apply(site, lambda x, seen: x)])
        assert same.logits is not None and close(same.logits, plain.logits)

    def blind(x: Tensor, seen: Any) -> Tensor:
        x = x.clone()
        x[..., :3] = 0
        return x

    deaf = model.run(batch, edits=[Edit.apply("cross_pattern.1", blind)], capture=["resid_post"])
    assert (deaf.logits - plain.logits).abs().max() > 0.01
    # The same by another door: nothing to mix at these positions of the source.
    empty = model.run(batch, edits=[Edit.zero("cross_v.1", positions=[0, 1, 2])])
    assert close(empty.logits, deaf.logits)
    one = Edit.zero("cross_z", heads=[(2, 1)])
    (replayed,) = model.replay(plain, [[one]], lambda run: run.logits)
    assert close(replayed, model.run(batch, edits=[one]).logits)
    assert not close(replayed, plain.logits)


@every
def test_an_edit_of_the_stream_goes_through_all_three_writes(name: str) -> None:
    model, batch = model_of(name), inputs()
    change = torch.randn(32, generator=torch.Generator().manual_seed(2))
    moved = model.run(batch, edits=[Edit.add("resid_mid.1", change)], capture=["resid_mid"])
    plain = model.run(batch, capture=["resid_mid"])
    assert close(moved.cache["resid_mid.1"], plain.cache["resid_mid.1"] + change)
    assert close(moved.cache["resid_mid.0"], plain.cache["resid_mid.0"])
    zero = Edit.zero("cross_write.0"), Edit.zero("cross_out.0")
    by_write, by_out = (model.run(batch, edits=[edit]).logits for edit in zero)
    assert close(by_write, by_out) and not close(by_write, moved.logits)


@every
def test_padding_of_the_source_changes_nothing(name: str) -> None:
    model, batch = model_of(name), inputs()
    pad = torch.ones(2, 3, dtype=torch.long)
    mask = torch.cat([torch.ones(2, N_SOURCE), torch.zeros(2, 3)], 1).long()
    padded = {**batch, "input_ids": torch.cat([batch["input_ids"], pad], 1), "attention_mask": mask}
    plain = model.run(batch, capture=["cross_pattern", "resid_post"])
    run = model.run(padded, capture=["cross_pattern", "resid_post"])
    assert close(run.logits, plain.logits)
    assert close(run.cache["resid_post"], plain.cache["resid_post"])
    assert close(run.cache["cross_pattern"][..., :N_SOURCE], plain.cache["cross_pattern"])
    assert not run.cache["cross_pattern"][..., N_SOURCE:].any()
    assert run.batch.mask is not None and run.batch.mask.shape == (2, N_TARGET)
    assert torch.equal(run.batch.mask_of("cross_v"), mask.bool())
    # A mean over the source leaves its padding out.
    mean = Edit.mean("cross_v.1")
    assert close(model.run(padded, edits=[mean]).logits, model.run(batch, edits=[mean]).logits)


@every
def test_padding_of_the_target_changes_nothing_before_it(name: str) -> None:
    model, batch = model_of(name), inputs()
    ids = batch["decoder_input_ids"]
    mask = torch.ones_like(ids)
    mask[:, -2:] = 0
    padded = {**batch, "decoder_attention_mask": mask}
    run, plain = (model.run(x, capture=["resid_post"]) for x in (padded, batch))
    assert close(run.logits[:, :-2], plain.logits[:, :-2])
    assert torch.equal(run.batch.mask, mask.bool())


class Words:
    """A tokenizer of words that are numbers; others by their length."""

    pad_token_id, bos_token_id = 1, None

    def __len__(self) -> int:
        return 97

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        words = text.split()
        return {"input_ids": [int(w) if w.isdigit() else 10 + len(w) for w in words]}


@every
def test_a_text_is_the_source_and_the_decoder_begins(name: str) -> None:
    module = module_of(name)
    model = Model(module, Words(), id=name)
    run = model.run(["15 16 17 18", "19 20"], capture=["cross_pattern"])
    assert run.logits.shape == (2, 1, 97)
    assert run.batch.ids.tolist() == [[MADE[name][2]["decoder_start_token_id"]]] * 2
    assert run.cache["cross_pattern"].shape[-1] == 4
    assert not run.cache["cross_pattern"][1, ..., 2:].any()
    generated = module.generate(torch.tensor([[15, 16, 17, 18]]), max_new_tokens=1, do_sample=False)
    assert int(run.logits[0, 0].argmax()) == int(generated[0, 1])


def test_a_bias_on_the_logits_is_part_of_them() -> None:
    """Marian's final_logits_bias, which is no module's: the lens has it, W_U alone is refused."""
    module = copy.deepcopy(module_of("marian"))
    module.final_logits_bias.copy_(torch.randn(1, 97, generator=torch.Generator().manual_seed(3)))
    model = Model(module, id="biased")
    assert all(check.passed for check in model.spec.checks)
    run = model.run(inputs(), capture=["resid_post.2"])
    assert close(model.unembed(run.cache["resid_post.2"]), run.logits)
    with pytest.raises(Refused, match="a bias that is no module's"):
        _ = model.W_U


def test_what_reads_the_text_of_a_causal_model_is_refused() -> None:
    model = Model(module_of("t5"), Words(), id="t5")
    refused = "encoder-decoder"
    for analysis in (generate, one_prompt, classify_heads, skeleton):
        given = {classify_heads: [model], skeleton: [model.module]}.get(analysis, [model, "15 16"])
        with pytest.raises((Refused, BadInput), match=refused):
            analysis(*given)
    with pytest.raises(BadInput, match=refused):
        model.run(model.tokenize("15 16"))
    lens = logit_lens(model, "15 16 17")
    assert len(lens.table) == 3


def test_the_encoder_alone_as_before() -> None:
    encoder = Model(module_of("bart").get_encoder(), id="encoder")
    assert encoder.n_layers == 2 and not encoder.spec.causal
    with pytest.raises(Refused, match="no block attends to a source"):
        encoder.run(inputs()["input_ids"], capture=["cross_z"])


def test_the_sum_is_refused_by_name() -> None:
    with pytest.raises(Refused, match=r"encoder_attn|EncDecAttention|normalises"):
        model_of("t5").require_sum("this")
    assert "cross_write" in model_of("t5").spec.not_a_sum


def test_what_is_given_is_checked() -> None:
    model, batch = model_of("bart"), inputs()
    with pytest.raises(BadInput, match="decoder_input_ids"):
        model.run(batch["input_ids"])
    with pytest.raises(BadInput, match="decoder_input_ids"):
        model.run(Batch.of_ids(batch["input_ids"]))
    with pytest.raises(BadInput, match="source's token id 97 is outside"):
        model.run({**batch, "input_ids": batch["input_ids"].clamp_min(97)})
    with pytest.raises(BadInput, match="token id 97 is outside"):
        model.run({**batch, "decoder_input_ids": batch["decoder_input_ids"].clamp_min(97)})
    with pytest.raises(BadInput, match="heads are 0 to 3"):
        model.run(batch, capture=["cross_z.0.4"])


def test_a_decoder_without_a_source_has_no_such_sites() -> None:
    model = Model(FAMILIES["gpt2"](), id="gpt2")
    assert not any(model.layers_with(name) for name in CROSS_SITES)
    for name in CROSS_SITES:
        with pytest.raises(Refused, match="no block attends to a source"):
            model.run(torch.tensor([[5, 6]]), capture=[name])
        with pytest.raises(Refused, match="no block attends to a source"):
            model.run(torch.tensor([[5, 6]]), edits=[Edit.zero(name)])


@pytest.mark.parametrize(
    ("lens", "ours"),
    [
        ("decoder.2.cross_attn.hook_pattern", "cross_pattern.2"),
        ("blocks.2.cross_attn.hook_z", "cross_z.2"),
        ("decoder.1.hook_cross_attn_out", "cross_write.1"),
        ("decoder.1.attn.hook_z", "z.1"),
        ("decoder.1.hook_resid_mid_cross", "resid_mid.1"),
    ],
)
def test_names_of_transformer_lens(lens: str, ours: str) -> None:
    assert str(Site.parse(lens)) == ours


@pytest.mark.parametrize("lens", ["decoder.1.hook_resid_mid", "encoder.1.attn.hook_z"])
def test_names_that_mean_another_place(lens: str) -> None:
    with pytest.raises(BadInput, match=r"resid_mid_cross|get_encoder"):
        Site.parse(lens)


def test_queries_that_read_an_image_are_a_decoder_too() -> None:
    """Queries that begin at zero: what the first block adds is found behind its norms."""
    module = tiny_model("maskformer", "MaskFormerModel", runs)
    model = Model(module, id="maskformer")
    assert not model.spec.refused and all(check.passed for check in model.spec.checks)
    batch = probe_batch(module)
    cache = model.run(batch, capture=["cross_pattern", "cross_v", "cross_z", "resid_pre.0"]).cache
    assert not cache["resid_pre.0"].any()
    n_queries, n_source = cache["cross_pattern.0"].shape[-2:]
    assert n_queries != n_source == cache["cross_v.0"].shape[1]
    mixed = torch.einsum("bhqk,bkhd->bqhd", cache["cross_pattern.1"], cache["cross_v.1"])
    assert close(mixed, cache["cross_z.1"])
