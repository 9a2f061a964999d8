"""`interp …`: the main jobs from a shell.

Exit codes: 0 done; 1 the result could not be computed or written; 2 bad input, nothing was
computed; 130 interrupted, what was finished is kept.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
import time
import webbrowser
from contextlib import nullcontext
from importlib.metadata import EntryPoint, entry_points
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from interp.commands import (
    DEVICE,
    DTYPE,
    GROUPS,
    MODEL,
    REVISION,
    TRUST,
    Job,
    analysis_group,
    first_line,
    options_known_to,
)
from interp.errors import BadInput, InterpError, SaveFailed
from interp.registry import ANALYSES
from interp.sites import ranges

if TYPE_CHECKING:
    import pandas as pd

    from interp.models.model import Model
    from interp.report import Report

PARTIAL = ".partial"
KEPT = "what was finished is kept in {}: go on with the same command and --resume"


def perform(job: Job) -> None:
    """Run one analysis, save its report, print its summary and where its page is."""
    from interp.run.files import check_writable

    started = time.perf_counter()
    analysis, out = job.analysis, job.out
    data = job.arguments | job.options
    if data.get("prompt") == "":
        raise BadInput("the prompt is empty: give at least one token of text")
    analysis.validate(**options_known_to(analysis.validate, data))
    if out is None:
        out = Path("reports") / f"{_slug(job.model)}-{analysis.name.replace('_', '-')}"
    check_writable(out)
    opened = _open(job.model, **job.loading)
    known = signature(analysis.function).parameters
    ours = {"out": out, "checkpoint": out / PARTIAL, "resume": job.resume}
    given = {name: value for name, value in ours.items() if name in known}
    keeping = out if "out" in given else out / PARTIAL if "resume" in given else None
    busy = (
        nullcontext() if "progress" in known else Console(stderr=True).status("Reading the model")
    )
    try:
        with busy:
            report: Report = analysis.function(
                opened, *job.arguments.values(), **job.options, **given
            )
            report.save(out)
    except KeyboardInterrupt:
        kept = f"; {KEPT.format(keeping)}" if keeping else ""
        print(f"interp: stopped{kept}", file=sys.stderr)
        raise SystemExit(130) from None
    except SaveFailed as error:
        raise SaveFailed(f"{error}. {KEPT.format(keeping)}" if keeping else str(error)) from error
    shutil.rmtree(out / PARTIAL, ignore_errors=True)
    _print_summary(report, analysis.summary(report))
    Console().print(f"{time.perf_counter() - started:.0f} s")
    _print_page(out)


app = typer.Typer(
    cls=analysis_group(perform),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="What every attention head of a transformer does, how sure that is, and whether it matters.",
)


def show(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a saved report.")],
    browser: Annotated[
        bool, typer.Option("--open", help="Open its page in the web browser.")
    ] = False,
) -> None:
    """Print a saved report's summary again, and where its page is; a page that is missing is drawn.

    Example:

        interp show reports/smollm2-135m-heads --open
    """
    from interp.report import Report
    from interp.run.files import write_atomically

    report = Report.load(folder)
    entries = {entry.name: entry for entry in entry_points(group="interp.analyses")}
    if report.analysis not in entries:
        raise BadInput(f"{folder} holds a report of '{report.analysis}', which is not installed")
    entries[report.analysis].load()
    page = folder / "report.html"
    if not page.exists():
        write_atomically(page, report.to_html().encode("utf-8", "replace"))
    _print_summary(report, ANALYSES[report.analysis].summary(report))
    _print_page(folder)
    if browser:
        webbrowser.open(page.resolve().as_uri())


app.command()(show)
for _prefix, _about in GROUPS.items():
    _group = typer.Typer(cls=analysis_group(perform, _prefix), no_args_is_help=True, help=_about)
    _group.command()(show)
    app.add_typer(_group, name=_prefix)


@app.command()
def inspect(
    model: MODEL,
    as_json: Annotated[bool, typer.Option("--json", help="Print the map as JSON.")] = False,
    device: DEVICE = None,
    dtype: DTYPE = None,
    revision: REVISION = None,
    trust_remote_code: TRUST = False,
) -> None:
    """Print the verified map of a model: addresses, identities, and what is refused.

    Examples:

        interp inspect smollm2-135m

        interp inspect ./checkpoint --json | jq .checks

    Exit code 1 when an identity fails.
    """
    opened = _open(
        model, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    if as_json:
        print(json.dumps(_map(opened), indent=1))
    else:
        _print_map(opened)
    if not all(check.passed for check in opened.spec.checks):
        raise SystemExit(1)


@app.command()
def models(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List what can be loaded here, and every form that MODEL can take.

    Example:

        interp models
    """
    from interp.models.load import available_models

    rows = available_models()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("MODEL", "from", "here", "note")
    marks = {True: "yes", False: "no", None: ""}
    for row in rows:
        table.add_row(
            *map(escape, (row["model"], row["source"], marks[row["installed"]], row["note"]))
        )
    Console().print(table)


