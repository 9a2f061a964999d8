"""Every page that is made, and where analyses stand in the navigation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from circuits.heads.detector import catalogue
from docs.making import reference
from docs.making.analysis import analyses, analysis_page, command_line, slug, topic
from docs.making.costs import benchmarks_page
from docs.making.docstrings import cell, escaped, parsed
from docs.making.gallery import gallery_page
from interp.registry import ANALYSES


def pages() -> dict[str, str]:
    """Every made page but the gallery's figures: Markdown by its path in the site."""
    made = {f"analyses/{slug(name)}.md": analysis_page(name) for name in sorted(analyses())}
    return (
        made
        | {
            "analyses/index.md": analyses_page(),
            "detectors.md": detectors_page(),
            "benchmarks.md": benchmarks_page(),
            "gallery/index.md": gallery_page(),
        }
        | {f"reference/{name}.md": text for name, text in reference.pages().items()}
    )


def navigation() -> list[Any]:
    """The entries of "Analyses" in the navigation, by topic."""
    by_topic: dict[str, list[dict[str, str]]] = {}
    for name in sorted(analyses()):
        page = {command_line(name): f"analyses/{slug(name)}.md"}
        by_topic.setdefault(topic(ANALYSES[name]), []).append(page)
    return ["analyses/index.md", *({title: by_topic[title]} for title in sorted(by_topic))]


def analyses_page() -> str:
    """Every analysis with its result, by topic."""
    parts = [
        "# Analyses",
        "Each is a function `(model, data, *, options) -> Report` and a command made from it; a page says "
        "what it shows, what it does not, where it comes from and what it costs.",
    ]
    for entry in navigation()[1:]:
        for title, listed in entry.items():
            rows = [f"## {title}", "| analysis | result |\n|---|---|"]
            for page in listed:
                for shown, path in page.items():
                    name = path.removeprefix("analyses/").removesuffix(".md").replace("-", "_")
                    result = parsed(ANALYSES[name].function.__doc__).result
                    rows[1] += f"\n| [{shown}]({Path(path).name}) | {cell(result)} |"
            parts += rows
    return "\n\n".join(parts) + "\n"


def detectors_page() -> str:
    """Every detector of `interp heads`, as it declares itself."""
    parts = [
        "---\nhide: [navigation]\n---",
        "# Detectors",
        "What `interp heads` looks for in every attention head; `interp detectors` prints the same list. A "
        "label is a claim: it needs an effect size (mean score over the threshold, distance from the null "
        "over the margin) and significance (a paired test over prompts, corrected over all heads and roles). "
        "Scores without a label are numbers only. Fast detectors share one pass over each prompt set; slow "
        "ones bring a procedure of their own and are asked for by name, or all with `--detectors all`.",
        "| detector | label | cost | prompts | unit |\n|---|---|---|---|---|\n"
        + "\n".join(
            f"| [{d['name']}](#{d['name'].replace('_', '-')}) | {'yes' if d['labels'] else ''} "
            f"| {d['cost']} | {d['prompts']} | {cell(d['unit'])} |"
            for d in (detector.declaration() for detector in catalogue())
        ),
    ]
    for detector in catalogue():
        told = detector.declaration()
        rule = f"mean at least {told['threshold']}, {told['margin']} from the null"
        parts += [
            f"## {told['name']} {{ #{told['name'].replace('_', '-')} }}",
            escaped(told["description"]),
            f"Label\n:   {escaped(rule) if told['labels'] else 'none: a score'}\n\n"
            f"Null\n:   {escaped(told['null'])}\n\n"
            f"Prompts\n:   {escaped(told['prompts'])}; cost: {told['cost']}\n\n"
            f"Source\n:   {escaped(told['source'])}",
        ]
    return "\n\n".join(parts) + "\n"
