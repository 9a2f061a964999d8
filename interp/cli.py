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
from importlib.metadata import entry_points
from inspect import signature as inspect_signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from interp.errors import BadInput, InterpError, SaveFailed
from interp.registry import ANALYSES, Analysis
from interp.sites import ranges

if TYPE_CHECKING:
    from interp.models.model import Model
    from interp.report import Report

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="What every attention head of a transformer does, how sure that is, and whether it matters.",
)

MODEL = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="smollm2-135m, a hub id (org/name), a folder, or a .gguf file; see `interp models`.",
    ),
]
DEVICE = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps; by default CUDA if there is one.")
]
DTYPE = Annotated[
    str | None, typer.Option(help="float32, bfloat16, …; by default the checkpoint's own.")
]
REVISION = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
TRUST = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings.")
]

PROMPT = Annotated[str, typer.Argument(metavar="PROMPT", help="The text to explain, in quotes.")]
ANSWER = Annotated[
    str | None, typer.Option(help="The token explained; by default the model's choice.")
]
INSTEAD = Annotated[str | None, typer.Option(help="Explain the difference to this token.")]
OUT = Annotated[
    Path | None, typer.Option(help="Folder of the report; by default reports/MODEL-COMMAND.")
]

PARTIAL = ".partial"
STRONGEST = 3
KEPT = "what was finished is kept in {}: go on with the same command and --resume"


