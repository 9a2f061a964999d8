"""Text that a model goes on with while edits are applied: the model's own generation, under our hooks.

With a KV cache every token is read once, so the activations of the prompt are seen in the first forward
and those of each new token in a forward of its own. An edit written for whole prompts is therefore told
which positions it is looking at. Keys and values are the exception: they enter the cache as the model made
them, and are edited anew, all of them, whenever they are attended to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from interp.errors import BadInput, Refused, unknown
from interp.models.calls import is_encoder_decoder
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.edits import Edit, Seen
from interp.sites import by_query

DURING = {
    "all": "at the prompt's positions and at those of every new token",
    "prompt": "at the prompt's positions only",
    "new": "at the positions of new tokens only; the first new token is then chosen unedited",
}
"""Where edits act, by name."""

NOTHING = -1
"""Fills rows of new tokens after their end."""


@dataclass(frozen=True)
class Generated:
    """What was read and what was written.

    Attributes:
        prompt: the prompts, padded on the left.
        ids: new tokens [batch new], the end token included; -1 after the end.
        texts: each row's new text, up to a `stop` where there was one; without a tokenizer the ids.
    """

    prompt: Batch
    ids: Int[Tensor, "batch new"]
    texts: tuple[str, ...]


def generate(
    model: Model,
    prompts: Batch | Tensor | str | Sequence[str] | Mapping[str, Tensor],
    *,
    edits: Sequence[Edit] = (),
    during: str = "all",
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Generated:
    """New tokens after each prompt, with edits applied to what the model computes on the way.

    The model generates as it always does (its cache, its end tokens, its generation config but for
    sampling); without edits the tokens are those of `model.module.generate`. With edits they are those
    of running the growing text anew for every token, where an edit's values do not depend on which
    positions are seen together (a mean over positions does).

    Args:
        prompts: texts, token ids [batch pos], or a Batch; padding must be on the left.
        edits: as for `model.run`. Positions named by an edit are those of the (padded) prompt, and
            such an edit acts on these alone.
        during: "all", "prompt" or "new": where the other edits act.
        max_new_tokens: at most so many tokens a prompt.
        temperature: 0 takes the most likely token; above, tokens are drawn from softmax(logits / temperature).
        seed: of the draws. stop: texts that end a row where they appear in its new text.

    Returns: Generated: ids [batch new] and texts.

    Raises:
        BadInput: padding on the right, no room for new tokens, an option out of range, an edit of named
            positions with during="new". Refused: a model that does not generate.

    >>> out = generate(tiny_model(), torch.tensor([[5, 6, 7]]), max_new_tokens=4)
    >>> out.ids.shape
    torch.Size([1, 4])
    """
    batch = _checked(model, prompts, during, max_new_tokens, temperature, stop)
    reading = _Reading(batch.ids.shape[1], batch.mask)
    followed = [_followed(edit, reading, during) for edit in edits]
    options: dict[str, Any] = {"do_sample": temperature > 0, "top_k": None, "top_p": None}
    # Set to None so that a config made for sampling is not warned about when nothing is drawn.
    options["temperature"] = float(temperature) if temperature > 0 else None
    if temperature > 0:
        options |= {"top_k": 0, "top_p": 1.0}
    if stop:
        options["stopping_criteria"] = [_Stop(model, batch.ids.shape[1], tuple(stop))]
    ends = _end_tokens(model)
    with ExitStack() as stack:
        stack.enter_context(
            torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else [])
        )
        torch.manual_seed(seed)
        hook = model.module.register_forward_pre_hook(reading.follow, with_kwargs=True)
        stack.callback(hook.remove)
        if followed:
            stack.enter_context(model.hooked(batch, edits=followed))
        module: Any = model.module
        whole = module.generate(
            batch.ids,
            attention_mask=None if batch.mask is None else batch.mask.long(),
            max_new_tokens=max_new_tokens,
            pad_token_id=ends[0] if ends else 0,
            use_cache=True,
            return_dict_in_generate=False,
            **options,
        )
    new = whole[:, batch.ids.shape[1] :].clone()
    over = torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device)).int()
    new[over.cumsum(1) - over > 0] = NOTHING
    texts = []
    for row, ids in enumerate(new):
        text, length = _until(model, ids[ids != NOTHING].tolist(), stop)
        new[row, length:] = NOTHING
        texts.append(text)
    longest = int((new != NOTHING).sum(1).max())
    return Generated(batch, new[:, :longest], tuple(texts))


def _checked(
    model: Model, prompts: Any, during: str, max_new_tokens: int, temperature: float, stop: Any
) -> Batch:
    """The prompts as a left-padded batch, once everything asked for can be done."""
    if during not in DURING:
        raise unknown("choice of during", during, DURING)
    if max_new_tokens < 1:
        raise BadInput(f"max_new_tokens={max_new_tokens}: wanted 1 or more")
    if temperature < 0:
        raise BadInput(f"temperature={temperature}: wanted 0 (the most likely token) or more")
    if isinstance(stop, str) or not all(stop):
        raise BadInput(f"stop={stop!r}: wanted a list of texts, none of them empty")
    if stop and model.tokenizer is None:
        raise BadInput(f"{model.id} was loaded without a tokenizer: leave out stop={list(stop)}")
    can = getattr(model.module, "can_generate", None)
    if can is None or not can():
        raise Refused(
            f"{model.id} does not generate: it is no causal language model; model.run still works"
        )
    if model.spec.named:
        raise Refused(
            f"{model.id} is one stack of several: edits are followed where the model's own stack reads its prompt and "
            "goes on with it; model.run works"
        )
    if is_encoder_decoder(model.module):
        raise Refused(
            f"{model.id} is an encoder-decoder: edits are followed where a model goes on with its prompt "
            "only; model.run reads a source and what the decoder has written"
        )
    if isinstance(prompts, str) or (
        isinstance(prompts, Sequence) and not isinstance(prompts, (Batch, Tensor))
    ):
        prompts = model.tokenize(prompts, padding_side="left")
    batch = model.as_batch(prompts)
    if batch.mask is not None and not bool(batch.mask[:, -1].all()):
        raise BadInput(
            "prompts are padded on the right: new tokens would follow the padding; tokenize them "
            'with padding_side="left"'
        )
    n_ctx, length = model.spec.n_ctx, batch.ids.shape[1]
    if n_ctx is not None and length + max_new_tokens > n_ctx:
        raise BadInput(
            f"a prompt of {length} tokens and {max_new_tokens} new ones do not fit: {model.id} reads "
            f"at most {n_ctx} (n_ctx); max_new_tokens={max(n_ctx - length, 0)} does"
        )
    return batch


class _Reading:
    """How far the model has read: set before each forward, asked by the edits inside it."""

    def __init__(self, width: int, mask: Tensor | None):
        self.width, self.mask, self.start, self.stop = width, mask, 0, 0

    def follow(self, module: Any, args: tuple, kwargs: dict) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.start, self.stop = self.stop, self.stop + ids.shape[1]


def _followed(edit: Edit, reading: _Reading, during: str) -> Edit:
    """The same edit, for forwards that see a part of the positions."""
    if during == "new" and edit.positions is not None:
        raise BadInput(
            f"the edit of '{edit.site}' names positions of the prompt, during='new' leaves the prompt "
            "alone: use during='all' or 'prompt'"
        )
    rows = by_query(edit.site.name)
    keys = edit.site.name in ("k", "v")
    axis = 2 if rows else 1

    def change(x: Tensor, seen: Seen) -> Tensor:
        n = x.shape[axis]
        first = reading.start + seen.start if rows else reading.start
        if keys:  # all that is attended to; a sliding window has forgotten the first ones
            first = reading.stop - n
        if keys and first and edit.positions is not None:
            raise Refused(
                f"'{edit.site}' is kept for a window of {n} positions: positions of the prompt that it "
                "has left cannot be named; leave out positions"
            )
        of_prompt = min(max(reading.width - first, 0), n)
        parts = []
        if of_prompt:
            part = x.narrow(axis, 0, of_prompt)
            if during != "new":
                start = first if rows else 0
                mask = None if reading.mask is None else reading.mask
                if mask is not None and not rows:
                    mask = mask[:, first : first + of_prompt]
                part = edit(part, replace(seen, start=start, mask=mask))
            parts.append(part)
        if of_prompt < n:
            part = x.narrow(axis, of_prompt, n - of_prompt)
            if during != "prompt" and edit.positions is None:
                start = first + of_prompt if rows else 0
                part = edit(part, replace(seen, start=start, mask=None))
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)

    return Edit(edit.site, change, edit.heads)


class _Stop:
    """Whether each row's new text holds one of the texts that end it."""

    def __init__(self, model: Model, width: int, stop: tuple[str, ...]):
        self.model, self.width, self.stop = model, width, stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = self.model.tokenizer.batch_decode(input_ids[:, self.width :])
        ended = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def _until(model: Model, ids: list[int], stop: Sequence[str]) -> tuple[str, int]:
    """A row's text before the first of `stop`, and how many of its tokens that took."""
    if model.tokenizer is None:
        return " ".join(map(str, ids)), len(ids)
    text = model.tokenizer.decode(ids, skip_special_tokens=True)
    found = [place for word in stop if (place := text.find(word)) >= 0]
    if not found:
        return text, len(ids)
    for length in range(1, len(ids) + 1):
        so_far = model.tokenizer.decode(ids[:length], skip_special_tokens=True)
        if any(word in so_far for word in stop):
            return text[: min(found)], length
    return text[: min(found)], len(ids)


def _end_tokens(model: Model) -> list[int]:
    """The tokens that end a text, as the model's own generation has them."""
    ids = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    return [int(i) for i in (ids if isinstance(ids, (list, tuple)) else [ids]) if i is not None]
