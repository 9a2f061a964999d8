"""Docstrings taken apart, and put together again as Markdown.

The house form: a first line that is a result, paragraphs, then `Args:`, `Returns:`, `Raises:`, `Source:` and
a doctest, in any order. What an analysis does not show is said in its paragraphs; `limits` finds it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from dataclasses import dataclass, field

HEADER = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Source|Example)( \([^)]*\))?:\s*(.*)")
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z`\"'])")
LIMIT = re.compile(
    r"\b(?:does|do) not (?:show|say|sum|add)\b|\bneed not\b|\bsays? nothing\b"
    r"|\bnot (?:shown|show|say|what|why|that|about|in it|the model)\b"
    r"|\b(?:are|is) not in (?:its?|the)\b|\bis not (?:a|its)\b|\bnone says\b"
    r"|\bsays? when something\b|\bon other text\b|\bwhat these prompts need\b"
    r"|\bonly what is beyond\b|\bdepends strongly\b",
    re.IGNORECASE,
)
"""Words by which a sentence says what a number is not."""


@dataclass(frozen=True)
class Docstring:
    """A docstring's parts: `sections` by header, each as (words in brackets, lines without indentation)."""

    result: str
    paragraphs: list[str] = field(default_factory=list)
    sections: dict[str, tuple[str, list[str]]] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def text(self, name: str) -> str:
        """A section as one paragraph; "" where there is none."""
        return " ".join(line.strip() for line in self.sections.get(name, ("", []))[1]).strip()


def parsed(text: str | None) -> Docstring:
    """The parts of a docstring.

    >>> doc = parsed('''Share of it.
    ...
    ... It does not show why.
    ...
    ... Args:
    ...     x, y: numbers. z: another.
    ...
    ... Returns: a Report.''')
    >>> doc.result, doc.paragraphs, doc.text("Returns"), entries(doc, "Args")
    ('Share of it.', ['It does not show why.'], 'a Report.', [('x, y', 'numbers.'), ('z', 'another.')])
    """
    blocks = re.split(r"\n[ ]*\n", inspect.cleandoc(text or "").strip("\n"))
    doc = Docstring(" ".join(blocks[0].split()))
    open_section: list[str] | None = None
    for block in blocks[1:]:
        lines = block.split("\n")
        if open_section is not None and all(line.startswith("    ") for line in lines):
            open_section += ["", *(line.removeprefix("    ") for line in lines)]
            continue
        open_section = None
        if lines[0].startswith(">>>"):
            doc.examples.append(block)
            continue
        told: list[str] = []
        for line in lines:
            if header := HEADER.fullmatch(line):
                open_section = [header[3]] if header[3] else []
                doc.sections[header[1]] = (header[2] or "", open_section)
            elif open_section is not None:
                open_section.append(line.removeprefix("    "))
            else:
                told.append(line)
        if told:
            doc.paragraphs.append("\n".join(told))
    return doc


