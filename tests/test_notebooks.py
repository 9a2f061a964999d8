"""Every notebook runs from a fresh kernel, is kept in git without outputs, and explains the names it uses.

A notebook's first code cell has its settings, small ones: what a reader runs is what is tested.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbconvert.preprocessors import ExecutePreprocessor

from interp.data.prompts import prose

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = (
    "first_look",
    "heads_and_roles",
    "why_did_it_say_that",
    "find_and_test_a_circuit",
    "sparse_autoencoder",
    "your_own_analysis",
)
WITHOUT_PAGE = {"your_own_analysis"}
"""Notebooks that show no report's own page."""
PLOTLY, HTML = "application/vnd.plotly.v1+json", "text/html"
PATHS = re.compile(r"(?<![\w.])(?:/(?:home|root|tmp|Users|content|work|mnt|opt)/|[A-Z]:\\)")
OURS = {"interp", "circuits", "probes"}


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def sources(notebook: Any, kind: str) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def execute(notebook: Any, folder: Path) -> list[Any]:
    """The outputs of all cells, run by a kernel in `folder`."""
    ExecutePreprocessor(timeout=600).preprocess(notebook, {"metadata": {"path": folder}})
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


# ---------------------------------------------------------------- as they are kept


def test_these_are_the_notebooks():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_kept_clean_and_says_what_it_is(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs"
    assert all(cell.get("execution_count") is None for cell in notebook.cells), "clear the counts"
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "In Colab" in first.source and "%pip install" in first.source
    assert sources(notebook, "code")[0].startswith('MODEL = "smollm2-135m"')
    for cell in notebook.cells:
        assert not PATHS.search(cell.source), f"a path of one machine: {cell.source}"


@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_told_in_words(name):
    """No more than two code cells in a row, and words after the last one."""
    kinds = "".join(cell.cell_type[0] for cell in read(name).cells)
    assert "ccc" not in kinds and kinds.endswith("m")


def test_code_is_as_tidy_as_the_rest():
    files = [str(FOLDER / f"{name}.ipynb") for name in NAMES]
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *files], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------- as they are run


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_a_fresh_kernel(name, tmp_path):
    shown = execute(read(name), tmp_path)
    data = [output.get("data", {}) for output in shown]
    drawn = [one for one in data if PLOTLY in one]
    assert drawn and all(HTML in one for one in drawn)  # also where nothing knows plotly's own type
    assert all(one[PLOTLY]["layout"].get("title", {}).get("text") for one in drawn)
    assert any("plotly.js v" in one.get(HTML, "") for one in data)
    assert any("<iframe" in one.get(HTML, "") for one in data) == (name not in WITHOUT_PAGE)
    assert not any("UserWarning" in str(output.get("text", "")) for output in shown)
    assert len(shown) < 60  # progress is updated in place
    if name == "your_own_analysis":
        printed = "".join(output.get("text", "") for output in shown)
        assert re.search(r"position-share\W+Share of each head", printed)


@pytest.mark.slow
def test_progress_is_one_output_updated_in_place(tmp_path):
    code = """
from interp.run.progress import Progress

with Progress() as bars:
    for name in ["Scanning <prompts>", "Ablating"]:
        advance = bars.stage(name, 2000)
        for _ in range(2000):
            advance(1)
with Progress(False) as bars:
    bars.stage("hidden", 1)(1)
display("second")
with Progress() as bars:
    for epoch in range(30):
        bars.stage(f"epoch {epoch}", 1)(1)
"""
    sent = []

    class Listening(ExecutePreprocessor):
        def process_message(self, msg, *arguments):
            sent.append(msg["msg_type"])
            return super().process_message(msg, *arguments)

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    Listening(timeout=120).preprocess(notebook, {"metadata": {"path": tmp_path}})
    output, second, long = notebook.cells[0].outputs
    assert output["output_type"] == "display_data" and "second" in second["data"]["text/plain"]
    lines = long["data"]["text/plain"].splitlines()
    assert len(lines) == 13 and lines[0] == "18 earlier" and lines[-1].startswith("epoch 29  1/1")
    assert re.fullmatch(
        r"Scanning <prompts>  2000/2000  \d:\d\d\nAblating  2000/2000  \d:\d\d",
        output["data"]["text/plain"],
    )
    html = output["data"][HTML]
    assert html.count("<progress") == 2 and "Scanning &lt;prompts&gt;" in html
    assert sent.count("display_data") == 3
    # one a stage, one at the end, and four a second: not one for each of the 4,000 steps
    assert 32 <= sent.count("update_display_data") < 300


