"""Factual recall: a hand-built model whose mover, memory and suppressor are known; identities; the default model."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from circuits.recall import check_options, recall
from circuits.recall_end import head_writes, mixture_weights
from circuits.recall_facts import ask, clean_run
from interp.data.facts import Fact, fact_prompts
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.report import Report
from interp.run.batch import Batch
from interp.run.edits import Edit

N = 12
WORDS = [
    "<bos>",
    "the",
    "capital",
    "of",
    "is",
    "and",
    *(f"c{i}" for i in range(N)),
    *(f"a{i}" for i in range(N)),
]
SUBJECTS, ANSWERS = slice(6, 6 + N), slice(6 + N, 6 + 2 * N)
TEMPLATE = "the capital of {subject} is"
FACTS = [f"c{i}=a{i}" for i in range(N)]
MOVER, DECOY, SUPPRESSOR, MEMORY = (1, 2), (1, 0), (2, 1), 1


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="and"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def slot(start: int, width: int) -> torch.Tensor:
    """[width d_model]: feature i of a slot as a ± pair, so that LayerNorm's mean is 0."""
    out, i = torch.zeros(width, D_MODEL), torch.arange(width)
    out[i, 2 * (start + i)], out[i, 2 * (start + i) + 1] = 1.0, -1.0
    return out


V = len(WORDS)
TOKEN, MOVED, PREDICTION = 0, V, 2 * V
D_MODEL = 8 * V
"""Three slots of V features, and a fourth that nothing reads."""


