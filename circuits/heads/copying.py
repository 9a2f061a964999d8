"""Copying heads by their weights: attending to a token raises that token's own logit.

Three scores of the same circuit W_OV between effective embeddings and the unembedding (see
`circuits.heads.own_token`): the z-score of the own token's logit, which discriminates and gives the
label; the rank of that logit; and the positivity of the circuit's eigenvalues, which does not
discriminate well enough for one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.heads.detector import Detector, PerPrompt, head_table
from circuits.heads.own_token import (
    TokenVectors,
    Unembedded,
    another,
    head_circuits,
    own_token,
    seen_by,
    token_samples,
    token_vectors,
    unread,
)
from interp.errors import Refused
from interp.models.model import Model

RANK_ROWS, RANK_TOKENS = 8, 4
"""Ranks need every logit of every head: samples, and tokens in each."""
EIGEN_ROWS, EIGEN_TOKENS = 4, 1024
"""Samples of the vocabulary over which W_OV is summed, and tokens in each."""


COPYING = Detector(
    name="copying",
    title="Copying",
    letter="O",
    description="By weights alone: z-score, over the vocabulary, of the attended token's own logit after "
    "effective embedding, W_OV and W_U (norms folded). Mean over ordinary tokens of the vocabulary; "
    "capitalised words score highest. It does not show that the head attends to what it could copy, nor "
    "copying through later layers.",
    source="OV circuits: Elhage et al. 2021; copying heads: Wang et al. 2022, Olsson et al. 2022. z-score "
    "over the vocabulary in place of their ratios: ours",
    reads=None,
    observe=own_token,
    notes=unread,
    null="the logit of another token of the same sample",
    threshold=3.0,
    margin=2.0,
    rank=14,
    unit="standard deviations over the vocabulary",
)


@torch.no_grad()
def own_token_rank(
    model: Model, samples: Int[Tensor, "n size"]
) -> tuple[Float[Tensor, "n n_layers n_heads"], Float[Tensor, "n n_layers n_heads"]]:
    """Geometric mean, over each sample, of the own token's rank among a head's logits; and another's.

    Rank 1 is the token that attending to t raises most, d_vocab the one it lowers most.

    >>> own, other = own_token_rank(tiny_model(), torch.arange(6).view(2, 3))
    >>> bool((own >= 1).all() and (own <= 97).all())
    True
    """
    ids = samples.flatten().to(model.device)
    stream, unembedded = token_vectors(model, ids), Unembedded(model)
    directions = unembedded.directions(torch.arange(model.W_U.shape[1]))
    targets = samples.to(ids), samples.roll(-1, dims=1).to(ids)
    out = torch.full((2, len(samples), model.n_layers, model.spec.n_heads), torch.nan)
    for layer, v, W_O in head_circuits(model, stream):
        logits = torch.einsum("nhd,hdm->nhm", v, W_O) @ directions.T
        for which, target in enumerate(targets):
            index = target.flatten()[:, None, None].expand(-1, logits.shape[1], 1)
            mine = logits.gather(-1, index)
            # Ties count half, so that a head that writes nothing is in the middle.
            ties = (logits == mine).sum(-1) - 1
            rank = 1 + (logits > mine).sum(-1) + ties / 2
            rank = rank.log().unflatten(0, samples.shape).mean(1).exp()
            out[which, :, layer, : rank.shape[1]] = rank.cpu()
    return out[0], out[1]


def _rank(model: Model, n: int, seed: int) -> tuple[PerPrompt, PerPrompt]:
    return own_token_rank(model, token_samples(model, min(n, RANK_ROWS), seed, RANK_TOKENS))


RANK = Detector(
    name="copying_rank",
    title="Copying, rank",
    letter="O",
    description="Geometric mean of the attended token's rank among all logits that the head writes for it "
    "by weights alone: 1 is the most raised, d_vocab the most lowered.",
    source="copy score of Wang et al. 2022, appendix (there: among the first five); ours is the rank itself",
    reads=None,
    observe=seen_by(_rank),
    notes=unread,
    null="the rank of another token of the same sample",
    threshold=None,
    margin=0.0,
    side=-1,
    rank=24,
    unit="rank",
    slow=True,
)


@torch.no_grad()
def eigenvalue_positivity(
    model: Model, samples: Int[Tensor, "n size"]
) -> dict[str, Float[Tensor, "n n_layers n_heads"]]:
    """Σ Re λ / Σ |λ| of each head's token-to-logit circuit, from each sample of the vocabulary.

    The nonzero eigenvalues of E W_V W_O W_U [d_vocab d_vocab] are those of W_O (W_U E) W_V
    [d_head d_head]; W_U E is summed over the sample's tokens. Norms are folded, each token's scale too.

    Returns: "score" with W_U as it is; "centred" with its mean over the vocabulary taken out, which
        changes no probability; "null", as the score, each token's unembedding that of another token.

    What it does not show: copying of any one token. On the default model the two versions correlate at
    0.6 over heads; what is common to all tokens is a large part of the first.

    >>> eigenvalue_positivity(tiny_model(), torch.arange(80).view(2, 40))["score"].shape
    torch.Size([2, 2, 4])
    """
    ids = samples.flatten().to(model.device)
    # Every layer reads the effective embedding here, layer 0 too: as in the published circuits.
    effective, unembedded = token_vectors(model, ids).effective, Unembedded(model)
    centred = unembedded.directions(ids)
    whole = centred + unembedded.of_mean
    sides = {"score": whole, "centred": centred, "null": another(whole, samples)}
    shape = (len(samples), model.n_layers, model.spec.n_heads)
    out = {name: torch.full(shape, torch.nan) for name in sides}
    for layer, v, W_O in head_circuits(model, TokenVectors(effective, effective)):
        v = v.unflatten(0, samples.shape)
        for name, directions in sides.items():
            raised = torch.einsum("nm,hdm->nhd", directions, W_O).unflatten(0, samples.shape)
            core = torch.einsum("sthd,sthe->shde", raised, v)
            values = torch.linalg.eigvals(core.cpu())  # MPS has none
            total = values.abs().sum(-1)
            share = torch.where(total > 0, values.real.sum(-1) / total.clamp_min(1e-30), 0.0)
            out[name][:, layer, : share.shape[1]] = share
    return out


def _eigenvalues(model: Model, n: int, seed: int) -> dict[str, np.ndarray]:
    samples = token_samples(model, min(n, EIGEN_ROWS), seed, EIGEN_TOKENS)
    try:
        found = eigenvalue_positivity(model, samples)
    except Refused:
        shape = (len(samples), model.n_layers, model.spec.n_heads)
        found = dict.fromkeys(("score", "centred", "null"), torch.full(shape, torch.nan))
    return {name: value.clone().numpy() for name, value in found.items()}


def _eigenvalue_table(seen: Mapping[str, np.ndarray]) -> dict[str, pd.DataFrame]:
    """Positivity with W_U as it is and centred, one row a head."""
    whole, centred = (seen[name].mean(0) for name in ("score", "centred"))
    return {"ov_eigenvalues": head_table(positivity=whole, centred=centred)}


EIGENVALUES = Detector(
    name="copying_eigenvalues",
    title="OV eigenvalues",
    letter="O",
    description="Σ Re λ / Σ |λ| of the head's token-to-logit circuit: 1 where it raises what it reads along "
    "every direction, -1 where it lowers it. A score, not a label: copying heads are high, and so are others "
    "that raise no token's own logit much (with plain embeddings many more). The table ov_eigenvalues has it "
    "with the vocabulary's mean logit taken out too, which changes no probability but most of the scores.",
    source="Elhage et al. 2021, §Summarizing OV/QK matrices (eigenvalue positivity), with effective embeddings",
    reads=None,
    observe=_eigenvalues,
    tables=_eigenvalue_table,
    notes=unread,
    null="the same with each token's unembedding that of another token",
    threshold=None,
    margin=0.0,
    rank=25,
    unit="share",
    slow=True,
)
