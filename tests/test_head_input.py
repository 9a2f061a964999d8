"""Models and prompts that some head detectors cannot use: what is said, before anything runs."""

from __future__ import annotations

import pytest
import torch
from transformers import BertModel, LlamaConfig, LlamaForCausalLM

import circuits
import interp
from circuits.heads.detector import catalogue
from circuits.heads.needle import needle_runs
from interp.data.prompts import lead_token
from tests.families import FAMILIES
from tests.ground_truth.encoder_model import bert_tokenizer
from tests.ground_truth.induction_model import SYMBOLS, character_tokenizer


def model_of(layers: int = 2, bos: int | None = 0, eos: int | None = None):
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    if bos is None:
        tokenizer.bos_token = None
    if eos is not None:
        tokenizer.eos_token = SYMBOLS[eos]
    config = LlamaConfig(
        vocab_size=len(SYMBOLS),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=300,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    return interp.load(LlamaForCausalLM(config), tokenizer=tokenizer)


def heads(model, *detectors: str):
    return circuits.classify_heads(
        model, detectors=detectors, prompts=4, ablate=False, evidence=0, progress=False
    )


@pytest.mark.parametrize(
    ("bos", "eos", "said"),
    [
        (
            None,
            None,
            "no BOS, CLS or EOS token: prompts begin with ordinary text, and it is that token",
        ),
        (None, 2, "no BOS token: prompts begin with EOS (a) instead, and it is that token"),
    ],
)
def test_without_bos_a_sink_says_what_it_is_on_instead(bos, eos, said):
    model = model_of(bos=bos, eos=eos)
    assert lead_token(model).tolist() == ([] if eos is None else [eos])
    notes = heads(model, "first_token_sink").meta["notes"]
    assert len([note for note in notes if said in note]) == 1


def test_a_bos_that_only_the_config_knows_is_not_called_the_tokenizers():
    model = model_of()
    model.tokenizer.bos_token = None
    notes = heads(model, "first_token_sink").meta["notes"]
    said = "no BOS token: prompts begin with the BOS of the model's config (<bos>) instead"
    assert len([note for note in notes if said in note]) == 1


def test_with_bos_nothing_is_said_of_it():
    assert not any("BOS" in note for note in heads(model_of(), "first_token_sink").meta["notes"])


def test_one_layer_has_no_induction_and_says_so():
    report = heads(model_of(layers=1), "induction", "episodic", "previous_token")
    assert set(report.meta["skipped"]) == {"induction", "episodic"}
    for reason in report.meta["skipped"].values():
        assert "needs 2 attention layers" in reason and "the model has 1" in reason
    assert "previous_token" in report.table and "induction" not in report.table
    with pytest.raises(interp.errors.BadInput, match="no detector is left"):
        heads(model_of(layers=1), "induction")


def test_an_encoder_skips_by_name_everything_that_reads_left_to_right():
    model = interp.load(FAMILIES["bert"](), tokenizer=bert_tokenizer())
    assert not isinstance(model.module, BertModel)  # with its language-model head
    causal = {d.name for d in catalogue() if d.causal_only}
    assert len(causal) > 10
    report = heads(model, "current_token", *sorted(causal))
    assert set(report.meta["skipped"]) == causal
    assert set(report.meta["skipped"].values()) == {"needs a model that reads left to right"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"text": "Too short."}, "give a text longer than the needle"),
        ({"lengths": [5000]}, "reads at most 300 (n_ctx); give lengths up to"),
        ({"lengths": [200], "text": "word " * 15}, "give a longer text or a shorter length"),
    ],
)
def test_needles_and_haystacks_that_do_not_fit(options, said):
    with pytest.raises(interp.errors.BadInput) as told:
        needle_runs(model_of(), 2, **options)
    assert said in str(told.value)


def test_the_command_line_says_the_same(run, tmp_path):
    model = model_of(layers=1, bos=None)
    model.module.save_pretrained(tmp_path / "one")
    model.tokenizer.save_pretrained(tmp_path / "one")
    out = tmp_path / "out"
    common = ("--prompts", "4", "--no-ablate", "--evidence", "0", "--out", out)
    code, _, err = run("heads", tmp_path / "one", "--detectors", "induction", *common)
    assert code == 2 and "needs 2 attention layers" in err and not list(out.glob("*"))
    code, _, _ = run("heads", tmp_path / "one", "--detectors", "first_token_sink", *common)
    assert code == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "prompts begin with ordinary text" in page
