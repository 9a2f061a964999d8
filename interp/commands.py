"""Commands made from registered analyses: signature and docstring are the whole interface.

An analysis is `(model, data, *, options) -> Report`: what stands before the star becomes an argument,
what stands after it an option, and the docstring's `Args:` their help. One that reads several models, or
reports, has as many MODEL or FOLDER arguments as are given, and no data. An analysis called `a_b` is the
command `a b` where `a` is one of `GROUPS`, else `a-b`. Nothing is imported until a command is used: the
line beside its name in `interp --help` is read from the source file.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from interp.errors import BadInput, unknown
from interp.registry import ANALYSES, Analysis

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
STACK = Annotated[
    str | None,
    typer.Option(help="Of a model with several stacks of blocks, the one whose layers are meant."),
]
LOADING = {
    "device": DEVICE,
    "dtype": DTYPE,
    "revision": REVISION,
    "stack": STACK,
    "trust_remote_code": TRUST,
}
"""Options of every command that loads a model."""

GROUPS = {
    "circuit": "Find a circuit, and judge it.",
    "sae": "Train a sparse autoencoder, judge it, and read its features.",
    "vector": "Steer a model with a vector, and see what else it moves.",
}
"""First words of two-word commands, and what is said of them."""

OURS = ("out", "checkpoint", "resume", "progress")
"""Parameters that the command line fills by itself; `out` is the report's own folder."""


@dataclass(frozen=True)
class Job:
    """One call of a command: what to run, on what, and where the report goes.

    sources: a model, several, or folders of reports, as `analysis.reads` says. loading: options of
    `interp.load`, for a command that is given one model.
    """

    analysis: Analysis
    sources: tuple[str, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]
    out: Path | None
    resume: bool
    loading: dict[str, Any]


def command_of(name: str) -> tuple[str, str]:
    """(group, command) of the analysis called `name`; "" for a command without a group.

    >>> command_of("path_patch"), command_of("circuit_find")
    (('', 'path-patch'), ('circuit', 'find'))
    """
    first, _, rest = name.partition("_")
    group, word = (first, rest) if first in GROUPS and rest else ("", name)
    return group, word.replace("_", "-")


def command_slug(name: str) -> str:
    """An analysis's name in the names of folders."""
    return name.replace("_", "-")


def analysis_group(perform: Callable[[Job], None], prefix: str = "") -> type[TyperGroup]:
    """A kind of group that has, beside its own commands, one for every installed analysis."""
    return type("AnalysisGroup", (_Group,), {"prefix": prefix, "perform": staticmethod(perform)})


