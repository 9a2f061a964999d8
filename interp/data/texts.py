"""Documents of text, one at a time: from files, from a Hugging Face dataset, or from an installed package.

`wikipedia` is the slice of English Wikipedia (103 articles or so, 2016) that the package gensim
carries as test data: text under CC BY-SA 3.0 (https://creativecommons.org/licenses/by-sa/3.0/), which
a corpus made from it keeps. Install it without what it requires: pip install --no-deps gensim==4.4.0.
"""

from __future__ import annotations

import bz2
import html
import importlib.metadata
import importlib.util
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

from interp.errors import BadInput

WIKIPEDIA = "wikipedia"
WIKIPEDIA_FILE = "test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
INSTALL = "install it with: pip install --no-deps gensim==4.4.0"
SUFFIXES = (".txt", ".jsonl", ".parquet")


def documents(source: str | Path | Sequence[str], *, field: str = "text") -> Iterator[str]:
    """The documents of a source, in order, none of them empty.

    Args:
        source: a `.txt`, `.jsonl` or `.parquet` file; a folder of such; "wikipedia"; the name of a
            Hugging Face dataset, or `name:config`, whose split "train" is streamed (this needs the
            package `datasets`); or texts themselves. A `.txt` file is split at `<|endoftext|>`, else
            where two lines or more are blank.
        field: which field or column holds the text, in `.jsonl`, `.parquet` and datasets.

    Raises:
        BadInput: no such file or dataset, no such field, no document in it.

    >>> list(documents(["One.", "", "Two."]))
    ['One.', 'Two.']
    """
    found = False
    for text in _documents(source, field):
        if text.strip():
            found = True
            yield text
    if not found:
        raise BadInput(f"{_shown(source)} has no text in it: give at least one document")


def _documents(source: str | Path | Sequence[str], field: str) -> Iterator[str]:
    if not isinstance(source, (str, Path)):
        yield from source
        return
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise BadInput(f"folder {path} has no {', '.join(SUFFIXES)} files")
        for file in files:
            yield from _of_file(file, field)
    elif path.is_file():
        yield from _of_file(path, field)
    elif str(source) == WIKIPEDIA:
        yield from wikipedia_articles()
    elif path.suffix.lower() in SUFFIXES:
        raise BadInput(f"no file '{source}'")
    else:
        yield from _of_dataset(str(source), field)


def _of_file(path: Path, field: str) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        text = path.read_text(encoding="utf-8", errors="replace")
        yield from (
            text.split("<|endoftext|>")
            if "<|endoftext|>" in text
            else re.split(r"\n[ \t]*\n[ \t]*\n\s*", text)
        )
    elif suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _field_of(line, field, f"{path}, line {number}")
    elif suffix == ".parquet":
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            raise BadInput(
                f"{path} has no column '{field}'; its columns are {', '.join(file.schema_arrow.names)}"
            )
        for batch in file.iter_batches(columns=[field]):
            yield from (text or "" for text in batch.column(0).to_pylist())
    else:
        raise BadInput(f"'{path}' is none of {', '.join(SUFFIXES)}")


