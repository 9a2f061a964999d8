"""Which model types transformers knows, and the classes of each that the sweep tries.

Those that auto classes list, by the kind of the list; and the rest, towers and heads of larger models most of
them, by the classes that their modelling file shows.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

WHOLE, SENSED, OTHER = "encoder-decoder", "sound and video", "other"
UNLISTED = "unlisted"
"""A model type that no auto class lists."""


def model_types() -> list[tuple[str, str, list[str]]]:
    """(model type, kind, classes to try, the most telling first); encoder-decoders stand twice.

    Of a type that no auto class lists the classes are left to `own_classes`, which imports its module.
    """
    mappings = (
        ("encoder", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        ("decoder", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (SENSED, auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES),
        (SENSED, auto.MODEL_FOR_CTC_MAPPING_NAMES),
        (SENSED, auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES),
        (SENSED, auto.MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES),
        ("vision", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
        ("vision", auto.MODEL_FOR_TEXT_RECOGNITION_MAPPING_NAMES),
        ("vision", auto.MODEL_FOR_IMAGE_MAPPING_NAMES),
        ("encoder", auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES),
        ("multimodal", auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        ("", auto.MODEL_MAPPING_NAMES),
        ("vision", auto.MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES),
        ("vision", auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES),
        ("vision", auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES),
        ("vision", auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES),
        ("vision", auto.MODEL_FOR_KEYPOINT_DETECTION_MAPPING_NAMES),
        ("vision", auto.MODEL_FOR_KEYPOINT_MATCHING_MAPPING_NAMES),
        ("vision", auto.MODEL_FOR_POSE_ESTIMATION_MAPPING_NAMES),
        ("vision", auto.MODEL_FOR_IMAGE_MATTING_MAPPING_NAMES),
        ("vision", auto.MODEL_FOR_TABLE_RECOGNITION_MAPPING_NAMES),
        ("vision", auto.MODEL_FOR_BACKBONE_MAPPING_NAMES),
    )
    found: dict[str, tuple[str, list[str]]] = {}
    for kind, mapping in mappings:
        for model_type, classes in mapping.items():
            classes = [classes] if isinstance(classes, str) else list(classes)
            before, others = found.get(model_type, (kind, []))
            found[model_type] = (before or kind, others + [c for c in classes if c not in others])
    rows = [(name, *what) for name, what in found.items()]
    for mapping in (
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    ):
        rows += [row for name, of in mapping.items() if (row := (name, WHOLE, [of])) not in rows]
    listed = {name for name, *_ in rows}
    rows += [(name, UNLISTED, []) for name in CONFIG_MAPPING_NAMES if name not in listed]
    return sorted(row for row in rows if row[0] in CONFIG_MAPPING_NAMES)


def own_classes(model_type: str) -> list[str]:
    """The model classes that a type's modelling file shows and that take its config, those with a head first."""
    config = CONFIG_MAPPING[model_type]
    beside = config.__module__.replace(".configuration_", ".modeling_")
    if find_spec(beside) is None:  # it shares the models of another type
        return []
    module = importlib.import_module(beside)
    shown = {name: getattr(module, name, None) for name in getattr(module, "__all__", ())}
    models = [
        name
        for name, of in shown.items()
        if isinstance(of, type)
        and issubclass(of, PreTrainedModel)
        and of.config_class is config
        and of.forward is not nn.Module.forward
    ]
    return sorted(models, key=lambda name: "For" not in name)
