"""Tasks: aligned prompts, positions where they say they are, words that split refused, files read."""

import json

import pandas as pd
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from circuits.measure import measure
from circuits.tasks import TASKS, as_pairs, check_task, pairs_from_frame, pairs_from_template
from circuits.tasks import greater_than as years
from circuits.tasks.make import one_token_words, token_ids
from interp.errors import BadInput
from tests.ground_truth.induction_model import character_tokenizer, induction_model

NEED_TEXT = [name for name in TASKS if name != "induction"]
VARIANTS = [f"{name}:{variant}" for name, task in TASKS.items() for variant in task.variants]

TEMPLATE = "{A} and {B}, {B} -"
ROWS = [{"A": "ab", "B": "cd"}, {"A": "xy", "B": "zz"}]


@pytest.fixture
def letters(tiny):
    """The tiny model reading one token a character, so that positions are known by counting."""
    tiny.tokenizer = character_tokenizer()
    return tiny


def text(model, ids) -> str:
    return "".join(model.tokens(ids.tolist()))


# --- templates -------------------------------------------------------------------------------


def test_a_slot_names_the_last_token_of_what_fills_it(letters):
    pairs = pairs_from_template(
        letters,
        TEMPLATE,
        [{**row, "which": "1"} for row in ROWS],
        {"A": "pq", "B2": "{A}"},
        answer="m",
        wrong=["n", "o"],
        positions={"comma": "B{which}+1", "A+1": "A+1"},
        name="mine",
    )
    assert text(letters, pairs.clean[0]) == "ab and cd, cd -"
    assert text(letters, pairs.corrupted[0]) == "pq and cd, ab -"  # {A} is the clean row's word
    assert text(letters, pairs.corrupted[1]) == "pq and zz, xy -"
    where = {"A": 1, "A+1": 2, "B1": 8, "comma": 9, "B2": 12, "end": 14}
    assert {name: place.tolist() for name, place in pairs.positions.items()} == {
        name: [place] * 2 for name, place in where.items()
    }
    assert pairs.name == "mine"
    assert [letters.tokens(row) for row in pairs.wrong.tolist()] == [["n", "o"]] * 2


def test_rows_templates_and_corruptions_may_be_given_one_by_one(letters):
    made = pairs_from_template(
        letters,
        ["{A} - {B},", "{B} - {A},"],
        pd.DataFrame(ROWS),
        [{"A": "pq"}, {"B": "rs"}],
        answer="{A}"[:0] + " ",
        wrong="-",
    )
    assert [text(letters, row) for row in made.clean] == ["ab - cd,", "zz - xy,"]
    assert [text(letters, row) for row in made.corrupted] == ["pq - cd,", "rs - xy,"]
    assert made.position("A").tolist() == [1, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corrupted": {"A": "pqr"}}, "ends at token 1 of the clean prompt and 2"),
        ({"corrupted": {"a": "pq"}}, "no slot .* 'a'; known: A, B"),
        ({"answer": "mn"}, "'mn' is not one token"),
        ({"answer": "{C}"}, "no slot value"),
        ({"template": "{A} and {B}, {B} to"}, "did you mean ' m'"),
        ({"positions": ["B3+1"]}, "no slot .* 'B3'"),
        ({"positions": ["A-5"]}, "token -4"),
        ({"rows": []}, "no rows"),
        ({"corrupted": [{"A": "pq"}]}, "2 rows and 1 corrupted rows"),
    ],
)
def test_what_does_not_fit_is_told(letters, change, message):
    given = {
        "template": TEMPLATE,
        "rows": ROWS,
        "corrupted": {"A": "pq"},
        "answer": "m",
        "wrong": "n",
    }
    with pytest.raises(BadInput, match=message):
        pairs_from_template(letters, **(given | change))


def test_rows_of_another_length_are_dropped_on_request(letters):
    rows = [*ROWS, {"A": "abc", "B": "cd"}, {"A": "abc", "B": "cd"}, {"A": "st", "B": "uv"}]
    changes = [{"A": "pq"}] * 2 + [{"A": "pqr"}, {"A": "pq"}, {"A": "pq"}]
    given = {"answer": "m", "wrong": "n"}
    with pytest.raises(BadInput, match="row 3"):
        pairs_from_template(letters, TEMPLATE, rows, changes, **given)
    pairs = pairs_from_template(letters, TEMPLATE, rows, changes, **given, drop=True)
    assert [text(letters, row)[:2] for row in pairs.clean] == ["ab", "xy", "st"]