def _field_of(line: str, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        known = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise BadInput(f"{where} has no text field '{field}'; it has {known}")
    return row[field]


def _of_dataset(name: str, field: str) -> Iterator[str]:
    if importlib.util.find_spec("datasets") is None:
        raise BadInput(
            f"'{name}' is no file, and Hugging Face datasets need a package: pip install datasets"
        )
    import datasets

    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split="train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0]
        raise BadInput(f"no file and no dataset '{name}' could be opened: {first}") from error
    for row in rows:
        text = dict(row).get(field)
        if not isinstance(text, str):
            raise BadInput(f"dataset '{name}' has no text field '{field}'; it has {', '.join(row)}")
        yield text


def _shown(source: str | Path | Sequence[str]) -> str:
    return f"'{source}'" if isinstance(source, (str, Path)) else "the list of texts"


# --- Wikipedia -----------------------------------------------------------------------------------


def wikipedia_articles(wheel: str | Path | None = None, *, shortest: int = 1000) -> list[str]:
    """Plain text of the articles that gensim carries: title, then paragraphs.

    Redirects and articles under `shortest` characters are left out. gensim itself is not imported.

    Args:
        wheel: its wheel file, where it is not installed.

    Raises:
        BadInput: gensim is neither installed nor given.
    """
    with _wikipedia_file(wheel) as packed, bz2.open(packed) as file:
        articles = []
        for _, element in ElementTree.iterparse(file):
            if not element.tag.endswith("}page"):
                continue
            parts = {child.tag.split("}")[1]: child for child in element.iter()}
            source = parts["text"].text or ""
            if parts["ns"].text == "0" and "redirect" not in parts:
                text = plain_text(source)
                if len(text) >= shortest:
                    articles.append(f"{parts['title'].text}\n\n{text}")
            element.clear()
    return articles


def _wikipedia_file(wheel: str | Path | None) -> IO[bytes]:
    if wheel is not None:
        return zipfile.ZipFile(wheel).open(f"gensim/test/{WIKIPEDIA_FILE}")
    try:
        package = importlib.metadata.distribution("gensim")
    except importlib.metadata.PackageNotFoundError as error:
        raise BadInput(
            f"the Wikipedia slice comes with gensim, which is missing; {INSTALL}"
        ) from error
    path = Path(str(package.locate_file(f"gensim/test/{WIKIPEDIA_FILE}")))
    if not path.exists():
        raise BadInput(f"this gensim carries no Wikipedia slice; {INSTALL}")
    return path.open("rb")


_DROPPED = (
    r"<!--.*?-->",
    r"<(ref|math|gallery|timeline|source|code|nowiki|imagemap)\b[^>]*?/>",
    r"<(ref|math|gallery|timeline|source|code|nowiki|imagemap)\b[^>]*>.*?</\1>",
)
_APPENDICES = re.compile(
    r"^==+ *(See also|References|External links|Further reading|Notes|Footnotes|Bibliography|"
    r"Sources|Citations|Notes and references) *==+.*?(?=^==[^=]|\Z)",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)


def plain_text(markup: str) -> str:
    """Wiki markup as paragraphs of plain text.

    Templates, tables, files, references, appendices and list markers are left out; links keep their
    words.

    >>> plain_text("'''Ada''' was a [[mathematician|thinker]].{{citation}}<ref>x</ref>")
    'Ada was a thinker.'
    """
    text = html.unescape(markup)
    for pattern in _DROPPED:
        text = re.sub(pattern, "", text, flags=re.DOTALL | re.IGNORECASE)
    text = _without_nested(text, "{{", "}}")
    text = _without_nested(text, "{|", "|}")
    text = _APPENDICES.sub("", text)
    text = _without_nested(text, "[[File:", "]]", inner="[[")
    text = _without_nested(text, "[[Image:", "]]", inner="[[")
    text = re.sub(r"\[\[(?:Category|[a-z]{2,3}(?:-[a-z]+)?):[^\]]*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^\]|]*\|)?([^\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[(?:https?:|//)\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^>]+>", "", text)
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"^=+ *(.*?) *=+ *$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"^[*#:;]+ *", "", text, flags=re.MULTILINE)
    text = text.replace("\xa0", " ")
    text = re.sub(r" ?\([ ,;]*\)", "", text)  # what pronunciation templates leave
    text = re.sub(r"\([ ,;]+", "(", text)
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", text).strip()


def _without_nested(text: str, start: str, end: str, inner: str | None = None) -> str:
    """The text without its (nested) spans from `start` to `end`; an unclosed span is kept."""
    inner = inner or start
    pattern = re.compile("|".join(re.escape(x) for x in sorted({start, inner, end}, key=len)[::-1]))
    kept, depth, begun, done = [], 0, 0, 0
    for match in pattern.finditer(text):
        opens = match[0] == start or (depth and match[0] == inner)
        if opens:
            begun = match.start() if depth == 0 else begun
            depth += 1
        elif match[0] == end and depth:
            depth -= 1
            if depth == 0:
                kept.append(text[done:begun])
                done = match.end()
    return "".join([*kept, text[done:]])
