"""What holds for every registered analysis, whatever it does."""

import atexit
import json
import shutil
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import mkdtemp

import jsonschema
import pandas as pd
import pytest

import interp
from interp.commands import command_of
from interp.data.contrasts import Contrast
from interp.data.labelled import of
from interp.data.pairs import Pairs
from interp.figures import FIGURES
from interp.models.load import weights_sha256
from interp.registry import ANALYSES
from interp.report import Report
from interp.schemas import SCHEMA_VERSION, schema_of
from interp.terminal import print_summary
from probes.saes.model import SAE, SAEConfig
from tests.ground_truth.clip_model import TEXTS as DESCRIPTIONS
from tests.ground_truth.clip_model import tiny_clip, word_tokenizer
from tests.ground_truth.induction_model import character_tokenizer, induction_model

for _entry in entry_points(group="interp.analyses"):
    _entry.load()

PROMPT = "the cat sat on the mat. the cat"
NAMES = Pairs.of(
    [[2, 3, 4, 5, 6, 3]],
    [[2, 7, 4, 5, 6, 3]],
    answers=[4],
    wrong=[8],
    positions={"S1": [1], "S1+1": [2], "IO": [2], "S2": [5]},
)
FACTS = [f"{subject}={subject.upper()}" for subject in "abcdefghij"]
TEXTS = [f"{word} {n}" * 9 for n in "abc" for word in ("the cat", "a mat", "on it", "an owl")]
READ = {"tokens": 120, "context": 16, "progress": False}
WIDTH = induction_model().config.n_embd
CODER = SAE(SAEConfig(d_in=WIDTH, d_sae=24, k=4, site="z.1", heads=4))
LETTERS = {"upper": [(letter, letter.upper()) for letter in "abcdefghijklmnopqrst"]}
ASKED = {"shots": 3, "prompts": 4, "template": "{source} ", "progress": False}
HOPS = [(f"{a}b{b}c{a}", b, "b") for a, b in ("xy", "uv", "pq", "rs")]
KINDS = Contrast(
    "case", ("ab", "cd"), ("AB", "CD"), ("abca", "cdec"), ("b", "d"), ("B", "D"), ("xyz",)
)
ANIMALS = of(
    [f"{text} {n}" for n in "abcdef" for text in ("the cat", "on it")],
    ["cat", "it"] * 6,
    groups=[n for n in "abcdef" for _ in range(2)],
)
ARGUMENTS = {
    "probe": ((ANIMALS,), {"folds": 3, "progress": False}),
    "probe_attention": ((), {"n": 60, "progress": False}),
    "probe_structure": ((), {"rows": 2, "cols": 4, "n": 50, "walls": False, "progress": False}),
    "probe_causal": (
        (ANIMALS,),
        {"doses": [1.0], "draws": 2, "control_prompts": 2, "progress": False},
    ),
    "vector_steer": ((KINDS,), {"progress": False}),
    "vector_function": ((LETTERS,), {"mixed": 3, "heads": (2,), **ASKED}),
    "vector_task": ((LETTERS,), {"epochs": 2, **ASKED}),
    "vector_inject": (
        (HOPS,),
        {"others": ["k", "m", "n"], "template": "{word}", "progress": False},
    ),
    "duo_attention": (
        (),
        {
            "length": 64,
            "keys": 1,
            "width": 6,
            "sink": 1,
            "recent": 16,
            "prompts": 2,
            "steps": 2,
            "held_out": 1,
            "points": 2,
            "progress": False,
        },
    ),
    "sae_train": ((TEXTS,), {"site": "z.1", "d_sae": 24, "k": 4, "batch_size": 40, **READ}),
    "sae_eval": ((CODER, TEXTS), {"windows": 2, "tasks": 2, **READ}),
    "sae_features": ((CODER, TEXTS), {"contexts": 3, "around": 4, "ablate": 2, **READ}),
    "tune_lens": (
        (TEXTS,),
        {"steps": 3, "batch_size": 40, "window": 16, "keep": False, "progress": False},
    ),
    "heads": ((), {"prompts": 4, "progress": False}),
    "emergence": ((), {"prompts": 4, "progress": False}),
    "compare_weights": ((), {"prompts": 4, "progress": False}),
    "head_groups": ((), {"prompts": 2, "progress": False}),
    "ablate": ((), {"prompts": 8, "length": 8, "progress": False}),
    "prune": ((), {"prompts": 2, "step": 0.25, "progress": False}),
    "shapley": ((), {"prompts": 2, "budget": 3.0, "progress": False}),
    "flow": ((PROMPT,), {"max_flow": False}),
    "decompose": (("induction",), {"n": 4, "progress": False}),
    "circuit_find": (("induction",), {"n": 4, "edges": 30, "progress": False}),
    "repair": (("induction",), {"heads": ["1.2"], "scale": 0.0, "controls": 3, "n": 4}),
    "patch": (("induction",), {"n": 4, "progress": False}),
    "readout": (("induction",), {"n": 4}),
    "edges": (("induction",), {"n": 4, "steps": 2, "progress": False}),
    "circuit_overlap": (
        ("induction,induction:successor",),
        {"n": 4, "edges": 20, "steps": 2, "progress": False},
    ),
    "circuit_evaluate": (
        ("induction",),
        {"n": 4, "steps": 2, "random": 1, "subsets": 2, "progress": False},
    ),
    "path_patch": (("induction",), {"n": 4, "receiver": "all", "progress": False}),
    "recall": ((), {"facts": FACTS, "template": "the {subject} is ", "known_rank": 99}),
    "ioi_roles": ((NAMES,), {"progress": False}),
    "clip_heads": (
        (),
        {"texts": DESCRIPTIONS, "tokenizer": word_tokenizer(), "n": 8, "progress": False},
    ),
}
OTHERS = {"clip_heads": lambda: [tiny_clip()]}
"""Models of analyses that a model of text cannot serve."""