def test_a_bos_token_moves_positions_and_a_token_after_the_text_is_left_out(letters):
    plain = pairs_from_template(letters, TEMPLATE, ROWS, {"A": "pq"}, answer="m", wrong="n")
    letters.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <unk>", special_tokens=[("<bos>", 0), ("<unk>", 1)]
    )
    assert letters.tokenize("ab").ids[0].tolist()[::3] == [0, 1]
    pairs = pairs_from_template(letters, TEMPLATE, ROWS, {"A": "pq"}, answer="m", wrong="n")
    assert torch.equal(pairs.clean[:, 1:], plain.clean) and pairs.clean[:, 0].tolist() == [0, 0]
    assert torch.equal(pairs.answers, plain.answers)
    assert pairs.position("B2").tolist() == [13, 13]


# --- tables and files ------------------------------------------------------------------------

FRAME = pd.DataFrame(
    {
        "clean": ["ab cd -", "xy zz -"],
        "corrupted": ["pq cd -", "rs zz -"],
        "answer": ["m", "n"],
        "wrong": ["o", "o"],
        "position_first": ["ab", "xy"],
        "position_space": [-2, -2],
    }
)


def test_a_table_becomes_pairs(letters):
    pairs = pairs_from_frame(letters, FRAME)
    assert text(letters, pairs.corrupted[1]) == "rs zz -"
    assert pairs.position("first").tolist() == [1, 1]
    assert pairs.position("space").tolist() == [5, 5]
    several = FRAME.assign(wrong=[["o"], ["p", "q"]])
    assert pairs_from_frame(letters, several).wrong[0, 1] == -1
    named = pairs_from_frame(letters, FRAME, name="mine", positions={"it": "position_first"})
    assert sorted(named.positions) == ["end", "it"] and named.name == "mine"


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_files_give_the_same_pairs(letters, tmp_path, ending):
    path = tmp_path / f"mine.{ending}"
    frame = FRAME.astype({"position_space": str})
    if ending == "csv":
        frame.to_csv(path, index=False)
    elif ending == "parquet":
        frame.to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in FRAME.to_dict("records")))
    wanted, pairs = pairs_from_frame(letters, FRAME), as_pairs(letters, str(path))
    assert pairs.name == "mine"
    for name in ("clean", "corrupted", "answers", "wrong"):
        assert torch.equal(getattr(pairs, name), getattr(wanted, name))
    assert torch.equal(pairs.position("space"), wanted.position("space"))
    assert len(as_pairs(letters, str(path), n=1)) == 1


def test_bad_tables_are_told(letters, tmp_path):
    with pytest.raises(BadInput, match="no column 'wrong'"):
        pairs_from_frame(letters, FRAME.drop(columns="wrong"))
    with pytest.raises(BadInput, match="did you mean 'position_first'"):
        pairs_from_frame(letters, FRAME, positions={"it": "position_frist"})
    with pytest.raises(BadInput, match="occurs 2 times"):
        pairs_from_frame(letters, FRAME.assign(position_first=[" ", " "]))
    with pytest.raises(BadInput, match="occurs 0 times"):
        pairs_from_frame(letters, FRAME.assign(position_first=["ab", "ab"]))
    with pytest.raises(BadInput, match="token 9"):
        pairs_from_frame(letters, FRAME.assign(position_space=9))
    with pytest.raises(BadInput, match="wanted a text"):
        pairs_from_frame(letters, FRAME.assign(clean=[None, "xy zz -"]))
    with pytest.raises(BadInput, match="clean 1"):
        pairs_from_frame(letters, FRAME.assign(clean=["ab cd -", "xy -"]), positions={})
    with pytest.raises(BadInput, match="no file"):
        as_pairs(letters, str(tmp_path / "none.csv"))


# --- the shipped tasks -----------------------------------------------------------------------


def test_names_are_found_or_the_nearest_is_told(tiny):
    pairs = as_pairs(tiny, "induction", n=2)
    assert as_pairs(tiny, pairs) is pairs
    with pytest.raises(BadInput, match="did you mean 'induction'"):
        as_pairs(tiny, "inductoin")
    with pytest.raises(BadInput, match="did you mean 'earlier'"):
        check_task("induction:erlier")
    with pytest.raises(BadInput, match="n=0"):
        as_pairs(tiny, "induction", n=0)


