"""What edits at a prompt's last token do to the next one, the rest of the prompt being read once.

In a causal model nothing at an earlier position changes when only the last position is edited. The keys
and values of all earlier tokens are therefore computed once and shared by every variant: a variant costs
one token instead of a prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import BadInput
from interp.models.calls import inputs_taken, parameters_of
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.cache import Run
from interp.run.edits import Edit

T = TypeVar("T")

KEYS_PER_FORWARD = 16384
"""How many keys one forward attends to, variants times prompts times positions."""
ROWS_PER_FORWARD = 512
TOLERANCE, HALF = {torch.float32: 1e-3, torch.float64: 1e-6}, 5e-2
"""How far cached logits may be from those of a whole pass, as a share of their largest: rounding of the
weights' type over tens of layers, well below what a forgotten key would change."""


@torch.no_grad()
def replay_last(
    model: Model,
    prompts: Batch | Tensor | Sequence[str],
    variants: Sequence[Sequence[Edit]],
    metric: Callable[[Float[Tensor, "batch d_vocab"]], T],
    *,
    progress: Callable[[int], None] | None = None,
) -> list[T]:
    """`metric` of the last position's logits, for every list of edits of the last position.

    Equal to `model.run(prompts, edits=variant).logits[:, -1]` with the edits at the last position, to
    rounding. The cache is tried on the unedited prompts first; where it does not give their logits, or
    the model keeps none, every variant is a replay of whole prompts from its first edited layer on.

    Args:
        prompts: of a causal model, all ending at the last column: of one length or padded on the left.
        variants: edits without positions, of any site but k and v; they see one position [batch 1 …].
        metric: what is kept of each variant's logits [batch d_vocab].
        progress: called with the number of variants done since the last call.

    Raises:
        BadInput: an edit with positions or of k or v; prompts padded on the right. Refused: a site that
            this model cannot give.

    >>> edits = [[Edit.zero("z", heads=[(1, head)])] for head in range(4)]
    >>> found = replay_last(tiny_model(), torch.tensor([[5, 6, 7]]), edits, lambda logits: logits[0, 3])
    >>> len(found)
    4
    """
    if isinstance(prompts, (list, tuple)) and isinstance(prompts[0], str):
        prompts = model.tokenize(prompts, padding_side="left")
    batch = model.as_batch(prompts)  # type: ignore[arg-type]
    if batch.mask is not None and not bool(batch.mask[:, -1].all()):
        raise BadInput(
            'prompts must end at the last column: tokenize them with padding_side="left"'
        )
    for edit in [edit for variant in variants for edit in variant]:
        if edit.positions is not None or edit.rows is not None or edit.site.name in ("k", "v"):
            raise BadInput(
                f"edits of the last token see that token alone: give the edit of '{edit.site}' without "
                "positions or rows, of another site than k and v"
            )
        edit.layers(model.layers_with(edit.site.name))  # told before anything runs
    prefix = read_prefix(model, batch)
    if prefix is None:
        return _replayed(model, batch, variants, metric, progress)
    found: list[Any] = [None] * len(variants)
    per_forward = max(
        1, min(KEYS_PER_FORWARD // batch.ids.shape[1], ROWS_PER_FORWARD) // batch.size
    )
    starts = [_first_layer(model, variant) for variant in variants]
    for start in sorted(set(starts)):
        same = [i for i in range(len(variants)) if starts[i] == start]
        for chunk in (same[i : i + per_forward] for i in range(0, len(same), per_forward)):
            logits = prefix.read(model, [variants[i] for i in chunk], start)
            for place, i in enumerate(chunk):
                found[i] = metric(logits[place])
            if progress is not None:
                progress(len(chunk))
    return found


def _first_layer(model: Model, variant: Sequence[Edit]) -> int:
    """The first layer that a variant changes; the last one where it changes none."""
    layers = [edit.layers(model.layers_with(edit.site.name))[0] for edit in variant]
    return min(layers, default=model.n_layers - 1)


def _replayed(model: Model, batch: Batch, variants, metric, progress) -> list:
    """The same by replaying whole prompts."""
    last = batch.ids.shape[1] - 1
    start = model.run(batch, capture=["resid_pre"], logits=False)

    def measure(run: Run) -> Any:
        assert run.logits is not None
        return metric(run.logits[:, -1])

    return model.replay(
        start,
        [[replace(edit, positions=[last]) for edit in variant] for variant in variants],
        measure,
        logits=torch.tensor([last]),
        progress=progress,
    )


@dataclass(frozen=True, eq=False)
class Prefix:
    """All positions of a batch but the last as a cache, and the clean run of the last one after it.

    `read` keeps the graph where gradients are on: from edits to logits, not through the prefix.
    """

    batch: Batch
    cache: Any
    clean: Run

    def read(
        self, model: Model, variants: Sequence[Sequence[Edit]], start: int
    ) -> Float[Tensor, "variants batch d_vocab"]:
        """Logits of the last token under every variant at once, computed from block `start` on.

        No variant may edit a layer before `start`.
        """
        n, size = len(variants), self.batch.size
        edits = [
            edit.on_rows(slice(place * size, (place + 1) * size))
            for place, variant in enumerate(variants)
            for edit in variant
        ]
        inputs = {name: value.repeat(n, 1) for name, value in _last(model, self.batch).items()}
        cache = _copies(self.cache, size, n, start if model.n_layers == len(self.cache) else 0)
        last = Batch({"input_ids": inputs["input_ids"]})
        with model.hooked(last, edits=edits, clean=self.clean, start=start):
            output = model.module(**inputs, past_key_values=cache, use_cache=True)
        return output.logits[:, -1].unflatten(0, (n, size))


@torch.no_grad()
def read_prefix(model: Model, batch: Batch) -> Prefix | None:
    """The prefix of a batch, if its last token read on from there is as in a whole pass; else None."""
    if model.spec.named or not model.spec.causal or batch.ids.shape[1] < 2:
        return None
    parameters = parameters_of(model.module)
    if "past_key_values" not in parameters or "use_cache" not in parameters:
        return None
    end = batch.ids.shape[1] - 1
    before = {name: value[:, :end] for name, value in _inputs(model, batch).items()}
    keep = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    output = model.module(**before, use_cache=True, **keep)
    cache = getattr(output, "past_key_values", None)
    if not hasattr(cache, "layers"):
        return None
    inputs = _last(model, batch)
    with model.hooked(Batch({"input_ids": inputs["input_ids"]}), ["resid_pre"]) as clean:
        mine = _copies(cache, batch.size, 1, 0)
        found = model.module(**inputs, past_key_values=mine, use_cache=True).logits[:, -1]
    # One prompt tells; the one with the most padding, as that is the likelier to go wrong.
    row = 0 if batch.mask is None else int(batch.mask.sum(1).argmin())
    one = slice(row, row + 1)
    whole = model.run(batch.rows(one), logits=torch.tensor([end])).logits
    assert whole is not None
    error = float((found[one] - whole[:, -1]).abs().max() / whole.abs().max().clamp_min(1e-9))
    good = error < TOLERANCE.get(model.dtype, HALF)
    return Prefix(batch, cache, clean) if good else None


def _copies(cache: Any, size: int, times: int, start: int) -> Any:
    """A cache of `times` copies of its rows, one copy after the other; layers before `start` stay."""
    mine = copy.copy(cache)
    order = torch.arange(size).repeat(times)
    # Some layers (convolutions) are written in place: each reader gets its own.
    mine.layers = [*cache.layers[:start], *copy.deepcopy(cache.layers[start:])]
    for layer in mine.layers[start:]:
        layer.reorder_cache(order)
    return mine


def _inputs(model: Model, batch: Batch) -> dict[str, Tensor]:
    """What the model is called with, positions as it counts them."""
    return inputs_taken(model.module, batch, model.spec.first_position)


def _last(model: Model, batch: Batch) -> dict[str, Tensor]:
    """The same for the last position alone; the mask covers what stands before it too."""
    return {
        name: value if name == "attention_mask" else value[:, -1:]
        for name, value in _inputs(model, batch).items()
    }
