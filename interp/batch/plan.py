"""A plan: which analyses of which models, on which data; read, checked whole, and laid out in units.

out = "reports/sizes"

[[models]]
name = "EleutherAI/pythia-70m"        # whatever `interp.load` takes
revisions = ["step1000", "step143000"]
dtype = "float32"

[[models]]
name = "runs/tiny"                    # a folder of checkpoint folders
revisions = ["step-*"]

[data.cats]
prompt = "The cat sat on the mat. The cat"

[[analyses]]
name = "heads"
options = {prompts = 16}

[[analyses]]
name = "attribute"
data = ["cats"]
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp.batch.arguments import checked_arguments, data_parameters
from interp.batch.models import Source
from interp.errors import BadInput, unknown
from interp.registry import Analysis, analysis_called

LOADING = {
    "device": str,
    "dtype": str,
    "tokenizer": str,
    "stack": str,
    "trust_remote_code": bool,
}
MODEL = {"name": str, "label": str, "revisions": list, **LOADING}
ANALYSIS = {"name": str, "options": dict, "data": list}
ENGINES = ("serial", "processes", "ray")
TOP = {
    "models": list,
    "analyses": list,
    "data": dict,
    "out": str,
    "engine": str,
    "workers": int,
    "threads": int,
    "retries": int,
    "pages": bool,
    "resources": dict,
    "device": str,
    "dtype": str,
}
RESOURCES = {"cpus": float, "gpus": float}


@dataclass(frozen=True)
class Task:
    """One analysis on one data set, for every model: its arguments are checked.

    `options` are those of the arguments that are not the data set's.
    """

    analysis: Analysis
    data: str | None
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What is to be done, and how.

    Attributes:
        out: folder of the results. engine: "serial", "processes" or "ray". workers: how many units
            run at a time. threads: of each worker; results of every engine are the same bit for bit
            as long as this number is. retries: how often a unit whose worker died is run again.
        pages: whether every report gets its page. resources: "cpus" and "gpus" of a Ray worker.
    """

    sources: tuple[Source, ...]
    tasks: tuple[Task, ...]
    out: Path
    engine: str = "serial"
    workers: int = 1
    threads: int = 1
    retries: int = 2
    pages: bool = True
    resources: dict[str, float] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)


