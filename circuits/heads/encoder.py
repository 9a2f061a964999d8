"""Which encoders have a CLS token and separators to look at, and why others do not."""

from __future__ import annotations

from interp.data.images import patch_grid, reads_images
from interp.data.prompts import frame, pair_frame
from interp.errors import BadInput, Refused
from interp.models.model import Model


def no_cls(model: Model) -> str | None:
    """Why no token stands before all others; None where one does."""
    if reads_images(model):
        try:
            return None if 0 in patch_grid(model).others else "no token stands before the patches"
        except Refused as refusal:
            return str(refusal)
    return None if len(frame(model)[0]) else "the tokenizer puts no token before a text"


def no_separator(model: Model) -> str | None:
    """Why nothing stands between two texts; None where something does."""
    try:
        between = pair_frame(model)[0][1]
    except BadInput as error:
        return str(error)
    return None if between else "the tokenizer puts nothing between two texts"
