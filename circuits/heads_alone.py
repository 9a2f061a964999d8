"""Whether q, k and v are all through which a layer's heads read the residual stream.

An edge, or a path, is a way of the stream into one head's q, k or v. Where the keys that a query may see
are picked from the stream besides (an indexer, as in DeepSeek-V3.2), there is a reader that is no node: a
head with its q, k and v held is then not held, and what an edge carries is not told apart.
"""

from __future__ import annotations

import torch

from interp.data.pairs import Pairs
from interp.errors import Refused
from interp.models.model import Model
from interp.models.verify import relative_error, relative_tolerance
from interp.run.edits import Edit

HELD = ("q", "k", "v")
ROWS = 4
"""Prompts of a task that are tried."""


@torch.no_grad()
def require_heads_alone(model: Model, what: str, pairs: Pairs | None = None) -> None:
    """Refused where heads write something else once the stream is another and their q, k and v are not.

    Tried on a probe: every block reads the stream of its positions in reverse order, with the q, k and v of
    the right order. An indexer that picks more keys than the probe has picks all of them: it is seen once
    the prompts are longer, so that with `pairs` the first few of these are tried, where they are longer.

    >>> require_heads_alone(tiny_model(), "paths between heads")
    """
    batch = model.probed
    if pairs is not None:
        if pairs.length <= batch.ids.shape[1]:
            return
        batch = model.as_batch(pairs.clean[:ROWS])
    clean = model.run(batch, capture=[*HELD, "z", "resid_pre"], logits=False).cache
    layers = clean.layers("z")
    edits = [Edit.patch(f"{kind}.{n}", clean[f"{kind}.{n}"]) for n in layers for kind in HELD]
    edits += [Edit.patch(f"resid_pre.{n}", clean[f"resid_pre.{n}"].flip(1)) for n in layers]
    turned = model.run(batch, capture=["z"], edits=edits, logits=False).cache
    allowed = relative_tolerance(model.dtype)
    for layer in layers:
        if relative_error(turned[f"z.{layer}"], clean[f"z.{layer}"])[0] > allowed:
            raise Refused(
                f"attention of layer {layer} of {model.id} depends on the residual stream by more than its "
                f"q, k and v (as where an indexer picks keys), on prompts of {batch.ids.shape[1]} tokens: "
                f"{what} are not defined there; activation patching still works"
            )
