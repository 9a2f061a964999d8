"""The features that probes are fitted on: of the model itself, and of the same architecture with random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Float

from interp.data.labelled import LabelledTexts
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.run.progress import Progress
from probes.captured import capture_features, features_of
from probes.controls import random_weights


class HeldFeatures:
    """The features of both models, read when a probe first needs them."""

    def __init__(
        self,
        model: Model,
        data: LabelledTexts,
        sites: str | Sequence[str],
        position: str,
        bars: Progress,
        random_model: bool,
        seed: int,
    ):
        self.model, self.data, self.sites, self.position = model, data, sites, position
        self.bars, self.random_model, self.seed = bars, random_model, seed
        self.features = features_of(model, sites, position)
        self.refusal = ""

    @cached_property
    def trained(self) -> dict[str, np.ndarray]:
        """Of the model itself; BadInput for features that no probe could use."""
        found = self._read(self.model)
        check_features(found, self.data.name)
        return found

    @cached_property
    def random(self) -> dict[str, np.ndarray] | None:
        """Of the model with random weights; None where it is not wanted or cannot be made."""
        if not self.random_model:
            return None
        try:
            return self._read(random_weights(self.model, self.seed))
        except Refused as refusal:
            self.refusal = str(refusal)
            return None

    def _read(self, model: Model) -> dict[str, np.ndarray]:
        found = capture_features(
            model, self.data, self.sites, positions=self.position, progress=self.bars
        )
        return {key: without_rounding(x) for key, x in found.items()}


def without_rounding(x: Float[np.ndarray, "items width"]) -> Float[np.ndarray, "items width"]:
    """The features, those that differ between items by float32 rounding alone made the same for all.

    Divided by its deviation, as probes have it, such a feature would be noise as loud as any other, and the
    direction's largest coordinate.

    >>> without_rounding(np.array([[5000.0, 1.0], [np.nextafter(np.float32(5000), 0), 2.0]])).tolist()
    [[5000.0, 1.0], [5000.0, 2.0]]
    """
    with np.errstate(invalid="ignore"):  # what is not finite is told by check_features
        constant = x.std(0, dtype=np.float64) <= 1e-6 * np.abs(x).max(0, initial=0.0)
    return np.where(constant, x[:1], x)


def check_features(found: Mapping[str, Float[np.ndarray, "items width"]], name: str) -> None:
    """Raise BadInput for sites whose activations are not finite, or the same for every text."""
    broken = [key for key, x in found.items() if not np.isfinite(x).all()]
    if broken:
        raise BadInput(
            f"{broken[0]} has infinite or NaN activations on {name}: load the model with dtype=float32"
        )
    # padding and batching move the last bits of a float32
    constant = [
        key for key, x in found.items() if np.ptp(x, axis=0).max() <= 1e-5 * np.abs(x).max()
    ]
    if constant:
        raise BadInput(
            f"the activation at {', '.join(constant[:4])}{' …' if len(constant) > 4 else ''} is the same for "
            f"all {len(found[constant[0]])} texts of {name}, as where all have the same token there: probe "
            "a later site, or another position (mean, word, -2)"
        )
