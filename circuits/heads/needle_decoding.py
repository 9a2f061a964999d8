"""Which token every head looks at while a model answers, one row of attention a step.

The prompt is read once, with PyTorch's SDPA and a KV cache. Each decode step then has a single query,
so all that is ever formed of a pattern is one row a head and step: memory grows with the context, not
with its square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuits.heads.needle import EXTRA_STEPS, NeedleRun
from interp.errors import BadInput, Refused
from interp.models.attention import Watch, window
from interp.models.calls import parameters_of
from interp.models.model import Model

TOKENS_PER_BATCH = 2048
RECALLED = 0.5
"""A run succeeds where the answer holds more than this share of the tokens asked for (as published)."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a model answered to one run, and where each head looked at every step.

    Attributes:
        tokens: the answer; -1 after its end [step].
        top: each head's most attended key, the first token included (as published); -1 where a
            layer has no attention, and behind the answer's end [step n_layers n_heads].
        mass, mass_control: attention on the span asked for and on the control span [step n_layers n_heads].
    """

    run: NeedleRun
    tokens: np.ndarray
    top: np.ndarray
    mass: np.ndarray
    mass_control: np.ndarray

    @property
    def recall(self) -> float:
        """Share of the tokens asked for that the answer holds, each as often as it holds it (ROUGE-1 recall)."""
        left = self.run.answer.tolist()
        for token in self.tokens.tolist():
            if token in left:
                left.remove(token)
        return 1 - len(left) / self.run.width

    @property
    def succeeded(self) -> bool:
        """Whether the model retrieved the needle."""
        return self.recall > RECALLED


def decode(
    model: Model,
    runs: Sequence[NeedleRun],
    *,
    extra: int = EXTRA_STEPS,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Decoded]:
    """Greedy answers to all runs with every head's most attended key and its mass on the needle, a step.

    A prompt's last token is the first query: the row that predicts an answer's first token is that
    token's. Runs of one length share a batch.

    Args:
        extra: steps beyond the needle's width (and its lead).

    Raises:
        Refused: a model without seen patterns, without logits over tokens, or without a KV cache.
    """
    model.layers_with("pattern")
    _ = model.W_U  # Refused where there is no language-model head
    done: dict[int, Decoded] = {}
    for places in batches(runs):
        found = _decoded(model, [runs[i] for i in places], extra)
        done |= dict(zip(places, found, strict=True))
        advance(len(places))
    return [done[i] for i in range(len(runs))]


def batches(runs: Sequence[NeedleRun]) -> Iterator[list[int]]:
    """Numbers of the runs that share a batch: equally long ones, TOKENS_PER_BATCH tokens together."""
    order = sorted(range(len(runs)), key=lambda i: runs[i].length)
    for length, same in groupby(order, key=lambda i: runs[i].length):
        places, size = list(same), max(1, TOKENS_PER_BATCH // length)
        yield from (places[i : i + size] for i in range(0, len(places), size))


Pattern = Float[Tensor, "batch n_heads rows keys"]


@contextmanager
def rows_shown(model: Model, see: Callable[[int, Pattern], None]) -> Iterator[None]:
    """Inside, `see(layer, rows)` gets every row of attention that is computed, without the masked keys after it.

    What is not seen costs SDPA only: read most of a prompt before.
    """
    layer_of = {
        model.module.get_submodule(block.attention): layer
        for layer, block in enumerate(model.spec.blocks)
        if block.attention
    }

    def listen(module: nn.Module) -> Watch:
        return _Rows(partial(see, layer_of[module])) if module in layer_of else Watch()

    with window(model.module, listen):
        yield


class _Rows(Watch):
    """Hands on the pattern of every call."""

    needs_rows = True

    def __init__(self, see: Callable[[Pattern], None]):
        self.see = see

    def pattern(self, pattern, start):
        self.see(pattern)
        return pattern


@torch.no_grad()
def _decoded(model: Model, runs: Sequence[NeedleRun], extra: int) -> list[Decoded]:
    ids = torch.stack([run.ids for run in runs]).to(model.device)
    # A run has the steps that it would have alone: more of them would find more of the needle.
    most = [run.lead + run.width + extra for run in runs]
    if model.spec.n_ctx is not None:
        most = [min(n, model.spec.n_ctx - ids.shape[1]) for n in most]
    steps = max(most)
    if steps < 1:
        raise BadInput(
            f"a prompt of {ids.shape[1]} tokens leaves no room for an answer: {model.id} reads at most "
            f"{model.spec.n_ctx} (n_ctx); give shorter prompts"
        )
    shape = (len(runs), steps, model.n_layers, model.spec.n_heads)
    top = np.full(shape, -1, dtype=np.int64)
    mass, mass_control = np.full(shape, np.nan), np.full(shape, np.nan)
    step = 0

    def see(layer: int, pattern: Pattern) -> None:
        row, heads = pattern[:, :, -1], pattern.shape[1]
        # A cache of a sliding window has forgotten the first keys: they are missing on the left.
        gone = ids.shape[1] + step - row.shape[-1]
        highest = (row.argmax(-1) + gone).cpu().numpy()
        for i, run in enumerate(runs):
            if not going[i]:
                continue
            top[i, step, layer, :heads] = highest[i]
            mass[i, step, layer, :heads] = span_mass(row[i], run.start - gone, run.width)
            at = run.control - gone
            mass_control[i, step, layer, :heads] = span_mass(row[i], at, run.width)

    cache = read_prompt(model, ids[:, :-1])
    ending = torch.tensor(_end_tokens(model), dtype=torch.long, device=ids.device)
    tokens = np.full((len(runs), steps), -1, dtype=np.int64)
    last, lasts = ids[:, -1:], torch.tensor(most, device=ids.device)
    going = torch.ones(len(runs), dtype=torch.bool, device=ids.device)
    with rows_shown(model, see):
        while step < steps and bool(going.any()):
            logits, cache = read_on(model, last, cache)
            last = logits[:, -1].argmax(-1, keepdim=True)
            said = going & ~torch.isin(last[:, 0], ending)
            tokens[:, step] = last[:, 0].where(said, -1).cpu().numpy()
            step += 1
            going = said & (step < lasts)
    return [
        Decoded(run, tokens[i, :n], top[i, :n], mass[i, :n], mass_control[i, :n])
        for i, (run, n) in enumerate(zip(runs, most, strict=True))
    ]


def span_mass(
    rows: Float[Tensor, "*any keys"], start: int, width: int
) -> Float[np.ndarray, "*any"]:
    """Attention on `width` keys from `start` on, which may lie before the first key there is."""
    return rows[..., max(start, 0) : max(start + width, 0)].sum(-1).cpu().numpy()


def read_prompt(model: Model, ids: Int[Tensor, "batch pos"]) -> Any:
    """The KV cache after `ids`, computed with SDPA."""
    with window(model.module, lambda module: Watch()):
        return read_on(model, ids, None)[1]


def read_on(model: Model, ids: Int[Tensor, "batch pos"], cache: Any) -> tuple[Tensor, Any]:
    """Logits (of the last position at least) and the KV cache after `ids`."""
    known = parameters_of(model.module)
    keep = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    output = model.module(input_ids=ids, past_key_values=cache, use_cache=True, **keep)
    if getattr(output, "past_key_values", None) is None:
        raise Refused(
            f"{model.id} keeps no keys and values of earlier tokens: it cannot be decoded"
        )
    return output.logits, output.past_key_values


def _end_tokens(model: Model) -> list[int]:
    """The tokens that end an answer."""
    config = getattr(model.module, "generation_config", None)
    found = [getattr(config, "eos_token_id", None), getattr(model.tokenizer, "eos_token_id", None)]
    flat = [token for ids in found for token in (ids if isinstance(ids, list) else [ids])]
    return sorted({token for token in flat if isinstance(token, int)})
