"""Pictures of reports. Drawing never computes: a figure shows what the Report already holds."""

FIGURES: dict[str, dict[str, str]] = {
    "heads": {
        "map": "interp.figures.head_map:head_map",
        "pattern": "interp.figures.pattern:pattern",
    },
    "attribute": {
        "contributions": "interp.figures.contributions:contributions",
        "waterfall": "interp.figures.waterfall:waterfall",
    },
    "repair": {"bars": "interp.figures.repair_bars:repair_bars"},
    "readout": {"words": "interp.figures.readout_words:readout_words"},
    "edges": {"graph": "interp.figures.circuit_graph:circuit_graph"},
    "circuit_evaluate": {"faithfulness": "interp.figures.faithfulness:faithfulness"},
    "circuit_overlap": {"overlap": "interp.figures.faithfulness:overlap"},
    "circuit_find": {
        "graph": "interp.figures.circuit_graph:circuit_graph",
    },
    "decompose": {"map": "interp.figures.decomposition_map:decomposition_map"},
    "patch": {"map": "interp.figures.patching_map:patching_map"},
    "path_patch": {"map": "interp.figures.path_map:path_map"},
    "ioi_roles": {"map": "interp.figures.path_map:role_map"},
    "words": {
        "heads": "interp.figures.words:head_words",
        "neurons": "interp.figures.words:neuron_words",
    },
    "head_groups": {
        "map": "interp.figures.head_groups:group_map",
        "redundancy": "interp.figures.head_groups:redundancy",
    },
    "prune": {"curve": "interp.figures.pruning_curve:pruning_curve"},
    "shapley": {"map": "interp.figures.shapley_map:shapley_map"},
    "massive": {"layers": "interp.figures.massive:massive_layers"},
    "lens": {"map": "interp.figures.lens_map:lens_map"},
    "recall": {"overview": "interp.figures.recall:overview"},
    "sae_train": {
        "curve": "interp.figures.sae_figures:training_curve",
        "density": "interp.figures.sae_figures:density",
    },
    "sae_eval": {
        "loss": "interp.figures.sae_figures:losses",
        "density": "interp.figures.sae_figures:density",
        "probing": "interp.figures.sae_figures:probing",
    },
    "sae_features": {"density": "interp.figures.sae_figures:density"},
    "flow": {
        "graph": "interp.figures.flow_graph:flow_graph",
        "relevance": "interp.figures.relevance_text:relevance_text",
    },
    "explain": {
        "waterfall": "interp.figures.waterfall:waterfall",
        "contributions": "interp.figures.contributions:contributions",
        "lens": "interp.figures.lens_map:lens_map",
        "graph": "interp.figures.flow_graph:flow_graph",
        "relevance": "interp.figures.relevance_text:relevance_text",
        "pattern": "interp.figures.pattern:pattern",
    },
}
"""For every analysis its figures by name, the main one first: `(report, **options) -> plotly Figure`,
imported when first drawn."""

PAGES: dict[str, str] = {
    "heads": "interp.figures.page:head_page",
    "edges": "interp.figures.circuit_page:circuit_page",
    "circuit_find": "interp.figures.circuit_page:circuit_page",
    "explain": "interp.figures.explain_page:explain_page",
    "flow": "interp.figures.explain_page:explain_page",
    "sae_features": "interp.figures.sae_page:sae_page",
}
"""Analyses with a page of their own, `(report) -> html`; the others show their figures in turn."""