# ---------------------------------------------------------------- the lesson on heads, on other models


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2 with a tokenizer of its own, as a user has one on disk."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([prose()[:60_000]], trainer)
    folder = tmp_path_factory.mktemp("own") / "gpt2-tiny"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    config = GPT2Config(
        n_embd=32, n_layer=3, n_head=4, n_positions=128, vocab_size=tokenizer.get_vocab_size()
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = GPT2LMHeadModel(config)
        for parameter in module.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    module.save_pretrained(folder)
    return folder


def as_folder(checkpoint: Path) -> Any:
    return str(checkpoint)


def as_bridge(checkpoint: Path) -> Any:
    from transformer_lens import TransformerBridge

    return TransformerBridge.boot_transformers(str(checkpoint), dtype=torch.float32, device="cpu")


class _Watch(ast.NodeTransformer):
    """Code that reports every attribute it reads, and every keyword it passes, with their owner."""

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load):
            return node
        return self._call("_read", [node.value, ast.Constant(node.attr)])

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        keywords = [ast.Constant(word.arg) for word in node.keywords if word.arg]
        if keywords:
            node.func = self._call("_passed", [node.func, *keywords])
        return node

    @staticmethod
    def _call(name: str, arguments: list[Any]) -> ast.Call:
        return ast.Call(ast.Name(name, ast.Load()), arguments, [])


def _is_ours(value: Any) -> bool:
    owner = value if hasattr(value, "__name__") else type(value)
    home = getattr(owner, "__module__", None) or getattr(owner, "__name__", "")
    return str(home).split(".")[0] in OURS


@pytest.mark.parametrize("given", [as_folder, as_bridge])
def test_the_heads_lesson_runs_on_ones_own_model_and_shows_every_name_it_uses(
    given: Callable[[Path], Any],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """One line changed; every attribute, keyword and column of ours stands in the words up to its cell."""
    monkeypatch.chdir(tmp_path)
    used: list[str] = []

    def read_attribute(value: Any, name: str) -> Any:
        if _is_ours(value):
            used.append(name)
        return getattr(value, name)

    def passed(function: Any, *keywords: str) -> Any:
        if _is_ours(function):
            used.extend(keywords)
        return function

    scope: dict[str, Any] = {"_read": read_attribute, "_passed": passed}
    told, columns, strings, cells = "", set(), set(), 0
    for cell in read("heads_and_roles").cells:
        if cell.cell_type == "markdown":
            told += " ".join(re.findall(r"`([^`]+)`", cell.source)) + " "
            continue
        tree = ast.parse(cell.source)
        if "MODEL" in cell.source and not cells:
            tree.body = [node for node in tree.body if "MODEL" not in ast.unparse(node)]
            scope["MODEL"] = given(checkpoint)
        cells += 1
        used += [
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in OURS
            for alias in node.names
        ]
        strings |= {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        exec(compile(ast.fix_missing_locations(_Watch().visit(tree)), "cell", "exec"), scope)
        if "report" in scope:
            columns = set(scope["report"].table.columns)
        words = set(re.findall(r"\w+", told))
        untold = sorted(({*used} | (strings & columns)) - words)
        assert not untold, f"used before any words about them: {untold}, in\n{cell.source}"
    assert cells > 8 and {"load", "capture", "classify_heads", "Edit"} <= set(used)
    assert "induction_null" in strings & columns
    assert all(exists(name, scope) for name in ours_in_tables("heads_and_roles"))


def ours_in_tables(name: str) -> set[str]:
    """`model.run`, `interp.Edit.zero` …: what the right column of a lesson's tables calls ours."""
    rows = re.findall(
        r"^\|[^|]*\|([^|]*)\|$", "\n".join(sources(read(name), "markdown")), re.MULTILINE
    )
    named = {
        found for row in rows for found in re.findall(r"\b(?:model|run|interp)(?:\.\w+)+", row)
    }
    assert {"interp.load", "interp.Edit.mean", "model.tokens", "model.run"} <= named
    return named


def exists(name: str, scope: dict[str, Any]) -> bool:
    first, *rest = name.split(".")
    value = scope[first]
    for part in rest:
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True
