"""The documentation says what is so: its pages are whole, its snippets run, its commands and links exist."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import interp
from docs.making import costs, gallery, pages, reference, tables
from docs.making.analysis import analyses, command, slug
from docs.making.docstrings import Docstring, entries, escaped, limits, markdown, parsed
from interp.cli import app
from interp.figures import FIGURES
from interp.models.model import Model
from interp.registry import ANALYSES
from interp.sites import AXES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
WRITTEN = sorted(path for path in DOCS.glob("*.md") if path.name != "support.md")
PLACEHOLDER = re.compile(r"[A-Z_]+|.*…")
ON_THE_DEFAULT_MODEL = ("lens_map", "attribution_waterfall")


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    """Nearly everything here runs on `small`, which reads the default model's tokens but is tiny."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def small(smollm: Model) -> Model:
    """A tiny random Llama that reads the default model's tokens: scripts and snippets run on it unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=len(smollm.tokenizer),
                max_position_embeddings=256,
            )
        )
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return interp.load(module, tokenizer=smollm.tokenizer)


@cache
def made() -> dict[str, str]:
    """Every page of the site, made or written, by its path."""
    written = {path.name: path.read_text(encoding="utf-8") for path in WRITTEN}
    return pages.pages() | {name: tables.filled(text) for name, text in written.items()}


def section(text: str, title: str) -> str:
    """What stands below a heading of a page, up to the next of its rank; "" where it is missing."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


# --- a page an analysis --------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(analyses()))
def test_an_analysis_has_a_whole_page(name):
    text = made()[f"analyses/{slug(name)}.md"]
    for title in (
        *("What it says", "What it does not show", "Command line", "Arguments and options"),
        *("Python", "Figures", "Source", "Cost"),
    ):
        assert section(text, title), (
            f"the page of {name} has nothing under '{title}'; a sentence of the docstring has to say it "
            "(for limits: 'It does not show …')"
        )
    assert ANALYSES[name].example in section(text, "Command line")
    table = section(text, "Arguments and options")
    for parameter in command(name).params:
        if parameter.name == "help":
            continue
        assert any(f"`{told}`" in table for told in (parameter.name, *parameter.opts))
    assert all(f'report.figure("{figure}")' in text for figure in FIGURES[name])


def test_what_a_page_does_not_show_is_not_what_it_says():
    for name in analyses():
        says, does_not = limits(parsed(ANALYSES[name].function.__doc__))
        assert not set(says) & set(does_not)


