"""How good maps are on held-out rows: exact over the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import BadInput
from interp.ridge_lens import TOKENS_PER_FORWARD
from interp.unembedding import Unembedding
from probes.lens_inputs import Inputs

CHUNK_ROWS = 128
"""Rows whose logits over the whole vocabulary exist at once."""


@dataclass(frozen=True)
class Rows:
    """Held-out rows: activations by place, final residuals, the tokens that follow (−1: unknown)."""

    x: dict[int, Float[Tensor, "units rows d_in"]]
    final: Float[Tensor, "rows d_model"]
    following: Int[Tensor, " rows"]

    @staticmethod
    def of(inputs: Inputs, windows: Int[Tensor, "n pos"], each: int, advance=None) -> Rows:
        """`each` positions of every window, evenly spread; never the first, never the last."""
        width = windows.shape[1] - 2
        if width < 1:
            raise BadInput("windows of held-out text have fewer than 3 tokens: give a wider window")
        each = min(each, width)
        places = 1 + ((torch.arange(each) + 0.5) * width / each).long()
        parts, finals = {}, []
        for rows in windows.split(max(1, TOKENS_PER_FORWARD // windows.shape[1])):
            x, final = inputs.read(rows, places)
            for place, value in x.items():
                parts.setdefault(place, []).append(value)
            finals.append(final)
            if advance is not None:
                advance(len(rows))
        joined = {place: torch.cat(values, 1) for place, values in parts.items()}
        following = windows[:, places + 1].flatten()
        return Rows(joined, torch.cat(finals), following)


@torch.no_grad()
def judged(
    unembed: Unembedding,
    stack: Float[Tensor, "lens rows d_model"],
    final: Float[Tensor, "rows d_model"],
    following: Int[Tensor, " rows"] | None = None,
) -> dict[str, Float[Tensor, " lens"]]:
    """Means over rows of KL(final ‖ lens) and the loss, nats, and how often the top tokens agree.

    KL(p ‖ q) = (Σ p·l_p − lse_p) − (Σ p·l_q − lse_q), exact over the vocabulary, in chunks of rows.
    """
    sums = {name: torch.zeros(len(stack)).double() for name in ("kl", "loss", "agreement")}
    for start in range(0, len(final), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        logits = unembed(final[rows])
        lse, top = logits.logsumexp(-1), logits.argmax(-1)
        p = (logits - lse[:, None]).exp()
        own = torch.linalg.vecdot(p, logits) - lse
        for i, x in enumerate(stack[:, rows]):
            read = unembed(x)
            lse = read.logsumexp(-1)
            gap = own - (torch.linalg.vecdot(p, read) - lse)
            sums["kl"][i] += float(gap.clamp_min(0).sum())  # below 0 by rounding only
            sums["agreement"][i] += float((read.argmax(-1) == top).sum())
            if following is not None:
                at = read.gather(-1, following[rows, None].to(read.device))[:, 0]
                sums["loss"][i] += float((lse - at).sum())
    return {name: value / len(final) for name, value in sums.items()}


def choosing_kl(
    inputs: Inputs, unembed: Unembedding, maps: Mapping[str, Tensor], choose: Mapping[str, Rows],
    only: Sequence[int],
) -> Float[Tensor, "n_layers units"]:  # fmt: skip
    """Exact KL of every unit on the rows to choose on, kinds of text counting the same; NaN elsewhere."""
    found = torch.full((len(inputs.layers), inputs.units), math.nan).double()
    if only:
        by_kind = []
        for rows in choose.values():
            read = torch.cat([inputs.translated(maps, place, rows.x[place]) for place in only])
            by_kind.append(judged(unembed, read, rows.final)["kl"])
        found[list(only)] = torch.stack(by_kind).mean(0).unflatten(0, (len(only), inputs.units))
    return found
