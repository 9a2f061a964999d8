"""Whether q, k and v are all through which a layer's heads read the residual stream.

An edge, or a path, is a way of the stream into one head's q, k or v. Where the keys that a query may see
are picked from the stream besides (an indexer, as in DeepSeek-V3.2), there is a reader that is no node: a
head with its q, k and v held is then not held, and what an edge carries is not told apart.
"""

from __future__ import annotations

import torch

from interp.errors import Refused
from interp.models.model import Model
from interp.models.probe import probe_batch
from interp.models.verify import relative_error, relative_tolerance
from interp.run.edits import Edit

HELD = ("q", "k", "v")


@torch.no_grad()
def require_heads_alone(model: Model, what: str) -> None:
    """Refused where heads write something else once the stream is another and their q, k and v are not.

    Tried on a probe: every block reads the stream of its positions in reverse order, with the q, k and v of
    the right order.

    >>> require_heads_alone(tiny_model(), "paths between heads")
    """
    batch = probe_batch(model.module).to(model.device)
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
                f"q, k and v (as where an indexer picks keys): {what} are not defined there; activation "
                "patching still works"
            )