class _Group(TyperGroup):
    prefix: str
    perform: Callable[[Job], None]

    def _entries(self) -> dict[str, EntryPoint]:
        found = {}
        for entry in entry_points(group="interp.analyses"):
            group, name = command_of(entry.name)
            if group == self.prefix:
                found[name] = entry
        return dict(sorted(found.items()))

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C where it has nothing to keep, such as while a model loads, is one line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interp: stopped; no result was written", err=True)
            raise SystemExit(130) from None

    def list_commands(self, ctx: Any) -> list[str]:
        return [*self._entries(), *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = self._entries().get(cmd_name)
        if entry is None:
            return super().get_command(ctx, cmd_name)
        return Deferred(cmd_name, entry, self.perform)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the first word names; BadInput with the nearest name where there is none."""
        if args and args[0][:1] != "-" and self.get_command(ctx, args[0]) is None:
            raise unknown(f"{f'{self.prefix} '.lstrip()}command", args[0], self.list_commands(ctx))
        return super().resolve_command(ctx, args)


class Deferred(TyperCommand):
    """A command whose analysis is imported when it is called, not when it is listed."""

    def __init__(self, name: str, entry: EntryPoint, perform: Callable[[Job], None]):
        super().__init__(name=name, callback=None, help=first_line(entry))
        self.entry, self.perform = entry, perform

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        self.entry.load()
        app = typer.Typer(
            add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False
        )
        analysis = ANALYSES[self.entry.name]
        app.command(name=self.name)(_callback(analysis, self.perform))
        return get_command(app).make_context(info_name, args, parent=parent, **extra)


def _callback(analysis: Analysis, perform: Callable[[Job], None]) -> Callable[..., None]:
    """The function behind a command, with the signature that typer reads."""
    function = analysis.function
    hints = inspect.get_annotations(function, eval_str=True)
    help_of = _argument_help(function)
    first = next(iter(inspect.signature(function).parameters))
    parameters = [_parameter(first, _sources(analysis, first, help_of.get(first)))]
    loads = LOADING if analysis.reads == "model" else {}
    lists: dict[str, tuple[type, Any]] = {}
    arguments = []
    known = list(inspect.signature(function).parameters.values())[1:]
    for parameter in known:
        if parameter.name in OURS:
            continue
        positional = parameter.kind is not parameter.KEYWORD_ONLY
        kind, many = plain(hints[parameter.name], singular=positional)
        if kind is None:
            continue
        if many:
            lists[parameter.name] = kind, parameter.default
        wanted = str if many else kind
        default = parameter.default
        if isinstance(default, (tuple, list)):
            default = (
                ",".join(map(str, default)) or None
            )  # nothing: not an option that names nothing
        if positional:
            arguments.append(parameter.name)
        elif default is None:
            wanted = wanted | None
        make = typer.Argument if positional else typer.Option
        info = make(help=help_of.get(parameter.name), **_metavar(positional, parameter.name, many))
        parameters.append(_parameter(parameter.name, Annotated[wanted, info], default))
    folder = f"Folder of the report; by default reports/MODEL-{command_slug(analysis.name)}."
    parameters.append(_parameter("out", Annotated[Path | None, typer.Option(help=folder)], None))
    if resumable := any(parameter.name == "resume" for parameter in known):
        again = typer.Option("--resume", help="Go on from an interrupted run.")
        parameters.append(_parameter("resume", Annotated[bool, again], False))
    for name, annotation in loads.items():
        parameters.append(_parameter(name, annotation, False if name.startswith("trust") else None))

    def callback(**values: Any) -> None:
        loading = {name: values.pop(name) for name in loads}
        out, given = values.pop("out"), values.pop(first)
        sources = (given,) if isinstance(given, str) else tuple(given)
        resume = values.pop("resume") if resumable else False
        for name, (kind, default) in lists.items():
            text = values[name]
            values[name] = default if text is None else _split(name, text, kind)
        data = {name: values.pop(name) for name in arguments}
        perform(Job(analysis, sources, data, values, out, resume, loading))

    callback.__doc__ = _help(analysis, resumable)
    callback.__annotations__ = {p.name: p.annotation for p in parameters}
    # This signature is what typer reads; the function itself takes anything.
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return callback


def _sources(analysis: Analysis, name: str, told: str | None) -> Any:
    """The first argument of a command: MODEL, or as many as are given of what the function says it reads.

    Reports are given as their folders.
    """
    if analysis.reads == "model":
        return MODEL
    if analysis.reads == "reports":
        metavar, told = "FOLDER", f"Folders of saved reports, {told or 'of any analysis.'}"
    else:
        metavar = name.upper() if name == "series" else name.upper().removesuffix("S")
    return Annotated[list[str], typer.Argument(metavar=metavar, help=told)]


def _parameter(
    name: str, annotation: Any, default: Any = inspect.Parameter.empty
) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _metavar(positional: bool, name: str, many: bool) -> dict[str, Any]:
    if positional:
        return {"metavar": name.upper().removesuffix("S") if name == "prompts" else name.upper()}
    return {"metavar": "A,B,…"} if many else {}


def plain(annotation: Any, *, singular: bool) -> tuple[Any, bool]:
    """(type, whether a list) that a shell can give for an annotation; (None, False) if it cannot."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    members = [member for member in members if member is not NoneType]
    if not singular:
        for member in members:
            if get_origin(member) in (list, tuple, Sequence):
                inner, _ = plain(get_args(member)[0], singular=True)
                return inner, inner is not None
    return next((kind for kind in (str, bool, int, float, Path) if kind in members), None), False


def _split(name: str, text: str, kind: type) -> list[Any]:
    option = "--" + name.replace("_", "-")
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise BadInput(f"{option} names nothing; write {option} A,B")
    try:
        return [kind(part) for part in parts]
    except ValueError:
        raise BadInput(
            f"{option} is {text!r}; wanted {kind.__name__}s separated by commas"
        ) from None


def _help(analysis: Analysis, resumable: bool) -> str:
    """What `--help` says: the result, what it does not show, an example, the source."""
    doc = inspect.getdoc(analysis.function) or ""
    told = re.split(r"\n\s*\n(?=(?:Args|Returns|Raises|Source|>>>))", doc)[0]
    parts = [told, "Example:", analysis.example, f"Source: {analysis.source}."]
    if resumable:
        parts.insert(
            3, "Ctrl-C keeps what is finished; the same command with --resume goes on from it."
        )
    return "\n\n".join(
        re.sub(r"\s*\n(?!\n)", " ", part) if part is not told else part for part in parts
    )


def _argument_help(function: Callable) -> dict[str, str]:
    """Help of every parameter, from the docstring's Args."""
    doc = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n((?:[ ]{4}.*\n|\n)+)", doc + "\n", re.MULTILINE)
    found: dict[str, str] = {}
    if section is None:
        return found
    for entry in re.split(r"^    (?=\S)", section[1], flags=re.MULTILINE)[1:]:
        for names, text in re.findall(r"([\w, ]+?): (.*?)(?=\. [a-z_]+: |\Z)", entry, re.DOTALL):
            for name in names.split(","):
                found[name.strip()] = re.sub(r"\s+", " ", text).strip()
    return found


def first_line(entry: EntryPoint) -> str:
    """First docstring line of an analysis, without importing it."""
    spec = importlib.util.find_spec(entry.module)
    if spec is None or spec.origin is None:
        return ""
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == entry.attr:
            return (ast.get_docstring(node) or "").split("\n")[0]
    return ""


def options_known_to(function: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a function takes."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}
