"""What a plan gives to an analysis, checked against the function's signature before anything runs."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interp.commands import OURS, options_known_to, plain
from interp.errors import BadInput, unknown
from interp.registry import Analysis


def data_parameters(analysis: Analysis) -> dict[str, inspect.Parameter]:
    """The arguments of an analysis that are its data: what stands between the model and the options."""
    parameters = list(inspect.signature(analysis.function).parameters.values())[1:]
    return {p.name: p for p in parameters if p.kind is not p.KEYWORD_ONLY}


def checked_arguments(analysis: Analysis, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`given`, of the types that the function takes.

    Raises:
        BadInput: an argument that is unknown, missing or of another type, or a value that the
            analysis refuses whatever the model.
    """
    function = analysis.function
    hints = inspect.get_annotations(function, eval_str=True)
    names = [name for name in list(inspect.signature(function).parameters)[1:] if name not in OURS]
    known = {name: plain(hints[name], singular=False) for name in names}
    known = {name: kind for name, kind in known.items() if kind[0] is not None}
    values = {}
    for name, value in given.items():
        if name not in known:
            raise unknown(f"option of '{analysis.name}'", name, sorted(known))
        values[name] = _typed(value, *known[name], hints[name], f"{where}: '{name}'")
    data = data_parameters(analysis)
    parameters = inspect.signature(function).parameters
    for name in names:
        if parameters[name].default is parameters[name].empty and name not in values:
            place = f"a data set: [data.NAME] {name}" if name in data else f"options: {name}"
            raise BadInput(f"{where} needs '{name}'; give it in {place} = …")
    try:
        analysis.validate(**options_known_to(analysis.validate, bound(analysis, values)))
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from error
    return values


def bound(analysis: Analysis, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the function's defaults: what its result depends on beside the model."""
    parameters = list(inspect.signature(analysis.function).parameters.values())[1:]
    defaults = {
        p.name: p.default for p in parameters if p.default is not p.empty and p.name not in OURS
    }
    return defaults | dict(arguments)


def contents(value: Any) -> Any:
    """A value as its content: a file or folder that is named becomes the hash of what it holds."""
    if isinstance(value, Mapping):
        return {str(key): contents(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [contents(item) for item in value]
    if isinstance(value, str | Path) and 0 < len(str(value)) < 1000 and "\n" not in str(value):
        path = Path(value)
        if path.is_file():
            return {"file": str(value), "sha256": file_sha256(path)}
        if isinstance(value, Path) or "/" in value:
            inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
            if inside:
                return {str(p.relative_to(path)): file_sha256(p) for p in inside}
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _typed(value: Any, kind: type, many: bool, hint: Any, where: str) -> Any:
    if isinstance(value, list):
        if not many:
            raise BadInput(f"{where} is a list; wanted one {kind.__name__}")
        if not value:
            raise BadInput(f"{where} names nothing; give at least one {kind.__name__}")
        return [_typed(item, kind, False, hint, where) for item in value]
    if many:  # one value where there may be several: by itself, if it can stand so
        alone = plain(hint, singular=True)[0]
        if alone is None:
            return [_typed(value, kind, False, hint, where)]
        kind = alone
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise BadInput(f"{where} is {value!r}; wanted {kind.__name__}")
    if value == "":
        raise BadInput(f"{where} is empty")
    return value
