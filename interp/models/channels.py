"""Attention from channels to channels: rows of scores with an entry for each channel of a group, over no positions."""

from __future__ import annotations

import torch

from interp.models.stack import Layer


def is_over_channels(layer: Layer, key: int | str) -> bool:
    """Whether the values of a layer's attention are channels [batch group channel pos] of what a module returned.

    Those of an attention between positions are that module's rows, [batch head pos d_head].
    """
    if layer.attention is None:
        return False
    v = layer.attention.tensors["v"]
    rows, n_pos = layer.hidden(key).shape[:2]
    if v.shape[0] != rows or v.shape[3] != n_pos:
        return False
    channels, positions = v.permute(0, 3, 1, 2).flatten(2), v.transpose(1, 2).flatten(2)
    outputs = [call.output for calls in layer.inside.calls.values() for call in calls]
    of_positions = [x for x in outputs if x is not None and x.shape[:-1] == (rows, n_pos)]
    parts = [part for x in of_positions for part in x.split(v.shape[1:3].numel(), dim=-1)]
    if any(torch.equal(part, positions) for part in parts):  # values that are all zero are both
        return False
    return any(torch.equal(part, channels) for part in parts)
