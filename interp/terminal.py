"""What the command line prints: tables, summaries of reports, a model's map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from interp.sites import CROSSES, ranges

if TYPE_CHECKING:
    import pandas as pd

    from interp.models.block_map import BlockMap
    from interp.models.model import Model
    from interp.models.spec import Check
    from interp.report import Report


LONG, WIDE = 60, 160
"""Texts longer than this have no room in a column, unless the terminal has this many."""
FOR_TEXT = 16
"""Characters of a text that a column has room for at least."""
VERDICTS = {"holds": "[green]holds[/]", "fails": "[red]FAILS[/]", "no": "no"}
INTERVAL_ENDS = ("low", "high")
"""How the names of columns with the ends of an interval end."""


def print_table(rows: pd.DataFrame, *, wrap: bool = False, where: str = "a wider terminal") -> None:
    """A table no wider than the terminal: headers and numbers are whole, long texts are cut (or wrapped).

    Columns that have no room are named below it, with `where` they are.
    """
    console = Console()
    cells = {str(name): [_short(value) for value in rows[name]] for name in rows}
    least = {
        name: max(cell_len(name), min(widest, FOR_TEXT) if _is_text(rows[name]) else widest)
        for name, widest in _widths(cells).items()
    }
    shown = _that_fit(least, console.width)
    left = console.width - _total([least[name] for name in shown])
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in shown:
        more = min(left, max(map(cell_len, (name, *cells[name]))) - least[name])
        left -= more
        cut = "fold" if wrap else "ellipsis"
        table.add_column(escape(name), no_wrap=not wrap, overflow=cut, max_width=least[name] + more)
    for row in zip(*(cells[name] for name in shown), strict=True):
        table.add_row(*map(escape, row))
    console.print(table)
    if missing := [name for name in cells if name not in shown]:
        plural = "s" if len(missing) > 1 else ""
        text = f"… {len(missing)} more column{plural} in {where}: {', '.join(missing)}"
        console.print(text, markup=False, highlight=False)


def _widths(cells: dict[str, list[str]]) -> dict[str, int]:
    return {name: max(map(cell_len, texts), default=0) for name, texts in cells.items()}


def _is_text(column: Any) -> bool:
    return any(isinstance(value, str) for value in column)


def _total(widths: Sequence[int]) -> int:
    """Width of a table with columns of these widths: a space beside each, a divider, the edges."""
    return sum(widths) + 2 * len(widths) + 1


def _that_fit(least: dict[str, int], width: int) -> list[str]:
    """Names of the columns that have room: ends of intervals go first, then what stands to the right.

    >>> _that_fit({"head": 4, "gain": 6, "gain_low": 8, "gain_high": 9, "p": 5}, 30)
    ['head', 'gain', 'p']
    >>> _that_fit({"head": 4, "gain": 6, "p": 5}, 3)
    ['head']
    """
    shown = list(least)
    while len(shown) > 1 and _total([least[name] for name in shown]) > width:
        ends = [name for name in shown if name.endswith(INTERVAL_ENDS)]
        if ends:
            shown = [name for name in shown if name not in ends]
        else:
            shown.pop()
    return shown


def print_listing(rows: pd.DataFrame) -> None:
    """A table where it fits; else a line for each row, and its long texts under it."""
    console = Console()
    long = [name for name in rows if any(len(str(value)) > LONG for value in rows[name])]
    if not long or console.width >= WIDE:
        return print_table(rows, wrap=True)
    first, *others = [name for name in rows if name not in long]
    for row in rows.to_dict("records"):
        facts = " · ".join(_fact(name, row[name]) for name in others)
        console.print(Text.assemble((str(row[first]), "bold"), f"  {facts}"), highlight=False)
        for name in long:
            said = f"{name}: " if name != long[0] else ""
            console.print(Padding(Text(f"{said}{_short(row[name])}"), (0, 0, 0, 4)))
        console.print()
    return None


def print_summary(report: Report, rows: pd.DataFrame, folder: Path) -> None:
    """The summary's table, then what the report, saved in `folder`, wants to be known."""
    whole = [name for name, table in report.tables.items() if set(rows) <= set(table)]
    print_table(rows, where=str(folder / f"{whole[0]}.csv" if whole else folder))
    console = Console()
    for name, reason in report.meta.get("skipped", {}).items():
        console.print(f"skipped {name}: {reason}", markup=False)
    for note in report.meta.get("notes", []):
        console.print(f"note: {note}", markup=False)


def print_page(folder: Path) -> None:
    """Where the page of a saved report is."""
    page = str((folder / "report.html").resolve())
    Console().print(f"open {page}", soft_wrap=True, highlight=False, markup=False)


def _fact(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {_short(value)}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.0f}" if value == int(value) else f"{value:.3f}"
    return repr(value) if isinstance(value, str) and value != value.strip() else str(value)


