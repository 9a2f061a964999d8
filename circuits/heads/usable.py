"""Which detectors make sense on a model, and why others do not."""

from __future__ import annotations

from collections.abc import Sequence

from circuits.heads.detector import Detector
from interp.data.images import reads_images
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.sites import Site


def _foreign(model: Model, detector: Detector) -> str | None:
    """Why a detector is for another kind of model altogether."""
    if detector.reads is None and reads_images(model):
        return "needs a model that reads text, and this one reads images"
    if detector.reads is not None and (reason := detector.reads.other_kind(model)):
        return reason
    if detector.encoder_only and model.spec.causal:
        return "needs a model that reads in both directions"
    return None


def usable(
    model: Model, chosen: Sequence[Detector], named: Sequence[str] = ()
) -> tuple[list[Detector], dict[str, str]]:
    """The detectors that make sense on this model, and why the others do not.

    Those for another kind of model are passed over without a word, unless they were asked for by name.
    """
    skipped = {}
    n_layers = len(model.spec.attention_layers)
    chosen = [detector.on(model) for detector in chosen]
    foreign = {detector.name: _foreign(model, detector) for detector in chosen}
    chosen = [d for d in chosen if foreign[d.name] is None or d.name in named]
    for detector in chosen:
        if reason := foreign[detector.name]:
            skipped[detector.name] = reason
        elif detector.causal_only and not model.spec.causal:
            skipped[detector.name] = "needs a model that reads left to right"
        elif model.tokenizer is None and (
            detector.needs_text or (detector.reads is not None and detector.reads.needs_text)
        ):
            skipped[detector.name] = "needs text, and the model was loaded without a tokenizer"
        elif reason := detector.unfit(model):
            skipped[detector.name] = reason
        elif n_layers < detector.min_layers:
            skipped[detector.name] = (
                f"needs {detector.min_layers} attention layers, one head reading what an earlier one "
                f"wrote; the model has {n_layers}"
            )
        elif detector.needs_logits and model.spec.unembedding is None:
            skipped[detector.name] = "needs a language-model head, which this model lacks"
        elif detector.measure is not None:
            try:
                for site in detector.captures(model):
                    model.layers_with(Site.parse(site).name)
                _ = model.W_U
            except Refused as refusal:
                skipped[detector.name] = str(refusal)
    left = [detector for detector in chosen if detector.name not in skipped]
    if not left:
        raise BadInput(
            f"no detector is left for {model.id}: "
            + "; ".join(f"{k} {v}" for k, v in skipped.items())
        )
    return left, skipped