def test_measured_costs_are_the_readmes():
    rows = costs.measurements()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert rows and all(what in readme and how in readme for what, how, _ in rows)
    assert "benchmarks/patching.py" in costs.cost("patch")
    assert "path_patching.py" not in costs.cost("patch")
    named = {f"{script}.py" for scripts in costs.MEASURED.values() for script in scripts}
    assert named <= {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert set(costs.MEASURED) <= set(analyses())


# --- docstrings as Markdown -----------------------------------------------------------------------


def test_a_docstring_comes_apart():
    doc = parsed(
        """Share of the loss.

        x = a*b[i] and `c_d`. It does not show why.

            y = 2

        Args:
            first, second: numbers. third: text, which
                goes on. not_a_name: still text.
            fourth: last.

        Returns: a Report. Table "one": rows. Table "two": more.

        Raises:
            BadInput: no. Refused: never.

        Source: Someone 2020, who did
        this.

        >>> 1
        1
        """
    )
    names = {"first", "second", "third", "fourth"}
    assert [found for found, _ in entries(doc, "Args", names)] == [
        "first, second",
        "third",
        "fourth",
    ]
    assert entries(doc, "Raises") == [("BadInput", "no."), ("Refused", "never.")]
    assert limits(doc) == (["x = a*b[i] and `c_d`.", "    y = 2"], ["It does not show why."])
    assert doc.text("Source") == "Someone 2020, who did this."
    shown = markdown("\n".join(("Result.", "", ">>> 1", "1")))
    assert shown == "Result.\n\n```pycon\n>>> 1\n1\n```"


def test_markdown_reads_as_it_was_written():
    text = "q_i * k_j <b> [x][y] {z} `a_b*c`"
    assert escaped(text) == r"q\_i \* k\_j &lt;b&gt; \[x\]\[y\] \{z\} `a_b*c`"
    assert limits(Docstring("", ["It is so."])) == (["It is so."], [])


# --- reference, navigation, links -----------------------------------------------------------------


def test_every_public_name_is_in_the_reference():
    told = "\n".join(reference.pages().values())
    for name, address in reference.public_names().items():
        assert f"::: {address}\n" in told, f"{name} is missing"
    assert set(re.findall(r"^::: (\S+)", told, re.MULTILINE)) <= importable(told)
    for package in ("interp", "circuits", "probes"):
        for name in importlib.import_module(package).__all__:
            assert f"{package}.{name}" in reference.public_names()


def importable(told: str) -> set[str]:
    found = set()
    for address in re.findall(r"^::: (\S+)", told, re.MULTILINE):
        module, _, name = address.rpartition(".")
        if hasattr(importlib.import_module(module), name):
            found.add(address)
    return found


def test_the_navigation_has_every_page_and_no_other():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").replace("!ENV", "")
    listed: set[str] = set()

    def walk(entry: Any) -> None:
        if isinstance(entry, str):
            listed.add(entry)
        for part in entry.values() if isinstance(entry, dict) else entry * isinstance(entry, list):
            walk(part)

    walk(yaml.safe_load(text)["nav"])
    walk(pages.navigation())
    listed |= {f"reference/{name}.md" for name in reference.pages()}
    assert listed == set(made())


def test_no_link_is_dead():
    known = made()
    for name, text in known.items():
        plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for target in re.findall(r"(?<!`)\]\(([^)\s]+)\)", plain):
            assert not target.startswith(("http", "/")), f"{name}: {target}"
            path, _, anchor = target.partition("#")
            at = (DOCS / name).parent / path if path else DOCS / name
            found = at.resolve().relative_to(DOCS)
            assert str(found) in known or at.exists(), f"{name}: {target}"
            if anchor:
                assert f"{{ #{anchor} }}" in known[str(found)], f"{name}: {target}"


def test_the_sites_page_has_every_site():
    assert set(tables.SITES) == set(AXES)
    assert all(f"| `{name}` |" in tables.sites_table() for name in AXES)


# --- snippets -------------------------------------------------------------------------------------


def blocks(text: str) -> Iterator[str]:
    """The Python blocks of a page that are ours."""
    for title, code in re.findall(r"^```python(.*?)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if title.strip() in ("", 'title="interp"'):
            yield code


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_the_snippets_run(path, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interp, "load", lambda *given, **options: small)
    for registry in (ANALYSES, FIGURES):
        for name in ("stream_norms",):
            monkeypatch.setitem(registry, name, None)  # taken out again afterwards
    namespace: dict[str, Any] = {"__name__": "snippets", "tiny_model": lambda: small}
    for number, code in enumerate(blocks(path.read_text(encoding="utf-8"))):
        exec(compile(code, f"{path.name}, block {number}", "exec"), namespace)


def test_the_errors_are_as_they_are_shown(small):
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    shown = "\n".join(re.findall(r"^```pycon\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    names = {"interp": interp, "model": small}
    examples = doctest.DocTestParser().get_doctest(shown, names, "errors.md", "errors.md", 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert examples.examples and runner.run(examples).failed == 0


# --- commands -------------------------------------------------------------------------------------


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """(where, words) of every `interp …` in the README and the pages."""
    texts = {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")} | made()
    for where, text in texts.items():
        lines = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        typed = [line[2:] for block in lines for line in block.replace("\\\n", " ").splitlines()]
        typed += re.findall(r"`(interp [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for line in typed:
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";|")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= set(";|"):
                    if words and words[0] == "interp":
                        yield where, words[1:]
                    words = []
                else:
                    words.append(word)


def test_every_command_in_the_docs_is_one():
    seen = 0
    for where, words in command_lines():
        named: Any = typer.main.get_command(app)
        context = typer.Context(named)
        while words and hasattr(named, "list_commands") and not words[0].startswith("-"):
            if PLACEHOLDER.fullmatch(words[0]):
                break
            found = named.get_command(context, words[0])
            assert found is not None, f"{where}: interp {' '.join(words)}"
            named, words = found, words[1:]
        if not hasattr(named, "list_commands"):
            named = named.make_context("interp", [], resilient_parsing=True).command
            known = {name for option in named.params for name in option.opts} | {"--help"}
            known |= {name for option in named.params for name in option.secondary_opts}
            given = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            assert given <= known, f"{where}: {named.name} has no {given - known}"
        seen += 1
    assert seen > 80


def test_make_has_what_the_docs_name():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for text in [*made().values(), (ROOT / "README.md").read_text(encoding="utf-8")]:
        for target in re.findall(r"^\$ make (\w+)|`make (\w+)", text, re.MULTILINE):
            assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target


# --- gallery --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", gallery.scripts(), ids=lambda path: path.stem)
def test_a_gallery_script_draws_one_figure(path, small, smollm):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 25
    title, text = gallery.title_and_text(path)
    assert title and text and not title.endswith(".")
    model = smollm if path.stem in ON_THE_DEFAULT_MODEL else small
    with gallery.loading(lambda *given: model):
        figure = gallery.figure_of(path)
    assert figure.data and "window.galleryFigures" in gallery.script_of(
        path.stem, json.loads(figure.to_json())
    )


def test_a_figure_is_kept_until_its_script_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "SCRIPTS", tmp_path / "scripts")
    monkeypatch.setattr(gallery, "KEPT", tmp_path / "kept")
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "one.py"
    code = '"""One."""\nimport plotly.graph_objects as go\nfigure = go.Figure(go.Bar(y=[{}]))\n'
    said: list[str] = []
    for height in (1, 1, 2):
        script.write_text(code.format(height))
        drawn = gallery.drawn(said.append)
    assert drawn["one"]["figure"]["data"][0]["y"] == [2]
    assert len(said) == 2 and len(list((tmp_path / "kept").iterdir())) == 1
