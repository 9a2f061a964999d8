"""What is encoded where; built on `interp`, never on `circuits`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.homes import attribute, names

if TYPE_CHECKING:
    from probes.captured import capture_features
    from probes.causal_check import probe_causal
    from probes.controls import control_labels, random_weights, shuffled_labels
    from probes.erasure import Eraser, leace
    from probes.head_lens import HeadLens
    from probes.lenses import tune_lens
    from probes.linear import linear_probes
    from probes.mdl import mdl_table, online_code
    from probes.ridge_sweep import ridge_sweep
    from probes.saes.attribute import direct_feature_attribution
    from probes.saes.causal import (
        feature_patching,
        feature_paths,
        patch_features,
        steer,
        zero_features,
    )
    from probes.saes.commands import sae_eval, sae_train
    from probes.saes.contributions import feature_contributions
    from probes.saes.evaluate import evaluate_sae
    from probes.saes.families import feature_families
    from probes.saes.features import sae_features
    from probes.saes.interop import load_sae, save_sae
    from probes.saes.model import SAE, SAEConfig
    from probes.saes.prefix import prefix_induction
    from probes.saes.splice import splice
    from probes.saes.train import train_sae
    from probes.saes.upstream import recursive_attribution
    from probes.vectors.function import vector_function
    from probes.vectors.heads import function_vector, indirect_effects, last_means
    from probes.vectors.injection import injection, random_vectors
    from probes.vectors.memory import memory_vector, vector_inject
    from probes.vectors.steering import steering_vector, vector_steer
    from probes.vectors.task import learn_weights, task_vectors, vector_task

_HOMES = {
    "Eraser": "probes.erasure",
    "HeadLens": "probes.head_lens",
    "SAE": "probes.saes.model",
    "SAEConfig": "probes.saes.model",
    "capture_features": "probes.captured",
    "control_labels": "probes.controls",
    "direct_feature_attribution": "probes.saes.attribute",
    "evaluate_sae": "probes.saes.evaluate",
    "feature_contributions": "probes.saes.contributions",
    "feature_families": "probes.saes.families",
    "feature_patching": "probes.saes.causal",
    "feature_paths": "probes.saes.causal",
    "function_vector": "probes.vectors.heads",
    "indirect_effects": "probes.vectors.heads",
    "injection": "probes.vectors.injection",
    "last_means": "probes.vectors.heads",
    "leace": "probes.erasure",
    "learn_weights": "probes.vectors.task",
    "linear_probes": "probes.linear",
    "load_sae": "probes.saes.interop",
    "mdl_table": "probes.mdl",
    "memory_vector": "probes.vectors.memory",
    "online_code": "probes.mdl",
    "patch_features": "probes.saes.causal",
    "prefix_induction": "probes.saes.prefix",
    "probe_causal": "probes.causal_check",
    "random_vectors": "probes.vectors.injection",
    "random_weights": "probes.controls",
    "recursive_attribution": "probes.saes.upstream",
    "ridge_sweep": "probes.ridge_sweep",
    "sae_eval": "probes.saes.commands",
    "sae_features": "probes.saes.features",
    "sae_train": "probes.saes.commands",
    "save_sae": "probes.saes.interop",
    "shuffled_labels": "probes.controls",
    "splice": "probes.saes.splice",
    "steer": "probes.saes.causal",
    "steering_vector": "probes.vectors.steering",
    "task_vectors": "probes.vectors.task",
    "train_sae": "probes.saes.train",
    "tune_lens": "probes.lenses",
    "vector_function": "probes.vectors.function",
    "vector_inject": "probes.vectors.memory",
    "vector_steer": "probes.vectors.steering",
    "vector_task": "probes.vectors.task",
    "zero_features": "probes.saes.causal",
}

__all__ = [
    "SAE",
    "Eraser",
    "HeadLens",
    "SAEConfig",
    "capture_features",
    "control_labels",
    "direct_feature_attribution",
    "evaluate_sae",
    "feature_contributions",
    "feature_families",
    "feature_patching",
    "feature_paths",
    "function_vector",
    "indirect_effects",
    "injection",
    "last_means",
    "leace",
    "learn_weights",
    "linear_probes",
    "load_sae",
    "mdl_table",
    "memory_vector",
    "online_code",
    "patch_features",
    "prefix_induction",
    "probe_causal",
    "random_vectors",
    "random_weights",
    "recursive_attribution",
    "ridge_sweep",
    "sae_eval",
    "sae_features",
    "sae_train",
    "save_sae",
    "shuffled_labels",
    "splice",
    "steer",
    "steering_vector",
    "task_vectors",
    "train_sae",
    "tune_lens",
    "vector_function",
    "vector_inject",
    "vector_steer",
    "vector_task",
    "zero_features",
]


def __getattr__(name: str):
    return attribute("probes", name, _HOMES)


def __dir__() -> list[str]:
    return names("probes", _HOMES)
