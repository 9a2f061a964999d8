"""What is encoded where; built on `interp`, never on `circuits`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probes.saes.attribute import direct_feature_attribution, feature_contributions
    from probes.saes.causal import (
        feature_patching,
        feature_paths,
        patch_features,
        steer,
        zero_features,
    )
    from probes.saes.commands import sae_eval, sae_train
    from probes.saes.evaluate import evaluate_sae
    from probes.saes.families import feature_families
    from probes.saes.features import sae_features
    from probes.saes.interop import load_sae, save_sae
    from probes.saes.model import SAE, SAEConfig
    from probes.saes.prefix import prefix_induction
    from probes.saes.splice import splice
    from probes.saes.train import train_sae
    from probes.saes.upstream import recursive_attribution

_HOMES = {
    "SAE": "probes.saes.model",
    "SAEConfig": "probes.saes.model",
    "direct_feature_attribution": "probes.saes.attribute",
    "evaluate_sae": "probes.saes.evaluate",
    "feature_contributions": "probes.saes.attribute",
    "feature_families": "probes.saes.families",
    "feature_patching": "probes.saes.causal",
    "feature_paths": "probes.saes.causal",
    "load_sae": "probes.saes.interop",
    "patch_features": "probes.saes.causal",
    "prefix_induction": "probes.saes.prefix",
    "recursive_attribution": "probes.saes.upstream",
    "sae_eval": "probes.saes.commands",
    "sae_features": "probes.saes.features",
    "sae_train": "probes.saes.commands",
    "save_sae": "probes.saes.interop",
    "splice": "probes.saes.splice",
    "steer": "probes.saes.causal",
    "train_sae": "probes.saes.train",
    "zero_features": "probes.saes.causal",
}

__all__ = [
    "SAE",
    "SAEConfig",
    "direct_feature_attribution",
    "evaluate_sae",
    "feature_contributions",
    "feature_families",
    "feature_patching",
    "feature_paths",
    "load_sae",
    "patch_features",
    "prefix_induction",
    "recursive_attribution",
    "sae_eval",
    "sae_features",
    "sae_train",
    "save_sae",
    "splice",
    "steer",
    "train_sae",
    "zero_features",
]


def __getattr__(name: str):
    """The public names, imported when first used."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'probes' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
