"""A page for reports without one of their own: every figure, the tables' first rows, where it comes from."""

from __future__ import annotations

import json

import pandas as pd
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from interp.figures import FIGURES
from interp.figures.document import compact, part
from interp.report import Report

ROWS = 200


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """The first rows; nothing where a whole number is missing, which to_html would call <NA>."""
    rows = table.head(ROWS)
    whole = [name for name in rows if isinstance(rows[name].dtype, pd.Int64Dtype)]
    return rows.assign(
        **{name: rows[name].astype(object).where(rows[name].notna(), "") for name in whole}
    )


def figure_page(report: Report) -> str:
    """The report as one HTML document that opens from disk; plotly's script is inside, once."""
    drawn = []
    for place, name in enumerate(FIGURES.get(report.analysis, {})):
        figure = report.figure(name)
        body = figure.to_html(
            full_html=False, include_plotlyjs=place == 0, config={"responsive": True}
        )
        drawn.append((name, Markup(body)))
    tables = [
        (name, len(table), Markup(_shown(table).to_html(index=False, border=0, na_rep="")))
        for name, table in report.tables.items()
    ]
    environment = Environment(loader=PackageLoader("interp.figures", "."), autoescape=True)
    return environment.get_template("figure_page.html.j2").render(
        report=report,
        figures=drawn,
        tables=tables,
        rows=ROWS,
        script=Markup(compact(part("framed.js"))),
        provenance=json.dumps(report.meta, indent=1, default=str),
    )
