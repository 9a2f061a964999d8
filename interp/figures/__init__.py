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
    "clip_heads": {
        "map": "interp.figures.clip_heads:text_map",
        "parts": "interp.figures.clip_heads:part_shares",
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
    "ablate": {"map": "interp.figures.head_values:ablation_map"},
    "shapley": {"map": "interp.figures.head_values:shapley_map"},
    "duo_attention": {
        "gates": "interp.figures.duo_gates:duo_gates",
        "tradeoff": "interp.figures.duo_gates:duo_tradeoff",
    },
    "massive": {"layers": "interp.figures.massive:massive_layers"},
    "emergence": {
        "trajectories": "interp.figures.emergence:trajectories",
        "onsets": "interp.figures.emergence:onsets",
        "beside": "interp.figures.emergence:beside",
    },
    "lens": {"map": "interp.figures.lens_map:lens_map"},
    "tune_lens": {
        "curves": "interp.figures.lens_curves:lens_curves",
        "training": "interp.figures.lens_curves:tuning_curve",
    },
    "recall": {"overview": "interp.figures.recall:overview"},
    "probe": {
        "map": "interp.figures.probe_map:probe_map",
        "selectivity": "interp.figures.selectivity_bars:selectivity_bars",
    },
    "probe_causal": {"doses": "interp.figures.causal_check:dose_response"},
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
    "probe_attention": {
        "relations": "interp.figures.attention_probe:relations",
        "map": "interp.figures.attention_probe:head_map",
        "parsers": "interp.figures.attention_probe:parsers",
    },
    "probe_structure": {
        "layers": "interp.figures.structure_probe:layers",
        "edges": "interp.figures.structure_probe:edges",
    },
    "vector_steer": {"dose": "interp.figures.dose_response:dose_response"},
    "vector_function": {
        "accuracy": "interp.figures.task_bars:accuracy_bars",
        "layers": "interp.figures.task_bars:layer_curves",
        "heads": "interp.figures.task_bars:effect_map",
    },
    "vector_task": {
        "accuracy": "interp.figures.task_bars:accuracy_bars",
        "weights": "interp.figures.task_bars:weight_map",
        "curve": "interp.figures.task_bars:learning_curve",
    },
    "vector_inject": {"map": "interp.figures.injection_map:injection_map"},
    "flow": {
        "graph": "interp.figures.flow_graph:flow_graph",
        "relevance": "interp.figures.relevance_text:relevance_text",
    },
    "compare": {
        "roles": "interp.figures.compare:role_counts",
        "depth": "interp.figures.compare:depth_profiles",
        "matches": "interp.figures.compare:matched_heads",
        "changes": "interp.figures.compare:change_map",
    },
    "compare_weights": {"changes": "interp.figures.compare:weight_changes"},
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
    "compare": "interp.figures.compare_page:compare_page",
    "edges": "interp.figures.circuit_page:circuit_page",
    "circuit_find": "interp.figures.circuit_page:circuit_page",
    "explain": "interp.figures.explain_page:explain_page",
    "flow": "interp.figures.explain_page:explain_page",
    "sae_features": "interp.figures.sae_page:sae_page",
}
"""Analyses with a page of their own, `(report) -> html`; the others show their figures in turn."""
