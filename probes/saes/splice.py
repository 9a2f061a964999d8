"""A model run with an SAE in place of an activation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from interp.models.model import Model
from interp.run.edits import Edit, Positions, Seen
from probes.saes.model import SAE

Latents = Float[Tensor, "batch pos d_sae"]


def splice(
    sae: SAE,
    model: Model,
    *,
    change: Callable[[Latents, Seen], Latents] | None = None,
    keep_error: bool = False,
    positions: Positions = None,
) -> Edit:
    """An edit that puts the SAE's reconstruction, of latents after `change`, in the activation's place.

        x ← f' W_dec + b_dec (+ x − x̂ with keep_error),   f' = change(f)

    With the error kept and no change the model is as it was; what a change of latents then does is
    theirs alone, not the reconstruction's.

    Args:
        change: new latents [batch pos d_sae] for f; none: f itself.
        keep_error: add what the SAE does not reconstruct.
        positions: as in `Edit.apply`; elsewhere the activation stays.

    Raises:
        BadInput: the SAE is of another model or site.

    >>> from probes.saes.model import SAEConfig
    >>> model, ids = tiny_model(), torch.tensor([[5, 6, 7]])
    >>> sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="z.1", heads=4))
    >>> same = model.run(ids, edits=[splice(sae, model, keep_error=True)]).logits
    >>> float((same - model.run(ids).logits).abs().max()) < 1e-5
    True
    """
    site = sae.site(model)

    def edit(x: Tensor, seen: Seen) -> Tensor:
        here = x if site.head is None else x[:, :, site.head]
        rows = here.flatten(2).to(sae.encoder)
        f = sae.encode(rows)
        made = sae.decode(f if change is None else change(f, seen))
        if keep_error:
            made = made + (rows - sae.decode(f))
        made = made.to(x).reshape(here.shape)
        # An edit of one head's site is given all heads, and what it gives back for others is left.
        return made if site.head is None else made[:, :, None].expand_as(x)

    return Edit.apply(site, edit, positions=positions)


def lead_spared(mask: Tensor | None, lead: int, shape: torch.Size) -> Tensor:
    """Every real position [batch pos] but the lead tokens, of which stores have no rows either."""
    keep = torch.ones(shape, dtype=torch.bool) if mask is None else mask.clone()
    keep[:, :lead] = False
    return keep
