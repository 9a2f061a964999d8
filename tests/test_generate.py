"""Generation with edits: Hugging Face's own without them, the text recomputed token by token with them."""

from __future__ import annotations

import pytest
import torch

from interp.errors import BadInput, Refused
from interp.generate import NOTHING, generate
from interp.last_token import replay_last
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.edits import Edit
from tests.families import FAMILIES
from tests.ground_truth.induction_model import character_tokenizer, induction_model


@pytest.fixture
def tiny(tiny) -> Model:
    """Without an end token, so that every row is as long as the others."""
    tiny.module.generation_config.eos_token_id = None
    return tiny


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
NEW = 6
GENERATING = ("llama", "gpt2", "gemma2", "mistral", "gpt_neox", "lfm2", "bloom", "gptj", "olmo2")


def tiny_family(name: str) -> Model:
    torch.manual_seed(0)
    module = FAMILIES[name]().eval()
    with torch.no_grad():  # a wider spread: what is most likely is then not the same everywhere
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    module.generation_config.eos_token_id = None
    return Model(module, id=name)


def recomputed(model: Model, ids: torch.Tensor, edits, during: str, steps: int) -> torch.Tensor:
    """Greedy tokens by a whole pass for each: `edits(positions)` says what acts on which positions."""
    width = ids.shape[1]
    for _ in range(steps):
        length = ids.shape[1]
        where = {
            "all": range(length),
            "prompt": range(width),
            "new": range(width, length),
        }[during]
        logits = model.run(ids, edits=edits(list(where)) if len(where) else []).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[:, width:]


@pytest.mark.parametrize("name", GENERATING)
def test_without_edits_it_is_the_models_own_generation(name):
    model = tiny_family(name)
    own = model.module.generate(IDS, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert torch.equal(generate(model, IDS, max_new_tokens=NEW).ids, own[:, 4:])
    if FAMILIES[name].expected != "no window":
        empty = [Edit.scale("resid_post.0", 1.0), Edit.scale("z", 1.0)]
        assert torch.equal(generate(model, IDS, edits=empty, max_new_tokens=NEW).ids, own[:, 4:])


VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(1))
HEAD = torch.randn(8, generator=torch.Generator().manual_seed(2))


def edits_of(kind: str):
    """positions → edits."""
    return {
        "resid_post": lambda at: [Edit.add("resid_post.0", 3 * VECTOR, positions=at)],
        "z": lambda at: [Edit.zero("z", heads=[(0, 1), (1, 2)], positions=at)],
        "v": lambda at: [Edit.add("v.1", 4 * HEAD, positions=at)],
        "k": lambda at: [Edit.scale("k.0", -2.0, positions=at)],
        "pattern": lambda at: [
            Edit.apply("pattern.1", lambda x, seen: x.flip(1), positions=at),
            Edit.add("mlp_write.0", VECTOR, positions=at),
        ],
        "resid_mid": lambda at: [Edit.scale("resid_mid.1", 0.3, positions=at)],
    }[kind]


@pytest.mark.parametrize("during", ["all", "prompt", "new"])
@pytest.mark.parametrize("kind", ["resid_post", "z", "v", "k", "pattern", "resid_mid"])
def test_with_edits_it_is_the_text_recomputed(tiny, kind, during):
    make = edits_of(kind)
    free = make(None)
    found = generate(tiny, IDS, edits=free, during=during, max_new_tokens=NEW).ids
    wanted = recomputed(tiny, IDS, make, during, NEW)
    assert torch.equal(found, wanted)


def test_the_edits_change_something(tiny):
    plain = generate(tiny, IDS, max_new_tokens=NEW).ids
    for kind in ("resid_post", "v", "k"):
        assert not torch.equal(
            generate(tiny, IDS, edits=edits_of(kind)(None), max_new_tokens=NEW).ids, plain
        )


@pytest.mark.parametrize("name", ["gemma2", "lfm2", "gpt2", "mistral"])
def test_other_families_are_followed_too(name):
    model = tiny_family(name)
    make = edits_of("resid_post")
    found = generate(model, IDS, edits=make(None), max_new_tokens=NEW).ids
    assert torch.equal(found, recomputed(model, IDS, make, "all", NEW))


def test_named_positions_are_those_of_the_prompt(tiny):
    def make(at):
        return [Edit.add("resid_pre.1", 4 * VECTOR, positions=[1])]

    found = generate(tiny, IDS, edits=make(None), max_new_tokens=NEW).ids
    assert torch.equal(found, recomputed(tiny, IDS, make, "all", NEW))
    with pytest.raises(BadInput, match="leaves the prompt"):
        generate(tiny, IDS, edits=make(None), during="new")


