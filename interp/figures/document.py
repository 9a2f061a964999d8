"""What every page of ours is: one HTML document with its data, style and script inside, and no network.

The data travel as one gzip member in base64, a JSON header and bytes behind it, which the page's script
unpacks. A Content-Security-Policy of the page's own forbids every script and style but these, by hash.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

HERE = Path(__file__).parent
DIGITS = 6
"""Significant digits of every number that travels with a page."""


def document(
    template: str, *, styles: Sequence[str], scripts: Sequence[str], data: bytes, **words: Any
) -> str:
    """The page: a template of this folder, filled with `words`, which it escapes, and with its parts.

    Args:
        template: file of the template. styles, scripts: files that are put together, behind `document.css`,
            `document.js` and `framed.js`.
        data: from `packed`.
    """
    style = "\n".join(part(name) for name in ("document.css", *styles))
    script = compact("\n".join(part(name) for name in ("document.js", "framed.js", *scripts)))
    text = _template(template).render(
        **words,
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        data=Markup(base64.b64encode(data).decode("ascii")),
    )
    return _writable(text)


def packed(header: dict[str, Any], body: bytes = b"") -> bytes:
    """gzip of: length of the header's JSON (u32, little-endian), the JSON, the body."""
    # json.dumps escapes what is not ASCII, lone surrogates and control characters too
    text = json.dumps(_jsonable(header), allow_nan=False, separators=(",", ":")).encode("ascii")
    return gzip.compress(struct.pack("<I", len(text)) + text + body, 6, mtime=0)


def column(values: Any) -> list[Any]:
    """The values as JSON takes them: whole numbers, numbers of six digits, text, None for NaN."""
    if pd.api.types.is_integer_dtype(values) and not values.hasnans:
        return values.tolist()
    if not pd.api.types.is_numeric_dtype(values):
        return [None if pd.isna(value) else str(value) for value in values]
    x = values.to_numpy(dtype=np.float64, na_value=np.nan)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scale = 10.0 ** (DIGITS - 1 - np.floor(np.log10(np.abs(x))))
        rounded = np.round(x * scale) / scale
    rounded = np.where((np.abs(x) > 1e-9) & np.isfinite(rounded), rounded, x)
    return [value if np.isfinite(value) else None for value in rounded.tolist()]


def provenance_lines(meta: dict[str, Any]) -> list[tuple[str, str]]:
    """Where a report comes from, as (what, value) in words."""
    model = {f"model {key}": value for key, value in meta.get("model", {}).items()}
    rest = {
        "created": meta.get("created"),
        "wall time": _seconds(meta.get("wall_time_s")),
        "seed": meta.get("seed"),
        "schema version": meta.get("schema_version"),
        "options": _pairs(meta.get("options")),
        "versions": _pairs(meta.get("versions")),
    }
    return [(k, str(v)) for k, v in (model | rest).items() if v not in (None, "")]


@cache
def part(name: str) -> str:
    """The text of a file of this folder, safe inside its tag."""
    text = (HERE / name).read_text(encoding="utf-8")
    assert not re.search(r"</(script|style)", text, re.IGNORECASE), f"{name} would end its own tag"
    return text


def compact(script: str) -> str:
    """A script without indentation and comments: what travels with every page."""
    lines = (re.sub(r"^//.*|\s// [^\"'`]*$", "", line.strip()) for line in script.splitlines())
    return "\n".join(filter(None, lines))


def _seconds(value: Any) -> str:
    return "" if value is None else f"{float(value):.1f} s"


def _pairs(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else ""


def _jsonable(value: Any) -> Any:
    """Plain Python all the way down: numpy scalars unwrapped, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | np.ndarray):
        return [_jsonable(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    return str(value)


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _csp_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _writable(text: str) -> str:
    """`text` without what UTF-8 or HTML cannot hold: lone surrogates, control characters."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\ufffd", text)
