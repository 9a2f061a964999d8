"""The page of an analysis: from its registration, its signature and its docstring."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import typer

from docs.making.costs import cost
from docs.making.docstrings import (
    cell,
    definitions,
    entries,
    escaped,
    limits,
    parsed,
    prose,
    returned,
)
from docs.making.gallery import code, scripts, title_and_text
from interp.cli import app
from interp.commands import command_of
from interp.figures import FIGURES, PAGES
from interp.registry import ANALYSES, Analysis

TOPICS = {
    "circuits.heads": "Heads",
    "circuits.emergence": "Over training",
    "circuits": "Circuits",
    "interp": "One prompt",
    "probes.saes": "Sparse autoencoders",
    "probes.vectors": "Vectors",
    "probes": "Probes and lenses",
}
"""Where an analysis stands in the navigation, by the longest beginning of its module's name; one that reads
a prompt of the user's own stands under "One prompt" wherever it lives."""


@cache
def analyses() -> tuple[str, ...]:
    """Names of the installed analyses, all of them imported."""
    entries = entry_points(group="interp.analyses")
    for entry in entries:
        entry.load()
    return tuple(entry.name for entry in entries)


def slug(name: str) -> str:
    """The file name of an analysis's page.

    >>> slug("circuit_find")
    'circuit-find'
    """
    return name.replace("_", "-")


def command_line(name: str) -> str:
    """What is typed before an analysis's arguments, without `interp`.

    >>> command_line("circuit_find"), command_line("path_patch")
    ('circuit find', 'path-patch')
    """
    return " ".join(filter(None, command_of(name)))


def topic(analysis: Analysis) -> str:
    """The title that an analysis stands under."""
    data = [p.name for p in inspect.signature(analysis.function).parameters.values()][1:2]
    if data and data[0] in ("prompt", "prompts") and not analysis.name.startswith("vector"):
        if inspect.signature(analysis.function).parameters[data[0]].default is inspect._empty:
            return "One prompt"
    module = analysis.function.__module__
    known = [start for start in TOPICS if module == start or module.startswith(start + ".")]
    return TOPICS[max(known, key=len)] if known else module.split(".")[0].capitalize()


def analysis_page(name: str) -> str:
    """The page of one analysis, from its registration, signature and docstring."""
    analysis = ANALYSES[name]
    doc = parsed(analysis.function.__doc__)
    says, does_not = limits(doc)
    parts = [
        f"# {command_line(name)}",
        f"*{escaped(doc.result)}*",
        "## What it says",
        prose(says) or escaped(doc.result),
        "## What it does not show",
        prose(does_not),
        "## Command line",
        f"```console\n$ {analysis.example}\n```",
        "## Arguments and options",
        _options_table(analysis),
        "## Python",
        f"```python\nfrom {analysis.function.__module__} import {analysis.function.__name__}\n\n"
        f"{signature(analysis.function)}\n```",
        "### Returns",
        returned(doc),
    ]
    if "Raises" in doc.sections:
        parts += ["### Raises", definitions(doc, "Raises")]
    if doc.examples:
        parts += ["### Example", *(f"```pycon\n{example}\n```" for example in doc.examples)]
    parts += ["## Figures", _figures(name), "## Source", _source(analysis), "## Cost", cost(name)]
    return "\n\n".join(filter(None, parts)) + "\n"


def signature(function: Any) -> str:
    """A call with one argument a line, annotations as they are written."""
    told = inspect.signature(function)
    lines, starred = [], False
    for parameter in told.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines.append("    *,")
            starred = True
        lines.append(f"    {_plain(parameter)},")
    returns = "" if told.return_annotation is told.empty else f" -> {told.return_annotation}"
    head = f"{function.__name__}("
    return (
        "\n".join([head, *lines, f"){returns}".replace("'", "")]) if lines else f"{head}){returns}"
    )


def _plain(parameter: inspect.Parameter) -> str:
    kind = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{parameter.name}{kind}{default}"


def command(name: str) -> Any:
    """The click command of an analysis, with its parameters."""
    root: Any = typer.main.get_command(app)
    context = typer.Context(root)
    for word in filter(None, command_of(name)):
        root = root.get_command(context, word)
    # A command made from an analysis is built when it is called; parsing nothing leaves it at that.
    return root.make_context(name, [], resilient_parsing=True).command


def _options_table(analysis: Analysis) -> str:
    """One row a parameter: its name in Python, on the command line, its default and what it does."""
    given = {parameter.name: parameter for parameter in command(analysis.name).params}
    parameters = inspect.signature(analysis.function).parameters
    told = dict(_single(entries(parsed(analysis.function.__doc__), "Args", set(parameters))))
    rows = ["| Python | command line | default | meaning |", "|---|---|---|---|"]
    for place, (name, parameter) in enumerate(parameters.items()):
        option = given.pop(name if place else analysis.reads, None)
        help_text = told.get(name) or getattr(option, "help", "") or ""
        default = "" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
        shown = _on_the_command_line(option)
        rows.append(f"| `{name}` | {shown} | {cell(default)} | {cell(help_text)} |")
    for option in given.values():
        rows.append(f"| | {_on_the_command_line(option)} | | {cell(option.help or '')} |")
    return "\n".join(rows)


def _on_the_command_line(option: Any) -> str:
    if option is None:
        return "in Python only"
    if option.param_type_name == "argument":
        return f"`{option.metavar or option.name.upper()}`"
    return f"`{'` / `'.join([*option.opts, *option.secondary_opts])}`"


def _single(found: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for names, text in found:
        for name in names.split(","):
            yield name.strip(), text


def _figures(name: str) -> str:
    figures = FIGURES.get(name, {})
    lines = [f'- `report.figure("{figure}")`' for figure in figures]
    if lines:
        lines[0] += ", also `report.figure()`"
    page = "has a page of its own" if name in PAGES else "shows every figure and table on its page"
    shown = [
        f"[{title_and_text(script)[0]}](../gallery/index.md#{slug(script.stem)})"
        for script in scripts()
        if f"{ANALYSES[name].function.__name__}(" in code(script)
    ]
    gallery = f" In the gallery: {', '.join(shown)}." if shown else ""
    return "\n".join([f"A saved report {page}, `report.html`.{gallery}", "", *lines])


def _source(analysis: Analysis) -> str:
    told = parsed(analysis.function.__doc__).text("Source")
    return f"{escaped(analysis.source)}.\n\n{escaped(told)}".strip()