def _listing(entry: EntryPoint) -> None:
    """Add the command that prints what an installed listing returns."""

    def listing(
        as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    ) -> None:
        rows: pd.DataFrame = entry.load()()
        if as_json:
            print(rows.to_json(orient="records", indent=1, force_ascii=False))
        else:
            _print_table(rows, wrap=True)

    shown = f"{first_line(entry)}\n\nExample:\n\n    interp {entry.name}"
    app.command(name=entry.name, help=shown)(listing)


for _entry in entry_points(group="interp.listings"):
    _listing(_entry)


def main() -> None:
    """Run the command line; every error a user can mend is one line and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="interp: %(message)s")
    logging.getLogger("interp").setLevel(logging.INFO)
    try:
        app()
    except InterpError as error:
        print(f"interp: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interp: stopped", file=sys.stderr)
        raise SystemExit(130) from None


def _print_table(rows: pd.DataFrame, *, wrap: bool = False) -> None:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in rows.columns:
        table.add_column(str(column), no_wrap=not wrap)
    for row in rows.to_dict("records"):
        table.add_row(*(escape(_short(value)) for value in row.values()))
    Console().print(table)


def _print_summary(report: Report, rows: pd.DataFrame) -> None:
    """The summary's table, then what the report wants to be known."""
    _print_table(rows)
    console = Console()
    for name, reason in report.meta.get("skipped", {}).items():
        console.print(f"skipped {name}: {reason}", markup=False)
    for note in report.meta.get("notes", []):
        console.print(f"note: {note}", markup=False)


def _print_page(folder: Path) -> None:
    """Where the page of a saved report is."""
    page = str((folder / "report.html").resolve())
    Console().print(f"open {page}", soft_wrap=True, highlight=False, markup=False)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.0f}" if value == int(value) else f"{value:.3f}"
    return repr(value) if isinstance(value, str) and value != value.strip() else str(value)


def _open(name: str, **options: Any) -> Model:
    from interp.open import load

    with Console(stderr=True).status(f"Loading {escape(name)}"):
        model = load(name, **options)
    for note in model.notes:
        print(f"interp: {note}", file=sys.stderr)
    return model


def _slug(model: str) -> str:
    """A folder name for a model: its last path part, without an ending."""
    name = re.sub(r"\.gguf$", "", model.rstrip("/").split("/")[-1])
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"


def _map(model: Model) -> dict[str, Any]:
    """The spec as plain data."""
    spec = model.spec
    return {
        "model": model.id,
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
                "attention": block.attention,
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
                "parallel": block.parallel,
            }
            for block in spec.blocks
        ],
        "checks": [
            {
                "name": c.name,
                "passed": c.passed,
                "error": c.error,
                "allowed": c.allowed,
                "detail": c.detail,
            }
            for c in spec.checks
        ],
        "refused": spec.refused,
    }


def _print_map(model: Model) -> None:
    """The map for a person: facts, one row for blocks alike, identities, refusals by reason."""
    console = Console()
    data = _map(model)
    facts = Table(show_header=False, title=escape(model.id), title_justify="left")
    for key, value in data.items():
        if key not in ("model", "blocks", "checks", "refused") and value is not None:
            facts.add_row(key, escape(str(value)))
    console.print(facts)

    keys = ("attention", "W_O", "v", "attn_write", "W_out", "mlp_out", "mlp_write")
    keys += ("n_heads", "n_kv_heads", "d_mlp")
    alike: dict[tuple, list[int]] = {}
    for layer, block in enumerate(data["blocks"]):
        row = tuple(_relative(block[key], block["name"] + ".") for key in keys)
        alike.setdefault(row, []).append(layer)
    for row, layers in alike.items():
        shown = f"blocks {ranges(layers)} of {model.spec.stack}"
        table = Table(show_header=False, title=escape(shown), title_justify="left")
        for key, value in zip(keys, row, strict=True):
            table.add_row(key, escape(value))
        console.print(table)

    checks = Table(
        "identity",
        "relative error",
        "allowed",
        "",
        title="verified on a probe",
        title_justify="left",
    )
    for check in model.spec.checks:
        verdict = "[green]holds[/]" if check.passed else "[red]FAILS[/]"
        checks.add_row(escape(check.detail), f"{check.error:.2g}", f"{check.allowed:.2g}", verdict)
    console.print(checks)
    reasons: dict[str, list[str]] = {}
    for site, reason in model.spec.refused.items():
        reasons.setdefault(reason, []).append(site)
    for reason, sites in reasons.items():
        console.print(f"refused {', '.join(sites)}: {reason}", markup=False)


def _relative(value: Any, prefix: str) -> str:
    """An address without its block's name."""
    if isinstance(value, (list, tuple)):
        name, scale = value
        return name.removeprefix(prefix) + (f" × {scale:.4g}" if scale != 1 else "")
    return "-" if value is None else str(value).removeprefix(prefix)


if __name__ == "__main__":
    main()
