"""`python -m interp.schemas [NAME …]`: write the JSON schemas of all analyses, or of those that are named.

They are made from the reports of the contract tests' models, so this runs in a checkout: from each call
there, and from the same call with every switch turned, as a switch may add or leave out columns.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from interp.errors import InterpError
from interp.run.files import write_atomically
from interp.schemas import HERE, SCHEMA_VERSION

COMMON = ("analysis", "schema_version", "model", "options", "seed", "versions", "created")
LENSES: list[dict[str, Any]] = [{"lens": "logit"}, {"lens": "ridge"}]
VARIANTS = {"heads": [{"detectors": ["induction"]}], "lens": LENSES, "explain": LENSES}
"""Further calls, where an option that is no switch says which columns there are."""
ALWAYS = {"tables", "arrays", *COMMON}


def schema_from(described: Sequence[dict[str, Any]], about: str) -> dict[str, Any]:
    """The schema that all these descriptions of one analysis's reports satisfy.

    What is in all of them is required; what is in some has its type if it is there.
    """
    name = described[0]["analysis"]
    meta = [{key: d[key] for key in d if key not in ALWAYS} for d in described]
    properties: dict[str, Any] = {
        "analysis": {"const": name},
        "schema_version": {"const": SCHEMA_VERSION},
        "model": {
            "type": "object",
            "required": ["id", "sha256"],
            "properties": {"id": {"type": "string"}, "sha256": {"type": "string"}},
        },
        "options": {"type": "object"},
        "seed": {"type": ["integer", "null"]},
        "versions": {"type": "object", "additionalProperties": {"type": "string"}},
        "created": {"type": "string", "format": "date-time"},
    }
    for key in sorted({key for m in meta for key in m}):
        properties[key] = _typed([m[key] for m in meta if key in m])
    properties["tables"] = _entries([d["tables"] for d in described], _table)
    properties["arrays"] = _entries([d["arrays"] for d in described], _array)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:interp-suite:report:{SCHEMA_VERSION}:{name}",
        "title": name,
        "description": about,
        "type": "object",
        "required": [key for key in properties if key in ALWAYS],
        "properties": properties,
    }


def _entries(found: Sequence[dict[str, Any]], one: Any) -> dict[str, Any]:
    """Named tables or arrays: each described from all that have it."""
    names = list(dict.fromkeys(name for entries in found for name in entries))
    return {
        "type": "object",
        "required": [name for name in names if all(name in entries for entries in found)],
        "properties": {
            name: one([entries[name] for entries in found if name in entries]) for name in names
        },
    }


def _table(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    columns = [table["columns"] for table in found]
    names = list(dict.fromkeys(name for column in columns for name in column))
    kinds = {
        name: sorted({column[name] for column in columns if name in column} | {"null"})
        for name in names
    }
    return {
        "type": "object",
        "required": ["rows", "columns"],
        "properties": {
            "rows": {"type": "integer"},
            "columns": {
                "type": "object",
                "required": [name for name in names if all(name in column for column in columns)],
                "properties": {
                    # nothing but missing values says nothing of the type
                    name: {"enum": kind} if kind != ["null"] else {"type": "string"}
                    for name, kind in kinds.items()
                },
            },
        },
    }


def _array(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    axes = [len(array["shape"]) for array in found]
    return {
        "type": "object",
        "required": ["dtype", "shape"],
        "properties": {
            "dtype": {"enum": sorted({array["dtype"] for array in found})},
            "shape": {
                "type": "array",
                "items": {"type": "integer"},
                "minItems": min(axes),
                "maxItems": max(axes),
            },
        },
    }


def _typed(values: Sequence[Any]) -> dict[str, Any]:
    """The JSON type of a value; whatever it is, another report may lack it and say null."""
    names = {bool: "boolean", int: "number", float: "number", str: "string", dict: "object"}
    kinds = {names.get(type(value), "array") for value in values if value is not None}
    return {"type": sorted(kinds | {"null"})} if kinds else {}


def _descriptions(name: str, contracts: Any, model: Any) -> Iterator[dict[str, Any]]:
    """report.json of the contract tests' call of an analysis, and of that call varied."""
    analysis = contracts.ANALYSES[name]
    asked, (positional, options) = contracts.ARGUMENTS, contracts.ARGUMENTS.get(name, (None, {}))
    switches = [
        {p.name: not options.get(p.name, p.default)}
        for p in inspect.signature(analysis.function).parameters.values()
        if isinstance(p.default, bool) and p.name not in ("progress", "resume")
    ]
    yield _described(contracts.report_of(name, model))
    for change in [*switches, *VARIANTS.get(name, [])]:
        if positional is None:
            positional = (contracts.PROMPT,) if analysis.reads == "model" else ()
        asked[name] = (positional, {**options, **change})
        try:
            yield _described(contracts.report_of(name, model))
        except InterpError:  # this model does not have what the switch asks for
            continue
        finally:
            asked[name] = (positional, options)


def _described(report: Any) -> dict[str, Any]:
    return json.loads(report.files(page=False)["report.json"])


def _short_lines(schema: dict[str, Any]) -> str:
    """The schema as JSON, what is short on one line."""
    text = json.dumps(schema, indent=1)

    def joined(match: re.Match[str]) -> str:
        line = re.sub(r"\s*\n\s*", " ", match[0]).replace("[ ", "[").replace(" ]", "]")
        return line if len(line) < 90 else match[0]

    for _ in range(3):  # a list inside a column inside a table
        text = re.sub(r"\[\s[^\[\]{}]*\]|\{\s[^{}]*\}", joined, text)
    return text + "\n"


def main() -> None:
    """Write the schemas; those of analyses that are gone are removed."""
    root = HERE.parent.parent
    if not (root / "tests" / "contracts").is_dir():
        raise SystemExit("schemas are made from the contract tests: run this in a checkout")
    sys.path.insert(0, str(root))
    contracts = importlib.import_module("tests.contracts.test_analyses")
    import interp

    os.environ["INTERP_CACHE"] = tempfile.mkdtemp(prefix="interp-schemas-")  # lenses that are kept
    model = interp.load(contracts.induction_model(), tokenizer=contracts.character_tokenizer())
    names = sys.argv[1:] or sorted(contracts.ANALYSES)
    for name in names:
        doc = inspect.getdoc(contracts.ANALYSES[name].function) or ""
        described = list(_descriptions(name, contracts, model))
        schema = schema_from(described, doc.split("\n")[0])
        write_atomically(HERE / f"{name}.json", _short_lines(schema).encode())
    shutil.rmtree(os.environ["INTERP_CACHE"])
    for path in HERE.glob("*.json"):
        if path.stem not in contracts.ANALYSES:
            Path(path).unlink()


if __name__ == "__main__":
    main()