def capital_model() -> Model:
    """Three layers, of which four things are not zero at the word "is".

    - L1H2, the mover, attends to the subject and copies it into the slot MOVED, which no logit reads.
    - L1H0, a decoy, attends to the subject too, but writes the same for all subjects.
    - The MLP of layer 1 is the memory: moved subject c_i gives prediction a_i.
    - L2H1, the suppressor, attends to the first word and raises "and".

    L0H3 does something elsewhere ("of" copies the first word), and the other MLPs write a constant that
    nothing reads: what never writes is not in a model's map.
    """
    config = GPT2Config(
        vocab_size=V,
        n_positions=16,
        n_embd=D_MODEL,
        n_layer=3,
        n_head=4,
        n_inner=N,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    module = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "ln_" not in name:
                parameter.zero_()
        tokens, moved, prediction = slot(TOKEN, V), slot(MOVED, V), slot(PREDICTION, V)
        module.transformer.wte.weight.copy_(tokens)
        module.lm_head.weight.copy_(prediction)
        subjects, the_end = tokens[SUBJECTS], tokens[WORDS.index("is")]
        head(module, MOVER, the_end, subjects.sum(0), subjects, moved[SUBJECTS])
        same = moved[:1].expand(N, -1)
        head(module, DECOY, the_end, subjects.sum(0), subjects, same)
        first, often = tokens[1:2], prediction[[WORDS.index("and")]]
        head(module, SUPPRESSOR, the_end, first[0], first, 1.2 * often)
        of = tokens[WORDS.index("of")]
        head(module, (0, 3), of, first[0], first, slot(3 * V, V)[:1])
        memory = module.transformer.h[MEMORY].mlp
        memory.c_fc.weight.copy_(moved[SUBJECTS].T)
        memory.c_fc.bias.fill_(-5.0)  # an idle neuron is at gelu(−5) ≈ 0
        memory.c_proj.weight.copy_(prediction[ANSWERS] / 8)
        for idle in (0, 2):
            module.transformer.h[idle].mlp.c_proj.bias.copy_(0.2 * slot(3 * V, V)[idle])
    return Model(module, tokenizer(), id="capitals")


def head(module, place, query, key, reads, writes) -> None:
    """Attend from where `query` is to where `key` is; there, feature reads[i] writes writes[i]."""
    layer, number = place
    attention, first = module.transformer.h[layer].attn, number * D_MODEL // 4
    attention.c_attn.weight[:, first] = query
    attention.c_attn.weight[:, D_MODEL + first] = key
    columns = first + torch.arange(len(reads))
    attention.c_attn.weight[:, 2 * D_MODEL + columns] = reads.T
    # A normed feature is about 10 and is read off a pair: what is written is about 1.
    attention.c_proj.weight[columns] = writes / 20


@pytest.fixture(scope="module")
def capitals() -> Model:
    return capital_model()


@pytest.fixture(scope="module")
def found(capitals):
    return recall(capitals, facts=FACTS, template=TEMPLATE, exact=6, controls=6)


def places(table, label) -> list[tuple[int, int]]:
    return [
        (row["layer"], row["head"]) for row in table.to_dict("records") if row["label"] == label
    ]


def test_the_built_model_knows_its_facts(found):
    assert (found.tables["facts"]["status"] == "used").all() and len(found.tables["facts"]) == N
    assert found.meta["clean"]["probability_low"] > 0.5


def test_the_planted_mover_is_found_and_no_other_head(found):
    assert places(found.table, "mover") == [MOVER]
    assert places(found.table, "negative mover") == []
    row = found.table.query("layer == 1 and head == 2").iloc[0]
    assert row["attention"] > 0.99
    assert row["effect_low"] > 5
    # The subject goes into a slot that no logit reads: all of the effect is through the MLP.
    assert abs(row["contribution"]) < 1e-4 * row["effect"]


def test_attending_to_the_subject_is_not_enough(found):
    decoy = found.table.query("layer == 1 and head == 0").iloc[0]
    assert decoy["attention"] > 0.99
    assert abs(decoy["effect_estimate"]) < 1e-4 and not decoy["effect"] > 1e-4


def test_the_memory_is_the_only_mlp_that_adds_to_the_answer(found):
    table = found.tables["mlps"].set_index("layer")
    assert table.loc[MEMORY, "contribution_low"] > 5
    assert table.loc[MEMORY, "log_p_change_low"] > 2
    # With another fact's answers there is nothing to find.
    assert (
        abs(table.loc[MEMORY, "contribution_shuffled"]) < 0.05 * table.loc[MEMORY, "contribution"]
    )
    rest = table.drop(index=MEMORY)
    assert (rest["contribution"].abs() < 1e-4).all()
    # What the others write still takes part in the norm: by a few thousandths.
    assert (rest["log_p_change"].abs() < 1e-2).all()


def test_the_planted_suppressor_is_found_with_the_token_that_it_raises(found):
    table = found.tables["final"]
    assert places(table, "suppressor") == [SUPPRESSOR]
    row = table.query("head == 1").iloc[0]
    assert row["raises"].split()[0] == "'and'"
    assert row["similarity"] > 0.999 and row["zero_effect_low"] > 0.05
    # It writes the same on every fact, so its mean in its place changes nothing.
    assert abs(row["mean_effect"]) < 1e-4
    together = table.set_index("component")["zero_effect"]
    assert together["suppressors"] == pytest.approx(row["zero_effect"], abs=1e-5)
    assert abs(together["control"]) < 1e-4


def test_the_lens_shows_the_fall_after_the_peak(found):
    assert found.meta["lens"]["peak_layer"] == MEMORY
    assert found.meta["lens"]["fall_low"] > 0.05
    assert (found.tables["lens"]["probability_other"] < 0.1).all()


def test_the_report_comes_back_from_disk_as_it_was(found, tmp_path):
    loaded = Report.load(found.save(tmp_path))
    for name, table in found.tables.items():
        pd.testing.assert_frame_equal(table, loaded.tables[name])


def test_without_the_mover_nothing_is_labelled():
    model = capital_model()
    with torch.no_grad():
        width = D_MODEL // 4
        model.module.transformer.h[1].attn.c_proj.weight[2 * width : 3 * width] = 0
    report = recall(model, facts=FACTS, template=TEMPLATE, known_rank=V, exact=6, controls=6)
    assert set(report.table["label"]) == {""}
    assert np.nanmax(report.table["effect"].abs()) < 1e-4


# --- identities on a random model ----------------------------------------------------------------


@pytest.fixture(scope="module")
def random_model() -> Model:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=V,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    module = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return Model(module, tokenizer(), id="random")


@pytest.fixture(scope="module")
def of_random(random_model):
    return recall(random_model, facts=FACTS, template=TEMPLATE, known_rank=V, exact=12, controls=2)


def asked_again(model: Model):
    """The prompts and counterfactuals of a report, made a second time."""
    facts = [Fact(*text.split("=")) for text in FACTS]
    prompts, _ = fact_prompts(model, facts, TEMPLATE)
    return ask(model, prompts, TEMPLATE, n=32, known_rank=V, seed=0)[0]


def test_effects_are_those_of_a_plain_run_with_the_edit(random_model, of_random):
    asked = asked_again(random_model)
    batch, end = Batch.of_ids(asked.prompts.ids), asked.prompts.end
    rows = torch.arange(N)

    def difference(edits=()):
        logits = random_model.run(batch, edits=edits).logits[:, end]
        return logits[rows, asked.answers] - logits[rows, asked.answers[asked.other]]

    z = random_model.run(batch, capture=["z.1"]).cache["z.1"]
    for number in range(4):
        patch = Edit.patch("z", {1: z[asked.other]}, heads=[(1, number)], positions=[end])
        wanted = float((difference() - difference([patch])).mean())
        row = of_random.table.query("layer == 1 and head == @number").iloc[0]
        assert row["effect"] == pytest.approx(wanted, abs=1e-4)


def test_what_a_head_reads_at_the_subject_is_part_of_what_it_contributes(random_model, of_random):
    """The subject's share, recomputed from a pattern that is zero elsewhere."""
    asked = asked_again(random_model)
    batch = Batch.of_ids(asked.prompts.ids)
    run = random_model.run(batch, capture=["pattern.2", "v.2", "resid_post.2"])
    end, at = asked.prompts.end, asked.prompts.subject[0]
    W_U, norm = random_model.W_U, random_model.final_norm
    vectors = (W_U[:, asked.answers] - W_U[:, asked.answers[asked.other]]).T
    vectors = norm.pull_back(vectors, at=run.cache["resid_post.2"][:, end])
    for number in range(4):
        v = run.cache["v.2"][:, at, number // 2] * run.cache["pattern.2"][:, number, end, at, None]
        wanted = float(((v @ random_model.W_O(2)[number]) * vectors).sum(-1).mean())
        row = of_random.table.query("layer == 2 and head == @number").iloc[0]
        assert row["subject_contribution"] == pytest.approx(wanted, abs=1e-4)


def test_ablations_are_those_of_a_plain_run_with_the_edit(random_model, of_random):
    asked = asked_again(random_model)
    batch, end = Batch.of_ids(asked.prompts.ids), asked.prompts.end

    def log_p(edits=()):
        logits = random_model.run(batch, edits=edits).logits[:, end]
        return logits.log_softmax(-1)[torch.arange(N), asked.answers]

    zero = Edit.zero("mlp_write.2", positions=[end])
    row = of_random.tables["final"].query("component == 'mlp'").iloc[0]
    wanted = float((log_p([zero]) - log_p()).mean())
    assert row["zero_effect"] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("config", "family"),
    [(Gemma2Config, Gemma2ForCausalLM), (GPTNeoXConfig, GPTNeoXForCausalLM)],
    ids=["norm after attention", "parallel"],
)
def test_the_heads_together_write_what_attention_writes(config, family):
    """Sum over heads = attn_write, at the end; and the whole analysis runs."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": V}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": 32}
    if config is Gemma2Config:
        shape |= {"head_dim": 8, "num_key_value_heads": 2, "attention_bias": False}
    torch.manual_seed(0)
    model = Model(family(config(**shape)), tokenizer(), id=config.model_type)
    asked = asked_again(model)
    run = clean_run(model, asked)
    end = asked.prompts.end
    write = model.run(asked.batch, capture=["attn_write.1"]).cache["attn_write.1"][:, end]
    # Biases of W_O, which GPT-NeoX has, are 0 in a new model.
    torch.testing.assert_close(head_writes(model, run, 1, end).sum(1), write, atol=1e-5, rtol=1e-4)
    report = recall(model, facts=FACTS, template=TEMPLATE, known_rank=V, exact=4, controls=2)
    # Where attention and MLP run side by side, no residual stands between them.
    assert report.tables["mlps"]["log_p_change"].isna().all() == (config is GPTNeoXConfig)


def test_the_last_lens_reading_is_the_models_own_probability(of_random):
    last = of_random.tables["lens"].iloc[-1]
    assert last["probability"] == pytest.approx(of_random.meta["clean"]["probability"], abs=1e-5)


def test_mixture_weights_are_those_of_least_squares():
    draw = np.random.default_rng(0)
    parts, target = draw.normal(size=(10, 3, 7)), draw.normal(size=(10, 7))
    weights = draw.dirichlet(np.ones(10), size=2)
    for w, found in zip(weights, mixture_weights(parts, target, weights), strict=True):
        root = np.sqrt(w)[:, None]
        x = (
            (root[..., None] * (parts - np.tensordot(w, parts, 1)))
            .transpose(0, 2, 1)
            .reshape(-1, 3)
        )
        y = (root * (target - w @ target)).ravel()
        np.testing.assert_allclose(found, np.linalg.lstsq(x, y, rcond=None)[0], atol=1e-8)


# --- what is refused -----------------------------------------------------------------------------


def test_options_are_judged_before_a_model_is_needed():
    with pytest.raises(BadInput, match=r"no relation 'capitol'; did you mean 'capital'"):
        check_options(relation="capitol")
    with pytest.raises(BadInput, match=r"\{subject\} once"):
        check_options(template="The capital is")
    with pytest.raises(BadInput, match="'subject=answer'"):
        check_options(facts=["France"])
    with pytest.raises(BadInput, match="exact=0"):
        check_options(exact=0)


def test_a_model_that_knows_too_little_is_told_what_it_answered(random_model):
    with pytest.raises(BadInput, match=r"random knows \d of 12 facts .*It answered c\d"):
        recall(random_model, facts=FACTS, template=TEMPLATE)


def test_a_subject_at_the_end_has_nothing_to_be_carried(capitals):
    with pytest.raises(BadInput, match="let words follow it"):
        recall(capitals, facts=FACTS, template="the capital of {subject}")


def test_too_few_different_answers(capitals):
    same = [f"c{i}=a{i % 2}" for i in range(N)]
    with pytest.raises(BadInput, match="fewer than 3 different answers"):
        recall(capitals, facts=same, template=TEMPLATE, known_rank=V)


def test_a_model_that_reads_both_ways_is_refused():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": V}
    module = BertLMHeadModel(BertConfig(num_attention_heads=4, **shape))
    with pytest.raises(Refused, match="reads both ways"):
        recall(Model(module, tokenizer(), id="bert"), facts=FACTS, template=TEMPLATE)


def test_a_model_of_which_one_block_is_no_sum_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    module = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), num_hidden_layers=3, **sizes))
    module.model.layers[1].register_forward_hook(lambda module, args, out: out.tanh())
    with pytest.raises(Refused, match=r"layer 1 of bent writes is not known: no outputs inside"):
        recall(Model(module.eval(), tokenizer(), id="bent"), facts=FACTS, template=TEMPLATE)


# --- the default model ---------------------------------------------------------------------------


def test_capitals_on_the_default_model(smollm):
    report = recall(smollm, n=24, exact=8, controls=2, final_layers=1)
    movers = report.table.query("label == 'mover'").sort_values("effect", ascending=False)
    # L23H4 attends to the country nearly alone and carries most of the logit difference.
    assert tuple(movers[["layer", "head"]].iloc[0]) == (23, 4)
    assert movers["attention"].iloc[0] > 0.8
    assert movers["effect_low"].iloc[0] > 0.5 * report.meta["clean"]["logit_diff"]
    # L29H0 lowers the right answer, and not another fact's.
    final = report.tables["final"].query("label == 'suppressor' and head == 0").iloc[0]
    assert final["contribution_high"] < -1 < final["contribution_shuffled"]
    statuses = report.tables["facts"]["status"].value_counts()
    assert statuses["used"] == 24 and statuses["not known"] > 0 and statuses.sum() == 128