@app.command()
def heads(
    model: MODEL,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report; by default reports/MODEL.")
    ] = None,
    detectors: Annotated[
        str | None,
        typer.Option(help="Names separated by commas; all by default. An unknown name lists them."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts in each set.")] = 32,
    seed: Annotated[int, typer.Option(help="Of prompts, bootstrap and controls.")] = 0,
    alpha: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Corrected significance level of a label.")
    ] = 0.01,
    ablate: Annotated[
        bool, typer.Option(help="Measure what ablating each labelled head does.")
    ] = True,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from an interrupted run.")
    ] = False,
    device: DEVICE = None,
    dtype: DTYPE = None,
    revision: REVISION = None,
    trust_remote_code: TRUST = False,
) -> None:
    """Classify every attention head and write a report.

    Examples:

        interp heads smollm2-135m

        interp heads org/name --out reports/mine --prompts 64 --dtype bfloat16

        interp heads ./checkpoint --detectors induction,previous_token --no-ablate

    Ctrl-C keeps what is finished; the same command with --resume goes on from it.
    """
    from interp.run.files import check_writable

    started = time.perf_counter()
    out = Path("reports") / _slug(model) if out is None else out
    names = (
        None
        if detectors is None
        else [name.strip() for name in detectors.split(",") if name.strip()]
    )
    if names == []:
        raise BadInput("--detectors names no detector; write --detectors induction,previous_token")
    analysis = _analysis("heads")
    analysis.validate(detectors=names, prompts=prompts)
    check_writable(out)
    opened = _open(
        model, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    try:
        report: Report = analysis.function(
            opened,
            detectors=names,
            prompts=prompts,
            seed=seed,
            alpha=alpha,
            ablate=ablate,
            checkpoint=out / PARTIAL,
            resume=resume,
        )
        report.save(out)
    except KeyboardInterrupt:
        print(f"interp: stopped; {KEPT.format(out / PARTIAL)}", file=sys.stderr)
        raise SystemExit(130) from None
    except SaveFailed as error:
        raise SaveFailed(f"{error}. {KEPT.format(out / PARTIAL)}") from error
    shutil.rmtree(out / PARTIAL, ignore_errors=True)
    _print_strongest(report)
    console = Console()
    console.print(f"{len(report.table)} heads in {time.perf_counter() - started:.0f} s")
    _print_path(out)


@app.command()
def lens(
    model: MODEL,
    prompt: PROMPT,
    sites: Annotated[str, typer.Option(help="Residual sites, separated by commas.")] = "resid_post",
    reading: Annotated[
        str,
        typer.Option(
            "--lens", help="logit, ridge (fitted once, minutes), or best (ridge if fitted)."
        ),
    ] = "best",
    target: Annotated[str | None, typer.Option(help="A token whose rank is followed.")] = None,
    out: OUT = None,
    device: DEVICE = None,
    dtype: DTYPE = None,
    revision: REVISION = None,
    trust_remote_code: TRUST = False,
) -> None:
    """Read what every layer believes comes next, at every position.

    Example:

        interp lens smollm2-135m "The capital of France is" --target " Paris"
    """
    options = {"sites": [site.strip() for site in sites.split(",")], "lens": reading}
    loading = {"device": device, "dtype": dtype, "revision": revision}
    report = _explained(
        "lens", model, prompt, out, options | {"target": target}, loading, trust_remote_code
    )
    rows = report.table
    _print_rows(
        rows.loc[rows["position"] == rows["position"].max()],
        ["site", "layer", "top_token", "top_probability", "kl", "target_token", "target_rank"],
    )


@app.command()
def attribution(
    model: MODEL,
    prompt: PROMPT,
    answer: ANSWER = None,
    instead: INSTEAD = None,
    position: Annotated[int, typer.Option(help="Whose logits; negative from the end.")] = -1,
    out: OUT = None,
    device: DEVICE = None,
    dtype: DTYPE = None,
    revision: REVISION = None,
    trust_remote_code: TRUST = False,
) -> None:
    """Split a logit (difference) into what every head, MLP, embedding and bias adds to it.

    Example:

        interp attribution smollm2-135m "When Mary and John went to the store, John gave a drink to" \\
            --answer " Mary" --instead " John"
    """
    options = {"answer": answer, "instead": instead, "position": position}
    loading = {"device": device, "dtype": dtype, "revision": revision}
    report = _explained("attribution", model, prompt, out, options, loading, trust_remote_code)
    rows = report.table
    strongest = rows.iloc[(-rows["contribution"].abs().to_numpy()).argsort()[:15]]
    _print_rows(strongest, ["component", "layer", "head", "contribution"])
    Console().print(f"all {len(rows)} contributions sum to {rows['contribution'].sum():.3f} logits")


@app.command()
def flow(
    model: MODEL,
    prompt: PROMPT,
    answer: ANSWER = None,
    instead: INSTEAD = None,
    position: Annotated[int, typer.Option(help="Whose prediction; negative from the end.")] = -1,
    mass: Annotated[float, typer.Option(help="Share of each sum that the kept parts hold.")] = 0.8,
    exclude_sink: Annotated[
        bool, typer.Option("--exclude-sink", help="Leave out the first token.")
    ] = False,
    out: OUT = None,
    device: DEVICE = None,
    dtype: DTYPE = None,
    revision: REVISION = None,
    trust_remote_code: TRUST = False,
) -> None:
    """Draw the route by which a prediction's information came, and each token's relevance.

    Example:

        interp flow smollm2-135m "When Mary and John went to the store, John gave a drink to" --exclude-sink
    """
    options = {"answer": answer, "instead": instead, "position": position, "mass": mass}
    loading = {"device": device, "dtype": dtype, "revision": revision}
    options |= {"exclude_sink": exclude_sink}
    report = _explained("flow", model, prompt, out, options, loading, trust_remote_code)
    _print_rows(report.tables["relevance"], list(report.tables["relevance"].columns))


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


def _analysis(name: str) -> Analysis:
    """An installed analysis, registered when its entry point is loaded."""
    entry_points(group="interp.analyses")[name].load()
    return ANALYSES[name]


def _explained(
    name: str,
    model: str,
    prompt: str,
    out: Path | None,
    options: dict[str, Any],
    loading: dict[str, Any],
    trust_remote_code: bool,
) -> Report:
    """The report of one analysis on one prompt, saved, with the path of its page printed."""
    from interp.run.files import check_writable

    if not prompt:
        raise BadInput("the prompt is empty: give at least one token of text")
    analysis = _analysis(name)
    known = inspect_signature(analysis.validate).parameters
    analysis.validate(**{key: value for key, value in options.items() if key in known})
    out = Path("reports") / f"{_slug(model)}-{name}" if out is None else out
    check_writable(out)
    opened = _open(model, trust_remote_code=trust_remote_code, **loading)
    with Console(stderr=True).status("Reading the model"):
        report: Report = analysis.function(opened, prompt, **options)
        report.save(out)
    _print_path(out)
    return report


def _print_path(out: Path) -> None:
    """The page to open, on a line of its own that a terminal makes a link."""
    page = str((out / "report.html").resolve())
    Console().print(f"open {page}", soft_wrap=True, highlight=False, markup=False)


def _print_rows(rows: Any, columns: list[str]) -> None:
    """Some columns of a table, numbers short, tokens as Python would write them."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows[columns].to_dict("records"):
        table.add_row(*(escape(_short(row[column])) for column in columns))
    Console().print(table)


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


def _print_strongest(report: Report) -> None:
    """The strongest labelled heads of each role."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("role", "heads", "best", "score", "95 %", "null", "ablated", "controls"):
        table.add_column(column, no_wrap=True)
    for detector in report.meta["detectors"]:
        if not detector["labels"]:
            continue
        name, title = detector["name"], detector["title"]
        mine = report.table.loc[[name in labels.split(",") for labels in report.table["labels"]]]
        count = str(len(mine))
        if not len(mine):
            table.add_row(title, count)
        best: Any = mine.nlargest(STRONGEST, name)
        for row in best.to_dict("records"):
            interval = f"{row[f'{name}_low']:.2f}–{row[f'{name}_high']:.2f}"
            numbers = (f"{row[name]:.3f}", interval, f"{row[f'{name}_null']:.3f}")
            effects = (_signed(row.get(f"ablation_{kind}")) for kind in ("effect", "control"))
            table.add_row(title, count, f"L{row['layer']}H{row['head']}", *numbers, *effects)
            title = count = ""
    console = Console()
    console.print(table)
    if "ablation_effect" in report.table:
        console.print("ablated, controls: change in loss (nats a token) on what the role serves")
    for name, reason in report.meta["skipped"].items():
        console.print(f"skipped {name}: {reason}", markup=False)
    for note in report.meta["notes"]:
        console.print(f"note: {note}", markup=False)


def _signed(value: float | None) -> str:
    """A number with its sign; nothing where it was not measured."""
    return "" if value is None or value != value else f"{value:+.3f}"


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

    keys = ("attention", "W_O", "v", "attn_write", "mlp_out", "mlp_write", "n_heads", "n_kv_heads")
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