@pytest.fixture(scope="module")
def model():
    return interp.load(induction_model(), tokenizer=character_tokenizer())


def report_of(name: str, model) -> Report:
    reads = ANALYSES[name].reads
    positional, options = ARGUMENTS.get(name, ((PROMPT,) if reads == "model" else (), {}))
    if reads == "models":
        return ANALYSES[name].function(OTHERS.get(name, _folders)(), *positional, **options)
    if reads == "reports":
        heads = report_of("heads", model)
        return ANALYSES[name].function([heads, heads], *positional, **options)
    return ANALYSES[name].function(model, *positional, **options)


@cache
def _folders() -> list[str]:
    """The hand-built model twice, as a series of checkpoints on disk."""
    series = Path(mkdtemp(prefix="interp-series-"))
    atexit.register(shutil.rmtree, series, ignore_errors=True)
    for step in (0, 1):
        induction_model().save_pretrained(series / f"step-{step}")
        character_tokenizer().save_pretrained(series / f"step-{step}")
    return [str(series / f"step-{step}") for step in (0, 1)]


@pytest.fixture(scope="module", params=sorted(ANALYSES))
def made(request, model):
    before = weights_sha256(model.module)
    return request.param, report_of(request.param, model), before


def test_the_model_is_left_as_it_was(made, model):
    _, _, before = made
    assert weights_sha256(model.module) == before
    for module in model.module.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in module.__dict__
    assert not model.module.config._attn_implementation.startswith("interp_window")


def test_the_same_call_gives_the_same_tables(made, model):
    name, report, _ = made
    again = report_of(name, model)
    assert list(again.tables) == list(report.tables)
    for table in report.tables:
        pd.testing.assert_frame_equal(report.tables[table], again.tables[table])


def test_the_report_comes_back_from_disk(made, tmp_path):
    name, report, _ = made
    loaded = Report.load(report.save(tmp_path))
    assert loaded.analysis == name
    for table in report.tables:
        pd.testing.assert_frame_equal(report.tables[table], loaded.tables[table], check_dtype=False)
    assert loaded.meta["model"]["sha256"] == report.meta["model"]["sha256"]
    assert "wall_time_s" in loaded.meta and loaded.meta["schema_version"] == SCHEMA_VERSION


WHOLE = {"layer", "head", "position", "prompt", "source", "neuron", "pair", "place", "feature"}
"""Columns that say where: missing (`<NA>`) where a row has none, but never 3.0."""


def test_where_is_told_in_whole_numbers(made):
    for name, table in made[1].tables.items():
        for column in WHOLE & set(table.columns):
            assert not pd.api.types.is_float_dtype(table[column]), f"'{column}' of '{name}'"


def test_the_report_satisfies_its_schema(made):
    """`python -m interp.schemas NAME` writes the schema anew after an analysis has changed."""
    name, report, _ = made
    described = json.loads(report.files(page=False)["report.json"])
    schema = schema_of(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    errors = [e.message for e in jsonschema.Draft202012Validator(schema).iter_errors(described)]
    assert not errors
    for table, entry in described["tables"].items():
        known = schema["properties"]["tables"]["properties"][table]["properties"]["columns"]
        assert not set(entry["columns"]) - set(known["properties"]), "columns without a schema"


def test_every_figure_renders_and_the_page_is_whole(made):
    name, report, _ = made
    assert FIGURES[name]
    for figure in FIGURES[name]:
        assert report.figure(figure).to_json()
    page = report.to_html()
    assert page.lstrip().lower().startswith("<!doctype html>")
    policy = page.split('"Content-Security-Policy" content="')[1].split('"')[0]
    assert policy.startswith("default-src 'none';") and "http" not in policy  # nothing is asked for
    assert "http://" not in page.split("</head>")[0] and 'src="http' not in page
    assert report._repr_html_().startswith("<iframe")


@pytest.mark.parametrize("width", [60, 80])
def test_its_summary_fits_the_terminal_with_whole_headers(
    made, width, tmp_path, monkeypatch, capsys
):
    name, report, _ = made
    monkeypatch.setenv("COLUMNS", str(width))
    summary = ANALYSES[name].summary(report)
    print_summary(report, summary, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    header = next(line for line in lines if line.strip())
    shown = [column for column in map(str, summary) if f" {column} " in header]
    assert header.split() == " ".join(shown).split()
    assert len(shown) == len(summary.columns) or f"… {len(summary.columns) - len(shown)} more" in (
        " ".join(lines)
    )


@pytest.mark.parametrize("name", sorted(ANALYSES))
def test_what_is_registered_is_described(name):
    analysis = ANALYSES[name]
    command = " ".join(filter(None, ("interp", *command_of(name))))
    assert analysis.source and analysis.example.startswith(command)
    assert analysis.figure in FIGURES[name]
    assert analysis.function.__doc__ and ">>>" in analysis.function.__doc__
