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
from importlib.metadata import EntryPoint, entry_points, version
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from interp.commands import (
    DEVICE,
    DTYPE,
    GROUPS,
    MODEL,
    REVISION,
    STACK,
    TRUST,
    Job,
    analysis_group,
    command_slug,
    first_line,
    options_known_to,
)
from interp.errors import BadInput, InterpError, SaveFailed
from interp.registry import analysis_called
from interp.terminal import (
    map_of,
    print_listing,
    print_map,
    print_page,
    print_summary,
    print_table,
)

if TYPE_CHECKING:
    import pandas as pd

    from interp.models.model import Model
    from interp.report import Report

PARTIAL = ".partial"
FAILURES_SHOWN = 20
KEPT = "what was finished is kept in {}: go on with the same command and --resume"


def perform(job: Job) -> None:
    """Run one analysis, save its report, print its summary and where its page is."""
    from interp.report import Report
    from interp.run.files import check_writable

    started = time.perf_counter()
    analysis, out = job.analysis, job.out
    data = job.arguments | job.options
    if data.get("prompt") == "":
        raise BadInput("the prompt is empty: give at least one token of text")
    analysis.validate(**options_known_to(analysis.validate, data))
    if out is None:
        name = _slug(*job.sources, stack=job.loading.get("stack"))
        out = Path("reports") / f"{name}-{command_slug(analysis.name)}"
    check_writable(out)
    first: Any = list(job.sources)
    if analysis.reads == "model":
        first = _open(*job.sources, **job.loading)
    elif analysis.reads == "reports":
        first = [Report.load(folder) for folder in job.sources]
        for each, folder in zip(first, job.sources, strict=True):
            each.meta["folder"] = str(folder)
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
                first, *job.arguments.values(), **job.options, **given
            )
            report.save(out)
    except KeyboardInterrupt:
        kept = f"; {KEPT.format(keeping)}" if keeping else ""
        print(f"interp: stopped{kept or '; no result was written'}", file=sys.stderr)
        raise SystemExit(130) from None
    except SaveFailed as error:
        raise SaveFailed(f"{error}. {KEPT.format(keeping)}" if keeping else str(error)) from error
    shutil.rmtree(out / PARTIAL, ignore_errors=True)
    print_summary(report, analysis.summary(report), out)
    Console().print(f"{time.perf_counter() - started:.0f} s")
    print_page(out)


app = typer.Typer(
    cls=analysis_group(perform),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="What every attention head of a transformer does, how sure that is, and whether it matters.",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"interp-suite {version('interp-suite')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


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
    summary = analysis_called(report.analysis).summary
    page = folder / "report.html"
    if not page.exists():
        write_atomically(page, report.to_html().encode("utf-8", "replace"))
    print_summary(report, summary(report), folder)
    print_page(folder)
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
    stack: STACK = None,
    trust_remote_code: TRUST = False,
) -> None:
    """Print the verified map of a model: addresses, identities, and what is refused.

    Examples:

        interp inspect smollm2-135m

        interp inspect ./checkpoint --json | jq .checks

    Exit code 1 when an identity fails on which sites stand; these are refused.
    """
    opened = _open(
        model,
        device=device,
        dtype=dtype,
        revision=revision,
        stack=stack,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print(json.dumps(map_of(opened), indent=1))
    else:
        print_map(opened)
    if any(check.verdict == "fails" for check in opened.spec.checks):
        raise SystemExit(1)


@app.command()
def models(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List what can be loaded here, and every form that MODEL can take.

    Example:

        interp models
    """
    import pandas as pd

    from interp.models.load import available_models

    rows = available_models()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    marks = {True: "yes", False: "no", None: ""}
    shown = [
        {
            "MODEL": row["model"],
            "from": row["source"],
            "here": marks[row["installed"]],
            "note": row["note"],
        }
        for row in rows
    ]
    print_listing(pd.DataFrame(shown))


@app.command()
def batch(
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN.toml", help="What to run on which models, as above.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; by default reports/PLAN.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="serial, processes or ray; by default the plan's, or serial.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Units that run at a time.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of each worker; 1 unless the plan says otherwise.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Of a Ray cluster; without it Ray runs here, bound to loopback."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the whole plan and print its units.")
    ] = False,
) -> None:
    """Run analyses over many models, revisions and data sets; what is finished is never run again.

    The plan is checked whole before anything is loaded. A unit that fails is reported and does not
    stop the others. After Ctrl-C, a crash or a full disk the same command goes on.

    A small PLAN.toml, whose fields docs/cli.md lists under Plans:

        models = ["smollm2-135m", "runs/mine/step-*"]

        [[analyses]]
        name = "heads"
        options = {prompts = 16}

    Examples:

        interp batch plan.toml --dry-run

        interp batch plan.toml --engine processes --workers 4

    Exit code 1 when a unit failed.
    """
    from interp.batch.run import PAGE, lay_out, run_layout

    given = {"engine": engine, "workers": workers, "threads": threads}
    with Console(stderr=True).status("Checking the plan"):
        laid = lay_out(plan, out=out and str(out), **given)
    if dry_run:
        rows: Any = laid.table()
        print_table(rows[[name for name in rows if set(rows[name]) - {"", "-"}]], wrap=True)
        print(laid.needs())
        return
    started = time.perf_counter()
    try:
        index = run_layout(laid, address=address)
    except KeyboardInterrupt:
        print(f"interp: stopped; what was finished is kept in {laid.plan.out}", file=sys.stderr)
        raise SystemExit(130) from None
    counts = index.groupby(["analysis", "data", "status"], sort=False)["seconds"].agg(
        units="count", seconds="sum"
    )
    print_table(counts.reset_index())
    failed: Any = index[index["status"] == "failed"]
    for unit in failed.head(FAILURES_SHOWN).to_dict("records"):
        name = f"{unit['analysis']} of {unit['model']} {unit['revision']} {unit['data']}"
        print(f"failed: {name}: {unit['error']}; see {laid.plan.out / unit['folder']}")
    if len(failed) > FAILURES_SHOWN:
        print(f"failed: {len(failed) - FAILURES_SHOWN} more, all in {laid.plan.out / PAGE}")
    Console().print(f"{time.perf_counter() - started:.0f} s")
    Console().print(f"open {(laid.plan.out / PAGE).resolve()}", soft_wrap=True, highlight=False)
    if len(failed):
        raise SystemExit(1)


def _listing(entry: EntryPoint) -> None:
    """Add the command that prints what an installed listing returns."""

    def listing(
        as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    ) -> None:
        rows: pd.DataFrame = entry.load()()
        if as_json:
            print(rows.to_json(orient="records", indent=1, force_ascii=False))
        else:
            print_listing(rows)

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


def _open(name: str, **options: Any) -> Model:
    from interp.open import load

    with Console(stderr=True).status(f"Loading {escape(name)}"):
        model = load(name, **options)
    for note in model.notes:
        print(f"interp: {note}", file=sys.stderr)
    return model


def _slug(model: str, *others: str, stack: str | None = None) -> str:
    """A folder name for a model: its last path part, without an ending, and its stack; of several, how many follow it.

    >>> _slug("org/Model.gguf"), _slug("a/one", "a/two", "a/three")
    ('Model', 'one-and-2-more')
    >>> _slug("org/clip", stack="text_model")
    'clip-text_model'
    """
    name = re.sub(r"\.gguf$", "", model.rstrip("/").split("/")[-1])
    name = name if stack is None else f"{name}-{stack}"
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"
    return f"{slug}-and-{len(others)}-more" if others else slug
