"""Pictures of reports. Drawing never computes: a figure shows what the Report already holds."""

FIGURES = {
    "map": "interp.figures.head_map:head_map",
    "pattern": "interp.figures.pattern:pattern",
}
"""Figure functions by name, `(report, **options) -> plotly Figure`, imported when first drawn."""