def read_plan(plan: str | Path | Mapping[str, Any], **overrides: Any) -> Plan:
    """A plan out of a TOML file or a mapping of the same shape; nothing is loaded.

    Args:
        plan: the file or the mapping. overrides: keys of the plan given anew; None leaves them.

    Raises:
        BadInput: the file is missing or no TOML; an unknown key, analysis or option (the nearest is
            named); a model listed twice; a revision that a folder does not have; nothing to do.
    """
    name = "plan"
    if not isinstance(plan, Mapping):
        name = Path(plan).stem
        plan = _toml(Path(plan))
    text = {**plan, **{key: value for key, value in overrides.items() if value is not None}}
    text = _keys(text, TOP, "the plan")
    engine = text.get("engine", "serial")
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    numbers = {"workers": 1, "threads": 1, "retries": 0}
    for key, least in numbers.items():
        if text.get(key, least) < least:
            raise BadInput(f"{key} = {text[key]}; wanted at least {least}")
    resources = _keys(text.get("resources", {}), RESOURCES, "resources")
    sources = tuple(_sources(text))
    tasks = tuple(_tasks(text))
    if not sources or not tasks:
        missing = "models" if not sources else "analyses"
        raise BadInput(f'the plan has no units: it names no {missing}; give {missing} = ["…"]')
    how = {key: text[key] for key in (*numbers, "pages") if key in text}
    if engine != "serial" and "workers" not in how:
        how["workers"] = max(1, (os.cpu_count() or 1) // how.get("threads", 1))
    out = Path(text.get("out", Path("reports") / name))
    return Plan(sources, tasks, out, engine, resources=resources, text=dict(plan), **how)


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"no plan '{path}'; give a .toml file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the plan '{path}' cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"the plan '{path}' is no TOML: {error}") from error


def _keys(given: Any, known: Mapping[str, type], where: str) -> dict[str, Any]:
    """`given` if all of its keys are known and their values of the right type."""
    if not isinstance(given, Mapping):
        raise BadInput(f"{where} is {given!r}; wanted a table of {', '.join(known)}")
    for key, value in given.items():
        if key not in known:
            raise unknown(f"key of {where} called", key, known)
        kind = known[key]
        number = kind is float and isinstance(value, int)
        mapping = kind is dict and isinstance(value, Mapping)
        wrong_bool = isinstance(value, bool) and kind is not bool
        if wrong_bool or not (isinstance(value, kind) or number or mapping):
            raise BadInput(f"'{key}' of {where} is {value!r}; wanted a {kind.__name__}")
    return dict(given)


def _sources(text: Mapping[str, Any]) -> Iterable[Source]:
    seen: dict[str, str] = {}
    labels: dict[str, str] = {}
    for entry in text.get("models", []):
        table = {"name": entry} if isinstance(entry, str) else entry
        table = _keys(table, MODEL, "a model")
        if not table.get("name"):
            raise BadInput(f'a model of the plan has no name: {table}; give name = "…"')
        given = str(table["name"]).rstrip("/")
        loading = {key: text[key] for key in ("device", "dtype") if key in text}
        loading |= {key: table[key] for key in LOADING if key in table}
        _check_loading(loading, given, here=text.get("engine") != "ray")
        if "*" in given and "revisions" not in table:
            given, _, pattern = given.rpartition("/")
            table["revisions"] = [pattern]
        label = str(table.get("label", _label(given)))
        if labels.setdefault(label, given) != given:
            raise BadInput(
                f"two models are called '{label}': '{labels[label]}' and '{given}'; "
                'give one of them label = "…"'
            )
        for source in _revisions(given, label, table.get("revisions"), loading):
            if source.key in seen:
                raise BadInput(f"the model '{source.shown}' is listed twice; leave one of them out")
            seen[source.key] = source.shown
            yield source


def _revisions(
    given: str, label: str, revisions: list[Any] | None, loading: dict[str, Any]
) -> Iterable[Source]:
    """One source a revision: subfolders of a folder, or branches, tags and commits of a hub id."""
    if revisions is None:
        yield Source(label, None, given, loading)
        return
    if not revisions or not all(isinstance(revision, str) and revision for revision in revisions):
        raise BadInput(f"revisions of '{given}' are {revisions!r}; wanted a list of names")
    folder = Path(given).expanduser()
    if not folder.is_dir():
        if stars := [revision for revision in revisions if "*" in revision]:
            raise BadInput(
                f"'{given}' is no folder here, so its revisions cannot be found by '{stars[0]}'; "
                "name them"
            )
        for revision in revisions:
            yield Source(label, revision, given, {**loading, "revision": revision})
        return
    here = sorted((path.name for path in folder.iterdir() if path.is_dir()), key=_natural)
    for pattern in revisions:
        found = [name for name in here if Path(name).match(pattern)]
        if not found:
            raise unknown(f"revision in the folder '{given}' called", pattern, here)
        for name in found:
            yield Source(label, name, str(Path(given) / name), loading)


def _check_loading(loading: Mapping[str, Any], given: str, *, here: bool) -> None:
    """A dtype or device that does not exist; the devices of other machines are not known here."""
    from interp.models.sources.placement import resolve_device, resolve_dtype

    try:
        if "dtype" in loading:
            resolve_dtype(loading["dtype"], default="auto")
        if "device" in loading and here:
            resolve_device(loading["device"])
    except BadInput as error:
        raise BadInput(f"model '{given}': {error}") from error


def _tasks(text: Mapping[str, Any]) -> Iterable[Task]:
    sets = text.get("data", {})
    used: set[str] = set()
    seen: dict[str, str] = {}
    for entry in text.get("analyses", []):
        table = {"name": entry} if isinstance(entry, str) else entry
        table = _keys(table, ANALYSIS, "an analysis")
        if not table.get("name"):
            raise BadInput(f'an analysis of the plan has no name: {table}; give name = "…"')
        analysis = analysis_called(re.sub(r"[\s-]", "_", table["name"]))
        if analysis.reads != "model":
            raise BadInput(
                f"'{analysis.name}' reads {analysis.reads}, not one model: run it after the plan, "
                f"`{analysis.example}`"
            )
        chosen = table.get("data", list(sets) if data_parameters(analysis) else [])
        used |= set(map(str, chosen))
        for name in chosen or [None]:
            if name is not None and name not in sets:
                if not sets:
                    raise BadInput(
                        f"'{analysis.name}' reads data called '{name}' and the plan has none; name its "
                        f'arguments in a table: [data.{_bare(str(name))}] prompt = "…"'
                    )
                raise unknown("data set of the plan called", str(name), sets)
            given = {} if name is None else sets[name]
            if not isinstance(given, Mapping):
                raise BadInput(
                    f"the data set '{name}' is {given!r}; wanted a table of arguments: "
                    f'[data.{name}] prompt = "…"'
                )
            options = table.get("options", {})
            if both := sorted(set(given) & set(options)):
                raise BadInput(f"'{both[0]}' is given by the data set '{name}' and as an option")
            where = f"analysis '{analysis.name}'" + (f" on data '{name}'" if name else "")
            arguments = checked_arguments(analysis, {**given, **options}, where)
            key = repr((analysis.name, sorted(arguments.items())))
            if key in seen:
                raise BadInput(f"{where} is listed twice, as {seen[key]}; leave one of them out")
            seen[key] = where
            yield Task(analysis, name, arguments, options)
    if seen and (idle := sorted(set(sets) - used)):
        raise BadInput(
            f"no analysis uses the data set '{idle[0]}'; name it in data = [\"{idle[0]}\"]"
        )


def _label(given: str) -> str:
    """A model's short name: a hub id as it is, a path's last part."""
    path = Path(given).expanduser()
    return path.name if path.exists() else given


def _natural(name: str) -> list[Any]:
    """A key that sorts step-2 before step-10."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)
    ]


def _bare(name: str) -> str:
    """A key that TOML takes without quotes."""
    return re.sub(r"\W+", "_", name).strip("_") or "mine"