def map_of(model: Model) -> dict[str, Any]:
    """The spec as plain data."""
    spec = model.spec
    return {
        "model": model.id,
        "stack": spec.stack if spec.named else None,
        **spec.facts,
        "n_ctx": spec.n_ctx,
        "causal": spec.causal,
        "embedding": spec.embedding,
        "final_norm": spec.final_norm,
        "unembedding": spec.unembedding,
        "logit_scale": spec.logit_scale,
        "logit_softcap": spec.logit_softcap,
        "blocks": [
            {
                "name": block.name,
                "d_model": block.d_model,
                "attention": block.attention,
                "n_windows": block.windows and len(block.windows.layout.at),
                "n_heads": block.n_heads,
                "n_kv_heads": block.n_kv_heads,
                "d_head": block.d_head,
                "W_O": block.W_O,
                "v": block.v and block.v.module,
                "attn_write": block.attn_write
                and [block.attn_write.module, block.attn_write.scale],
                "d_mlp": block.d_mlp,
                "W_out": block.W_out,
                "mlp_out": block.mlp_out,
                "mlp_write": block.mlp_write and [block.mlp_write.module, block.mlp_write.scale],
                "others": [
                    [write.module, write.scale, write.pooling and str(write.pooling)]
                    for write in block.others
                ],
                "parallel": block.parallel,
                **_sources(block),
                "asides": tuple(dict.fromkeys(aside.attention for aside in block.asides)),
            }
            for block in spec.blocks
        ],
        "checks": [
            {
                "name": c.name,
                "passed": c.passed,
                "verdict": c.verdict,
                "error": c.error,
                "allowed": c.allowed,
                "detail": c.detail,
            }
            for c in spec.checks
        ],
        "not_a_sum": spec.not_a_sum,
        "refused": spec.refused,
    }


def _sources(block: BlockMap) -> dict[str, Any]:
    """Where the attention to each source is, its W_O and what it writes; None where a block attends to fewer."""
    data: dict[str, Any] = {}
    for number, of in enumerate(CROSSES):
        cross = block.to_source(number)
        data[of[:-1]] = cross and cross.attention
        data[f"{of}W_O"] = cross and cross.W_O
        data[f"{of}write"] = cross and cross.write and [cross.write.module, cross.write.scale]
    return data


def print_map(model: Model) -> None:
    """The map for a person: facts, one row for blocks alike, identities, refusals by reason."""
    data = map_of(model)
    other = ("model", "blocks", "checks", "not_a_sum", "refused")
    facts = {key: value for key, value in data.items() if key not in other and value is not None}
    _print_pairs(model.id, {key: str(value) for key, value in facts.items()})

    keys = ("attention", "W_O", "v", "attn_write", "W_out", "mlp_out", "mlp_write")
    keys += ("n_heads", "n_kv_heads", "d_mlp")
    if len(model.spec.stages) > 1:
        keys = ("d_model", *keys)
    if any(block["others"] for block in data["blocks"]):
        keys += ("others",)
    if any(block["n_windows"] for block in data["blocks"]):
        keys += ("n_windows",)
    for of in CROSSES:
        if any(block[of[:-1]] for block in data["blocks"]):
            keys += (of[:-1], f"{of}W_O", f"{of}write")
    if any(block["asides"] for block in data["blocks"]):
        keys += ("asides",)
    alike: dict[tuple, list[int]] = {}
    for layer, block in enumerate(data["blocks"]):
        row = tuple(_relative(block[key], block["name"] + ".") for key in keys)
        alike.setdefault(row, []).append(layer)
    for row, layers in alike.items():
        shown = f"blocks {ranges(layers)} of {model.spec.stack}"
        _print_pairs(shown, dict(zip(keys, row, strict=True)))

    _print_checks(model.spec.checks)
    console = Console()
    if why := model.spec.not_a_sum:
        what = "the residual stream is not embedding plus attn_write plus mlp_write"
        console.print(f"{what}: {why}", markup=False)
    reasons: dict[str, list[str]] = {}
    for site, reason in model.spec.refused.items():
        reasons.setdefault(reason, []).append(site)
    for reason, sites in reasons.items():
        console.print(f"refused {', '.join(sites)}: {reason}", markup=False)


def _print_pairs(title: str, pairs: dict[str, str]) -> None:
    """Names and what they stand for, under a title; what has no room goes on in the next line."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in pairs.items():
        table.add_row(*map(escape, row))
    Console().print(Text(title, "bold"), table)


def _print_checks(checks: Sequence[Check]) -> None:
    """The identities that were tried, with how far each is off."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("verified on a probe")
    for name in ("error", "allowed", ""):
        table.add_column(name, no_wrap=True)
    for check in checks:
        numbers = (f"{check.error:.2g}", f"{check.allowed:.2g}")
        table.add_row(escape(check.detail), *numbers, VERDICTS[check.verdict])
    Console().print(table)


def _relative(value: Any, prefix: str) -> str:
    """An address without its block's name."""
    if isinstance(value, list) and all(isinstance(each, list) for each in value):
        said = (_relative(each[:2], prefix) + f", {each[2]}" * bool(each[2]) for each in value)
        return "; ".join(said) or "-"
    if isinstance(value, tuple):
        return "; ".join(_relative(each, prefix) for each in value) or "-"
    if isinstance(value, list):
        name, scale = value
        return name.removeprefix(prefix) + (f" × {scale:.4g}" if scale != 1 else "")
    return "-" if value is None else str(value).removeprefix(prefix)
