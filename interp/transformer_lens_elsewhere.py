"""What TransformerLens has and our view of a Model has not, with what to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from interp.errors import BadInput

_MODULE = "it is the Hugging Face module's: model.module.{name}"
_HOOKED = "nothing stays hooked: pass edits=[interp.Edit.apply(name, change)] to each model.run"
_GENERATE = "interp.generate.generate(model, text, edits=[…], max_new_tokens=…)"
_CIRCUIT = (
    "interp.transformer_lens.view(model).{product} of the layers with attention, [n_layers n_heads …]; "
    "circuits.weights.ov_directions is the SVD of W_OV"
)
_SWITCH = "there is no such switch: model.run(…, capture=[…]) keeps what is named, and {instead}"
_UNHOOKED = "nothing stays hooked; leave it out"
_BACKWARD = "model.run(text, capture=[…], grad=True), then run.gradients(metric, site)"

ATTRIBUTES = {
    "generate": _GENERATE,
    "generate_stream": _GENERATE,
    "hf_generate": _GENERATE,
    "forward": "model.run(text).logits",
    "hooks": "with model.hooked(text, edits=[…]), or pass the edits to model.run",
    "add_hook": _HOOKED,
    "add_perma_hook": _HOOKED,
    "add_caching_hooks": "run_with_cache(text, names_filter=[…]), or model.run(text, capture=[…])",
    "get_caching_hooks": "run_with_cache(text, names_filter=[…]), or model.run(text, capture=[…])",
    "reset_hooks": "nothing to reset: an edit ends with the call it was passed to",
    "remove_all_hook_fns": "nothing to remove: an edit ends with the call it was passed to",
    "hook_dict": "view(model).hook_names() lists the names",
    "hook_points": "view(model).hook_names() lists the names",
    "list_hooks": "nothing stays hooked; view(model).hook_names() lists the names",
    "QK_for_attn_layers": _CIRCUIT.format(product="QK"),
    "OV_for_attn_layers": _CIRCUIT.format(product="OV"),
    "W_QK": _CIRCUIT.format(product="QK"),
    "W_OV": _CIRCUIT.format(product="OV"),
    "all_composition_scores": "circuits.path_patching measures composition on prompts",
    "W_pos": "model.module has the table of learned positions; site 'embed' is the sum of both",
    "W_E_pos": "model.module has the table of learned positions; site 'embed' is the sum of both",
    "input_to_embed": "capture site 'embed'",
    "attn_head_labels": "view(model).all_head_labels",
    "boot_transformers": "interp.load(name)",
    "from_pretrained": "interp.load(name)",
    "cache_all": "run_with_cache(text), or model.run(text, capture=[…])",
    "cache_some": "run_with_cache(text, names_filter=[…]), or model.run(text, capture=[…])",
    "get_hook_point": "nothing stays hooked; view(model).hook_names() lists the names",
    "clear_contexts": "nothing to clear: a hook keeps what it wants in a variable of yours",
    "get_params": "view(model).W_Q, b_Q … by name",
    "tl_parameters": "view(model).W_Q, b_Q … by name; model.module.parameters()",
    "tl_named_parameters": "view(model).W_Q, b_Q … by name; model.module.named_parameters()",
    "n_params_total": "sum(p.numel() for p in model.module.parameters())",
    "layer_types": "model.layers_with('z') are the layers with attention",
    "encoder_output": "interp.load(model.module.get_encoder()) is the encoder",
    "loss_fn": "view(model)(text, return_type='loss')",
    "enable_compatibility_mode": "weights stay as they are; norms are frozen where something linear is wanted",
    "process_weights": "weights stay as they are; norms are frozen where something linear is wanted",
    "set_use_attn_result": _SWITCH.format(instead="heads' results are z times model.W_O(layer)"),
    "set_use_split_qkv_input": _SWITCH.format(instead="q, k and v are edited each by itself"),
    "set_use_attn_in": _SWITCH.format(instead="heads' inputs are edited as q, k and v"),
    "set_use_hook_mlp_in": _SWITCH.format(instead="what the MLP reads is 'resid_mid'"),
    "trace": "model.run(text, capture=[…], edits=[…])",
    "encode": "model.tokenize(text).ids",
    "decode": "model.tokens(ids) for each token, model.tokenizer.decode(ids) for the text",
    "layers": "model.blocks",
    "sites": "interp.sites.AXES has every name and its axes, model.spec.refused those that this model cannot give",
    "original_model": "model.module",
    "config": "model.module.config; what was found in the model is model.spec",
    **{
        name: _MODULE.format(name=name)
        for name in (
            "eval",
            "train",
            "to",
            "cuda",
            "cpu",
            "half",
            "parameters",
            "named_parameters",
            "named_modules",
            "state_dict",
            "requires_grad_",
            "zero_grad",
        )
    },
}
"""Attributes and methods of their models, and of nnsight's, with what to write instead."""

OPTIONS = {
    "stop_at_layer": "what is captured decides where the pass ends: names_filter=[…], return_type=None",
    "start_at_layer": "model.replay(run, [[edit]], metric) goes on from where an edit is",
    "bwd_hooks": _BACKWARD,
    "incl_bwd": _BACKWARD,
    "reset_hooks_end": _UNHOOKED,
    "clear_contexts": _UNHOOKED,
    "past_kv_cache": _GENERATE,
    "pos_slice": "slice the activation: cache['z', 0][:, -1]",
    "device": "interp.load(…, device=…)",
}
"""Arguments of their `run_with_cache` and `run_with_hooks`, with what to write instead."""


CACHE = {
    "accumulated_resid",
    "apply_ln_to_stack",
    "apply_slice_to_batch_dim",
    "compute_head_results",
    "decompose_resid",
    "get_full_resid_decomposition",
    "get_neuron_results",
    "logit_attrs",
    "remove_batch_dim",
    "stack_activation",
    "stack_head_results",
    "stack_neuron_results",
    "to",
    "toggle_autodiff",
}
"""Methods of their ActivationCache, which `cache.to_transformer_lens(model)` is."""


def missing_attribute(owner: Any, name: str, view: type) -> AttributeError:
    """The error for what a Model, or a view of it, has not; for TransformerLens' names, what to write."""
    on_view = name == "cfg" or (name[:1] != "_" and hasattr(view, name))
    if on_view and not isinstance(owner, view):
        hint = f"; as in TransformerLens: interp.transformer_lens.view(model).{name}"
    elif name in ATTRIBUTES:
        hint = f"; here: {ATTRIBUTES[name]}"
    else:  # not yet there while a Model is being made
        found = name[:1] != "_" and hasattr(vars(owner).get("spec"), name)
        hint = f"; here: model.spec.{name}" if found else ""
    message = f"{type(owner).__name__} has no '{name}'{hint}"
    return AttributeError(message, name=name, obj=owner)


def refuse_options(function: str, given: Mapping[str, Any], known: str) -> None:
    """BadInput for the first argument that TransformerLens' `function` takes and ours does not."""
    for name in given:
        hint = f"; here: {OPTIONS[name]}" if name in OPTIONS else f"; it takes {known}"
        raise BadInput(f"{function} has no argument '{name}'{hint}")
