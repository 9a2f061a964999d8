"""The loss with any set of heads removed: the game whose players are heads, evaluated by replay.

A removed head's z is its mean over all prompts and positions of the clean run, one fixed vector a head, so
every prompt is judged by itself. Beside a base run, in which some heads are removed already, a variant
that differs from layer l on replays layers l…L only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.data.prompts import Prompts, repeated_tokens, text_windows
from interp.errors import BadInput, Refused, unknown
from interp.metrics import loss
from interp.models.model import Model
from interp.run.cache import Run
from interp.run.edits import Edit

Head = tuple[int, int]
Removed = Bool[Tensor, "n heads"]
PROMPTS = ("repeated", "text")


def prompts_of(model: Model, data: str, n: int, seed: int, length: int = 64) -> Prompts:
    """`n` prompts of a kind: "repeated" random tokens (judged on the second copy) or "text" (prose)."""
    if data == "repeated":
        return repeated_tokens(model, n, length=length, seed=seed)[0]
    if data == "text":
        return text_windows(model, n, length=length, seed=seed)
    raise unknown("kind of prompts", data, PROMPTS)


@dataclass(frozen=True)
class Base:
    """A run with some heads removed, from which variants are replayed.

    Attributes:
        run: holds every resid_pre. removed: which heads, prompt by prompt. losses: of each prompt, nats a token.
    """

    run: Run
    removed: Removed
    losses: Float[Tensor, " n"]


@dataclass(frozen=True)
class Game:
    """Losses of prompts under removal of heads.

    Attributes:
        prompts: what is run; `prompts.judged` says where the loss is taken.
        heads: the players, (layer, head) pairs; the columns of every mask of removed heads.
        means: each layer's mean z [n_heads d_head].

    >>> from interp.data.prompts import repeated_tokens
    >>> game = Game.of(tiny_model(), repeated_tokens(tiny_model(), 2, length=8)[0])
    >>> base = game.base()
    >>> game.losses(base, [game.mask([(1, 3)])]).shape
    torch.Size([1, 2])
    """

    model: Model
    prompts: Prompts
    heads: tuple[Head, ...]
    means: Mapping[int, Tensor]

    @staticmethod
    def of(model: Model, prompts: Prompts) -> Game:
        """The game of all heads on these prompts; Refused where no next-token loss can be taken."""
        model.layers_with("z")
        if not model.spec.causal or model.spec.unembedding is None:
            raise Refused(f"{model.id} predicts no next token: heads have no loss to be judged by")
        run = model.run(prompts.batch, capture=["z"], logits=False)
        means = {layer: z.mean((0, 1)) for layer, z in run.cache.by_layer("z").items()}
        return Game(model, prompts, tuple(model.spec.heads), means)

    def rows(self, rows: slice) -> Game:
        """The same game, means included, on some of the prompts."""
        return Game(self.model, self.prompts.rows(rows), self.heads, self.means)

    def mask(self, heads: Iterable[Head] = ()) -> Removed:
        """These heads removed in every prompt."""
        heads = set(heads)
        if missing := heads - set(self.heads):
            raise BadInput(f"{self.model.id} has no head L{min(missing)[0]}H{min(missing)[1]}")
        one = torch.tensor([head in heads for head in self.heads])
        return one.expand(len(self.prompts), -1)

    def base(self, removed: Removed | None = None) -> Base:
        """A run with these heads removed (none by default)."""
        removed = self.mask() if removed is None else removed
        run = self.model.run(
            self.prompts.batch,
            capture=["resid_pre"],
            edits=self.edits(removed),
            logits=self.prompts.judged,
        )
        return Base(run, removed, self._loss(run))

    def losses(
        self, base: Base, variants: Sequence[Removed], advance: Callable[[int], None] | None = None
    ) -> Float[Tensor, "variants n"]:
        """Loss of every prompt under each variant's removed heads, in nats a token."""
        if not variants:
            return torch.zeros(0, len(self.prompts))
        layers = torch.tensor([layer for layer, _ in self.heads])
        edits: list[list[Edit]] = []
        for removed in variants:
            changed = layers[(removed != base.removed).any(0)]
            # Where nothing changed, the last layer is replayed as it was.
            first = int(changed.min() if len(changed) else layers.max())
            edits.append(self.edits(removed, first, always=first))
        return torch.stack(
            self.model.replay(
                base.run, edits, self._loss, logits=self.prompts.judged, progress=advance
            )
        )

    def toggled(
        self, base: Base, heads: Sequence[Head], advance: Callable[[int], None] | None = None
    ) -> Float[Tensor, "heads n"]:
        """Marginal loss of each head: loss without it less loss with it, all others as in `base`.

        Where a prompt's base has the head, it is removed; where it has not, it is put back.
        """
        variants = []
        for head in heads:
            removed = base.removed.clone()
            removed[:, self.heads.index(head)] ^= True
            variants.append(removed)
        found = self.losses(base, variants, advance)
        if not len(found):
            return found
        gone = torch.stack([base.removed[:, self.heads.index(head)] for head in heads])
        return torch.where(gone, base.losses - found, found - base.losses)

    def edits(self, removed: Removed, first: int = 0, always: int | None = None) -> list[Edit]:
        """One edit of z for every layer from `first` on that loses heads; `always` one at that layer."""
        found = []
        for layer, mean in self.means.items():
            columns = [i for i, (at, _) in enumerate(self.heads) if at == layer]
            lost = removed[:, columns]
            if layer >= first and (bool(lost.any()) or layer == always):
                found.append(Edit.apply(f"z.{layer}", _replaced(lost, mean)))
        return found

    def _loss(self, run: Run) -> Float[Tensor, " n"]:
        assert run.logits is not None
        return loss(run.logits, self.prompts.ids[:, self.prompts.judged + 1]).cpu()


def _replaced(lost: Removed, mean: Tensor) -> Callable:
    where = lost[:, None, :, None]
    return lambda z, seen: torch.where(where.to(z.device), mean.to(z), z)