@pytest.mark.parametrize("name", NEED_TEXT)
def test_tasks_of_text_say_that_they_need_a_tokenizer(tiny, name):
    with pytest.raises(BadInput, match=r"without a tokenizer.*'induction'"):
        as_pairs(tiny, name, n=2)


@pytest.mark.parametrize("name", [name for name in NEED_TEXT if name != "greater_than"])
def test_words_that_split_are_refused_with_a_list(letters, name):
    with pytest.raises(BadInput, match=r"(?i)split: \w+, \w+"):
        as_pairs(letters, name, n=2)


def test_only_words_that_split_are_left_out(letters, caplog):
    caplog.set_level("INFO", "interp")
    letters.tokenizer = words_tokenizer(r" ?\w+", ["the", " Mary", " John"])
    letters.tokenizer.unk_token = None
    assert one_token_words(letters, "t", "names", "Mary John", need=2) == ["Mary", "John"]
    letters.tokenizer = character_tokenizer()
    with pytest.raises(BadInput, match=r"needs 1 names .* These split: Mary, John"):
        one_token_words(letters, "t", "names", "Mary John", need=1)


def words_tokenizer(pattern: str, words: list[str]) -> PreTrainedTokenizerFast:
    """One token for each piece that `pattern` finds."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("digits", [1, 2])
def test_greater_than_follows_the_tokenizers_digits(tiny_model, digits):
    """Two-digit tokens: 33 … 99 are right after 1732. Single digits: 4 … 9, and 3 is neither."""
    model = tiny_model(vocab_size=200)
    numbers = [f"{i:0{digits}d}" for i in range(10**digits)]
    words = ["The", " lasted", " from", " the", " year", " to", " "]
    words += [f" {noun}" for noun in years.NOUNS.split()]
    model.tokenizer = words_tokenizer(rf"\d{{{digits}}}| ?[A-Za-z]+| ", words + numbers)
    pairs = as_pairs(model, "greater_than", n=8)
    for row in range(8):
        tokens = model.tokens(pairs.clean[row].tolist())
        assert "".join(tokens).startswith("The ") and len(tokens) == pairs.length
        first = int(tokens[pairs.position("YY")[row]])
        right, wrong = (
            {int(token) for token in model.tokens(i for i in ids[row].tolist() if i >= 0)}
            for ids in (pairs.answers, pairs.wrong)
        )
        assert right == set(range(first + 1, 10**digits))
        last_of_tens = digits == 1 and tokens[pairs.position("YY")[row] + 1] == "9"
        assert wrong == set(range(first + 1 if digits == 2 or last_of_tens else first))
        corrupted = model.tokens(pairs.corrupted[row].tolist())
        start = int(pairs.position("YY")[row])
        assert "".join(corrupted[start : start + 3 - digits]) == "01"
        assert corrupted[:start] == tokens[:start]


def test_joined_digits_are_refused(letters):
    letters.tokenizer = words_tokenizer(
        r"\d+| ?[A-Za-z]+| ", ["The", "the", " year", *(f" {n}" for n in years.NOUNS.split())]
    )
    with pytest.raises(BadInput, match="splits years"):
        as_pairs(letters, "greater_than", n=2)


@pytest.mark.parametrize("corruption", ["earlier", "successor"])
def test_induction_pairs_are_what_they_say(tiny, corruption):
    pairs = as_pairs(tiny, f"induction:{corruption}", n=8, seed=3)
    rows = torch.arange(8)
    earlier, after = pairs.position("earlier"), pairs.position("next")
    last, answer = pairs.clean[:, -1], pairs.answers[:, 0]
    assert torch.equal(pairs.clean[rows, earlier], last)
    assert torch.equal(pairs.clean[rows, after], answer) and bool((after == earlier + 1).all())
    changed = pairs.clean != pairs.corrupted
    where = earlier if corruption == "earlier" else after
    assert torch.equal(changed.int().argmax(1), where) and bool((changed.sum(1) == 1).all())
    seen = (pairs.corrupted == last[:, None]).sum(1)
    assert seen.tolist() == [1 if corruption == "earlier" else 2] * 8
    assert bool((pairs.wrong[:, 0] != answer).all())
    assert all(int(w) in row for w, row in zip(pairs.wrong, pairs.corrupted.tolist(), strict=True))


def test_a_model_that_only_does_induction_does_induction():
    import interp

    model = interp.load(induction_model(), tokenizer=character_tokenizer())
    for corruption in ("earlier", "successor"):
        found = measure(model, as_pairs(model, f"induction:{corruption}", n=8))
        assert float(found.clean.min()) > 0 and not found.notes
        assert float(found.corrupted.max()) < float(found.clean.min())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_aligned_and_drawn_by_its_seed(smollm, name):
    """Prompts of both sides differ, positions are inside, answers are not wrong answers."""
    pairs, again, other = (as_pairs(smollm, name, n=6, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(pairs.clean, again.clean) and torch.equal(pairs.corrupted, again.corrupted)
    assert pairs.clean.shape != other.clean.shape or not torch.equal(pairs.clean, other.clean)
    assert bool((pairs.clean != pairs.corrupted).any(1).all())
    assert len(pairs) == 6 and pairs.name == name
    for right, wrong in zip(pairs.answers.tolist(), pairs.wrong.tolist(), strict=True):
        assert not {i for i in right if i >= 0} & {i for i in wrong if i >= 0}


def test_positions_hold_the_words_they_name(smollm):
    pairs = as_pairs(smollm, "ioi", n=4)
    rows = torch.arange(4)
    at = {name: pairs.clean[rows, where] for name, where in pairs.positions.items()}
    assert torch.equal(at["S1"], at["S2"]) and torch.equal(at["S1"], pairs.wrong[:, 0])
    assert torch.equal(at["IO"], pairs.answers[:, 0])
    assert pairs.position("IO").tolist() == [1, 3, 1, 3]  # ABBA and BABA in turn
    colors = as_pairs(smollm, "colored_objects", n=6)
    assert torch.equal(
        colors.clean[torch.arange(6), colors.position("color")], colors.answers[:, 0]
    )
    facts = as_pairs(smollm, "facts:country", n=4)
    words = [
        smollm.tokens([row[p]])[0]
        for row, p in zip(facts.clean, facts.position("subject"), strict=True)
    ]
    assert all(word.strip() and word != " is" for word in words)


def test_ioi_corruptions_change_what_they_say(smollm):
    def names(corruption):
        pairs = as_pairs(smollm, f"ioi:{corruption}", n=8)
        rows = torch.arange(8)
        return [
            {slot: side[rows, pairs.position(slot)] for slot in ("IO", "S1", "S2")}
            for side in (pairs.clean, pairs.corrupted)
        ]

    clean, abc = names("abc")
    for a in abc.values():
        assert not any(bool((a == c).any()) for c in clean.values())
    assert not bool((abc["S1"] == abc["S2"]).any())
    clean, flipped = names("s2")
    assert torch.equal(flipped["S2"], clean["IO"]) and torch.equal(flipped["S1"], clean["S1"])
    clean, new = names("s2-new")
    assert not bool((new["S2"] == clean["S2"]).any() | (new["S2"] == clean["IO"]).any())
    clean, other = names("io")
    assert torch.equal(other["S2"], clean["S2"]) and not bool((other["IO"] == clean["IO"]).any())


def test_the_default_model_does_every_task(smollm):
    """Clean above corrupted everywhere, and the right answer preferred in most prompts."""
    found = {}
    for name in VARIANTS:
        pairs = as_pairs(smollm, name, n=8)
        of = measure(smollm, pairs)
        found[name] = {
            "clean": float(of.clean.mean()),
            "corrupted": float(of.corrupted.mean()),
            "right": float((of.clean > 0).float().mean()),
        }
    table = pd.DataFrame(found).T
    assert bool((table["clean"] > table["corrupted"] + 1).all()), table.to_string()
    assert bool((table["clean"] > 0).all()), table.to_string()
    assert bool((table["right"] >= 0.75).all()), table.to_string()


def test_ioi_is_near_the_reference(smollm):
    """Other names and places than the reference's pairs (clean 5.00, corrupted 0.22)."""
    pairs = as_pairs(smollm, "ioi")
    found = measure(smollm, pairs)
    assert (len(pairs), pairs.length) == (32, 14)
    assert float(found.clean.mean()) == pytest.approx(5.0, abs=0.6)
    assert float(found.corrupted.mean()) == pytest.approx(0.2, abs=0.6)
    assert token_ids(smollm, "When Mary") == [smollm.token_id(word) for word in ("When", " Mary")]
