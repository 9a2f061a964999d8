"""What MkDocs calls while it builds: the made pages, the navigation, and the gallery's figures."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from mkdocs.structure.files import File
from plotly.offline import get_plotlyjs

from docs.making import gallery, pages, reference, tables

log = logging.getLogger("mkdocs.hooks.interp")
seconds: dict[str, float] = {}


def on_config(config: Any) -> Any:
    """The navigation of what is made goes where mkdocs.yml has a place for it."""
    made = {
        "Analyses": pages.navigation(),
        "Reference": [{name: f"reference/{name}.md"} for name in reference.pages()],
    }
    config.nav = [
        {title: made[title] if entry == [] else entry}
        for item in config.nav
        for title, entry in item.items()
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the made pages, plotly and the figures, which are drawn now."""
    made: dict[str, str] = dict(pages.pages())
    made["assets/plotly.min.js"] = get_plotlyjs()
    if config.extra["figures"]:
        for name, drawn in gallery.drawn(log.info).items():
            seconds[name] = drawn["seconds"]
            made[f"gallery/figures/{name}.js"] = gallery.script_of(name, drawn["figure"])
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """What a page asks for, and how long each figure took where it was drawn."""

    def told(found: re.Match[str]) -> str:
        taken = seconds.get(found[1])
        return f"*Took {taken:.0f} s where this page was made.*" if taken is not None else ""

    return re.sub(r"<!-- seconds (\w+) -->", told, tables.filled(markdown))
