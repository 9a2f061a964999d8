"""A DeiT whose first layer holds one head of every kind that image models have, weights set by hand.

The stream has a slot of one-hot ± pairs for positions (CLS, one register, the patches of a 6 × 6 grid), a
constant pair that heads without a question of their own ask with, and a few pairs for what a patch shows,
which no head reads. Heads write nothing: only where they attend is planted. The second layer does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import DeiTConfig, DeiTModel

SIDE, PATCH = 6, 4
CLS, REGISTER, FIRST_PATCH = 0, 1, 2
N_POSITIONS = FIRST_PATCH + SIDE * SIDE
CONSTANT = N_POSITIONS
SHOWN = 8
"""Pairs for what a patch shows."""
OFFSET = (1, -2)
SINK = FIRST_PATCH + 9

Links = dict[int, Iterable[int]]
"""For a query position the key positions it looks at."""


def patch(row: int, column: int) -> int:
    """Position of a patch."""
    return FIRST_PATCH + SIDE * row + column


def _around(*offsets: tuple[int, int]) -> Links:
    return {
        patch(r, c): [
            patch(r + dy, c + dx) for dy, dx in offsets if 0 <= r + dy < SIDE and 0 <= c + dx < SIDE
        ]
        for r in range(SIDE)
        for c in range(SIDE)
    }


def _all_to(*keys: int) -> Links:
    return dict.fromkeys(range(N_POSITIONS), keys)


PATCHES = range(FIRST_PATCH, N_POSITIONS)
VISION_ZOO: dict[str, Callable[[], Links]] = {
    "patch_offset": lambda: _around(OFFSET),
    "patch_window": lambda: _around(*((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))),
    "current_token": lambda: {q: [q] for q in range(N_POSITIONS)},
    "cls": lambda: _all_to(CLS),
    "register": lambda: _all_to(REGISTER),
    "patch_sink": lambda: _all_to(SINK),
    "cls_reads,register": lambda: _all_to(REGISTER) | {CLS: PATCHES},
    "broad": dict,
    "": dict,
}
"""The labels each head of layer 0 should get, in order of heads."""


def one_hot_pairs(n: int, d_model: int) -> Tensor:
    """[n d_model]: feature i as a ± pair, so that LayerNorm's mean is 0."""
    found, i = torch.zeros(n, d_model), torch.arange(n)
    found[i, 2 * i], found[i, 2 * i + 1] = 1.0, -1.0
    return found


def vision_zoo() -> DeiTModel:
    """The model, in eval mode."""
    d_head = N_POSITIONS
    d_model = d_head * len(VISION_ZOO)
    config = DeiTConfig(
        hidden_size=d_model,
        num_hidden_layers=2,
        num_attention_heads=len(VISION_ZOO),
        intermediate_size=4,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
    )
    model = DeiTModel(config).eval()
    pairs = one_hot_pairs(N_POSITIONS + 1 + SHOWN, d_model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        found = dict(model.named_parameters())
        found["embeddings.position_embeddings"].copy_(pairs[:N_POSITIONS] + pairs[CONSTANT])
        shown = torch.randn(SHOWN, 3 * PATCH**2, generator=torch.Generator().manual_seed(0))
        kernel = torch.einsum("sp,sd->dp", 0.02 * shown, pairs[CONSTANT + 1 :])
        kernel = kernel.view(d_model, 3, PATCH, PATCH)
        found["embeddings.patch_embeddings.projection.weight"].copy_(kernel)
        # LayerNorm multiplies each pair by about sqrt(d_model / 4); undone here, a match scores 40.
        scale = (40 * d_head**0.5) ** 0.5 / (2 * (d_model / 4) ** 0.5)
        for head, (name, links) in enumerate(VISION_ZOO.items()):
            q = pairs[:N_POSITIONS].clone()
            k = torch.zeros(d_head, N_POSITIONS)
            for query, keys in links().items():
                k[query, list(keys)] = 1.0
            keys = k @ pairs[:N_POSITIONS]
            if name == "broad":  # any query, even patches a little more than others
                q[:], keys[0] = 0.0, 0.05 * pairs[PATCHES[::2]].sum(0)
                q[0] = pairs[CONSTANT]
            rows = slice(head * d_head, (head + 1) * d_head)
            found["layers.0.attention.q_proj.weight"][rows] = q * scale
            found["layers.0.attention.k_proj.weight"][rows] = keys * scale
    return model
