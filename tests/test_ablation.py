"""Effects of ablating heads, beside plain Hugging Face forwards with a hook, on decoders, encoders and classifiers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ViTConfig,
    ViTForImageClassification,
)

import circuits
import interp
from circuits.heads.ablation import KINDS, ablation_effects
from circuits.heads.importance import EXACT
from circuits.heads.judge import judge_of
from interp.data.images import image_prompts
from interp.data.prompts import repeated_tokens, text_windows
from tests.families import IMAGE
from tests.ground_truth.encoder_model import D_VOCAB, bert_tokenizer
from tests.ground_truth.induction_model import INDUCTION_HEAD, PREVIOUS_TOKEN_HEAD

CLOSE = 2e-5
"""Losses are of float32 logits; batches of another size add in another order."""


@torch.no_grad()
def forward(module: nn.Module, inputs: dict, into: nn.Module, columns: slice, kind: str) -> Tensor:
    """Logits of a plain forward in which the columns of one head, in what `into` reads, are replaced."""

    def hook(_, args: tuple) -> tuple:
        z = args[0].clone()
        mine = z[..., columns]
        if kind == "mean":
            z[..., columns] = mine.mean((0, 1))
        elif kind == "zero":
            z[..., columns] = 0.0
        else:  # the same derangement as the toolkit's: rows in a drawn order, each gets the one before
            order = torch.randperm(len(z), generator=torch.Generator().manual_seed(0)).tolist()
            other = {row: order[i - 1] for i, row in enumerate(order)}
            z[..., columns] = mine[[other[row] for row in range(len(z))]]
        return (z,)

    handle = into.register_forward_pre_hook(hook)
    try:
        return module(**inputs).logits
    finally:
        handle.remove()


def cross_entropy(logits: Tensor, targets: Tensor) -> np.ndarray:
    each = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return each.mean(1).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_plain_forwards_of_a_decoder(tiny, kind):
    prompts, _ = repeated_tokens(tiny, 3, length=12)
    inputs = {"input_ids": prompts.ids}
    targets = prompts.ids[:, 13:]
    with torch.no_grad():
        clean = cross_entropy(tiny.module(**inputs).logits[:, 12:-1], targets)
    found = ablation_effects(tiny, prompts, tiny.spec.heads, kind=kind)
    assert np.abs(found).max() > 1e-4
    for effect, (layer, head) in zip(found, tiny.spec.heads, strict=True):
        into = tiny.module.model.layers[layer].self_attn.o_proj
        logits = forward(tiny.module, inputs, into, slice(8 * head, 8 * head + 8), kind)
        np.testing.assert_allclose(
            effect, cross_entropy(logits[:, 12:-1], targets) - clean, atol=CLOSE
        )


def masked_lm():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=D_VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=80,
        pad_token_id=0,
        initializer_range=0.3,
    )
    tokenizer = bert_tokenizer()
    tokenizer.mask_token = "<unk>"
    return BertForMaskedLM(config), tokenizer


def test_an_encoder_is_judged_by_the_tokens_that_were_masked():
    module, tokenizer = masked_lm()
    model = interp.load(module, tokenizer=tokenizer)
    prompts = text_windows(model, 3, length=40)
    judge = judge_of(model, prompts)
    ids = judge.batch.ids
    changed = (ids != prompts.ids).any(0).nonzero()[:, 0]
    assert changed.tolist() == judge.read.tolist() and len(changed) == round(0.15 * 40)
    assert (ids[:, changed] == tokenizer.mask_token_id).all()
    assert prompts.content[:, changed].all()
    inputs = {name: x for name, x in judge.batch.inputs.items() if name != "position_ids"}
    targets = prompts.ids[:, changed]
    with torch.no_grad():
        clean = cross_entropy(module(**inputs).logits[:, changed], targets)
    heads = [(0, 1), (1, 3)]
    for effect, (layer, head) in zip(ablation_effects(model, prompts, heads), heads, strict=True):
        into = module.bert.encoder.layer[layer].attention.output.dense
        logits = forward(module, inputs, into, slice(8 * head, 8 * head + 8), "mean")
        np.testing.assert_allclose(
            effect, cross_entropy(logits[:, changed], targets) - clean, atol=CLOSE
        )
        assert np.abs(effect).max() > 1e-4


def test_on_repeats_an_encoder_hides_tokens_of_the_second_copy():
    module, tokenizer = masked_lm()
    model = interp.load(module, tokenizer=tokenizer)
    prompts, _ = repeated_tokens(model, 2, length=20)
    judge = judge_of(model, prompts)
    assert prompts.second_half[:, judge.read].all() and judge.title.startswith("loss on masked")


def classifier() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(**IMAGE, num_labels=5, initializer_range=0.3)
    return ViTForImageClassification(config)


def test_a_classifier_is_judged_by_how_far_its_classes_move():
    module = classifier()
    model = interp.load(module)
    images = image_prompts(model, 3)
    inputs = {"pixel_values": images.pixels}
    with torch.no_grad():
        p = module(**inputs).logits.log_softmax(-1)
    head = (1, 2)
    names = [name for name, _ in module.named_modules()]
    into = module.get_submodule(model.spec.blocks[1].W_O)
    assert model.spec.blocks[1].W_O in names
    width = model.spec.d_head
    logits = forward(module, inputs, into, slice(2 * width, 3 * width), "mean")
    wanted = (p.exp() * (p - logits.log_softmax(-1))).sum(-1)
    found = ablation_effects(model, images, [head])[0]
    np.testing.assert_allclose(found, wanted.numpy(), atol=CLOSE)
    assert found.min() > 1e-5


def _report(module: nn.Module, tokenizer, labelled: Callable[[int], bool], monkeypatch):
    """A report in which heads are labelled as told, whatever they do: what is tested is what follows."""
    from circuits.heads import classify

    original = classify.heads_table

    def table(verdicts, heads, groups):
        made = original(verdicts, heads, groups)
        role = next(v.scores.detector.name for v in verdicts if v.scores.detector.labels)
        made["labels"] = [role if labelled(i) else "" for i in range(len(made))]
        return made

    monkeypatch.setattr(classify, "heads_table", table)
    model = interp.load(module, tokenizer=tokenizer)
    return circuits.classify_heads(model, prompts=4, evidence=0, progress=False)


@pytest.mark.parametrize(
    ("make", "title"),
    [
        (masked_lm, "loss on masked tokens of"),
        (lambda: (classifier(), None), "change of class probabilities"),
    ],
)
def test_labelled_heads_of_other_models_are_ablated_too(make, title, monkeypatch):
    table = _report(*make(), lambda i: i == 1, monkeypatch).table
    assert table["ablation_effect"].notna().tolist() == [i == 1 for i in range(len(table))]
    assert table["ablation_metric"][1].startswith(title)
    assert np.isfinite(table["ablation_control"][1])


def test_without_a_head_there_is_nothing_to_judge_by(monkeypatch):
    module, tokenizer = masked_lm()
    body = BertModel(module.config)
    table = _report(body, tokenizer, lambda i: True, monkeypatch).table
    assert table["ablation_effect"].isna().all()
    model = interp.load(body, tokenizer=tokenizer)
    with pytest.raises(interp.errors.Refused, match="neither tokens nor classes"):
        ablation_effects(model, text_windows(model, 2, length=20), [(0, 0)])


def test_an_unknown_kind_is_told(tiny):
    with pytest.raises(interp.errors.BadInput, match="did you mean 'resample'"):
        ablation_effects(tiny, repeated_tokens(tiny, 2)[0], [(0, 0)], kind="resampl")


def test_the_table_of_every_head_has_all_three_kinds_with_intervals(hand_built):
    """The planted heads cost several nats by each kind, the others nothing."""
    seen = EXACT.observe(hand_built, 4, 0)
    table = EXACT.tables(seen)["exact_ablation"].set_index(["layer", "head"])
    planted = [PREVIOUS_TOKEN_HEAD, INDUCTION_HEAD]
    for kind in KINDS:
        assert (table.loc[planted, kind] > 3).all()
        assert (table.drop(planted)[kind].abs() < 1e-4).all()
        assert (table[f"{kind}_low"] <= table[kind] + 1e-9).all()
        assert (table[kind] <= table[f"{kind}_high"] + 1e-9).all()
    assert table.loc[planted, "layer_relative"].to_numpy() == pytest.approx(1.0)