def entries(
    doc: Docstring, name: str, known: Collection[str] | None = None
) -> list[tuple[str, str]]:
    """(names, text) of every entry of a section such as Args; several may stand on one line.

    With `known`, only these names (a function's parameters) begin an entry in the middle of a line.
    """
    found: list[tuple[str, str]] = []
    lines = doc.sections.get(name, ("", []))[1]
    starts = [i for i, line in enumerate(lines) if line and not line.startswith(" ")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        entry = " ".join(line.strip() for line in lines[start:end]).strip()
        for part in re.split(r"(?<=[.;])\s+(?=[A-Za-z_]\w*(?:, [a-z_]\w*)*: )", entry):
            names, colon, said = part.partition(": ")
            first = part is entry or entry.startswith(part)
            wanted = first or known is None or set(names.split(", ")) <= set(known)
            if colon and wanted and re.fullmatch(r"[\w, *]+", names):
                found.append((names, said))
            elif found:
                found[-1] = (found[-1][0], f"{found[-1][1]} {part}")
            else:
                found.append(("", part))
    return found


def limits(doc: Docstring) -> tuple[list[str], list[str]]:
    """(what it says, what it does not show): every paragraph, cut before its first sentence of limits.

    >>> limits(Docstring("", ["A is b. It does not show c. Nor d.", "E."]))
    (['A is b.', 'E.'], ['It does not show c. Nor d.'])
    """
    says: list[str] = []
    does_not: list[str] = []
    for paragraph in doc.paragraphs:
        if paragraph.startswith(" ") or not LIMIT.search(" ".join(paragraph.split())):
            says.append(paragraph)
            continue
        sentences = SENTENCE.split(paragraph)
        first = next(i for i, s in enumerate(sentences) if LIMIT.search(" ".join(s.split())))
        if first:
            says.append(" ".join(sentences[:first]))
        does_not.append(" ".join(sentences[first:]))
    return says, does_not


def escaped(text: str) -> str:
    """Text as Markdown that reads as it is written; what stands in backticks is code.

    >>> escaped("q_i * k_j of `cache['z']` [batch pos] < 1")
    "q\\\\_i \\\\* k\\\\_j of `cache['z']` \\\\[batch pos\\\\] &lt; 1"
    """
    parts = re.split(r"(`[^`]+`)", text)
    for i in range(0, len(parts), 2):
        plain = re.sub(r"([\\*_\[\]{}#|`])", r"\\\1", parts[i])
        parts[i] = plain.replace("<", "&lt;").replace(">", "&gt;")
    return "".join(parts)


def cell(text: str) -> str:
    """Markdown for a cell of a table: one line, no bar."""
    return " ".join(escaped(text).replace(r"\|", "&#124;").split()).replace("|", "&#124;")


def prose(paragraphs: list[str]) -> str:
    """Paragraphs as Markdown: indented lines as they are, lines that start with a dash as a list."""
    out: list[str] = []
    for paragraph in paragraphs:
        lines = paragraph.split("\n")
        indented = [line.startswith("  ") for line in lines]
        if all(indented):
            out.append("\n".join(("```text", inspect.cleandoc("\n" + paragraph), "```")))
        elif lines[0].startswith("- "):
            items = re.split(r"^- ", paragraph, flags=re.MULTILINE)[1:]
            out.append("\n".join(f"- {escaped(' '.join(item.split()))}" for item in items))
        else:
            out.append(escaped(" ".join(line.strip() for line in lines)))
    return "\n\n".join(out)


def returned(doc: Docstring) -> str:
    """What is returned, a line for every table and array that is named."""
    lines = doc.sections.get("Returns", ("", []))[1]
    text = "\n".join(f"\0{line}" if re.match(r'"\w', line) else line for line in lines)
    text = re.sub(r'(?<=[.;])\s+(?=(?:Tables?|Arrays?) ")', "\0", text)
    first, *rest = (" ".join(part.split()) for part in text.split("\0"))
    return "\n".join([escaped(first), "", *(f"- {escaped(part)}" for part in rest)]).strip()


def definitions(doc: Docstring, name: str, known: Collection[str] | None = None) -> str:
    """A section of entries as a Markdown definition list."""
    return "\n\n".join(
        f"{', '.join(f'`{part.strip()}`' for part in names.split(',')) if names else '…'}\n"
        f":   {escaped(text)}"
        for names, text in entries(doc, name, known)
    )


def markdown(text: str | None, parameters: Collection[str] | None = None) -> str:
    """A whole docstring as Markdown, with a title above each of its sections."""
    doc = parsed(text)
    parts = [escaped(doc.result), prose(doc.paragraphs)]
    for name in ("Attributes", "Args"):
        if name in doc.sections:
            title = {"Args": "Arguments"}.get(name, name) + escaped(doc.sections[name][0])
            parts += [f"**{title}**", definitions(doc, name, parameters)]
    for name in ("Returns", "Yields"):
        if name in doc.sections:
            told = returned(doc) if name == "Returns" else escaped(doc.text(name))
            parts += [f"**{name}**", told]
    if "Raises" in doc.sections:
        parts += ["**Raises**", definitions(doc, "Raises")]
    parts += [f"```pycon\n{example}\n```" for example in doc.examples]
    if "Source" in doc.sections:
        parts += [f"**Source** {escaped(doc.text('Source'))}"]
    return "\n\n".join(filter(None, parts))
