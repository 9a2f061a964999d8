"""What every active feature of attention outputs adds directly to a logit, by head."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.direction import logit_direction, places_of, token_ids
from interp.models.model import Model
from probes.saes.attention import Prompt, attention_of, before_norm, rows_of_heads, write_sites
from probes.saes.model import SAE
from probes.saes.sparse import Codes


@dataclass(frozen=True, eq=False)
class FeatureContributions:
    """What every active feature adds to a logit (or difference), by head; all in logits.

    Attributes:
        heads: z_h · W_O^h d, each head's direct attribution.
        features: of each entry of `codes` (active latents by prompt), its part in each head.
        error: of what the SAE does not reconstruct. bias: of b_dec. With the features of their
            prompt they sum to `heads`.
        positions: the read position of each prompt. answers, instead: token ids.
    """

    codes: Codes
    features: Float[Tensor, "n head"]
    error: Float[Tensor, "batch head"]
    bias: Float[Tensor, "batch head"]
    heads: Float[Tensor, "batch head"]
    positions: Int[Tensor, " batch"]
    answers: Int[Tensor, " batch"]
    instead: Int[Tensor, " batch"] | None

    @property
    def total(self) -> Float[Tensor, "batch head"]:
        """Features, error and bias of each prompt: `heads` to rounding."""
        summed = self.error + self.bias
        return summed.index_add(0, self.codes.row, self.features)

    def table(self) -> pd.DataFrame:
        """One row for each (prompt, part): prompt, part ("feature", "error", "bias"), feature,
        activation, contribution (logits, over all heads), strongest features first."""
        codes = self.codes
        active = pd.DataFrame(
            {
                "prompt": codes.row.cpu().numpy(),
                "part": "feature",
                "feature": codes.latent.cpu().numpy(),
                "activation": codes.value.cpu().numpy(),
                "contribution": self.features.sum(1).cpu().numpy(),
            }
        )
        active = active.sort_values("contribution", key=abs, ascending=False, kind="stable")
        rest = [
            pd.DataFrame(
                {
                    "prompt": range(len(values)),
                    "part": part,
                    "contribution": values.sum(1).cpu().numpy(),
                }
            )
            for part, values in (("error", self.error), ("bias", self.bias))
        ]
        table = pd.concat([active, *rest], ignore_index=True)
        return table.sort_values("prompt", kind="stable", ignore_index=True)


@torch.no_grad()
def feature_contributions(
    model: Model,
    sae: SAE,
    prompt: Prompt,
    *,
    answer: str | int | Tensor | None = None,
    instead: str | int | Tensor | None = None,
    position: int = -1,
) -> FeatureContributions:
    """What each feature, the SAE's error and its bias add directly to a logit: together, the heads' part.

        z_h · g_h = Σ_i f_i W_dec[i, h] · g_h + (z − ẑ)_h · g_h + b_dec[h] · g_h,   g_h = W_O^h d

    d is the logit's direction at the final residual, with the final norm's scale (and that of a norm
    behind attention) held fixed. What b_O adds is no feature's and is left out. Direct effects only:
    what later heads and MLPs do with a feature is not in it.

    Args:
        prompt: text or texts, token ids, or a Batch.
        answer: the explained token: text, an id, or one id a prompt [batch]; by default the model's
            own top token. instead: explain the difference answer − instead.
        position: whose logits; negative from the end of the real tokens. The features are read there.

    Raises:
        BadInput: an SAE of another site than z, a token that is not one, a position not in the prompt.
        Refused: the writes or the unembedding of this model were not verified.

    Source: Kissane et al. 2024; Elhage et al. 2021 for direct logit attribution.

    >>> from probes.saes.model import SAEConfig
    >>> sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="z.1", heads=4))
    >>> found = feature_contributions(tiny_model(), sae, torch.tensor([[5, 6, 7]]), answer=3)
    >>> torch.allclose(found.total, found.heads, atol=1e-5), len(found.table())
    (True, 6)
    """
    layer, heads = attention_of(sae, model)
    batch = model.as_batch(prompt)
    places = places_of(batch, position)
    last = f"resid_post.{model.n_layers - 1}"
    sites = [f"z.{layer}", last, *write_sites(model, layer)]
    cache = model.run(batch, capture=sites, logits=False).cache
    rows = torch.arange(batch.size)
    final = cache[last][rows, places]
    wanted, other = (token_ids(model, token, batch.size) for token in (answer, instead))
    if wanted is None:
        wanted = model.unembed(final).argmax(-1).cpu()
    _ = model.W_U  # Refused where the unembedding was not verified
    d = logit_direction(model, final, wanted, other).vector
    d = before_norm(model, cache, layer, d, (rows, places))
    g = torch.einsum("bm,hdm->bhd", d, model.W_O(layer)[list(heads)].float()).to(sae.encoder)
    z = rows_of_heads(cache, layer, heads)[rows, places].to(sae.encoder)
    codes = sae.codes(z)

    def through(x: Tensor, g: Tensor) -> Tensor:
        return (x.unflatten(-1, (len(heads), -1)) * g).sum(-1)

    decoded = codes.value[:, None] * sae.W_dec[codes.latent]
    return FeatureContributions(
        codes=codes,
        features=through(decoded, g[codes.row]),
        error=through(z - sae.decode(codes), g),
        bias=through(sae.b_dec.expand_as(z), g),
        heads=through(z, g),
        positions=places,
        answers=wanted,
        instead=other,
    )
