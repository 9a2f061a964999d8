"""Pictures of reports. Drawing never computes: a figure shows what the Report already holds."""

FIGURES: dict[str, dict[str, str]] = {
    "heads": {
        "map": "interp.figures.head_map:head_map",
        "pattern": "interp.figures.pattern:pattern",
    },
    "attribution": {"contributions": "interp.figures.contributions:contributions"},
    "lens": {"map": "interp.figures.lens_map:lens_map"},
    "flow": {
        "graph": "interp.figures.flow_graph:flow_graph",
        "relevance": "interp.figures.relevance_text:relevance_text",
    },
}
"""For every analysis its figures by name, the main one first: `(report, **options) -> plotly Figure`,
imported when first drawn."""

PAGES: dict[str, str] = {"heads": "interp.figures.page:head_page"}
"""Analyses with a page of their own, `(report) -> html`; the others show their figures in turn."""