def test_left_padding_changes_nothing(tiny):
    ids = torch.tensor([[0, 0, 5, 6], [9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    edits = [Edit.add("resid_post.0", 3 * VECTOR)]
    both = generate(tiny, Batch.of_ids(ids, mask), edits=edits, max_new_tokens=NEW).ids
    for row, prompt in enumerate((ids[:1, 2:], ids[1:])):
        alone = generate(tiny, prompt, edits=edits, max_new_tokens=NEW).ids[0]
        assert torch.equal(both[row][both[row] != NOTHING], alone)


def test_a_strength_of_zero_changes_no_token_and_no_logit(tiny):
    edits = [Edit.add("resid_post.0", 0.0 * VECTOR)]
    assert torch.equal(tiny.run(IDS, edits=edits).logits, tiny.run(IDS).logits)
    plain = generate(tiny, IDS, max_new_tokens=NEW)
    assert torch.equal(generate(tiny, IDS, edits=edits, max_new_tokens=NEW).ids, plain.ids)


def test_draws_follow_the_seed_and_leave_the_generator_alone(tiny):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, again, other = (
        generate(tiny, IDS, temperature=2.0, seed=seed, max_new_tokens=12).ids for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert one.shape != other.shape or not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_end_tokens_and_stops_end_a_row():
    model = Model(induction_model(), character_tokenizer(), id="induction")
    text = "abcdabcda"  # the model goes on with bcda…
    out = generate(model, [text, "xyzxyzx"], max_new_tokens=8, stop=["d"])
    assert out.texts[0].replace(" ", "") == "bc"
    assert out.ids[0].tolist().count(NOTHING) == out.ids.shape[1] - 3
    assert out.texts[1].replace(" ", "").startswith("yzxyz")
    model.module.generation_config.eos_token_id = model.token_id("d")
    ended = generate(model, [text], max_new_tokens=8)
    assert model.tokens(ended.ids[0].tolist()) == ["b", "c", "d"]


def test_the_model_is_left_as_it_was(tiny):
    with pytest.raises(BadInput, match="heads 0 to 3"):
        generate(tiny, IDS, edits=[Edit.zero("z", heads=[(0, 9)])])
    for module in tiny.module.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert not tiny.module.config._attn_implementation.startswith("interp_window")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"during": "prompts"}, "did you mean 'prompt'"),
        ({"max_new_tokens": 0}, "wanted 1 or more"),
        ({"temperature": -1.0}, "most likely token"),
        ({"stop": "x"}, "wanted a list"),
        ({"stop": ["x"]}, "without a tokenizer"),
        ({"max_new_tokens": 100}, "max_new_tokens=60 does"),
        ({"edits": [Edit.zero("z.9")]}, "names layer 9"),
    ],
)
def test_bad_options_are_told(tiny, options, message):
    with pytest.raises(BadInput, match=message):
        generate(tiny, IDS, **options)


def test_what_cannot_be_generated_is_told(tiny):
    with pytest.raises(BadInput, match="padded on the right"):
        generate(tiny, Batch.of_ids(IDS, torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])))
    with pytest.raises(Refused, match="does not generate"):
        generate(Model(FAMILIES["bert"]().eval(), id="bert"), IDS)


# --- the last token -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral", "lfm2", "bloom", "bert"])
def test_edits_of_the_last_token_are_those_of_whole_passes(name):
    model = tiny_family(name) if name != "bert" else Model(FAMILIES["bert"]().eval())
    vectors = torch.randn(5, model.spec.d_model, generator=torch.Generator().manual_seed(0))
    sites = ["resid_pre.1", "resid_post.0", "resid_post.2"]
    variants = [[]] + [[Edit.add(s, v)] for s in sites for v in vectors]
    if name != "bert":
        layers = model.layers_with("z")
        variants += [[Edit.zero("z", heads=[(layer, h)])] for layer in layers for h in range(4)]
        variants.append([Edit.zero(f"z.{layers[0]}.1"), Edit.add("resid_post.1", vectors[0])])
    counted = []
    found = replay_last(model, IDS, variants, lambda x: x.clone(), progress=counted.append)
    assert sum(counted) == len(variants)
    for variant, logits in zip(variants, found, strict=True):
        at = [Edit(edit.site, edit.change, edit.heads, [3]) for edit in variant]
        whole = model.run(IDS, edits=at).logits[:, -1]
        torch.testing.assert_close(logits, whole, atol=2e-4, rtol=2e-4)


def test_the_last_token_of_padded_prompts(tiny):
    ids = torch.tensor([[0, 0, 5, 6], [9, 10, 11, 12]])
    batch = Batch.of_ids(ids, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    variants = [[Edit.add("resid_post.0", VECTOR)], [Edit.zero("z.1.2")]]
    found = replay_last(tiny, batch, variants, lambda x: x.clone())
    for row, prompt in enumerate((ids[:1, 2:], ids[1:])):
        alone = replay_last(tiny, prompt, variants, lambda x: x.clone())
        for mine, other in zip(found, alone, strict=True):
            torch.testing.assert_close(mine[row], other[0], atol=1e-4, rtol=1e-4)


def test_bad_edits_of_the_last_token_are_told(tiny):
    for edit, message in (
        (Edit.zero("z.1", positions=[3]), "without positions"),
        (Edit.zero("v.1"), "another site than k and v"),
        (Edit.zero("z.7"), "names layer 7"),
    ):
        with pytest.raises(BadInput, match=message):
            replay_last(tiny, IDS, [[edit]], lambda x: x)
    padded = Batch.of_ids(IDS, torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))
    with pytest.raises(BadInput, match="last column"):
        replay_last(tiny, padded, [[]], lambda x: x)


def test_the_default_models_generation(smollm):
    texts = ["The capital of France is", "Once upon a time there was a"]
    batch = smollm.tokenize(texts, padding_side="left")
    own = smollm.module.generate(
        batch.ids, attention_mask=batch.mask.long(), max_new_tokens=8, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    out = generate(smollm, texts, max_new_tokens=8)
    assert torch.equal(out.ids, own[:, batch.ids.shape[1] :])
    assert "Paris" in out.texts[0]
