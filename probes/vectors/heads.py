"""What heads carry of a task: their mean outputs at the last token, what these write, and what they bring back.

Causal mediation: on prompts whose examples have their answers mixed up, one head's output at the last token is
replaced by its mean over prompts with the right answers; how far the right answer comes back is its effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import BadInput, Refused
from interp.last_token import replay_last
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.edits import Edit
from probes.vectors.answers import chunks
from probes.vectors.in_context import Asked

SITE = "resid_post"
"""Where vectors are added: the output of a block."""


@torch.no_grad()
def last_means(
    model: Model, batch: Batch, names: Sequence[str] = ("z", SITE)
) -> dict[str, dict[int, Float[Tensor, "..."]]]:
    """Mean over prompts of sites at the last token: by name, then by layer.

    [n_heads d_head] of z, [d_model] of resid_post, in float32.

    >>> found = last_means(tiny_model(), tiny_model().as_batch(torch.tensor([[5, 6, 7]])))
    >>> sorted(found), found["z"][1].shape
    (['resid_post', 'z'], torch.Size([4, 8]))
    """
    total: dict[str, dict[int, Tensor]] = {name: {} for name in names}
    for rows in chunks(batch):
        run = model.run(batch.rows(rows), capture=names, logits=False)
        for name in names:
            for layer, value in run.cache.by_layer(name).items():
                part = value[:, -1].float().sum(0) / batch.size
                total[name][layer] = total[name].get(layer, 0) + part
    return total


def indirect_effects(
    model: Model,
    asked: Asked,
    means: Mapping[int, Float[Tensor, "n_heads d_head"]],
    *,
    progress: Any = None,
) -> Float[np.ndarray, "prompts n_layers n_heads"]:
    """Rise of the answer's probability when one head's last output is replaced by its mean.

        IE(l, h) = p(answer | z_lh ← mean z_lh) − p(answer)

    on prompts that do not tell the task (`WordTask.in_context(..., shuffled=True)`). A head can carry
    the task together with others and have no effect alone; effects at earlier tokens are not asked for.

    Args:
        asked: prompts, and the token whose probability is meant. means: of z by layer.

    Returns: probabilities' differences, NaN where a layer has no such head.

    Source: Todd et al. 2024, arXiv 2310.15213, section 2.3.
    """
    places = [(layer, head) for layer in sorted(means) for head in range(len(means[layer]))]
    variants: list[list[Edit]] = [[]]
    variants += [[Edit.patch("z", dict(means), heads=[place])] for place in places]
    answers = asked.answers[:, None]
    found = replay_last(
        model,
        asked.batch,
        variants,
        lambda logits: logits.float().softmax(-1).gather(-1, answers)[:, 0].cpu().numpy(),
        progress=progress,
    )
    widest = max(len(value) for value in means.values())
    effects = np.full((asked.batch.size, model.n_layers, widest), np.nan)
    for (layer, head), value in zip(places, found[1:], strict=True):
        effects[:, layer, head] = value - found[0]
    return effects


def head_writes(
    model: Model, means: Mapping[int, Float[Tensor, "n_heads d_head"]]
) -> dict[int, Float[Tensor, "n_heads d_model"]]:
    """What each head's mean output writes into the residual stream, by layer: z̄ W_O.

    Raises:
        Refused: a model that normalises after attention: what one head writes is then not its own.
    """
    check_writes(model, means)
    writes = {}
    for layer, z in means.items():
        W_O, write = model.W_O(layer).float(), model.spec.blocks[layer].attn_write
        assert write is not None
        writes[layer] = torch.einsum("hd,hdm->hm", z.to(W_O), W_O) * write.scale
    return writes


def check_writes(model: Model, layers: Iterable[int]) -> None:
    """Refused where one head's write in these layers is not its own."""
    for layer in layers:
        block = model.spec.blocks[layer]
        if not block.direct or block.attn_write is None:
            raise Refused(
                f"layer {layer} of {model.id} does not write W_O's output as it is (a norm stands "
                "between): the heads' writes do not add up; indirect effects still work"
            )


def function_vector(
    model: Model,
    means: Mapping[int, Float[Tensor, "n_heads d_head"]],
    heads: Sequence[tuple[int, int]],
) -> Float[Tensor, " d_model"]:
    """The sum of what these heads write on average: Σ z̄_lh W_O,lh.

    Args:
        means: of z at the last token of in-context prompts, by layer. heads: (layer, head).

    Source: Todd et al. 2024, arXiv 2310.15213, equation 5.

    >>> model = tiny_model()
    >>> means = last_means(model, model.as_batch(torch.tensor([[5, 6, 7]])))["z"]
    >>> function_vector(model, means, [(0, 1), (1, 2)]).shape
    torch.Size([32])
    """
    if not heads:
        raise BadInput("a function vector needs at least one head")
    for layer, head in heads:
        if layer not in means or not 0 <= head < len(means[layer]):
            raise BadInput(f"no head {layer}.{head} in {model.id}")
    writes = head_writes(model, {layer: means[layer] for layer, _ in heads})
    return torch.stack([writes[layer][head] for layer, head in heads]).sum(0)


def best_heads(effects: Float[np.ndarray, "n_layers n_heads"], n: int) -> list[tuple[int, int]]:
    """The `n` heads with the largest effect, the largest first."""
    known = np.argwhere(~np.isnan(effects))
    order = sorted(known.tolist(), key=lambda place: -effects[place[0], place[1]])
    return [(layer, head) for layer, head in order[:n]]
