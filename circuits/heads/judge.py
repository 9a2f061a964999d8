"""By what an ablation is judged: a loss in nats that this kind of model has.

A decoder predicts the next token, an encoder with a masked-language-model head predicts masked ones, a
classifier of images gives probabilities of classes. What has neither has no effect to report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.data.images import Images
from interp.data.prompts import Prompts
from interp.metrics import kl, loss
from interp.models.model import Model
from interp.run.batch import Batch

MASKED = 0.15
"""Share of positions that are masked, as BERT was trained."""


@dataclass(frozen=True)
class Judge:
    """What is run, which logits are looked at, and the number that comes of them.

    Attributes:
        name: of the prompt set. title: of the number, as reports say it.
        read: positions whose logits are wanted; True for all there are.
        score: logits -> one number a prompt, in nats; larger is worse.
    """

    name: str
    title: str
    batch: Batch
    read: Int[Tensor, " m"] | bool
    score: Callable[[Tensor], Float[Tensor, " n"]]

    def __len__(self) -> int:
        return self.batch.size


def judge_of(model: Model, prompts: Prompts | Images, seed: int = 0) -> Judge | None:
    """The judge that fits the model; None where it has no such loss.

    - Reads left to right, with a language-model head: loss of the next token on `prompts.judged`.
    - Reads both ways, with a head, its tokenizer has a mask token: loss of the hidden token where 15 % of
      the positions (of the second copy, where tokens repeat) are masked, the same in every row.
    - Images, logits of at least two classes: KL(clean ‖ ablated) of the classes' probabilities.

    >>> from interp.data.prompts import repeated_tokens
    >>> judge_of(tiny_model(), repeated_tokens(tiny_model(), 2)[0]).title
    'loss on the second half of repeated sequences'
    """
    if isinstance(prompts, Images):
        return _classes(model, prompts)
    if model.spec.d_vocab is None:
        return None
    if model.spec.causal:
        return _next_token(prompts) if model.spec.unembedding is not None else None
    mask = getattr(model.tokenizer, "mask_token_id", None)
    if mask is None or not (model.spec.unembedding or model.spec.readout):
        return None
    return _masked_token(prompts, mask, seed)


def _next_token(prompts: Prompts) -> Judge:
    read = prompts.judged
    targets = prompts.ids[:, read + 1]
    what = "the second half of repeated sequences" if prompts.period else "prose"
    score = _loss_of(targets)
    return Judge(prompts.name, f"loss on {what}", prompts.batch, read, score)


def _masked_token(prompts: Prompts, mask: int, seed: int) -> Judge:
    where = prompts.second_half if prompts.period else prompts.content
    at = where.all(0).nonzero()[:, 0]
    order = torch.randperm(len(at), generator=torch.Generator().manual_seed(seed))
    read = at[order[: max(1, round(MASKED * len(at)))].sort().values]
    ids = prompts.ids.clone()
    ids[:, read] = mask
    what = "the second half of repeated sequences" if prompts.period else "prose"
    batch = replace(prompts, ids=ids).batch
    title = f"loss on masked tokens of {what}"
    return Judge(prompts.name, title, batch, read, _loss_of(prompts.ids[:, read]))


def _classes(model: Model, images: Images) -> Judge | None:
    clean = model.run(images.batch).logits
    if clean is None or clean.ndim != 2 or clean.shape[1] < 2:
        return None
    title = "change of class probabilities, KL(clean ‖ ablated)"
    return Judge(images.name, title, images.batch, True, lambda logits: kl(clean, logits))


def _loss_of(targets: Int[Tensor, "n m"]) -> Callable[[Tensor], Float[Tensor, " n"]]:
    return lambda logits: loss(logits, targets)
