"""Docstrings in the house form, as Markdown, before mkdocstrings shows them."""

from __future__ import annotations

from typing import Any

import griffe

from docs.making.docstrings import markdown


class HouseDocstrings(griffe.Extension):
    """Puts Markdown in the place of every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            parameters = [p.name for p in obj.parameters] if obj.is_function else None
            obj.docstring.value = markdown(obj.docstring.value, parameters)
