"""English of several kinds that is at hand on every machine, document by document.

For fitting what must work on any text (`interp.ridge_lens`): one novel alone makes a poor sample. The
kinds are the shipped prose; the docstrings of core dependencies and of Python's standard library; the
language reference that Python carries for `help()`; and the readmes and licences of what is installed.
All but the prose change a little from version to version: what was read is told by a hash of it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from interp.data.prompts import prose

PACKAGES = ("numpy", "scipy", "sklearn", "pandas", "torch", "transformers")
CHARACTERS = {
    "prose": 1_000_000,  # all of it: 140,000
    "standard library": 24_000,
    **dict.fromkeys(PACKAGES, 12_000),
    "reference": 40_000,
    "readmes": 40_000,
    "licences": 16_000,
}
"""How much of each source is read, in characters: two fifths of it is prose."""

PROSE_DOCUMENTS = 32
LONGEST, SHORTEST = 2_500, 600
"""Characters of one document: longer ones are cut, shorter ones are left out."""

RULE = 1
"""Counted up whenever documents are chosen in another way."""


@dataclass(frozen=True)
class Document:
    """A text, the kind it belongs to and where it was found."""

    kind: str
    name: str
    text: str


def documents() -> list[Document]:
    """Documents of the kinds "prose", "documentation", "reference", "readmes", "licences".

    Of each source up to `CHARACTERS` are read; one that is not there is left out.

    The order within a kind is that of a hash of the name: the same wherever the files are, and not
    alphabetical.

    >>> found = documents()
    >>> found[0].kind, found[0].text[:25]
    ('prose', 'It is a truth universally')
    """
    sources: dict[str, Iterable[Document]] = {
        "prose": _prose(),
        "standard library": _docstrings(_standard_library(), deep=False),
        **{name: _docstrings(_package(name)) for name in PACKAGES},
        "reference": _reference(),
        "readmes": _readmes(),
        "licences": _licences(),
    }
    found: list[Document] = []
    for name, source in sources.items():
        left = CHARACTERS[name]
        for document in source:
            if left <= 0:
                break
            left -= len(document.text)
            found.append(document)
    return found


def recipe() -> str:
    """A hash of how documents are chosen and of the shipped prose, but not of installed versions."""
    parts = [RULE, CHARACTERS, PROSE_DOCUMENTS, LONGEST, SHORTEST, prose()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _prose() -> Iterator[Document]:
    """The shipped prose in consecutive parts, cut between paragraphs."""
    paragraphs = prose().split("\n\n")
    size = -(-len(paragraphs) // PROSE_DOCUMENTS)
    for start in range(0, len(paragraphs), size):
        text = "\n\n".join(paragraphs[start : start + size])
        yield Document("prose", f"prose.txt, paragraph {start}", text)


def _docstrings(folder: Path | None, *, deep: bool = True) -> Iterator[Document]:
    """One document a source file: its docstrings, in order."""
    if folder is None or not folder.is_dir():
        return
    names = {
        file.relative_to(folder).as_posix(): file
        for file in (folder.rglob("*.py") if deep else folder.glob("*.py"))
    }
    for name in sorted(names, key=_hash):
        if "test" not in name and (text := _docstrings_of(names[name])):
            yield from _document("documentation", f"{folder.name}/{name}", text)


def _docstrings_of(file: Path) -> str:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):  # templates, other encodings
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))


def _standard_library() -> Path | None:
    folder = sysconfig.get_paths().get("stdlib")
    return Path(folder) if folder else None


def _package(name: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def _reference() -> Iterator[Document]:
    """Topics of Python's language reference, as `help("NUMBERS")` shows them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    for name in sorted(topics, key=_hash):
        yield from _document("reference", name, topics[name])


def _readmes() -> Iterator[Document]:
    """How installed packages describe themselves, each description once."""
    found = {
        distribution.name: (distribution.read_text("METADATA") or "").partition("\n\n")[2]
        for distribution in importlib.metadata.distributions()
    }
    for name in sorted(found, key=_hash):
        yield from _document("readmes", name, found[name].strip())


def _licences() -> Iterator[Document]:
    """Licence texts of installed packages, each wording once."""
    seen: set[str] = set()
    found = {
        f"{distribution.name}/{file}": file
        for distribution in importlib.metadata.distributions()
        for file in distribution.files or ()
        if "LICENSE" in file.name.upper()
    }
    for name in sorted(found, key=_hash):
        try:
            text = found[name].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        wording = _hash("".join(text.split()).lower()[-1500:])
        if wording not in seen:
            seen.add(wording)
            yield from _document("licences", name, text)


def _document(kind: str, name: str, text: str) -> Iterator[Document]:
    if len(text) >= SHORTEST:
        yield Document(kind, name, text[:LONGEST])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
