"""What heads' weights say without any prompt: OV circuits read as words."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import Refused
from interp.models.model import Model


@dataclass(frozen=True)
class Directions:
    """Strongest directions of W_OV: what a head reads and, for each, what it writes.

    reads, writes: [n_heads k d_model], unit vectors; strength: singular values [n_heads k].
    """

    reads: Float[Tensor, "n_heads k d_model"]
    writes: Float[Tensor, "n_heads k d_model"]
    strength: Float[Tensor, "n_heads k"]


@torch.no_grad()
def ov_directions(model: Model, layer: int, k: int = 3) -> Directions:
    """Top singular directions of W_OV = W_V W_O of every head of a layer.

    W_OV has rank d_head, so the decomposition is of a d_head × d_head core: QR of both factors, SVD of
    what is between. The input norm's gain is folded into W_V.

    Source: Elhage et al. 2021, §OV circuits; Millidge & Black 2022 (SVD of W_OV read as words).
    """
    block = model.spec.blocks[layer]
    W_V = model.W_V(layer).float()[
        [model.spec.kv_group(layer, head) for head in range(block.n_heads)]
    ]
    W_O = model.W_O(layer).float()
    left, core_in = torch.linalg.qr(W_V)
    right, core_out = torch.linalg.qr(W_O.transpose(-1, -2))
    U, S, Vh = torch.linalg.svd(core_in @ core_out.transpose(-1, -2))
    reads = (left @ U[..., :k]).transpose(-1, -2)
    writes = (right @ Vh[..., :k, :].transpose(-1, -2)).transpose(-1, -2)
    return Directions(reads, writes, S[..., :k])


@torch.no_grad()
def ov_tokens(model: Model, k: int = 3, n_tokens: int = 5) -> pd.DataFrame:
    """Tokens each head's OV circuit reads and writes most, along its top singular directions.

    A direction's "reads" are the tokens whose embedding lies most along it (cosine), its "writes" the
    tokens whose centred logit it raises most (logits per unit of direction, final norm's gain folded
    in). The sign of a singular pair is free; the one whose reads are stronger is shown. Token
    embeddings are only what the residual stream starts from: at later layers heads read other things.

    Returns: one row for each (layer, head, direction, side, rank): token, score, strength.
    """
    W_E = model.W_E.float()
    W_E = W_E / W_E.norm(dim=1, keepdim=True).clamp_min(1e-6)
    gain = model.final_norm.gain.to(W_E.device).float()
    W_U = gain[:, None] * model.W_U.float()
    W_U = W_U - W_U.mean(dim=1, keepdim=True)
    rows: list[pd.DataFrame] = []
    for layer in model.spec.attention_layers:
        try:
            found = ov_directions(model, layer, k)
        except Refused:
            continue
        n_heads, k_found, _ = found.reads.shape
        reads = found.reads.flatten(0, 1) @ W_E.T
        sign = torch.where(reads.amax(1) >= -reads.amin(1), 1.0, -1.0)[:, None]
        writes = (sign * found.writes.flatten(0, 1)) @ W_U
        for side, scores in (("reads", sign * reads), ("writes", writes)):
            top = scores.topk(n_tokens, dim=1)
            count = n_heads * k_found * n_tokens
            place = torch.arange(count)
            rows.append(
                pd.DataFrame(
                    {
                        "layer": layer,
                        "head": (place // (k_found * n_tokens)).numpy(),
                        "direction": (place // n_tokens % k_found).numpy(),
                        "side": side,
                        "rank": (place % n_tokens).numpy(),
                        "token": model.tokens(top.indices.flatten().tolist()),
                        "score": top.values.flatten().cpu().numpy(),
                        "strength": found.strength.flatten()
                        .repeat_interleave(n_tokens)
                        .cpu()
                        .numpy(),
                    }
                )
            )
    columns = ["layer", "head", "direction", "side", "rank", "token", "score", "strength"]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=columns)
