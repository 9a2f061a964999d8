"""Tables that pages written by hand ask for: sites, commands, model types, passes on NDIF."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import typer

from docs.making import ROOT
from docs.making.analysis import analyses, command_line, slug
from docs.making.docstrings import cell, escaped
from interp.cli import app
from interp.nnsight import passes
from interp.run.cache import Cache
from interp.sites import AXES, Site, to_transformer_lens

SITES = {
    "embed": "the stream before the first block",
    "resid_pre": "the stream that enters a block",
    "resid_mid": "the stream between attention and MLP; refused where both read the same stream",
    "resid_post": "the stream that leaves a block",
    "attn_out": "what W_O returns, bias included",
    "attn_write": "what attention adds to the stream, after a norm or scale behind W_O if there is one",
    "mlp_post": "the neurons: what the linear layer that makes `mlp_out` reads",
    "mlp_out": "what the MLP returns",
    "mlp_write": "what the MLP adds to the stream",
    "q": "queries, rotary positions applied",
    "k": "keys, rotary positions applied; one for each key–value head",
    "v": "values; one for each key–value head",
    "z": "each head's mix of values, before W_O",
    "scores": "logits of attention, before the softmax",
    "pattern": "attention, after the softmax",
    "cross_q": "queries of a decoder's attention to the encoder's output (the source)",
    "cross_k": "its keys, one for each position of the source",
    "cross_v": "its values, one for each position of the source",
    "cross_z": "each of its heads' mix of values, before W_O",
    "cross_scores": "its logits, before the softmax",
    "cross_pattern": "what each position of the decoder attends to in the source",
    "cross_out": "what its W_O returns, bias included",
    "cross_write": "what it adds to the stream",
    "cross2_q": "queries of a block's attention to a second source",
    "cross2_k": "its keys, one for each position of that source",
    "cross2_v": "its values, one for each position of that source",
    "cross2_z": "each of its heads' mix of values, before W_O",
    "cross2_scores": "its logits, before the softmax",
    "cross2_pattern": "what each position of the block attends to in that source",
    "cross2_out": "what its W_O returns, bias included",
    "cross2_write": "what it adds to the stream",
}
"""What is read at every site of `interp.sites.AXES`."""


def filled(text: str) -> str:
    """A page written by hand, with what it asks for by `<!-- make: NAME -->`."""
    return re.sub(r"<!-- make: (\w+) -->", lambda found: INSERTS[found[1]](), text)


def sites_table() -> str:
    """Every site with its axes at one layer, and its name in TransformerLens."""
    rows = [
        "| site | axes at one layer | TransformerLens | what is read there |",
        "|---|---|---|---|",
    ]
    for name in AXES:
        site = Site(name, None if name == "embed" else 0)
        theirs = next(iter(to_transformer_lens(site)), "").removeprefix("blocks.0.")
        axes = " ".join(Cache().axes(site))
        rows.append(f"| `{name}` | `[{axes}]` | {theirs and f'`{theirs}`'} | {SITES[name]} |")
    return "\n".join(rows)


def commands_table() -> str:
    """Every command and what it does."""
    root: Any = typer.main.get_command(app)
    pages = {command_line(name): f"analyses/{slug(name)}.md" for name in analyses()}
    rows = ["| command | result |", "|---|---|"]
    for words, found in commands(root):
        shown = f"`interp {words}`"
        linked = f"[{shown}]({pages[words]})" if words in pages else shown
        rows.append(f"| {linked} | {cell((found.help or '').strip().splitlines()[0])} |")
    return "\n".join(rows)


def commands(group: Any, words: str = "") -> Iterator[tuple[str, Any]]:
    """(words, click command) of every command below a group."""
    context = SimpleNamespace(obj=None)
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        full = f"{words} {name}".strip()
        if hasattr(found, "list_commands"):
            yield from commands(found, full)
        else:
            yield full, found


def support_table() -> str:
    """What the sweep over model types wrote; the families that the tests try, until there is such a file."""
    swept = ROOT / "docs" / "support.md"
    if swept.exists():
        return re.sub(r"\A# .*\n", "", swept.read_text(encoding="utf-8").lstrip()).strip()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return readme.split("<!-- families -->")[1].split("<!-- /families -->")[0].strip()


def passes_table() -> str:
    """What works where a model runs on NDIF."""
    rows = ["| pass | on NDIF | how, or why not |", "|---|---|---|"]
    for row in passes():
        told = "yes" if row["remote"] else "no"
        rows.append(f"| {cell(row['pass'])} | {told} | {cell(row['why'])} |")
    return "\n".join(rows)


def notebooks_list() -> str:
    """Every notebook with its title."""
    rows = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        lines = "".join(cells[0]["source"]).splitlines()
        rows.append(f"- `{path.relative_to(ROOT)}`: {escaped(lines[0].lstrip('# '))}")
    return "\n".join(rows)


INSERTS: dict[str, Callable[[], str]] = {
    "sites": sites_table,
    "commands": commands_table,
    "support": support_table,
    "passes": passes_table,
    "notebooks": notebooks_list,
}
"""What a page written by hand can ask for."""
