"""The page of a comparison: the usual one, with a link to the page of each report that was compared."""

from __future__ import annotations

from markupsafe import Markup, escape

from interp.figures.figure_page import figure_page
from interp.report import Report


def compare_page(report: Report) -> str:
    """The report as one HTML document that opens from disk; links to reports whose folders are known."""
    models = report.tables["models"]
    links = [
        Markup('<a href="{}">{}</a>').format(page, name) if page else escape(name)
        for name, page in zip(models["model"], models["page"], strict=True)
    ]
    listed = Markup("<p>Reports compared: {}</p>").format(Markup(", ").join(links))
    return figure_page(report).replace("</h1>", f"</h1>\n{listed}", 1)
